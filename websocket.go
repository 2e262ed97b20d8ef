package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
)

// One operation socket as an io.Reader or io.Writer. What LXD does with them is in docs/protocol.md: output comes in
// BINARY messages and ends with an empty TEXT message, then the connection is cut, without a close frame; input
// goes in BINARY messages and ends with a TEXT message.

const (
	// connectTimeout bounds the connection of a socket. LXD itself waits 5 s, since 6.9 10 s.
	connectTimeout = 10 * time.Second

	// stdinMessage is the size of an input message. LXD 5.0 reads a message whole before it passes it on; 64 KiB were measured
	// to be fastest there, half or twice as much slower.
	stdinMessage = 64 << 10

	// maxFrameHeader is the longest header of a client's frame: the write buffer has to hold it besides the message, or the
	// message is cut into frames.
	maxFrameHeader = 2 + 8 + 4

	// maxHandshake bounds what a server says before a socket is connected, certificates included: the WebSocket library would take
	// a header of any length.
	maxHandshake = 256 << 10

	// readBuffer holds headers of frames; what follows is read into a buffer that is only held while there is
	// something to read, so that a silent command costs no memory.
	readBuffer = 256
)

// chunks are buffers for output and input in transit.
var chunks = sync.Pool{New: func() any { return new([stdinMessage]byte) }}

// dialError says why a socket was not connected.
type dialError struct {
	refused bool // for certain: the server has not connected it either
	err     error
}

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// dial connects one socket of an operation, once: LXD takes a second connection with the same secret for another one,
// and some versions never start the command then. It asks for nothing before hold is closed, if it is not nil.
func (r *restClient) dial(ctx context.Context, operation, secret string, hold <-chan struct{}) (*websocket.Conn, error) {
	header, err := r.header(ctx)
	if err != nil {
		return nil, &dialError{refused: true, err: err}
	}
	// The dialer obeys a context's end only until the connection stands, and then its deadline: the connection itself
	// has to be told. sent says whether the server can have got the request.
	var mu sync.Mutex
	var sent bool
	var conn net.Conn
	secure := strings.HasPrefix(r.base, "https:") && r.dialer.NetDialTLSContext == nil
	trace := &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			mu.Lock()
			defer mu.Unlock()
			conn = info.Conn
			if ctx.Err() != nil {
				conn.Close() // nothing is sent then
				return
			}
			sent = !secure
		},
	}
	if secure {
		trace.TLSHandshakeDone = func(_ tls.ConnectionState, err error) {
			if err == nil {
				wait(ctx, hold)
			}
			mu.Lock()
			defer mu.Unlock()
			sent = err == nil && ctx.Err() == nil
			if !sent {
				conn.Close() // before the dialer goes on
			}
		}
	} else if wait(ctx, hold); ctx.Err() != nil {
		// On a unix socket LXD accepts nothing else while a connection says nothing: it may not even be there before.
		return nil, &dialError{refused: true, err: context.Cause(ctx)}
	}
	stop := context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		if conn != nil {
			conn.Close()
		}
	})
	u := "ws" + strings.TrimPrefix(r.base, "http") + operationPath(operation) + "/websocket?secret=" + url.QueryEscape(secret)
	ws, resp, err := r.dialer.DialContext(httptrace.WithClientTrace(ctx, trace), u, header)
	if !stop() && err == nil {
		// Closed behind the dialer's back, after the server had answered.
		ws.Close()
		return nil, &dialError{err: context.Cause(ctx)}
	}
	if err == nil {
		// LXD's pings need no answer, and one on a socket that it does not read could destroy output: unread input makes the
		// kernel reset the connection, and what is under way to us is thrown away.
		ws.SetPingHandler(func(string) error { return nil })
		ws.SetCloseHandler(func(int, string) error { return nil })
		unbound(ws.NetConn())
		return ws, nil
	}
	if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
		<-ctx.Done() // the connection had the same deadline, and may have been a moment faster
	}
	mu.Lock()
	defer mu.Unlock()
	if resp != nil {
		// Only LXD itself knows that it has not connected the socket; what a proxy says proves nothing.
		err := decodeRefusal(resp)
		no, ok := errors.AsType[*apiError](err)
		return nil, &dialError{refused: ok && !no.foreign, err: without(secret, err)}
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return nil, &dialError{refused: !sent, err: r.explainDial(err)}
}

// decodeRefusal makes an error of an answer to a dial that is not 101.
func decodeRefusal(resp *http.Response) error {
	if err := decode(resp, nil); err != nil {
		return err
	}
	return &apiError{code: resp.StatusCode}
}

// wait waits for hold, if it is not nil, or the end of ctx.
func wait(ctx context.Context, hold <-chan struct{}) {
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
		}
	}
}

