package transport

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lxdtransport/transport/internal/sftp"
)

// One file up, one file down, over the SFTP server that LXD runs for an instance. It works on stopped containers, too.

// cleanUpTime bounds what is done after an upload has failed or its context has ended.
const cleanUpTime = 3 * time.Second

// errNoSFTP: the server knows no SFTP endpoint, as LXD before 4.24.
var errNoSFTP = errors.New("the server has no SFTP endpoint")

// Upload writes a file in the instance. See [Transport]. Directories on the way may be symbolic links, which lead where they lead
// inside the instance; a destination that is itself a symbolic link is replaced by the file.
//
// The bytes go to a file named .transport-*.tmp in the destination's directory, which is renamed when it is complete, has its
// size checked, and its owner, mode and time. If the link to the server dies just then, the file may have been replaced
// although an error is returned. LXD 5.0 drops setuid, setgid and the
// sticky bit: asked for, that is an error; of an old file they are lost.
//
// A server without an SFTP endpoint (LXD before 4.24) gets the bytes through its files endpoint, and the rest is done by
// a command in the instance, which therefore has to run and to have /bin/sh, stat, chown, chmod, touch and mv.
func (t *LXD) Upload(ctx context.Context, dst string, src io.Reader, opts *UploadOptions) error {
	if opts == nil {
		opts = new(UploadOptions)
	}
	err := t.transfer(ctx, func() error { return checkUpload(dst, src, opts) }, func(ctx context.Context, s *session) error {
		in := newSource(src)
		defer in.stop()
		if s == nil {
			return t.uploadREST(ctx, dst, in, opts)
		}
		u := &upload{t: t, s: s, dst: dst, opts: opts}
		err := u.run(ctx, in)
		if err != nil {
			err = also(orCause(ctx, err), u.cleanUp(ctx))
		}
		return err
	})
	return goOn(t.fileError("upload", dst, err))
}

// Download reads a file in the instance. See [Transport]. Symbolic links are followed, inside the instance. Files of /proc and
// /sys, whose size the system does not tell, are read to their end.
//
// A server without an SFTP endpoint (LXD before 4.24) is asked through its files endpoint, after a command in the instance has
// told the file's type and size; the instance has to run and to have /bin/sh, stat and readlink. Files whose size is 0 arrive empty.
func (t *LXD) Download(ctx context.Context, src string, dst io.Writer, opts *DownloadOptions) error {
	if opts == nil {
		opts = new(DownloadOptions)
	}
	d := &download{src: src, dst: dst, opts: opts}
	err := t.transfer(ctx, func() error { return checkDownload(src, dst, opts) }, func(ctx context.Context, s *session) error {
		done := make(chan error, 1)
		go func() { // outlives this only in a Write that does not return
			if s == nil {
				done <- t.downloadREST(ctx, d)
			} else {
				done <- d.run(ctx, s)
			}
		}()
		select {
		case err := <-done:
			return orCause(ctx, err)
		case <-ctx.Done():
		}
		late := time.NewTimer(cleanUpTime)
		defer late.Stop()
		select {
		case err := <-done:
			return orCause(ctx, err)
		case <-late.C:
		}
		if !d.detach() {
			return orCause(ctx, <-done)
		}
		return also(context.Cause(ctx), errors.New("a Write has not returned"))
	})
	return goOn(t.fileError("download", src, err))
}

func (t *LXD) fileError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: fmt.Errorf("instance %q: %w", t.instance, err)}
}

func checkUpload(dst string, src io.Reader, opts *UploadOptions) error {
	if err := checkPath(dst); err != nil {
		return err
	}
	if base := dst[strings.LastIndexByte(dst, '/')+1:]; base == "" || base == "." || base == ".." {
		return fmt.Errorf("the destination is a directory; it has to end with the file's name: %w", syscall.EISDIR)
	}
	if src == nil {
		return errors.New("the source (src) is nil")
	}
	if extra := opts.Mode &^ (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky); extra != 0 {
		return fmt.Errorf("UploadOptions.Mode %v is not that of a regular file", opts.Mode)
	}
	if u := opts.Owner; u != nil && (u.UID == noID || u.GID == noID) {
		return fmt.Errorf("UploadOptions.Owner: %d is not a user or group", uint32(noID))
	}
	if m := opts.ModTime; !m.IsZero() && (m.Unix() < 0 || m.Unix() > math.MaxUint32) {
		return fmt.Errorf("UploadOptions.ModTime %v is not between 1970 and 2106, as SFTP wants it", m)
	}
	return nil
}

