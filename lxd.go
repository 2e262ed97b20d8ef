package transport

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	lxd "github.com/canonical/lxd/client"
)

// LXDOptions are the options of [NewLXD]; nil means all defaults.
type LXDOptions struct {
	// Project is the LXD project that the instance is in. "": the connection's (UseProject), or the default project.
	Project string

	// TLSClientCert and TLSClientKey are a certificate and its key, PEM, that this transport shows to the
	// server. "": the connection's. They are an error on a unix socket, which knows no certificates.
	TLSClientCert, TLSClientKey string

	// TLSServerCert, PEM, and ServerFingerprint, the SHA-256 of a certificate in hexadecimal digits as `lxc info` prints
	// it, pin the server's certificate: it has to be this very one, on every connection of this transport, besides
	// what the connection itself verifies. "": nothing besides. They are an error on a unix socket.
	TLSServerCert, ServerFingerprint string

	// Logger gets what happens to commands at level Debug, without their arguments, environment, input
	// and output. nil: silent.
	Logger *slog.Logger

	// MaxExecs is the most commands that run at the same time on this transport; others wait for their turn in
	// the order in which they came. 0: no limit.
	MaxExecs int

	// ClusterAddresses are host:port of members of the server's cluster, besides the one of the connection: when one cannot be reached, the
	// next command goes through another. [DialLXD] learns them from the cluster itself, if it may. They have no meaning for a unix socket.
	ClusterAddresses []string

	// Liveness is how long the server may be silent while a command runs, before it is taken for dead: a server or a link that vanished without
	// a word, or a member of a cluster that hangs behind one that does not. The error then says that the command may still run. A command
	// that prints nothing, and a writer that takes nothing, are no silence of the server's, which is asked again and again. While a command is being
	// started the waits add up: that for the answer to its request, for the reason of a refusal, for its sockets (10 s at most) and, without those,
	// for what became of it (18 s at most). At least 3 s; 0: a minute.
	Liveness time.Duration

	product string // what the server said that it is, when DialLXD asked
}

// LXD is the [Transport] into one instance, container or virtual machine, of an LXD server. It is a [Starter]. A
// virtual machine needs LXD's own agent in it, as `lxc exec` does.
//
// On top of what [Transport] promises:
//
//   - Signals go to the command's process alone, as LXD delivers them (they are sent over the control socket);
//     its children are not signalled.
//   - When ctx ends, what the command has started is killed after it by a second command, which needs /bin/sh and /proc in the
//     instance. It is recognised by a variable TRANSPORT_COMMAND_… in its environment, and by descent from a process that has it.
//     A process that has changed its environment, and whose parents have ended, is not found; nothing stops such a one but
//     the end of its instance.
//   - LXD reports a command that was ended by signal n with status 128+n, so that [ExitError].Signal is always "".
//   - LXD before 5.0.3 tells a command's status only when the last process that holds its output has ended. When that
//     takes longer than WaitDelay after the command's own end, the status is unknown and the error says so.
//   - Arguments and environment appear in LXD's operations, which everyone who may view the project can read, and in the
//     process list of the LXD host. Send secrets over Stdin.
type LXD struct {
	instance string
	project  string
	rest     *restClient
	sessions sessions
	log      *slog.Logger

	liveness time.Duration
	reaper   reaper
	execs    chan struct{} // a place for every running command; nil: no limit
	starts   chan struct{} // a place for every command that is being connected

	closing context.Context // ends with Close, cause ErrClosed
	close   context.CancelCauseFunc

	mu      sync.Mutex // guards the rest
	closed  bool
	running sync.WaitGroup // methods that have not returned; Add is called with mu held and closed false
}

// maxStarts bounds how many commands are between their request and the connection of their sockets. LXD gives up on a
// command whose sockets are not all connected 5 s (since 6.9: 10 s) after the request; many at once on a busy server
// would all miss that. It starts some tens of commands a second on one core, so that this bound costs nothing.
const maxStarts = 32

// NewLXD returns a transport into an instance over a connection that the caller already has, from [lxd.ConnectLXD] or
// [lxd.ConnectLXDUnix], with UseProject if wanted. It takes the connection's address, TLS configuration, proxy, cookies
// and credentials (OIDC tokens included) and makes connections of its own from them, which it keeps alive and
// shares among commands; the caller's is not modified. It sends nothing: that the server or the instance is missing shows
// at the first use.
func NewLXD(server lxd.InstanceServer, instance string, opts *LXDOptions) (*LXD, error) {
	if opts == nil {
		opts = new(LXDOptions)
	}
	t, err := newLXD(server, instance, opts)
	if err != nil {
		return nil, fmt.Errorf("transport: LXD instance %q: %w", instance, err)
	}
	return t, nil
}

