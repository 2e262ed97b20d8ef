package lxdtest_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/pkg/sftp"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/lxdtest"
)

// TestFaults has one row for each kind of fault: what is injected, what a client does, and what
// it sees of it.
func TestFaults(t *testing.T) {
	t.Parallel()
	stdout := lxdtest.Fault{Route: lxdtest.RouteWebsocket, Socket: "1"}
	at := func(f lxdtest.Fault, m lxdtest.Moment, do lxdtest.Action) lxdtest.Fault {
		f.Moment, f.Do = m, do
		return f
	}
	after := func(n int64, do lxdtest.Action) lxdtest.Fault {
		f := at(stdout, lxdtest.OnSend, do)
		f.Bytes = n
		return f
	}
	open := make(chan struct{})
	close(open)
	echo := func(w *wire) {
		s := w.shell("echo 0123456789").all()
		s.frames()
		s.result("?timeout=5")
	}
	file := func(w *wire) { w.do("GET", "/1.0/instances/INSTANCE/files?path=/tmp/f", "", "") }
	for _, row := range []struct {
		name   string
		faults []lxdtest.Fault
		do     func(w *wire)
		want   []string
		not    string
	}{
		{"a request is refused", []lxdtest.Fault{{Route: lxdtest.RouteExec, Do: lxdtest.Refuse(503, "LXD is shutting down")}},
			func(w *wire) { w.do("POST", "/1.0/instances/INSTANCE/exec", "", `{"command":["true"]}`) },
			[]string{"503", "LXD is shutting down"}, ""},
		{"a request is dropped", []lxdtest.Fault{{Route: lxdtest.RouteExec, Do: lxdtest.Drop}},
			func(w *wire) { w.do("POST", "/1.0/instances/INSTANCE/exec", "", `{"command":["true"]}`) },
			[]string{"no answer"}, ""},
		{"an answer is dropped", []lxdtest.Fault{{Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Drop}},
			func(w *wire) { w.do("POST", "/1.0/instances/INSTANCE/exec", "", `{"command":["true"]}`) },
			[]string{"no answer"}, ""},
		{"an answer is reset", []lxdtest.Fault{{Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Reset}},
			func(w *wire) { w.do("POST", "/1.0/instances/INSTANCE/exec", "", `{"command":["true"]}`) },
			[]string{"no answer"}, ""},
		{"an answer breaks off", []lxdtest.Fault{{Route: lxdtest.RouteServer, Moment: lxdtest.OnSend, Bytes: 20, Do: lxdtest.Drop}},
			func(w *wire) { w.do("GET", "/1.0", "", "") },
			[]string{`{"type":"sync","stat`, "broken off"}, ""},
		{"an answer is nonsense", []lxdtest.Fault{{Route: lxdtest.RouteOperation, Do: lxdtest.Respond(200, "text/html", "<html>proxy</html>")}},
			func(w *wire) { w.do("GET", "/1.0/operations/x", "", "") },
			[]string{"200", "text/html", "<html>proxy</html>"}, ""},
		{"bytes that are no HTTP", []lxdtest.Fault{{Route: lxdtest.RouteServer, Do: lxdtest.All(lxdtest.Raw([]byte("\x00\x01nonsense")), lxdtest.Drop)}},
			func(w *wire) { w.do("GET", "/1.0", "", "") },
			[]string{"no answer"}, ""},
		{"only the second request", []lxdtest.Fault{{Route: lxdtest.RouteServer, Nth: 2, Do: lxdtest.Refuse(500, "second")}},
			func(w *wire) {
				for range 3 {
					w.do("GET", "/", "", "")
				}
			},
			[]string{"200", "500", "second", "200"}, ""},
		{"only one instance", []lxdtest.Fault{{Instance: "other", Do: lxdtest.Refuse(500, "other")}},
			func(w *wire) { w.do("GET", "/1.0/instances/INSTANCE/state", "", "") },
			[]string{"200"}, ""},
		{"a late answer", []lxdtest.Fault{{Route: lxdtest.RouteWait, Moment: lxdtest.OnResponse, Do: lxdtest.All(lxdtest.Delay(time.Millisecond), lxdtest.Until(open))}}, echo,
			[]string{`"return":0`}, ""},
		{"a dial is refused", []lxdtest.Fault{{Route: lxdtest.RouteWebsocket, Socket: "2", Do: lxdtest.Refuse(500, "no")}},
			func(w *wire) {
				s := w.shell("echo hi")
				s.open("control", "0", "1")
				s.dial("2")
				s.finish()
			}, []string{"dial 2: 500", "Timed out waiting for websockets to connect"}, ""},
		{"no output and no mark", []lxdtest.Fault{at(stdout, lxdtest.OnSend, lxdtest.Drop)}, echo,
			[]string{`1: END ""`}, ""},
		{"part of the output and no mark", []lxdtest.Fault{after(4, lxdtest.Drop)}, echo,
			[]string{`1: BINARY, END "0123"`}, ""},
		{"part of the output and a mark", []lxdtest.Fault{after(4, lxdtest.All(lxdtest.Mark, lxdtest.Drop))}, echo,
			[]string{`1: BINARY, TEXT "", END "0123"`}, ""},
		{"all of the output and no mark", []lxdtest.Fault{at(stdout, lxdtest.OnMark, lxdtest.Drop)}, echo,
			[]string{`1: BINARY, END "0123456789\n"`, `"return":0`}, ""},
		{"a chunk is missing", []lxdtest.Fault{after(4, lxdtest.Swallow)}, echo,
			[]string{`1: BINARY, TEXT "", END "0123"`, `"return":0`}, ""},
		{"output is changed", []lxdtest.Fault{at(stdout, lxdtest.OnSend, lxdtest.Replace(bytes.ToUpper))},
			func(w *wire) { w.shell("echo abc").all().finish() },
			[]string{`"ABC\n"`}, ""},
		{"garbage between frames", []lxdtest.Fault{after(4, lxdtest.GarbageFrame)}, echo,
			[]string{`1: BINARY, `, `"0123"`}, ""},
		{"an oversized frame", []lxdtest.Fault{after(4, lxdtest.All(lxdtest.OversizedFrame(1<<62, 10), lxdtest.Drop))}, echo,
			[]string{`1: BINARY, END "0123"`}, ""},
		{"a message behind the mark", []lxdtest.Fault{at(stdout, lxdtest.OnMarked, lxdtest.Raw([]byte("\x82\x04late")))}, echo,
			[]string{`1: BINARY, TEXT "", BINARY, END "0123456789\nlate"`}, ""},
		{"a slow writer", []lxdtest.Fault{at(stdout, lxdtest.OnSend, lxdtest.Slow(1000))}, echo,
			[]string{`"0123456789\n"`}, ""},
		{"a slow reader", []lxdtest.Fault{{Route: lxdtest.RouteWebsocket, Socket: "0", Moment: lxdtest.OnReceive, Do: lxdtest.Slow(1000)}},
			func(w *wire) {
				s := w.shell("cat").all()
				s.binary("0", "hello")
				s.text("0", "")
				s.finish()
			}, []string{`"hello"`}, ""},
		{"the mark never comes", []lxdtest.Fault{at(stdout, lxdtest.OnMark, lxdtest.Stall)},
			func(w *wire) {
				s := w.shell("echo hi").all()
				s.expect("1", "hi\n")
				s.ended("control")
				s.mark("2")
				s.result("?timeout=0")
			}, []string{`"status":"Running"`}, ""},
		{"the operation ends late", []lxdtest.Fault{{Route: lxdtest.RouteExec, Moment: lxdtest.OnFinal, Do: lxdtest.Stall}},
			func(w *wire) {
				s := w.shell("echo hi").all()
				s.mark("1")
				s.result("?timeout=0")
			}, []string{`"status":"Running"`}, ""},
		{"the control socket is cut", []lxdtest.Fault{{Route: lxdtest.RouteWebsocket, Socket: "control", Moment: lxdtest.OnReceive, Do: lxdtest.Drop}},
			func(w *wire) {
				s := w.exec(ws(`["sleep","20"]`)).all()
				s.text("control", `{"command":"signal","signal":2}`)
				s.finish()
			}, []string{`"return":137`}, ""},
		{"lost pings", []lxdtest.Fault{{Route: lxdtest.RouteWebsocket, Moment: lxdtest.OnPing, Do: lxdtest.Swallow}},
			func(w *wire) {
				s := w.shell("echo hi").all()
				s.finish()
				for n, k := range s.sockets {
					w.note("%s %d pings", n, len(k.pings))
				}
			}, nil, " 1 pings"},
		{"the server dies", []lxdtest.Fault{{Route: lxdtest.RouteExec, Moment: lxdtest.OnStart, Nth: 1, Do: lxdtest.Die}},
			func(w *wire) {
				s := w.exec(ws(`["sleep","20"]`))
				s.open("control", "0", "1")
				// The server may die before it has answered this one.
				if k := s.dial("2"); k != nil {
					s.sockets["2"] = k
				}
				for n := range s.sockets {
					s.ended(n)
				}
				w.do("GET", "/1.0/operations/"+s.id, "", "")
				w.shell("echo again").all().finish()
			}, []string{"404", "Operation not found", "again"}, ""},
		{"the server dies in the middle of the output", []lxdtest.Fault{after(5, lxdtest.Die)},
			func(w *wire) {
				s := w.shell("echo 0123456789; sleep 20").all()
				s.frames()
				w.do("GET", "/1.0/operations/"+s.id, "", "")
			}, []string{`1: BINARY, END "01234"`, "404"}, ""},
		{"a file is shorter than its length", []lxdtest.Fault{{Route: lxdtest.RouteFiles, Moment: lxdtest.OnStat, Do: lxdtest.LieSize(100)}}, file,
			[]string{"Content-Length: 100", "content", "broken off"}, ""},
		{"a file is longer than its length", []lxdtest.Fault{{Route: lxdtest.RouteFiles, Moment: lxdtest.OnStat, Do: lxdtest.LieSize(3)}}, file,
			[]string{"Content-Length: 3"}, "content"},
		{"a file breaks off", []lxdtest.Fault{{Route: lxdtest.RouteFiles, Moment: lxdtest.OnSend, Bytes: 3, Do: lxdtest.Drop}}, file,
			[]string{"con", "broken off"}, "content"},
		{"an upload breaks off", []lxdtest.Fault{{Route: lxdtest.RouteFiles, Method: "POST", Moment: lxdtest.OnReceive, Do: lxdtest.Drop}},
			func(w *wire) {
				w.do("POST", "/1.0/instances/INSTANCE/files?path=/tmp/new", octets, "content")
				w.do("GET", "/1.0/instances/INSTANCE/files?path=/tmp/new", "", "")
			}, []string{"no answer", "Content-Length: 0"}, ""},
		{"hostile names in a listing", []lxdtest.Fault{{Route: lxdtest.RouteFiles, Moment: lxdtest.OnList, Do: lxdtest.Names("../../etc/passwd", "/abs", "")}},
			func(w *wire) { w.do("GET", "/1.0/instances/INSTANCE/files?path=/tmp", "", "") },
			[]string{`["../../etc/passwd","/abs",""]`}, ""},
		{"events are lost", []lxdtest.Fault{{Route: lxdtest.RouteEvents, Do: lxdtest.Refuse(403, "Forbidden")}},
			func(w *wire) { w.do("GET", "/1.0/events", "", "") }, []string{"403"}, ""},
	} {
		for _, https := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/https %v", row.name, https), func(t *testing.T) {
				t.Parallel()
				s := lxdtest.NewUnstartedServer()
				s.Handler = lxdtest.LocalCommands("")
				quick(&s.Version)
				scenario{want: row.want}.hurry(&s.Version)
				s.AddInstance(lxdtest.Instance{Name: "c1"})
				if https {
					s.StartTLS()
				} else {
					s.Start()
				}
				t.Cleanup(s.Close)
				require.NoError(t, s.WriteFile("c1", "/tmp/f", []byte("content"), 0o644))
				s.Inject(row.faults...)
				w := fakeWire(t, s, "c1")
				row.do(w)
				rest := w.transcript()
				for _, want := range row.want {
					_, after, ok := strings.Cut(rest, want)
					require.True(t, ok, "%s is missing in:\n%s", want, w.transcript())
					rest = after
				}
				if row.not != "" {
					require.NotContains(t, w.transcript(), row.not)
				}
				if row.faults[0].Instance == "" {
					until(t, func() bool { return s.Struck() > 0 })
				}
			})
		}
	}
}

