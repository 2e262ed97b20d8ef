package lxdtest_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/lxdtest"
)

// patience is how long anything may take before a test gives up.
const patience = time.Minute

// A wire is a client that does nothing but what it is told, and writes down what comes back. What differs
// from one server or run to the next is replaced: ids, times, secrets, the instance's name.
type wire struct {
	t        testing.TB
	socket   string // of the server, or
	address  string // host:port, with
	tls      *tls.Config
	instance string
	image    string // that instances are made from
	headers  string // what the names of the product's own headers begin with

	mu   sync.Mutex
	log  []string
	late bool // a socket was dialled so late that the real server may not have waited for it
}

// fakeWire is a wire to a server that Start or StartTLS was called on.
func fakeWire(t testing.TB, s *lxdtest.Server, instance string) *wire {
	w := &wire{t: t, socket: s.Socket, instance: instance, headers: s.Version.HeaderPrefix}
	if len(s.Images) > 0 {
		w.image = s.Images[0]
	}
	if s.Socket == "" {
		w.address, w.tls = strings.TrimPrefix(s.URL, "https://"), s.ClientTLS()
	}
	return w
}

// of is a wire to the same server that has another instance in mind.
func (w *wire) of(instance string) *wire {
	return &wire{t: w.t, socket: w.socket, address: w.address, tls: w.tls, instance: instance, image: w.image, headers: w.headers}
}

var replacements = []struct {
	old *regexp.Regexp
	new string
}{
	// Newer releases of Go name the key.
	{regexp.MustCompile(`(Go struct field InstanceExecPost\.environment)\.\w+ `), "$1 "},
	{regexp.MustCompile(`[0-9a-f]{64}`), "SECRET"},
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "ID"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`), "TIME"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \+0000 UTC`), "TIME"},
	// A connection that a client has cut is now and then reset before the real server says good-bye on it, which makes the operation fail.
	{regexp.MustCompile(`"status":"Failure","status_code":400,([^\n]*)"err":"tls: failed to send closeNotify alert [^"]*"`), `"status":"Success","status_code":200,$1"err":""`},
}

func (w *wire) normal(s string) string {
	for _, r := range replacements {
		s = r.old.ReplaceAllString(s, r.new)
	}
	return strings.ReplaceAll(s, w.instance, "INSTANCE")
}

func (w *wire) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, w.normal(fmt.Sprintf(format, args...)))
}

func (w *wire) transcript() string { return strings.Join(w.log, "\n") }

func (w *wire) dial(ctx context.Context) (net.Conn, error) {
	if w.socket != "" {
		return new(net.Dialer).DialContext(ctx, "unix", w.socket)
	}
	return (&tls.Dialer{Config: w.tls}).DialContext(ctx, "tcp", w.address)
}

// client makes a connection for each request, as the official client does.
func (w *wire) client() *http.Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return w.dial(ctx) }
	return &http.Client{Timeout: patience, Transport: &http.Transport{DialContext: dial, DialTLSContext: dial, DisableKeepAlives: true}}
}

func (w *wire) url(path string) string {
	path = strings.ReplaceAll(path, "INSTANCE", w.instance)
	if w.socket != "" {
		return "http://lxd" + path
	}
	return "https://" + w.address + path
}

// get makes a request without noting anything but that there is no answer. header is "Name: value" lines; X-LXD- stands for what the product has.
func (w *wire) get(method, path, header, body string) (*http.Response, []byte) {
	res, b, err := w.ask(context.Background(), method, path, header, body)
	if err != nil {
		w.note("%s %s: no answer", method, path)
		return &http.Response{Header: http.Header{}}, nil
	}
	return res, b
}

