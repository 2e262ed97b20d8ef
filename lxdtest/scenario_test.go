package lxdtest_test

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// A scenario is a conversation with a server. The differential test has it with the fake and the real
// one and compares the transcripts; TestTraces compares the fake's with what is expected of it.
type scenario struct {
	name string
	do   func(w *wire)
	want []string // lines, or parts of them, that the transcript has in this order
}

const octets = "Content-Type: application/octet-stream\n"

// linger keeps the output of a command in a terminal alive: the real server loses, now and then, what is
// written right before the end.
const linger = "; sleep 0.2"

// ws is the body of an exec with sockets of a command that is no shell script.
func ws(command string, more ...string) string {
	return `{"command":` + command + `,"wait-for-websocket":true` + strings.Join(more, "") + `}`
}

var scenarios = []scenario{
	{"echo", func(w *wire) {
		w.shell("echo hi").all().finish()
	}, []string{`"status":"Success","status_code":200`, `"return":0`, `0: END ""`, `1: BINARY, TEXT "", END "hi\n"`, `2: TEXT "", END ""`, `control: END ""`}},

	{"exit status", func(w *wire) {
		w.shell("exit 3").all().finish()
	}, []string{`"return":3`}},

	{"stdout and stderr", func(w *wire) {
		w.shell("echo out; echo err >&2").all().finish()
	}, []string{`1: BINARY, TEXT "", END "out\n"`, `2: BINARY, TEXT "", END "err\n"`}},

	{"the order of the sockets is free", func(w *wire) {
		s := w.shell("echo hi")
		s.open("2", "1", "control", "0")
		s.finish()
	}, []string{`"return":0`, `"hi\n"`}},

	{"stdin: an empty message is nothing, a text is the end", func(w *wire) {
		s := w.shell("cat").all()
		s.binary("0", "first\n")
		s.expect("1", "first\n")
		s.binary("0", "")
		s.binary("0", "second\n")
		s.expect("1", "second\n")
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"first\nsecond\n"`}},

	{"stdin: what a text says is lost", func(w *wire) {
		s := w.shell("cat").all()
		s.binary("0", "kept\n")
		s.text("0", "lost\n")
		s.finish()
	}, []string{`"return":0`, `"kept\n"`}},

	{"stdin: what comes behind the end is ignored", func(w *wire) {
		s := w.shell("cat; sleep 0.3; echo end").all()
		s.binary("0", "kept\n")
		s.text("0", "")
		s.binary("0", "late\n")
		s.expect("1", "end\n")
		s.finish()
	}, []string{`"return":0`, `"kept\nend\n"`}},

	{"stdin: a close message is the end", func(w *wire) {
		s := w.shell("cat; sleep 0.3").all()
		s.binary("0", "x\n")
		s.closeFrame("0", websocket.CloseNormalClosure)
		s.finish()
	}, []string{`"return":0`, `0: CLOSE 1000 "", END`, `1: BINARY, TEXT "", END "x\n"`}},

	{"stdin: a closed connection is the end", func(w *wire) {
		s := w.shell("cat; echo end").all()
		s.binary("0", "x\n")
		s.expect("1", "x\n")
		s.cut("0")
		s.finish()
	}, []string{`"return":0`, `"x\nend\n"`}},

	{"stdin: one message of 1 MiB", func(w *wire) {
		s := w.shell("wc -c").all()
		s.binary("0", strings.Repeat("x", 1<<20))
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"1048576\n"`}},

	{"stdin: the command does not read it", func(w *wire) {
		s := w.shell("head -c 10; echo; echo done").all()
		go func() {
			for range 20 {
				if s.sockets["0"].conn.WriteMessage(websocket.BinaryMessage, make([]byte, 64<<10)) != nil {
					return
				}
			}
		}()
		s.finish()
	}, []string{`"return":0`, `1: BINARY, TEXT "", END`}},

	{"a command that does not exist", func(w *wire) {
		s := w.exec(ws(`["no-such-command"]`)).all()
		s.finish()
		w.do("GET", "/1.0/operations/"+s.id, "", "")
	}, []string{`"status":"Failure","status_code":400`, `"return":127`, `"err":"Command not found"`, `1: TEXT "", END ""`, `2: TEXT "", END ""`}},

	{"a directory as a command", func(w *wire) {
		w.exec(ws(`["/etc"]`)).all().finish()
	}, []string{`"status":"Failure"`, `"return":126`, `"err":"Command not executable"`}},

	{"a file without permission to be run", func(w *wire) {
		w.get("POST", "/1.0/instances/INSTANCE/files?path=/tmp/plain", octets+"X-LXD-mode: 0644", "#!/bin/sh\n")
		w.exec(ws(`["/tmp/plain"]`)).all().finish()
	}, []string{`"return":126`}},

	{"a script whose interpreter is missing", func(w *wire) {
		w.get("POST", "/1.0/instances/INSTANCE/files?path=/tmp/lost", octets+"X-LXD-mode: 0755", "#!/no/such/interpreter\n")
		w.exec(ws(`["/tmp/lost"]`)).all().finish()
	}, []string{`"return":127`, `"err":"Command not found"`}},

	{"a script without an interpreter", func(w *wire) {
		w.get("POST", "/1.0/instances/INSTANCE/files?path=/tmp/text", octets+"X-LXD-mode: 0755", "echo run; exit 4\n")
		w.exec(ws(`["/tmp/text"]`)).all().finish()
	}, []string{`"return":4`, `"run\n"`}},

	{"an ordinary exit with 127 and 126", func(w *wire) {
		w.shell("exit 127").all().finish()
		w.shell("exit 126").all().finish()
	}, []string{`"err":"Command not found"`, `"err":"Command not executable"`}},

	{"an empty name of a command", func(w *wire) {
		w.exec(ws(`[""]`)).all().finish()
	}, []string{`"return":127`}},

	{"no command at all", func(w *wire) {
		w.exec(ws(`[]`)).all().finish()
		w.exec(`{"wait-for-websocket":true}`).all().finish()
	}, []string{`"return":-1`, `"err":"Failed to retrieve PID of executing child process"`, `1: END ""`, `2: END ""`}},

	{"an argument that is too long", func(w *wire) {
		w.exec(ws(`["echo","` + strings.Repeat("x", 140000) + `"]`)).all().frames()
	}, []string{`1: END ""`}},

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
		s := w.shell("(sleep 1; echo child) & echo ready; wait").all()
		s.expect("1", "ready\n")
		s.text("control", `{"command":"signal","signal":9}`)
		s.finish()
	}, []string{`"return":137`, `"ready\nchild\n"`}},

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
		s := w.shell("(sleep 1; echo late) & echo started").all()
		s.ended("control")
		status, _, _ := s.state()
		w.note("control has ended, the operation is %s", status)
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
		s := w.shell("cat").all()
		second := s.dial("1")
		w.note("second: %v", second != nil)
		s.binary("0", "to the first\n")
		s.expect("1", "to the first\n")
		s.text("0", "")
		s.finish()
	}, []string{`second: true`, `"return":0`, `"to the first\n"`}},

	{"dials that are refused", func(w *wire) {
		s := w.shell("cat").all()
		op := "/1.0/operations/" + s.id + "/websocket"
		up := "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
		w.do("GET", op+"?secret=nonsense", up, "")
		w.do("GET", op, up, "")
		w.do("GET", "/1.0/operations/nonsense/websocket", up, "")
		w.do("GET", "/1.0/operations/nonsense/websocket?secret=x", up, "")
		w.do("POST", op+"?secret="+s.fds["1"], "", "")
		s.text("0", "")
		s.finish()
		s.dial("1")
	}, []string{"500", "permission denied", "missing secret", "400", "missing secret", "404", "Operation not found", "501",
		"dial 1: 500", "Only running operations can be connected"}},

	{"a foreign origin", func(w *wire) {
		s := w.shell("echo hi")
		s.open("0", "control", "2")
		c, res, err := w.upgrade("/1.0/operations/"+s.id+"/websocket?secret="+s.fds["1"], map[string][]string{"Origin": {"https://elsewhere.example"}})
		w.note("%d %v", res.StatusCode, err)
		c.Close()
		s.result()
	}, []string{"101"}},

	{"terminal: the operation waits for an answer", func(w *wire) {
		s := w.terminal("echo x" + linger)
		s.open("control", "0")
		s.mark("0")
		s.ended("control")
		s.result("?timeout=1")
		s.text("0", "")
		s.finish()
	}, []string{`"status":"Running"`, `"status":"Success"`, `0: BINARY, TEXT "", END "x\r\n"`}},

	{"terminal: a close message is an answer", func(w *wire) {
		s := w.terminal("echo x" + linger)
		s.open("0", "control")
		s.mark("0")
		s.closeFrame("0", websocket.CloseNormalClosure)
		s.finish()
	}, []string{`"return":0`, `0: BINARY, TEXT "", CLOSE 1000 "", END "x\r\n"`}},

	{"terminal: end of file and echo", func(w *wire) {
		s := w.terminal("cat")
		s.open("0", "control")
		s.binary("0", "hello\r")
		s.expect("0", "hello\r\nhello\r\n")
		s.binary("0", "\x04")
		s.mark("0")
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"hello\r\nhello\r\n"`}},

	{"terminal: interrupt", func(w *wire) {
		s := w.terminal("trap 'echo got" + linger + "; exit 7' INT; echo ready; while :; do sleep 0.05; done")
		s.open("0", "control")
		s.expect("0", "ready\r\n")
		s.binary("0", "\x03")
		s.mark("0")
		s.text("0", "")
		s.finish()
	}, []string{`"return":7`, `ready\r\n^Cgot\r\n`}},

	{"terminal: death by interrupt", func(w *wire) {
		s := w.terminal("echo ready; exec sleep 20")
		s.open("0", "control")
		s.expect("0", "ready\r\n")
		s.binary("0", "\x03")
		s.mark("0")
		s.text("0", "")
		// Whether the echo of ^C is still read is a race in the kernel: no frames.
		s.result()
	}, []string{`"return":130`}},

	{"terminal: size", func(w *wire) {
		s := w.exec(ws(`["sh","-c","stty size; until [ \"$(stty size)\" = \"41 121\" ]; do sleep 0.05; done; echo resized`+linger+`"]`, `,"interactive":true,"width":100,"height":30`))
		s.open("0", "control")
		s.expect("0", "30 100\r\n")
		// Numbers that are no strings, and strings that are no numbers, are no sizes.
		s.text("control", `{"command":"window-resize","args":{"width":120,"height":40}}`)
		s.text("control", `{"command":"window-resize","args":{"width":"x","height":"40"}}`)
		s.text("control", `{"command":"window-resize","args":{"width":"121","height":"41"}}`)
		s.mark("0")
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"30 100\r\nresized\r\n"`}},

	{"terminal: default size", func(w *wire) {
		s := w.exec(ws(`["sh","-c","stty size`+linger+`"]`, `,"interactive":true,"width":100`))
		s.open("0", "control")
		s.mark("0")
		s.text("0", "")
		s.finish()
	}, []string{`"25 80\r\n"`}},

	{"terminal: the data socket is cut", func(w *wire) {
		s := w.exec(ws(`["sh","-c","echo ready; sleep 0.5; echo alive > survived"]`, `,"interactive":true,"cwd":"/tmp"`))
		s.open("0", "control")
		s.expect("0", "ready\r\n")
		s.cut("0")
		// The command lives on. The result is not asked for: now and then the real server's operation
		// goes on running for ever.
		s.ended("control")
		w.until("/1.0/instances/INSTANCE/files?path=/tmp/survived")
		w.do("GET", "/1.0/instances/INSTANCE/files?path=/tmp/survived", "", "")
	}, []string{"alive"}},

	{"terminal: control is cut", func(w *wire) {
		s := w.terminal("echo ready; exec sleep 20")
		s.open("0", "control")
		s.expect("0", "ready\r\n")
		s.cut("control")
		s.mark("0")
		s.text("0", "")
		s.finish()
	}, []string{`"return":137`}},

	{"terminal: control never comes", func(w *wire) {
		s := w.terminal("echo x")
		s.open("0")
		s.finish()
	}, []string{`"err":"Timed out waiting for websockets to connect"`, `0: END ""`}},

	{"terminal: stderr goes the same way", func(w *wire) {
		s := w.terminal("echo out; echo err >&2" + linger)
		s.open("0", "control")
		s.mark("0")
		s.text("0", "")
		s.finish()
	}, []string{`"out\r\nerr\r\n"`}},

	{"without sockets", func(w *wire) {
		b := w.do("POST", "/1.0/instances/INSTANCE/exec", "", `{"command":["sh","-c","cat; echo out; exit 3"]}`)
		s := w.session(b)
		s.result()
		w.do("GET", "/1.0/operations/"+s.id, "", "")
		w.do("GET", "/1.0/operations/"+s.id+"/websocket?secret=x", "", "")
		w.do("DELETE", "/1.0/operations/"+s.id, "", "")
	}, []string{"202", `"class":"task"`, `"metadata":null`, `{"return":3}`, `{"return":3}`, "500", "Only websocket operations can be connected", "400", "Only running operations can be cancelled"}},

	{"recorded output", func(w *wire) {
		s := w.exec(`{"command":["sh","-c","echo out; echo err >&2"],"record-output":true}`)
		s.result()
		for _, n := range []string{"stdout", "stderr"} {
			url := "/1.0/instances/INSTANCE/logs/exec_" + s.id + "." + n
			w.do("GET", url, "", "")
			w.do("DELETE", url, "", "")
			res, _ := w.get("GET", url, "", "")
			w.note("deleted: %d", res.StatusCode)
		}
	}, []string{`"output":{"1":"/1.0/instances/INSTANCE/logs/exec_ID.stdout","2":"/1.0/instances/INSTANCE/logs/exec_ID.stderr"},"return":0`, "out", "{}", "500", "err", "{}"}},

	{"waiting with a time-out", func(w *wire) {
		s := w.exec(`{"command":["sleep","1.5"]}`)
		s.result("?timeout=0")
		s.result("?timeout=1")
		s.result("?timeout=nonsense")
		s.result("?timeout=-1&project=nonsense")
		w.do("GET", "/1.0/operations/nonsense/wait", "", "")
	}, []string{`"status":"Running"`, `"status":"Running"`, `500`, `strconv.Atoi: parsing \"nonsense\": invalid syntax`, `"status":"Success"`, "404", "Operation not found"}},

	{"an operation vanishes", func(w *wire) {
		s := w.shell("exit 0").all()
		s.finish()
		until(w.t, func() bool { status, _, _ := s.state(); return status == "" })
		s.result()
		w.do("GET", "/1.0/operations/"+s.id, "", "")
		s.dial("1")
		w.do("DELETE", "/1.0/operations/"+s.id, "", "")
	}, []string{"404", "Operation not found", "404", "dial 1: 404", "404"}},

	{"a running exec cannot be cancelled", func(w *wire) {
		s := w.shell("cat").all()
		w.do("DELETE", "/1.0/operations/"+s.id, "", "")
		s.text("0", "")
		s.finish()
	}, []string{"400", "This operation can't be cancelled", `"return":0`}},

	{"the answer to a request with sockets", func(w *wire) {
		s := w.session(w.do("POST", "/1.0/instances/INSTANCE/exec", "", ws(`["true"]`, `,"environment":{"A":"b","LANG":"C"},"record-output":true,"nonsense":1`)))
		w.note("%d secrets", len(s.fds))
		s.all().finish()
		i := w.session(w.do("POST", "/1.0/instances/INSTANCE/exec", "", ws(`["true"]`, `,"interactive":true,"user":5,"group":6,"cwd":"/tmp"`)))
		w.note("%d secrets", len(i.fds))
		i.open("0", "control")
		i.mark("0")
		i.text("0", "")
		i.finish()
	}, []string{"202", "Location: /1.0/operations/ID", `"class":"websocket"`, `"HOME":"/root"`, "4 secrets", "2 secrets"}},

	{"requests that are refused", func(w *wire) {
		for _, body := range []string{"", "{", "[]", `{"command":"x"}`, `{"user":-1}`, `{"user":"root"}`, `{"environment":{"a":1}}`, `{"environment":[]}`, `{"interactive":"yes"}`, `{"width":"80"}`} {
			w.do("POST", "/1.0/instances/INSTANCE/exec", "", body)
		}
		for _, path := range []string{"/1.0/instances/nobody/exec", "/1.0/instances/INSTANCE/exec?project=nobody", "/1.0/instances/INSTANCE%2Fsnap/exec", "/1.0/instances/INSTANCE/snap/exec", "/1.0/instances/INSTANCE/nonsense", "/1.0/nonsense", "/2.0"} {
			w.do("POST", path, "", `{"command":["true"]}`)
		}
		w.do("GET", "/1.0/instances/INSTANCE/exec", "", "")
		w.do("PUT", "/1.0/instances/INSTANCE/exec", "", "")
	}, []string{"unexpected end of JSON input", "InstanceExecPost.command of type []string", "404", "Instance not found", "501", "not implemented"}},

	{"addresses of old", func(w *wire) {
		w.exec(ws(`["true"]`)).all().finish()
		res, _ := w.get("GET", "/1.0/containers/INSTANCE", "", "")
		w.note("%d", res.StatusCode)
		s := w.session(w.do("POST", "/1.0/containers/INSTANCE/exec", "", `{"command":["true"]}`))
		s.result()
	}, []string{"200", "202"}},

	{"pings", func(w *wire) {
		s := w.shell("cat").all()
		for _, n := range []string{"0", "1", "2", "control"} {
			k := s.sockets[n]
			k.until(w.t, "ping", func() bool { return len(k.pings) > 0 })
			w.note("%s: ping %q", n, k.pings[0])
		}
		s.text("0", "")
		s.finish()
	}, []string{`0: ping "keepalive"`, `1: ping "keepalive"`, `2: ping "keepalive"`, `control: ping "keepalive"`}},

	{"a client's ping", func(w *wire) {
		s := w.shell("cat").all()
		for _, n := range []string{"0", "control"} {
			got := make(chan string, 1)
			s.sockets[n].conn.SetPongHandler(func(p string) error { got <- p; return nil })
			_ = s.sockets[n].conn.WriteControl(websocket.PingMessage, []byte("are you there"), time.Now().Add(patience))
			select {
			case p := <-got:
				w.note("%s: pong %q", n, p)
			case <-time.After(patience):
				w.note("%s: no pong", n)
			}
		}
		s.text("0", "")
		s.finish()
	}, []string{`0: pong "are you there"`, `control: pong "are you there"`}},

	{"events of an exec", func(w *wire) {
		stop := w.listen("operation,lifecycle", "exit 127")
		s := w.shell("exit 127").all()
		s.result()
		stop(s.id, 5)
	}, []string{`"action":"instance-exec"`, `"status":"Failure"`, `"return":127`, `"status":"Pending"`, `"status":"Running"`, `"status":"Running"`}},

	{"events that do not exist", func(w *wire) {
		w.do("GET", "/1.0/events?type=nonsense", "", "")
		w.do("GET", "/1.0/events", "", "")
	}, []string{"500", `\"nonsense\" isn't a supported event type`, "400"}},

	{"a file", func(w *wire) {
		file := "/1.0/instances/INSTANCE/files?path=/tmp/file"
		w.do("POST", file, octets+"X-LXD-mode: 0640\nX-LXD-uid: 5\nX-LXD-gid: 6", "hello")
		w.do("GET", file, "", "")
		w.do("HEAD", file, "", "")
		w.do("GET", file, "Range: bytes=1-2", "")
		w.do("GET", file, "Range: bytes=9-", "")
		w.do("POST", file, octets+"X-LXD-mode: 0600\nX-LXD-uid: 7", "shorter")
		w.do("GET", file, "", "")
		w.do("POST", file, octets+"X-LXD-write: append", " and longer")
		w.do("GET", file, "", "")
		w.do("GET", "/1.0/instances/INSTANCE/files?path=tmp/../tmp//file", "", "")
		w.do("DELETE", file, "", "")
		w.do("GET", file, "", "")
		w.do("HEAD", file, "", "")
		w.do("DELETE", file, "", "")
	}, []string{"X-Lxd-Mode: 0640", "X-Lxd-Uid: 5", "hello", "206", "el", "416", "X-Lxd-Mode: 0640", "shorter", "shorter and longer", "404", "Not Found", "404", "404"}},

	{"modes of a new file", func(w *wire) {
		for n, mode := range []string{"", "0644", "644", "4755", "07777", "888", "0", "nonsense", "0x1ff"} {
			file := fmt.Sprintf("/1.0/instances/INSTANCE/files?path=/tmp/mode%d", n)
			header := octets
			if mode != "" {
				header += "X-LXD-mode: " + mode
			}
			w.do("POST", file, header, "x")
			w.do("HEAD", file, "", "")
		}
	}, []string{"X-Lxd-Mode: 0644", "X-Lxd-Mode: 0644", "X-Lxd-Mode: 0204", "X-Lxd-Mode: 0223"}},

	{"a form is no file", func(w *wire) {
		w.do("POST", "/1.0/instances/INSTANCE/files?path=/tmp/form", "Content-Type: application/x-www-form-urlencoded", "hello")
		w.do("GET", "/1.0/instances/INSTANCE/files?path=/tmp/form", "", "")
	}, []string{"200", "Content-Length: 0"}},

	{"directories", func(w *wire) {
		dir := "/1.0/instances/INSTANCE/files?path=/tmp/dir"
		w.do("POST", dir, "X-LXD-type: directory", "")
		w.do("GET", dir, "", "")
		w.do("HEAD", dir, "", "")
		w.do("POST", dir, "X-LXD-type: directory\nX-LXD-mode: 0700", "")
		w.do("POST", dir+"/deep/er", "X-LXD-type: directory", "")
		w.do("POST", dir+"/one", octets, "1")
		w.do("POST", dir+"/one", "X-LXD-type: directory", "")
		w.do("GET", dir, "", "")
		w.do("POST", dir, octets, "not a file")
		w.do("POST", dir+"/no/file", octets, "x")
		w.do("POST", dir+"/append", octets+"X-LXD-write: append", "x")
		w.do("POST", dir+"/one/below", octets, "x")
		w.do("DELETE", dir, "", "")
		w.do("DELETE", dir+"/one", "", "")
		w.do("DELETE", dir, "", "")
	}, []string{"200", "X-Lxd-Mode: 0750", "404", `["one"]`, "500", "is a directory", "404", "404", "500", "directory not empty", "200", "200"}},

	{"symbolic links", func(w *wire) {
		base := "/1.0/instances/INSTANCE/files?path=/tmp/"
		link := "X-LXD-type: symlink\n" + octets
		w.do("POST", base+"link", link, "target")
		w.do("GET", base+"link", "", "")
		w.do("HEAD", base+"link", "", "")
		w.do("POST", base+"link", link, "target")
		w.do("POST", base+"link", link, "other")
		w.do("POST", base+"link", octets, "through a dangling link")
		w.do("GET", base+"target", "", "")
		w.do("POST", base+"out", link, "../../../../../../../../tmp")
		w.do("GET", base+"out/target", "", "")
		w.do("DELETE", base+"link", "", "")
		w.do("GET", base+"target", "", "")
	}, []string{"X-Lxd-Mode: 0777", "X-Lxd-Type: symlink", "/tmp/target", "200", "500", "file exists", "through a dangling link", "through a dangling link"}},

	{"file requests that are refused", func(w *wire) {
		base := "/1.0/instances/INSTANCE/files"
		for _, m := range []string{"GET", "POST", "DELETE"} {
			w.do(m, base, "", "")
		}
		w.do("PUT", base+"?path=/tmp/x", "", "")
		w.do("POST", base+"?path=/tmp/x", "X-LXD-type: nonsense", "")
		w.do("POST", base+"?path=/tmp/x", "X-LXD-write: nonsense", "")
		w.do("POST", base+"?path=/tmp/uid", octets+"X-LXD-uid: nonsense", "x")
		w.do("GET", base+"?path=/tmp/uid", "", "")
		w.do("GET", base+"?path=/etc&project=nobody", "", "")
		w.do("GET", "/1.0/instances/nobody/files?path=/etc", "", "")
	}, []string{"Missing path argument", "501", "Bad file type: nonsense", "Bad file write mode: nonsense", "X-Lxd-Uid: 0", "404", "404"}},

	{"SFTP is refused", func(w *wire) {
		w.do("GET", "/1.0/instances/INSTANCE/sftp", "", "")
		w.do("GET", "/1.0/instances/INSTANCE/sftp", "Connection: Upgrade\nUpgrade: nonsense", "")
		w.do("GET", "/1.0/instances/nobody/sftp", "Connection: Upgrade\nUpgrade: sftp", "")
		w.do("POST", "/1.0/instances/INSTANCE/sftp", "", "")
	}, []string{"400", "Missing or invalid upgrade header", "400", "404", "Instance not found", "501"}},

	{"SFTP files", func(w *wire) {
		x := w.sftp()
		x.send(1, uint32(3))
		w.note("%q", x.receive())
		const r, wr, creat, trunc, excl = uint32(1), uint32(2), uint32(8), uint32(16), uint32(32)
		h := handle(x.ask(3, "/tmp/sftp", wr|creat|excl, uint32(4), uint32(0o100600)))
		x.ask(6, h, uint64(0), strings.Repeat("x", 100000))
		x.ask(10, h, uint32(2), uint32(1000), uint32(1001))
		x.ask(10, h, uint32(8), uint32(1700000000), uint32(1700000000))
		x.ask(8, h)
		x.ask(5, h, uint64(0), uint32(10)) // opened for writing
		x.ask(4, h)
		x.ask(4, h)
		x.ask(3, "/tmp/sftp", wr|creat|excl, uint32(0))
		x.ask(3, "/tmp/sftp", creat, uint32(0))
		h = handle(x.ask(3, "/tmp/sftp", r, uint32(0)))
		x.ask(5, h, uint64(0), uint32(10))
		x.ask(5, h, uint64(0), uint32(200000))
		x.ask(5, h, uint64(99995), uint32(10))
		x.ask(5, h, uint64(100000), uint32(10))
		x.ask(6, h, uint64(0), "x")
		x.ask(4, h)
		h = handle(x.ask(3, "/tmp/sftp", wr|trunc, uint32(0)))
		x.ask(10, h, uint32(8), uint32(1700000000), uint32(1700000000))
		x.ask(8, h)
		x.ask(4, h)
		x.ask(5, "nonsense", uint64(0), uint32(10))
		x.ask(8, "nonsense")
		x.ask(3, "/tmp/none/x", wr|creat, uint32(0))
		x.ask(3, "/tmp", wr, uint32(0))
		x.ask(13, "/tmp/sftp")
		x.ask(13, "/tmp/sftp")
	}, []string{"101 Switching Protocols", "hardlink@openssh.com"}},

	{"SFTP names", func(w *wire) {
		x := w.sftp()
		x.send(1, uint32(3))
		x.receive()
		h := handle(x.ask(3, "/tmp/n1", uint32(2|8), uint32(0)))
		x.ask(4, h)
		x.ask(7, "/tmp/none")
		x.ask(17, "/tmp/none")
		x.ask(14, "/tmp/nd", uint32(0))
		x.ask(14, "/tmp/nd", uint32(0))
		x.ask(14, "/tmp/none/nd", uint32(0))
		x.ask(20, "n1", "/tmp/nl") // the target is made absolute by the real server, too
		x.ask(19, "/tmp/nl")
		x.ask(19, "/tmp/n1")
		x.ask(20, "/tmp/n1", "/tmp/nl")
		x.ask(16, ".")
		x.ask(16, "/tmp/../tmp/./none")
		x.ask(200, "hardlink@openssh.com", "/tmp/n1", "/tmp/n2")
		x.ask(18, "/tmp/n2", "/tmp/n1")
		x.ask(18, "/tmp/none", "/tmp/n3")
		x.ask(200, "posix-rename@openssh.com", "/tmp/n1", "/tmp/n3")
		x.ask(200, "posix-rename@openssh.com", "/tmp/n1", "/tmp/n4")
		x.ask(200, "fsync@openssh.com", "x")
		x.ask(200, "nonsense")
		x.ask(11, "/tmp/n3")
		x.ask(11, "/tmp/none")
		h = handle(x.ask(11, "/tmp/nd"))
		x.ask(12, h)
		x.ask(4, h)
		x.ask(12, h)
		x.ask(9, "/tmp/n3", uint32(4), uint32(0o4751))
		x.ask(9, "/tmp/n3", uint32(1), uint64(10))
		x.ask(9, "/tmp/n3", uint32(2), uint32(5), uint32(6))
		x.ask(9, "/tmp/n3", uint32(8), uint32(1700000000), uint32(1700000001))
		x.ask(17, "/tmp/n3")
		x.ask(9, "/tmp/none", uint32(4), uint32(0o600))
		x.ask(9, "/tmp/none", uint32(1), uint64(10))
		x.ask(9, "/tmp/none", uint32(2), uint32(5), uint32(6))
		x.ask(15, "/tmp/n3")
		x.ask(13, "/tmp/nd")
		x.ask(15, "/tmp/nd")
	}, nil},

	{"SFTP: a packet that makes no sense", func(w *wire) {
		x := w.sftp()
		x.send(1, uint32(3))
		x.receive()
		x.ask(99)
		// It takes the process with it that the real server's file requests share.
		for well := 0; well < 5; {
			if res, _ := w.get("GET", "/1.0/instances/INSTANCE/files?path=/etc", "", ""); res.StatusCode == 200 {
				well++
			} else {
				well = 0
			}
			time.Sleep(20 * time.Millisecond)
		}
	}, []string{`sftp 99: ""`}},

	{"states of an instance", func(w *wire) {
		// The instance of its own is called as the other one, with an x.
		own := "/1.0/instances/INSTANCEx"
		image := os.Getenv("TRANSPORT_LXD_IMAGE")
		result := func(b []byte) {
			s := w.session(b)
			_, b = w.get("GET", "/1.0/operations/"+s.id+"/wait", "", "")
			w.note("%v", strings.Contains(string(b), `"status":"Success"`))
		}
		action := func(a string) {
			// The answer is not noted: an operation that fails can have done so already.
			_, b := w.get("PUT", own+"/state", "", `{"action":"`+a+`","force":true}`)
			result(b)
			_, b = w.get("GET", own+"/state", "", "")
			w.note("%s", statusOf(b))
		}
		defer func() {
			w.get("PUT", own+"/state", "", `{"action":"stop","force":true}`)
			w.get("DELETE", own, "", "")
		}()
		w.do("GET", own, "", "")
		w.do("POST", "/1.0/instances", "", `{"name":"INSTANCEx","source":{"type":"nonsense"}}`)
		w.do("POST", "/1.0/instances", "", `{"name":"a_b","source":{"type":"image","alias":"`+image+`"}}`)
		w.do("POST", "/1.0/instances", "", `{"name":"x","source":{"type":"image","alias":"no-such-alias"}}`)
		result(w.do("POST", "/1.0/instances", "", `{"name":"`+w.instance+`x","config":{"user.a":"b"},"source":{"type":"image","alias":"`+image+`"}}`))
		w.do("POST", own+"/exec", "", `{"command":["true"]}`)
		w.do("GET", own+"/files?path=/no/such/file", "", "")
		action("start")
		action("start")
		w.do("POST", own+"/exec", "", `{"command":["true"]}`)
		w.do("DELETE", own, "", "")
		action("freeze")
		w.do("POST", own+"/exec", "", `{"command":["true"]}`)
		action("unfreeze")
		w.do("PUT", own+"/state", "", `{"action":"nonsense"}`)
		action("stop")
		action("stop")
		result(w.do("DELETE", own, "", ""))
		w.do("DELETE", own, "", "")
	}, []string{"404", "400", "Instance is not running", "Running", "Instance is running", "Frozen", "Instance is frozen", "Running", "Stopped"}},

	{"copies of an instance", func(w *wire) {
		model, copied := "/1.0/instances/INSTANCEm", "/1.0/instances/INSTANCEn"
		image := os.Getenv("TRANSPORT_LXD_IMAGE")
		wait := func(b []byte) {
			_, b = w.get("GET", "/1.0/operations/"+w.session(b).id+"/wait", "", "")
			var a struct{ Metadata struct{ Status, Err string } }
			_ = json.Unmarshal(b, &a)
			w.note("%s %s", a.Metadata.Status, a.Metadata.Err)
		}
		_, b := w.get("POST", "/1.0/instances", "", `{"name":"`+w.instance+`m","config":{"user.a":"1","user.b":"2"},"source":{"type":"image","alias":"`+image+`"}}`)
		wait(b)
		defer func() {
			w.get("DELETE", model, "", "")
			w.get("DELETE", copied, "", "")
		}()
		w.do("POST", model+"/files?path=/root/kept", octets+"X-LXD-mode: 0640", "content\n")
		w.do("POST", "/1.0/instances?target=m", "", `{"name":"INSTANCEn","source":{"type":"copy"}}`)
		w.do("POST", "/1.0/instances", "", `{"name":"INSTANCEn","source":{"type":"copy"}}`)
		w.do("POST", "/1.0/instances", "", `{"name":"INSTANCEn","source":{"type":"copy","source":"no-such-instance"}}`)
		post := func(more string) []byte {
			_, b := w.get("POST", "/1.0/instances", "", `{"name":"`+w.instance+`n",`+more+`"source":{"type":"copy","source":"`+w.instance+`m"}}`)
			var a struct {
				Metadata struct{ Resources map[string][]string }
			}
			_ = json.Unmarshal(b, &a)
			w.note("%v", strings.ReplaceAll(fmt.Sprint(a.Metadata.Resources), w.instance, "INSTANCE"))
			return b
		}
		wait(post("")) // no profiles are none here, and so no disk
		wait(post(`"profiles":["default"],"ephemeral":true,"config":{"user.b":"3","user.c":"4"},`))
		_, b = w.get("GET", copied, "", "")
		var a struct {
			Metadata struct {
				Config    map[string]string
				Ephemeral bool
				Status    string
			}
		}
		require.NoError(w.t, json.Unmarshal(b, &a))
		w.note("%q %q %q %v %s", a.Metadata.Config["user.a"], a.Metadata.Config["user.b"], a.Metadata.Config["user.c"], a.Metadata.Ephemeral, a.Metadata.Status)
		w.do("PATCH", copied, "", `{"config":{"user.a":"","user.c":"5"}}`)
		_, b = w.get("GET", copied, "", "")
		a.Metadata.Config = nil
		require.NoError(w.t, json.Unmarshal(b, &a))
		_, has := a.Metadata.Config["user.a"]
		w.note("%v %q %q", has, a.Metadata.Config["user.b"], a.Metadata.Config["user.c"])
		_, b = w.get("GET", copied+"/files?path=/root/kept", "", "")
		w.note("%s", b)
	}, []string{"clustered", "400", "404", "no-such-instance", "Failure", "No root device", "Success", `"1" "3" "4" true Stopped`, `false "3" "5"`, "content"}},

	{"an exec in an instance that is stopped meanwhile", func(w *wire) {
		own := "/1.0/instances/INSTANCEy"
		image := os.Getenv("TRANSPORT_LXD_IMAGE")
		wait := func(method, path, body string) {
			_, b := w.get(method, path, "", body)
			w.get("GET", "/1.0/operations/"+w.session(b).id+"/wait", "", "")
		}
		wait("POST", "/1.0/instances", `{"name":"`+w.instance+`y","source":{"type":"image","alias":"`+image+`"}}`)
		wait("PUT", own+"/state", `{"action":"start"}`)
		_, b := w.get("POST", own+"/exec", "", ws(`["sh","-c","echo ready; exec sleep 20"]`))
		s := w.session(b).all()
		s.expect("1", "ready\n")
		wait("PUT", own+"/state", `{"action":"stop","force":true}`)
		s.finish()
		wait("DELETE", own, "")
	}, []string{`"return":137`, `1: BINARY, TEXT "", END "ready\n"`}},
}

// statusOf is the status in an instance's state.
func statusOf(b []byte) string {
	_, rest, _ := strings.Cut(string(b), `"metadata":{"status":"`)
	status, _, _ := strings.Cut(rest, `"`)
	return status
}

// until polls.
func until(t require.TestingT, f func() bool) {
	deadline := time.Now().Add(patience)
	for !f() {
		if time.Now().After(deadline) {
			require.Fail(t, "time-out")
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}
