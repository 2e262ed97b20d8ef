package local_test

import (
	"flag"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/local"
	"github.com/lxdtransport/transport/transporttest"
)

// Most tests wait most of the time: many run beside each other, unless -parallel says otherwise.
func TestMain(m *testing.M) {
	_ = flag.Set("test.parallel", "8")
	goleak.VerifyTestMain(m)
}

// directory is one that other users may enter, too, which t.TempDir is not.
func directory(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "local")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	dir, err = filepath.EvalSymlinks(dir) // macOS
	require.NoError(t, err)
	return dir
}

func newLocal(t testing.TB, opts *local.Options) (*local.Transport, string) {
	t.Helper()
	dir := directory(t)
	return newIn(t, dir, opts), dir
}

func newIn(t testing.TB, dir string, opts *local.Options) *local.Transport {
	t.Helper()
	host, err := local.New(dir, opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, host.Close()) })
	return host
}

func capabilities() []transporttest.Capability {
	caps := []transporttest.Capability{transporttest.Start, transporttest.Children, transporttest.Signals, transporttest.EarlyStatus, transporttest.SameHost, transporttest.WholeStderr}
	if runtime.GOOS == "linux" {
		caps = append(caps, transporttest.TTY, transporttest.WholeTTY, transporttest.Strays)
	}
	if os.Geteuid() == 0 {
		caps = append(caps, transporttest.Users)
	}
	return caps
}

func TestConformance(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the suite needs a POSIX host")
	}
	t.Parallel()
	dir := directory(t)
	transporttest.Run(t, func(t *testing.T) transport.Transport { return newIn(t, dir, nil) }, capabilities()...)
}

func BenchmarkLocal(b *testing.B) {
	transporttest.Benchmark(b, func(b *testing.B) transport.Transport {
		host, _ := newLocal(b, nil)
		return host
	})
}
