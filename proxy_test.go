package transport_test

import (
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/internal/reallxd"
)

// proxy is a link to the real server that can fail in the ways in which links do.
type proxy struct {
	network, target string
	listener        net.Listener
	goroutines      sync.WaitGroup

	mu     sync.Mutex // guards what follows
	change sync.Cond  // something of it has changed
	pairs  map[*pair]bool
	down   bool          // new connections are cut at once
	frozen bool          // nothing is passed on, on new connections neither
	rate   int           // bytes a second and direction; 0: as many as there are
	delay  time.Duration // before a piece is passed on
	asked  []string      // first lines of what clients sent, where it is not encrypted
	closed bool
}

// pair is a connection and the one that continues it.
type pair struct {
	client, server net.Conn
	frozen         bool
}

// newProxy makes a link to the socket at path, or to the address.
func newProxy(t testing.TB, network, target string) *proxy {
	t.Helper()
	p := &proxy{network: network, target: target, pairs: map[*pair]bool{}}
	p.change.L = &p.mu
	address := "127.0.0.1:0"
	if network == "unix" {
		dir, err := os.MkdirTemp("", "proxy") // short: a socket's path may have 107 bytes
		require.NoError(t, err)
		t.Cleanup(func() { os.RemoveAll(dir) })
		address = filepath.Join(dir, "s")
	}
	var err error
	p.listener, err = net.Listen(network, address)
	require.NoError(t, err)
	p.goroutines.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

// unixLink and httpsLink are links to the real server, and connections over them.
func unixLink(t testing.TB) (*proxy, lxd.InstanceServer) {
	t.Helper()
	reallxd.Need(t)
	p := newProxy(t, "unix", os.Getenv("TRANSPORT_LXD_SOCKET"))
	s, err := lxd.ConnectLXDUnix(p.listener.Addr().String(), nil)
	require.NoError(t, err)
	return p, s
}

func httpsLink(t testing.TB) (*proxy, lxd.InstanceServer) {
	t.Helper()
	reallxd.Need(t)
	u, err := url.Parse(os.Getenv("TRANSPORT_LXD_ADDR"))
	require.NoError(t, err)
	p := newProxy(t, "tcp", u.Host)
	s, err := lxd.ConnectLXD("https://"+p.listener.Addr().String(), &lxd.ConnectionArgs{
		TLSClientCert: reallxd.File(t, "TRANSPORT_LXD_CERT"),
		TLSClientKey:  reallxd.File(t, "TRANSPORT_LXD_KEY"),
		TLSServerCert: reallxd.File(t, "TRANSPORT_LXD_SERVER_CERT"),
	})
	require.NoError(t, err)
	return p, s
}

func (p *proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.goroutines.Go(func() { p.serve(client) })
	}
}

func (p *proxy) serve(client net.Conn) {
	defer client.Close()
	p.mu.Lock()
	down := p.down || p.closed
	p.mu.Unlock()
	if down {
		reset(client)
		return
	}
	// LXD accepts nothing else on its unix socket while a connection says nothing: it may not be there before it does.
	start := make([]byte, 16<<10)
	both := &pair{client: client}
	p.mu.Lock()
	p.pairs[both] = true
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.pairs, both)
		p.mu.Unlock()
	}()
	n, err := client.Read(start)
	if err != nil || !p.pass(both) {
		return
	}
	server, err := net.Dial(p.network, p.target)
	if err != nil {
		return
	}
	defer server.Close()
	p.mu.Lock()
	if !p.pairs[both] {
		p.mu.Unlock()
		return
	}
	both.server = server
	p.mu.Unlock()
	var done sync.WaitGroup
	done.Go(func() { p.forward(both, server, client, start[:n]) })
	p.forward(both, client, server, nil)
	done.Wait()
}

// pass waits while nothing passes, and reports whether the connection is still there then.
func (p *proxy) pass(both *pair) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for (p.frozen || both.frozen) && !p.closed && p.pairs[both] {
		p.change.Wait()
	}
	return !p.closed && p.pairs[both]
}

// forward passes on what was read already, all that follows until the source ends, and then the end.
func (p *proxy) forward(both *pair, to, from net.Conn, piece []byte) {
	buf := make([]byte, 16<<10)
	if p.network == "unix" && piece != nil {
		line, _, _ := strings.Cut(string(piece), "\r\n")
		p.mu.Lock()
		p.asked = append(p.asked, line)
		p.mu.Unlock()
	}
	var end error
	for {
		if len(piece) == 0 {
			var n int
			n, end = from.Read(buf)
			piece = buf[:n]
		}
		if !p.pass(both) {
			from.Close()
			to.Close()
			return
		}
		p.mu.Lock()
		pauses := p.delay
		if p.rate > 0 {
			pauses += time.Duration(len(piece)) * time.Second / time.Duration(p.rate)
		}
		p.mu.Unlock()
		if len(piece) > 0 {
			if pauses > 0 {
				<-time.After(pauses)
			}
			if _, err := to.Write(piece); err != nil {
				from.Close()
				return
			}
			piece = nil
		}
		if end == io.EOF {
			to.(interface{ CloseWrite() error }).CloseWrite()
			return
		}
		if end != nil {
			to.Close()
			return
		}
	}
}

// reset closes a connection so that the other side gets RST.
func reset(conn net.Conn) {
	if c, ok := conn.(*net.TCPConn); ok {
		c.SetLinger(0)
	}
	conn.Close()
}

// cut ends all connections, with RST or with FIN. While down, new ones are cut as well.
func (p *proxy) cut(rst, down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
	for both := range p.pairs {
		for _, conn := range []net.Conn{both.client, both.server} {
			if conn == nil {
				continue
			}
			if rst {
				reset(conn)
			} else {
				conn.Close()
			}
		}
		delete(p.pairs, both)
	}
	p.change.Broadcast()
}

// freeze has nothing pass any more, without a word: on all connections, or on those that there are now.
func (p *proxy) freeze(all bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen = all
	for both := range p.pairs {
		both.frozen = true
	}
}

// slow throttles and delays.
func (p *proxy) slow(rate int, delay time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rate, p.delay = rate, delay
}

// count tells how many requests began so, over a unix socket.
func (p *proxy) count(prefix string) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, line := range p.asked {
		if strings.HasPrefix(line, prefix) {
			n++
		}
	}
	return n
}

func (p *proxy) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.listener.Close()
	p.cut(false, true)
	p.goroutines.Wait()
}