func checkDownload(src string, dst io.Writer, opts *DownloadOptions) error {
	if err := checkPath(src); err != nil {
		return err
	}
	switch {
	case dst == nil:
		return errors.New("the destination (dst) is nil")
	case opts.Offset < 0:
		return fmt.Errorf("DownloadOptions.Offset is negative: %d", opts.Offset)
	case opts.Limit < 0:
		return fmt.Errorf("DownloadOptions.Limit is negative: %d", opts.Limit)
	}
	return nil
}

// orCause returns the reason for which ctx has ended instead of what followed from it.
func orCause(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// also adds an error of the cleaning up to the one before.
func also(err, more error) error {
	if more == nil {
		return err
	}
	return &causes{text: err.Error() + "; " + more.Error(), errs: []error{err, more}}
}

// transfer runs f with an SFTP session, or with nil where the server has none, after check.
func (t *LXD) transfer(ctx context.Context, check func() error, f func(context.Context, *session) error) error {
	ctx, end, err := t.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	if err := check(); err != nil {
		return err
	}
	s, err := t.session(ctx, false)
	switch {
	case err == errNoSFTP:
		return f(ctx, nil)
	case err != nil:
		return orCause(ctx, err)
	}
	err = f(ctx, s)
	// Of one that was broken off there may be requests that nobody waits for.
	t.release(s, err != nil && ctx.Err() != nil)
	return err
}

// upload is one file on its way up.
type upload struct {
	t    *LXD
	s    *session
	dst  string
	opts *UploadOptions

	tmp     string // "" while there is no temporary file
	file    *sftp.File
	renamed bool // perhaps: no answer came
}

func (u *upload) run(ctx context.Context, in *source) error {
	old, err := u.s.Lstat(ctx, u.dst)
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if exists {
		switch old.Mode & sftp.TypeMask {
		case sftp.TypeRegular:
		case sftp.TypeLink:
			exists = false // its mode and owner are not those of a file
		default:
			return typeError(old.Mode)
		}
	}
	if err := u.create(ctx); err != nil {
		return err
	}
	sent, err := u.file.WriteFrom(ctx, in, func(n int64) {
		if u.opts.Progress != nil {
			u.opts.Progress(n)
		}
	})
	if err != nil {
		return err
	}
	now, err := u.file.Stat(ctx)
	if err != nil {
		return err
	}
	if now.Has&sftp.HasSize == 0 || now.Size != uint64(sent) {
		return fmt.Errorf("%d bytes were sent, but the file has %d: %w", sent, now.Size, io.ErrShortWrite)
	}
	if err := u.attributes(ctx, now, old, exists); err != nil {
		return err
	}
	if err := u.file.Close(ctx); err != nil {
		return err
	}
	u.file = nil
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// From here on it is done or not done, whatever becomes of ctx.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTime)
	defer cancel()
	if err := u.s.Rename(ctx, u.tmp, u.dst); err != nil {
		u.renamed = !errors.As(err, new(*sftp.StatusError))
		return fmt.Errorf("rename of the temporary file: %w", err)
	}
	u.tmp = ""
	return nil
}

// create makes the temporary file.
func (u *upload) create(ctx context.Context) error {
	dir := parent(u.dst)
	tmp := temporary(u.dst)
	open := func() (err error) {
		u.tmp = tmp // from now on there may be one
		u.file, err = u.s.Open(ctx, tmp, sftp.Write|sftp.Create|sftp.Excl, 0o600)
		if errors.As(err, new(*sftp.StatusError)) {
			u.tmp = ""
		}
		return err
	}
	err := open()
	if errors.Is(err, fs.ErrNotExist) && u.opts.MkdirAll {
		if _, err := u.s.mkdirAll(ctx, dir, u.opts.Owner); err != nil {
			return err
		}
		err = open()
	}
	if errors.Is(err, fs.ErrNotExist) {
		if _, statErr := u.s.Stat(ctx, dir); errors.Is(statErr, fs.ErrNotExist) {
			return fmt.Errorf("there is no directory %s (UploadOptions.MkdirAll would create it): %w", dir, err)
		}
	}
	if err != nil {
		return fmt.Errorf("temporary file in %s: %w", dir, err)
	}
	// Servers before pkg/sftp 1.13.6, LXD 5.0.2's among them, create every file with 0644.
	return u.file.Setstat(ctx, sftp.Attrs{Has: sftp.HasMode, Mode: 0o600})
}

// temporary returns a name in the same directory that nobody else has, and that is not too long however long dst's is.
func temporary(dst string) string {
	return strings.TrimSuffix(parent(dst), "/") + "/.transport-" + strings.ToLower(rand.Text()) + ".tmp"
}

// parent is the directory that a path ends in. Unlike path.Dir it leaves ".." alone, which leads elsewhere behind a link.
func parent(name string) string {
	if dir := strings.TrimRight(name[:strings.LastIndexByte(name, '/')], "/"); dir != "" {
		return dir
	}
	return "/"
}

// mkdirAll creates a directory and those above it, and reports whether there was none.
func (s *session) mkdirAll(ctx context.Context, dir string, owner *User) (fresh bool, err error) {
	have, err := s.Stat(ctx, dir)
	switch {
	case err == nil && have.Mode&sftp.TypeMask == sftp.TypeDirectory:
		return false, nil
	case err == nil:
		return false, fmt.Errorf("%s: %w", dir, syscall.ENOTDIR)
	case !errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("%s: %w", dir, err)
	}
	if dir != "/" {
		if _, err := s.mkdirAll(ctx, parent(dir), owner); err != nil {
			return false, err
		}
	}
	if err := s.Mkdir(ctx, dir, 0o755); err != nil {
		if now, statErr := s.Stat(ctx, dir); statErr == nil && now.Mode&sftp.TypeMask == sftp.TypeDirectory {
			return false, nil // somebody else was faster
		}
		return false, fmt.Errorf("directory %s: %w", dir, err)
	}
	if owner != nil {
		if err := s.Setstat(ctx, dir, sftp.Attrs{Has: sftp.HasOwner, UID: owner.UID, GID: owner.GID}); err != nil {
			return false, fmt.Errorf("owner of directory %s: %w", dir, err)
		}
	}
	return true, s.Setstat(ctx, dir, sftp.Attrs{Has: sftp.HasMode, Mode: 0o755}) // whatever the server's umask is
}

const special = 0o7000 // setuid, setgid, sticky

var specialBits = map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000}

