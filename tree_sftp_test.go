package transport_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/lxdtest"
)

// stopped makes an instance that does not run: there is no tar, only SFTP.
func stopped(t *testing.T) *transport.LXD {
	t.Helper()
	s := reallxd.Unix(t)
	name := reallxd.Create(t, s)
	t.Cleanup(func() { reallxd.Delete(t, s, name) })
	return newLXD(t, s, name, nil)
}

// oddTree makes a tree of everything that a name, mode or size can be, and returns its directory.
func oddTree(t *testing.T) string {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("its names are none there")
	}
	dir := t.TempDir()
	when := time.Unix(1234567890, 0)
	file := func(name string, size int, mode fs.FileMode) {
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(rand.Uint32())
		}
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
		require.NoError(t, os.Chmod(filepath.Join(dir, name), mode))
		when = when.Add(time.Second)
		require.NoError(t, os.Chtimes(filepath.Join(dir, name), when, when))
	}
	for _, name := range []string{"a b", "line\nbreak", `'"\`, "-rf", "*", "\xff\xfe", "ä€", strings.Repeat("x", 255), "..a", "...", " "} {
		file(name, len(name), 0o644)
	}
	for _, size := range []int{0, 1, 32<<10 - 1, 32 << 10, 32<<10 + 1, 128<<10 - 1, 128 << 10, 128<<10 + 1, 250 << 10, 250<<10 + 1, 3 << 20} {
		file(fmt.Sprint("size", size), size, 0o640)
	}
	for _, mode := range []fs.FileMode{0, 0o400, 0o755, 0o777, 0o111} {
		file(fmt.Sprintf("mode%o", mode), 10, mode)
	}
	for _, d := range []string{"empty", "many", "\xfe dir", "deep", "closed"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	for i := range 700 {
		file(fmt.Sprintf("many/%d", i), i*7, 0o644)
	}
	file("\xfe dir/\xfd", 5, 0o600)
	file("closed/f", 5, 0o600)
	require.NoError(t, os.Symlink("../many/7", filepath.Join(dir, "closed/link")))
	require.NoError(t, os.Symlink("nowhere at all\n", filepath.Join(dir, "dangling")))
	deep := "deep"
	for len(deep) < 3600 {
		deep += "/" + strings.Repeat("d", 200)
	}
	at, err := os.OpenRoot(dir)
	require.NoError(t, err)
	defer at.Close()
	require.NoError(t, at.MkdirAll(deep, 0o755))
	require.NoError(t, at.WriteFile(deep+"/f", []byte("deep"), 0o644))
	require.NoError(t, os.Chmod(filepath.Join(dir, "closed"), 0o700))
	var dirs []string
	fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && name != "." {
			dirs = append(dirs, name)
		}
		return nil
	})
	dirs = append(dirs, "\xfe dir")
	slices.Reverse(dirs)
	for i, d := range dirs {
		when := when.Add(time.Duration(i) * time.Minute)
		require.NoError(t, os.Chtimes(filepath.Join(dir, d), when, when))
	}
	return dir
}

// listing describes everything in a directory.
func listing(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	require.NoError(t, filepath.Walk(dir, func(name string, info fs.FileInfo, err error) error {
		if err != nil || name == dir {
			return err
		}
		said := fmt.Sprintf("%v %d", info.Mode(), info.ModTime().Unix())
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			said += fmt.Sprintf(" %d %x", len(data), sha256.Sum256(data))
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			said = "-> " + target
		}
		all[strings.TrimPrefix(name, dir+"/")] = said
		return nil
	}))
	return all
}

func sameTree(t *testing.T, want, got string) {
	t.Helper()
	a, b := listing(t, want), listing(t, got)
	bad := 0
	for name, said := range a {
		if b[name] != said {
			if bad++; bad < 10 {
				t.Errorf("%.100q: %s instead of %s", name, b[name], said)
			}
		}
	}
	assert.Equal(t, len(a), len(b))
}

// into downloads a tree into a new directory.
func into(t *testing.T, host transport.Transport, src string, opts *transport.TreeOptions) (string, transport.TreeStats, error) {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	require.NoError(t, err)
	defer root.Close()
	stats, err := transport.DownloadTree(soon(t), host, src, root, opts)
	return dir, stats, err
}

var keepLinks = &transport.TreeOptions{Symlinks: transport.KeepSymlinks}

func TestTreeOfAStoppedInstance(t *testing.T) {
	t.Parallel()
	reallxd.Need(t)
	src := oddTree(t)
	host := stopped(t)
	for _, round := range []string{"fresh", "once more"} {
		up, err := transport.UploadTree(soon(t), host, "/srv/a/tree", os.DirFS(src), keepLinks)
		require.NoError(t, err, round)
		dir, down, err := into(t, host, "/srv/a/tree/", keepLinks)
		require.NoError(t, err, round)
		assert.Equal(t, up, down, round)
		sameTree(t, src, dir)
	}
}

// A path that is not UTF-8 cannot be an argument of a command.
func TestTreeToANameThatIsNotUTF8(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		src, at := oddTree(t), scratch(t, host)
		_, err := transport.UploadTree(soon(t), host, at+"/\xff", os.DirFS(src), keepLinks)
		require.NoError(t, err)
		dir, _, err := into(t, host, at+"/\xff", keepLinks)
		require.NoError(t, err)
		sameTree(t, src, dir)
		dir, _, err = into(t, host, at, keepLinks) // through tar
		require.NoError(t, err)
		sameTree(t, src, filepath.Join(dir, "\xff"))
		output(t, host, `rm -r "$1"`, at)
	})
}

func TestTreeOverSFTPIntoWhatIsThere(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		at := scratch(t, host)
		dst := at + "/\xff"
		tree := fstest.MapFS{
			"file":       {Data: []byte("new"), Mode: 0o600, ModTime: time.Unix(1e9, 0)},
			"dir":        {Mode: fs.ModeDir | 0o700, ModTime: time.Unix(1e9, 0)},
			"dir/f":      {Data: []byte("new"), Mode: 0o644, ModTime: time.Unix(1e9, 0)},
			"dir/sub/f":  {Data: []byte("new"), Mode: 0o644, ModTime: time.Unix(1e9, 0)},
			"large":      {Data: make([]byte, 1<<20), Mode: 0o644},
			"over/a/b/c": {Data: []byte("new"), Mode: 0o644},
		}
		output(t, host, `cd "$1"; d=$(printf '\377'); mkdir -p out $d/dir/keep; echo old >out/f; cd $d
			ln -s ../out/f file; ln -s ../out/f large; ln -s ../../out dir/sub; ln -s ../out over; echo old >dir/f; ln dir/f ../hard`, at)
		owner := &transport.User{UID: 1000, GID: 1001}
		_, err := transport.UploadTree(soon(t), host, dst, tree, &transport.TreeOptions{Owner: owner})
		require.NoError(t, err)
		assert.Equal(t, "old\nold\nf\n", output(t, host, `cd "$1"; cat out/f hard; ls out`, at), "links are not followed, files are not written through")
		assert.Equal(t, "dir/keep\n600 1000 1001 1000000000\n700 1000 1001 1000000000\n644 1000 1001 1000000000\nnew",
			output(t, host, `cd "$1"/$(printf '\377'); echo dir/*eep; stat -c '%a %u %g %Y' file dir dir/f; cat dir/sub/f`, at))

		output(t, host, `cd "$1"/$(printf '\377'); rm -r file dir large; mkdir -p file/full; echo x >dir`, at)
		_, err = transport.UploadTree(soon(t), host, dst, fstest.MapFS{"file": tree["file"]}, nil)
		assert.ErrorIs(t, err, syscall.ENOTEMPTY)
		assert.ErrorContains(t, err, "file: ")
		_, err = transport.UploadTree(soon(t), host, dst, fstest.MapFS{"dir/f": tree["dir/f"]}, nil)
		assert.ErrorIs(t, err, fs.ErrExist)
		_, err = transport.UploadTree(soon(t), host, dst+"/dir", tree, nil)
		assert.ErrorIs(t, err, syscall.ENOTDIR)
		_, _, err = into(t, host, dst+"/dir", nil)
		assert.ErrorIs(t, err, syscall.ENOTDIR)
		_, _, err = into(t, host, dst+"/none", nil)
		assert.ErrorIs(t, err, fs.ErrNotExist)
		output(t, host, `rm -r "$1"`, at)
	})
}

// What the host has is not sent again; a change of any kind is seen.
func TestTreeOverSFTPSkipsWhatIsUnchanged(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		at := scratch(t, host)
		dst := at + "/\xff"
		src := oddTree(t)
		first, err := transport.UploadTree(soon(t), host, dst, os.DirFS(src), keepLinks)
		require.NoError(t, err)
		unchanged := map[string]bool{}
		opts := &transport.TreeOptions{Symlinks: transport.KeepSymlinks, SkipUnchanged: true, Skipped: func(name string, why error) {
			assert.ErrorIs(t, why, transport.ErrUnchanged)
			unchanged[name] = true
		}}
		again, err := transport.UploadTree(soon(t), host, dst, os.DirFS(src), opts)
		require.NoError(t, err)
		assert.Equal(t, transport.TreeStats{Dirs: first.Dirs, Symlinks: first.Symlinks, Skipped: first.Files}, again)

		clear(unchanged)
		output(t, host, `cd "$1"/$(printf '\377'); printf x >many/1; touch many/2; chmod 600 many/3; chown 1:1 many/4; rm many/5; rm many/6; ln -s 7 many/6
			mv deep shallow; cp many/8 many/9`, at)
		again, err = transport.UploadTree(soon(t), host, dst, os.DirFS(src), opts)
		require.NoError(t, err)
		assert.Equal(t, 8, again.Files)
		for _, n := range []int{1, 2, 3, 4, 5, 6, 9} {
			assert.False(t, unchanged[fmt.Sprint("many/", n)], n)
		}
		output(t, host, `rm -r "$1"/$(printf '\377')/shallow`, at)
		dir, _, err := into(t, host, dst, keepLinks)
		require.NoError(t, err)
		sameTree(t, src, dir)

		clear(unchanged)
		opts.Owner = &transport.User{UID: 1000, GID: 1001}
		again, err = transport.UploadTree(soon(t), host, dst, os.DirFS(src), opts)
		require.NoError(t, err)
		assert.Equal(t, first.Files, again.Files, "another owner is a change")
		again, err = transport.UploadTree(soon(t), host, dst, os.DirFS(src), opts)
		require.NoError(t, err)
		assert.Zero(t, again.Files)
		output(t, host, `rm -r "$1"`, at)
	})
}

// The error is about the file that did not fit, not about the one that was sent at the time.
func TestTreeOverSFTPOntoAFullDisk(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		at := scratch(t, host)
		output(t, host, `cd "$1"; mkdir full; mount -t tmpfs -o size=1m none full; mkdir full/$(printf '\377')`, at)
		defer output(t, host, `umount "$1/full"; rm -r "$1"`, at)
		tree := fstest.MapFS{}
		for i := range 400 {
			tree[fmt.Sprintf("d%d/f", i)] = &fstest.MapFile{Data: make([]byte, 10000), Mode: 0o644}
		}
		_, err := transport.UploadTree(soon(t), host, at+"/full/\xff", tree, nil)
		assert.ErrorIs(t, err, syscall.ENOSPC)
		assert.Regexp(t, `upload d\d+(/f)?: no space left`, err.Error())
	})
}

func TestTreeOverSFTPWithLimitsAndMatch(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		at := scratch(t, host)
		output(t, host, `cd "$1"; d=$(printf '\377'); mkdir -p $d/a/b $d/no/no; cd $d; for i in a a/b no no/no; do echo 12345 >$i/f; done
			mkfifo a/fifo; ln -s /etc a/out; ln a/f a/hard; truncate -s 100000000000 no/huge`, at)
		src := at + "/\xff"
		match := func(name string, d fs.DirEntry) bool { return name != "no" }
		skipped := make(map[string]string)
		dir, stats, err := into(t, host, src, &transport.TreeOptions{
			Match: match, Symlinks: transport.KeepSymlinks, Skipped: func(name string, why error) { skipped[name] = why.Error() },
		})
		require.NoError(t, err)
		assert.Equal(t, transport.TreeStats{Files: 3, Dirs: 2, Skipped: 2, Bytes: 18}, stats)
		assert.Equal(t, "it is a FIFO", skipped["a/fifo"])
		assert.Contains(t, skipped["a/out"], "may lead out")
		assert.Len(t, listing(t, dir), 5)
		for _, o := range []*transport.TreeOptions{{MaxBytes: 17}, {MaxFileBytes: 5}, {MaxEntries: 4}, {MaxDepth: 2}} {
			o.Match = match
			dir, _, err := into(t, host, src, o)
			assert.ErrorIs(t, err, transport.ErrLimit)
			assert.Empty(t, listing(t, dir), "nothing is left")
		}
		_, _, err = into(t, host, src, &transport.TreeOptions{MaxBytes: 1 << 20})
		assert.ErrorIs(t, err, transport.ErrLimit)
		_, _, err = into(t, host, src, &transport.TreeOptions{Match: match, Symlinks: transport.RejectSymlinks})
		assert.ErrorContains(t, err, "a/out")
		output(t, host, `rm -r "$1"`, at)
	})
}

func TestTreeOverSFTPIsCancelled(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		at := scratch(t, host)
		tree := fstest.MapFS{"zero": {Data: make([]byte, 44<<20), Mode: 0o644}}
		for i := range sized(5000, 1500) {
			tree[fmt.Sprintf("d%d/%d", i%50, i)] = &fstest.MapFile{Data: make([]byte, 3000), Mode: 0o644}
		}
		mine := errors.New("enough")
		for _, most := range []int64{1 << 20, 40 << 20} {
			ctx, cancel := context.WithCancelCause(soon(t))
			var since time.Time
			_, err := transport.UploadTree(ctx, host, at+"/\xff", tree, &transport.TreeOptions{Progress: func(s transport.TreeStats) {
				if s.Bytes > most && since.IsZero() {
					since = time.Now()
					cancel(mine)
				}
			}})
			assert.ErrorIs(t, err, mine)
			assert.Less(t, time.Since(since), 5*time.Second)
		}
		assert.Empty(t, output(t, host, `find "$1" -name '.transport-*'`, at))
		_, err := transport.UploadTree(soon(t), host, at+"/\xff", tree, nil)
		require.NoError(t, err, "it can be called again")
		dir := t.TempDir()
		root, err := os.OpenRoot(dir)
		require.NoError(t, err)
		defer root.Close()
		ctx, cancel := context.WithCancelCause(soon(t))
		_, err = transport.DownloadTree(ctx, host, at+"/\xff", root, &transport.TreeOptions{Progress: func(s transport.TreeStats) {
			if s.Bytes > 40<<20 {
				cancel(mine)
			}
		}})
		assert.ErrorIs(t, err, mine)
		assert.Empty(t, listing(t, dir))
		output(t, host, `rm -r "$1"`, at)
	})
}

// Many files in turn and at once share sessions, and a transfer that is cancelled does not disturb the others.
func TestUploadsShareSessions(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		done := make(chan error)
		for i := range 40 {
			go func() {
				var err error
				for n := range 5 {
					name := fmt.Sprintf("%s/%d-%d", dir, i, n)
					if i%4 == 0 {
						ctx, cancel := context.WithTimeout(soon(t), time.Duration(n)*5*time.Millisecond)
						host.Upload(ctx, name, zeros{}, nil)
						cancel()
						continue
					}
					var got bytes.Buffer
					err = errors.Join(err, host.Upload(soon(t), name, strings.NewReader(name), nil), host.Download(soon(t), name, &got, nil))
					if got.String() != name {
						err = errors.Join(err, fmt.Errorf("%s has %q", name, got.String()))
					}
				}
				done <- err
			}()
		}
		for range 40 {
			assert.NoError(t, <-done)
		}
		assert.Equal(t, "150\n", output(t, host, `ls -A "$1" | wc -l`, dir))
		output(t, host, `rm -r "$1"`, dir)
	})
}

// Small files one after the other, and at once, do not open a session each.
func TestManyUploadsOpenFewSessions(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewServer()
	t.Cleanup(s.Close)
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	var sessions atomic.Int64
	s.Inject(lxdtest.Fault{Route: lxdtest.RouteSFTP, Moment: lxdtest.OnRequest, Do: func(*lxdtest.Point) lxdtest.Verdict {
		sessions.Add(1)
		return lxdtest.Proceed
	}})
	host := newLXD(t, connect(t, s), "c1", nil)
	var all sync.WaitGroup
	for i := range 10 {
		all.Go(func() {
			for n := range 50 {
				assert.NoError(t, host.Upload(soon(t), fmt.Sprintf("/d/%d-%d", i, n), strings.NewReader("x"), &transport.UploadOptions{MkdirAll: true}))
			}
		})
	}
	all.Wait()
	assert.Less(t, sessions.Load(), int64(50), "for 500 files; an idle one ends early on a machine that stands still")
	assert.NotZero(t, sessions.Load())
}

// An idle session does not outlive its time, for it keeps the instance from stopping, and one whose instance was stopped is not used again.
func TestSessionsAndTheInstance(t *testing.T) {
	t.Parallel()
	reallxd.Need(t)
	s := reallxd.Unix(t)
	name := reallxd.Create(t, s)
	t.Cleanup(func() { reallxd.Delete(t, s, name) })
	host := newLXD(t, s, name, nil)
	for range 3 {
		require.NoError(t, host.Upload(soon(t), "/f", strings.NewReader("x"), nil))
		reallxd.Start(t, s, name)
		require.NoError(t, host.Upload(soon(t), "/f", strings.NewReader("x"), nil))
		start := time.Now()
		reallxd.Stop(t, s, name)
		assert.Less(t, time.Since(start), 20*time.Second)
	}
}
