package transporttest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing/fstest"
	"time"

	"github.com/lxdtransport/transport"
)

// What the cases with trees are made of. What a transport did with one is seen with the host's own commands at its side and
// with package os at this, never with the transport's other direction: two faults could make each other good.

// node is an entry of a tree.
type node struct {
	name string
	mode fs.FileMode // its type, too
	text string      // content, or a link's target
	time time.Time   // not of links
}

func (n node) isLink() bool { return n.mode.Type() == fs.ModeSymlink }

// forest is a tree, directories before what is in them.
type forest []node

// planted gives every entry a time of its own.
func planted(nodes ...node) forest {
	for i := range nodes {
		nodes[i].time = time.Unix(1234567890+int64(i)*86400, 0)
	}
	return nodes
}

func file(name string, mode fs.FileMode, text string) node {
	return node{name: name, mode: mode, text: text}
}
func directory(name string, mode fs.FileMode) node { return node{name: name, mode: fs.ModeDir | mode} }
func link(name, target string) node {
	return node{name: name, mode: fs.ModeSymlink | 0o777, text: target}
}

// source is the tree as a file system.
func (f forest) source() fstest.MapFS {
	m := fstest.MapFS{}
	for _, n := range f {
		m[n.name] = &fstest.MapFile{Data: []byte(n.text), Mode: n.mode, ModTime: n.time}
	}
	return m
}

// without is the tree without some entries.
func (f forest) without(names ...string) forest {
	return slices.DeleteFunc(slices.Clone(f), func(n node) bool { return slices.Contains(names, n.name) })
}

// stats are what a transfer of the tree counts.
func (f forest) stats(skipped int) transport.TreeStats {
	s := transport.TreeStats{Skipped: skipped}
	for _, n := range f {
		switch {
		case n.mode.IsDir():
			s.Dirs++
		case n.isLink():
			s.Symlinks++
		default:
			s.Files++
			s.Bytes += int64(len(n.text))
		}
	}
	return s
}

// letters is a mode as ls shows it.
func (n node) letters() string {
	kind := "-"
	if n.mode.IsDir() {
		kind = "d"
	} else if n.isLink() {
		kind = "l"
	}
	return kind + n.mode.Perm().String()[1:]
}

func (n node) stamp() string { return n.time.UTC().Format("200601021504.05") }

// grow makes the tree in a directory of the host, which it makes, too.
func (f forest) grow(ctx context.Context, host transport.Transport, far string) error {
	var make, finish []string
	for _, n := range f {
		make = append(make, n.letters()[:1], n.name, n.text)
		if !n.isLink() {
			finish = append([]string{n.name, fmt.Sprintf("%04o", n.mode.Perm()), n.stamp()}, finish...)
		}
	}
	if err := run(ctx, host, in("/", sh(`mkdir "$1"`, strings.TrimPrefix(far, "/")))); err != nil {
		return err
	}
	const makes = `while [ $# -gt 0 ]; do
		case $1 in d) mkdir "./$2";; l) ln -s -- "$3" "./$2";; *) printf %s "$3" >"./$2";; esac || exit
		shift 3
	done`
	if err := run(ctx, host, in(far, sh(makes, make...))); err != nil {
		return err
	}
	const finishes = `while [ $# -gt 0 ]; do chmod "$2" "./$1" && TZ=UTC0 touch -t "$3" "./$1" || exit; shift 3; done`
	return run(ctx, host, in(far, sh(finishes, finish...)))
}

// stands checks that a directory of the host holds the tree and nothing else.
func (f forest) stands(ctx context.Context, host transport.Transport, far string) error {
	var args []string
	var want strings.Builder
	for _, n := range f {
		args = append(args, n.letters()[:1], n.name, n.stamp())
		content, mode := n.text, n.letters()
		if n.isLink() {
			content, mode = content+"\n", "l" // systems differ in the modes of links
		}
		if n.mode.IsDir() {
			content = ""
		}
		fmt.Fprintf(&want, "%s\n%s %s|", n.name, mode, content)
	}
	fmt.Fprintf(&want, "%d entries", len(f))
	const looks = `TZ=UTC0; export TZ
	while [ $# -gt 0 ]; do
		m=$(ls -dln "./$2") || exit
		case $1 in
		l) printf '%s\n%.1s ' "$2" "$m"; readlink "./$2" || exit;;
		*) printf '%s\n%.10s ' "$2" "$m";;
		esac
		case $1 in -) cat "./$2" || exit;; esac
		case $1 in d|-)
			touch -t "$3" ../.time
			if [ "./$2" -nt ../.time ] || [ ../.time -nt "./$2" ]; then printf ' (its time is not %s)' "$3"; fi;;
		esac
		printf '|'
		shift 3
	done
	n=$(find . ! -name . -exec sh -c 'for f; do echo; done' sh {} + | wc -l)
	printf '%d entries' $n`
	got, err := output(ctx, host, in(far, sh(looks, args...)))
	if err != nil {
		return fmt.Errorf("looking at the tree in the host: %w", err)
	}
	if got == want.String() {
		return nil
	}
	have, wanted := strings.Split(got, "|"), strings.Split(want.String(), "|")
	for i := range wanted {
		if i >= len(have) || have[i] != wanted[i] {
			return equal("in the host's tree an entry", strings.Join(have[min(i, len(have)):min(i+1, len(have))], ""), wanted[i])
		}
	}
	return equal("the host's tree", got, want.String())
}

