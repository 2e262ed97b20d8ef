package transport

import (
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
)

// sink puts a tree that a host sends together in a directory of its own in the destination, and moves it to its place when it is complete. The
// host is hostile: it may send any names, in any order, as often as it likes. Nothing is remembered of them but the directories that lead to the
// last one: what was there already shows when it is created once more.
type sink struct {
	*tree
	dst   *os.Root
	stage string   // the directory's name in dst
	root  *os.Root // the directory
	path  []level  // from root to where the last entry was
	lost  string   // the directory that Match has refused last

	buf      []byte
	readOnly []entry // directories that get their modes at the end
	kept     int     // bytes of their names
}

// level is a directory that entries are put into.
type level struct {
	entry
	at   *os.Root // nil: closed meanwhile
	told bool     // the host has sent the directory itself
}

// maxOpen is how many directories are open at once.
const maxOpen = 32

func newSink(tr *tree, dst *os.Root) (*sink, error) {
	s := &sink{tree: tr, dst: dst, stage: ".transport-" + strings.ToLower(rand.Text()) + ".tmp"}
	if err := dst.Mkdir(s.stage, 0o700); err != nil {
		return nil, fmt.Errorf("directory for the tree to come: %w", err)
	}
	root, err := dst.OpenRoot(s.stage)
	if err != nil {
		return nil, errors.Join(err, dst.Remove(s.stage))
	}
	s.root = root
	return s, nil
}

// close removes what is left of the directory.
func (s *sink) close() error {
	for _, l := range s.path {
		if l.at != nil {
			l.at.Close()
		}
	}
	s.root.Close()
	if err := s.dst.RemoveAll(s.stage); err != nil {
		return fmt.Errorf("the directory %s may be left: %w", filepath.Join(s.dst.Name(), s.stage), err)
	}
	return nil
}

// dir takes a directory.
func (s *sink) dir(e entry) error {
	if ok, err := s.take(&e); err != nil || !ok {
		return err
	}
	return s.putDir(e)
}

// putDir makes a directory that was taken.
func (s *sink) putDir(e entry) error {
	at, ok, err := s.parent(e.name)
	if err != nil || !ok {
		return err
	}
	err = at.Mkdir(path.Base(e.name), 0o700)
	if errors.Is(err, fs.ErrExist) {
		return s.skip(e.name, errTwice)
	}
	if err != nil {
		return s.local(e.name, err)
	}
	if err := s.descend(level{entry: e, told: true}); err != nil {
		return err
	}
	return s.done(e.mode, 0)
}

var errTwice = errors.New("the host sends it twice")

// file takes a file. It does not read content if it leaves the file out.
func (s *sink) file(e entry, content io.Reader) error {
	if ok, err := s.take(&e); err != nil || !ok {
		return err
	}
	return s.putFile(e, content)
}

// putFile makes a file that was taken.
func (s *sink) putFile(e entry, content io.Reader) error {
	if e.size < 0 {
		return fault("download", e.name, fmt.Errorf("the host says that it has %d bytes: %w", e.size, fs.ErrInvalid))
	}
	if err := s.checkSize(e.name, e.size); err != nil {
		return err
	}
	at, ok, err := s.parent(e.name)
	if err != nil || !ok {
		return err
	}
	base := path.Base(e.name)
	f, err := at.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return s.skip(e.name, errTwice)
	}
	if err != nil {
		return s.local(e.name, err)
	}
	err = s.fill(f, e, content)
	if err == nil {
		err = s.local(e.name, f.Chmod(e.mode.Perm()))
	}
	err = errors.Join(err, s.local(e.name, f.Close()))
	if err != nil {
		return err
	}
	if err := s.local(e.name, at.Chtimes(base, e.modified, e.modified)); err != nil {
		return err
	}
	return s.done(e.mode, 0)
}

// fill writes a file's content, exactly as much as its size says.
func (s *sink) fill(f *os.File, e entry, content io.Reader) error {
	if s.buf == nil {
		s.buf = make([]byte, copySize)
	}
	for left := e.size; ; {
		n, err := content.Read(s.buf[:min(int64(len(s.buf))-1, left)+1])
		if int64(n) > left {
			return fault("download", e.name, fmt.Errorf("the host said %d bytes and sent more: %w", e.size, fs.ErrInvalid))
		}
		left -= int64(n)
		if _, err := f.Write(s.buf[:n]); err != nil {
			return s.local(e.name, err)
		}
		if n > 0 {
			if err := s.received(int64(n)); err != nil {
				return err
			}
		}
		switch {
		case (err == io.EOF || err == io.ErrUnexpectedEOF) && left > 0:
			return fault("download", e.name, fmt.Errorf("the host said %d bytes, %d came: %w", e.size, e.size-left, io.ErrUnexpectedEOF))
		case err == io.EOF:
			return nil
		case err != nil:
			return fault("download", e.name, err)
		}
	}
}

// link takes a symbolic link.
func (s *sink) link(e entry) error {
	if ok, err := s.take(&e); err != nil || !ok {
		return err
	}
	return s.putLink(e)
}

