package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lxdtransport/transport/internal/sftp"
)

// One file up, one file down, for servers without SFTP: the bytes go through LXD's files endpoint, which truncates a file in place, knows no
// rename and hangs on FIFOs; what it cannot do is done by a command in the instance.

// Statuses of the scripts.
const (
	scriptMissing   = 41 // no such file, or no such directory
	scriptDirectory = 42
	scriptOther     = 43 // neither file nor directory
	scriptSize      = 44
)

// script runs a script in the instance and returns its output. Its statuses become errors.
func (t *LXD) script(ctx context.Context, script string, args ...string) (string, error) {
	out, err := Output(ctx, t, Command{Args: Shell(script, args...)})
	exit, ok := errors.AsType[*ExitError](err)
	if !ok {
		return string(out), err
	}
	switch exit.Code {
	case scriptMissing:
		return "", fs.ErrNotExist
	case scriptDirectory:
		return "", fmt.Errorf("it is a directory: %w", syscall.EISDIR)
	case scriptOther:
		return "", fmt.Errorf("it is no regular file, only regular files are transferred: %w", fs.ErrInvalid)
	case scriptSize:
		return "", fmt.Errorf("the file that arrived does not have the size of what was sent: %w", io.ErrShortWrite)
	}
	return "", fmt.Errorf("%s: %w", quoted(string(exit.Stderr)), err)
}

// before: $1 destination, $2 its directory, $3 "yes" for MkdirAll, $4 the owner of new directories.
const scriptBefore = `
if [ -d "$1" ]; then exit 42; fi
if [ -e "$1" ] && [ ! -f "$1" ] && [ ! -h "$1" ]; then exit 43; fi
make() {
	[ -z "$1" ] || [ -d "$1" ] && return
	make "${1%/*}" "$2" && mkdir -m 755 -- "$1" && { [ -z "$2" ] || chown -- "$2" "$1"; }
}
[ -d "$2" ] && exit 0
[ "$3" = yes ] || exit 41
make "$2" "$4"`

// after: $1 temporary file, $2 destination, $3 size, $4 owner, $5 mode, $6 seconds since 1970; "" leaves what is usual.
const scriptAfter = `
set -e
[ "$(stat -c %s -- "$1")" = "$3" ] || exit 44
owner=$4 mode=$5
if [ -f "$2" ] && [ ! -h "$2" ]; then
	: "${owner:=$(stat -c %u:%g -- "$2")}" "${mode:=$(stat -c %a -- "$2")}"
fi
chown -- "${owner:-0:0}" "$1"
chmod -- "${mode:-644}" "$1"
[ -z "$6" ] || touch -d "@$6" -- "$1"
if [ -d "$2" ]; then exit 42; fi # mv would move into it
exec mv -f -- "$1" "$2"`

// about: $1 file. Prints size, mode, owner and time, and the file that it is when links have been followed, which the files endpoint
// does not do.
const scriptAbout = `
[ -e "$1" ] || exit 41
[ ! -d "$1" ] || exit 42
[ -f "$1" ] || exit 43
stat -L -c '%s %a %u %g %Y' -- "$1" && exec readlink -f -- "$1"`

func (t *LXD) uploadREST(ctx context.Context, dst string, in *source, opts *UploadOptions) error {
	dir, owner, mode, modified := parent(dst), "", "", ""
	if o := opts.Owner; o != nil {
		owner = fmt.Sprintf("%d:%d", o.UID, o.GID)
	}
	if opts.Mode != 0 {
		mode = strconv.FormatUint(uint64(unixMode(opts.Mode)), 8)
	}
	if !opts.ModTime.IsZero() {
		modified = strconv.FormatInt(opts.ModTime.Unix(), 10)
	}
	mkdir := "no"
	if opts.MkdirAll {
		mkdir = "yes"
	}
	if _, err := t.script(ctx, scriptBefore, dst, dir, mkdir, owner); err != nil {
		return orCause(ctx, err)
	}
	tmp := temporary(dst)
	posting, cancel := context.WithCancel(ctx)
	body := &sourceReader{ctx: posting, in: in, progress: opts.Progress}
	err := t.postFile(ctx, tmp, body)
	cancel()
	if e := body.stop(); e != nil {
		err = e
	}
	if err == nil {
		_, err = t.script(ctx, scriptAfter, tmp, dst, strconv.FormatInt(body.sent, 10), owner, mode, modified)
	}
	if err == nil {
		return nil
	}
	return also(orCause(ctx, err), t.deleteFile(ctx, tmp))
}

