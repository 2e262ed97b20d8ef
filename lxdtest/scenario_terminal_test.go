package lxdtest_test

import (
	"github.com/gorilla/websocket"
)

// terminalScenarios are about commands in a terminal.
var terminalScenarios = []scenario{
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
		s := w.exec(ws(`["sh","-c","trap '' HUP; echo ready; sleep 0.5; echo alive > survived"]`, `,"interactive":true,"cwd":"/tmp"`))
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

	{"terminal: an early close message", func(w *wire) {
		s := w.terminal("echo ready; sleep 0.3; echo lost; sleep 0.3; echo lost")
		s.open("0", "control")
		s.expect("0", "ready\r\n")
		s.closeFrame("0", websocket.CloseNormalClosure)
		s.frames()
	}, []string{`0: BINARY, CLOSE 1000 "", END "ready\r\n"`, `control: END`}},

	{"terminal: a text is not the end of the input", func(w *wire) {
		s := w.terminal("cat")
		s.open("0", "control")
		s.binary("0", "hello\r")
		s.expect("0", "hello\r\nhello\r\n")
		s.text("0", "")
		s.binary("0", "nobody reads\r\x04")
		s.result("?timeout=1")
		s.text("control", `{"command":"signal","signal":15}`)
		s.ended("control")
		// The result is not asked for: now and then the real server's operation goes on running for ever.
	}, []string{`"status":"Running"`}},

	{"terminal: it is the session's", func(w *wire) {
		s := w.terminal("test -t 0 && test -t 1 && test -t 2 && echo all three; echo this one >/dev/tty" + linger)
		s.open("0", "control")
		s.mark("0")
		s.text("0", "")
		s.finish()
	}, []string{`"return":0`, `"all three\r\nthis one\r\n"`}},
}