// putLink makes a symbolic link that was taken.
func (s *sink) putLink(e entry) error {
	if why, err := s.checkLink(e); err != nil {
		return err
	} else if why != nil {
		return s.skip(e.name, why)
	}
	at, ok, err := s.parent(e.name)
	if err != nil || !ok {
		return err
	}
	err = at.Symlink(filepath.FromSlash(e.target), path.Base(e.name))
	if errors.Is(err, fs.ErrExist) {
		return s.skip(e.name, errTwice)
	}
	if err != nil {
		return s.local(e.name, err)
	}
	return s.done(e.mode, 0)
}

// refuse leaves out what is neither file nor directory nor link.
func (s *sink) refuse(name string, why error) error {
	if err := s.count(name); err != nil {
		return err
	}
	return s.skip(name, why)
}

// take decides about an entry: limits, its name, and Match.
func (s *sink) take(e *entry) (ok bool, err error) {
	if err := s.count(e.name); err != nil {
		return false, err
	}
	if why := checkName(e.name); why != nil {
		return false, s.skip(e.name, why)
	}
	if s.lost != "" && strings.HasPrefix(e.name, s.lost) {
		return false, nil
	}
	ok, err = s.matches(e.name, *e)
	if !ok && e.mode.IsDir() {
		s.lost = e.name + "/"
	}
	return ok, err
}

// checkName says why a name cannot be one in a tree.
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("its name is empty")
	case len(name) > maxTreePath:
		return fmt.Errorf("its name has %d bytes: more than a path can", len(name))
	case strings.IndexByte(name, 0) >= 0:
		return errors.New("its name has a NUL byte")
	case name[0] == '/':
		return errors.New("its name is absolute")
	}
	for _, element := range strings.Split(name, "/") {
		switch element {
		case "", ".", "..":
			return fmt.Errorf("its name has an element %q", element)
		}
	}
	if local, err := filepath.Localize(name); filepath.Separator != '/' && (err != nil || !filepath.IsLocal(local)) {
		return errors.New("its name is none on this system")
	}
	return nil
}

// parent goes to the directory that an entry is in, and makes it if the host has not sent it.
func (s *sink) parent(name string) (at *os.Root, ok bool, err error) {
	dir := path.Dir(name)
	if dir == "." {
		dir = ""
	}
	for len(s.path) > 0 {
		top := s.path[len(s.path)-1].name
		if dir == top || strings.HasPrefix(dir, top+"/") {
			break
		}
		if err := s.ascend(); err != nil {
			return nil, false, err
		}
	}
	for {
		have := 0
		if n := len(s.path); n > 0 {
			have = len(s.path[n-1].name)
		}
		if have == len(dir) {
			at, err := s.here()
			return at, true, err
		}
		next := dir
		from := have
		if have > 0 {
			from++
		}
		if i := strings.IndexByte(dir[from:], '/'); i >= 0 {
			next = dir[:from+i]
		}
		if ok, err := s.step(next, name); err != nil || !ok {
			return nil, false, err
		}
	}
}

// step goes down to a directory that the host has sent before, or never.
func (s *sink) step(dir, name string) (ok bool, err error) {
	at, err := s.here()
	if err != nil {
		return false, err
	}
	info, err := at.Lstat(path.Base(dir))
	switch {
	case err == nil && info.IsDir():
		// Its mode and time have been set already.
		return true, s.descend(level{entry: entry{name: dir, mode: info.Mode(), modified: info.ModTime()}, told: true})
	case err == nil:
		return false, s.skip(name, fmt.Errorf("%.256q, which it is in, is %s", dir, kindOf(info.Mode())))
	case !errors.Is(err, fs.ErrNotExist):
		return false, s.local(dir, err)
	}
	e := entry{name: dir, mode: fs.ModeDir | 0o755}
	ok, err = s.matches(dir, e)
	if err != nil || !ok {
		s.lost = dir + "/"
		return false, err
	}
	if err := at.Mkdir(path.Base(dir), 0o700); err != nil {
		return false, s.local(dir, err)
	}
	return true, s.descend(level{entry: e})
}

// here is the directory that the path has come to.
func (s *sink) here() (*os.Root, error) {
	if len(s.path) == 0 {
		return s.root, nil
	}
	l := &s.path[len(s.path)-1]
	if l.at == nil {
		at, err := s.root.OpenRoot(filepath.FromSlash(l.name))
		if err != nil {
			return nil, s.local(l.name, err)
		}
		l.at = at
	}
	return l.at, nil
}

// descend makes a directory, which exists, the end of the path.
func (s *sink) descend(l level) error {
	if n := len(s.path) - maxOpen; n >= 0 && s.path[n].at != nil {
		s.path[n].at.Close()
		s.path[n].at = nil
	}
	at, err := s.here()
	if err != nil {
		return err
	}
	if l.at, err = at.OpenRoot(path.Base(l.name)); err != nil {
		return s.local(l.name, err)
	}
	s.path = append(s.path, l)
	return nil
}

