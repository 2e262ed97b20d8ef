package transport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

// withTar returns a transport into an instance of its own, whose tar is the image's, or this machine's.
func withTar(t *testing.T, kind string) *transport.LXD {
	t.Helper()
	s := reallxd.Unix(t)
	name := reallxd.Create(t, s)
	reallxd.Start(t, s, name)
	t.Cleanup(func() { reallxd.Stop(t, s, name); reallxd.Delete(t, s, name) })
	host := newLXD(t, s, name, nil)
	if kind == "gnu" {
		putProgram(t, host, "tar", "/usr/local/bin/tar")
		putProgram(t, host, "dash", "/bin/sh") // busybox's prefers its own tar to any other
	}
	out, err := transport.Output(soon(t), host, sh("tar --version 2>&1"))
	require.NoError(t, err)
	require.Contains(t, strings.ToLower(string(out)), kind)
	return host
}

// putProgram copies one of this machine's programs into an instance, with its libraries.
func putProgram(t *testing.T, host transport.Transport, program, dst string) {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("this machine has no %s", program)
	}
	out, err := exec.Command("ldd", path).Output()
	if err != nil {
		t.Skipf("the libraries of %s cannot be listed: %v", path, err)
	}
	put := func(from, to string) {
		f, err := os.Open(from)
		require.NoError(t, err)
		defer f.Close()
		require.NoError(t, host.Upload(soon(t), to, f, &transport.UploadOptions{Mode: 0o755, MkdirAll: true}))
	}
	put(path, dst)
	for _, field := range strings.Fields(string(out)) {
		if filepath.IsAbs(field) {
			put(field, field)
		}
	}
}

func onTars(t *testing.T, test func(t *testing.T, host *transport.LXD)) {
	t.Parallel()
	reallxd.Need(t)
	for _, kind := range []string{"busybox", "gnu"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			test(t, withTar(t, kind))
		})
	}
}

func goroot(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "env", "GOROOT").Output()
	require.NoError(t, err)
	return strings.TrimSpace(string(out))
}

// TestTreeOfTheToolchain: more than ten thousand files up and down again, into a directory that is not there and over what is, for root and for another
// user, and once more when nothing has changed. Under the race detector it is a part of them.
func TestTreeOfTheToolchain(t *testing.T) {
	onTars(t, func(t *testing.T, host *transport.LXD) {
		src := filepath.Join(goroot(t), "src")
		if underRace && !slowTests {
			src = filepath.Join(src, "net")
		}
		dir := t.TempDir()
		root, err := os.OpenRoot(dir)
		require.NoError(t, err)
		defer root.Close()
		var up transport.TreeStats
		opts := *keepLinks
		for _, owner := range []*transport.User{nil, {UID: 1000, GID: 1001}} { // over the first one's files, in both directions
			opts.Owner = owner
			up, err = transport.UploadTree(soon(t), host, "/src", os.DirFS(src), &opts)
			require.NoError(t, err, owner)
			down, err := transport.DownloadTree(soon(t), host, "/src", root, &opts)
			require.NoError(t, err, owner)
			assert.Equal(t, up, down, owner)
			assert.Zero(t, down.Skipped, owner)
			sameTree(t, src, dir)
			if owner == nil {
				owner = new(transport.User)
			}
			out, err := transport.Output(soon(t), host, sh(`find /src/* ! -user "$1" -o ! -group "$2" | head -n 5`, fmt.Sprint(owner.UID), fmt.Sprint(owner.GID)))
			require.NoError(t, err)
			assert.Empty(t, string(out), "what does not belong to %v", owner)
		}
		opts.SkipUnchanged = true
		again, err := transport.UploadTree(soon(t), host, "/src", os.DirFS(src), &opts)
		require.NoError(t, err)
		assert.Equal(t, transport.TreeStats{Dirs: up.Dirs, Symlinks: up.Symlinks, Skipped: up.Files}, again)
	})
}

// TestTreeOfOddThings: everything that a name, mode or size can be, into a directory that is not there, and once more into one that is.
func TestTreeOfOddThings(t *testing.T) {
	onTars(t, func(t *testing.T, host *transport.LXD) {
		src := oddTree(t)
		for _, round := range []string{"fresh", "once more"} {
			up, err := transport.UploadTree(soon(t), host, "/srv/a b/tree", os.DirFS(src), keepLinks)
			require.NoError(t, err, round)
			dir, down, err := into(t, host, "/srv/a b/tree", keepLinks)
			require.NoError(t, err, round)
			assert.Equal(t, up, down, round)
			sameTree(t, src, dir)
		}
	})
}

