package lxdtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A Server is a fake LXD daemon. Set its fields before Start.
type Server struct {
	// Version is the release to behave like. [NewUnstartedServer] sets [LXD50].
	Version Version

	// Handler is the processes of instances that have none of their own, among them those
	// that are created over the API. nil: there is no command in them (127).
	Handler Handler

	// Images are the aliases that instances can be created from. nil: every alias.
	Images []string

	// ErrorLog gets what a server would write to its log. nil: standard error by way of
	// package log.
	ErrorLog *log.Logger

	// URL is where the server is after Start: http://unix.socket or https://127.0.0.1:port.
	URL string

	// Socket is the path of the unix socket after Start, "" after StartTLS.
	Socket string

	// ServerCert, ClientCert and ClientKey are PEM, set by StartTLS: the certificate
	// to pin, and the pair that the server trusts.
	ServerCert, ClientCert, ClientKey string

	Listener net.Listener

	dir     string // temporary: the socket and the roots of instances
	http    *http.Server
	client  *http.Client
	trusted map[string]bool // fingerprints of client certificates
	closing chan struct{}   // closed by Close
	wg      sync.WaitGroup  // tasks

	mu         sync.Mutex // guards what follows
	closed     bool
	tasks      map[*task]struct{}
	conns      map[*conn]struct{}
	instances  map[string]*instance // by project and name
	operations map[string]*operation
	listeners  map[*listener]struct{}
	execs      []*execution
	requests   []Request
	faults     []*armed
	asked      []string // aliases
	ending     bool     // Terminate waits
	waits      int      // requests for the end of an operation that are being answered
	answered   *sync.Cond
}

// A task is a goroutine of the server, named for the one who waits for it.
type task struct{ name string }

// NewServer starts and returns a server that behaves like LXD 5.0.2 and listens on a unix
// socket in a temporary directory. The caller should call Close when finished.
func NewServer() *Server {
	s := NewUnstartedServer()
	s.Start()
	return s
}

// NewTLSServer starts and returns a server that behaves like LXD 5.0.2 and listens on
// the loopback interface for clients that have the certificate ClientCert.
func NewTLSServer() *Server {
	s := NewUnstartedServer()
	s.StartTLS()
	return s
}

// NewUnstartedServer returns a server that does not listen yet. After changing its
// fields the caller should call Start or StartTLS. Instances and faults can be added
// before and after.
func NewUnstartedServer() *Server {
	s := &Server{
		Version:    LXD50,
		trusted:    map[string]bool{},
		closing:    make(chan struct{}),
		tasks:      map[*task]struct{}{},
		conns:      map[*conn]struct{}{},
		instances:  map[string]*instance{},
		operations: map[string]*operation{},
		listeners:  map[*listener]struct{}{},
	}
	s.answered = sync.NewCond(&s.mu)
	return s
}

// Start listens on a unix socket.
func (s *Server) Start() {
	path := filepath.Join(s.tempDir(), "unix.socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		panic(fmt.Sprintf("lxdtest: %v", err))
	}
	s.Socket = path
	s.serve(&trackingListener{Listener: l, s: s}, "http://unix.socket")
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	s.client = &http.Client{Transport: &http.Transport{DialContext: dial}}
}

func (s *Server) serve(l net.Listener, url string) {
	if s.isClosed() {
		panic("lxdtest: the server has been closed, it cannot be started")
	}
	if s.URL != "" {
		panic("lxdtest: server already started")
	}
	s.Listener, s.URL = l, url
	s.http = &http.Server{
		Handler:  s.routes(),
		ErrorLog: s.ErrorLog,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, tracked(c))
		},
		ConnState: s.told,
	}
	if s.ErrorLog == nil {
		// What net/http reports here are clients that broke off: in tests that is the subject.
		s.http.ErrorLog = log.New(discard{}, "", 0)
	}
	s.spawn("listener "+url, func() {
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.logf("lxdtest: %v", err)
		}
	})
}

