package transport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

// commands is what the fake's instances can run.
func commands(p *lxdtest.Process) int {
	switch p.Args[0] {
	case "exit":
		n, _ := strconv.Atoi(p.Args[1])
		return n
	case "echo":
		fmt.Fprintln(p.Stdout, strings.Join(p.Args[1:], " "))
		fmt.Fprintln(p.Stderr, "err")
		return 0
	case "cat":
		io.Copy(p.Stdout, p.Stdin)
		return 0
	case "yes":
		for {
			if _, err := io.WriteString(p.Stdout, strings.Repeat("y\n", 4096)); err != nil {
				return 1
			}
		}
	case "wait":
		fmt.Fprintln(p.Stdout, "up")
		<-p.Context().Done()
	}
	return 127
}

// onFake runs a test over the fake in every version, over the socket and over HTTPS, with connect windows that a test can wait for.
func onFake(t *testing.T, test func(t *testing.T, s *lxdtest.Server, host *transport.LXD)) {
	t.Helper()
	onFakeThatWaits(t, patience, test)
}

// shortWindow is for tests in which sockets do not come, which the server waits for.
const shortWindow = 2 * time.Second

// onFakeThatWaits is onFake with another connect window.
func onFakeThatWaits(t *testing.T, window time.Duration, test func(t *testing.T, s *lxdtest.Server, host *transport.LXD)) {
	t.Helper()
	t.Parallel()
	for _, v := range lxdtest.Versions() {
		for _, secure := range []bool{false, true} {
			if secure && v.Name != lxdtest.LXD50.Name && v.Name != lxdtest.LXD6.Name {
				continue // the versions do not differ in this
			}
			t.Run(fmt.Sprintf("%s tls=%v", v.Name, secure), func(t *testing.T) {
				t.Parallel()
				s := lxdtest.NewUnstartedServer()
				s.Version = v
				s.Version.ConnectWindow = window
				s.Handler = commands
				s.AddInstance(lxdtest.Instance{Name: "c1"})
				if secure {
					s.StartTLS()
				} else {
					s.Start()
				}
				t.Cleanup(s.Close)
				test(t, s, newLXD(t, connect(t, s), "c1", nil))
			})
		}
	}
}

func connect(t testing.TB, s *lxdtest.Server) lxd.InstanceServer {
	t.Helper()
	var server lxd.InstanceServer
	var err error
	if s.Socket != "" {
		server, err = lxd.ConnectLXDUnix(s.Socket, &lxd.ConnectionArgs{SkipGetServer: true})
	} else {
		server, err = lxd.ConnectLXD(s.URL, &lxd.ConnectionArgs{SkipGetServer: true, TLSServerCert: s.ServerCert, TLSClientCert: s.ClientCert, TLSClientKey: s.ClientKey})
	}
	require.NoError(t, err)
	return server
}

func TestVerdictInEveryVersion(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		for _, n := range []int{0, 1, 126, 127, 128, 137, 255} {
			err := host.Exec(soon(t), transport.Command{Args: []string{"exit", strconv.Itoa(n)}})
			if n == 0 {
				assert.NoError(t, err)
				continue
			}
			exit, ok := err.(*transport.ExitError)
			if assert.True(t, ok, "%d: %v", n, err) {
				assert.Equal(t, n, exit.Code)
			}
		}
		in := strings.Repeat("0123456789", 100000)
		var out bytes.Buffer
		require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"cat"}, Stdin: strings.NewReader(in), Stdout: &out}))
		assert.True(t, in == out.String(), "%d bytes", out.Len())
		for _, e := range s.Execs() {
			for socket, n := range e.Dials {
				assert.Equal(t, 1, n, "socket %s was dialled more than once", socket)
			}
		}
	})
}

// exec runs a command under one fault and counts how often the server was asked to start it.
func execUnder(t *testing.T, s *lxdtest.Server, host *transport.LXD, cmd transport.Command, faults ...lxdtest.Fault) error {
	t.Helper()
	s.Inject(faults...)
	before := len(s.Execs())
	err := host.Exec(soon(t), cmd)
	execs := slices.DeleteFunc(s.Execs()[before:], isReaping)
	assert.LessOrEqual(t, len(execs), 1, "the library starts nothing twice")
	s.ClearFaults()
	return err
}