// ask is get for those who have a use for the error.
func (w *wire) ask(ctx context.Context, method, path, header, body string) (*http.Response, []byte, error) {
	r, err := http.NewRequestWithContext(ctx, method, w.url(path), strings.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	for line := range strings.SplitSeq(header, "\n") {
		if k, v, ok := strings.Cut(line, ": "); ok {
			r.Header.Set(strings.Replace(k, "X-LXD-", w.headers, 1), v)
		}
	}
	res, err := w.client().Do(r)
	if err != nil {
		return nil, nil, err
	}
	b, err := io.ReadAll(res.Body)
	res.Body.Close()
	if err != nil {
		b = append(b, fmt.Sprintf(" (broken off: %v)", err)...)
	}
	return res, b, nil
}

// noted are the headers that a transcript has.
var noted = regexp.MustCompile(`^(Content-Type|Location|Accept-Ranges|Content-Disposition|Content-Range|X-Lxd-.*|X-Incus-.*|Upgrade|Connection)$`)

// do makes a request and notes the answer.
func (w *wire) do(method, path, header, body string) []byte {
	res, b := w.get(method, path, header, body)
	if res.StatusCode == 0 {
		return nil
	}
	w.answer(method, path, res, b)
	return b
}

// answer notes an answer.
func (w *wire) answer(method, path string, res *http.Response, b []byte) {
	var headers []string
	for k := range res.Header {
		if noted.MatchString(k) || k == "Content-Length" && res.Header.Get("Content-Type") == "application/octet-stream" {
			headers = append(headers, k+": "+res.Header.Get(k))
		}
	}
	slices.Sort(headers)
	w.note("%s %s\n  %d %s\n  %s", method, path, res.StatusCode, strings.Join(headers, ", "), b)
}

// until asks, without a note, until there is an answer, for half a minute at most.
func (w *wire) until(path string) {
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); <-time.After(20 * time.Millisecond) {
		if res, b := w.get("GET", path, "", ""); res.StatusCode == http.StatusOK && len(b) > 0 {
			return
		}
	}
}

// An exec is an operation with its sockets.
type session struct {
	w       *wire
	begin   time.Time
	id      string
	fds     map[string]string
	sockets map[string]*sock
	held    map[string]chan struct{} // sockets of which nothing is read before this is closed
	told    chan func()              // notes the result
}

// A sock notes what comes in on one socket.
type sock struct {
	name  string
	conn  *websocket.Conn
	ended chan struct{}

	mu     sync.Mutex
	frames []string // kinds and lengths of those that are not BINARY, and what BINARY there was in between
	data   []byte
	max    int
	pings  []string
	at     []time.Time   // of the pings
	cut    bool          // by the client: what was on its way is not noted
	change chan struct{} // closed and replaced at each frame
}

// exec starts a command. The answer is not noted: see do.
func (w *wire) exec(body string) *session {
	w.t.Helper()
	res, b := w.get("POST", "/1.0/instances/INSTANCE/exec", "", body)
	require.Equal(w.t, 202, res.StatusCode, "%s", b)
	return w.session(b)
}

func (w *wire) session(answer []byte) *session {
	var a struct {
		Metadata struct {
			ID       string `json:"id"`
			Metadata struct {
				FDs map[string]string `json:"fds"`
			} `json:"metadata"`
		} `json:"metadata"`
	}
	require.NoError(w.t, json.Unmarshal(answer, &a))
	return &session{w: w, begin: time.Now(), id: a.Metadata.ID, fds: a.Metadata.Metadata.FDs, sockets: map[string]*sock{}, held: map[string]chan struct{}{}}
}

// shell is an exec with sockets of a shell script.
func (w *wire) shell(script string) *session {
	w.t.Helper()
	b, _ := json.Marshal(map[string]any{"command": []string{"sh", "-c", script}, "wait-for-websocket": true})
	return w.exec(string(b))
}

func (w *wire) terminal(script string) *session {
	w.t.Helper()
	b, _ := json.Marshal(map[string]any{"command": []string{"sh", "-c", script}, "wait-for-websocket": true, "interactive": true})
	return w.exec(string(b))
}

