package lxdtest_test

import (
	"crypto/tls"
	"fmt"
	"maps"
	"net"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// socketScenarios are about the connections of a command: control, and what happens to the others.
var socketScenarios = []scenario{
	{"signal in a text", func(w *wire) {
		s := w.shell("trap 'echo got; exit 5' USR1; echo ready; while :; do sleep 0.05; done").all()
		s.expect("1", "ready\n")
		s.text("control", `{"command":"signal","signal":10}`)
		s.finish()
	}, []string{`"return":5`, `"ready\ngot\n"`}},

	{"signal in a binary message kills", func(w *wire) {
		s := w.exec(ws(`["sleep","20"]`)).all()
		s.binary("control", `{"command":"signal","signal":15,"args":{"x":"y"}}`)
		s.finish()
	}, []string{`"status":"Success"`, `"return":143`}},

	{"signal reaches the process only", func(w *wire) {
		s := w.shell("(" + waitFor("child") + "; echo child) & echo ready; wait").all()
		s.expect("1", "ready\n")
		s.text("control", `{"command":"signal","signal":9}`)
		s.ended("control")
		w.give("child")
		s.finish()
	}, []string{`"return":137`, `"ready\nchild\n"`}},

	{"signal reaches a tree through its leader", func(w *wire) {
		// The child says when it has lost the trap.
		s := w.exec(ws(`["setsid","sh","-c","trap 'trap - TERM; kill -TERM -$$' TERM; sh -c 'echo ready; exec sleep 20' & wait"]`)).all()
		s.expect("1", "ready\n")
		s.text("control", `{"command":"signal","signal":15}`)
		s.finish()
	}, []string{`"return":143`, `"ready\n"`}},

	{"garbage on control", func(w *wire) {
		s := w.shell("cat").all()
		for _, m := range []string{"", "{", `{"command":"nonsense"}`, `{"command":"signal","signal":0}`, `{"command":"signal","signal":999}`,
			`{"command":"signal","signal":"TERM"}`, `{"command":"window-resize","args":{"width":"10","height":"20"}}`, `[]`, `null`} {
			s.text("control", m)
		}
		s.binary("0", "still here\n")
		s.expect("1", "still here\n")
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"still here\n"`}},

	{"signal before the start", func(w *wire) {
		s := w.exec(ws(`["sleep","20"]`))
		s.open("control")
		s.text("control", `{"command":"signal","signal":15}`)
		s.open("0", "1", "2")
		s.finish()
	}, []string{`"return":143`}},

	{"control is cut", func(w *wire) {
		s := w.shell("echo ready; exec sleep 20").all()
		s.expect("1", "ready\n")
		s.cut("control")
		s.finish()
	}, []string{`"status":"Success"`, `"return":137`, `1: BINARY, TEXT "", END`}},

	{"control is closed with a message", func(w *wire) {
		s := w.shell("echo ready; exec sleep 20").all()
		s.expect("1", "ready\n")
		s.closeFrame("control", websocket.CloseNormalClosure)
		s.finish()
	}, []string{`"return":137`, `control: CLOSE 1000 "", END`}},

	{"control is cut before the start", func(w *wire) {
		s := w.exec(ws(`["sleep","20"]`))
		s.open("control")
		s.cut("control")
		s.open("0", "1", "2")
		s.finish()
	}, []string{`"return":137`}},

	{"control is cut while a child lives", func(w *wire) {
		s := w.shell("echo ready; sleep 1; echo never").all()
		s.expect("1", "ready\n")
		s.cut("control")
		s.finish()
	}, []string{`"return":137`, `"ready\n"`}},

	{"control comes late", func(w *wire) {
		s := w.shell("echo ready; exec cat")
		s.open("0", "1", "2")
		s.expect("1", "ready\n")
		s.open("control")
		s.text("control", `{"command":"signal","signal":15}`)
		s.finish()
	}, []string{`"return":143`}},

	{"control never comes", func(w *wire) {
		s := w.shell("echo hi")
		s.open("0", "1", "2")
		s.finish()
	}, []string{`"return":0`, `1: BINARY, TEXT "", END "hi\n"`}},

	{"stdout is cut without control", func(w *wire) {
		s := w.shell("echo ready; exec sleep 20")
		s.open("0", "1", "2")
		s.expect("1", "ready\n")
		s.cut("1")
		s.finish()
	}, []string{`"return":137`, `2: TEXT "", END ""`}},

	{"a message on stdout without control", func(w *wire) {
		s := w.shell("echo ready; exec sleep 20")
		s.open("0", "1", "2")
		s.expect("1", "ready\n")
		s.binary("1", "x")
		s.finish()
	}, []string{`"return":137`}},

	{"a message on stdout with control", func(w *wire) {
		s := w.shell("echo ready; cat").all()
		s.expect("1", "ready\n")
		s.binary("1", "x")
		s.binary("0", "alive\n")
		s.expect("1", "alive\n")
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"ready\nalive\n"`}},

	{"stdout is cut with control", func(w *wire) {
		s := w.shell("echo ready; exec yes").all()
		s.expect("1", "ready\n")
		s.cut("1")
		s.result()
	}, []string{`"return":141`}},

	{"stderr is cut", func(w *wire) {
		s := w.shell("echo ready >&2; exec yes >&2").all()
		s.expect("2", "ready\n")
		s.cut("2")
		s.result()
	}, []string{`"return":141`}},

	{"10 MiB of output", func(w *wire) {
		s := w.shell("yes | head -c 10485760").all()
		s.finish()
		w.note("at most 64 KiB in a message: %v, more than 4 KiB: %v", s.sockets["1"].max <= 64<<10, s.sockets["1"].max >= 4<<10)
	}, []string{`"return":0`, `10485760 bytes`, `: true, more than 4 KiB: true`}},

	{"a background child holds stdout open", func(w *wire) {
		s := w.shell("(" + waitFor("late") + "; echo late) & echo started").all()
		s.ended("control")
		status, _, _ := s.state()
		w.note("control has ended, the operation is %s", status)
		w.give("late")
		s.finish()
	}, []string{`the operation is Running`, `"return":0`, `"started\nlate\n"`}},

	{"a stdout that is closed early has no early end", func(w *wire) {
		s := w.shell("exec 0<&-; exec 1>&-; exec 2>&-; sleep 0.5").all()
		s.binary("0", "nobody reads\n")
		s.finish()
	}, []string{`"return":0`, `1: TEXT "", END`}},

	{"stderr socket is not connected", func(w *wire) {
		s := w.shell("echo hi")
		s.open("control", "0", "1")
		s.finish()
	}, []string{`"status":"Failure","status_code":400`, `"err":"Timed out waiting for websockets to connect"`, `0: END ""`, `1: END ""`, `control: END ""`}},

	{"no socket is connected", func(w *wire) {
		w.shell("echo hi").result()
	}, []string{`"err":"Timed out waiting for websockets to connect"`}},

	{"a secret is dialled twice", func(w *wire) {
		s := w.shell("echo ready; exec cat").all()
		s.expect("1", "ready\n") // the answer to the first dial comes before the server has taken it in
		second := s.dial("1")
		w.note("second: %v", second != nil)
		s.binary("0", "to the first\n")
		s.expect("1", "to the first\n")
		s.text("0", "")
		s.finish()
		second.mu.Lock()
		defer second.mu.Unlock()
		w.note("to the second: %q", second.data)
	}, []string{`second: true`, `"return":0`, `"ready\nto the first\n"`, `to the second: ""`}},

	{"dials that are refused", func(w *wire) {
		s := w.shell("cat").all()
		op := "/1.0/operations/" + s.id + "/websocket"
		up := "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
		w.do("GET", op+"?secret=nonsense", up, "")
		w.do("GET", op+"?secret="+s.fds["1"], "", "")
		w.do("GET", op, up, "")
		w.do("GET", op+"?secret="+s.fds["1"], strings.Replace(up, "13", "12", 1), "")
		w.do("GET", "/1.0/operations/nonsense/websocket", up, "")
		w.do("GET", "/1.0/operations/nonsense/websocket?secret=x", up, "")
		w.do("POST", op+"?secret="+s.fds["1"], "", "")
		s.text("0", "")
		s.finish()
		s.dial("1")
	}, []string{"500", "permission denied", "400", "Bad Request\n", `"error_code":500`, "missing secret", "400", "Bad Request\n", "400", "missing secret", "404", "Operation not found", "501",
		"dial 1: 500", "Only running operations can be connected"}},

	{"dials of what has failed", func(w *wire) {
		s := w.shell("exit 127").all()
		s.finish()
		op := "/1.0/operations/" + s.id + "/websocket"
		up := "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
		w.do("GET", op+"?secret="+s.fds["control"], up, "")
		w.do("GET", op+"?secret=nonsense", up, "")
		w.do("GET", op, up, "")
		w.do("GET", op+"?secret="+s.fds["1"], "", "")
	}, []string{"500", "Only running operations can be connected"}},

	{"a foreign origin", func(w *wire) {
		s := w.shell("echo hi")
		s.open("0", "control", "2")
		c, res, err := w.upgrade("/1.0/operations/"+s.id+"/websocket?secret="+s.fds["1"], map[string][]string{"Origin": {"https://elsewhere.example"}})
		w.note("%d %v", res.StatusCode, err)
		if err == nil {
			c.Close()
		} else {
			s.open("1")
		}
		s.result()
	}, []string{"101"}},

	{"any signal that the kernel knows", func(w *wire) {
		for _, n := range []int{1, 2, 13, 31, 40, 64} {
			if n > 31 && runtime.GOOS != "linux" {
				break // for the fake's commands
			}
			s := w.shell("echo ready; exec sleep 20").all()
			s.expect("1", "ready\n")
			s.text("control", fmt.Sprintf(`{"command":"signal","signal":%d}`, n))
			s.result()
		}
	}, []string{`"return":129`, `"return":130`, `"return":141`, `"return":159`}},

	{"a close message on stdout without control", func(w *wire) {
		s := w.shell("echo ready; exec sleep 20")
		s.open("0", "1", "2")
		s.expect("1", "ready\n")
		s.closeFrame("1", websocket.CloseNormalClosure)
		s.result()
	}, []string{`"return":137`}},

	{"a message on stderr without control", func(w *wire) {
		s := w.shell("echo ready; cat")
		s.open("0", "1", "2")
		s.expect("1", "ready\n")
		s.binary("2", "x")
		s.binary("0", "alive\n")
		s.expect("1", "alive\n")
		s.text("0", "")
		s.result()
	}, []string{`"return":0`}},

	{"control is dialled when the command has ended", func(w *wire) {
		s := w.shell("true")
		s.open("0", "1", "2")
		s.result()
		s.dial("control")
	}, []string{`"return":0`, "dial control: 500", "Only running operations can be connected"}},

	{"a stranger who has the secret", func(w *wire) {
		if w.tls == nil {
			return // there are none
		}
		s := w.exec(ws(`["true"]`))
		stranger := w.of(w.instance)
		stranger.tls = w.tls.Clone()
		stranger.tls.Certificates = nil
		other := &session{w: stranger, id: s.id, fds: s.fds}
		in := other.dial("1") != nil
		w.note("let in: %v", in)
		s.open("control", "0", "2")
		if !in {
			s.open("1")
		}
		s.result()
	}, nil},

	{"pongs destroy output that a slow client has not taken yet", func(w *wire) {
		if w.tls == nil {
			return // a unix socket loses nothing
		}
		for n, pong := range []bool{false, true} {
			begin := fmt.Sprintf("pong%d", n)
			s := w.shell(waitFor(begin) + "; head -c 900000 /dev/zero >&2")
			release := s.hold("2")
			s.all()
			k := s.sockets["2"]
			// What does not fit in here waits at the server.
			require.NoError(w.t, k.conn.NetConn().(*tls.Conn).NetConn().(*net.TCPConn).SetReadBuffer(8<<10))
			if pong {
				require.NoError(w.t, k.conn.WriteControl(websocket.PongMessage, []byte("keepalive"), time.Now().Add(patience)))
			}
			w.give(begin)
			s.result()
			release()
			s.ended("2")
			w.note("pong: %v, all of it: %v, the mark: %v", pong, len(k.data) == 900000, slices.Contains(k.frames, `TEXT ""`))
		}
	}, []string{`"return":0`, "pong: false, all of it: true, the mark: true", `"return":0`, "pong: true, all of it: false, the mark: false"}},

	{"stdin is lost when its socket is closed behind the end", func(w *wire) {
		if w.tls == nil {
			return // a unix socket keeps what it has taken, and takes less
		}
		// The next ping meets a socket that is not there any more.
		s := w.shell(waitFor("read-stdin") + "; test $(wc -c) = 1310720 && echo all || echo not all").all()
		for range 20 {
			s.binary("0", strings.Repeat("x", 64<<10))
		}
		s.text("0", "")
		s.cut("0")
		k := s.sockets["1"]
		k.mu.Lock()
		pings := len(k.pings)
		k.mu.Unlock()
		k.until(w.t, "two more pings", func() bool { return len(k.pings) > pings+1 })
		w.give("read-stdin")
		s.finish()
	}, []string{`"return":0`, `"not all\n"`}},

	{"a client that takes nothing for two minutes", func(w *wire) {
		if w.tls == nil || runtime.GOOS != "linux" {
			return // it is TCP's affair, and the fake does it on Linux
		}
		s := w.exec(ws(`["head","-c","20000000","/dev/zero"]`))
		release := s.hold("1")
		s.all()
		select {
		case <-s.sockets["control"].ended:
		case <-time.After(5 * time.Minute):
			require.Fail(w.t, "time-out")
		}
		s.result()
		release()
		s.ended("1")
		k := s.sockets["1"]
		w.note("all of it: %v, the mark: %v", len(k.data) == 20000000, slices.Contains(k.frames, `TEXT ""`))
	}, []string{`"return":141`, "all of it: false, the mark: false"}},

	{"a handshake", func(w *wire) {
		s := w.shell("true")
		d := w.dialer()
		d.EnableCompression, d.Subprotocols = true, []string{"chat"}
		c, res, err := d.Dial(strings.Replace(w.url("/1.0/operations/"+s.id+"/websocket?secret="+s.fds["1"]), "http", "ws", 1), nil)
		require.NoError(w.t, err)
		c.Close()
		w.note("%d %v", res.StatusCode, slices.Sorted(maps.Keys(res.Header)))
	}, []string{"101 [Connection Sec-Websocket-Accept Upgrade]"}},
}
