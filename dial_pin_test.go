package transport_test

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

// A middle ends TLS before a fake server, with a certificate that may change. With another one than the first it answers nothing, and
// counts what it is told.
type middle struct {
	address    string
	goroutines sync.WaitGroup

	mu       sync.Mutex // guards the rest
	config   *tls.Config
	honest   bool
	swapAt   string      // what the client says just before it changes
	swapTo   *tls.Config // what it changes to
	conns    []net.Conn
	met      int // connections with another certificate
	overhear []byte
}

// serving is a configuration with keys of its own for tickets: nobody resumes a session with the other one.
func serving(c *tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{*c}}
}

func newMiddle(t *testing.T, c *tls.Certificate, socket string) *middle {
	t.Helper()
	m := &middle{config: serving(c), honest: true}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	m.address = "https://" + l.Addr().String()
	m.goroutines.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			m.goroutines.Go(func() { m.serve(conn, socket) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		m.hangUp()
		m.goroutines.Wait()
	})
	return m
}

func (m *middle) hangUp() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.conns {
		c.Close()
	}
}

// swap has it show another certificate from now on.
func (m *middle) swap(c *tls.Certificate) {
	m.mu.Lock()
	m.config, m.honest = serving(c), false
	m.mu.Unlock()
	m.hangUp()
}

func (m *middle) serve(conn net.Conn, socket string) {
	defer conn.Close()
	m.mu.Lock()
	m.conns = append(m.conns, conn)
	config, honest := m.config, m.honest
	m.mu.Unlock()
	client := tls.Server(conn, config)
	if !honest {
		// A client of TLS 1.3 may send at once when it has seen the certificate: it is not asked to come on.
		heard, _ := io.ReadAll(client) // with the handshake
		m.mu.Lock()
		defer m.mu.Unlock()
		m.met++
		m.overhear = append(m.overhear, heard...)
		return
	}
	server, err := net.Dial("unix", socket)
	if err != nil {
		return
	}
	defer server.Close()
	m.goroutines.Go(func() {
		io.Copy(client, server)
		conn.Close()
	})
	buf := make([]byte, 16<<10)
	for {
		n, err := client.Read(buf)
		m.mu.Lock()
		if m.swapAt != "" && bytes.Contains(buf[:n], []byte(m.swapAt)) {
			m.config, m.honest = m.swapTo, false
		}
		m.mu.Unlock()
		if n > 0 {
			server.Write(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// heard waits until a number of connections with another certificate have ended, and returns what was said on them.
func (m *middle) heard(t *testing.T, least int) string {
	t.Helper()
	assert.Eventually(t, func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.met >= least
	}, patience, time.Millisecond, "nobody came")
	m.mu.Lock()
	defer m.mu.Unlock()
	return string(m.overhear)
}

// TestDialManInTheMiddle: who has a certificate for the server's name from an authority that the system trusts hears not a byte, whether
// it was there from the beginning, or comes later, or between a command's request and its sockets. A process reads the system's
// authorities once, so that this is one of its own.
func TestDialManInTheMiddle(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere SSL_CERT_FILE does not name the system's authorities")
	}
	file := os.Getenv("SSL_CERT_FILE")
	if os.Getenv("TRANSPORT_TEST_CHILD") != t.Name() {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), "TRANSPORT_TEST_CHILD="+t.Name(), "SSL_CERT_FILE="+filepath.Join(t.TempDir(), "ca.pem"), "SSL_CERT_DIR=/nonexistent")
		out, err := cmd.CombinedOutput()
		assert.NoError(t, err, "%s", out)
		assert.Contains(t, string(out), "--- PASS: "+t.Name())
		return
	}
	now := time.Now()
	authority := issued(t, nil, now.Add(-time.Hour), now.Add(time.Hour))
	require.NoError(t, os.WriteFile(file, []byte(inPEM(authority)), 0o600))
	own, others := issued(t, nil, now.Add(-time.Hour), now.Add(time.Hour)), issued(t, authority, now.Add(-time.Hour), now.Add(time.Hour))
	dir := clearEnv(t)
	t.Setenv("LXD_CONF", dir)
	fake := lxdtest.NewUnstartedServer()
	fake.Handler = commands
	fake.AddInstance(lxdtest.Instance{Name: "c1"})
	fake.Start()
	t.Cleanup(fake.Close)
	dial := func(m *middle, pinned bool) (*transport.LXD, error) {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "servercerts"), 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "config.yml"), []byte("remotes:\n  r: {addr: \""+m.address+"\"}\n"), 0o600))
		stored := filepath.Join(dir, "servercerts", "r.crt")
		os.Remove(stored)
		if pinned {
			require.NoError(t, os.WriteFile(stored, []byte(inPEM(own)), 0o600))
		}
		return transport.DialLXD(soon(t), "r", "c1", nil)
	}
	command := transport.Command{Args: []string{"echo", "hello"}, Stdin: strings.NewReader("a secret")}

	m := newMiddle(t, own, fake.Socket)
	m.swap(others)
	_, err := dial(m, true)
	assert.ErrorContains(t, err, "is pinned")
	assert.Empty(t, m.heard(t, 1), "from the beginning")

	host, err := dial(newMiddle(t, others, fake.Socket), false)
	works(t, host, err) // who does not pin trusts the system, and the test's authority is in it

	m = newMiddle(t, own, fake.Socket)
	host, err = dial(m, true)
	require.NoError(t, err)
	require.NoError(t, host.Exec(soon(t), command))
	m.swap(others)
	err = host.Exec(soon(t), command)
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.ErrorContains(t, err, "is pinned")
	assert.ErrorContains(t, host.Upload(soon(t), "/root/x", strings.NewReader("a secret"), nil), "is pinned")
	assert.ErrorContains(t, host.Download(soon(t), "/etc/passwd", io.Discard, nil), "is pinned")
	assert.NoError(t, host.Close())
	assert.Empty(t, m.heard(t, 3), "later")

	m = newMiddle(t, own, fake.Socket)
	host, err = dial(m, true)
	require.NoError(t, err)
	m.mu.Lock()
	m.swapAt, m.swapTo = "POST /1.0/instances/c1/exec", serving(others)
	m.mu.Unlock()
	err = host.Exec(soon(t), command)
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.ErrorContains(t, err, "is pinned")
	assert.NoError(t, host.Close())
	assert.Empty(t, m.heard(t, 1), "between the request and the sockets")
}
