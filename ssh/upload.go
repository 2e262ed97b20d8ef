package ssh

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/pkg/sftp"

	"github.com/lxdtransport/transport"
)

// Upload writes a file over SFTP. See [transport.Transport]. A destination that is a symbolic link is replaced by the file.
//
// The bytes go to a file named .transport-*.tmp beside the destination, which is renamed when it is complete, has its
// size checked, and its owner, mode and time.
func (t *Transport) Upload(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
	if opts == nil {
		opts = new(transport.UploadOptions)
	}
	err := checkUpload(dst, src, opts)
	if err == nil {
		err = t.upload(ctx, &upload{t: t, dst: dst, opts: opts}, src)
	}
	return goOn(fileError("upload", dst, err))
}

const (
	noID    = 1<<32 - 1 // (uid_t)-1, which chown takes for "leave it"
	special = fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
)

func checkUpload(dst string, src io.Reader, opts *transport.UploadOptions) error {
	if err := checkPath(dst); err != nil {
		return err
	}
	if strings.HasSuffix(dst, "/") {
		return fmt.Errorf("the destination is a directory; it has to end with the file's name: %w", syscall.EISDIR)
	}
	if src == nil {
		return errors.New("the source (src) is nil")
	}
	if extra := opts.Mode &^ (fs.ModePerm | special); extra != 0 {
		return fmt.Errorf("UploadOptions.Mode %v is not that of a regular file", opts.Mode)
	}
	if u := opts.Owner; u != nil && (u.UID == noID || u.GID == noID) {
		return fmt.Errorf("UploadOptions.Owner: %d is not a user or group", uint32(noID))
	}
	if m := opts.ModTime; !m.IsZero() && (m.Unix() < 0 || m.Unix() > math.MaxUint32) {
		return fmt.Errorf("UploadOptions.ModTime: SFTP has no time such as %v", m)
	}
	return nil
}

// upload is one file on its way up.
type upload struct {
	t    *Transport
	f    *files
	dst  string
	opts *transport.UploadOptions

	tmp      string // may exist; "": does not
	file     *sftp.File
	renaming bool // and nobody knows whether that was done
}

func (t *Transport) upload(ctx context.Context, u *upload, src io.Reader) (err error) {
	ctx, end, err := t.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if u.f, err = t.files(ctx); err != nil {
		return err
	}
	err = u.run(ctx, src)
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, context.Cause(ctx)) {
			err = context.Cause(ctx)
		}
		u.f.broken = u.f.broken || u.tmp != "" // the file is open, and much may be on its way
		if left := u.cleanUp(); left != nil {
			err = &causes{text: fmt.Sprintf("%v; %v", err, left), errs: []error{err, left}}
		}
	}
	t.keep(u.f)
	return err
}

func (u *upload) run(ctx context.Context, src io.Reader) error {
	old, err := do(ctx, u.f, func() (fs.FileInfo, error) { return u.f.client.Lstat(u.dst) })
	switch {
	case errors.Is(err, fs.ErrNotExist):
		old = nil
	case err != nil:
		return err
	case old.Mode().Type() == fs.ModeSymlink:
		// Its mode and owner are not those of a file.
		if !u.canReplace() {
			return errNoReplace
		}
		old = nil
	default:
		if err := typeError(old.Mode()); err != nil {
			return err
		}
		if !u.canReplace() {
			return errNoReplace
		}
	}
	if err := u.create(ctx); err != nil {
		return err
	}
	sent, err := u.copy(ctx, src)
	if err != nil {
		return err
	}
	now, err := do(ctx, u.f, u.file.Stat)
	if err != nil {
		return err
	}
	if now.Size() != sent {
		return fmt.Errorf("%d bytes were sent, but the file has %d: %w", sent, now.Size(), io.ErrShortWrite)
	}
	if err := u.attributes(ctx, now, old); err != nil {
		return err
	}
	if err := act(ctx, u.f, u.file.Close); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// From here on it is done or not done, whatever becomes of ctx.
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), cleanUpTime, fmt.Errorf("no answer within %v", cleanUpTime))
	defer cancel()
	rename := u.f.client.PosixRename
	if !u.canReplace() {
		rename = u.f.client.Rename
	}
	if err := act(ctx, u.f, func() error { return rename(u.tmp, u.dst) }); err != nil {
		u.renaming = u.f.broken
		return fmt.Errorf("rename of the temporary file: %w", err)
	}
	u.tmp = ""
	return nil
}

var errNoReplace = fmt.Errorf("the host's SFTP server cannot replace a file in one step (posix-rename@openssh.com): %w", errors.ErrUnsupported)

func (u *upload) canReplace() bool {
	_, ok := u.f.client.HasExtension("posix-rename@openssh.com")
	return ok
}

// create makes the temporary file.
func (u *upload) create(ctx context.Context) error {
	dir := parent(u.dst)
	tmp := strings.TrimSuffix(dir, "/") + "/.transport-" + strings.ToLower(rand.Text()) + ".tmp"
	open := func() (err error) {
		u.tmp = tmp // from now on there may be one
		u.file, err = do(ctx, u.f, func() (*sftp.File, error) {
			return u.f.client.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL)
		})
		if err != nil && !u.f.broken {
			u.tmp = ""
		}
		return err
	}
	err := open()
	if errors.Is(err, fs.ErrNotExist) && u.opts.MkdirAll {
		if err := u.mkdirAll(ctx, dir); err != nil {
			return err
		}
		err = open()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("there is no directory %s (UploadOptions.MkdirAll would create it): %w", dir, err)
	case err != nil:
		return fmt.Errorf("temporary file in %s: %w", dir, err)
	}
	return nil
}

