package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	xssh "golang.org/x/crypto/ssh"

	"github.com/lxdtransport/transport"
)

const (
	// mostSessions is how many sessions sshd allows on a connection unless its MaxSessions says otherwise.
	mostSessions = 10

	// spareSessions of them are kept for those that end commands.
	spareSessions = 2
)

// connection is a connection to the host that has logged in. It carries several sessions.
type connection struct {
	t      *Transport
	link   *link
	client *xssh.Client
	asked  chan chan struct{} // to ping
	gone   chan struct{}      // closed when it has ended

	// Guarded by t.mu.
	sessions int  // that the host has not closed
	full     bool // the host refuses more, until one ends
}

// link is the network connection below. x/crypto tells its channels of its end in the same way as of their own.
type link struct {
	net.Conn
	heard atomic.Int64 // when something was received, in ns

	mu  sync.Mutex // guards err
	err error      // why it has ended
}

func (l *link) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	if n > 0 {
		l.heard.Store(time.Now().UnixNano())
	}
	if err != nil {
		if err == io.EOF {
			err = errors.New("the host closed it")
		}
		l.fail(err)
	}
	return n, err
}

func (l *link) Write(p []byte) (int, error) {
	n, err := l.Conn.Write(p)
	if err != nil {
		l.fail(err)
	}
	return n, err
}

func (l *link) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err = err
	}
}

// drop closes the connection for a reason.
func (l *link) drop(why error) {
	l.fail(why)
	l.Conn.Close()
}

// lost says why the connection has ended.
func (l *link) lost() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		return errors.New("it broke off")
	}
	return l.err
}

// session opens a session on a connection that has room for one, or on a new one. What ends commands may have more room.
func (t *Transport) session(ctx context.Context, spare bool) (*session, error) {
	for {
		c, fresh, err := t.reserve(ctx, spare)
		if err != nil {
			return nil, err
		}
		s, err := c.open(ctx)
		if err == nil {
			return s, nil
		}
		refused, ok := errors.AsType[*xssh.OpenChannelError](err)
		dead := c.dead()
		t.release(c, ok)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case ok && !fresh, dead && !fresh:
			continue // with another connection
		case ok:
			return nil, fmt.Errorf("the host refuses a session: %w", refused)
		}
		return nil, fmt.Errorf("the connection was lost: %w", c.link.lost())
	}
}

// reserve returns a connection with a place for a session on it.
func (t *Transport) reserve(ctx context.Context, spare bool) (_ *connection, fresh bool, err error) {
	limit := mostSessions
	if !spare {
		limit -= spareSessions
	}
	if c := t.vacant(limit); c != nil {
		return c, false, nil
	}
	select {
	case t.dialing <- struct{}{}:
	case <-ctx.Done():
		return nil, false, context.Cause(ctx)
	}
	defer func() { <-t.dialing }()
	if c := t.vacant(limit); c != nil { // made meanwhile, or left
		return c, false, nil
	}
	c, err := t.dial(ctx)
	return c, true, err
}

// vacant takes a place on one of the connections. It returns nil if there is none.
func (t *Transport) vacant(limit int) *connection {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.conns {
		if !c.full && c.sessions < limit && !c.dead() {
			c.sessions++
			return c
		}
	}
	return nil
}

// release gives a place back. A connection that is not needed any more is closed, but for the last.
func (t *Transport) release(c *connection, refused bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c.sessions--
	c.full = refused
	if c.sessions > 0 || len(t.conns) < 2 && !refused && !t.closed {
		return
	}
	t.conns = slices.DeleteFunc(t.conns, func(other *connection) bool { return other == c })
	c.link.drop(errors.New("it is not needed any more"))
}

func (c *connection) dead() bool {
	select {
	case <-c.gone:
		return true
	default:
		c.link.mu.Lock()
		defer c.link.mu.Unlock()
		return c.link.err != nil
	}
}

// dial makes a connection, with a place taken on it.
func (t *Transport) dial(ctx context.Context) (*connection, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, t.opts.Timeout, fmt.Errorf("no connection within %v", t.opts.Timeout))
	defer cancel()
	config, done, err := t.clientConfig()
	if err != nil {
		return nil, err
	}
	defer done()
	raw, err := t.opts.DialContext(ctx, "tcp", t.target.address)
	switch dns := (*net.DNSError)(nil); {
	case err != nil && ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.As(err, &dns) && dns.IsNotFound:
		return nil, also(err, transport.ErrNoHost)
	case err != nil:
		return nil, err
	}
	c := &connection{t: t, link: &link{Conn: raw}, asked: make(chan chan struct{}), gone: make(chan struct{}), sessions: 1}
	c.link.heard.Store(time.Now().UnixNano())
	stop := context.AfterFunc(ctx, func() { c.link.drop(context.Cause(ctx)) })
	conn, channels, requests, err := xssh.NewClientConn(c.link, t.target.address, config.ClientConfig)
	if !stop() || err != nil {
		raw.Close()
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case config.hostKeyErr != nil:
			return nil, config.hostKeyErr
		case strings.Contains(err.Error(), "unable to authenticate"):
			return nil, also(fmt.Errorf("the host takes none of the %d keys (Options.KeyFiles, Agent, Signers): %w", config.keys, err), transport.ErrUnauthorized)
		}
		return nil, err
	}
	c.client = xssh.NewClient(conn, channels, requests)
	t.ended.Add(3)
	go func() { // ends with the connection
		defer t.ended.Done()
		_ = c.client.Wait()
		c.link.fail(errors.New("it broke off"))
		close(c.gone)
		t.remove(c)
	}()
	go c.ping()
	go c.watch()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conns = append(t.conns, c)
	return c, nil
}