func websocket(socket string, m lxdtest.Moment, do lxdtest.Action) lxdtest.Fault {
	return lxdtest.Fault{Route: lxdtest.RouteWebsocket, Socket: socket, Moment: m, Do: do}
}

func TestOutputWithoutItsMark(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		for socket, name := range map[string]string{"1": "stdout", "2": "stderr"} {
			for what, f := range map[string]lxdtest.Fault{
				"no mark":        websocket(socket, lxdtest.OnMark, lxdtest.Drop),
				"garbage":        websocket(socket, lxdtest.OnMark, lxdtest.GarbageFrame),
				"text not empty": websocket(socket, lxdtest.OnMark, lxdtest.All(lxdtest.Raw([]byte{0x81, 1, 'x'}), lxdtest.Drop)),
				"half a frame":   websocket(socket, lxdtest.OnMark, lxdtest.All(lxdtest.OversizedFrame(1<<40, 10), lxdtest.Drop)),
			} {
				var out, errOut bytes.Buffer
				err := execUnder(t, s, host, transport.Command{Args: []string{"echo", "hi"}, Stdout: &out, Stderr: &errOut, WaitDelay: time.Second}, f)
				assert.ErrorIs(t, err, transport.ErrOutputLost, "%s %s", socket, what)
				assert.ErrorContains(t, err, name)
				_, exited := transport.ExitCode(err)
				assert.False(t, exited, "status 0 is not an ExitError: %v", err)
				assert.True(t, strings.HasPrefix(out.String(), "hi\n"), "what arrived was written: %q", out.String())
				assert.True(t, strings.HasPrefix(errOut.String(), "err\n"))
			}
		}
	})
}

func TestMarkIsEnough(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		var out bytes.Buffer
		require.NoError(t, execUnder(t, s, host, transport.Command{Args: []string{"echo", "hi"}, Stdout: &out},
			websocket("1", lxdtest.OnMarked, lxdtest.Reset), websocket("2", lxdtest.OnMarked, lxdtest.Reset)))
		assert.Equal(t, "hi\n", out.String())
	})
}

func TestNotStarted(t *testing.T) {
	onFakeThatWaits(t, shortWindow, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		for name, f := range map[string]lxdtest.Fault{
			"request refused":           {Route: lxdtest.RouteExec, Do: lxdtest.Refuse(500, "no")},
			"request dropped":           {Route: lxdtest.RouteExec, Do: lxdtest.Drop},
			"answer dropped":            {Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Drop},
			"answer is garbage":         {Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Respond(202, "application/json", "{")},
			"answer is something else":  {Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Respond(202, "text/html", "<html>")},
			"answer without operation":  {Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Respond(202, "application/json", `{"type":"async","metadata":{}}`)},
			"answer without secrets":    {Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Respond(202, "application/json", `{"type":"async","metadata":{"id":"x"}}`)},
			"answer with null":          {Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Respond(202, "application/json", `{"type":"async","metadata":null}`)},
			"answer with wrong types":   {Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Respond(202, "application/json", `{"type":"async","metadata":{"id":7}}`)},
			"shutting down":             {Route: lxdtest.RouteExec, Do: lxdtest.Refuse(503, "LXD is shutting down")},
			"socket refused":            websocket("1", lxdtest.OnRequest, lxdtest.Refuse(403, "Forbidden")),
			"stdin refused":             websocket("0", lxdtest.OnRequest, lxdtest.Refuse(500, "no")),
			"socket dropped":            websocket("2", lxdtest.OnRequest, lxdtest.Drop),
			"socket answered otherwise": websocket("2", lxdtest.OnRequest, lxdtest.Respond(200, "text/plain", "hello")),
		} {
			s.Inject(f)
			err := host.Exec(soon(t), transport.Command{Args: []string{"echo", "hi"}})
			s.ClearFaults()
			assert.ErrorIs(t, err, transport.ErrNotStarted, name)
			assert.NotErrorIs(t, err, transport.ErrOutputLost, name)
		}
		for _, e := range s.Execs() {
			assert.False(t, e.Started)
		}
		assert.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"echo", "hi"}}), "the transport still works")
	})
}

