package transport

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/gorilla/websocket"
)

// restClient is our own way to the server of a connection: requests over connections that are kept, WebSockets, and the
// connection's credentials on both.
type restClient struct {
	server  lxd.InstanceServer
	base    string // http://unix.socket or https://host:port
	project string
	socket  string // path of the unix socket, "" if it is not one or not known

	patience time.Duration // bounds a request and its answer

	http    *http.Client
	dialer  websocket.Dialer
	cluster *members // nil: one address

	product atomic.Pointer[string] // what the server says that it is; nil: not known

	wrapped bool       // the connection's requests go through a wrapper that may add headers
	mu      sync.Mutex // guards extra; held while the wrapper is asked
	extra   http.Header
}

const (
	// idleTimeout is below the 30 s after which LXD since 6.8 closes idle connections, so that a request rarely
	// meets one that is just being closed.
	idleTimeout = 20 * time.Second
	maxIdle     = 64

	// maxAnswer bounds a JSON answer. An operation repeats the command and its environment, 2 MiB at most, which
	// JSON may make six times as long.
	maxAnswer = 16 << 20
)

func newRESTClient(server lxd.InstanceServer, opts *LXDOptions) (*restClient, error) {
	info, err := server.GetConnectionInfo()
	if err != nil {
		return nil, fmt.Errorf("the connection: %w", err)
	}
	client, err := server.GetHTTPClient()
	if err != nil {
		return nil, fmt.Errorf("the connection: %w", err)
	}
	r := &restClient{server: server, base: strings.TrimSuffix(info.URL, "/"), project: opts.Project, socket: info.SocketPath, patience: cmp.Or(opts.Liveness, defaultLiveness)}
	if r.project == "" {
		r.project = info.Project
	}
	if opts.product != "" {
		r.product.Store(&opts.product)
	}
	var t *http.Transport
	switch rt := client.Transport.(type) {
	case *http.Transport:
		t = rt.Clone()
	case lxd.HTTPTransporter:
		t = rt.Transport().Clone()
		r.wrapped = true
	default:
		return nil, fmt.Errorf("the connection's HTTP transport is a %T, which tells no way to the server", client.Transport)
	}

	// Connections are kept, but not on a unix socket: LXD's accept loop waits there for the first bytes of every connection, and one
	// that net/http dials and then does not need, because another has become free, blocks all others as long as it is kept.
	// Connecting costs next to nothing there.
	t.DisableKeepAlives = !strings.HasPrefix(r.base, "https:")
	t.MaxIdleConns, t.MaxIdleConnsPerHost = 0, maxIdle
	t.IdleConnTimeout = idleTimeout
	t.MaxConnsPerHost = 0       // every running command keeps one
	t.ResponseHeaderTimeout = 0 // requests are bounded by their contexts
	t.ForceAttemptHTTP2 = false
	t.ReadBufferSize, t.WriteBufferSize = 1<<10, 1<<10 // every running command holds a connection
	if t.DialContext == nil {
		// The connection's TLS dialer does not obey contexts, so that we dial the plain connection ourselves.
		t.DialContext = (&net.Dialer{Timeout: connectTimeout}).DialContext
	}
	if strings.HasPrefix(r.base, "https:") && (t.TLSClientConfig != nil || t.DialTLSContext == nil) {
		base := t.TLSClientConfig
		if base == nil {
			return nil, errors.New("the connection has no TLS configuration")
		}
		if t.TLSClientConfig, err = opts.tlsConfig(base); err != nil {
			return nil, err
		}
		t.DialTLSContext = nil
		if r.cluster = newMembers(r.base, t.TLSClientConfig, t.DialContext); r.cluster != nil {
			r.cluster.add(opts.ClusterAddresses)
			t.DialTLSContext = r.cluster.dial
		}
	} else if opts.TLSClientCert+opts.TLSClientKey+opts.TLSServerCert+opts.ServerFingerprint != "" {
		return nil, fmt.Errorf("LXDOptions has TLS settings, but the connection (%s) does not use our TLS", r.base)
	}
	r.http = &http.Client{
		Transport: t,
		Jar:       client.Jar,
		// A redirect would carry the credentials elsewhere, and no LXD sends one.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	r.dialer = websocket.Dialer{
		NetDialContext:    bounded(t.DialContext),
		NetDialTLSContext: bounded(t.DialTLSContext),
		TLSClientConfig:   t.TLSClientConfig,
		Proxy:             t.Proxy,
		Jar:               client.Jar,
		ReadBufferSize:    readBuffer,
		WriteBufferSize:   stdinMessage + maxFrameHeader,
		WriteBufferPool:   new(sync.Pool),
	}
	return r, nil
}