func (w *wire) upgrade(path string, header http.Header) (*websocket.Conn, *http.Response, error) {
	return w.dialer().Dial(strings.Replace(w.url(path), "http", "ws", 1), header)
}

// dialer sends messages that are longer than its buffer in fragments.
func (w *wire) dialer() *websocket.Dialer {
	d := &websocket.Dialer{NetDialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return w.dial(ctx) }, WriteBufferSize: 128 << 10}
	d.NetDialTLSContext = d.NetDialContext
	return d
}

// open dials sockets, one after the other.
func (s *session) open(names ...string) {
	s.w.t.Helper()
	for _, n := range names {
		k := s.dial(n)
		require.NotNil(s.w.t, k, n)
		s.sockets[n] = k
	}
}

// all dials the four sockets of a command: control before the command can have ended, the others beside each other, because the
// real server waits no longer than 5 s for them.
func (s *session) all() *session {
	s.w.t.Helper()
	s.open("control")
	names := []string{"0", "1", "2"}
	socks := make([]*sock, len(names))
	var dials sync.WaitGroup
	for n, name := range names {
		dials.Go(func() { socks[n] = s.dial(name) })
	}
	dials.Wait()
	for n, name := range names {
		require.NotNil(s.w.t, socks[n], name)
		s.sockets[name] = socks[n]
	}
	s.listen()
	return s
}

// listen asks for the result, for finish, before there is one: 5 s after the end nobody is told any more.
func (s *session) listen() {
	ctx, cancel := context.WithCancel(context.Background())
	s.told = make(chan func(), 1)
	over := make(chan struct{})
	s.w.t.Cleanup(func() { cancel(); <-over })
	go func() {
		defer close(over)
		path := "/1.0/operations/" + s.id + "/wait"
		res, b, err := s.w.ask(ctx, "GET", path, "", "")
		s.told <- func() {
			require.NoError(s.w.t, err)
			s.w.answer("GET", path, res, b)
		}
	}()
}

// dial dials one socket, or notes why not.
func (s *session) dial(name string) *sock {
	c, res, err := s.w.upgrade("/1.0/operations/"+s.id+"/websocket?secret="+s.fds[name], nil)
	if time.Since(s.begin) > 4*time.Second { // of the 5 that began before the answer was here
		s.w.mu.Lock()
		s.w.late = true
		s.w.mu.Unlock()
	}
	if err != nil {
		var b []byte
		status := 0
		if res != nil {
			b, _ = io.ReadAll(res.Body)
			status = res.StatusCode
		}
		s.w.note("dial %s: %d %s", name, status, b)
		return nil
	}
	k := &sock{name: name, conn: c, ended: make(chan struct{}), change: make(chan struct{})}
	// No pongs: the real server does not want them on 1 and 2.
	c.SetPingHandler(func(p string) error {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.pings, k.at = append(k.pings, p), append(k.at, time.Now())
		close(k.change)
		k.change = make(chan struct{})
		return nil
	})
	c.SetCloseHandler(func(code int, text string) error {
		k.add(fmt.Sprintf("CLOSE %d %q", code, text), nil)
		return nil
	})
	go k.read(s.held[name])
	s.w.t.Cleanup(func() { c.Close(); <-k.ended })
	return k
}

// hold keeps a socket that will be opened from being read before it is released.
func (s *session) hold(name string) (release func()) {
	held := make(chan struct{})
	s.held[name] = held
	release = sync.OnceFunc(func() { close(held) })
	s.w.t.Cleanup(release)
	return release
}

func (k *sock) read(held <-chan struct{}) {
	defer close(k.ended)
	if held != nil {
		<-held
	}
	for {
		kind, b, err := k.conn.ReadMessage()
		if err != nil {
			k.add("END", nil)
			return
		}
		if kind == websocket.BinaryMessage {
			k.add("", b)
			continue
		}
		k.add(fmt.Sprintf("TEXT %q", b), nil)
	}
}