// A dial of which nobody knows how it ended is not tried again.
func TestSocketThatIsLostWhileConnecting(t *testing.T) {
	onFakeThatWaits(t, shortWindow, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		for _, socket := range []string{"0", "1", "2", "control"} {
			err := execUnder(t, s, host, transport.Command{Args: []string{"wait"}}, websocket(socket, lxdtest.OnResponse, lxdtest.Drop))
			assert.Error(t, err, socket)
		}
		for _, e := range s.Execs() {
			for socket, n := range e.Dials {
				assert.LessOrEqual(t, n, 1, "socket %s", socket)
			}
		}
	})
}

// lateConn is a connection on which nothing is heard until it is released.
type lateConn struct {
	net.Conn
	release <-chan struct{}
}

func (c lateConn) NetConn() net.Conn { return c.Conn }

func (c lateConn) Read(p []byte) (int, error) {
	<-c.release
	return c.Conn.Read(p)
}

// A command may have run, and ended, before we have heard that its last socket is connected: it has its verdict all the same.
func TestSocketWhoseAnswerIsLate(t *testing.T) {
	t.Parallel()
	s := fake(t, false, commands, nil)
	host := newLXD(t, connect(t, s), "c1", nil)
	dials, release := 0, make(chan struct{})
	var mu sync.Mutex
	transport.WrapSockets(host, func(c net.Conn) net.Conn {
		mu.Lock()
		defer mu.Unlock()
		if dials++; dials == 4 { // stdin's, which comes after control's
			return lateConn{c, release}
		}
		return c
	})
	// It is when the sockets take long that the operation is asked for, and tells the end.
	s.Inject(lxdtest.Fault{Route: lxdtest.RouteWait, Moment: lxdtest.OnSend, Do: func(*lxdtest.Point) lxdtest.Verdict {
		time.AfterFunc(500*time.Millisecond, sync.OnceFunc(func() { close(release) }))
		return lxdtest.Proceed
	}, Nth: 1})
	var out bytes.Buffer
	assert.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"echo", "hi"}, Stdout: &out}))
	assert.Equal(t, "hi\n", out.String())
}

// No command runs that could not be ended.
func TestControlRefused(t *testing.T) {
	onFakeThatWaits(t, shortWindow, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		err := execUnder(t, s, host, transport.Command{Args: []string{"echo", "hi"}},
			websocket("control", lxdtest.OnRequest, lxdtest.Refuse(500, "Only running operations can be connected")))
		assert.ErrorIs(t, err, transport.ErrNotStarted)
		for _, e := range s.Execs() {
			assert.Zero(t, e.Dials["0"])
		}
	})
}

func TestOperationThatIsGone(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		gone := lxdtest.Refuse(404, "Operation not found")
		err := execUnder(t, s, host, transport.Command{Args: []string{"echo", "hi"}},
			lxdtest.Fault{Route: lxdtest.RouteWait, Do: gone}, lxdtest.Fault{Route: lxdtest.RouteOperation, Do: gone})
		_, exited := transport.ExitCode(err)
		assert.False(t, exited)
		assert.ErrorContains(t, err, "status is not known")
		assert.NotErrorIs(t, err, transport.ErrNotStarted)
	})
}

// Requests that fail for a while do not hide the result.
func TestWaitThatFailsAtFirst(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		for name, do := range map[string]lxdtest.Action{
			"dropped":  lxdtest.Drop,
			"refused":  lxdtest.Refuse(500, "context deadline exceeded"),
			"garbage":  lxdtest.Respond(200, "application/json", "nonsense"),
			"empty":    lxdtest.Respond(200, "application/json", ""),
			"running":  lxdtest.Respond(200, "application/json", `{"type":"sync","metadata":{"status_code":103}}`),
			"in error": lxdtest.Respond(200, "application/json", `{"type":"error","error_code":500,"error":"timeout"}`),
		} {
			err := execUnder(t, s, host, transport.Command{Args: []string{"exit", "3"}}, lxdtest.Fault{Route: lxdtest.RouteWait, Nth: 1, Do: do})
			code, _ := transport.ExitCode(err)
			assert.Equal(t, 3, code, "%s: %v", name, err)
		}
	})
}