// remove forgets a connection that has ended.
func (t *Transport) remove(c *connection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conns = slices.DeleteFunc(t.conns, func(other *connection) bool { return other == c })
}

// ping asks the host whether it is there, when somebody wants to know it and when it has been silent for a while.
func (c *connection) ping() {
	defer c.t.ended.Done()
	every := c.t.opts.Liveness / 4
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		var waiting []chan struct{}
		select {
		case w := <-c.asked:
			waiting = append(waiting, w)
		case <-tick.C:
			if c.silent() < every {
				continue
			}
		case <-c.gone:
			return
		}
		for more := true; more; {
			select {
			case w := <-c.asked:
				waiting = append(waiting, w)
			default:
				more = false
			}
		}
		// The host does not know it, and that is an answer.
		if _, _, err := c.client.SendRequest("keepalive@openssh.com", true, nil); err != nil {
			<-c.gone
			return
		}
		for _, w := range waiting {
			close(w)
		}
	}
}

func (c *connection) silent() time.Duration { return time.Since(time.Unix(0, c.link.heard.Load())) }

// watch closes the connection when the host has been silent for too long. A ping may be waiting for room to be sent.
func (c *connection) watch() {
	defer c.t.ended.Done()
	tick := time.NewTicker(c.t.opts.Liveness / 4)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if c.silent() >= c.t.opts.Liveness {
				c.link.drop(fmt.Errorf("the host has not answered for %v", c.t.opts.Liveness))
			}
		case <-c.gone:
			return
		}
	}
}

// answers reports whether the host answers a question that is asked now.
func (c *connection) answers(ctx context.Context) bool {
	w := make(chan struct{})
	select {
	case c.asked <- w:
	case <-c.gone:
		return false
	case <-ctx.Done():
		return false
	}
	select {
	case <-w:
		return true
	case <-c.gone:
		return false
	case <-ctx.Done():
		return false
	}
}

// session is a channel for one command or for SFTP.
type session struct {
	xssh.Channel
	conn   *connection
	known  chan struct{} // closed when status is set
	closed chan struct{} // closed when the host has closed it, or the connection has ended

	status *transport.ExitError // Code may be 0

	// Its place on the connection is given back when both the host and whoever has opened it are done: the connection is needed until then.
	ends sync.Once
	done atomic.Int32
}

// open opens a session on a connection with a place for it.
func (c *connection) open(ctx context.Context) (*session, error) {
	type opened struct {
		ch       xssh.Channel
		requests <-chan *xssh.Request
	}
	s := &session{conn: c, known: make(chan struct{}), closed: make(chan struct{})}
	o, err := within(ctx, func() (opened, error) {
		ch, requests, err := c.client.OpenChannel("session", nil)
		return opened{ch, requests}, err
	}, func(o opened) {
		go xssh.DiscardRequests(o.requests)
		o.ch.Close()
	})
	if err != nil {
		return nil, err
	}
	s.Channel = o.ch
	go s.listen(o.requests) // ends with the session
	return s, nil
}

// listen takes the host's requests, the command's status among them.
func (s *session) listen(requests <-chan *xssh.Request) {
	for r := range requests {
		if s.status == nil {
			if s.status = parseStatus(r); s.status != nil {
				close(s.known)
			}
		}
		if r.WantReply {
			_ = r.Reply(false, nil)
		}
	}
	close(s.closed)
	s.leave()
}

// leave is called twice.
func (s *session) leave() {
	if s.done.Add(1) == 2 {
		s.conn.t.release(s.conn, false)
	}
}

// parseStatus returns the status that a request tells of, or nil.
func parseStatus(r *xssh.Request) *transport.ExitError {
	switch r.Type {
	case "exit-status":
		var m struct{ Status uint32 }
		if xssh.Unmarshal(r.Payload, &m) == nil {
			code := int(m.Status & 0xff)
			if code == 0 && m.Status != 0 {
				code = 255 // whatever it is, it is not 0
			}
			return &transport.ExitError{Code: code}
		}
	case "exit-signal":
		var m struct {
			Signal   string
			Dumped   bool
			Error    string
			Language string
		}
		if xssh.Unmarshal(r.Payload, &m) == nil {
			sig := transport.Signal(m.Signal)
			if n, ok := signalNumbers[sig]; ok {
				return &transport.ExitError{Code: 128 + n, Signal: sig}
			}
			return &transport.ExitError{Code: 128}
		}
	}
	return nil
}

// signalNumbers are those of the signals that SSH has names for, which are the same on all systems.
var signalNumbers = map[transport.Signal]int{
	"HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "ABRT": 6, "FPE": 8, "KILL": 9, "USR1": 10, "SEGV": 11, "USR2": 12, "PIPE": 13, "ALRM": 14, "TERM": 15,
}

// end closes the session unless the host has done so. It does not wait for the host's answer.
func (s *session) end() {
	s.ends.Do(func() {
		if !s.isClosed() {
			go s.Close() // ends with the connection at the latest
		}
		s.leave()
	})
}

func (s *session) isClosed() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

// request sends a request that the host has to agree to.
func (s *session) request(ctx context.Context, name string, payload any) error {
	var bytes []byte
	if payload != nil {
		bytes = xssh.Marshal(payload)
	}
	ok, err := within(ctx, func() (bool, error) { return s.SendRequest(name, true, bytes) }, nil)
	switch {
	case ctx.Err() != nil && err != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("the connection was lost: %w", s.conn.link.lost())
	case !ok:
		return fmt.Errorf("the host refuses the request %q", name)
	}
	return nil
}