func TestTreeOfAnotherUser(t *testing.T) {
	onTars(t, func(t *testing.T, host *transport.LXD) {
		src := fstest.MapFS{
			"d/f": {Data: []byte("x"), Mode: 0o640, ModTime: time.Unix(1e9, 0)}, "d": {Mode: 0o750 | os.ModeDir, ModTime: time.Unix(1e9, 0)},
			"empty": {Mode: 0o700 | os.ModeDir, ModTime: time.Unix(1e9, 0)},
		}
		_, err := transport.UploadTree(soon(t), host, "/home/test/a/b", src, &transport.TreeOptions{Owner: &transport.User{UID: 1000, GID: 1001}})
		require.NoError(t, err)
		out, err := transport.Output(soon(t), host, sh(`stat -c '%n %u:%g %a %Y' /home/test/a /home/test/a/b /home/test/a/b/d /home/test/a/b/d/f /home/test/a/b/empty | sed 's#^/home/test##; /^.a [^ ]* [^ ]* /s/[0-9]*$//; /^.a.b [^ ]* [^ ]* /s/[0-9]*$//'`))
		require.NoError(t, err)
		assert.Equal(t, "/a 1000:1001 755 \n/a/b 1000:1001 755 \n/a/b/d 1000:1001 750 1000000000\n/a/b/d/f 1000:1001 640 1000000000\n/a/b/empty 1000:1001 700 1000000000\n", string(out))
	})
}

// TestTreeIsInterrupted: in the middle of a tree, in both directions, on every way. Nothing is left, and it can be run again.
func TestTreeIsInterrupted(t *testing.T) {
	onTars(t, func(t *testing.T, host *transport.LXD) {
		src := filepath.Join(goroot(t), "src", "crypto")
		for _, down := range []bool{false, true} {
			ctx, cancel := context.WithCancelCause(soon(t))
			why := errors.New("enough")
			var since time.Time
			opts := &transport.TreeOptions{Progress: func(s transport.TreeStats) {
				if s.Files > 500 && since.IsZero() {
					since = time.Now()
					cancel(why)
				}
			}}
			dir := t.TempDir()
			root, err := os.OpenRoot(dir)
			require.NoError(t, err)
			defer root.Close()
			var stats transport.TreeStats
			if down {
				stats, err = transport.DownloadTree(ctx, host, "/tree", root, opts)
			} else {
				stats, err = transport.UploadTree(ctx, host, "/tree", os.DirFS(src), opts)
			}
			assert.ErrorIs(t, err, why)
			assert.NotZero(t, stats.Files)
			assert.Less(t, time.Since(since), 5*time.Second+patience/2, "WaitDelay, and what a busy machine takes")
			names, err := os.ReadDir(dir)
			require.NoError(t, err)
			assert.Empty(t, names, "of a download nothing is left")
			out, err := transport.Output(soon(t), host, sh(`for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline; echo; done | grep -E '^(tar|dd) ' || true; find / -xdev -name '.transport-*'`))
			require.NoError(t, err)
			assert.Empty(t, string(out), "processes and temporary files in the host")
			if !down {
				_, err = transport.UploadTree(soon(t), host, "/tree", os.DirFS(src), nil)
				require.NoError(t, err, "once more")
			}
		}
		dir, _, err := into(t, host, "/tree", nil)
		require.NoError(t, err)
		sameTree(t, src, dir)
	})
}

// TestTreeOntoAFullDisk: the error says so, and which file it was.
func TestTreeOntoAFullDisk(t *testing.T) {
	onTars(t, func(t *testing.T, host *transport.LXD) {
		require.NoError(t, host.Exec(soon(t), sh("mkdir /small && mount -t tmpfs -o size=1m none /small")))
		src := fstest.MapFS{"a": {Data: []byte("a")}, "big": {Data: bytes.Repeat([]byte("b"), 3<<20)}}
		stats, err := transport.UploadTree(soon(t), host, "/small/tree", src, nil)
		assert.ErrorContains(t, err, "big")
		assert.ErrorIs(t, err, syscall.ENOSPC)
		assert.NotZero(t, stats.Files, fmt.Sprint(stats))
	})
}
