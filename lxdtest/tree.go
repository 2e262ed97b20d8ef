package lxdtest

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A tree is an instance's file system: a directory of this machine that cannot be left.
// Links lead where they would inside of the instance. Owners, and modes that would lock out the one
// who runs the test, are kept beside the files.
type tree struct {
	dir  string
	root *os.Root

	mu    sync.Mutex // guards notes
	notes map[string]note
}

// A note is what the disk does not know about a file.
type note struct {
	info     fs.FileInfo // of the file when the note was made, to notice that it is another
	mode     fs.FileMode
	uid, gid int
}

// A fileInfo is a file as the instance sees it.
type fileInfo struct {
	fs.FileInfo
	mode     fs.FileMode
	uid, gid int
}

func (i *fileInfo) Mode() fs.FileMode { return i.mode }

func openTree(dir string) (*tree, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(abs)
	if err != nil {
		return nil, err
	}
	return &tree{dir: abs, root: root, notes: map[string]note{}}, nil
}

func (t *tree) close() { t.root.Close() }

// locate follows the links on the way to a path, and with last the last one too, and returns where
// that is below the root.
func (t *tree) locate(name string, last bool) (string, error) {
	todo := strings.Split(strings.Trim(path.Clean("/"+name), "/"), "/")
	if todo[0] == "" {
		return ".", nil
	}
	if len(todo) > deep {
		if plain, err := t.descend(todo, last); plain || err != nil {
			return filepath.Join(todo...), err
		}
	}
	var at []string
	for links := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			at = at[:max(len(at)-1, 0)]
			continue
		}
		here := path.Join(append(slices.Clone(at), part)...)
		info, err := t.root.Lstat(filepath.FromSlash(here))
		if err == nil && info.Mode()&fs.ModeSymlink != 0 && (last || len(todo) > 0) {
			if links++; links > 40 {
				return "", syscall.ELOOP
			}
			target, err := t.root.Readlink(filepath.FromSlash(here))
			if err != nil {
				return "", err
			}
			if path.IsAbs(target) {
				at = nil
			}
			todo = append(strings.Split(target, "/"), todo...)
			continue
		}
		if err == nil && !info.IsDir() && len(todo) > 0 {
			return "", syscall.ENOTDIR
		}
		at = append(at, part)
	}
	if len(at) == 0 {
		return ".", nil
	}
	return filepath.Join(at...), nil
}

// deep is from how many elements on a path is looked up one directory at a time, because looking up each of its beginnings takes the square of
// its length.
const deep = 100

// descend reports whether there are no links on the way to a path, or what else is in it.
func (t *tree) descend(parts []string, last bool) (plain bool, err error) {
	dir := t.root
	defer func() {
		if dir != t.root {
			dir.Close()
		}
	}()
	for n, part := range parts {
		info, err := dir.Lstat(part)
		end := n == len(parts)-1
		switch {
		case err != nil: // nor is there a link below
			return errors.Is(err, fs.ErrNotExist), nil
		case info.Mode()&fs.ModeSymlink != 0 && (last || !end):
			return false, nil
		case end:
			return true, nil
		case !info.IsDir():
			return false, syscall.ENOTDIR
		}
		next, err := dir.OpenRoot(part)
		if err != nil {
			return false, nil // the other way says why
		}
		if dir != t.root {
			dir.Close()
		}
		dir = next
	}
	return true, nil
}

// fault words an error as the system calls of the real server's helper do: with the path that was
// asked for.
func (t *tree) fault(op, name string, err error) error {
	if err == nil {
		return nil
	}
	for _, known := range []error{fs.ErrNotExist, fs.ErrExist, fs.ErrPermission} {
		if errors.Is(err, known) {
			return &fs.PathError{Op: op, Path: name, Err: map[error]error{
				fs.ErrNotExist: syscall.ENOENT, fs.ErrExist: errnoOr(err, syscall.EEXIST), fs.ErrPermission: errnoOr(err, syscall.EACCES),
			}[known]}
		}
	}
	return &fs.PathError{Op: op, Path: name, Err: errnoOr(err, err)}
}

func errnoOr(err, other error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return other
}

func (t *tree) info(rel string, disk fs.FileInfo) *fileInfo {
	i := &fileInfo{FileInfo: disk, mode: disk.Mode()}
	i.uid, i.gid = ownerOf(disk)
	t.mu.Lock()
	defer t.mu.Unlock()
	// Commands that run on the disk may have changed or replaced the file since.
	if n, ok := t.notes[rel]; ok && os.SameFile(n.info, disk) && n.info.Mode() == disk.Mode() {
		if uid, gid := ownerOf(n.info); uid == i.uid && gid == i.gid {
			i.mode, i.uid, i.gid = n.mode, n.uid, n.gid
		}
	}
	return i
}

