package transport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"time"
)

// Whole directories over any Transport. What a tree is made of is here; where it comes from, where it goes and on which way is in the files
// beside this one.

// TreeOptions are the options of [UploadTree] and [DownloadTree]; nil means all defaults. The functions in it are called from one goroutine at a
// time, and none after the call has returned.
type TreeOptions struct {
	// Match says which entries are taken; false on a directory leaves out all that is below it. The path is relative to the
	// tree, with slashes. nil: all. What it leaves out is not reported to Skipped. With a download it is asked here, after
	// the host has begun to send the entry.
	Match func(path string, d fs.DirEntry) bool

	// Owner is whom the uploaded files and directories belong to, and the directories that are created above them. nil is the host's default
	// user. A download ignores it: what it creates belongs to this process.
	Owner *User

	// Symlinks says what becomes of symbolic links.
	Symlinks SymlinkPolicy

	// SkipUnchanged leaves out of an upload what the host has already: regular files in whose places are such with the same size, permission bits and
	// modification time in whole seconds, and the same owner. Their contents are not compared. They are reported to Skipped with
	// [ErrUnchanged]. It makes an upload that was interrupted, or one of a tree of which little has changed, short. A download ignores it.
	SkipUnchanged bool

	// MaxBytes and MaxFileBytes are the most bytes of content, of the tree and of any file in it; MaxEntries the most entries, left out ones
	// included; MaxDepth the most elements of a path. One more is [ErrLimit]. 0: no limit.
	MaxBytes, MaxFileBytes int64
	MaxEntries, MaxDepth   int

	// Progress is called with what was transferred so far, after every entry and now and then within a large file.
	Progress func(TreeStats)

	// Skipped is called for every entry that was left out although Match took it, with the reason.
	Skipped func(path string, why error)
}

// TreeStats count what was transferred.
type TreeStats struct {
	Files, Dirs, Symlinks, Skipped int
	Bytes                          int64 // of the files' content
}

// SymlinkPolicy says what becomes of symbolic links in a tree.
type SymlinkPolicy int

const (
	// SkipSymlinks leaves them out and reports them to TreeOptions.Skipped.
	SkipSymlinks SymlinkPolicy = iota
	// KeepSymlinks makes the same links at the other side, if they stay inside the tree: their target is relative, has ".." only in
	// its beginning, and not more of them than lead to the tree's top. Others are left out and reported.
	KeepSymlinks
	// RejectSymlinks makes the transfer fail when there is one.
	RejectSymlinks
)

// TreeUploader is a [Transport] that has a way of its own to upload a tree. [UploadTree] uses it.
type TreeUploader interface {
	UploadTree(ctx context.Context, dst string, src fs.FS, opts *TreeOptions) (TreeStats, error)
}

// TreeDownloader is a [Transport] that has a way of its own to download a tree. [DownloadTree] uses it.
type TreeDownloader interface {
	DownloadTree(ctx context.Context, src string, dst *os.Root, opts *TreeOptions) (TreeStats, error)
}

// UploadTree copies what is in src into the directory dst of the host. dst and the directories above it are created if they are
// missing, mode 0755; one that exists keeps what is in it, its mode and its time.
//
// Names, contents, the permission bits 0777 and modification times, in whole seconds, arrive as they are, of directories too,
// empty ones included; setuid, setgid and the sticky bit do not. A file that exists is replaced, a directory is filled. What is neither regular file,
// directory nor symbolic link is left out and reported to Skipped. A hard link is a file of its own. Where the host has a file and the tree a
// directory, that is an error; a bsdtar, and on an error GNU's tar, has replaced the file nevertheless.
//
// The tree goes as one tar stream through the host's own tar (GNU, busybox or bsdtar) if it has one. Otherwise it goes over SFTP
// where the transport has that, as the one of LXD: this works for stopped instances and those without a shell, too. The last resort are
// single uploads, and commands for what these cannot do: mkdir, ln, chmod, chown and touch.
// All have the same result; over single uploads the modification times of directories are kept where touch knows -d.
//
// The result is complete, or there is an error, a [*fs.PathError] that names what was at fault: a file that cannot be read, or that has grown or shrunk
// while it was, a full disk, a host that vanished. Then the statistics say what was handed to the host, and the tree is there in part. The call can simply be
// repeated, with SkipUnchanged from about where it broke off. When ctx ends it returns after at most a few seconds, and no process of it is left in the host.
//
// Names that are not valid UTF-8 can only be read from an [os.DirFS] or an [os.Root].
func UploadTree(ctx context.Context, t Transport, dst string, src fs.FS, opts *TreeOptions) (TreeStats, error) {
	if u, ok := t.(TreeUploader); ok {
		return u.UploadTree(ctx, dst, src, opts)
	}
	return uploadTree(ctx, t, dst, src, opts, nil)
}