// attributes gives the complete file its owner, mode and time; in this order, for a change of owner clears setuid.
func (u *upload) attributes(ctx context.Context, now, old sftp.Attrs, exists bool) error {
	owner, mode := User{}, uint32(0o644)
	if exists {
		owner, mode = User{old.UID, old.GID}, old.Mode&(special|0o777)
	}
	if u.opts.Owner != nil {
		owner = *u.opts.Owner
	}
	if u.opts.Mode != 0 {
		mode = unixMode(u.opts.Mode)
	}
	if now.UID != owner.UID || now.GID != owner.GID {
		if err := u.file.Setstat(ctx, sftp.Attrs{Has: sftp.HasOwner, UID: owner.UID, GID: owner.GID}); err != nil {
			return fmt.Errorf("owner %d:%d: %w", owner.UID, owner.GID, err)
		}
	}
	if err := u.file.Setstat(ctx, sftp.Attrs{Has: sftp.HasMode, Mode: mode}); err != nil {
		return fmt.Errorf("mode %#o: %w", mode, err)
	}
	if u.opts.Mode != 0 && mode&special != 0 {
		if got, err := u.file.Stat(ctx); err != nil || got.Mode&(special|0o777) != mode {
			return fmt.Errorf("mode %#o: the server did not set it but %#o: %w", mode, got.Mode&(special|0o777), errors.Join(err, errors.ErrUnsupported))
		}
	}
	if m := u.opts.ModTime; !m.IsZero() {
		sec := uint32(m.Unix())
		if err := u.file.Setstat(ctx, sftp.Attrs{Has: sftp.HasTimes, ATime: sec, MTime: sec}); err != nil {
			return fmt.Errorf("modification time: %w", err)
		}
	}
	return nil
}

// unixMode is stat(2)'s form of a mode without its type.
func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for bit, unix := range specialBits {
		if m&bit != 0 {
			mode |= unix
		}
	}
	return mode
}

// cleanUp removes the temporary file after a failure, over a new connection if need be. ctx may have ended.
func (u *upload) cleanUp(ctx context.Context) error {
	if u.tmp == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTime)
	defer cancel()
	if u.file != nil {
		u.file.AskClose()
	}
	half, cancelHalf := context.WithTimeout(ctx, cleanUpTime/2)
	defer cancelHalf()
	err := u.s.Remove(half, u.tmp)
	if err != nil && !errors.As(err, new(*sftp.StatusError)) {
		var c *sftp.Client
		if c, err = u.t.openSFTP(ctx); err == nil {
			defer c.Close()
			err = c.Remove(ctx, u.tmp)
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist) && u.renamed:
		return errors.New("it has been replaced all the same")
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("the temporary file %s may be left: %w", u.tmp, err)
}

