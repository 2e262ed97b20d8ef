package transport

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/lxdtransport/transport/internal/sftp"
)

// SFTP sessions, shared while they are in use. LXD up to 5.0.2 does not stop an instance while there is one, and later ones neither snapshot nor
// start it: they are opened late and closed soon. But every session costs a connection, two round trips and a file system sync at its end, so that
// many small files must not have one each.

const (
	// sessionIdle is how long a session waits for its next user: longer than it takes to come from one file to the next.
	sessionIdle = 250 * time.Millisecond
	// sessionUsers is how many use a session before another is opened. The server carries out all but reads and writes
	// of one session one after the other.
	sessionUsers = 4
	// maxSessions bounds the sessions; when all have as many users, they get more.
	maxSessions = 4
)

// sessions are the SFTP connections of one transport.
type sessions struct {
	mu      sync.Mutex // guards all that follows, and the sessions' fields
	all     []*session // those that can get more users
	closing sync.WaitGroup
}

// session is an SFTP connection.
type session struct {
	*sftp.Client // after ready, if err is nil

	ready chan struct{} // closed when it is open, or could not be opened
	err   error

	users   int
	retired bool        // it gets no more users
	idle    *time.Timer // closes it; nil while there are users
}

// errAgain: who was about to open a session gave up.
var errAgain = errors.New("the session was not opened")

// session returns a session, or an error. alone is for who keeps the server busy with many requests: nobody joins it. It has to be given
// back with release.
func (t *LXD) session(ctx context.Context, alone bool) (*session, error) {
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		s, open := t.sessions.join(alone)
		if open {
			s.Client, s.err = t.openSFTP(ctx)
			if err := s.err; err != nil {
				if ctx.Err() != nil {
					s.err = errAgain
				}
				close(s.ready)
				t.release(s, true)
				return nil, err
			}
			close(s.ready)
			return s, nil
		}
		select {
		case <-s.ready:
		case <-ctx.Done():
			t.release(s, false)
			return nil, context.Cause(ctx)
		}
		if s.err == nil {
			return s, nil
		}
		t.release(s, true)
		if s.err != errAgain {
			return nil, s.err
		}
	}
}

// join adds a user to the session with the fewest, or to a new one, which the caller has to open.
func (p *sessions) join(alone bool) (_ *session, open bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var best *session
	for _, s := range p.all {
		if s.broken() {
			continue
		}
		if best == nil || s.users < best.users {
			best = s
		}
	}
	most := sessionUsers
	if alone {
		most = 1
	}
	if best == nil || best.users >= most && (alone || len(p.all) < maxSessions) {
		best = &session{ready: make(chan struct{})}
		p.all = append(p.all, best)
		open = true
	}
	if best.idle != nil {
		best.idle.Stop()
		best.idle = nil
	}
	best.users++
	if alone {
		p.remove(best)
	}
	return best, open
}

// broken reports whether a session's connection has ended.
func (s *session) broken() bool {
	select {
	case <-s.ready:
		return s.err != nil || s.Err() != nil
	default:
		return false
	}
}

// remove keeps a session from getting more users. p.mu is held.
func (p *sessions) remove(s *session) {
	for i, other := range p.all {
		if other == s {
			p.all = append(p.all[:i:i], p.all[i+1:]...)
			return
		}
	}
}

// release gives a session back. One that is retired, because it may not answer any more or is still busy with what nobody
// waits for, gets no more users.
func (t *LXD) release(s *session, retire bool) {
	p := &t.sessions
	p.mu.Lock()
	s.users--
	s.retired = s.retired || retire || s.broken()
	switch {
	case s.retired:
		p.remove(s)
	case s.users == 0:
		p.remove(s) // it may have been alone
		p.all = append(p.all, s)
		s.idle = time.AfterFunc(sessionIdle, func() { p.expire(s) })
	}
	last := s.users == 0 && s.retired
	p.mu.Unlock()
	if last && s.Client != nil {
		s.Client.Close()
	}
}

// expire closes a session that nobody has come for.
func (p *sessions) expire(s *session) {
	p.mu.Lock()
	if s.users > 0 || s.retired || s.idle == nil {
		p.mu.Unlock()
		return
	}
	s.retired = true
	p.remove(s)
	p.closing.Add(1)
	p.mu.Unlock()
	s.Client.Close()
	p.closing.Done()
}

// close closes the sessions, which have no users any more.
func (p *sessions) close() {
	p.mu.Lock()
	all := p.all
	p.all = nil
	for _, s := range all {
		s.retired = true
		if s.idle != nil {
			s.idle.Stop()
		}
	}
	p.mu.Unlock()
	for _, s := range all {
		s.Client.Close()
	}
	p.closing.Wait()
}

// openSFTP opens a connection. ctx bounds no more than that.
func (t *LXD) openSFTP(ctx context.Context) (*sftp.Client, error) {
	conn, err := t.rest.upgrade(ctx, t.path("/sftp"), t.query(), "sftp")
	if no := (*apiError)(nil); errors.As(err, &no) && no.code == http.StatusNotFound {
		// Either the instance or the endpoint.
		if err := t.explain(ctx, err); errors.Is(err, ErrNoHost) {
			return nil, err
		}
		return nil, errNoSFTP
	}
	if err != nil {
		return nil, t.explain(ctx, err)
	}
	hello, cancel := within(ctx, min(connectTimeout, t.liveness))
	defer cancel()
	watched := &watchedConn{ReadWriteCloser: conn, patience: t.liveness}
	c, err := sftp.New(hello, watched)
	if err != nil {
		return nil, err
	}
	watched.watch(c.Waiting)
	return c, nil
}