// DownloadTree copies what is in the directory src of the host into dst. It keeps what [UploadTree] keeps, takes the same ways, and trusts the
// host in nothing: it writes only below dst, makes regular files, directories and, with
// KeepSymlinks, symbolic links that stay inside the tree, takes no mode bits but 0777 and no owners. Absolute names, names with
// "..", empty ones and ones with NUL, names that come twice, devices, FIFOs and sockets are left out and
// reported to Skipped. What the host may make this process write is bounded by the limits in opts alone.
//
// The files of a tree are put together in a directory .transport-*.tmp in dst, and moved to their places when all are there and
// whole. On an error dst is as it was, with that directory gone; the statistics say what had arrived. A file that exists is replaced, a directory
// is filled, a symbolic link is replaced, never followed. A file where the tree has a directory, or the other way round, is an error.
func DownloadTree(ctx context.Context, t Transport, src string, dst *os.Root, opts *TreeOptions) (TreeStats, error) {
	if d, ok := t.(TreeDownloader); ok {
		return d.DownloadTree(ctx, src, dst, opts)
	}
	return downloadTree(ctx, t, src, dst, opts, nil)
}

// errNoTar: the host has no tar that is known, or cannot run it.
var errNoTar = errors.New("the host has no tar")

// uploadTree uploads with the host's tar, or otherwise, or over single uploads if there is no otherwise.
func uploadTree(ctx context.Context, t Transport, dst string, src fs.FS, opts *TreeOptions, otherwise func(context.Context, *tree) error) (TreeStats, error) {
	tr, err := newTree(opts)
	if err == nil {
		err = checkTree(dst, src == nil)
	}
	if err == nil && tr.opts.SkipUnchanged {
		err = orCause(ctx, tr.learn(ctx, t, dst, ownerOf(tr.opts.Owner)))
	}
	if err == nil {
		err = orCause(ctx, tr.uploadTar(ctx, t, dst, src))
		if errors.Is(err, errNoTar) {
			if otherwise == nil {
				otherwise = func(ctx context.Context, tr *tree) error { return tr.uploadSingly(ctx, t, dst, src) }
			}
			err = orCause(ctx, otherwise(ctx, tr))
		}
	}
	stats, err := tr.end("upload tree", dst, err)
	return stats, goOn(err)
}

func downloadTree(ctx context.Context, t Transport, src string, dst *os.Root, opts *TreeOptions, otherwise func(context.Context, *sink) error) (TreeStats, error) {
	tr, err := newTree(opts)
	if err == nil {
		err = checkTree(src, dst == nil)
	}
	if err == nil {
		err = tr.download(ctx, t, src, dst, otherwise)
	}
	return tr.end("download tree", src, err)
}

