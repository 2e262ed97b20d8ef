package downstream

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	lxd "github.com/canonical/lxd/client"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

// host is a transport into an instance of a server that is not there.
func host(t *testing.T, commands lxdtest.Handler) (*lxdtest.Server, *transport.LXD) {
	t.Helper()
	s := lxdtest.NewServer()
	t.Cleanup(s.Close)
	s.AddInstance(lxdtest.Instance{Name: "c1", Handler: commands})
	server, err := lxd.ConnectLXDUnix(s.Socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	h, err := transport.NewLXD(server, "c1", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return s, h
}

func TestBuild(t *testing.T) {
	_, h := host(t, lxdtest.LocalCommands(""))
	o, log, artifact, err := Build(t.Context(), h, strings.NewReader("hello\n"), "echo building; tr a-z A-Z <in >out")
	if o != Passed || log != "building\n" || artifact != "HELLO\n" || err != nil {
		t.Errorf("%s, log %q, artifact %q: %v", o, log, artifact, err)
	}
	if o, _, _, err := Build(t.Context(), h, strings.NewReader(""), "exit 3"); o != Failed {
		t.Errorf("%s: %v", o, err)
	}
}

func TestLostConnection(t *testing.T) {
	s, h := host(t, func(p *lxdtest.Process) int {
		fmt.Fprintln(p.Stdout, "100 tests passed")
		return 0
	})
	s.Inject(lxdtest.Fault{Route: lxdtest.RouteWebsocket, Socket: "1", Moment: lxdtest.OnSend, Bytes: 3, Do: lxdtest.Drop})
	o, log, _, err := Build(t.Context(), h, strings.NewReader(""), "go test ./...")
	if o != Broken || log != "100" || !errors.Is(err, transport.ErrOutputLost) {
		t.Errorf("%s, log %q: %v", o, log, err)
	}
}
