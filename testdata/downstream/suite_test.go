package downstream

import (
	"os"
	"runtime"
	"testing"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
	"github.com/lxdtransport/transport/transporttest"
)

// TestSuite is how the author of a transport uses the conformance suite.
func TestSuite(t *testing.T) {
	caps := []transporttest.Capability{transporttest.Start, transporttest.Signals, transporttest.WholeStderr, transporttest.Children, transporttest.Strays}
	if runtime.GOOS == "linux" {
		caps = append(caps, transporttest.TTY)
	}
	if os.Geteuid() == 0 {
		caps = append(caps, transporttest.Users)
	}
	transporttest.Run(t, func(t *testing.T) transport.Transport {
		_, h := host(t, lxdtest.LocalCommands(""))
		return h
	}, caps...)
}
