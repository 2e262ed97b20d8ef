package transport_test

import (
	"bytes"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

// The traps of docs/protocol.md on the real wire.

// watchedConn is one of a command's connections.
type watchedConn struct {
	net.Conn
	written atomic.Int64
	closed  atomic.Bool
}

func (w *watchedConn) NetConn() net.Conn { return w.Conn }

func (w *watchedConn) Write(p []byte) (int, error) {
	w.written.Add(int64(len(p)))
	return w.Conn.Write(p)
}

func (w *watchedConn) Close() error {
	w.closed.Store(true)
	return w.Conn.Close()
}

// watchSockets returns the connections that a transport makes for sockets from now on.
func watchSockets(host *transport.LXD) func() []*watchedConn {
	var mu sync.Mutex
	var all []*watchedConn
	transport.WrapSockets(host, func(c net.Conn) net.Conn {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, &watchedConn{Conn: c})
		return all[len(all)-1]
	})
	return func() []*watchedConn {
		mu.Lock()
		defer mu.Unlock()
		return append([]*watchedConn(nil), all...)
	}
}

// TestSocketsThroughPings: a command that lasts longer than LXD's pings are apart, and reads its input only then. Four sockets, each dialled once;
// nothing is written to any of them after the input and its end, no answer to a ping; none is closed by us before the command has ended, stdin's
// included, whose end would have LXD lose what the command has not read.
func TestSocketsThroughPings(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		sockets := watchSockets(host)
		const n = 1310720
		var before int64
		all := func() (written int64, closed int) {
			for _, c := range sockets() {
				written += c.written.Load()
				if c.closed.Load() {
					closed++
				}
			}
			return written, closed
		}
		var out bytes.Buffer
		check := func(line string) {
			written, closed := all()
			assert.Zero(t, closed, "sockets are closed before the end")
			switch line {
			case "up\n":
				before = written
			case "pinged\n":
				assert.Less(t, written-before, int64(n+n/100+1000), "something besides the input was written")
				before = written
			}
		}
		err := host.Exec(soon(t), transport.Command{
			Args:  transport.Shell("echo up; sleep 11; echo pinged; sleep 11; wc -c"),
			Stdin: bytes.NewReader(make([]byte, n)),
			Stdout: writerFunc(func(p []byte) (int, error) {
				check(string(p))
				return out.Write(p)
			}),
		})
		require.NoError(t, err)
		assert.Equal(t, "up\npinged\n"+strconv.Itoa(n), strings.TrimSpace(out.String()))
		assert.Len(t, sockets(), 4, "each is dialled once")
		written, _ := all()
		assert.Less(t, written-before, int64(n+n/100+1000))
	})
}

// TestNothingIsWrittenToOutputsOfLXD: without input nothing at all is written after the start, through two rounds of pings.
func TestNothingIsWrittenToOutputsOfLXD(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		sockets := watchSockets(host)
		var counts []int64
		err := host.Exec(soon(t), transport.Command{
			Args: transport.Shell("sleep 1; echo up; sleep 21; echo pinged"),
			Stdout: writerFunc(func(p []byte) (int, error) {
				sum := int64(0)
				for _, c := range sockets() {
					sum += c.written.Load()
					assert.False(t, c.closed.Load())
				}
				counts = append(counts, sum)
				return len(p), nil
			}),
		})
		require.NoError(t, err)
		require.Len(t, counts, 2)
		assert.Equal(t, counts[0], counts[1])
	})
}

// TestFastCommands: one that ends before its last socket is up is no trouble, however often.
func TestFastCommands(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		for i := range 50 {
			var out bytes.Buffer
			err := host.Exec(soon(t), transport.Command{Args: transport.Shell("echo $1; exit $1", strconv.Itoa(i+1)), Stdout: &out})
			code, _ := transport.ExitCode(err)
			require.Equal(t, i+1, code, "%v", err)
			require.Equal(t, strconv.Itoa(i+1)+"\n", out.String())
		}
	})
}

// heldConn is a connection that passes nothing on before it is released.
type heldConn struct {
	net.Conn
	release <-chan struct{}
}

func (c heldConn) NetConn() net.Conn { return c.Conn }

func (c heldConn) Write(p []byte) (int, error) {
	<-c.release
	return c.Conn.Write(p)
}

// TestSlowSocket: one of the sockets is late. Within LXD's window of 5 s (10 s since 6.9) nothing is to be seen of it; after it, or when it is refused
// or lost, the command has not started, for certain.
func TestSlowSocket(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		for _, s := range reallxd.Servers(t) {
			for nth := range 4 {
				for name, late := range map[string]time.Duration{"late": 2 * time.Second, "too late": 11 * time.Second, "lost": 0} {
					t.Run(s.Name+" "+strconv.Itoa(nth)+" "+name, func(t *testing.T) {
						t.Parallel()
						host := newLXD(t, s, instance, nil)
						var dials atomic.Int64
						release := make(chan struct{})
						if late > 0 {
							defer time.AfterFunc(late, func() { close(release) }).Stop()
						}
						transport.WrapSockets(host, func(c net.Conn) net.Conn {
							switch {
							case dials.Add(1) != int64(nth+1):
								return c
							case name == "lost":
								return lostConn{c}
							}
							return heldConn{c, release}
						})
						var out bytes.Buffer
						file := "/root/ran-" + newToken()
						start := time.Now()
						err := host.Exec(soon(t), transport.Command{Args: transport.Shell("echo ran | tee $1", file), Stdout: &out})
						assert.LessOrEqual(t, dials.Load(), int64(4), "a socket was dialled again")
						if name == "late" && time.Since(start) < 4*time.Second {
							require.NoError(t, err)
							assert.Equal(t, "ran\n", out.String())
							return
						}
						if err == nil { // on a busy machine, or with the window of 10 s
							return
						}
						assert.Less(t, time.Since(start), bound)
						assert.ErrorIs(t, err, transport.ErrNotStarted)
						host = newLXD(t, s, instance, nil)
						code, _ := transport.ExitCode(host.Exec(soon(t), transport.Command{Args: []string{"test", "-e", file}}))
						assert.Equal(t, 1, code, "it has run: %v", err)
					})
				}
			}
		}
	})
}

// lostConn breaks off when something is sent.
type lostConn struct{ net.Conn }

func (c lostConn) NetConn() net.Conn { return c.Conn }

func (c lostConn) Write([]byte) (int, error) {
	c.Conn.Close()
	return 0, errors.New("lost")
}