// stale takes note that an answer did not come. If that is because of the member of the cluster that was asked, the next question goes to another.
func (r *restClient) stale() {
	r.http.CloseIdleConnections() // they may be as dead
	if r.cluster != nil {
		r.cluster.shun()
	}
}

// where names the server's address.
func (r *restClient) where() string {
	if strings.HasPrefix(r.base, "http:") {
		return r.socket
	}
	return r.base
}

// who names the server as far as that is known.
func (r *restClient) who() string {
	if p := r.product.Load(); p != nil {
		return *p
	}
	return "the server"
}

// ask asks the server who it is, unless that is known. It does not tell everybody.
func (r *restClient) ask(ctx context.Context) string {
	if r.product.Load() == nil {
		ctx, cancel := within(ctx, min(r.patience, connectTimeout))
		defer cancel()
		var info serverInfo
		if r.call(ctx, http.MethodGet, "/1.0", nil, nil, &info) == nil && info.Environment.Server != "" {
			name := info.product()
			r.product.Store(&name)
		}
	}
	return r.who()
}

// request makes a request with the connection's credentials. path begins with /1.0.
func (r *restClient) request(ctx context.Context, method, path string, query url.Values, body io.Reader) (*http.Request, error) {
	u := r.base + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, body)
	if err != nil {
		return nil, err
	}
	header, err := r.header(ctx)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, header)
	return req, nil
}

// over is a context that has ended.
var over = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// header returns the headers with which the connection sends its requests: User-Agent, OIDC token, and what
// a wrapper adds. Our sockets need them as well.
//
// The official client tells nobody its token, but writes it into the requests that it is given, before it sends them: one whose
// context has ended is not sent.
func (r *restClient) header(ctx context.Context) (http.Header, error) {
	req, err := http.NewRequestWithContext(over, http.MethodGet, r.base+"/1.0", nil)
	if err != nil {
		return nil, err
	}
	if resp, err := r.server.DoHTTP(req); err == nil {
		resp.Body.Close()
	}
	req.Header.Del("Cookie") // our clients add those of the jar themselves
	if !r.wrapped {
		return req.Header, nil
	}
	// A wrapper may change a copy of the request; what then is sent shows on the wire only.
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.extra == nil {
		if err := r.learn(ctx); err != nil {
			return nil, err
		}
	}
	maps.Copy(req.Header, r.extra)
	return req.Header, nil
}

// learn sends a request through the connection's own wrapper and keeps the headers that went out. r.mu is held.
func (r *restClient) learn(ctx context.Context) error {
	sent := http.Header{}
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteHeaderField: func(key string, values []string) {
		switch http.CanonicalHeaderKey(key) {
		case "Host", "Connection", "Cookie", "Accept-Encoding", "Content-Length", "Transfer-Encoding":
		default:
			sent[http.CanonicalHeaderKey(key)] = values
		}
	}})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.base+"/1.0", nil)
	if err != nil {
		return err
	}
	resp, err := r.server.DoHTTP(req)
	if err != nil {
		return r.explainDial(err)
	}
	resp.Body.Close()
	r.extra = sent
	return nil
}

// renew has the connection get new credentials after an answer of 401, and reports whether there is a point in
// asking again. The official client does so in DoHTTP, without obeying a context.
func (r *restClient) renew(ctx context.Context, old string) bool {
	if r.wrapped {
		r.mu.Lock()
		r.extra = nil
		r.mu.Unlock()
	} else if old == "" {
		return false // a client certificate does not change by asking
	} else {
		done := make(chan struct{})
		go func() { // not waited for when ctx ends: it may ask a person to log in
			defer close(done)
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.base+"/1.0", nil)
			if err != nil {
				return
			}
			if resp, err := r.server.DoHTTP(req); err == nil {
				resp.Body.Close()
			}
		}()
		select {
		case <-done:
		case <-ctx.Done():
			return false
		}
	}
	header, err := r.header(ctx)
	return err == nil && header.Get("Authorization") != old
}