func (t *tree) lstat(name string) (*fileInfo, error) { return t.status("lstat", name, false) }
func (t *tree) stat(name string) (*fileInfo, error)  { return t.status("stat", name, true) }

func (t *tree) status(op, name string, last bool) (*fileInfo, error) {
	rel, err := t.locate(name, last)
	if err != nil {
		return nil, t.fault(op, name, err)
	}
	disk, err := t.root.Lstat(rel)
	if err != nil {
		return nil, t.fault(op, name, err)
	}
	return t.info(rel, disk), nil
}

// modeBits are those that chmod changes.
const modeBits = fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky

// unmapped reports whether an instance has no such user or group. How many it has is configured on the host; these are
// more than anybody gives it. The last number stands for no change.
func unmapped(id int64) bool { return id >= 1_000_000_000 && id != 1<<32-1 }

// change notes a new mode or owner; -1 leaves an owner as it is.
func (t *tree) change(op, name string, mode *fs.FileMode, uid, gid int) error {
	uid, gid = int(int32(uid)), int(int32(gid))
	if unmapped(int64(uint32(uid))) || unmapped(int64(uint32(gid))) {
		return t.fault(op, name, syscall.EINVAL)
	}
	rel, err := t.locate(name, op != "lchown")
	if err != nil {
		return t.fault(op, name, err)
	}
	disk, err := t.root.Lstat(rel)
	if err != nil {
		return t.fault(op, name, err)
	}
	i := t.info(rel, disk)
	if mode != nil {
		i.mode = i.mode&^modeBits | *mode&modeBits
	}
	if uid >= 0 {
		i.uid = uid
	}
	if gid >= 0 {
		i.gid = gid
	}
	if disk.Mode()&fs.ModeSymlink == 0 {
		real := i.mode.Perm()
		if os.Geteuid() != 0 { // who could otherwise not use it any more
			real |= 0o600
			if disk.IsDir() {
				real |= 0o100
			}
		}
		if mode != nil {
			if err := t.root.Chmod(rel, real); err != nil {
				return t.fault(op, name, err)
			}
		}
	}
	if os.Geteuid() == 0 && (uid >= 0 || gid >= 0) {
		// With the power to do it, so that commands that run as this user can use the file.
		_ = t.root.Lchown(rel, uid, gid)
	}
	if disk, err = t.root.Lstat(rel); err != nil {
		return t.fault(op, name, err)
	}
	t.mu.Lock()
	t.notes[rel] = note{info: disk, mode: i.mode, uid: i.uid, gid: i.gid}
	t.mu.Unlock()
	return nil
}

func (t *tree) chmod(name string, mode fs.FileMode) error {
	return t.change("chmod", name, &mode, -1, -1)
}
func (t *tree) chown(name string, uid, gid int) error { return t.change("chown", name, nil, uid, gid) }

func (t *tree) lchown(name string, uid, gid int) error {
	return t.change("lchown", name, nil, uid, gid)
}

func (t *tree) chtimes(name string, atime, mtime time.Time) error {
	rel, err := t.locate(name, true)
	if err == nil {
		err = t.root.Chtimes(rel, atime, mtime)
	}
	return t.fault("chtimes", name, err)
}

// open opens a file, never waiting for the other end of a FIFO.
func (t *tree) open(name string, flag int, mode fs.FileMode) (*os.File, error) {
	rel, err := t.locate(name, flag&os.O_EXCL == 0)
	if err != nil {
		return nil, t.fault("open", name, err)
	}
	_, before := t.root.Lstat(rel)
	f, err := t.root.OpenFile(rel, flag|nonBlock, mode.Perm()|0o600)
	if err != nil {
		return nil, t.fault("open", name, err)
	}
	if before != nil && flag&os.O_CREATE != 0 {
		if err := t.chmod(name, mode); err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, nil
}

func (t *tree) mkdir(name string, mode fs.FileMode) error {
	rel, err := t.locate(name, false)
	if err == nil {
		err = t.root.Mkdir(rel, mode.Perm()|0o700)
	}
	if err != nil {
		return t.fault("mkdir", name, err)
	}
	return t.chmod(name, mode)
}

func (t *tree) remove(name string) error {
	rel, err := t.locate(name, false)
	if err == nil {
		err = t.root.Remove(rel)
	}
	if err == nil {
		t.mu.Lock()
		delete(t.notes, rel)
		t.mu.Unlock()
	}
	return t.fault("remove", name, err)
}

func (t *tree) removeAll(name string) error {
	rel, err := t.locate(name, false)
	if err == nil {
		err = t.root.RemoveAll(rel)
	}
	return t.fault("remove", name, err)
}

func (t *tree) rename(from, to string) error {
	a, err := t.locate(from, false)
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: errnoOr(err, err)}
	}
	b, err := t.locate(to, false)
	if err == nil {
		err = t.root.Rename(a, b)
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: errnoOr(err, err)}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.notes, b)
	for rel, n := range t.notes {
		if rest, below := strings.CutPrefix(rel, a+string(filepath.Separator)); below {
			delete(t.notes, rel)
			t.notes[filepath.Join(b, rest)] = n
		}
	}
	if n, ok := t.notes[a]; ok {
		delete(t.notes, a)
		t.notes[b] = n
	}
	return nil
}

