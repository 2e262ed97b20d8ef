package transport

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
)

// A tree as one tar stream through the host's own tar. Its script says on its output first what it has found, in one line; only
// then does the stream begin.

// tarPrelude finds out which tar there is. The words it says are those of tarAnswer.
const tarPrelude = `LC_ALL=C; export LC_ALL; unset TAR_OPTIONS GZIP; umask 022
case $(tar --version 2>&1 </dev/null) in
*"GNU tar"*) kind=gnu;;
*[Bb]usy[Bb]ox*) kind=busybox;;
*bsdtar*) kind=bsdtar;;
*) echo none; exit 0;;
esac
`

// tarUpload gets the directory as $1 and UID:GID, or nothing, as $2. GNU tar takes -P for names that may be trusted: without it, it makes links with
// ".." last, and spoils the times of the directories that they are in.
const tarUpload = tarPrelude + `mk() {
	if [ -d "$1" ]; then return 0; fi
	case $1 in ./*/*) mk "${1%/*}" || return;; esac
	mkdir "$1" && { [ -z "$o" ] || chown "$o" "$1"; }
}
d=$1; o=$2
while :; do case $d in ./?*/) d=${d%/};; *) break;; esac; done
mk "$d" 2>&1 || { echo failed; exit 0; }
if [ -n "$o" ] && [ "$(id -u)" != 0 ]; then echo notroot; exit 0; fi
if [ -n "$o" ]; then s=; else s=-o; fi
echo $kind
if [ $kind = gnu ]; then s="$s -P"; fi
exec tar -x -p $s -f - -C "$d"
`

// tarDownload gets the directory as $1. LXD makes a message of every piece that it reads: busybox tar, which cannot be told to write large ones, has dd
// collect them, which halves the time of many small files.
const tarDownload = tarPrelude + `if [ ! -d "$1" ]; then
	if [ -e "$1" ] || [ -L "$1" ]; then echo file; else echo absent; fi
	exit 0
fi
cd "$1" 2>&1 || { echo failed; exit 0; }
echo $kind
case $kind in
gnu) exec tar -c -b 128 -f - --format=gnu --hard-dereference --quoting-style=literal .;;
busybox)
	command -v dd >/dev/null || exec tar -c -f - .
	exec 3>&1
	s=$({ { tar -c -f - . 3>&- 4>&-; echo $? >&4; } | dd obs=64k 2>/dev/null >&3 3>&- 4>&- || echo 1 >&4; } 4>&1)
	[ "$s" = 0 ] || exit 1;;
bsdtar) exec tar -c -b 128 -f - --format gnutar .;;
esac
`

// tarAnswer tells what a script has said so far means. Errors of commands may stand before the line that counts.
func tarAnswer(lines string) (final bool, err error) {
	lines = strings.TrimSuffix(lines, "\n")
	before, last := "", lines
	if i := strings.LastIndexByte(lines, '\n'); i >= 0 {
		before, last = lines[:i], lines[i+1:]
	}
	switch last {
	case "gnu", "busybox", "bsdtar", "list":
		return true, nil
	case "none":
		return true, errNoTar
	case "absent":
		return true, fs.ErrNotExist
	case "file":
		return true, fmt.Errorf("it is not a directory: %w", syscall.ENOTDIR)
	case "notroot":
		return true, fmt.Errorf("commands in the host do not run as root, so that files cannot be given to others (TreeOptions.Owner): %w", fs.ErrPermission)
	case "failed":
		return true, hostError(before)
	}
	return false, nil
}

