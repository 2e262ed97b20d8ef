package transport

import (
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/gorilla/websocket"
)

// What a hostile or broken server may send: on a socket, as an answer, through the script that looks for what a command has left
// behind. Nothing of it may crash, hang or exhaust this process.

// said is a connection on which the other side has said all that it will, for as long as it is not closed.
type said struct {
	net.Conn // nil: what is not below is not called
	r        *bytes.Reader
}

func (c *said) Read(p []byte) (int, error)       { return c.r.Read(p) }
func (c *said) Write(p []byte) (int, error)      { return len(p), nil }
func (c *said) Close() error                     { return nil }
func (c *said) SetDeadline(time.Time) error      { return nil }
func (c *said) SetReadDeadline(time.Time) error  { return nil }
func (c *said) SetWriteDeadline(time.Time) error { return nil }

// socketThatSays connects a WebSocket, over which sent comes then.
func socketThatSays(t *testing.T, sent []byte) *websocket.Conn {
	t.Helper()
	d := websocket.Dialer{ReadBufferSize: readBuffer, NetDialContext: func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go func() {
			defer theirs.Close()
			req := make([]byte, 4096)
			n, _ := theirs.Read(req)
			key := ""
			for line := range strings.Lines(string(req[:n])) {
				if k, ok := strings.CutPrefix(line, "Sec-WebSocket-Key: "); ok {
					key = strings.TrimSpace(k)
				}
			}
			sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
			io.WriteString(theirs, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "+
				base64.StdEncoding.EncodeToString(sum[:])+"\r\n\r\n")
			theirs.SetDeadline(time.Now().Add(10 * time.Second))
			theirs.Write(sent)
		}()
		return ours, nil
	}}
	ws, _, err := d.Dial("ws://x/", nil)
	if err != nil {
		t.Fatal(err)
	}
	ws.SetPingHandler(func(string) error { return nil })
	ws.SetCloseHandler(func(int, string) error { return nil })
	return ws
}

// frames are seeds: what LXD sends, and what it should not.
func frames(f *testing.F) {
	for _, s := range []string{
		"\x89\x09keepalive\x82\x02hi\x81\x00", "\x82\x02hi\x81\x01x", "\x02\x01h\x80\x01i\x81\x00", "\x88\x02\x03\xe8", "\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff",
		"\x82\x7e\xff\xffhi", "\x82\x82\x01\x02\x03\x04hi", "\xff\xff\xde\xad", "\x80\x00", "\x01\x00\x80\x00", "\x89\x7e\x01\x00", "\x8a\x00\x82\x00\x81\x00",
	} {
		f.Add([]byte(s))
	}
}

// FuzzOutputFrames: no more output than bytes, none after the mark, and the end of the stream is told from a mark.
func FuzzOutputFrames(f *testing.F) {
	frames(f)
	f.Fuzz(func(t *testing.T, sent []byte) {
		ws := socketThatSays(t, sent)
		defer ws.Close()
		var out bytes.Buffer
		o := &output{name: "stdout", w: &out, turn: new(sync.Mutex), conn: ws, fail: func(error) { t.Error("a writer that does not fail has failed") }}
		o.run()
		whole, received := o.result()
		if int64(out.Len()) != received || out.Len() > len(sent) {
			t.Errorf("%d bytes written, %d received, %d sent", out.Len(), received, len(sent))
		}
		if whole && len(sent) < 2 {
			t.Errorf("%d bytes cannot hold a mark", len(sent))
		}
	})
}

// FuzzControlFrames: the control socket's reader ends with the connection, whatever comes.
func FuzzControlFrames(f *testing.F) {
	frames(f)
	f.Fuzz(func(t *testing.T, sent []byte) {
		ws := socketThatSays(t, sent)
		defer ws.Close()
		pings := 0
		(&control{conn: ws}).run(func() { pings++ }, func() {}, time.Minute)
		if pings > len(sent)/2 {
			t.Errorf("%d pings in %d bytes", pings, len(sent))
		}
	})
}

// FuzzInputFrames: what comes on stdin's socket is thrown away, and does not hold the input up.
func FuzzInputFrames(f *testing.F) {
	frames(f)
	f.Fuzz(func(t *testing.T, sent []byte) {
		ws := socketThatSays(t, sent)
		defer ws.Close()
		discardPings(ws)
	})
}