func (tr *tree) download(ctx context.Context, t Transport, src string, dst *os.Root, otherwise func(context.Context, *sink) error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s, err := newSink(tr, dst)
	if err != nil {
		return err
	}
	err = orCause(ctx, tr.downloadTar(ctx, t, src, s))
	if errors.Is(err, errNoTar) {
		if otherwise == nil {
			otherwise = func(ctx context.Context, s *sink) error { return tr.downloadSingly(ctx, t, src, s) }
		}
		err = orCause(ctx, otherwise(ctx, s))
	}
	if err == nil {
		err = s.commit()
	}
	if rest := s.close(); rest != nil {
		err = errors.Join(err, rest)
	}
	return err
}

func checkTree(remote string, none bool) error {
	if err := checkPath(remote); err != nil {
		return err
	}
	if none {
		return errors.New("the local side of the tree is nil")
	}
	return nil
}

// tree is a transfer: its options and what is known of it. Everything in it belongs to the goroutine that transfers.
type tree struct {
	opts    TreeOptions
	stats   TreeStats
	entries int
	last    string // the entry that an upload has come to
	known   *known // what the host has; nil: it was not asked

	mu       sync.Mutex // guards detached
	detached bool       // the caller's functions must not be called again
}

func newTree(opts *TreeOptions) (*tree, error) {
	tr := new(tree)
	if opts != nil {
		tr.opts = *opts
	}
	o := &tr.opts
	switch {
	case o.MaxBytes < 0, o.MaxFileBytes < 0, o.MaxEntries < 0, o.MaxDepth < 0:
		return tr, errors.New("a limit in TreeOptions is negative")
	case o.Symlinks < SkipSymlinks || o.Symlinks > RejectSymlinks:
		return tr, fmt.Errorf("TreeOptions.Symlinks is %d, which is no policy", o.Symlinks)
	case o.Owner != nil && (o.Owner.UID == noID || o.Owner.GID == noID):
		return tr, fmt.Errorf("TreeOptions.Owner: %d is not a user or group", uint32(noID))
	}
	return tr, nil
}

