package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"sync"
	"time"
)

// members are the addresses at which a cluster can be entered. Every member knows all instances and operations, and passes on what is another's.
type members struct {
	first string // host:port of the connection: what net/http believes to talk to
	tls   *tls.Config
	plain func(ctx context.Context, network, addr string) (net.Conn, error)

	mu   sync.Mutex // guards the rest
	all  []string   // first among them
	next int        // the one that answered last
}

// memberTimeout bounds the connecting to one member: one that hangs takes connections, and says nothing.
const memberTimeout = 3 * time.Second

func newMembers(base string, config *tls.Config, plain func(context.Context, string, string) (net.Conn, error)) *members {
	u, err := url.Parse(base)
	if err != nil {
		return nil
	}
	m := &members{first: u.Host, tls: config.Clone(), plain: plain, all: []string{u.Host}}
	if m.tls.ServerName == "" {
		m.tls.ServerName = u.Hostname()
	}
	return m
}

// add makes more of them known.
func (m *members) add(hosts []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, h := range hosts {
		if !slices.Contains(m.all, h) {
			m.all = append(m.all, h)
		}
	}
}

// shun has the next connection begin with another one.
func (m *members) shun() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next = (m.next + 1) % len(m.all)
}

// dial connects to the member that answered last, or to the first of the others that does. Its certificate has to be the cluster's: it is
// checked before anything is sent.
func (m *members) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	m.mu.Lock()
	start, all := m.next, slices.Clone(m.all)
	m.mu.Unlock()
	var errs []error
	for i := range all {
		n := (start + i) % len(all)
		conn, err := m.connect(ctx, network, all[n], len(all) > 1)
		if err == nil {
			m.mu.Lock()
			m.next = n
			m.mu.Unlock()
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, err
		}
		if len(all) > 1 {
			err = fmt.Errorf("cluster member %s: %w", all[n], err)
		}
		errs = append(errs, err)
	}
	if len(errs) == 1 {
		return nil, errs[0]
	}
	return nil, errors.Join(errs...)
}

func (m *members) connect(ctx context.Context, network, addr string, others bool) (net.Conn, error) {
	if others {
		var cancel context.CancelFunc
		ctx, cancel = within(ctx, memberTimeout)
		defer cancel()
	}
	conn, err := m.plain(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	c := tls.Client(conn, m.tls)
	if err := c.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}