func TestReturnThatIsNoStatus(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		for _, r := range []string{"-1", "256", "1e3", "0.5", `"0"`, "null", "true", "[]", "99999999999999999999"} {
			body := `{"type":"sync","metadata":{"id":"x","status_code":200,"metadata":{"return":` + r + `}}}`
			err := execUnder(t, s, host, transport.Command{Args: []string{"exit", "0"}}, lxdtest.Fault{Route: lxdtest.RouteWait, Do: lxdtest.Respond(200, "application/json", body)})
			_, exited := transport.ExitCode(err)
			assert.False(t, exited, "%s: %v", r, err)
			assert.NotErrorIs(t, err, transport.ErrNotStarted, r)
		}
	})
}

// What LXD says of a command that it could not start is told from other failures.
func TestFailuresBeforeTheStart(t *testing.T) {
	t.Parallel()
	s := fake(t, false, commands, nil)
	host := newLXD(t, connect(t, s), "c1", nil)
	for text, notStarted := range map[string]bool{
		"Timed out waiting for websockets to connect":       true,
		"fork/exec /usr/bin/lxd: argument list too long":    true,
		"fork/exec /usr/bin/lxd: too many open files":       true,
		"pipe2: too many open files":                        true,
		"Failed to retrieve PID of executing child process": true,
		"too many open files":                               false,
		"":                                                  false,
	} {
		body := fmt.Sprintf(`{"type":"sync","metadata":{"id":"x","status_code":400,"err":%q,"metadata":null}}`, text)
		err := execUnder(t, s, host, transport.Command{Args: []string{"exit", "0"}}, lxdtest.Fault{Route: lxdtest.RouteWait, Do: lxdtest.Respond(200, "application/json", body)})
		assert.Error(t, err)
		assert.Equal(t, notStarted, errors.Is(err, transport.ErrNotStarted), "%v", err)
	}
}

// A request that has waited for longer than LXD remembers an operation may fail: there is time for another one all the same.
func TestLongWaitThatFailsAtTheEnd(t *testing.T) {
	t.Parallel()
	s := fake(t, false, commands, nil)
	host := newLXD(t, connect(t, s), "c1", nil)
	up := make(chan struct{})
	p, err := host.Start(soon(t), transport.Command{Args: []string{"wait"}, Stdout: upThen(func() { close(up) })})
	require.NoError(t, err)
	<-up
	s.Inject(lxdtest.Fault{Route: lxdtest.RouteWait, Moment: lxdtest.OnSend, Do: lxdtest.Drop}, lxdtest.Fault{Route: lxdtest.RouteOperation, Nth: 1, Do: lxdtest.Drop},
		lxdtest.Fault{Route: lxdtest.RouteExec, Moment: lxdtest.OnFinal, Do: lxdtest.Delay(1500 * time.Millisecond)})
	<-time.After(5500 * time.Millisecond)
	require.NoError(t, p.Signal(transport.SIGTERM))
	err = p.Wait()
	code, _ := transport.ExitCode(err)
	assert.Equal(t, 143, code, "%v", err)
}

func TestDaemonThatDies(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		up := make(chan struct{})
		go func() { <-up; s.Die() }()
		var out bytes.Buffer
		w := writerFunc(func(p []byte) (int, error) {
			defer close(up)
			return out.Write(p)
		})
		err := host.Exec(soon(t), transport.Command{Args: []string{"wait"}, Stdout: w})
		assert.ErrorIs(t, err, transport.ErrOutputLost)
		_, exited := transport.ExitCode(err)
		assert.False(t, exited)
		assert.NotErrorIs(t, err, transport.ErrNotStarted)
		assert.ErrorContains(t, err, "may still run")
		assert.Equal(t, "up\n", out.String())
		assert.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"exit", "0"}}), "with the daemon back")
	})
}