// without takes a secret out of an error's text, should the other side have repeated it.
func without(secret string, err error) error {
	text := err.Error()
	if !strings.Contains(text, secret) && !strings.Contains(text, url.QueryEscape(secret)) {
		return err
	}
	return errors.New(strings.NewReplacer(secret, "…", url.QueryEscape(secret), "…").Replace(text))
}

// output is one socket that delivers output.
type output struct {
	name string // stdout, stderr or terminal
	w    io.Writer
	turn *sync.Mutex // held during a Write; shared by two outputs with the same writer

	conn *websocket.Conn // set before run
	fail func(error)     // told the first error of w

	mu       sync.Mutex // guards what follows
	detached bool       // w must not be called again
	busy     bool       // a Write is under way or waits for its turn
	writing  bool       // a Write is under way
	waiting  time.Time  // since when the next message has been waited for; zero: one is being read or written
	waited   time.Duration
	moved    time.Time // when there was progress last
	received int64
	writeErr error
	ended    bool
	whole    bool // the end mark came
}

// run copies until the stream ends. It returns before only if a Write does not return.
func (o *output) run() {
	err := o.copy()
	if err != nil {
		abort(o.conn) // whatever the other side still sends there
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended, o.whole = true, err == nil
	if w, ok := o.w.(cutWriter); ok && err != nil {
		w.cutOff()
	}
}

// cutWriter is a writer of this package's that is told when no more comes although it was not the end: the command may wait for an answer to
// what was lost.
type cutWriter interface{ cutOff() }

// copy returns nil when the end mark came. After an error of the writer it reads on and throws away.
func (o *output) copy() error {
	for {
		o.await(true)
		kind, message, err := o.conn.NextReader()
		o.await(false)
		if err != nil {
			return err
		}
		if kind == websocket.TextMessage {
			var one [1]byte
			switch _, err := io.ReadFull(message, one[:]); err {
			case io.EOF:
				return nil
			case nil:
				return errors.New("the server sent a text message that is not empty")
			default:
				return err
			}
		}
		if err := o.copyMessage(message); err != nil {
			return err
		}
	}
}

func (o *output) copyMessage(message io.Reader) error {
	chunk := chunks.Get().(*[stdinMessage]byte)
	defer chunks.Put(chunk)
	for {
		var n int
		var err error
		for n < len(chunk) && err == nil {
			var k int
			k, err = message.Read(chunk[n:])
			n += k
			o.move() // a slow link takes long for one message
		}
		if n > 0 {
			o.write(chunk[:n])
		}
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return nil // the end of the message; if it was that of the connection, the next NextReader says so
		default:
			return err
		}
	}
}

// write hands p to the writer unless that has failed or is not to be called any more.
func (o *output) write(p []byte) {
	o.mu.Lock()
	o.received += int64(len(p))
	o.moved = time.Now()
	skip := o.w == nil || o.writeErr != nil || o.detached
	o.busy = !skip
	o.mu.Unlock()
	if skip {
		return
	}

	o.turn.Lock()
	defer o.turn.Unlock()
	o.mu.Lock()
	skip = o.detached
	o.writing = !skip
	o.mu.Unlock()
	var n int
	var err error
	if !skip {
		err = guarded(func() (e error) { n, e = o.w.Write(p); return e })
		if err == nil && n < len(p) {
			err = io.ErrShortWrite
		}
	}
	o.mu.Lock()
	o.busy, o.writing, o.moved = false, false, time.Now()
	o.writeErr = err
	o.mu.Unlock()
	if err != nil {
		o.fail(&copyError{o.name, err})
	}
}

// move notes that something has come.
func (o *output) move() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.moved = time.Now()
}

// await notes whether the next message is waited for.
func (o *output) await(yes bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if yes {
		o.waiting = time.Now()
		return
	}
	o.waited += time.Since(o.waiting)
	o.waiting = time.Time{}
}

// progress is how far an output has come.
type progress struct {
	ended    bool
	received int64
	waited   time.Duration // for messages to begin, all together
	still    time.Duration // since something moved; 0 during a Write
}

func (o *output) progress() progress {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := progress{ended: o.ended, received: o.received, waited: o.waited}
	if !o.waiting.IsZero() {
		p.waited += time.Since(o.waiting)
	}
	if !o.busy {
		p.still = time.Since(o.moved)
	}
	return p
}

// detach makes sure that the writer is not called again. It reports whether it is in a Write.
func (o *output) detach() (writing bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.detached = true
	return o.writing
}

// result tells how it ended.
func (o *output) result() (whole bool, received int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.whole, o.received
}

// abort closes a socket as the server does: without a close frame, and without TLS's own farewell, which would be
// a write to a socket that may not be written to, and waits on a dead link.
func abort(ws *websocket.Conn) {
	conn := ws.NetConn()
	for {
		c, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = c.NetConn()
	}
	conn.Close()
}