// answer is what LXD wraps its JSON in.
type answer struct {
	Type      string          `json:"type"` // sync, async or error
	ErrorCode int             `json:"error_code"`
	Error     string          `json:"error"`
	Metadata  json.RawMessage `json:"metadata"`
}

// apiError is an answer that says no.
type apiError struct {
	code    int    // HTTP status, or the error_code of an error that came with status 200
	text    string // what the server said, bounded
	foreign bool   // it is not LXD's JSON, but a proxy's page perhaps
	who     string // "": the server
}

func (e *apiError) Error() string {
	who := cmp.Or(e.who, "the server")
	if e.text == "" {
		return fmt.Sprintf("%s answered %d %s", who, e.code, http.StatusText(e.code))
	}
	return fmt.Sprintf("%s answered %d: %s", who, e.code, e.text)
}

// quoted makes what the other side said fit for an error: bounded, on one line, no control characters.
func quoted(s string) string {
	const most = 512
	if len(s) > most {
		s = s[:most] + "…"
	}
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}

// call sends a request and decodes the metadata of its answer into out, which may be nil. body is sent as JSON unless it
// is nil. The error is an *apiError where the server said no.
func (r *restClient) call(ctx context.Context, method, path string, query url.Values, body, out any) error {
	ctx, cancel := within(ctx, r.patience)
	defer cancel()
	var encoded []byte
	if body != nil {
		var err error
		if encoded, err = json.Marshal(body); err != nil {
			return err
		}
	}
	for attempt := 0; ; attempt++ {
		var content io.Reader
		if body != nil {
			content = bytes.NewReader(encoded)
		}
		req, err := r.request(ctx, method, path, query, content)
		if err != nil {
			return err
		}
		if body != nil {
			req.Header.Set("Content-Type", "application/json")
		}
		// An empty list has net/http send the request again when a kept connection turns out to have been closed
		// meanwhile, though it is a POST, and is not sent itself. It is safe: a command for which nobody connects
		// the sockets is never started.
		req.Header["Idempotency-Key"] = []string{}
		resp, err := r.http.Do(req)
		if err != nil && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return r.explainDial(err)
		}
		if resp.StatusCode == http.StatusUnauthorized && attempt == 0 {
			resp.Body.Close()
			if r.renew(ctx, req.Header.Get("Authorization")) {
				continue
			}
			return &apiError{code: resp.StatusCode}
		}
		return decode(resp, out)
	}
}

// decode reads an answer to its end and closes it.
func decode(resp *http.Response, out any) error {
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if ctx := resp.Request.Context(); err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("the server's answer broke off: %w", err)
	}
	var a answer
	if err := json.Unmarshal(data, &a); err != nil || a.Type == "" {
		// It is not quoted: it may repeat the command, its environment, or a socket's secret.
		return &apiError{code: resp.StatusCode, foreign: true, text: fmt.Sprintf("%d bytes of type %s, which are not LXD's JSON", len(data), quoted(resp.Header.Get("Content-Type")))}
	}
	if a.Type == "error" || resp.StatusCode >= 300 {
		e := &apiError{code: resp.StatusCode, text: quoted(a.Error)}
		if e.code < 300 && a.ErrorCode != 0 {
			e.code = a.ErrorCode // LXD since 5.0.3 sends the status of /wait before it knows the result
		}
		return e
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(a.Metadata, out); err != nil {
		return fmt.Errorf("the server's answer is not understood: %w", err)
	}
	return nil
}

// upgrade makes a connection of a request, of which no byte is HTTP after the server has agreed. ctx bounds the request only.
func (r *restClient) upgrade(ctx context.Context, path string, query url.Values, protocol string) (io.ReadWriteCloser, error) {
	ctx, cancel := within(ctx, connectTimeout)
	defer cancel()
	req, err := r.request(ctx, http.MethodGet, path, query, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", protocol)
	resp, err := r.http.Do(req)
	if err != nil && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, r.explainDial(err)
	}
	conn, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode == http.StatusSwitchingProtocols && ok {
		return conn, nil
	}
	return nil, decodeRefusal(resp)
}

// within bounds a context by a time of our own, whose end is not taken for that of the caller's.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, fmt.Errorf("no answer within %v", d))
}

