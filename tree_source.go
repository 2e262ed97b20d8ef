package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"unicode/utf8"
)

// An uploader takes the entries of a tree: a directory before and after what is in it.
type uploader interface {
	enter(dir entry) error
	leave(dir entry) error
	// file has to read content to its end. It returns what content returns.
	file(e entry, content io.Reader) error
	link(e entry) error
	// unchanged reports whether the host has a file already, and TreeOptions.SkipUnchanged asks for that.
	unchanged(e entry) bool
}

// walk hands everything in src to u.
func (tr *tree) walk(ctx context.Context, src fs.FS, u uploader) error {
	root, err := fs.Stat(src, ".")
	if err != nil {
		return fault("read", ".", err)
	}
	if !root.IsDir() {
		return fault("read", ".", fmt.Errorf("it is not a directory: %w", fs.ErrInvalid))
	}
	w := &walker{tree: tr, ctx: ctx, src: src, u: u, buf: make([]byte, copySize)}
	return w.dir("", "")
}

// copySize is how much of a file is read at once.
const copySize = 64 << 10

type walker struct {
	*tree
	ctx context.Context
	src fs.FS
	u   uploader
	buf []byte
}

// fewEntries is how many entries of a directory are read at once. One with more keeps its directory open while they are worked on.
const fewEntries = 4096

// dir walks what is in a directory. outside is its path in the operating system if src cannot name it, and "" otherwise.
func (w *walker) dir(name, outside string) error {
	shown := name
	if shown == "" {
		shown = "."
	}
	f, err := w.open(shown, outside)
	if err != nil {
		return fault("read", shown, err)
	}
	closed := false
	defer func() {
		if !closed {
			f.Close()
		}
	}()
	d, ok := f.(fs.ReadDirFile)
	if !ok {
		return fault("read", shown, errors.New("its file system cannot list it"))
	}
	for last := false; !last; {
		entries, err := d.ReadDir(fewEntries)
		if err != nil && err != io.EOF {
			return fault("read", shown, err)
		}
		if last = err == io.EOF || len(entries) < fewEntries; last {
			// A short answer is not always the end.
			more, err := d.ReadDir(fewEntries)
			if err != nil && err != io.EOF {
				return fault("read", shown, err)
			}
			entries = append(entries, more...)
			if last = len(more) < fewEntries; last {
				f.Close()
				closed = true
			}
		}
		slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
		for _, d := range entries {
			if err := w.entry(path.Join(name, d.Name()), place(f, outside, d.Name()), d); err != nil {
				return err
			}
		}
	}
	return nil
}

// open opens a file or directory.
func (w *walker) open(name, outside string) (fs.File, error) {
	if outside != "" {
		return os.Open(outside)
	}
	return w.src.Open(name)
}

// place is where an entry is in the operating system, if its file system cannot name it: io/fs knows no names that are not UTF-8, and yet the
// directories of os.DirFS and os.Root may have them.
func place(dir fs.File, outside, name string) string {
	if outside != "" {
		return filepath.Join(outside, name)
	}
	if f, ok := dir.(*os.File); ok && !utf8.ValidString(name) && runtime.GOOS != "windows" {
		return filepath.Join(f.Name(), name)
	}
	return ""
}

func (w *walker) entry(name, outside string, d fs.DirEntry) error {
	if w.ctx.Err() != nil {
		return context.Cause(w.ctx)
	}
	if err := w.count(name); err != nil {
		return err
	}
	if ok, err := w.matches(name, d); err != nil || !ok {
		return err
	}
	w.last = name
	switch {
	case d.Type().IsRegular():
		return w.file(name, outside)
	case d.IsDir():
		info, err := d.Info()
		if err != nil {
			return fault("read", name, err)
		}
		e := entry{name: name, mode: fs.ModeDir | info.Mode().Perm(), modified: info.ModTime()}
		if err := w.u.enter(e); err != nil {
			return fault("upload", name, err)
		}
		if err := w.dir(name, outside); err != nil {
			return err
		}
		if err := w.u.leave(e); err != nil {
			return fault("upload", name, err)
		}
		return w.done(e.mode, 0)
	case d.Type()&fs.ModeSymlink != 0:
		return w.link(name, outside, d)
	}
	return w.skip(name, fmt.Errorf("it is %s; only files, directories and symbolic links are copied", kindOf(d.Type())))
}

