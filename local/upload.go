package local

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/lxdtransport/transport"
)

// Upload writes a file below the directory. See [transport.Transport]. A destination that is a symbolic link is replaced by the
// file; directories on the way may be symbolic links as long as they stay below the directory.
//
// The bytes go to a file named .transport-*.tmp beside the destination, which is renamed when it is complete, has its
// size checked, and its owner, mode and time.
func (t *Transport) Upload(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
	if opts == nil {
		opts = new(transport.UploadOptions)
	}
	err := checkUpload(dst, src, opts)
	if err == nil {
		err = t.upload(ctx, dst, src, opts)
	}
	return fileError("upload", dst, err)
}

func fileError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

func checkPath(name string) error {
	switch {
	case name == "":
		return errors.New("the path is empty")
	case strings.IndexByte(name, 0) >= 0:
		return fmt.Errorf("the path %q contains a NUL byte", name)
	case !path.IsAbs(name):
		return fmt.Errorf("the path %q is not absolute: remote paths begin with a slash", name)
	}
	return nil
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
	return nil
}

func (t *Transport) upload(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) (err error) {
	ctx, end, err := t.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	dst = relative(dst)
	old, err := t.root.Lstat(dst)
	switch {
	case err == nil && old.Mode().Type() == fs.ModeSymlink:
		old = nil // its mode and owner are not those of a file
	case err == nil:
		if err := typeError(old.Mode()); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return bare(err)
	default:
		old = nil
	}

	file, tmp, err := t.temporary(dst, opts)
	if err != nil {
		return err
	}
	defer func() {
		file.Close()
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if rmErr := t.root.Remove(tmp); rmErr != nil {
			err = &causes{text: fmt.Sprintf("%v; the temporary file %s is left: %v", err, tmp, bare(rmErr)), errs: []error{err, rmErr}}
		}
	}()
	sent, err := copyUp(ctx, file, src, opts.Progress)
	if err != nil {
		return err
	}
	now, err := file.Stat()
	if err != nil {
		return bare(err)
	}
	if now.Size() != sent {
		return fmt.Errorf("%d bytes were sent, but the file has %d: %w", sent, now.Size(), io.ErrShortWrite)
	}
	if err := t.attributes(file, tmp, old, opts); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return bare(err)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := t.root.Rename(tmp, dst); err != nil {
		return fmt.Errorf("rename of the temporary file: %w", bare(err))
	}
	return nil
}

// temporary makes the temporary file.
func (t *Transport) temporary(dst string, opts *transport.UploadOptions) (*os.File, string, error) {
	dir := path.Dir(filepath.ToSlash(dst))
	tmp := path.Join(dir, ".transport-"+strings.ToLower(rand.Text())+".tmp")
	open := func() (*os.File, error) { return t.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) }
	file, err := open()
	if errors.Is(err, fs.ErrNotExist) && opts.MkdirAll {
		if err := t.mkdirAll(dir, opts.Owner); err != nil {
			return nil, "", err
		}
		file, err = open()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, "", fmt.Errorf("there is no directory /%s (UploadOptions.MkdirAll would create it): %w", dir, fs.ErrNotExist)
	case err != nil:
		return nil, "", fmt.Errorf("temporary file in /%s: %w", strings.TrimPrefix(dir, "."), bare(err))
	}
	return file, tmp, nil
}

func (t *Transport) mkdirAll(dir string, owner *transport.User) error {
	info, err := t.root.Stat(dir)
	switch {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return fmt.Errorf("/%s: %w", dir, syscall.ENOTDIR)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("/%s: %w", dir, bare(err))
	}
	if err := t.mkdirAll(path.Dir(dir), owner); err != nil {
		return err
	}
	if err := t.root.Mkdir(dir, 0o755); err != nil {
		if info, statErr := t.root.Stat(dir); statErr == nil && info.IsDir() {
			return nil // somebody else was faster
		}
		return fmt.Errorf("directory /%s: %w", dir, bare(err))
	}
	if owner != nil {
		if err := t.root.Chown(dir, int(owner.UID), int(owner.GID)); err != nil {
			return fmt.Errorf("owner of directory /%s: %w", dir, bare(err))
		}
	}
	if err := t.root.Chmod(dir, 0o755); err != nil { // whatever the umask is
		return fmt.Errorf("mode of directory /%s: %w", dir, bare(err))
	}
	return nil
}

// copyUp copies the source to the file. A Read that does not return holds it no longer than ctx.
func copyUp(ctx context.Context, file *os.File, src io.Reader, progress func(int64)) (sent int64, err error) {
	in := newSource(src)
	defer in.stop()
	for {
		p, readErr := in.next(ctx.Done())
		if len(p) > 0 {
			n, err := file.Write(p)
			sent += int64(n)
			if err != nil {
				return sent, bare(err)
			}
			if progress != nil {
				progress(sent)
			}
		}
		switch {
		case readErr == io.EOF:
			return sent, nil
		case readErr == errStopped:
			return sent, context.Cause(ctx)
		case readErr != nil:
			return sent, fmt.Errorf("reading the source: %w", readErr)
		}
	}
}

// attributes gives the complete file its owner, mode and time; in this order, for a change of owner clears setuid.
func (t *Transport) attributes(file *os.File, tmp string, old fs.FileInfo, opts *transport.UploadOptions) error {
	owner, mode := opts.Owner, fs.FileMode(0o644)
	if old != nil {
		mode = old.Mode() & (fs.ModePerm | special)
		if owner == nil {
			owner = ownerOf(old)
		}
	}
	if opts.Mode != 0 {
		mode = opts.Mode
	}
	if owner != nil {
		now, err := file.Stat()
		if err != nil {
			return bare(err)
		}
		if have := ownerOf(now); have == nil || *have != *owner {
			if err := file.Chown(int(owner.UID), int(owner.GID)); err != nil {
				return fmt.Errorf("owner %d:%d: %w", owner.UID, owner.GID, bare(err))
			}
		}
	}
	if err := file.Chmod(mode); err != nil {
		return fmt.Errorf("mode %v: %w", mode, bare(err))
	}
	if m := opts.ModTime; !m.IsZero() {
		if err := t.root.Chtimes(tmp, time.Time{}, m); err != nil {
			return fmt.Errorf("modification time: %w", bare(err))
		}
	}
	return nil
}

// typeError says why something that is no regular file is not read or replaced.
func typeError(mode fs.FileMode) error {
	kind := "no regular file"
	switch t := mode.Type(); {
	case t == 0:
		return nil
	case t&fs.ModeDir != 0:
		return fmt.Errorf("it is a directory: %w", syscall.EISDIR)
	case t&fs.ModeNamedPipe != 0:
		kind = "a FIFO"
	case t&fs.ModeSocket != 0:
		kind = "a socket"
	case t&fs.ModeDevice != 0:
		kind = "a device"
	}
	return fmt.Errorf("it is %s, only regular files are transferred: %w", kind, fs.ErrInvalid)
}