// stood checks that a directory here holds the tree and nothing else.
func (f forest) stood(near *os.Root) error {
	for _, n := range f {
		name := filepath.FromSlash(n.name)
		info, err := near.Lstat(name)
		if err != nil {
			return fmt.Errorf("what was to arrive: %w", err)
		}
		if n.isLink() {
			target, err := near.Readlink(name)
			if err := errors.Join(err, equal("target of "+n.name, target, n.text)); err != nil {
				return err
			}
			continue
		}
		if info.Mode() != n.mode {
			return fmt.Errorf("the mode of %s is %v, not %v", brief(n.name), info.Mode(), n.mode)
		}
		if !info.ModTime().Equal(n.time) {
			return fmt.Errorf("the time of %s is %v, not %v", brief(n.name), info.ModTime().UTC(), n.time.UTC())
		}
		if n.mode.IsRegular() {
			text, err := near.ReadFile(name)
			if err := errors.Join(err, equal("content of "+brief(n.name), string(text), n.text)); err != nil {
				return err
			}
		}
	}
	return entriesHere(near, len(f))
}

// entriesHere checks how many entries there are below a directory.
func entriesHere(near *os.Root, want int) error {
	var names []string
	err := fs.WalkDir(near.FS(), ".", func(name string, _ fs.DirEntry, err error) error {
		if name != "." {
			names = append(names, name)
		}
		return err
	})
	if err == nil && len(names) != want {
		err = fmt.Errorf("there are %d entries, not %d: %s", len(names), want, brief(strings.Join(names, " ")))
	}
	return err
}

// place is where a tree is in the host, and where it is here.
type place struct {
	far  string   // below the case's directory; not there yet
	near *os.Root // empty
	dir  string   // near's name
}

// withTrees makes a case of a function that needs a place at both sides.
func withTrees(f func(ctx context.Context, host transport.Transport, p place) error) func(context.Context, transport.Transport) error {
	return func(ctx context.Context, host transport.Transport) (err error) {
		dir, err := scratch(ctx, host)
		if err != nil {
			return err
		}
		near, name, done, err := here()
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done()) }()
		return f(ctx, host, place{dir + "/tree", near, name})
	}
}

// here makes a directory on this machine.
func here() (root *os.Root, name string, done func() error, err error) {
	name, err = os.MkdirTemp("", "transporttest")
	if err != nil {
		return nil, "", nil, err
	}
	root, err = os.OpenRoot(name)
	if err != nil {
		return nil, "", nil, errors.Join(err, os.Remove(name))
	}
	return root, name, func() error {
		// Who is not root cannot remove what is in a directory without rights.
		_ = filepath.WalkDir(name, func(p string, d fs.DirEntry, err error) error {
			if d != nil && d.IsDir() {
				_ = os.Chmod(p, 0o700)
			}
			return nil
		})
		return errors.Join(root.Close(), os.RemoveAll(name))
	}, nil
}

// removable lets who is not root remove a tree in the host.
func removable(ctx context.Context, host transport.Transport, far string) error {
	return run(ctx, host, in(far, sh("chmod -R u+rwx .")))
}

// skips collects what a transfer leaves out.
type skips struct {
	mu    sync.Mutex
	names []string
	bad   error
}

func (s *skips) add(name string, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names = append(s.names, name)
	if why == nil || why.Error() == "" {
		s.bad = fmt.Errorf("%s was left out without a reason", name)
	}
}