// boundConn is a connection from which no more than maxHandshake can be read at first.
type boundConn struct {
	net.Conn
	read atomic.Int64 // so far; negative: there is no bound any more
}

// NetConn returns the connection below.
func (c *boundConn) NetConn() net.Conn { return c.Conn }

func (c *boundConn) Read(p []byte) (int, error) {
	before := c.read.Load()
	if before < 0 {
		return c.Conn.Read(p)
	}
	if before >= maxHandshake {
		return 0, fmt.Errorf("the server's answer has more than %d bytes", maxHandshake)
	}
	n, err := c.Conn.Read(p)
	c.read.CompareAndSwap(before, before+int64(n))
	return n, err
}

// bounded makes a dialer's connections boundConns.
func bounded(dial func(ctx context.Context, network, addr string) (net.Conn, error)) func(ctx context.Context, network, addr string) (net.Conn, error) {
	if dial == nil {
		return nil
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &boundConn{Conn: conn}, nil
	}
}

// unbound takes the bound off.
func unbound(conn net.Conn) {
	for {
		if c, ok := conn.(*boundConn); ok {
			c.read.Store(-1)
		}
		c, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			return
		}
		conn = c.NetConn()
	}
}

// copyError is an error of one of the caller's readers or writers.
type copyError struct {
	stream string
	err    error
}

func (e *copyError) Error() string { return fmt.Sprintf("%s: %v", e.stream, e.err) }
func (e *copyError) Unwrap() error { return e.err }

// input is the socket that takes input.
type input struct {
	r    io.Reader // nil: empty
	tty  bool
	conn *websocket.Conn
	fail func(error)   // told an error of r
	done chan struct{} // closed when run has returned

	mu      sync.Mutex // guards what follows
	stopped bool       // r must not be called again
	reading bool
}

// read reads from r unless the command has ended.
func (in *input) read(p []byte) (n int, err error, ok bool) {
	in.mu.Lock()
	if in.stopped {
		in.mu.Unlock()
		return 0, nil, false
	}
	in.reading = true
	in.mu.Unlock()
	err = guarded(func() (e error) { n, e = in.r.Read(p); return e })
	in.mu.Lock()
	defer in.mu.Unlock()
	in.reading = false
	return n, err, !in.stopped
}

// stop makes sure that r is not called again, the connection being closed. It waits for run, unless a Read does not return in time.
func (in *input) stop() {
	in.mu.Lock()
	in.stopped = true
	reading := in.reading
	in.mu.Unlock()
	if !reading {
		<-in.done
		return
	}
	late := time.NewTimer(readGrace)
	defer late.Stop()
	select {
	case <-in.done:
	case <-late.C:
	}
}

// readGrace is how long a Read of the caller's may go on after the command, so that a source that answers is not left with a reader.
const readGrace = 100 * time.Millisecond

// run copies until r or the connection ends. It outlives the command only in a Read that does not return.
func (in *input) run() {
	defer close(in.done)
	newline := true // nothing, or a line, stands before the end
	if in.r != nil {
		// The first buffer is small: most inputs are short, or silent for long.
		chunk := make([]byte, 4<<10)
		for {
			n, err, ok := in.read(chunk)
			if !ok {
				return
			}
			if n > 0 {
				if in.conn.WriteMessage(websocket.BinaryMessage, chunk[:n]) != nil {
					return // the command has ended, or the link has, which the others see
				}
				newline = chunk[n-1] == '\n' || chunk[n-1] == '\r'
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				in.fail(&copyError{"Stdin", err})
				return
			}
			if n == len(chunk) && n < stdinMessage {
				whole := chunks.Get().(*[stdinMessage]byte)
				defer chunks.Put(whole)
				chunk = whole[:]
			}
		}
	}
	if in.tty {
		// A terminal's input ends by its end character, once at the beginning of a line and otherwise once more, for the first
		// one ends the line.
		mark := []byte{4, 4}
		if newline {
			mark = mark[:1]
		}
		in.conn.WriteMessage(websocket.BinaryMessage, mark)
		return
	}
	// The socket has to stay open and may not be closed before the command has ended: LXD's next ping would meet a closed one,
	// and input that it has not read by then would be lost.
	in.conn.WriteMessage(websocket.TextMessage, nil)
}

// discardPings throws away what LXD has sent on an input socket, which is nothing but pings, without waiting for more. Unread, they would
// fill the buffers of a command that runs for days, and the kernel would cut the connection.
func discardPings(ws *websocket.Conn) {
	conn := ws.NetConn()
	var buf [512]byte
	conn.SetReadDeadline(time.Now().Add(time.Millisecond))
	for range 16 {
		if _, err := conn.Read(buf[:]); err != nil {
			return
		}
	}
}