// explainDial makes a sentence of an error from before an answer, without the URL, whose secret net/url.Error would show.
func (r *restClient) explainDial(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	where := r.base
	op, ok := errors.AsType[*net.OpError](err)
	unix := strings.HasPrefix(r.base, "http:")
	if unix {
		where = r.socket
		if ok && op.Addr != nil && op.Addr.String() != "" {
			where = op.Addr.String()
		}
		if where == "" {
			where = "its unix socket"
		}
	}
	switch {
	case unix && errors.Is(err, fs.ErrNotExist):
		// Not wrapped, nor is the next: fs.ErrNotExist and fs.ErrPermission are about files in the instance.
		return noServer(fmt.Errorf("no server at %s: there is no such socket. LXD's is in $LXD_SOCKET or $LXD_DIR, or at /var/snap/lxd/common/lxd/unix.socket (snap) or /var/lib/lxd/unix.socket (package), Incus's in $INCUS_SOCKET or $INCUS_DIR, or at /run/incus/unix.socket or /var/lib/incus/unix.socket: %v", where, err))
	case unix && errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("may not open the server's socket %s: its group (commonly lxd or incus-admin) and root may: %w: %v", where, ErrUnauthorized, err)
	case unix && errors.Is(err, syscall.ECONNREFUSED):
		return noServer(fmt.Errorf("no server at %s: the socket is there, but no daemon listens on it: %w", where, err))
	case strings.Contains(err.Error(), "x509: "):
		return fmt.Errorf("the certificate of %s is refused: %w", where, err)
	case strings.Contains(err.Error(), "remote error: tls: "):
		return fmt.Errorf("%s refuses the client certificate: %w: %w", where, ErrUnauthorized, err)
	}
	return fmt.Errorf("no answer from %s: %w", where, err)
}

// noServer makes an error match [ErrNoServer].
func noServer(err error) error { return &causes{text: err.Error(), errs: []error{ErrNoServer, err}} }

// explain makes an *apiError of a request that concerns the instance into one of the errors of the contract, asking the server what is the
// matter with the instance where the status alone does not tell.
func (t *LXD) explain(ctx context.Context, err error) error {
	e, ok := errors.AsType[*apiError](err)
	if !ok {
		return err
	}
	if !e.foreign {
		e.who = t.rest.ask(ctx)
	}
	wrap := func(kind error, format string, args ...any) error {
		return &causes{text: fmt.Sprintf(format, args...) + ": " + err.Error(), errs: []error{kind, err}}
	}
	switch e.code {
	case http.StatusUnauthorized, http.StatusForbidden:
		return refusal(err, fmt.Sprintf("%s does not let us do that with instance %q in project %q", t.rest.who(), t.instance, cmp.Or(t.project, "default")))
	case http.StatusNotFound, http.StatusBadRequest, http.StatusInternalServerError:
	default:
		return err
	}
	ctx, cancel := within(ctx, t.liveness)
	defer cancel()
	status, askErr := t.status(ctx)
	var no *apiError
	switch {
	case errors.As(askErr, &no) && no.code == http.StatusNotFound:
		return wrap(ErrNoHost, "there is no instance %q in project %q", t.instance, t.project)
	case askErr == nil && status != "Running":
		return wrap(ErrNotRunning, "instance %q is not running but %s", t.instance, strings.ToLower(quoted(status)))
	}
	return err
}

// refusal makes an *apiError that says that we may not do what was asked match [ErrUnauthorized]. what is a sentence that says so.
func refusal(err error, what string) error {
	if e, ok := errors.AsType[*apiError](err); !ok || e.code != http.StatusUnauthorized && e.code != http.StatusForbidden {
		return err
	}
	return &causes{
		text: what + " (a client certificate is allowed by `lxc config trust add`, or `incus config trust add`, perhaps for some projects only): " + err.Error(),
		errs: []error{ErrUnauthorized, err},
	}
}

// status asks for the instance's status: Running, Stopped, Frozen or Error.
func (t *LXD) status(ctx context.Context) (string, error) {
	var instance struct {
		Status string `json:"status"`
	}
	err := t.rest.call(ctx, http.MethodGet, t.path(""), t.query(), nil, &instance)
	return instance.Status, err
}

// path is the instance's own path below the server's, with what follows it.
func (t *LXD) path(rest string) string { return "/1.0/instances/" + url.PathEscape(t.instance) + rest }

func (t *LXD) query() url.Values { return url.Values{"project": {t.project}} }

// causes is an error with several causes under one text.
type causes struct {
	text string
	errs []error
}

func (c *causes) Error() string   { return c.text }
func (c *causes) Unwrap() []error { return c.errs }
