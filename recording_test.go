package transport_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What a transport and a server say to each other: recorded by a proxy between the two, and played by a server that knows
// nothing but its lines. Every connection over a unix socket has one request on it, and perhaps becomes a WebSocket or one of SFTP.

// event is one line of a transcript.
type event struct {
	from    byte   // '>' the client's, '<' the server's
	conn    string // exec, wait, operation, instance, server, 0, 1, 2, control, sftp
	kind    string // request, response, body, eof, a WebSocket's binary, text, ping, pong, close, or SFTP's open, status, ...
	payload string
}

func (e event) String() string {
	line := fmt.Sprintf("%c %s %s", e.from, e.conn, e.kind)
	if e.payload != "" {
		line += " " + quote(e.payload)
	}
	return line
}

func quote(s string) string {
	if strings.Contains(s, `"`) && strconv.CanBackquote(s) {
		return "`" + s + "`" // JSON is easier to read so
	}
	return strconv.Quote(s)
}

func parseEvent(line string) (event, error) {
	f := strings.SplitN(line, " ", 4)
	if len(f) < 3 || f[0] != ">" && f[0] != "<" {
		return event{}, fmt.Errorf("not an event: %s", line)
	}
	e := event{from: f[0][0], conn: f[1], kind: f[2]}
	var err error
	if len(f) == 4 {
		e.payload, err = strconv.Unquote(f[3])
	}
	return e, err
}

// perConnection is what can be compared of two recordings. Connections go on beside each other, so that only the order on each is
// meant; a ping comes whenever ten seconds are over; output is cut into messages by chance; and the end of a connection may
// overtake what the other side still says. That the client ends one matters to the server only before the command's end. Requests of
// SFTP do not wait for each other's answers.
func perConnection(events []event) string {
	conns := map[string][]event{}
	for _, e := range events {
		key := e.conn
		if strings.HasPrefix(key, "sftp") {
			key += string(e.from)
		}
		list := conns[key]
		last := len(list) - 1
		switch {
		case e.kind == "ping", e.kind == "eof" && e.from == '>':
		case last >= 0 && e.kind == "binary" && list[last].kind == "binary" && list[last].from == e.from:
			list[last].payload += e.payload
		case last >= 0 && list[last].kind == "eof":
			conns[key] = slices.Insert(list, last, e)
		default:
			conns[key] = append(list, e)
		}
	}
	var all []string
	for _, key := range slices.Sorted(maps.Keys(conns)) {
		for _, e := range conns[key] {
			all = append(all, e.String())
		}
	}
	return strings.Join(all, "\n")
}

// script says what a connection is called, by its request.
type script struct {
	mu      sync.Mutex
	secrets map[string]string // of sockets, and their names
	used    map[string]int
}

func (s *script) name(r *http.Request) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	name, path := "other", r.URL.Path
	switch {
	case strings.HasSuffix(path, "/websocket"):
		secret := r.URL.Query().Get("secret")
		name = strings.TrimPrefix(secret, "SECRET-")
		if known, ok := s.secrets[secret]; ok {
			name = known
		}
	case strings.HasSuffix(path, "/wait"):
		name = "wait"
	case strings.HasSuffix(path, "/exec"):
		name = "exec"
	case strings.HasSuffix(path, "/sftp"):
		name = "sftp"
	case strings.HasPrefix(path, "/1.0/operations/"):
		name = "operation"
	case strings.HasPrefix(path, "/1.0/instances/"):
		name = "instance"
	case path == "/1.0":
		name = "server"
	}
	s.used[name]++
	if n := s.used[name]; n > 1 {
		name = fmt.Sprintf("%s-%d", name, n)
	}
	return name
}

// listen serves a unix socket until the test ends, or stop is called. stop waits for all connections.
func listen(t testing.TB, serve func(*net.UnixConn)) (socket string, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "t") // shorter than t.TempDir
	require.NoError(t, err)
	socket = filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	require.NoError(t, err)
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(patience))
			all.Go(func() {
				defer conn.Close()
				serve(conn)
			})
		}
	})
	stop = sync.OnceFunc(func() {
		l.Close()
		all.Wait()
		assert.NoError(t, os.RemoveAll(dir))
	})
	t.Cleanup(stop)
	return socket, stop
}

// recorder is a proxy in front of a server.
type recorder struct {
	t        testing.TB
	upstream string // the server's socket
	instance string
	script   script

	mu     sync.Mutex // guards the rest
	events []event
	ids    []string
	ended  map[string]bool // by the server
	over   bool            // the client has been told the result
}

