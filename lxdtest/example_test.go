package lxdtest_test

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"

	"github.com/lxdtransport/transport/lxdtest"
)

// An orchestrator's own test: no LXD, and commands that are functions.
func Example() {
	s := lxdtest.NewUnstartedServer()
	s.Version = lxdtest.LXD6
	s.Start()
	defer s.Close()
	s.AddInstance(lxdtest.Instance{Name: "c1", Handler: func(p *lxdtest.Process) int {
		if p.Args[0] != "wc" {
			return 127
		}
		b, _ := io.ReadAll(p.Stdin)
		fmt.Fprintln(p.Stdout, len(b))
		return 0
	}})

	server, _ := lxd.ConnectLXDUnix(s.Socket, nil)
	defer server.Disconnect()
	var out bytes.Buffer
	done := make(chan bool)
	op, _ := server.ExecInstance("c1", api.InstanceExecPost{Command: []string{"wc"}, WaitForWS: true}, &lxd.InstanceExecArgs{
		Stdin: io.NopCloser(strings.NewReader("hello")), Stdout: nopCloser{&out}, DataDone: done,
	})
	err := op.Wait()
	<-done
	fmt.Print(out.String(), err, " ", s.Execs()[0].Args)
	// Output:
	// 5
	// <nil> [wc]
}

// A connection is lost after three bytes of output. The official client takes that for the end.
func ExampleServer_Inject() {
	s := lxdtest.NewUnstartedServer()
	s.Version = lxdtest.LXD6
	s.Start()
	defer s.Close()
	s.AddInstance(lxdtest.Instance{Name: "c1", Handler: func(p *lxdtest.Process) int {
		fmt.Fprint(p.Stdout, "lost and found")
		return 0
	}})
	s.Inject(lxdtest.Fault{
		Route: lxdtest.RouteWebsocket, Socket: "1", Moment: lxdtest.OnSend, Bytes: 4, Do: lxdtest.Drop,
	})

	server, _ := lxd.ConnectLXDUnix(s.Socket, nil)
	defer server.Disconnect()
	var out bytes.Buffer
	done := make(chan bool)
	op, _ := server.ExecInstance("c1", api.InstanceExecPost{Command: []string{"x"}, WaitForWS: true}, &lxd.InstanceExecArgs{
		Stdout: nopCloser{&out}, DataDone: done,
	})
	err := op.Wait()
	<-done
	fmt.Printf("%q %v", out.String(), err)
	// Output: "lost" <nil>
}