// hostError is an error of which the host told in words.
func hostError(text string) error {
	text = strings.TrimSpace(text)
	shown := strings.Map(printable, strings.ToValidUTF8(strings.ReplaceAll(text, "\n", "; "), "?"))
	if len(shown) > maxTold {
		shown = shown[:maxTold] + " …"
	}
	err := fmt.Errorf("the host says: %s", shown)
	for words, is := range map[string]error{
		"No space left on device": syscall.ENOSPC, "Disk quota exceeded": syscall.EDQUOT, "Read-only file system": syscall.EROFS,
		"Permission denied": fs.ErrPermission, "Operation not permitted": fs.ErrPermission, "Is a directory": syscall.EISDIR,
		"Not a directory": syscall.ENOTDIR, "File name too long": syscall.ENAMETOOLONG,
		": Wrote only ": syscall.ENOSPC, // GNU tar's way to say it
	} {
		if strings.Contains(text, words) {
			return &causes{text: err.Error(), errs: []error{err, is}}
		}
	}
	return err
}

// printable keeps what a host says from being a command to a terminal.
func printable(r rune) rune {
	if unicode.IsPrint(r) || r == '\t' {
		return r
	}
	return '?'
}

// maxTold is how many bytes of what a host says are in an error.
const maxTold = 2000

// tarError explains why a script has ended as it has. said is what it wrote to its standard error.
func tarError(err error, said string) error {
	code, exited := ExitCode(err)
	if !exited || err == nil {
		return err
	}
	if said == "" {
		return fmt.Errorf("the host's tar failed and did not say why: %w", err)
	}
	told := hostError(said)
	return &causes{text: fmt.Sprintf("the host's tar ended with status %d: %v", code, told), errs: []error{err, told}}
}

// noShell reports whether a script could not run for want of a shell, or of a host that runs.
func noShell(err error) bool {
	code, exited := ExitCode(err)
	return exited && (code == 126 || code == 127) || errors.Is(err, ErrNotRunning) && errors.Is(err, ErrNotStarted)
}

// greeting is what a script has said it has found.
type greeting struct {
	once sync.Once
	said chan struct{} // closed when err and kind are set
	err  error
	kind string // which tar
}

func newGreeting() *greeting { return &greeting{said: make(chan struct{})} }

func (a *greeting) set(err error) { a.answer("", err) }

func (a *greeting) answer(lines string, err error) {
	a.once.Do(func() {
		lines = strings.TrimSuffix(lines, "\n")
		a.err, a.kind = err, lines[strings.LastIndexByte(lines, '\n')+1:]
		close(a.said)
	})
}

// end takes note of the script's end, which may have come without an answer.
func (a *greeting) end(err error) {
	if err == nil || noShell(err) {
		err = errNoTar
	}
	a.set(err)
}

// firstLines passes a stream on from behind the line with the answer.
type firstLines struct {
	next     io.Writer // nil: nothing follows
	greeting *greeting
	lines    []byte
	on       bool
}

func (f *firstLines) Write(p []byte) (int, error) {
	written := 0
	for !f.on {
		i := bytes.IndexByte(p, '\n')
		f.lines = append(f.lines, p[:i+1]...)
		if i < 0 {
			f.lines = append(f.lines, p...)
		}
		if len(f.lines) > maxGreeting {
			return written, errors.New("the host's shell sends something else than the answer that was expected")
		}
		if i < 0 {
			return written + len(p), nil
		}
		p, written = p[i+1:], written+i+1
		if final, err := tarAnswer(string(f.lines)); final {
			f.on = true
			f.greeting.answer(string(f.lines), err)
		}
	}
	if f.next == nil {
		return written + len(p), nil // tar says nothing on its standard output
	}
	n, err := f.next.Write(p)
	return written + n, err
}

// cutOff is called when nothing more comes. The script may wait for its input until then.
func (f *firstLines) cutOff() { f.greeting.set(errNoGreeting) }

// errNoGreeting is what ends the input of a script whose answer was lost.
var errNoGreeting = errors.New("the answer of the host's shell was lost")

const maxGreeting = 8 << 10

