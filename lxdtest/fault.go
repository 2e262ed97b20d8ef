package lxdtest

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// A Fault is something that goes wrong: at a kind of request or socket, at a moment
// of it, an action. All faults are made of these three.
//
//	// The third chunk of stdout never comes, and neither does the end of the stream.
//	s.Inject(lxdtest.Fault{Route: lxdtest.RouteWebsocket, Socket: "1", Moment: lxdtest.OnSend, Nth: 3, Do: lxdtest.Drop})
//	// The server runs the command, and the client never learns its id.
//	s.Inject(lxdtest.Fault{Route: lxdtest.RouteExec, Moment: lxdtest.OnResponse, Do: lxdtest.Drop})
//	// 100 bytes of stdout, then an end that looks like the real one.
//	s.Inject(lxdtest.Fault{Route: lxdtest.RouteWebsocket, Socket: "1", Moment: lxdtest.OnSend, Bytes: 100, Do: lxdtest.All(lxdtest.Mark, lxdtest.Drop)})
type Fault struct {
	Route    Route  // "": any
	Method   string // "": any
	Instance string // "": any
	Socket   string // of RouteWebsocket: "0", "1", "2" or "control"; "": any
	Moment   Moment // "": OnRequest

	// Nth counts the moments that fit: 1 is the first, and only that one; 0 is each.
	Nth int

	// Bytes, with OnSend and OnReceive, puts the moment behind so many bytes of payload, once for
	// each stream. 0: the moment is before each chunk.
	Bytes int64

	Do Action
}

// A Moment is when a fault strikes.
type Moment string

const (
	OnRequest  Moment = "request"  // the head of a request was read, and nothing was done
	OnResponse Moment = "response" // what was asked for is done, and nothing of the answer was sent
	OnSend     Moment = "send"     // payload goes to the client: the body of an answer, a message, an SFTP packet
	OnReceive  Moment = "receive"  // payload came from the client
	OnMark     Moment = "mark"     // all output was sent, the mark of its end was not
	OnMarked   Moment = "marked"   // the mark was sent, the connection is still open
	OnPing     Moment = "ping"     // a ping is due
	OnStart    Moment = "start"    // RouteExec: the process was started
	OnExit     Moment = "exit"     // RouteExec: the process has ended, and nobody knows
	OnFinal    Moment = "final"    // RouteExec: output and marks are out, the operation is about to become final
	OnStat     Moment = "stat"     // the size of a file is told: Point.Size
	OnList     Moment = "list"     // a directory is listed: Point.Names
)

// An Action is what happens then. The Verdict says how the server goes on.
type Action func(*Point) Verdict

// A Verdict is how the server goes on after an [Action].
type Verdict int

const (
	Proceed Verdict = iota // as if nothing had been
	Skip                   // without what was about to happen: the request is not carried out, the chunk, mark or ping not sent, the operation not final
	Cut                    // the connection ends here, without another byte; OnStart, OnExit and OnFinal: all sockets of the command
)

// A Point is the place at which a fault strikes.
type Point struct {
	Route    Route
	Method   string
	Instance string
	Socket   string
	Moment   Moment
	Request  *http.Request // nil where a process is struck
	Data     []byte        // OnSend and OnReceive: the payload. May be replaced with OnSend
	Size     *int64        // OnStat
	Names    *[]string     // OnList

	server *Server
	answer *answer // of an HTTP request
	socket *socket // of a WebSocket
	raw    net.Conn
}

// Server is the server that is struck.
func (p *Point) Server() *Server { return p.server }

// Done is closed when the server is closed, or when the connection was cut. Actions that
// wait give up then.
func (p *Point) Done() <-chan struct{} {
	if p.socket != nil {
		return p.socket.gone
	}
	if p.raw != nil {
		if c := tracked(p.raw); c != nil {
			return c.gone
		}
	}
	if p.answer != nil && p.Request != nil {
		if c, ok := p.Request.Context().Value(connKey{}).(*conn); ok && c != nil {
			return c.gone
		}
	}
	return p.server.closing
}

// Header is the header of the answer that is about to be sent; with OnResponse it can be
// changed.
func (p *Point) Header() http.Header {
	if p.answer == nil {
		return http.Header{}
	}
	return p.answer.Header()
}

// Answer answers the request in the server's stead. It is of use with OnRequest and OnResponse.
func (p *Point) Answer(status int, header http.Header, body []byte) {
	if p.answer == nil || p.answer.hijacked {
		return
	}
	h := p.answer.Header()
	for k := range h {
		delete(h, k)
	}
	for k, v := range header {
		h[k] = v
	}
	p.answer.wrote, p.answer.status = true, status
	p.answer.ResponseWriter.WriteHeader(status)
	_, _ = p.answer.ResponseWriter.Write(body)
}

// WriteRaw puts bytes on the wire as they are, in between what the server sends.
func (p *Point) WriteRaw(b []byte) {
	switch {
	case p.socket != nil:
		p.socket.writing.Lock()
		defer p.socket.writing.Unlock()
		_, _ = p.socket.ws.NetConn().Write(b)
	case p.raw != nil:
		_, _ = p.raw.Write(b)
	case p.answer != nil:
		c, _, err := p.answer.Hijack()
		if err != nil {
			return
		}
		p.answer.cut, p.raw = true, c
		_, _ = c.Write(b)
	}
}