func (k *sock) add(frame string, data []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.cut && frame != "END" {
		return
	}
	if frame == "" {
		k.data = append(k.data, data...)
		k.max = max(k.max, len(data))
		frame = "BINARY"
		if n := len(k.frames); n > 0 && k.frames[n-1] == frame {
			frame = ""
		}
	}
	if frame != "" {
		k.frames = append(k.frames, frame)
	}
	close(k.change)
	k.change = make(chan struct{})
}

// until waits for a condition on a socket.
func (k *sock) until(t testing.TB, what string, f func() bool) {
	t.Helper()
	timeout := time.After(patience)
	for {
		k.mu.Lock()
		ok, change := f(), k.change
		k.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-change:
		case <-k.ended:
			k.mu.Lock()
			defer k.mu.Unlock()
			require.True(t, f(), "socket %s ended without %s: %q", k.name, what, k.data)
			return
		case <-timeout:
			k.mu.Lock()
			defer k.mu.Unlock()
			require.Fail(t, "time-out", "socket %s: no %s: %q %v", k.name, what, k.data, k.frames)
		}
	}
}

// expect waits for output.
func (s *session) expect(name, text string) {
	s.w.t.Helper()
	k := s.sockets[name]
	k.until(s.w.t, text, func() bool { return strings.Contains(string(k.data), text) })
}

// mark waits for the end of a stream.
func (s *session) mark(name string) {
	s.w.t.Helper()
	k := s.sockets[name]
	k.until(s.w.t, "mark", func() bool { return slices.Contains(k.frames, `TEXT ""`) })
}

// ended waits for the end of a connection.
func (s *session) ended(name string) {
	s.w.t.Helper()
	select {
	case <-s.sockets[name].ended:
	case <-time.After(patience):
		require.Fail(s.w.t, "time-out", "socket %s has not ended", name)
	}
}

func (s *session) binary(name, data string) {
	_ = s.sockets[name].conn.WriteMessage(websocket.BinaryMessage, []byte(data))
}

func (s *session) text(name, data string) {
	_ = s.sockets[name].conn.WriteMessage(websocket.TextMessage, []byte(data))
}

func (s *session) closeFrame(name string, code int) {
	_ = s.sockets[name].conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, ""), time.Now().Add(patience))
}

// cut ends a connection of the client.
func (s *session) cut(name string) {
	k := s.sockets[name]
	k.mu.Lock()
	k.cut = true
	k.mu.Unlock()
	k.conn.NetConn().Close()
}

// result notes what /wait says, or with a timeout in seconds what it says so far.
func (s *session) result(query ...string) {
	s.w.do("GET", "/1.0/operations/"+s.id+"/wait"+strings.Join(query, ""), "", "")
}

// state is the operation now.
func (s *session) state() (status string, ret any, text string) {
	_, b := s.w.get("GET", "/1.0/operations/"+s.id, "", "")
	var a struct {
		Metadata struct {
			Status   string         `json:"status"`
			Err      string         `json:"err"`
			Metadata map[string]any `json:"metadata"`
		} `json:"metadata"`
	}
	_ = json.Unmarshal(b, &a)
	return a.Metadata.Status, a.Metadata.Metadata["return"], a.Metadata.Err
}

// finish waits for the end of the operation and of all sockets, and notes both.
func (s *session) finish() {
	s.w.t.Helper()
	if s.told == nil {
		s.result()
	} else {
		(<-s.told)()
	}
	s.frames()
}

func (s *session) frames() {
	s.w.t.Helper()
	var names []string
	for n := range s.sockets {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		s.ended(n)
		k := s.sockets[n]
		data := fmt.Sprintf("%q", k.data)
		if len(k.data) > 1000 {
			data = fmt.Sprintf("%d bytes", len(k.data))
		}
		s.w.note("%s: %s %s", n, strings.Join(k.frames, ", "), data)
	}
}