// answering is a transport whose server answers everything with the same bytes.
func answering(tb testing.TB, raw []byte) *LXD {
	tb.Helper()
	server, err := lxd.ConnectLXDHTTP(&lxd.ConnectionArgs{SkipGetServer: true}, &http.Client{Transport: &http.Transport{}})
	if err != nil {
		tb.Skip(err)
	}
	t, err := NewLXD(server, "c1", &LXDOptions{Liveness: minLiveness})
	if err != nil {
		tb.Fatal(err)
	}
	dial := func(context.Context, string, string) (net.Conn, error) { return &said{r: bytes.NewReader(raw)}, nil }
	t.rest.http.Transport = &http.Transport{DisableKeepAlives: true, DialContext: dial}
	t.rest.dialer = websocket.Dialer{NetDialContext: bounded(dial)}
	return t
}

// FuzzAnswers: a whole answer, header and body, to the request for a command, to the dial of a socket, and to the question for an operation.
func FuzzAnswers(f *testing.F) {
	for _, body := range []string{
		`{"type":"async","status":"Operation created","operation":"/1.0/operations/x","metadata":{"id":"x","status_code":103,"metadata":{"fds":{"0":"a","1":"b","2":"c","control":"d"}}}}`,
		`{"type":"sync","metadata":{"id":"x","status_code":200,"metadata":{"return":0}}}`, `{"type":"sync","metadata":{"status_code":400,"err":"Command not found","metadata":{"return":127}}}`,
		`{"type":"error","error_code":404,"error":"Operation not found"}`, `{"type":"error","error_code":500,"error":"\u0000\u001b[2J"}`, `null`, `[]`, `{"type":"sync","metadata":null}`,
	} {
		f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + body))
	}
	for _, raw := range []string{
		"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n", "HTTP/1.1 101 \r\nUpgrade: sftp\r\nConnection: Upgrade\r\n\r\n\x00\x00\x00\x05\x02\x00\x00\x00\x03",
		"HTTP/1.1 403 Forbidden\r\nContent-Length: 9999999999\r\n\r\n{", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n{}", "HTTP/1.0 301 X\r\nLocation: /\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", "HTTP/1.1 401 X\r\nWWW-Authenticate: Bearer\r\n\r\n", "\x15\x03\x01\x00\x02\x02\x16",
	} {
		f.Add([]byte(raw))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		host := answering(t, raw)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		e := &execution{t: host, cmd: Command{Args: []string{"true"}}, caller: ctx, ctx: ctx}
		if secrets, err := e.request(); err != nil {
			short(t, err)
		} else if e.id == "" {
			t.Errorf("an operation without a name, secrets %v", secrets)
		}
		if ws, err := host.rest.dial(ctx, "x", "secret", nil); err == nil {
			ws.Close()
			t.Error("nobody can know the key to accept")
		} else {
			short(t, err)
		}
		if op, err := host.getOperation(ctx, "/1.0/operations/x/wait", nil, time.Second); err != nil {
			short(t, err)
		} else if f := op.fate(); f.exited && (f.code < 0 || f.code > 255) || f.exited && f.notStarted() {
			t.Errorf("%+v", f)
		}
		if s, err := host.openSFTP(ctx); err == nil {
			s.Stat(ctx, "/x")
			s.Close()
		} else {
			short(t, err)
		}
		if ctx.Err() != nil {
			t.Error("it did not end")
		}
	})
}

// short fails where an error repeats too much of what the other side has said, or what a terminal would obey.
func short(t *testing.T, err error) {
	t.Helper()
	text := err.Error()
	if len(text) > 8<<10 || strings.ContainsAny(text, "\x00\x1b\r\n") {
		t.Errorf("%d bytes of error: %.200q", len(text), text)
	}
}

func FuzzReaped(f *testing.F) {
	for _, s := range []string{"killed A\nkilled A\nleft A\ndone\n", "done", "killed\n", "left  \n\n\ndone x\n", "\xff\x00"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, out []byte) {
		found, _ := parseReaped(out)
		n := 0
		for _, r := range found {
			n += r.killed + r.left
			_ = r.String()
		}
		if n > bytes.Count(out, []byte("\n"))+1 {
			t.Errorf("%d processes in %q", n, out)
		}
	})
}
