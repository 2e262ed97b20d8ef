//go:build unix

package local_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/local"
	"github.com/lxdtransport/transport/transporttest"
)

// TestConformanceWithOtherCommands runs the suite on a host that has no command at all that is not busybox's, and its cases with trees on hosts with
// another tar than this machine's, and without one.
func TestConformanceWithOtherCommands(t *testing.T) {
	if testing.Short() {
		t.Skip("runs the suite three times more, or parts of it")
	}
	t.Parallel()
	for _, kind := range []struct {
		name  string
		cases string
		path  func(t *testing.T) string
	}{
		{"busybox", "/", func(t *testing.T) string {
			busybox := find(t, "busybox")
			applets, err := exec.Command(busybox, "--list").Output()
			require.NoError(t, err)
			dir := directory(t)
			for _, name := range strings.Fields(string(applets)) {
				require.NoError(t, os.Symlink(busybox, filepath.Join(dir, name)))
			}
			return dir
		}},
		{"bsdtar", "/tree/", func(t *testing.T) string {
			bsdtar := find(t, "bsdtar")
			dir := commandsWithoutTar(t)
			require.NoError(t, os.Symlink(bsdtar, filepath.Join(dir, "tar")))
			return dir
		}},
		{"no tar", "/tree/", func(t *testing.T) string { return commandsWithoutTar(t) }},
	} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			path := kind.path(t)
			env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PATH=") })
			env = append(env, "PATH="+path)
			dir := directory(t)
			transporttest.Run(t, func(t *testing.T) transport.Transport {
				if !strings.Contains(t.Name(), kind.cases) {
					t.Skip("needs no tar: see TestConformance")
				}
				return newIn(t, dir, &local.Options{Env: env})
			}, capabilities()...)
		})
	}
}

func find(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s on this machine: %v", name, err)
	}
	path, err = filepath.Abs(path)
	require.NoError(t, err)
	return path
}

// commandsWithoutTar is a directory with all commands of this machine but tar.
func commandsWithoutTar(t *testing.T) string {
	t.Helper()
	dir := directory(t)
	for _, from := range filepath.SplitList(os.Getenv("PATH")) {
		entries, _ := os.ReadDir(from) // not all of PATH has to exist
		for _, e := range entries {
			if name := e.Name(); name != "tar" {
				_ = os.Symlink(filepath.Join(from, name), filepath.Join(dir, name)) // the first one counts
			}
		}
	}
	return dir
}