// Inject adds a fault. Faults strike in the order of their injection.
func (s *Server) Inject(faults ...Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range faults {
		if f.Moment == "" {
			f.Moment = OnRequest
		}
		if wrong := f.check(); wrong != "" {
			panic("lxdtest: Fault: " + wrong)
		}
		s.faults = append(s.faults, &armed{Fault: f})
	}
}

// check says what keeps a fault from ever striking.
func (f Fault) check() string {
	moments := []Moment{OnRequest, OnResponse, OnSend, OnReceive, OnMark, OnMarked, OnPing, OnStart, OnExit, OnFinal, OnStat, OnList}
	routes := []Route{
		"", RouteServer, RouteInstances, RouteExec, RouteOperation, RouteWait, RouteWebsocket, RouteEvents, RouteFiles, RouteSFTP, RouteLogs,
	}
	switch {
	case f.Do == nil:
		return "Do is nil"
	case !slices.Contains(moments, f.Moment):
		return fmt.Sprintf("there is no moment %q", f.Moment)
	case !slices.Contains(routes, f.Route):
		return fmt.Sprintf("there is no route %q", f.Route)
	case !slices.Contains([]string{"", "0", "1", "2", "control"}, f.Socket):
		return fmt.Sprintf("there is no socket %q: they are 0, 1, 2 and control", f.Socket)
	case f.Nth < 0 || f.Bytes < 0:
		return "Nth or Bytes is negative"
	}
	return ""
}

// ClearFaults takes all faults back.
func (s *Server) ClearFaults() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

// Struck is how often faults have struck so far, those that were taken back not counted.
func (s *Server) Struck() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, f := range s.faults {
		n += f.struck
	}
	return n
}

// An armed fault counts. Server.mu guards the counters.
type armed struct {
	Fault
	seen   int
	struck int
}

func (f *armed) fits(p *Point) bool {
	return f.Moment == p.Moment &&
		(f.Route == "" || f.Route == p.Route) &&
		(f.Method == "" || f.Method == p.Method) &&
		(f.Instance == "" || f.Instance == p.Instance) &&
		(f.Socket == "" || f.Socket == p.Socket)
}

// count says whether the fault strikes this time.
func (f *armed) count() bool {
	f.seen++
	if f.Nth != 0 && f.Nth != f.seen {
		return false
	}
	f.struck++
	return true
}

// A gate is one stream of payload, or one request, on its way past the faults.
type gate struct {
	s     *Server
	point Point

	mu    sync.Mutex // one chunk after the other
	count int64      // bytes that have passed
	done  []*armed   // faults with Bytes that this stream has met
}

// strike carries out the faults of a moment.
func (g *gate) strike(m Moment, change ...func(*Point)) Verdict {
	p := g.point
	p.Moment = m
	for _, c := range change {
		c(&p)
	}
	return g.s.strike(&p, func(f *armed) bool { return f.Bytes == 0 })
}

func (s *Server) strike(p *Point, which func(*armed) bool) Verdict {
	s.mu.Lock()
	var hits []Action
	for _, f := range s.faults {
		if f.fits(p) && which(f) && f.count() {
			hits = append(hits, f.Do)
		}
	}
	s.mu.Unlock()
	for _, do := range hits {
		if v := do(p); v != Proceed {
			return v
		}
	}
	return Proceed
}

// pass lets a chunk of payload through, or parts of it. It returns errCut when the connection
// has to end.
func (g *gate) pass(m Moment, data []byte, write func([]byte) error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.point
	p.Moment = m
	p.Data = data
	if !g.s.awaits(&p) {
		if err := write(data); err != nil {
			return err
		}
		g.count += int64(len(data))
		return nil
	}
	switch g.s.strike(&p, func(f *armed) bool { return f.Bytes == 0 }) {
	case Cut:
		return errCut
	case Skip:
		return nil
	}
	data = p.Data
	for {
		f, n := g.next(&p, int64(len(data)))
		if f == nil {
			break
		}
		if n > 0 {
			if err := write(data[:n]); err != nil {
				return err
			}
			g.count += n
			data = data[n:]
		}
		g.done = append(g.done, f)
		p.Data = data
		switch g.s.strike(&p, func(o *armed) bool { return o == f }) {
		case Cut:
			return errCut
		case Skip:
			return nil
		}
		data = p.Data
	}
	if len(data) == 0 {
		return nil
	}
	if err := write(data); err != nil {
		return err
	}
	g.count += int64(len(data))
	return nil
}

// awaits reports whether any fault is interested.
func (s *Server) awaits(p *Point) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.faults, func(f *armed) bool { return f.fits(p) })
}