// typeError says why something that is no regular file is not read or replaced.
func typeError(mode uint32) error {
	kind := "no regular file"
	switch mode & sftp.TypeMask {
	case sftp.TypeDirectory:
		return fmt.Errorf("it is a directory: %w", syscall.EISDIR)
	case sftp.TypeFIFO:
		kind = "a FIFO"
	case sftp.TypeSocket:
		kind = "a socket"
	case sftp.TypeChar, sftp.TypeBlock:
		kind = "a device"
	}
	return fmt.Errorf("it is %s, only regular files are transferred: %w", kind, fs.ErrInvalid)
}

// download is one file on its way down.
type download struct {
	src      string
	dst      io.Writer
	opts     *DownloadOptions
	received int64

	mu       sync.Mutex // guards what follows
	busy     bool       // in one of the caller's functions
	detached bool       // they must not be called again
}

// call calls one of the caller's functions unless the download was given up.
func (d *download) call(f func() error) error {
	d.mu.Lock()
	if d.detached {
		d.mu.Unlock()
		return context.Canceled
	}
	d.busy = true
	d.mu.Unlock()
	err := guarded(f)
	d.mu.Lock()
	d.busy = false
	d.mu.Unlock()
	return err
}

// detach makes sure that the caller's functions are not called again. It reports whether one of them has not returned.
func (d *download) detach() (stuck bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.detached = true
	return d.busy
}

func (d *download) run(ctx context.Context, s *session) error {
	// The type comes first: the server would open a FIFO and wait for a writer for ever.
	a, err := s.Stat(ctx, d.src)
	if err != nil {
		return err
	}
	if a.Mode&sftp.TypeMask != sftp.TypeRegular {
		return typeError(a.Mode)
	}
	f, err := s.Open(ctx, d.src, sftp.Read, 0)
	if err != nil {
		return err
	}
	// The answer does not matter, and a failure will show again when the session is closed.
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTime)
		defer cancel()
		f.Close(ctx)
	}()
	if a, err = f.Stat(ctx); err != nil {
		return err
	}
	if a.Mode&sftp.TypeMask != sftp.TypeRegular {
		return typeError(a.Mode)
	}
	end, exact, err := d.begin(fileInfo{
		name: path.Base(d.src), size: a.Size, mode: a.Mode,
		modified: time.Unix(int64(a.MTime), 0), owner: User{a.UID, a.GID},
	})
	if err != nil {
		return err
	}
	_, err = f.ReadTo(ctx, d.opts.Offset, end, d.write)
	if err == nil && exact {
		err = d.complete(end)
	}
	return err
}

// begin checks what is known of the file, tells the caller, and returns where it ends, exactly or at most.
func (d *download) begin(info fileInfo) (end int64, exact bool, err error) {
	if info.size > math.MaxInt64 {
		return 0, false, fmt.Errorf("the host says that it has %d bytes: %w", info.size, fs.ErrInvalid)
	}
	// The kernel's own file systems say 0, or a page, for what they make up when it is read.
	name := path.Clean(d.src)
	madeUp := strings.HasPrefix(name, "/proc/") || strings.HasPrefix(name, "/sys/")
	exact = info.size > 0 && !madeUp
	end = math.MaxInt64
	if !madeUp {
		if end := int64(info.size); d.opts.Offset > end {
			return 0, false, fmt.Errorf("DownloadOptions.Offset is %d, but the file has %d bytes: %w", d.opts.Offset, end, fs.ErrInvalid)
		}
	}
	if exact {
		end = int64(info.size)
		if l := d.opts.Limit; l > 0 && end-d.opts.Offset > l {
			return 0, false, fmt.Errorf("%d bytes were to come: %w of %d", end-d.opts.Offset, ErrLimit, l)
		}
	}
	if d.opts.Stat != nil {
		err = d.call(func() error { d.opts.Stat(info); return nil })
	}
	return end, exact, err
}

func (d *download) write(p []byte) error {
	if l := d.opts.Limit; l > 0 && d.received+int64(len(p)) > l {
		return fmt.Errorf("more bytes came: %w of %d", ErrLimit, l)
	}
	return d.call(func() error {
		n, err := d.dst.Write(p)
		if err == nil && n < len(p) {
			err = io.ErrShortWrite
		}
		if err != nil {
			return fmt.Errorf("writing what was received: %w", err)
		}
		d.received += int64(n)
		if d.opts.Progress != nil {
			d.opts.Progress(d.received)
		}
		return nil
	})
}