// LXD refuses a socket of an operation that has ended without a word about why. Whoever asks is told.
func TestSocketThatComesTooLate(t *testing.T) {
	onFakeThatWaits(t, 50*time.Millisecond, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		s.Inject(websocket("1", lxdtest.OnRequest, lxdtest.Delay(200*time.Millisecond)))
		err := host.Exec(soon(t), transport.Command{Args: []string{"exit", "0"}})
		assert.ErrorIs(t, err, transport.ErrNotStarted)
		assert.ErrorContains(t, err, "Timed out waiting for websockets to connect")
	})
}

// A server that does nothing any more cannot hold Exec beyond its bound.
func TestServerThatStalls(t *testing.T) {
	t.Parallel()
	var all sync.WaitGroup // they do nothing but wait, and need no turns of their own
	defer all.Wait()
	for _, v := range lxdtest.Versions() {
		for name, f := range map[string]lxdtest.Fault{
			"request": {Route: lxdtest.RouteExec, Do: lxdtest.Stall},
			"dial":    websocket("1", lxdtest.OnRequest, lxdtest.Stall),
			"wait":    {Route: lxdtest.RouteWait, Do: lxdtest.Stall},
			"control": websocket("control", lxdtest.OnReceive, lxdtest.Stall),
			"mark":    websocket("1", lxdtest.OnMark, lxdtest.Stall),
		} {
			s := fake(t, v.Name == lxdtest.LXD6.Name, commands, func(f *lxdtest.Version) { *f = v; f.ConnectWindow = shortWindow })
			host := newLXD(t, connect(t, s), "c1", nil)
			ctx := soon(t)
			all.Go(func() {
				s.Inject(f)
				ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
				defer cancel()
				start := time.Now()
				err := host.Exec(ctx, transport.Command{Args: []string{"wait"}, WaitDelay: 200 * time.Millisecond})
				s.ClearFaults()
				assert.ErrorIs(t, err, context.DeadlineExceeded, "%s: %s", v.Name, name)
				assert.Less(t, time.Since(start), patience, "%s: %s", v.Name, name)
			})
		}
	}
}

// TestVerdictOfAServerThatHangs: whenever a server falls silent there is a verdict soon, and not the sum of all that could be waited for. That
// it answers some questions, as a member of a cluster does before one that hangs, makes no difference.
func TestVerdictOfAServerThatHangs(t *testing.T) {
	t.Parallel()
	const silence = 3 * time.Second
	again := lxdtest.Fault{Route: lxdtest.RouteExec, Nth: 2, Do: lxdtest.Stall} // the search for what the command has left behind
	wait, operation := lxdtest.Fault{Route: lxdtest.RouteWait, Do: lxdtest.Stall}, lxdtest.Fault{Route: lxdtest.RouteOperation, Do: lxdtest.Stall}
	var all sync.WaitGroup // they do nothing but wait, and need no turns of their own
	defer all.Wait()
	for name, c := range map[string]struct {
		faults []lxdtest.Fault
		cancel func(lxdtest.Exec) bool // once it has come so far
		within time.Duration
	}{
		"from the sockets on":                        {faults: []lxdtest.Fault{websocket("1", lxdtest.OnRequest, lxdtest.Stall), wait, operation, again}, within: 5 * silence},
		"from the sockets on, but for the operation": {faults: []lxdtest.Fault{websocket("1", lxdtest.OnRequest, lxdtest.Stall), again}, within: 13 * silence},
		"from the sockets on, and ctx ends":          {faults: []lxdtest.Fault{websocket("1", lxdtest.OnRequest, lxdtest.Stall), again}, cancel: func(e lxdtest.Exec) bool { return e.Dials["0"] > 0 }, within: 4 * silence},
		"from the command on":                        {faults: []lxdtest.Fault{wait, operation, again}, within: 5 * silence},
		"from the command on, and ctx ends":          {faults: []lxdtest.Fault{wait, operation, again}, cancel: func(e lxdtest.Exec) bool { return e.Started }, within: 5 * silence},
	} {
		s := fake(t, true, commands, func(v *lxdtest.Version) { v.ConnectWindow = 4 * patience })
		s.Inject(c.faults...)
		host := newLXD(t, connect(t, s), "c1", &transport.LXDOptions{Liveness: silence})
		ctx, cancel := context.WithCancel(soon(t))
		if c.cancel != nil {
			all.Go(func() {
				assert.Eventually(t, func() bool { return slices.ContainsFunc(s.Execs(), c.cancel) }, patience, 5*time.Millisecond, name)
				cancel()
			})
		}
		all.Go(func() {
			defer cancel()
			start := time.Now()
			err := host.Exec(ctx, transport.Command{Args: []string{"wait"}, WaitDelay: silence})
			assert.Less(t, time.Since(start), c.within, "%s: %v", name, err)
			t.Logf("%s: after %.1f s: %v", name, time.Since(start).Seconds(), err)
			_, exited := transport.ExitCode(err)
			assert.False(t, exited, "%s: %v", name, err)
			assert.NotErrorIs(t, err, transport.ErrNotStarted, name)
		})
	}
}