func newLXD(server lxd.InstanceServer, instance string, opts *LXDOptions) (*LXD, error) {
	fail := func(err error) (*LXD, error) { return nil, err }
	if err := checkInstance(instance); err != nil {
		return fail(err)
	}
	if err := opts.check(); err != nil {
		return fail(err)
	}
	if server == nil {
		return fail(errors.New("the connection (server) is nil"))
	}
	rest, err := newRESTClient(server, opts)
	if err != nil {
		return fail(err)
	}
	t := &LXD{instance: instance, project: rest.project, rest: rest, log: opts.Logger, liveness: rest.patience, starts: make(chan struct{}, maxStarts)}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	t.log = t.log.With("instance", instance)
	if opts.MaxExecs > 0 {
		t.execs = make(chan struct{}, opts.MaxExecs)
	}
	t.reaper.run = t.runReaper
	t.closing, t.close = context.WithCancelCause(context.Background())
	return t, nil
}

func checkInstance(name string) error {
	switch {
	case name == "":
		return errors.New("the instance's name is empty")
	case strings.ContainsAny(name, "/?#\x00"), name == ".", name == "..":
		return errors.New("that is no instance's name; commands run in instances, not in snapshots")
	}
	return nil
}

func (o *LXDOptions) check() error {
	switch {
	case o.Liveness != 0 && o.Liveness < minLiveness:
		return fmt.Errorf("LXDOptions.Liveness is %v, less than %v", o.Liveness, minLiveness)
	case o.MaxExecs < 0:
		return fmt.Errorf("LXDOptions.MaxExecs is negative: %d", o.MaxExecs)
	}
	return nil
}

// Close ends running commands as if their contexts had ended, stops transfers, waits for all of them and
// closes the connections. It may be called more than once; every call returns after all is done.
func (t *LXD) Close() error {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.close(ErrClosed)
	t.running.Wait()
	t.sessions.close()
	t.rest.http.CloseIdleConnections()
	return nil
}

// begin counts a method as running and binds its context to the transport's end. end must be called when it has returned.
func (t *LXD) begin(ctx context.Context) (_ context.Context, end func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, nil, ErrClosed
	}
	t.running.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(t.closing, func() { cancel(ErrClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
		t.running.Done()
	}, nil
}

// acquire takes a place in a queue. Go serves the senders that wait for a channel in the order in which they came.
func acquire(ctx context.Context, places chan struct{}) error {
	if places == nil {
		return nil
	}
	select {
	case places <- struct{}{}:
		return nil
	default:
	}
	select {
	case places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func release(places chan struct{}) {
	if places != nil {
		<-places
	}
}

// tlsConfig returns the connection's TLS configuration with what the options add.
func (o *LXDOptions) tlsConfig(base *tls.Config) (*tls.Config, error) {
	cfg := base.Clone()
	// HTTP/2 has no upgrade to a WebSocket that LXD knows.
	cfg.NextProtos = []string{"http/1.1"}
	if cfg.ClientSessionCache == nil {
		// Every command opens four sockets; resumed sessions save most of their handshakes.
		cfg.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	}
	if o.TLSClientCert != "" || o.TLSClientKey != "" {
		pair, err := tls.X509KeyPair([]byte(o.TLSClientCert), []byte(o.TLSClientKey))
		if err != nil {
			return nil, fmt.Errorf("LXDOptions.TLSClientCert and TLSClientKey: %w", err)
		}
		cfg.Certificates, cfg.GetClientCertificate = []tls.Certificate{pair}, nil
	}
	want, err := o.pin()
	if err != nil || want == "" {
		return cfg, err
	}
	verify := cfg.VerifyConnection
	cfg.VerifyConnection = func(s tls.ConnectionState) error { // also called for a resumed session
		leaf := s.PeerCertificates[0]
		if now := time.Now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
			return fmt.Errorf("the server's certificate is valid from %v to %v, and now it is %v", leaf.NotBefore, leaf.NotAfter, now.UTC().Truncate(time.Second))
		}
		if got := fingerprint(leaf); got != want {
			return fmt.Errorf("the server's certificate has the fingerprint %s, but %s is pinned: either it was replaced, or this is not the server", got, want)
		}
		if verify != nil {
			return verify(s)
		}
		return nil
	}
	return cfg, nil
}

// pin returns the fingerprint that the options ask for, or "".
func (o *LXDOptions) pin() (string, error) {
	want := strings.ToLower(strings.ReplaceAll(o.ServerFingerprint, ":", ""))
	if want != "" {
		if b, err := hex.DecodeString(want); err != nil || len(b) != sha256.Size {
			return "", fmt.Errorf("LXDOptions.ServerFingerprint %q is not 64 hexadecimal digits", o.ServerFingerprint)
		}
	}
	if o.TLSServerCert == "" {
		return want, nil
	}
	block, _ := pem.Decode([]byte(o.TLSServerCert))
	if block == nil {
		return "", errors.New("LXDOptions.TLSServerCert is not PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", fmt.Errorf("LXDOptions.TLSServerCert: %w", err)
	}
	if got := fingerprint(cert); want != "" && got != want {
		return "", errors.New("LXDOptions.TLSServerCert and ServerFingerprint contradict each other")
	} else {
		want = got
	}
	return want, nil
}

func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}