// deleteFile removes a temporary file after a failure. A server whose request was broken off may not have made the file yet: it is looked
// for until it was there, or for a second.
func (t *LXD) deleteFile(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTime)
	defer cancel()
	for start := time.Now(); ; pause(ctx, askPause) {
		err := t.rest.call(ctx, http.MethodDelete, t.path("/files"), t.fileQuery(name), nil, nil)
		no, ok := errors.AsType[*apiError](err)
		missing := ok && no.code == http.StatusNotFound
		switch {
		case err == nil, missing && time.Since(start) > time.Second:
			return nil
		case !missing:
			return fmt.Errorf("the temporary file %s may be left: %w", name, err)
		}
	}
}

func (t *LXD) fileQuery(name string) url.Values {
	q := t.query()
	q.Set("path", name)
	return q
}

func (t *LXD) postFile(ctx context.Context, name string, body io.Reader) error {
	req, err := t.rest.request(ctx, http.MethodPost, t.path("/files"), t.fileQuery(name), body)
	if err != nil {
		return err
	}
	// With a form's content type, which some clients send by default, LXD would write an empty file.
	req.Header.Set("Content-Type", "application/octet-stream")
	req.Header.Set("X-LXD-type", "file")
	req.Header.Set("X-LXD-write", "overwrite")
	req.Header.Set("X-LXD-mode", "0600") // without its 0 it would be decimal
	req.Header.Set("X-LXD-uid", "0")
	req.Header.Set("X-LXD-gid", "0")
	resp, err := t.rest.http.Do(req)
	if err != nil {
		return t.rest.explainDial(err)
	}
	err = t.explain(ctx, decode(resp, nil))
	if no, ok := errors.AsType[*apiError](err); ok {
		if system := (&sftp.StatusError{Text: no.text}).Unwrap(); system != nil {
			err = fmt.Errorf("%w: %w", system, err)
		}
	}
	return err
}

// sourceReader reads from a source. An error that is not io.EOF aborts the request.
type sourceReader struct {
	ctx      context.Context
	in       *source
	progress func(int64)

	mu        sync.Mutex // held during Read: net/http may call it after it has returned an answer
	stopped   bool
	buf, rest []byte
	last      error
	sent      int64
	err       error
}

// stop makes sure that nothing is read or reported any more, and returns the source's error.
func (r *sourceReader) stop() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = true
	return r.err
}

func (r *sourceReader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return 0, context.Canceled
	}
	if len(r.rest) == 0 {
		if r.last != nil {
			r.report()
			return 0, r.last
		}
		if r.buf != nil {
			r.in.Free(r.buf)
			r.report()
		}
		r.buf, r.last = r.in.Next(r.ctx)
		r.rest = r.buf
		if r.last != nil && r.last != io.EOF {
			r.err = r.last
			return 0, r.err
		}
		if len(r.rest) == 0 {
			return 0, r.last
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	r.sent += int64(n)
	return n, nil
}

func (r *sourceReader) report() {
	if r.progress != nil {
		r.progress(r.sent)
	}
}

func (t *LXD) downloadREST(ctx context.Context, d *download) error {
	about, err := t.script(ctx, scriptAbout, d.src)
	if err != nil {
		return err
	}
	var info fileInfo
	var seconds int64
	about, real, _ := strings.Cut(about, "\n")
	if _, err := fmt.Sscanf(about, "%d %o %d %d %d", &info.size, &info.mode, &info.owner.UID, &info.owner.GID, &seconds); err != nil {
		return fmt.Errorf("stat in the instance printed %q: %w", quoted(about), err)
	}
	info.name, info.modified = path.Base(d.src), time.Unix(seconds, 0)
	end, exact, err := d.begin(info)
	if err != nil {
		return err
	}
	req, err := t.rest.request(ctx, http.MethodGet, t.path("/files"), t.fileQuery(strings.TrimSuffix(real, "\n")), nil)
	if err != nil {
		return err
	}
	resp, err := t.rest.http.Do(req)
	if err != nil {
		return t.rest.explainDial(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return t.explain(ctx, decode(resp, nil))
	}
	if kind := resp.Header.Get("X-LXD-type"); kind != "file" {
		return fmt.Errorf("it is a %s, only regular files are transferred: %w", quoted(kind), fs.ErrInvalid)
	}
	body := io.Reader(resp.Body)
	if exact {
		body = io.LimitReader(body, end) // it may have grown
	}
	if _, err := io.CopyN(io.Discard, body, d.opts.Offset); err != nil {
		return fmt.Errorf("skipping to the offset: %w", err)
	}
	buf := make([]byte, stdinMessage)
	for {
		n, err := body.Read(buf)
		if n > 0 {
			if err := d.write(buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("the server's answer broke off: %w", err)
		}
	}
	if exact {
		return d.complete(end)
	}
	return nil
}