// Client returns an HTTP client that reaches the server under the URL s.URL.
func (s *Server) Client() *http.Client { return s.client }

// tempDir is made at its first use, because instances may be added before Start.
func (s *Server) tempDir() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dir == "" {
		dir, err := os.MkdirTemp("", "lxdtest")
		if err != nil {
			panic(fmt.Sprintf("lxdtest: %v", err))
		}
		if os.Geteuid() == 0 {
			// Commands that run as other users look for their directory below this one.
			_ = os.Chmod(dir, 0o711)
		}
		s.dir = dir
	}
	return s.dir
}

// spawn runs f in a goroutine that Close waits for. name is for people.
func (s *Server) spawn(name string, f func()) {
	end := s.begin(name)
	go func() {
		defer end()
		f()
	}()
}

// begin notes a task whose parent is one, too, or the caller.
func (s *Server) begin(name string) (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.beginLocked(name)
}

// enter notes a task that comes from outside; after Close there is none.
func (s *Server) enter(name string) (end func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false
	}
	return s.beginLocked(name), true
}

func (s *Server) beginLocked(name string) (end func()) {
	t := &task{name}
	s.wg.Add(1)
	s.tasks[t] = struct{}{}
	return func() {
		s.mu.Lock()
		delete(s.tasks, t)
		s.mu.Unlock()
		s.wg.Done()
	}
}

// Close ends the server: it kills the processes, cuts the connections, WebSockets
// included, and waits until the last of its goroutines is gone. After 5 seconds it
// says who is still there, and goes on waiting.
func (s *Server) Close() {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	s.mu.Unlock()
	if first {
		close(s.closing)
		s.answered.Broadcast()
		t := time.AfterFunc(5*time.Second, s.logHang)
		defer t.Stop()
		s.mu.Lock()
		operations := make([]*operation, 0, len(s.operations))
		for _, op := range s.operations {
			operations = append(operations, op)
		}
		execs := slices.Clone(s.execs) // of operations that were forgotten, too
		s.mu.Unlock()
		for _, op := range operations {
			op.die()
		}
		for _, x := range execs {
			x.abandon()
		}
		if s.http != nil {
			s.http.Close()
		}
		s.CloseClientConnections()
		if s.client != nil {
			s.client.CloseIdleConnections()
		}
	}
	s.wg.Wait()
	if first {
		s.mu.Lock()
		instances := s.instances
		s.instances, s.operations = map[string]*instance{}, map[string]*operation{}
		dir := s.dir
		s.mu.Unlock()
		for _, i := range instances {
			i.tree.close()
		}
		if dir != "" {
			if err := os.RemoveAll(dir); err != nil {
				s.logf("lxdtest: %v", err)
			}
		}
	}
}

func (s *Server) logHang() {
	s.logf("lxdtest.Server blocked in Close after 5 seconds, waiting for:\n  %s", strings.Join(s.Open(), "\n  "))
}

func (s *Server) logf(format string, args ...any) {
	if s.ErrorLog != nil {
		s.ErrorLog.Printf(format, args...)
	} else {
		log.Printf(format, args...)
	}
}

// Open names what is still open: connections, requests that are being answered, and
// operations that have not ended. The listener is not among them.
func (s *Server) Open() []string {
	s.mu.Lock()
	var names []string
	for t := range s.tasks {
		if !strings.HasPrefix(t.name, "listener ") {
			names = append(names, t.name)
		}
	}
	for c := range s.conns {
		names = append(names, fmt.Sprintf("connection %d from %v", c.number, c.RemoteAddr()))
	}
	operations := make([]*operation, 0, len(s.operations))
	for _, op := range s.operations {
		operations = append(operations, op)
	}
	s.mu.Unlock()
	for _, op := range operations {
		if !op.final() {
			names = append(names, fmt.Sprintf("operation %s (%s)", op.id, op.description))
		}
	}
	sort.Strings(names)
	return names
}