// next is the fault with Bytes that comes next within size bytes, and how far away it is.
func (g *gate) next(p *Point, size int64) (next *armed, distance int64) {
	g.s.mu.Lock()
	defer g.s.mu.Unlock()
	for _, f := range g.s.faults {
		if f.Bytes == 0 || !f.fits(p) || slices.Contains(g.done, f) {
			continue
		}
		if d := max(f.Bytes-g.count, 0); d <= size && (next == nil || d < distance) {
			next, distance = f, d
		}
	}
	return next, distance
}

// Drop ends the connection without a word.
func Drop(*Point) Verdict { return Cut }

// Swallow leaves out what was about to happen: a chunk, a mark, a ping.
func Swallow(*Point) Verdict { return Skip }

// Reset ends the connection with a TCP reset, so that the client loses even what it has
// not read yet. On a unix socket it is a Drop.
func Reset(p *Point) Verdict {
	raw := p.raw
	if p.socket != nil {
		raw = p.socket.ws.NetConn()
	}
	if raw == nil && p.answer != nil {
		if c, _, err := p.answer.Hijack(); err == nil {
			p.answer.cut, raw = true, c
		}
	}
	if c := tracked(raw); c != nil {
		if tcp, ok := c.Conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		c.Close()
	}
	return Cut
}

// Stall waits until the server is closed or the connection gone.
func Stall(p *Point) Verdict {
	select {
	case <-p.Done():
	case <-p.server.closing:
	}
	return Cut
}

// Delay waits, then goes on.
func Delay(d time.Duration) Action {
	return func(p *Point) Verdict {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
			return Proceed
		case <-p.Done():
		case <-p.server.closing:
		}
		return Cut
	}
}

// Until waits for ch to be closed, then goes on: a Delay that a test can end.
func Until(ch <-chan struct{}) Action {
	return func(p *Point) Verdict {
		select {
		case <-ch:
			return Proceed
		case <-p.Done():
		case <-p.server.closing:
		}
		return Cut
	}
}

// Slow lets so many bytes through in a second. With OnSend the server is a slow writer, with
// OnReceive a slow reader.
func Slow(bytesPerSecond int) Action {
	return func(p *Point) Verdict {
		return Delay(time.Duration(len(p.Data)) * time.Second / time.Duration(max(1, bytesPerSecond)))(p)
	}
}

// Refuse answers with an error, as LXD words them, instead of doing what was asked for (OnRequest) or
// after having done it (OnResponse).
func Refuse(status int, text string) Action {
	return func(p *Point) Verdict {
		body := append(encode(envelope{Type: "error", ErrorCode: status, Error: text}), '\n')
		p.Answer(status, http.Header{"Content-Type": {"application/json"}}, body)
		return Skip
	}
}

// Respond answers with any body and status.
func Respond(status int, contentType, body string) Action {
	return func(p *Point) Verdict {
		p.Answer(status, http.Header{"Content-Type": {contentType}}, []byte(body))
		return Skip
	}
}

// Raw puts bytes on the wire as they are, then goes on.
func Raw(b []byte) Action {
	return func(p *Point) Verdict {
		p.WriteRaw(b)
		return Proceed
	}
}

// GarbageFrame sends a WebSocket frame that no protocol knows.
func GarbageFrame(p *Point) Verdict {
	p.WriteRaw([]byte{0xff, 0xff, 0xde, 0xad, 0xbe, 0xef})
	return Proceed
}

// OversizedFrame announces a binary message of size bytes and sends n of them.
func OversizedFrame(size uint64, n int) Action {
	return func(p *Point) Verdict {
		frame := binary.BigEndian.AppendUint64([]byte{0x82, 127}, size)
		p.WriteRaw(append(frame, make([]byte, n)...))
		return Proceed
	}
}

// Mark sends the mark of a stream's end: an empty text message.
func Mark(p *Point) Verdict {
	if p.socket != nil {
		p.socket.writing.Lock()
		defer p.socket.writing.Unlock()
		_ = p.socket.ws.WriteMessage(websocket.TextMessage, nil)
	}
	return Proceed
}

// Die lets the whole server die, see [Server.Die].
func Die(p *Point) Verdict {
	p.server.Die()
	return Cut
}

// LieSize changes the size that is told for a file, with OnStat or, for the Content-Length of
// an answer, OnResponse.
func LieSize(size int64) Action {
	return func(p *Point) Verdict {
		if p.Size != nil {
			*p.Size = size
		} else if p.Moment == OnResponse {
			p.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		}
		return Proceed
	}
}

// Names replaces the names in a listing, with OnList.
func Names(names ...string) Action {
	return func(p *Point) Verdict {
		if p.Names != nil {
			*p.Names = slices.Clone(names)
		}
		return Proceed
	}
}

// Replace changes the payload on its way to the client, with OnSend. The payload of RouteSFTP is a
// packet with its length in front.
func Replace(change func([]byte) []byte) Action {
	return func(p *Point) Verdict {
		p.Data = change(slices.Clone(p.Data))
		return Proceed
	}
}

// All does one thing after the other, up to the first that does not go on.
func All(actions ...Action) Action {
	return func(p *Point) Verdict {
		for _, a := range actions {
			if v := a(p); v != Proceed {
				return v
			}
		}
		return Proceed
	}
}
