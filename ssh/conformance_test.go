//go:build unix

package ssh_test

import (
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/sshd"
	"github.com/lxdtransport/transport/ssh"
	"github.com/lxdtransport/transport/transporttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// options are those that lead to a server.
func options(s *sshd.Server) *ssh.Options {
	return &ssh.Options{KeyFiles: []string{s.File("client")}, KnownHosts: []string{s.File("known")}}
}

func dial(t testing.TB, s *sshd.Server, opts *ssh.Options) *ssh.Transport {
	t.Helper()
	host, err := ssh.Dial(t.Context(), s.Address, opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, host.Close()) })
	return host
}

func capabilities() []transporttest.Capability {
	caps := []transporttest.Capability{
		transporttest.Start, transporttest.Signals, transporttest.TTY, transporttest.WholeTTY, transporttest.WholeStderr,
		transporttest.Children, transporttest.Strays, transporttest.EarlyStatus, transporttest.SameHost,
	}
	if _, err := exec.LookPath("setpriv"); err == nil && os.Geteuid() == 0 {
		caps = append(caps, transporttest.Users)
	}
	return caps
}

func TestConformanceOverSSH(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	transporttest.Run(t, func(t *testing.T) transport.Transport { return dial(t, s, options(s)) }, capabilities()...)
}

func BenchmarkSSH(b *testing.B) {
	s := sshd.Start(b)
	transporttest.Benchmark(b, func(b *testing.B) transport.Transport { return dial(b, s, options(s)) })
}
