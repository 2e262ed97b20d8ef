package transport

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A tree over the three methods that every Transport has: one call for each file, and one command for what else there is. It
// is for hosts without tar.

// singleDir makes the directory $1 and the ones above it, owned by $2 (UID:GID) unless that is empty.
const singleDir = `umask 022
mk() {
	if [ -d "$1" ] && [ ! -L "$1" ]; then return 0; fi
	if [ "$1" = "$d" ] && [ -d "$1" ]; then return 0; fi
	case $1 in ./*/*) mk "${1%/*}" || return;; esac
	mkdir "$1" && { [ -z "$o" ] || chown "$o" "$1"; }
}
d=$1; o=$2
while :; do case $d in ./?*/) d=${d%/};; *) break;; esac; done
mk "$d"`

// singleEnd gives the directory $1 its mode $2, owner $3, if not empty, and time $4.
const singleEnd = `{ [ -z "$3" ] || chown "$3" "$1"; } && chmod "$2" "$1" && { touch -d "@$4" "$1" 2>/dev/null || :; }`

// singleLink makes $1 a symbolic link to $2.
const singleLink = `rm -f "$1" && ln -s -- "$2" "$1" && { [ -z "$3" ] || chown -h "$3" "$1"; }`

// singleUploader is an [uploader] for one call after the other.
type singleUploader struct {
	*known
	ctx   context.Context
	t     Transport
	dst   string
	owner *User
}

func (tr *tree) uploadSingly(ctx context.Context, t Transport, dst string, src fs.FS) error {
	u := &singleUploader{tr.known, ctx, t, dst, tr.opts.Owner}
	if err := u.run(singleDir, dst, ownerOf(u.owner)); err != nil {
		return err
	}
	walked := make(chan error, 1)
	go func() { walked <- guarded(func() error { return tr.walk(ctx, src, u) }) }() // waited for, unless a Read of src's does not return
	select {
	case err := <-walked:
		return err
	case <-ctx.Done():
		return tr.join(walked)
	}
}

func (u *singleUploader) path(name string) string { return strings.TrimRight(u.dst, "/") + "/" + name }

// run runs a script with a remote path and other arguments.
func (u *singleUploader) run(script, remote string, args ...string) error {
	said := new(edges)
	err := u.t.Exec(u.ctx, Command{Args: Shell(script, append([]string{relative(remote)}, args...)...), Dir: "/", Stderr: said})
	if _, exited := ExitCode(err); exited && err != nil {
		told := hostError(said.String())
		err = &causes{text: told.Error(), errs: []error{told, err}}
	}
	return err
}

func (u *singleUploader) enter(e entry) error {
	return u.run(singleDir, u.path(e.name), ownerOf(u.owner))
}

func (u *singleUploader) leave(e entry) error {
	return u.run(singleEnd, u.path(e.name), octal(e.mode), ownerOf(u.owner), strconv.FormatInt(max(0, e.modified.Unix()), 10))
}

func octal(m fs.FileMode) string { return fmt.Sprintf("%04o", m.Perm()) }

func (u *singleUploader) link(e entry) error {
	return u.run(singleLink, u.path(e.name), e.target, ownerOf(u.owner))
}

func (u *singleUploader) file(e entry, content io.Reader) error {
	opts := &UploadOptions{Mode: e.mode.Perm(), Owner: u.owner, ModTime: e.modified}
	if e.modified.Unix() <= 0 {
		opts.ModTime = time.Unix(1, 0) // file systems that know no times have the year 1
	}
	if err := u.t.Upload(u.ctx, u.path(e.name), content, opts); err != nil {
		return err
	}
	if opts.Mode == 0 {
		return u.run(`chmod 0 "$1"`, u.path(e.name))
	}
	return nil
}

// singleList lists what is below the directory $1: a letter for the type, the path, NUL, and, of a directory, its mode as ls shows it and its time if that
// can be had, of a link, its target; NUL. Its first line is that of tarDownload.
const singleList = `LC_ALL=C; export LC_ALL
if [ ! -d "$1" ]; then
	if [ -e "$1" ] || [ -L "$1" ]; then echo file; else echo absent; fi
	exit 0
fi
cd "$1" 2>&1 || { echo failed; exit 0; }
echo list
walk() {
	if [ ! -r "$1" ] || [ ! -x "$1" ]; then echo "$1: Permission denied" >&2; exit 1; fi
	for f in "$1"/* "$1"/.[!.]* "$1"/..?*; do
		if [ -L "$f" ]; then
			t=$(readlink "$f" && echo .) || exit 1
			printf 'l%s\0%s\0' "$f" "${t%?.}"
		elif [ -d "$f" ]; then
			t=$(stat -c %Y "$f" 2>/dev/null || stat -f %m "$f" 2>/dev/null || date -r "$f" +%s 2>/dev/null)
			printf 'd%s\0%.10s%s\0' "$f" "$(ls -ld "$f")" "$t"
			walk "$f"
		elif [ -f "$f" ]; then
			printf 'f%s\0\0' "$f"
		elif [ -e "$f" ]; then
			printf 'o%s\0\0' "$f"
		fi
	done
}
walk .`