// CloseClientConnections cuts every connection to the server, without a word on
// any of them.
func (s *Server) CloseClientConnections() {
	s.mu.Lock()
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
}

// Die does what a SIGKILL does to the daemon: every connection is cut and every operation
// is forgotten. The commands live on, with broken pipes. The server then answers again,
// as a daemon that was restarted.
func (s *Server) Die() {
	// What comes in from now on belongs to the next life.
	s.mu.Lock()
	operations := s.operations
	s.operations = map[string]*operation{}
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, op := range operations {
		op.die()
	}
	for _, c := range conns {
		c.Close()
	}
}

// Terminate does what a SIGTERM does to the daemon: what changes anything but an operation is refused from now on, and when the last operation has ended, and who
// waits for it has been told, every connection is cut. It returns then, and the server answers again, as a daemon that was restarted.
func (s *Server) Terminate() {
	s.mu.Lock()
	s.ending = true
	operations := slices.Collect(maps.Values(s.operations))
	s.mu.Unlock()
	for _, op := range operations {
		select {
		case <-op.done:
		case <-s.closing:
		}
	}
	s.mu.Lock()
	for s.waits > 0 && !s.closed {
		s.answered.Wait()
	}
	s.mu.Unlock()
	s.Die()
	s.mu.Lock()
	s.ending = false
	s.mu.Unlock()
}

func (s *Server) isEnding() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ending
}

// A Request is one request that the server was asked, after its end. For a WebSocket or
// an SFTP session that is the end of the handshake.
type Request struct {
	Route   Route
	Method  string
	Path    string
	Query   string
	Header  http.Header
	Status  int
	Written int64 // bytes of the answer's body
}

// Requests returns what the server was asked so far, in the order of the answers' ends.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// A conn is one connection of a client, known to the server until its end, also when it
// was hijacked.
type conn struct {
	net.Conn
	s      *Server
	number int
	once   sync.Once
	gone   chan struct{}
	mute   atomic.Bool // nothing is sent any more
	early  []byte      // was read before the connection was accepted

	waiting bool // for the answer about an operation; guarded by s.mu
}

// told notes that an answer has been sent to its last byte: only then does the connection become idle, or close.
func (s *Server) told(nc net.Conn, state http.ConnState) {
	if state != http.StateIdle && state != http.StateClosed {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := tracked(nc); c != nil && c.waiting {
		c.waiting = false
		s.waits--
		s.answered.Broadcast()
	}
}

func (c *conn) Read(p []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(p, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

func (c *conn) Write(p []byte) (int, error) {
	if c.mute.Load() {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

type connKey struct{}

// tracked finds the conn below TLS.
func tracked(c net.Conn) *conn {
	for {
		switch t := c.(type) {
		case *conn:
			return t
		case interface{ NetConn() net.Conn }:
			c = t.NetConn()
		default:
			return nil
		}
	}
}

func (c *conn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		err = c.Conn.Close()
		close(c.gone)
		c.s.mu.Lock()
		delete(c.s.conns, c)
		c.s.mu.Unlock()
	})
	return err
}

// A trackingListener hands out conns.
type trackingListener struct {
	net.Listener
	s     *Server
	count int
}

func (l *trackingListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.count++
		t := &conn{Conn: c, s: l.s, number: l.count, gone: make(chan struct{})}
		l.s.mu.Lock()
		closed := l.s.closed
		l.s.conns[t] = struct{}{}
		l.s.mu.Unlock()
		if closed {
			t.Close()
		}
		if _, unix := c.(*net.UnixConn); unix && l.s.Version.SilenceBlocks {
			early := make([]byte, 8)
			if _, err := io.ReadFull(c, early); err != nil {
				t.Close()
				continue
			}
			t.early = early
		}
		return t, nil
	}
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