// ascend leaves the last directory of the path, which gets its mode and time.
func (s *sink) ascend() error {
	l := s.path[len(s.path)-1]
	if l.at != nil {
		l.at.Close()
	}
	s.path = s.path[:len(s.path)-1]
	at, err := s.here()
	if err != nil {
		return err
	}
	mode := l.mode.Perm()
	if !l.told {
		l.modified = time.Time{}
	}
	if mode&0o700 != 0o700 && os.Geteuid() != 0 {
		// Whoever is not root could neither move nor remove it.
		if s.kept += len(l.name) + 80; s.kept > maxReadOnly { // 80 for what else an entry has
			if err := s.skip(l.name, fmt.Errorf("its mode is %#o, and not %#o: there are too many directories that cannot be written to", mode|0o700, mode)); err != nil {
				return err
			}
		} else {
			s.readOnly = append(s.readOnly, l.entry)
		}
		mode |= 0o700
	}
	return s.local(l.name, setDir(at, path.Base(l.name), mode, l.modified))
}

// maxReadOnly bounds the memory for the names of directories whose modes are set at the end.
const maxReadOnly = 8 << 20

func setDir(at *os.Root, name string, mode fs.FileMode, modified time.Time) error {
	if err := at.Chmod(name, mode); err != nil {
		return err
	}
	if modified.IsZero() {
		return nil
	}
	return at.Chtimes(name, modified, modified)
}

// local explains an error of the local file system.
func (s *sink) local(name string, err error) error {
	if err == nil {
		return nil
	}
	if inner, ok := errors.AsType[*fs.PathError](err); ok {
		err = inner.Err
	}
	return &fs.PathError{Op: "write", Path: path.Join(filepath.ToSlash(s.dst.Name()), name), Err: err}
}

// commit moves everything to its place, after it has looked whether that can be done.
func (s *sink) commit() error {
	for len(s.path) > 0 {
		if err := s.ascend(); err != nil {
			return err
		}
	}
	if err := s.merge("", true); err != nil {
		return err
	}
	if err := s.merge("", false); err != nil {
		return err
	}
	for i := len(s.readOnly) - 1; i >= 0; i-- {
		e := s.readOnly[i]
		if err := s.dst.Chmod(filepath.FromSlash(e.name), e.mode.Perm()); err != nil {
			return s.local(e.name, err)
		}
	}
	return nil
}

// merge moves what is in a directory to where it belongs. dry only looks.
func (s *sink) merge(dir string, dry bool) error {
	d, err := s.root.Open(orDot(dir))
	if err != nil {
		return s.local(dir, err)
	}
	defer d.Close()
	for {
		infos, err := d.ReadDir(fewEntries)
		for _, info := range infos {
			if err := s.place(path.Join(dir, info.Name()), info.IsDir(), dry); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return s.local(dir, err)
		}
	}
}

func orDot(dir string) string {
	if dir == "" {
		return "."
	}
	return filepath.FromSlash(dir)
}

// place moves one entry to its place, or, if dry, looks whether it can be done.
func (s *sink) place(name string, isDir, dry bool) error {
	to := filepath.FromSlash(name)
	old, err := s.dst.Lstat(to)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return s.local(name, err)
	case isDir && old.IsDir():
		return s.fillDir(name, dry)
	case isDir && old.Mode()&fs.ModeSymlink == 0:
		return s.local(name, fmt.Errorf("the tree has a directory here, where %s is: %w", kindOf(old.Mode()), syscall.ENOTDIR))
	case isDir && !dry:
		if err := s.dst.Remove(to); err != nil {
			return s.local(name, err)
		}
	case !isDir && old.IsDir():
		return s.local(name, fmt.Errorf("the tree has a file here, where a directory is: %w", syscall.EISDIR))
	}
	if dry {
		return nil
	}
	err = s.dst.Rename(filepath.Join(s.stage, to), to)
	if now, statErr := s.dst.Lstat(to); err != nil && isDir && statErr == nil && now.IsDir() {
		return s.fillDir(name, false) // somebody else was faster
	}
	return s.local(name, err)
}

// fillDir merges a directory into one that exists, and gives that the mode and time of the new one.
func (s *sink) fillDir(name string, dry bool) error {
	if !dry && os.Geteuid() != 0 {
		// It may be one that cannot be written to, of an earlier time.
		if info, err := s.dst.Lstat(filepath.FromSlash(name)); err == nil && info.Mode()&0o700 != 0o700 {
			if err := s.dst.Chmod(filepath.FromSlash(name), info.Mode().Perm()|0o700); err != nil {
				return s.local(name, err)
			}
		}
	}
	info, err := s.root.Lstat(filepath.FromSlash(name)) // before it is emptied, which changes its time
	if err != nil {
		return s.local(name, err)
	}
	if err := s.merge(name, dry); err != nil || dry {
		return err
	}
	return s.local(name, setDir(s.dst, filepath.FromSlash(name), info.Mode().Perm(), info.ModTime()))
}