// uploadTar uploads through the host's tar. It returns errNoTar before it has called any of the caller's functions.
func (tr *tree) uploadTar(ctx context.Context, t Transport, dst string, src fs.FS) error {
	owner := ownerOf(tr.opts.Owner)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p, a, said := newPipe(), newGreeting(), new(edges)
	walked := make(chan error, 1)
	links := new(lateLinks)
	go func() { // waited for below, unless a Read of src's does not return
		<-a.said
		err := a.err
		if err == nil {
			if a.kind != "busybox" {
				links = nil
			}
			err = guarded(func() error { return tr.writeTar(ctx, p, src, links) })
		}
		p.closeWrite(err)
		walked <- err
	}()
	err := t.Exec(ctx, Command{
		Args: Shell(tarUpload, relative(dst), owner), Dir: "/", Stdin: p, Stdout: &firstLines{greeting: a}, Stderr: said,
	})
	a.end(err)
	p.closeRead(errCut)
	walkErr := tr.join(walked)
	switch {
	case a.err != nil && err != nil && (a.err == err || a.err == errNoGreeting):
		return tarError(err, said.String())
	case a.err != nil:
		return a.err
	case walkErr != nil && !errors.Is(walkErr, errCut):
		return walkErr
	case err != nil && tr.last != "":
		// Not every tar says which entry it was. This one is it, or comes soon after it.
		err := tarError(err, said.String())
		return &causes{text: fmt.Sprintf("%v (the last entry that it was sent is %.256q)", err, tr.last), errs: []error{err}}
	case err != nil:
		return tarError(err, said.String())
	case walkErr != nil:
		return errors.New("the host's tar ended before the tree did, and says that all is well")
	case a.kind == "busybox" && said.String() != "":
		// It goes on when a directory cannot be made, and exits with 0 in the end.
		return hostError(said.String())
	case links != nil:
		return links.run(ctx, t, dst, owner)
	}
	return nil
}

// writeTar makes a tar stream of a tree. links takes the links that do not come with it; nil: all come.
func (tr *tree) writeTar(ctx context.Context, p *pipe, src fs.FS, links *lateLinks) error {
	w := bufio.NewWriterSize(p, 4096)
	u := &tarWriter{known: tr.known, tw: tar.NewWriter(w), owner: tr.opts.Owner, late: links}
	if err := tr.walk(ctx, src, u); err != nil {
		return err
	}
	if err := u.tw.Close(); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return p.flush()
}

// treeGrace is how long, after the end of everything else, a Read of the caller's may go on.
const treeGrace = 2 * time.Second

// join waits for a goroutine that reads from the caller's file system, unless that does not return.
func (tr *tree) join(done <-chan error) error {
	late := time.NewTimer(treeGrace)
	defer late.Stop()
	select {
	case err := <-done:
		return err
	case <-late.C:
		tr.detach()
		return errors.New("a Read of the source has not returned")
	}
}

// tarWriter is an uploader that makes a tar stream.
type tarWriter struct {
	*known
	tw    *tar.Writer
	owner *User
	late  *lateLinks // nil: there are none
	buf   []byte
}

// header writes an entry's header. GNU's format has names of any length and bytes, and all tars know it. Without ./ bsdtar would take away what
// looks like the name of a Windows drive, or a leading backslash.
func (u *tarWriter) header(e entry, kind byte, mode fs.FileMode) error {
	h := &tar.Header{
		Typeflag: kind, Name: "./" + e.name, Linkname: e.target, Size: e.size, Mode: int64(mode.Perm()),
		ModTime: e.modified.Truncate(time.Second), Format: tar.FormatGNU,
	}
	if h.ModTime.Before(time.Unix(0, 0)) {
		h.ModTime = time.Unix(0, 0) // file systems that know no times have the year 1
	}
	if kind == tar.TypeDir {
		h.Name += "/"
	}
	if u.owner != nil {
		h.Uid, h.Gid = int(u.owner.UID), int(u.owner.GID)
	}
	return u.tw.WriteHeader(h)
}