// A stream that the server never ends is cut when the command has been over for WaitDelay.
func TestMarkThatNeverComes(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		s.Inject(websocket("1", lxdtest.OnMark, lxdtest.Stall))
		p, err := host.Start(soon(t), transport.Command{Args: []string{"wait"}, WaitDelay: 300 * time.Millisecond})
		require.NoError(t, err)
		require.NoError(t, p.Signal(transport.SIGTERM))
		assert.ErrorIs(t, p.Wait(), transport.ErrOutputLost)
	})
}

// Credentials and the socket's secret do not follow a redirect.
func TestRedirect(t *testing.T) {
	onFakeThatWaits(t, shortWindow, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		asked := make(chan *http.Request, 10)
		elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked <- r }))
		defer elsewhere.Close()
		redirect := func(p *lxdtest.Point) lxdtest.Verdict {
			p.Answer(http.StatusTemporaryRedirect, http.Header{"Location": {elsewhere.URL + "/x"}}, nil)
			return lxdtest.Skip
		}
		for _, f := range []lxdtest.Fault{{Route: lxdtest.RouteExec, Do: redirect}, websocket("1", lxdtest.OnRequest, redirect)} {
			err := execUnder(t, s, host, transport.Command{Args: []string{"exit", "0"}}, f)
			assert.ErrorIs(t, err, transport.ErrNotStarted)
		}
		assert.Empty(t, asked)
	})
}

// Connections that the server has closed meanwhile are no reason to fail.
func TestKeptConnectionThatWasClosed(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		for range 5 {
			require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"exit", "0"}}))
			s.CloseClientConnections()
		}
		ran := 0
		for _, e := range s.Execs() {
			if e.Started {
				ran++
			}
		}
		assert.Equal(t, 5, ran)
	})
}

func TestManyOnTheFake(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		const n = 30
		errs := make(chan error, n)
		for i := range n {
			go func() {
				err := host.Exec(soon(t), transport.Command{Args: []string{"exit", strconv.Itoa(i)}})
				if code, exited := transport.ExitCode(err); !exited || code != i {
					errs <- fmt.Errorf("%d: %v", i, err)
					return
				}
				errs <- nil
			}()
		}
		for range n {
			assert.NoError(t, <-errs)
		}
	})
}

// wrapper adds a token to every request, as wrappers of the official client's transport do.
type wrapper struct {
	transport *http.Transport
	token     string
}

func (w wrapper) Transport() *http.Transport { return w.transport }

func (w wrapper) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+w.token)
	return w.transport.RoundTrip(r)
}

func TestBearerToken(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewUnstartedServer()
	s.Handler = commands
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	s.Start()
	t.Cleanup(s.Close)
	server, err := lxd.ConnectLXDUnix(s.Socket, &lxd.ConnectionArgs{
		SkipGetServer: true, UserAgent: "orchestrator/1",
		TransportWrapper: func(t *http.Transport) lxd.HTTPTransporter {
			return wrapper{t, "hunter2"}
		},
	})
	require.NoError(t, err)
	host := newLXD(t, server, "c1", nil)
	require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"exit", "0"}}))
	routes := map[lxdtest.Route]int{}
	for _, r := range s.Requests() {
		routes[r.Route]++
		assert.Equal(t, "Bearer hunter2", r.Header.Get("Authorization"), r.Path)
		assert.Equal(t, "orchestrator/1", r.Header.Get("User-Agent"), r.Path)
		assert.Empty(t, r.Header.Get("Origin"), r.Path)
	}
	assert.Equal(t, 4, routes[lxdtest.RouteWebsocket])
	assert.Equal(t, 1, routes[lxdtest.RouteExec])
}