func (tr *tree) downloadSingly(ctx context.Context, t Transport, src string, s *sink) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p, a, said := newPipe(), newGreeting(), new(edges)
	done := make(chan error, 1)
	go func() { // waited for below
		err := t.Exec(ctx, Command{Args: Shell(singleList, relative(src)), Dir: "/", Stdout: &firstLines{next: p, greeting: a}, Stderr: said})
		a.end(err)
		if err == nil {
			err = p.flush()
		}
		p.closeWrite(err)
		done <- err
	}()
	<-a.said
	err := a.err
	if err == nil {
		err = tr.readList(ctx, t, src, p, s)
	}
	p.closeRead(errCut)
	execErr := <-done
	switch {
	case a.err != nil && a.err != errNoGreeting:
		return a.err
	case execErr != nil && !errors.Is(execErr, errCut):
		if _, exited := ExitCode(execErr); exited {
			told := hostError(said.String())
			return &causes{text: fmt.Sprintf("listing it: %v", told), errs: []error{told, execErr}}
		}
		return execErr
	}
	return err
}

// readList downloads what a list names.
func (tr *tree) readList(ctx context.Context, t Transport, src string, list io.Reader, s *sink) error {
	in := bufio.NewReaderSize(list, 2*maxTreePath)
	for {
		head, err := in.ReadSlice(0)
		if err == io.EOF && len(head) == 0 {
			return nil
		}
		if err != nil {
			return listError(err)
		}
		kind, name := head[0], strings.TrimPrefix(string(head[1:max(1, len(head)-1)]), "./")
		tail, err := in.ReadSlice(0)
		if err != nil {
			return listError(err)
		}
		detail := string(tail[:len(tail)-1])
		switch kind {
		case 'd':
			err = s.dir(entry{name: name, mode: fs.ModeDir | listedMode(detail), modified: listedTime(detail)})
		case 'l':
			err = s.link(entry{name: name, mode: fs.ModeSymlink, target: detail})
		case 'f':
			err = tr.single(ctx, t, src, name, s.file)
		default:
			err = s.refuse(name, errors.New("it is neither file nor directory nor symbolic link"))
		}
		if err != nil {
			return err
		}
	}
}

func listError(err error) error {
	if err == bufio.ErrBufferFull {
		return errors.New("the host's list has a name that is longer than a path can be")
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("the host's list breaks off: %w", err)
}

// listedMode reads drwxr-xr-x.
func listedMode(s string) (m fs.FileMode) {
	for i := 1; i < len(s) && i < 10; i++ {
		if c := s[i]; c != '-' && c != 'S' && c != 'T' {
			m |= 1 << (9 - i)
		}
	}
	return m
}

// listedTime reads the seconds behind the mode.
func listedTime(s string) time.Time {
	if len(s) <= len("drwxr-xr-x") {
		return time.Time{}
	}
	sec, err := strconv.ParseInt(s[len("drwxr-xr-x"):], 10, 36) // more than 36 bits are no time that a file system knows
	if err != nil {
		return time.Time{}
	}
	return time.Unix(sec, 0)
}

// single downloads one file of a tree by its name and hands it to take, which need not read it.
func (tr *tree) single(ctx context.Context, t Transport, src, name string, take func(entry, io.Reader) error) error {
	if why := checkName(name); why != nil {
		return take(entry{name: name}, nil) // which refuses it
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p := newPipe()
	infos, done := make(chan fs.FileInfo, 1), make(chan error, 1)
	go func() { // waited for below
		err := t.Download(ctx, strings.TrimRight(src, "/")+"/"+name, p, &DownloadOptions{Stat: func(i fs.FileInfo) { infos <- i }})
		if err == nil {
			err = p.flush()
		}
		p.closeWrite(err)
		done <- err
	}()
	var info fs.FileInfo
	select {
	case info = <-infos:
	case err := <-done:
		select {
		case info = <-infos:
			done <- err
		default:
			if err == nil {
				err = errors.New("Download did not tell the file's size")
			}
			if errors.Is(err, syscall.EISDIR) || errors.Is(err, fs.ErrInvalid) {
				return tr.skip(name, err) // it was replaced by something else
			}
			return err
		}
	}
	err := take(entry{name: name, mode: info.Mode().Perm(), size: info.Size(), modified: info.ModTime()}, p)
	cancel(errCut)
	p.closeRead(errCut)
	if got := <-done; err == nil && got != nil && !errors.Is(got, errCut) {
		err = got
	}
	return err
}