// are checks what was left out, in any order, and how much of it was counted.
func (s *skips) are(counted int, names ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	slices.Sort(s.names)
	slices.Sort(names)
	if counted != len(names) {
		return fmt.Errorf("%d entries were counted as left out, not %d", counted, len(names))
	}
	return errors.Join(s.bad, equal("what was reported as left out", strings.Join(s.names, " "), strings.Join(names, " ")))
}

// upTree and downTree transfer trees that have to arrive.
func upTree(ctx context.Context, host transport.Transport, far string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
	stats, err := transport.UploadTree(ctx, host, far, src, opts)
	if err != nil {
		err = fmt.Errorf("uploading a tree: %w", err)
	}
	return stats, err
}

func downTree(ctx context.Context, host transport.Transport, far string, near *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
	stats, err := transport.DownloadTree(ctx, host, far, near, opts)
	if err != nil {
		err = fmt.Errorf("downloading a tree: %w", err)
	}
	return stats, err
}

// accuses checks that an error is an *fs.PathError, names an entry and matches others.
func accuses(err error, name string, targets ...error) error {
	if _, ok := errors.AsType[*fs.PathError](err); !ok {
		return fmt.Errorf("want an *fs.PathError, got %T: %w", err, orNil(err))
	}
	if !strings.Contains(err.Error(), name) {
		return fmt.Errorf("want an error that names %q, got: %w", name, err)
	}
	return is(err, targets...)
}

// oddFile is a file system in which reading one file goes wrong.
type oddFile struct {
	fs.FS
	name string
	read func(fs.File, []byte) (int, error)
}

func (o oddFile) Open(name string) (fs.File, error) {
	f, err := o.FS.Open(name)
	if err == nil && name == o.name {
		f = oddReads{f, o.read}
	}
	return f, err
}

type oddReads struct {
	fs.File
	read func(fs.File, []byte) (int, error)
}

func (o oddReads) Read(p []byte) (int, error) { return o.read(o.File, p) }

// sized makes a file of another size of what it is in truth.
type sized struct {
	fs.FS
	name string
	size int64
}

func (s sized) Open(name string) (fs.File, error) {
	f, err := s.FS.Open(name)
	if err == nil && name == s.name {
		f = sizedFile{f, s.size}
	}
	return f, err
}

type sizedFile struct {
	fs.File
	size int64
}

func (s sizedFile) Stat() (fs.FileInfo, error) {
	info, err := s.File.Stat()
	return sizedInfo{info, s.size}, err
}

type sizedInfo struct {
	fs.FileInfo
	size int64
}

func (s sizedInfo) Size() int64 { return s.size }

// endless is a source with a file that has no end before long.
func endless() fs.FS {
	src := planted(directory("d", 0o755), file("d/endless", 0o644, "")).source()
	return sized{oddFile{src, "d/endless", func(_ fs.File, p []byte) (int, error) { return zeros(p) }}, "d/endless", 1 << 40}
}

// quiet checks that the functions of the caller are not called after a transfer has returned.
type quiet struct{ calls atomic.Int64 }

func (q *quiet) options() *transport.TreeOptions {
	return &transport.TreeOptions{
		Match:    func(string, fs.DirEntry) bool { q.calls.Add(1); return true },
		Skipped:  func(string, error) { q.calls.Add(1) },
		Progress: func(transport.TreeStats) { q.calls.Add(1) },
	}
}

func (q *quiet) stays() error {
	before := q.calls.Load()
	time.Sleep(window)
	if n := q.calls.Load() - before; n > 0 {
		return fmt.Errorf("the caller's functions were called %d times after the return", n)
	}
	return nil
}

// deserted checks that no process of the host works in a directory or has its name among its arguments.
func deserted(ctx context.Context, host transport.Transport, far string) error {
	text, err := output(ctx, host, in("/", sh(`if [ -r /proc/self/cmdline ]; then ls -l /proc/[0-9]*/cwd; cat /proc/[0-9]*/cmdline; else ps -A -o args; fi 2>/dev/null; :`)))
	if err != nil {
		return err
	}
	if i := strings.Index(text, strings.TrimPrefix(far, "/")); i >= 0 {
		return fmt.Errorf("a process is left in the host: %s", brief(text[max(0, i-100):i]))
	}
	return nil
}

// tidy checks that no temporary names are in a directory of the host that may be missing.
func tidy(ctx context.Context, host transport.Transport, far string) error {
	text, err := output(ctx, host, in("/", sh(`[ ! -d "$1" ] || find "$1" -name '*transport-*.tmp'`, strings.TrimPrefix(far, "/"))))
	return errors.Join(err, equal("what is left of temporary files", text, ""))
}
