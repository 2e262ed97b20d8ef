//go:build unix

package ssh_test

import (
	"os"
	"os/exec"
	"testing"

	"go.uber.org/goleak"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/transporttest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if madeRunDir {
		os.Remove(runDir)
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			println(err.Error())
			code = 1
		}
	}
	os.Exit(code)
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

func TestConformance(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	transporttest.Run(t, func(t *testing.T) transport.Transport { return dial(t, s, s.options()) }, capabilities()...)
}

func BenchmarkSSH(b *testing.B) {
	s := newServer(b)
	transporttest.Benchmark(b, func(b *testing.B) transport.Transport { return dial(b, s, s.options()) })
}