// Nothing is left open at the server, whatever happened.
func TestNothingIsLeftOpen(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		host.Exec(soon(t), transport.Command{Args: []string{"echo", "hi"}})
		host.Exec(soon(t), transport.Command{Args: []string{"cat"}, Stdin: errReader{errors.New("broken")}, WaitDelay: time.Second})
		host.Exec(soon(t), transport.Command{Args: []string{"yes"}, Stdout: failingWriter{errors.New("full")}, WaitDelay: time.Second})
		require.NoError(t, host.Close())
		assert.Eventually(t, func() bool { return len(s.Open()) == 0 }, patience, 10*time.Millisecond, "%v", s.Open())
		assert.False(t, slices.ContainsFunc(s.Execs(), func(e lxdtest.Exec) bool { return !e.Exited }))
	})
}

// A server that goes down while the command runs tells nothing about the command's start.
func TestShutdownWhileItRuns(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		down := lxdtest.Refuse(503, "LXD is shutting down")
		var out bytes.Buffer
		err := execUnder(t, s, host, transport.Command{Args: []string{"echo", "ran"}, Stdout: &out},
			lxdtest.Fault{Route: lxdtest.RouteWait, Do: down}, lxdtest.Fault{Route: lxdtest.RouteOperation, Do: down})
		assert.Equal(t, "ran\n", out.String())
		assert.Error(t, err)
		assert.NotErrorIs(t, err, transport.ErrNotStarted, "a caller would run it twice")
	})
}

// What the server said is not quoted where it may hold a secret.
func TestAnswersAreNotQuoted(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		for _, body := range []string{`{"type":"async","metadata":{"metadata":{"fds":{"0":"hunter2`, `hunter2`, `{"operation":"hunter2"}`} {
			err := execUnder(t, s, host, transport.Command{Args: []string{"exit", "0"}},
				lxdtest.Fault{Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Respond(202, "application/json", body)})
			assert.ErrorIs(t, err, transport.ErrNotStarted)
			assert.NotContains(t, err.Error(), "hunter2")
		}
		var echoed string
		echo := func(p *lxdtest.Point) lxdtest.Verdict {
			echoed = p.Request.URL.Query().Get("secret")
			return lxdtest.Refuse(403, "no "+echoed)(p)
		}
		err := execUnder(t, s, host, transport.Command{Args: []string{"exit", "0"}}, websocket("1", lxdtest.OnRequest, echo))
		assert.ErrorIs(t, err, transport.ErrNotStarted)
		require.NotEmpty(t, echoed)
		assert.NotContains(t, err.Error(), echoed)
	})
}

func TestWriterFailsAndContextEnds(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		full := errors.New("disk full")
		ctx, cancel := context.WithCancel(soon(t))
		defer cancel()
		err := host.Exec(ctx, transport.Command{Args: []string{"wait"}, Stdout: writerFunc(func([]byte) (int, error) { cancel(); return 0, full })})
		assert.ErrorIs(t, err, full)
		assert.ErrorIs(t, err, context.Canceled)
		_, exited := transport.ExitCode(err)
		assert.True(t, exited, "%v", err)
	})
}

// A status that comes later than WaitDelay after the end is not lost.
func TestStatusThatComesLate(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		late := lxdtest.Delay(300 * time.Millisecond)
		s.Inject(lxdtest.Fault{Route: lxdtest.RouteExec, Moment: lxdtest.OnFinal, Do: late})
		p, err := host.Start(soon(t), transport.Command{Args: []string{"wait"}, WaitDelay: time.Millisecond})
		require.NoError(t, err)
		require.NoError(t, p.Signal(transport.SIGTERM))
		code, exited := transport.ExitCode(p.Wait())
		assert.True(t, exited)
		assert.Equal(t, 143, code)
	})
}

