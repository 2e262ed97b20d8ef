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

// TestSocketsThroughPings: a command that reads its input only after LXD's next pings, which would meet a closed socket, and lose what the command
// has not read: stdin's stays open to the end.
func TestSocketsThroughPings(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		sockets := watchSockets(host)
		const n = 1310720
		var out bytes.Buffer
		err := host.Exec(soon(t), transport.Command{
			Args:  transport.Shell("sleep 11; echo pinged; wc -c"),
			Stdin: bytes.NewReader(make([]byte, n)),
			Stdout: writerFunc(func(p []byte) (int, error) {
				if string(p) == "pinged\n" {
					for _, c := range sockets() {
						assert.False(t, c.closed.Load(), "a socket is closed before the end")
					}
				}
				return out.Write(p)
			}),
		})
		require.NoError(t, err)
		assert.Equal(t, "pinged\n"+strconv.Itoa(n), strings.TrimSpace(out.String()))
		assert.Len(t, sockets(), 4, "each is dialled once")
	})
}

// TestNothingIsWrittenToOutputsOfLXD: without input nothing at all is written after the start, through a round of pings.
func TestNothingIsWrittenToOutputsOfLXD(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		sockets := watchSockets(host)
		var counts []int64
		err := host.Exec(soon(t), transport.Command{
			Args: transport.Shell("sleep 1; echo up; sleep 11; echo pinged"),
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
//
// Over TLS only: on its unix socket LXD 5.0 accepts no other connection while one says nothing.
func TestSlowSocket(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		for nth := range 4 {
			for name, late := range map[string]time.Duration{"late": 2 * time.Second, "too late": 11 * time.Second, "lost": 0} {
				t.Run(strconv.Itoa(nth)+" "+name, func(t *testing.T) {
					t.Parallel()
					host := newLXD(t, reallxd.HTTPS(t), instance, nil)
					transport.NoReaping(host) // which has sockets, too
					var dials atomic.Int64
					hold := make(chan struct{})
					release := sync.OnceFunc(func() { close(hold) })
					defer release()
					defer time.AfterFunc(late, release).Stop()
					transport.WrapSockets(host, func(c net.Conn) net.Conn {
						switch {
						case dials.Add(1) != int64(nth+1):
							return c
						case name == "lost":
							return lostConn{c}
						}
						return heldConn{c, hold}
					})
					var out bytes.Buffer
					file := "/root/ran-" + newToken()
					start := time.Now()
					err := host.Exec(soon(t), transport.Command{Args: transport.Shell("echo ran | tee $1", file), Stdout: &out})
					took := time.Since(start)
					assert.LessOrEqual(t, dials.Load(), int64(4), "a socket was dialled again")
					assert.Less(t, took, bound)
					ran := 1
					if err == nil {
						ran = 0
						assert.NotEqual(t, "lost", name)
						assert.Equal(t, "ran\n", out.String())
					} else {
						assert.ErrorIs(t, err, transport.ErrNotStarted)
						assert.False(t, name == "late" && took < 4*time.Second, "there was time enough: %v", err)
					}
					look := newLXD(t, reallxd.HTTPS(t), instance, nil)
					code, _ := transport.ExitCode(look.Exec(soon(t), transport.Command{Args: []string{"test", "-e", file}}))
					assert.Equal(t, ran, code, "whether it has run: %v", err)
				})
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