// An sftpWire speaks raw SFTP.
type sftpWire struct {
	w *wire
	c net.Conn
	n uint32
}

// sftp upgrades a connection; the answer is noted.
func (w *wire) sftp() *sftpWire {
	w.t.Helper()
	c, err := w.dial(context.Background())
	require.NoError(w.t, err)
	w.t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(c, "GET /1.0/instances/%s/sftp HTTP/1.1\r\nHost: lxd\r\nConnection: Upgrade\r\nUpgrade: sftp\r\n\r\n", w.instance)
	var head []byte
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		b := make([]byte, 1)
		_, err := io.ReadFull(c, b)
		require.NoError(w.t, err, "%s", head)
		head = append(head, b...)
	}
	w.note("%s", strings.TrimSpace(string(head)))
	return &sftpWire{w: w, c: c}
}

// send sends a packet: bytes are types, uint32 and uint64 numbers, strings go with their length.
func (x *sftpWire) send(fields ...any) {
	var b []byte
	for _, f := range fields {
		switch f := f.(type) {
		case int:
			b = append(b, byte(f))
		case uint32:
			b = binary.BigEndian.AppendUint32(b, f)
		case uint64:
			b = binary.BigEndian.AppendUint64(b, f)
		case string:
			b = append(binary.BigEndian.AppendUint32(b, uint32(len(f))), f...)
		default:
			panic(f)
		}
	}
	_, _ = x.c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
}

// receive reads one packet; nil is the end of the connection.
func (x *sftpWire) receive() []byte {
	var head [4]byte
	if _, err := io.ReadFull(x.c, head[:]); err != nil {
		return nil
	}
	b := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(x.c, b); err != nil {
		return nil
	}
	return b
}

// ask sends a request with the next id and notes the answer.
func (x *sftpWire) ask(kind int, fields ...any) []byte {
	b := x.reply(kind, fields...)
	text := fmt.Sprintf("%q", b)
	if len(b) > 200 {
		text = fmt.Sprintf("%q… %d bytes", b[:20], len(b))
	}
	x.w.note("sftp %d: %s", kind, text)
	return b
}

// reply sends a request with the next id and returns the answer.
func (x *sftpWire) reply(kind int, fields ...any) []byte {
	x.n++
	x.send(append([]any{kind, x.n}, fields...)...)
	return x.receive()
}

// handle is the handle in an answer.
func handle(b []byte) string {
	if len(b) < 9 || b[0] != 102 {
		return "none"
	}
	return string(b[9:])
}

// listen records events until stop, which waits for so many of one operation and its command and notes
// them, sorted: the real server sends them in no certain order.
func (w *wire) listen(types, command string) (stop func(id string, count int)) {
	w.t.Helper()
	c, _, err := w.upgrade("/1.0/events?type="+types, nil)
	require.NoError(w.t, err)
	// The listener is registered some time after the handshake: it is when an event arrives.
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		_, _, _ = c.ReadMessage()
	}()
	for waiting := true; waiting; {
		w.get("POST", "/1.0/instances/INSTANCE/exec", "", `{"command":["true"]}`)
		select {
		case <-heard:
			waiting = false
		case <-time.After(20 * time.Millisecond):
		}
	}
	return func(id string, count int) {
		defer c.Close()
		var events []string
		_ = c.SetReadDeadline(time.Now().Add(patience))
		for {
			_, b, err := c.ReadMessage()
			if !errors.Is(err, nil) {
				w.note("events: %v", err)
				return
			}
			if !strings.Contains(string(b), id) && !(strings.Contains(string(b), `"lifecycle"`) && strings.Contains(string(b), w.instance) && strings.Contains(string(b), command)) {
				continue
			}
			if events = append(events, w.normal(string(b))); len(events) == count {
				break
			}
		}
		slices.Sort(events)
		w.note("%s", strings.Join(events, "\n"))
	}
}