// TestHostileSFTP lets the SFTP client of this module's own dependency meet hostile packets.
func TestHostileSFTP(t *testing.T) {
	t.Parallel()
	packet := func(m lxdtest.Moment, do lxdtest.Action) lxdtest.Fault {
		// The first packet is the version.
		return lxdtest.Fault{Route: lxdtest.RouteSFTP, Moment: m, Nth: 2, Do: do}
	}
	for name, fault := range map[string]lxdtest.Fault{
		"wrong id":        packet(lxdtest.OnSend, lxdtest.Replace(func(b []byte) []byte { b[8] ^= 0x55; return b })),
		"negative length": packet(lxdtest.OnSend, lxdtest.Replace(func(b []byte) []byte { return append([]byte{0xff, 0xff, 0xff, 0xff}, b[4:]...) })),
		"garbage":         packet(lxdtest.OnSend, lxdtest.Replace(func(b []byte) []byte { return []byte("\x00\x00\x00\x05nonsense") })),
		"cut":             packet(lxdtest.OnSend, lxdtest.Drop),
		"half a packet":   {Route: lxdtest.RouteSFTP, Moment: lxdtest.OnSend, Bytes: 100, Do: lxdtest.Drop},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := fakeFor(t, "c1")
			s.Inject(fault)
			c := sftpClient(t, s)
			_, err := c.Stat("/etc")
			require.Error(t, err)
		})
	}
	t.Run("sizes and names", func(t *testing.T) {
		t.Parallel()
		s := fakeFor(t, "c1")
		require.NoError(t, s.WriteFile("c1", "/tmp/f", []byte("content"), 0o644))
		s.Inject(
			lxdtest.Fault{Route: lxdtest.RouteSFTP, Moment: lxdtest.OnStat, Nth: 1, Do: lxdtest.LieSize(1 << 50)},
			lxdtest.Fault{Route: lxdtest.RouteSFTP, Moment: lxdtest.OnList, Do: lxdtest.Names("f", "f", "../up")},
		)
		c := sftpClient(t, s)
		info, err := c.Stat("/tmp/f")
		require.NoError(t, err)
		require.EqualValues(t, 1<<50, info.Size())
		list, err := c.ReadDir("/tmp")
		require.NoError(t, err)
		require.Len(t, list, 3)
	})
}