// complete checks the number of bytes against what the host said.
func (d *download) complete(end int64) error {
	if want := end - d.opts.Offset; d.received != want {
		return fmt.Errorf("the host said %d bytes, %d came: %w", want, d.received, io.ErrUnexpectedEOF)
	}
	return nil
}

// fileInfo is the fs.FileInfo of a remote file.
type fileInfo struct {
	name     string
	size     uint64
	mode     uint32
	modified time.Time
	owner    User
}

func (i fileInfo) Name() string       { return i.name }
func (i fileInfo) Size() int64        { return int64(i.size) }
func (i fileInfo) ModTime() time.Time { return i.modified }
func (i fileInfo) IsDir() bool        { return false }
func (i fileInfo) Sys() any           { return &i.owner }
func (i fileInfo) Mode() fs.FileMode {
	mode := fs.FileMode(i.mode & 0o777)
	for bit, unix := range specialBits {
		if i.mode&unix != 0 {
			mode |= bit
		}
	}
	return mode
}

// source reads ahead of an upload, in a goroutine, so that a Read that does not return cannot hold the upload.
type source struct {
	r       io.Reader
	full    chan chunk
	free    chan []byte
	stopped chan struct{}
	done    chan struct{} // closed when the goroutine has ended; nil until there is one
}

type chunk struct {
	data []byte
	err  error
}

func newSource(r io.Reader) *source {
	return &source{r: r, full: make(chan chunk), free: make(chan []byte, sftp.WritesAhead+2), stopped: make(chan struct{})}
}

func (in *source) run() {
	defer close(in.done)
	for made := 0; ; {
		var buf []byte
		select {
		case buf = <-in.free:
		default:
			if made < cap(in.free) {
				made++
				buf = make([]byte, sftp.WriteSize)
				break
			}
			select {
			case buf = <-in.free:
			case <-in.stopped:
				return
			}
		}
		n, err := in.fill(buf)
		select {
		case in.full <- chunk{buf[:n], err}:
		case <-in.stopped:
			return
		}
		if err != nil {
			return
		}
	}
}

// fill reads until buf is full or r returns an error. Unlike io.ReadFull it leaves the error as it is: io.ErrUnexpectedEOF is not the end
// of a source.
func (in *source) fill(buf []byte) (n int, err error) {
	for empty := 0; n < len(buf) && err == nil; {
		select {
		case <-in.stopped:
			return n, context.Canceled
		default:
		}
		var m int
		err = guarded(func() (e error) { m, e = in.r.Read(buf[n:]); return e })
		if m < 0 || m > len(buf)-n {
			return n, errors.New("the source's Read returned an impossible count")
		}
		n += m
		if m > 0 {
			empty = 0
		} else if empty++; empty > 100 && err == nil {
			err = io.ErrNoProgress
		}
	}
	if err != nil && err != io.EOF {
		err = fmt.Errorf("reading the source: %w", err)
	}
	return n, err
}

// Next returns the next bytes; the last ones with io.EOF. The first call starts the reading.
func (in *source) Next(ctx context.Context) ([]byte, error) {
	if in.done == nil {
		in.done = make(chan struct{})
		go in.run() // stop waits for it, if the source's Read returns
	}
	select {
	case c := <-in.full:
		return c.data, c.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Free takes back what Next returned.
func (in *source) Free(b []byte) { in.free <- b[:cap(b)] }

// stop ends the reading, and waits for that, unless a Read does not return in time.
func (in *source) stop() {
	close(in.stopped)
	if in.done == nil {
		return
	}
	late := time.NewTimer(readGrace)
	defer late.Stop()
	select {
	case <-in.done:
	case <-late.C:
	}
}

// checkDir reports that a working directory does not exist. Where LXD cannot be asked, as one before 4.24 without SFTP, the command runs as LXD
// has it: in "/".
func (t *LXD) checkDir(ctx context.Context, dir string) error {
	ctx, cancel := within(ctx, dirMost)
	defer cancel()
	s, err := t.session(ctx, false)
	if err != nil {
		return nil
	}
	a, err := s.Stat(ctx, dir)
	t.release(s, ctx.Err() != nil)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &fs.PathError{Op: "chdir", Path: dir, Err: err}
	case err == nil && a.Mode&sftp.TypeMask != sftp.TypeDirectory:
		return &fs.PathError{Op: "chdir", Path: dir, Err: syscall.ENOTDIR}
	}
	return nil
}