func (w *walker) file(name, outside string) error {
	f, err := w.open(name, outside)
	if err != nil {
		return fault("read", name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fault("read", name, err)
	}
	if !info.Mode().IsRegular() {
		return fault("read", name, errors.New("it was replaced while the tree was read"))
	}
	e := entry{name: name, mode: info.Mode().Perm(), size: info.Size(), modified: info.ModTime()}
	if err := w.checkSize(name, e.size); err != nil {
		return err
	}
	if w.u.unchanged(e) {
		return w.skip(name, ErrUnchanged)
	}
	if err := w.u.file(e, &content{w: w, f: f, name: name, left: e.size}); err != nil {
		if _, ok := errors.AsType[*fs.PathError](err); ok {
			return err
		}
		return fault("upload", name, err)
	}
	return w.done(e.mode, 0)
}

func (w *walker) link(name, outside string, d fs.DirEntry) error {
	e := entry{name: name, mode: fs.ModeSymlink}
	if w.opts.Symlinks == KeepSymlinks {
		var err error
		if outside != "" {
			e.target, err = os.Readlink(outside)
		} else {
			e.target, err = fs.ReadLink(w.src, name)
		}
		if err != nil {
			return fault("read", name, err)
		}
		e.target = filepath.ToSlash(e.target)
		info, err := d.Info()
		if err != nil {
			return fault("read", name, err)
		}
		e.modified = info.ModTime()
	}
	if why, err := w.checkLink(e); err != nil {
		return err
	} else if why != nil {
		return w.skip(name, why)
	}
	if err := w.u.link(e); err != nil {
		return fault("upload", name, err)
	}
	return w.done(e.mode, 0)
}

// content is a file's content: as many bytes as its size said, or an error.
type content struct {
	w    *walker
	f    fs.File
	name string
	left int64
}

func (c *content) Read(p []byte) (int, error) {
	if c.w.ctx.Err() != nil {
		return 0, context.Cause(c.w.ctx)
	}
	if c.left == 0 {
		// The end has to be here.
		var one [1]byte
		for range 100 {
			switch n, err := c.f.Read(one[:]); {
			case n > 0:
				return 0, fault("read", c.name, errors.New("it has grown while it was read"))
			case err == io.EOF:
				return 0, io.EOF
			case err != nil:
				return 0, fault("read", c.name, err)
			}
		}
		return 0, fault("read", c.name, io.ErrNoProgress)
	}
	if int64(len(p)) > c.left {
		p = p[:c.left]
	}
	n, err := c.f.Read(p)
	if n < 0 || n > len(p) {
		return 0, fault("read", c.name, errors.New("Read returned an impossible count"))
	}
	c.left -= int64(n)
	if err == io.EOF && c.left > 0 {
		return n, fault("read", c.name, fmt.Errorf("it has shrunk while it was read: %w", io.ErrUnexpectedEOF))
	}
	if err == io.EOF {
		err = nil // the end will be looked for once more
	}
	if err != nil {
		return n, fault("read", c.name, err)
	}
	return n, c.w.received(int64(n))
}

// kindOf names a type of file.
func kindOf(m fs.FileMode) string {
	switch {
	case m.IsRegular():
		return "a file"
	case m.IsDir():
		return "a directory"
	case m&fs.ModeSymlink != 0:
		return "a symbolic link"
	case m&fs.ModeNamedPipe != 0:
		return "a FIFO"
	case m&fs.ModeSocket != 0:
		return "a socket"
	case m&fs.ModeDevice != 0:
		return "a device"
	}
	return "of an unknown type"
}