// end makes the result of a call.
func (tr *tree) end(op, remote string, err error) (TreeStats, error) {
	if err != nil {
		err = &fs.PathError{Op: op, Path: remote, Err: err}
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.stats, err
}

// errDetached ends a goroutine that was left alone in a function of the caller's.
var errDetached = errors.New("the transfer has ended")

// call calls one of the caller's functions, unless the transfer has ended.
func (tr *tree) call(f func()) error {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.detached {
		return errDetached
	}
	f()
	return nil
}

// detach makes sure that the caller's functions are not called again. It waits for one that is under way.
func (tr *tree) detach() {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.detached = true
}

// entry is a file, directory or symbolic link in a tree.
type entry struct {
	name     string      // relative to the tree, with slashes
	mode     fs.FileMode // type and permissions
	size     int64       // of a regular file
	modified time.Time
	target   string // of a symbolic link
}

// An entry is its own fs.DirEntry and fs.FileInfo, for Match.
func (e entry) Name() string               { return path.Base(e.name) }
func (e entry) IsDir() bool                { return e.mode.IsDir() }
func (e entry) Type() fs.FileMode          { return e.mode.Type() }
func (e entry) Info() (fs.FileInfo, error) { return e, nil }
func (e entry) Size() int64                { return e.size }
func (e entry) Mode() fs.FileMode          { return e.mode }
func (e entry) ModTime() time.Time         { return e.modified }
func (e entry) Sys() any                   { return nil }

// fault names the entry that an error is about.
func fault(op, name string, err error) error {
	if err == nil || err == errDetached || errors.Is(err, errCut) {
		return err
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// count takes note of an entry before anything is done with it.
func (tr *tree) count(name string) error {
	tr.entries++
	if m := tr.opts.MaxEntries; m > 0 && tr.entries > m {
		return fault("count", name, fmt.Errorf("%w of %d entries (TreeOptions.MaxEntries)", ErrLimit, m))
	}
	if m := tr.opts.MaxDepth; m > 0 && strings.Count(name, "/") >= m {
		return fault("count", name, fmt.Errorf("%w of %d elements of a path (TreeOptions.MaxDepth)", ErrLimit, m))
	}
	return nil
}

// matches asks the caller.
func (tr *tree) matches(name string, d fs.DirEntry) (ok bool, err error) {
	if tr.opts.Match == nil {
		return true, nil
	}
	err = tr.call(func() { ok = tr.opts.Match(name, d) })
	return ok, err
}

// checkSize checks a file's size before its content is transferred.
func (tr *tree) checkSize(name string, size int64) error {
	o := &tr.opts
	if o.MaxFileBytes > 0 && size > o.MaxFileBytes {
		return fault("measure", name, fmt.Errorf("it has %d bytes: %w of %d (TreeOptions.MaxFileBytes)", size, ErrLimit, o.MaxFileBytes))
	}
	if o.MaxBytes > 0 && size > o.MaxBytes-tr.stats.Bytes {
		return fault("measure", name, fmt.Errorf("it has %d bytes after %d of other files: %w of %d (TreeOptions.MaxBytes)", size, tr.stats.Bytes, ErrLimit, o.MaxBytes))
	}
	return nil
}

// checkLink says whether a symbolic link is kept, and if not, why; or what the transfer fails with.
func (tr *tree) checkLink(e entry) (why, err error) {
	switch tr.opts.Symlinks {
	case RejectSymlinks:
		return nil, fault("copy", e.name, fmt.Errorf("it is a symbolic link (TreeOptions.Symlinks is RejectSymlinks): %w", fs.ErrInvalid))
	case KeepSymlinks:
		if !staysInside(e.name, e.target) {
			return fmt.Errorf("it is a symbolic link to %.256q, which may lead out of the tree", e.target), nil
		}
		return nil, nil
	}
	return errSymlink, nil
}

var errSymlink = errors.New("it is a symbolic link (TreeOptions.Symlinks is SkipSymlinks)")

// staysInside reports whether a link leads nowhere but into its tree, whatever other links of which the same holds are in that: ".." after
// a name could lead out of the directory that the name is a link to.
func staysInside(name, target string) bool {
	if target == "" || len(target) > maxTreePath || strings.HasPrefix(target, "/") || strings.IndexByte(target, 0) >= 0 {
		return false
	}
	up, down := 0, false
	for _, element := range strings.Split(target, "/") {
		switch {
		case element == "" || element == ".":
		case element == ".." && down:
			return false
		case element == "..":
			up++
		default:
			down = true
		}
	}
	return up <= strings.Count(name, "/")
}

// maxTreePath is the longest path in a tree, in bytes: Linux's PATH_MAX.
const maxTreePath = 4096

// done counts what was transferred. bytes of a file are counted as they come.
func (tr *tree) done(mode fs.FileMode, bytes int64) error {
	return tr.update(func(s *TreeStats) {
		s.Bytes += bytes
		switch {
		case mode.IsDir():
			s.Dirs++
		case mode&fs.ModeSymlink != 0:
			s.Symlinks++
		default:
			s.Files++
		}
	})
}

func (tr *tree) received(bytes int64) error {
	return tr.update(func(s *TreeStats) { s.Bytes += bytes })
}

func (tr *tree) update(f func(*TreeStats)) error {
	return tr.call(func() {
		f(&tr.stats)
		if tr.opts.Progress != nil {
			tr.opts.Progress(tr.stats)
		}
	})
}

// skip reports an entry that is left out.
func (tr *tree) skip(name string, why error) error {
	return tr.call(func() {
		tr.stats.Skipped++
		if tr.opts.Skipped != nil {
			tr.opts.Skipped(name, why)
		}
	})
}

// ownerOf is a user as an argument of a script: UID:GID, or nothing.
func ownerOf(u *User) string {
	if u == nil {
		return ""
	}
	return fmt.Sprintf("%d:%d", u.UID, u.GID)
}

// relative is a remote path as an argument of a command that runs in "/". Not every transport's commands have the paths that its files have.
func relative(remote string) string { return "./" + strings.TrimLeft(remote, "/") }