// sftpClient makes a client on a connection that is upgraded by hand.
func sftpClient(t *testing.T, s *lxdtest.Server) *sftp.Client {
	x := fakeWire(t, s, "c1").sftp()
	c, err := sftp.NewClientPipe(x.c, x.c)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// A socket that is closed with something unread in it is reset, and takes with it what the client
// has not read: this is what makes pongs on stdout dangerous over TCP.
func TestCloseWithUnreadInput(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewUnstartedServer()
	s.AddInstance(lxdtest.Instance{Name: "c1", Handler: func(p *lxdtest.Process) int {
		_, _ = p.Stdout.Write([]byte("output"))
		_, _ = io.Copy(io.Discard, p.Stdin)
		return 0
	}})
	s.StartTLS()
	t.Cleanup(s.Close)
	w := fakeWire(t, s, "c1")
	e := w.exec(ws(`["x"]`)).all()
	e.expect("1", "output")
	// One message is taken note of on stdout; what follows stays unread, and likewise on stderr.
	for range 3 {
		e.binary("2", strings.Repeat("x", 100))
	}
	e.text("0", "")
	e.frames()
	require.Contains(t, w.transcript(), `1: BINARY, TEXT "", END "output"`)
	until(t, func() bool { return s.Execs()[0].Exited })
	_, err := e.sockets["2"].conn.NetConn().Write([]byte("x"))
	for err == nil {
		_, err = e.sockets["2"].conn.NetConn().Write([]byte("x"))
	}
	var op *net.OpError
	require.ErrorAs(t, err, &op)
}
