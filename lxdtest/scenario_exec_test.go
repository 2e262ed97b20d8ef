package lxdtest_test

import (
	"encoding/json"
	"os"
	"runtime"
	"strings"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// execScenarios are about a command: its streams, how it ends, and what it finds around it.
var execScenarios = []scenario{
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

	{"stdin: one message of 16 MiB, in fragments", func(w *wire) {
		s := w.shell("wc -c").all()
		s.binary("0", strings.Repeat("x", 16<<20))
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"16777216\n"`}},

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

	{"an argument that is long, and one that is too long", func(w *wire) {
		w.exec(ws(`["echo","` + strings.Repeat("x", 131071) + `"]`)).all().frames()
		s := w.exec(ws(`["echo","` + strings.Repeat("x", 131072) + `"]`)).all()
		s.frames()
		status, ret, text := s.state()
		w.note("%s %v %s", status, ret, text)
	}, []string{`1: BINARY, TEXT "", END 131072 bytes`, `1: END ""`, "Failure -1 fork/exec /usr/bin/lxd: argument list too long"}},

	{"output that nobody takes for a while", func(w *wire) {
		s := w.shell("head -c 20000000 /dev/zero; echo done >&2")
		release := s.hold("1")
		s.all()
		s.result("?timeout=0")
		release()
		s.finish()
	}, []string{`"status":"Running"`, `"return":0`, `1: BINARY, TEXT "", END 20000000 bytes`, `"done\n"`}},

	{"environment", func(w *wire) {
		b, _ := json.Marshal(map[string]any{"wait-for-websocket": true, "environment": map[string]string{"A": "b c", "LANG": "C"},
			"command": []string{"sh", "-c", `echo "$A|$LANG|$USER|${HOME##*/}|$container|${TERM-no TERM}|${PWD##*/}"; test -t 0 || echo no terminal`}})
		w.exec(string(b)).all().finish()
		w.shell(`echo "$LANG"`).all().finish()
		w.exec(ws(`["sh","-c","echo \"$A\""]`, `,"environment":{"A":"two\nlines"}`)).all().finish()
		w.exec(ws(`["printf","%s","` + "\xff" + `"]`)).all().finish() // is not UTF-8
	}, []string{`"b c|C|root|root|lxc|no TERM|root\nno terminal\n"`, `"C.UTF-8\n"`, `"two\nlines\n"`, `"�"`}},

	{"users", func(w *wire) {
		if os.Geteuid() != 0 {
			return // the fake's commands are run by nobody else
		}
		id := `["sh","-c","id -u; id -g; id -G; echo ${HOME+HOME} ${USER-no USER}"]`
		w.exec(ws(id, `,"user":4242`)).all().finish()
		w.exec(ws(id, `,"user":4242,"group":4343`)).all().finish()
		w.exec(ws(id, `,"group":7`)).all().finish()
		w.exec(ws(`["sh","-c","id -u; id -g"]`, `,"user":4294967295,"group":4294967295`)).all().finish()
		w.exec(ws(`["id","-u"]`, `,"user":4294967294`)).all().finish()
		w.exec(ws(`["id","-u"]`, `,"group":4294967294`)).all().finish()
	}, nil},

	{"working directories", func(w *wire) {
		w.get("POST", "/1.0/instances/INSTANCE/files?path=/tmp/nodir", octets, "")
		for _, dir := range []string{"/tmp", "tmp", "/tmp/../etc", "root/../tmp", "/", "/no/such/directory", "/tmp/nodir"} {
			w.exec(ws(`["sh","-c","test -d etc && test -d root && echo root || echo ${PWD##*/}"]`, `,"cwd":"`+dir+`"`)).all().finish()
		}
	}, []string{`"tmp\n"`, `"tmp\n"`, `"etc\n"`, `"tmp\n"`, `"root\n"`, `"root\n"`, `"root\n"`}},

	{"HOME as the working directory", func(w *wire) {
		where := `["sh","-c","test -d etc && test -d root && echo root || echo ${PWD##*/}"]`
		for _, more := range []string{`{"HOME":"/tmp"}`, `{"HOME":"tmp"}`, `{"HOME":"/no/such/directory"}`, `{"HOME":""}`, `{"HOME":"/tmp"},"cwd":"/etc"`} {
			w.exec(ws(where, `,"environment":`+more)).all().finish()
		}
		if os.Geteuid() == 0 {
			w.exec(ws(where, `,"user":4242`)).all().finish()
		}
	}, []string{`"tmp\n"`, `"tmp\n"`, `"root\n"`, `"root\n"`, `"etc\n"`}},

	{"an environment that is too long", func(w *wire) {
		s := w.exec(ws(`["true"]`, `,"environment":{"A":"`+strings.Repeat("x", 140000)+`"}`)).all()
		s.frames()
		var status, text string
		var ret any
		until(w.t, func() bool {
			status, ret, text = s.state()
			return status != "Running"
		})
		w.note("%s %v %s", status, ret, text)
	}, []string{`1: END ""`, "Failure -1 fork/exec /usr/bin/lxd: argument list too long"}},

	{"ends by signals, and large statuses", func(w *wire) {
		for _, script := range []string{"kill -HUP $$", "kill -PIPE $$", "kill -ABRT $$", "kill -KILL $$", "exit 255", "exit 137"} {
			w.shell(script).all().finish()
		}
	}, []string{`"return":129`, `"return":141`, `"return":134`, `"return":137`, `"return":255`, `"return":137`}},

	{"stdin: one frame of 64 MiB", func(w *wire) {
		s := w.shell("wc -c").all()
		// Made by hand: the client's package would cut the message into many. It is masked with zeros.
		frame := append([]byte{0x82, 0xff, 0, 0, 0, 0, 4, 0, 0, 0}, make([]byte, 4+64<<20)...)
		_, err := s.sockets["0"].conn.NetConn().Write(frame)
		require.NoError(w.t, err)
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"67108864\n"`}},

	{"stdin: a message in fragments, with a ping and an empty one between them", func(w *wire) {
		s := w.shell("cat").all()
		_, err := s.sockets["0"].conn.NetConn().Write([]byte{
			0x02, 0x83, 0, 0, 0, 0, 'o', 'n', 'e', 0x89, 0x80, 0, 0, 0, 0, 0x00, 0x80, 0, 0, 0, 0, 0x80, 0x83, 0, 0, 0, 0, 't', 'w', 'o',
		})
		require.NoError(w.t, err)
		s.expect("1", "onetwo")
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"onetwo"`}},

	{"the mask of new files", func(w *wire) {
		w.shell("umask").all().finish()
	}, []string{`"0022\n"`}},

	{"sessions and groups of processes", func(w *wire) {
		if runtime.GOOS != "linux" {
			return // for the fake's commands
		}
		stat := `read pid name state parent group session tty rest </proc/self/stat
			test $pid = $$ || echo somebody else; test $group = $pid && echo own group; test $session = $pid && echo own session; test $tty = 0 || echo terminal; echo done`
		w.shell(stat).all().finish()
		s := w.terminal(stat + linger)
		s.open("0", "control")
		s.mark("0")
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"done\n"`, `"return":0`, `"own group\r\nown session\r\nterminal\r\ndone\r\n"`}},
}