// parent is the directory that a path ends in. Unlike path.Dir it leaves ".." alone, which leads elsewhere behind a link.
func parent(name string) string {
	if dir := strings.TrimRight(name[:strings.LastIndexByte(name, '/')], "/"); dir != "" {
		return dir
	}
	return "/"
}

func (u *upload) mkdirAll(ctx context.Context, dir string) error {
	c := u.f.client
	stat := func() (fs.FileInfo, error) { return do(ctx, u.f, func() (fs.FileInfo, error) { return c.Stat(dir) }) }
	info, err := stat()
	switch {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return fmt.Errorf("%s: %w", dir, syscall.ENOTDIR)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: %w", dir, err)
	}
	if dir != "/" {
		if err := u.mkdirAll(ctx, parent(dir)); err != nil {
			return err
		}
	}
	if err := act(ctx, u.f, func() error { return c.Mkdir(dir) }); err != nil {
		if info, statErr := stat(); statErr == nil && info.IsDir() {
			return nil // somebody else was faster
		}
		return fmt.Errorf("directory %s: %w", dir, err)
	}
	if owner := u.opts.Owner; owner != nil {
		if err := act(ctx, u.f, func() error { return c.Chown(dir, int(owner.UID), int(owner.GID)) }); err != nil {
			return fmt.Errorf("owner of directory %s: %w", dir, err)
		}
	}
	if err := act(ctx, u.f, func() error { return c.Chmod(dir, 0o755) }); err != nil { // whatever the umask is
		return fmt.Errorf("mode of directory %s: %w", dir, err)
	}
	return nil
}

// chunk is a part of a file that is on its way.
type chunk struct {
	buf  []byte
	n    int
	done chan error // has room for one; nil: not on its way
}

// copy sends the source. A Read that does not return holds it no longer than ctx.
func (u *upload) copy(ctx context.Context, src io.Reader) (sent int64, err error) {
	in := newSource(src)
	defer in.stop()
	chunks := [2]chunk{}
	arrived := func(c *chunk) error {
		if c.done == nil {
			return nil
		}
		select {
		case err := <-c.done:
			c.done = nil
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		sent += int64(c.n)
		if u.opts.Progress == nil {
			return nil
		}
		return guarded(func() error { u.opts.Progress(sent); return nil })
	}
	offset, whole := int64(0), false
	for i := 0; !whole; i++ {
		c := &chunks[i%2]
		if err := arrived(c); err != nil {
			return sent, err
		}
		if c.n, whole, err = fill(ctx, in, &c.buf); err != nil {
			return sent, err
		}
		if c.n > 0 {
			done, at, part, file := make(chan error, 1), offset, c.buf[:c.n], u.file
			c.done = done
			go func() { // ends with the session at the latest
				_, err := file.WriteAt(part, at)
				done <- err
			}()
			offset += int64(c.n)
		}
		if whole {
			return sent, errors.Join(arrived(&chunks[(i+1)%2]), arrived(c))
		}
	}
	return sent, nil
}

// fill fills a chunk from the source. whole says that the source has ended.
func fill(ctx context.Context, in *source, buf *[]byte) (n int, whole bool, err error) {
	b := (*buf)[:0]
	for len(b)+bufferSize <= chunkSize {
		p, err := in.next(ctx.Done())
		b = append(b, p...)
		*buf = b
		switch {
		case err == io.EOF:
			return len(b), true, nil
		case err == errStopped:
			return 0, false, context.Cause(ctx)
		case err != nil:
			return 0, false, fmt.Errorf("reading the source: %w", err)
		}
	}
	return len(b), false, nil
}

// attributes gives the complete file its owner, mode and time; in this order, for a change of owner clears setuid.
func (u *upload) attributes(ctx context.Context, now, old fs.FileInfo) error {
	owner, mode := ownerOf(now), fs.FileMode(0o644)
	if old != nil {
		owner, mode = ownerOf(old), old.Mode()&(fs.ModePerm|special)
	}
	if u.opts.Owner != nil {
		owner = *u.opts.Owner
	}
	if u.opts.Mode != 0 {
		mode = u.opts.Mode
	}
	if owner != ownerOf(now) {
		if err := act(ctx, u.f, func() error { return u.file.Chown(int(owner.UID), int(owner.GID)) }); err != nil {
			return fmt.Errorf("owner %d:%d: %w", owner.UID, owner.GID, err)
		}
	}
	if err := act(ctx, u.f, func() error { return u.file.Chmod(mode) }); err != nil {
		return fmt.Errorf("mode %v: %w", mode, err)
	}
	if m := u.opts.ModTime; !m.IsZero() {
		if err := act(ctx, u.f, func() error { return u.f.client.Chtimes(u.tmp, time.Unix(m.Unix(), 0), m) }); err != nil {
			return fmt.Errorf("modification time: %w", err)
		}
	}
	return nil
}

// cleanUp removes the temporary file after a failure, over a session of its own. The upload's ctx may have ended.
func (u *upload) cleanUp() error {
	if u.tmp == "" {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), cleanUpTime, fmt.Errorf("no answer within %v", cleanUpTime))
	defer cancel()
	f, err := u.t.files(ctx)
	if err == nil {
		err = act(ctx, f, func() error { return f.client.Remove(u.tmp) })
		u.t.keep(f)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist) && u.renaming:
		return errors.New("it has been replaced all the same")
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("the temporary file %s may be left: %w", u.tmp, err)
}
