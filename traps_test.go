package transport_test

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

// fake is a server with one instance, which runs handler.
func fake(t *testing.T, secure bool, handler lxdtest.Handler, change func(*lxdtest.Version)) *lxdtest.Server {
	t.Helper()
	s := lxdtest.NewUnstartedServer()
	s.Handler = handler
	if change != nil {
		change(&s.Version)
	}
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	if secure {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s
}

// writesOf counts what is written to a connection.
type writesOf struct {
	net.Conn
	n atomic.Int64
}

func (w *writesOf) NetConn() net.Conn { return w.Conn }

func (w *writesOf) Write(p []byte) (int, error) {
	w.n.Add(1)
	return w.Conn.Write(p)
}

// Nothing is written to stdout's and stderr's sockets, not even an answer to a ping: over TCP it could destroy output.
func TestNothingIsWrittenToOutputs(t *testing.T) {
	t.Parallel()
	pinged := make(chan struct{})
	s := fake(t, true, func(p *lxdtest.Process) int {
		fmt.Fprintln(p.Stdout, "up")
		<-pinged
		return 0
	}, func(v *lxdtest.Version) { v.PingInterval = time.Millisecond })
	host := newLXD(t, connect(t, s), "c1", nil)
	var mu sync.Mutex
	var conns []*writesOf
	transport.WrapSockets(host, func(c net.Conn) net.Conn {
		mu.Lock()
		defer mu.Unlock()
		conns = append(conns, &writesOf{Conn: c})
		return conns[len(conns)-1]
	})
	var pings atomic.Int64
	var once sync.Once
	var before []int64
	s.Inject(lxdtest.Fault{Route: lxdtest.RouteWebsocket, Socket: "1", Moment: lxdtest.OnPing, Do: func(*lxdtest.Point) lxdtest.Verdict {
		if pings.Add(1) > 200 {
			once.Do(func() { close(pinged) })
		}
		return lxdtest.Proceed
	}})
	require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"x"}, Stdout: onWrite(func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			before = append(before, c.n.Load())
		}
	})}))
	require.Len(t, conns, 4)
	written := int64(0)
	for i, c := range conns {
		written += c.n.Load() - before[i]
	}
	assert.LessOrEqual(t, written, int64(1), "nothing but the end of stdin")
}

// A socket that is slow to connect does not hide that LXD has given up on the command, which it tells for 5 s only.
func TestSocketThatNeverConnects(t *testing.T) {
	t.Parallel()
	for _, socket := range []string{"0", "1", "2", "control"} {
		t.Run(socket, func(t *testing.T) {
			t.Parallel()
			s := fake(t, true, commands, func(v *lxdtest.Version) { v.ConnectWindow = time.Second })
			s.Inject(websocket(socket, lxdtest.OnRequest, lxdtest.Stall))
			start := time.Now()
			err := newLXD(t, connect(t, s), "c1", nil).Exec(soon(t), transport.Command{Args: []string{"exit", "0"}})
			assert.ErrorIs(t, err, transport.ErrNotStarted)
			assert.Less(t, time.Since(start), 9*time.Second, "the socket itself is waited for longer")
		})
	}
}

// A server that takes a request and never answers is given up, also without the end of ctx.
func TestRequestThatIsNeverAnswered(t *testing.T) {
	t.Parallel()
	for name, faults := range map[string][]lxdtest.Fault{
		"exec":    {{Route: lxdtest.RouteExec, Do: lxdtest.Stall}},
		"explain": {{Route: lxdtest.RouteExec, Do: lxdtest.Refuse(500, "no")}, {Route: lxdtest.RouteInstances, Do: lxdtest.Stall}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := fake(t, false, commands, nil)
			s.Inject(faults...)
			host := newLXD(t, connect(t, s), "c1", &transport.LXDOptions{Liveness: 3 * time.Second})
			assert.ErrorIs(t, host.Exec(t.Context(), transport.Command{Args: []string{"exit", "0"}}), transport.ErrNotStarted)
		})
	}
}

// The request that waits for the operation may be on a link that has died: the status is asked for in time all the same.
func TestWaitThatIsNeverAnswered(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		s.Inject(lxdtest.Fault{Route: lxdtest.RouteWait, Do: lxdtest.Stall})
		code, exited := transport.ExitCode(host.Exec(soon(t), transport.Command{Args: []string{"exit", "3"}}))
		assert.True(t, exited)
		assert.Equal(t, 3, code)
	})
}

// The header of an answer to a dial is bounded.
func TestHeaderWithoutEnd(t *testing.T) {
	t.Parallel()
	s := fake(t, false, commands, func(v *lxdtest.Version) { v.ConnectWindow = time.Second })
	s.Inject(websocket("1", lxdtest.OnRequest, endless("HTTP/1.1 101 Switching Protocols\r\n", "X-Long: "+strings.Repeat("x", 4000)+"\r\n")))
	err := newLXD(t, connect(t, s), "c1", nil).Exec(soon(t), transport.Command{Args: []string{"exit", "0"}})
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.ErrorContains(t, err, "more than")
}

// nothingReader never says anything, nor that it is over.
type nothingReader struct{}

func (nothingReader) Read([]byte) (int, error) { return 0, nil }

func TestReaderThatReturnsNothing(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		assert.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"exit", "0"}, Stdin: nothingReader{}}))
	})
}

// Each of many commands has a verdict of its own when the server runs out of something, and when the transport is closed.
func TestManyInTrouble(t *testing.T) {
	t.Parallel()
	const n = 200
	for name, trouble := range map[string]func(*lxdtest.Server, *transport.LXD){
		"503": func(s *lxdtest.Server, _ *transport.LXD) {
			s.Inject(lxdtest.Fault{Route: lxdtest.RouteExec, Do: lxdtest.Refuse(503, "too many")})
		},
		"connections dropped": func(s *lxdtest.Server, _ *transport.LXD) {
			s.Inject(lxdtest.Fault{Route: lxdtest.RouteExec, Do: lxdtest.Drop}, lxdtest.Fault{Route: lxdtest.RouteWebsocket, Do: lxdtest.Drop})
		},
		"Close": func(_ *lxdtest.Server, host *transport.LXD) { host.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := fake(t, false, commands, nil)
			host := newLXD(t, connect(t, s), "c1", &transport.LXDOptions{MaxExecs: 20})
			transport.NoReaping(host)
			errs := make(chan error, n)
			for range n {
				go func() {
					errs <- host.Exec(soon(t), transport.Command{Args: []string{"echo", "hi"}, WaitDelay: time.Second})
				}()
			}
			for i := range n {
				err := <-errs
				if i == n/4 {
					trouble(s, host)
				}
				if err != nil && !errors.Is(err, transport.ErrNotStarted) && !errors.Is(err, transport.ErrClosed) {
					t.Error(err)
				}
			}
			started, ok := 0, 0
			for _, e := range s.Execs() {
				if e.Started {
					started++
				}
				if e.Exited && e.ExitCode == 0 {
					ok++
				}
			}
			assert.Less(t, started, n)
			assert.LessOrEqual(t, ok, started)
		})
	}
}