// A directory can be written to while its contents come. Its own mode and time come behind them: not every tar sets them last.
//
// Where the host has a file d, GNU's tar would replace it by a directory d/, and that of busybox would leave it and say nothing. d/./ is an
// error in both.
func (u *tarWriter) enter(e entry) error {
	e.name += "/."
	return u.header(e, tar.TypeDir, e.mode|0o700)
}
func (u *tarWriter) leave(e entry) error {
	if u.late != nil {
		if err := u.late.leave(e); err != nil {
			return err
		}
	}
	return u.header(e, tar.TypeDir, e.mode)
}

func (u *tarWriter) link(e entry) error {
	if u.late != nil && (u.owner != nil || late(e.target)) {
		return u.late.link(e)
	}
	return u.header(e, tar.TypeSymlink, 0o777)
}

func (u *tarWriter) file(e entry, content io.Reader) error {
	if err := u.header(e, tar.TypeReg, e.mode); err != nil {
		return err
	}
	if u.buf == nil {
		u.buf = make([]byte, copySize)
	}
	for {
		n, err := content.Read(u.buf)
		if _, err := u.tw.Write(u.buf[:n]); err != nil {
			return err
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// downloadTar downloads through the host's tar. It returns errNoTar before it has called any of the caller's functions.
func (tr *tree) downloadTar(ctx context.Context, t Transport, src string, s *sink) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p, a, said := newPipe(), newGreeting(), new(edges)
	done := make(chan error, 1)
	go func() { // waited for below
		err := t.Exec(ctx, Command{
			Args: Shell(tarDownload, relative(src)), Dir: "/", Stdout: &firstLines{next: p, greeting: a}, Stderr: said,
		})
		a.end(err)
		if err == nil {
			err = p.flush()
		}
		p.closeWrite(err)
		done <- err
	}()
	<-a.said
	var err error
	if a.err == nil {
		err = tr.readTar(p, s, func(name string) error { return tr.single(ctx, t, src, name, s.file) })
	}
	p.closeRead(errCut)
	execErr := <-done
	switch {
	case a.err != nil && a.err != execErr && a.err != errNoGreeting:
		return a.err
	case execErr != nil && !errors.Is(execErr, errCut):
		if err == nil || errors.Is(err, execErr) {
			return tarError(execErr, said.String())
		}
		// The stream was wrong, or too long, before the host had an opinion.
		return also(err, tarError(execErr, said.String()))
	case err != nil:
		return err
	}
	return tr.ignored(said.String())
}

// ignored reports what the host's tar has left out of its own accord: sockets, which no tar can keep.
func (tr *tree) ignored(said string) error {
	for line := range strings.Lines(said) {
		name, ok := strings.CutSuffix(strings.TrimSuffix(line, "\n"), ": socket ignored")
		if !ok {
			continue
		}
		name = strings.TrimPrefix(strings.TrimPrefix(name, "tar: "), "./")
		if err := tr.skip(name, errors.New("it is a socket")); err != nil {
			return err
		}
	}
	return nil
}

// maxTrailer is the most that may come behind the end of an archive: tars fill up a block of theirs.
const maxTrailer = 1 << 20

// maxHeaders is the most that may come between the contents of two entries: a name, a target and an extended header of a megabyte each are
// what archive/tar takes at most for one of them, but it takes any number of them.
const maxHeaders = 8 << 20

// metered is a tar stream of which a part is bounded.
type metered struct {
	r    io.Reader
	left int64 // of the part
	any  bool  // something has come
}

func (m *metered) Read(p []byte) (int, error) {
	if m.left <= 0 {
		return 0, fmt.Errorf("the host sends more than %d bytes between two entries: %w", maxHeaders, fs.ErrInvalid)
	}
	n, err := m.r.Read(p[:min(int64(len(p)), m.left)])
	m.left -= int64(n)
	m.any = m.any || n > 0
	return n, err
}

// readTar takes the host's archive apart. single fetches one file in another way.
func (tr *tree) readTar(r io.Reader, s *sink, single func(name string) error) error {
	m := &metered{r: r}
	in := tar.NewReader(m)
	last := "the beginning"
	var content, wasted int64 // of the last entry; of entries that are left out
	for first := true; ; first = false {
		m.left = maxHeaders + min(content, math.MaxInt64-maxHeaders)
		h, err := in.Next()
		if err == io.EOF && m.any {
			break
		}
		if err != nil {
			return brokenTar(last, err)
		}
		last = fmt.Sprintf("%.256q", h.Name)
		if first && h.Typeflag == tar.TypeDir && (h.Name == "./" || h.Name == ".") {
			content = 0
			continue // the tree itself
		}
		// A name may be a part of an extended header, all of which it would keep in memory.
		e := entry{
			name: strings.Clone(strings.TrimPrefix(h.Name, "./")), mode: fs.FileMode(h.Mode) & fs.ModePerm, size: h.Size, modified: h.ModTime,
		}
		m.left, content = math.MaxInt64, 0
		skipped := tr.stats.Skipped
		switch h.Typeflag {
		case tar.TypeReg, '\x00', tar.TypeCont:
			content = h.Size
			if sparse(h) {
				err = s.refuse(e.name, errors.New("it is sent with a sparse map, which was not asked for"))
				break
			}
			err = s.file(e, in)
		case tar.TypeDir:
			e.mode |= fs.ModeDir
			e.name = strings.TrimSuffix(e.name, "/")
			err = s.dir(e)
		case tar.TypeSymlink:
			e.mode, e.target = fs.ModeSymlink, h.Linkname
			err = s.link(e)
		case tar.TypeLink:
			// What it is a link to says the host: the file is fetched by its own name.
			err = single(e.name)
		case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
			err = s.refuse(e.name, fmt.Errorf("it is %s", kindOfTar(h.Typeflag)))
		default:
			content = h.Size
			err = s.refuse(e.name, fmt.Errorf("it is %s", kindOfTar(h.Typeflag)))
		}
		if err != nil {
			return err
		}
		if tr.stats.Skipped > skipped {
			// Its content comes all the same.
			wasted += min(content, math.MaxInt64-wasted)
			if most := tr.opts.MaxBytes; most > 0 && wasted > most-tr.stats.Bytes {
				return fault("leave out", e.name, fmt.Errorf("%d bytes would come that are left out: %w of %d (TreeOptions.MaxBytes)", wasted, ErrLimit, most))
			}
		}
	}
	m.left = maxTrailer
	return checkTrailer(m)
}

// brokenTar explains an error of archive/tar.
func brokenTar(last string, err error) error {
	switch {
	case err == io.EOF, err == io.ErrUnexpectedEOF:
		return fmt.Errorf("the host's tar stream breaks off behind %s: %w", last, io.ErrUnexpectedEOF)
	case strings.HasPrefix(err.Error(), "archive/tar: "):
		return fmt.Errorf("the host's tar stream is broken behind %s: %w", last, err)
	}
	return err
}

// checkTrailer reads what is behind the end of an archive: nothing but zeros, and not for ever.
func checkTrailer(m *metered) error {
	buf := make([]byte, 4096)
	for {
		n, err := m.Read(buf)
		if len(bytes.Trim(buf[:n], "\x00")) > 0 {
			return fmt.Errorf("there is something behind the end of the host's tar stream: %w", fs.ErrInvalid)
		}
		switch {
		case m.left == 0:
			return errors.New("the host goes on sending behind the end of its tar stream")
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

func sparse(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func kindOfTar(flag byte) string {
	switch flag {
	case tar.TypeChar, tar.TypeBlock:
		return "a device"
	case tar.TypeFifo:
		return "a FIFO"
	case tar.TypeGNUSparse:
		return "sent with a sparse map, which was not asked for"
	}
	return fmt.Sprintf("an entry of an unknown type %q", flag)
}