// Where the answer about the working directory comes too late for the sockets, the command is requested again, and runs once.
func TestDirectoryThatIsAnsweredLate(t *testing.T) {
	onFakeThatWaits(t, shortWindow, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		require.NoError(t, s.WriteFile("c1", "/src/f", nil, 0o644))
		s.Inject(lxdtest.Fault{Route: lxdtest.RouteSFTP, Do: lxdtest.Delay(shortWindow + 500*time.Millisecond)})
		err := host.Exec(soon(t), transport.Command{Args: []string{"exit", "0"}, Dir: "/nope"})
		assert.ErrorIs(t, err, os.ErrNotExist)
		assert.ErrorIs(t, err, transport.ErrNotStarted)
		assert.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"exit", "0"}, Dir: "/src"}))
		started := 0
		for _, x := range s.Execs() {
			if x.Started {
				started++
			}
		}
		assert.Equal(t, 1, started)
	})
}

// The question for the working directory is bounded.
func TestDirectoryThatCannotBeAskedFor(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		s.Inject(lxdtest.Fault{Route: lxdtest.RouteSFTP, Do: lxdtest.Stall})
		start := time.Now()
		err := host.Exec(soon(t), transport.Command{Args: []string{"exit", "0"}, Dir: "/src"})
		assert.Less(t, time.Since(start), 20*time.Second)
		assert.NoError(t, err)
	})
}

// countingReader counts the Reads of an endless source.
type countingReader struct{ n atomic.Int64 }

func (r *countingReader) Read(p []byte) (int, error) {
	r.n.Add(1)
	return 1, nil
}

// After a failure the source is the caller's again.
func TestUploadLeavesItsSourceAlone(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		var src countingReader
		err := host.Upload(soon(t), "/no/such/file", &src, nil)
		assert.ErrorIs(t, err, fs.ErrNotExist)
		assert.Zero(t, src.n.Load(), "nothing was read for nothing")

		ctx, cancel := context.WithCancel(soon(t))
		defer cancel()
		s.Inject(lxdtest.Fault{Route: lxdtest.RouteSFTP, Moment: lxdtest.OnReceive, Bytes: 1 << 10, Do: func(*lxdtest.Point) lxdtest.Verdict { cancel(); return lxdtest.Proceed }})
		err = host.Upload(ctx, "/file", &src, nil)
		assert.ErrorIs(t, err, context.Canceled)
		n := src.n.Load()
		assert.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"exit", "0"}}), "time passes")
		assert.Equal(t, n, src.n.Load())
		for _, f := range s.Files("c1") {
			assert.NotContains(t, f.Path, ".transport-")
		}
	})
}

// A download whose writer does not return cannot hold the caller.
func TestDownloadToAWriterThatBlocks(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewServer()
	defer s.Close()
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	require.NoError(t, s.WriteFile("c1", "/file", make([]byte, 1<<20), 0o644))
	host := newLXD(t, connect(t, s), "c1", nil)
	w := &blocking{entered: make(chan struct{}), release: make(chan struct{})}
	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	go func() { <-w.entered; cancel() }()
	err := host.Download(ctx, "/file", w, nil)
	assert.ErrorIs(t, err, context.Canceled)
	require.NoError(t, host.Close())
	close(w.release)
	assert.EqualValues(t, 1, w.calls.Load())
}

// The temporary file is nobody else's to read.
func TestTemporaryFileIsPrivate(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		seen := 0
		err := host.Upload(soon(t), "/root/secret", io.LimitReader(zeros{}, 1<<20), &transport.UploadOptions{Mode: 0o644, Progress: func(int64) {
			for _, f := range s.Files("c1") {
				if strings.Contains(f.Path, ".transport-") {
					seen++
					assert.EqualValues(t, 0o600, f.Mode.Perm())
				}
			}
		}})
		require.NoError(t, err)
		assert.NotZero(t, seen)
	})
}