func (t *tree) symlink(target, name string) error {
	rel, err := t.locate(name, false)
	if err == nil {
		err = t.root.Symlink(target, rel)
	}
	if err != nil {
		return &os.LinkError{Op: "symlink", Old: target, New: name, Err: errnoOr(err, err)}
	}
	return nil
}

func (t *tree) link(from, to string) error {
	a, err := t.locate(from, false)
	var b string
	if err == nil {
		b, err = t.locate(to, false)
	}
	if err == nil {
		err = t.root.Link(a, b)
	}
	if err != nil {
		return &os.LinkError{Op: "link", Old: from, New: to, Err: errnoOr(err, err)}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if n, ok := t.notes[a]; ok {
		t.notes[b] = n
	}
	return nil
}

func (t *tree) readlink(name string) (string, error) {
	rel, err := t.locate(name, false)
	var target string
	if err == nil {
		target, err = t.root.Readlink(rel)
	}
	return target, t.fault("readlink", name, err)
}

// list reads a directory in the order of the disk.
func (t *tree) list(name string) ([]*fileInfo, error) {
	rel, err := t.locate(name, true)
	if err != nil {
		return nil, t.fault("open", name, err)
	}
	d, err := t.root.Open(rel)
	if err != nil {
		return nil, t.fault("open", name, err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, t.fault("readdirent", name, err)
	}
	var list []*fileInfo
	for _, n := range names {
		at := filepath.Join(rel, n)
		if disk, err := t.root.Lstat(at); err == nil {
			list = append(list, t.info(at, disk))
		}
	}
	return list, nil
}

// A File is one file of an instance.
type File struct {
	Path     string // from the instance's root, with a slash in front
	Mode     fs.FileMode
	UID, GID int
	Size     int64
	ModTime  time.Time
	Target   string // of a symbolic link
}

// Files returns all files and directories of an instance in the default project, sorted by path.
func (s *Server) Files(instance string) []File {
	i := s.findInstance("", instance)
	if i == nil {
		return nil
	}
	var files []File
	_ = fs.WalkDir(i.tree.root.FS(), ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return nil
		}
		disk, err := i.tree.root.Lstat(filepath.FromSlash(name))
		if err != nil {
			return nil
		}
		info := i.tree.info(filepath.FromSlash(name), disk)
		f := File{Path: "/" + name, Mode: info.mode, UID: info.uid, GID: info.gid, Size: info.Size(), ModTime: info.ModTime()}
		if info.mode&fs.ModeSymlink != 0 {
			f.Target, _ = i.tree.root.Readlink(filepath.FromSlash(name))
		}
		files = append(files, f)
		return nil
	})
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return files
}

// ReadFile returns the content of a file in an instance in the default project.
func (s *Server) ReadFile(instance, name string) ([]byte, error) {
	i := s.findInstance("", instance)
	if i == nil {
		return nil, fs.ErrNotExist
	}
	rel, err := i.tree.locate(name, true)
	if err != nil {
		return nil, i.tree.fault("open", name, err)
	}
	return i.tree.root.ReadFile(rel)
}

// WriteFile puts a file into an instance in the default project, with its missing directories.
func (s *Server) WriteFile(instance, name string, content []byte, mode fs.FileMode) error {
	i := s.findInstance("", instance)
	if i == nil {
		return fs.ErrNotExist
	}
	rel, err := i.tree.locate(name, true)
	if err != nil {
		return i.tree.fault("open", name, err)
	}
	if err := i.tree.root.MkdirAll(filepath.Dir(rel), 0o755); err != nil {
		return err
	}
	if err := i.tree.root.WriteFile(rel, content, 0o600); err != nil {
		return err
	}
	return i.tree.chmod(name, mode)
}