func newRecorder(t testing.TB, upstream, instance string) *recorder {
	r := &recorder{t: t, upstream: upstream, instance: instance, ended: map[string]bool{}}
	r.script.secrets, r.script.used = map[string]string{}, map[string]int{}
	return r
}

var (
	anySocket = regexp.MustCompile(`"(\w+)":"([0-9a-f]{64})"`)
	anySecret = regexp.MustCompile(`[0-9a-f]{64}`)
	anyID     = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)
	anyMark   = regexp.MustCompile(`TRANSPORT_COMMAND_[A-Z2-7]{26}`)
	anyTemp   = regexp.MustCompile(`\.transport-[a-z2-7]{26}\.tmp`)
	anyConfig = regexp.MustCompile(`"((?:expanded_)?config)":\{(?:"(?:[^"\\]|\\.)*":"(?:[^"\\]|\\.)*",?)*\}`) // the instance's, not the server's
	anyTime   = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`)
)

// normal replaces what differs from one recording to the next.
func (r *recorder) normal(s string) string {
	r.script.mu.Lock()
	for _, m := range anySocket.FindAllStringSubmatch(s, -1) {
		r.script.secrets[m[2]] = m[1]
	}
	s = anySecret.ReplaceAllStringFunc(s, func(secret string) string { return "SECRET-" + r.script.secrets[secret] })
	r.script.mu.Unlock()
	s = anyID.ReplaceAllStringFunc(s, func(id string) string {
		if !slices.Contains(r.ids, id) {
			r.ids = append(r.ids, id)
		}
		return fmt.Sprintf("ID-%d", slices.Index(r.ids, id)+1)
	})
	s = withoutMarks(s)
	s = anyConfig.ReplaceAllString(anyTime.ReplaceAllString(s, "TIME"), `"$1":{}`)
	return strings.ReplaceAll(s, r.instance, "INSTANCE")
}

// withoutMarks replaces what the client makes up. The name of a temporary file keeps its length, which SFTP writes before it.
func withoutMarks(s string) string {
	return anyTemp.ReplaceAllString(anyMark.ReplaceAllString(s, "TRANSPORT_COMMAND_MARK"), ".transport-"+strings.Repeat("x", 26)+".tmp")
}

// note writes down what has come, before it goes on: so that the order of all lines is one in which it can have happened.
func (r *recorder) note(events ...event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range events {
		e.payload = r.normal(e.payload)
		switch {
		case e.kind == "eof" && e.from == '<':
			r.ended[e.conn] = true
		case e.kind == "eof" && (r.over || r.ended[e.conn]):
			continue
		case e.kind == "response" && strings.HasPrefix(e.conn, "wait"):
			r.over = true
		}
		r.events = append(r.events, e)
	}
}

func requestEvents(name string, r *http.Request, body []byte) []event {
	events := []event{{'>', name, "request", r.Method + " " + r.URL.RequestURI()}}
	if len(body) > 0 {
		events = append(events, event{'>', name, "body", strings.TrimSpace(string(body))})
	}
	return events
}

func (r *recorder) serve(client *net.UnixConn) {
	in := bufio.NewReader(client)
	req, err := http.ReadRequest(in)
	if err != nil {
		return // nothing was said on it
	}
	body, err := io.ReadAll(req.Body)
	if !assert.NoError(r.t, err) {
		return
	}
	name := r.script.name(req)
	r.note(requestEvents(name, req, body)...)
	conn, err := net.Dial("unix", r.upstream)
	if !assert.NoError(r.t, err) {
		return
	}
	server := conn.(*net.UnixConn)
	defer server.Close()
	server.SetDeadline(time.Now().Add(patience))
	req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	out := bufio.NewReader(server)
	var resp *http.Response
	if err = req.Write(server); err == nil {
		resp, err = http.ReadResponse(out, req)
	}
	if err != nil {
		r.note(event{'<', name, "eof", ""})
		return
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		r.note(event{'<', name, "response", "101"})
		if assert.NoError(r.t, resp.Write(client)) {
			var copiers sync.WaitGroup
			copiers.Go(func() { r.copy('>', name, in, server) })
			r.copy('<', name, out, client)
			copiers.Wait()
		}
		return
	}
	body, err = io.ReadAll(resp.Body)
	assert.NoError(r.t, err)
	if strings.HasPrefix(name, "server") {
		body = product(r.t, body)
	}
	r.note(event{'<', name, "response", fmt.Sprintf("%d %s", resp.StatusCode, resp.Header.Get("Content-Type"))},
		event{'<', name, "body", strings.TrimSpace(string(body))})
	resp.Body, resp.ContentLength, resp.TransferEncoding = io.NopCloser(bytes.NewReader(body)), int64(len(body)), nil
	_ = resp.Write(client)
}

// product is what GET /1.0 says of the server's product, and nothing of the machine, which is another one the next time.
func product(t testing.TB, body []byte) []byte {
	var a struct {
		Type       string `json:"type"`
		StatusCode int    `json:"status_code"`
		Metadata   struct {
			Environment struct {
				Server        string `json:"server"`
				ServerVersion string `json:"server_version"`
			} `json:"environment"`
		} `json:"metadata"`
	}
	if !assert.NoError(t, json.Unmarshal(body, &a)) {
		return nil
	}
	body, err := json.Marshal(a)
	assert.NoError(t, err)
	return body
}

// copy passes frames or packets on until the end.
func (r *recorder) copy(from byte, name string, src *bufio.Reader, dst *net.UnixConn) {
	for {
		f, err := readMessage(name, src)
		if err != nil {
			r.note(event{from, name, "eof", ""})
			_ = dst.CloseWrite()
			return
		}
		r.note(event{from, name, f.kind, f.payload})
		_, _ = dst.Write(f.raw) // an end is seen by the reader
	}
}

// frame is one of a WebSocket, or a packet of SFTP.
type frame struct {
	kind, payload string
	raw           []byte
}

var opcodes = map[byte]string{0: "continuation", 1: "text", 2: "binary", 8: "close", 9: "ping", 10: "pong"}

func readFrame(r *bufio.Reader) (frame, error) {
	var f frame
	take := func(n uint64) ([]byte, error) {
		if n > 16<<20 {
			return nil, fmt.Errorf("a frame of %d bytes", n)
		}
		b := make([]byte, n)
		_, err := io.ReadFull(r, b)
		f.raw = append(f.raw, b...)
		return b, err
	}
	head, err := take(2)
	if err != nil {
		return f, err
	}
	size, mask := uint64(head[1]&0x7f), make([]byte, 4)
	if size > 125 {
		b, err := take(map[uint64]uint64{126: 2, 127: 8}[size])
		if err != nil {
			return f, err
		}
		size = binary.BigEndian.Uint64(append(make([]byte, 8-len(b)), b...))
	}
	if head[1]&0x80 != 0 {
		if mask, err = take(4); err != nil {
			return f, err
		}
	}
	payload, err := take(size)
	payload = slices.Clone(payload)
	for i := range payload {
		payload[i] ^= mask[i%4]
	}
	f.kind, f.payload = opcodes[head[0]&0x0f], string(payload)
	if head[0]&0xf0 != 0x80 {
		f.kind += fmt.Sprintf("-%x", head[0]) // a fragment, or with an extension
	}
	return f, err
}

// readMessage reads a frame or a packet, as it is spoken on the connection.
func readMessage(conn string, r *bufio.Reader) (frame, error) {
	if strings.HasPrefix(conn, "sftp") {
		return readPacket(r)
	}
	return readFrame(r)
}

// packets are the types of draft-ietf-secsh-filexfer-02, section 3.
var packets = map[byte]string{
	1: "init", 2: "version", 3: "open", 4: "close", 5: "read", 6: "write", 7: "lstat", 8: "fstat", 9: "setstat", 10: "fsetstat", 11: "opendir", 12: "readdir",
	13: "remove", 14: "mkdir", 15: "rmdir", 16: "realpath", 17: "stat", 18: "rename", 19: "readlink", 20: "symlink", 101: "status", 102: "handle", 103: "data", 104: "name",
	105: "attrs", 200: "extended", 201: "extended-reply",
}

func readPacket(r *bufio.Reader) (frame, error) {
	head := make([]byte, 5)
	if _, err := io.ReadFull(r, head); err != nil {
		return frame{}, err
	}
	size := binary.BigEndian.Uint32(head)
	if size < 1 || size > 16<<20 {
		return frame{}, fmt.Errorf("a packet of %d bytes", size)
	}
	body := make([]byte, size-1)
	_, err := io.ReadFull(r, body)
	f := frame{kind: packets[head[4]], payload: string(body), raw: append(head, body...)}
	if f.kind == "attrs" {
		f.payload = string(withoutTimes(body))
	}
	return f, err
}

// withoutTimes is the body of ATTRS whose times are 0.
func withoutTimes(body []byte) []byte {
	const size, owner, permissions, times = 1, 2, 4, 8 // the flags, of section 5
	if len(body) < 8 {
		return body
	}
	flags, at := binary.BigEndian.Uint32(body[4:]), 8
	for flag, length := range map[uint32]int{size: 8, owner: 8, permissions: 4} {
		if flags&flag != 0 {
			at += length
		}
	}
	body = slices.Clone(body)
	if flags&times != 0 && len(body) >= at+8 {
		clear(body[at : at+8])
	}
	return body
}

// serverMessage is an unmasked frame, or a packet, as it is spoken on the connection.
func serverMessage(conn, kind, payload string) []byte {
	if !strings.HasPrefix(conn, "sftp") {
		return serverFrame(kind, payload)
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(1+len(payload)))
	for number, k := range packets {
		if k == kind {
			b = append(b, number)
		}
	}
	return append(b, payload...)
}

func serverFrame(kind, payload string) []byte {
	var b []byte
	for op, k := range opcodes {
		if k == kind {
			b = []byte{0x80 | op}
		}
	}
	switch n := len(payload); {
	case n < 126:
		b = append(b, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
	}
	return append(b, payload...)
}

// player plays the server's side of a recording: it says a line when the client has said all that came before it, on whatever connection.
type player struct {
	t      testing.TB
	ctx    context.Context
	stop   func() // after a line that is not the recording's
	events []event
	heard  []chan struct{} // closed when the client has said its line
	script script
}

func newPlayer(t testing.TB, ctx context.Context, events []event) *player {
	ctx, stop := context.WithCancel(ctx)
	t.Cleanup(stop)
	p := &player{t: t, ctx: ctx, stop: stop, events: events, heard: make([]chan struct{}, len(events))}
	p.script.used = map[string]int{}
	for i := range p.heard {
		p.heard[i] = make(chan struct{})
	}
	return p
}

// complete checks that the client has said everything.
func (p *player) complete() {
	for i, e := range p.events {
		if e.from == '>' {
			select {
			case <-p.heard[i]:
			default:
				p.t.Errorf("the client has not said: %v", e)
			}
		}
	}
}

func (p *player) wait(before int) bool {
	for i, e := range p.events[:before] {
		if e.from == '>' {
			select {
			case <-p.heard[i]:
			case <-p.ctx.Done():
				p.t.Errorf("waited in vain for: %v", e)
				return false
			}
		}
	}
	return true
}

func (p *player) serve(conn *net.UnixConn) {
	in := bufio.NewReader(conn)
	req, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	body, err := io.ReadAll(req.Body)
	assert.NoError(p.t, err)
	name := p.script.name(req)
	said := requestEvents(name, req, body)
	upgraded := false
	for i, e := range p.events {
		switch {
		case e.conn != name:
			continue
		case e.from == '>':
			if len(said) == 0 {
				said = p.hear(name, in, e)
			}
			said[0].payload = withoutMarks(said[0].payload)
			if !assert.Equal(p.t, e.String(), said[0].String(), "the recording has another line") {
				p.stop()
				return
			}
			said = said[1:]
			close(p.heard[i])
			continue
		case !p.wait(i):
			return
		}
		switch {
		case e.kind == "eof":
			_ = conn.CloseWrite()
		case e.kind == "response" && e.payload == "101":
			upgraded = true
			if strings.HasPrefix(name, "sftp") {
				fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: sftp\r\nConnection: Upgrade\r\n\r\n")
				continue
			}
			sum := sha1.Sum([]byte(req.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
			fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
				base64.StdEncoding.EncodeToString(sum[:]))
		case e.kind == "response":
			status, kind, _ := strings.Cut(e.payload, " ")
			fmt.Fprintf(conn, "HTTP/1.1 %s -\r\nContent-Type: %s\r\nConnection: close\r\n\r\n", status, kind)
		case e.kind == "body":
			fmt.Fprintln(conn, e.payload)
		default:
			_, _ = conn.Write(serverMessage(name, e.kind, e.payload))
		}
	}
	assert.Empty(p.t, said, "the recording has no such connection")
	_ = conn.CloseWrite()
	for upgraded {
		f, err := readMessage(name, in)
		if err != nil {
			return
		}
		p.t.Errorf("the recording has no line: %v", event{'>', name, f.kind, f.payload})
	}
}

// hear reads what the client says in the place of a line. Its binary messages may be cut otherwise.
func (p *player) hear(name string, in *bufio.Reader, want event) []event {
	got := event{from: '>', conn: name}
	for {
		f, err := readMessage(name, in)
		if err != nil {
			got.kind = "eof"
			break
		}
		got.kind, got.payload = f.kind, got.payload+f.payload
		if f.kind != "binary" || len(got.payload) >= len(want.payload) {
			break
		}
	}
	return []event{got}
}
