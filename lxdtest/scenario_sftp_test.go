package lxdtest_test

import (
	"os"
	"strings"

	"github.com/stretchr/testify/require"
)

// sftpScenarios are about files over SFTP.
var sftpScenarios = []scenario{
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
		const r, wr, appending, creat, trunc, excl = uint32(1), uint32(2), uint32(4), uint32(8), uint32(16), uint32(32)
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
		h = handle(x.ask(3, "/tmp/sftp", r|wr|appending, uint32(0)))
		x.ask(6, h, uint64(0), "12345")
		x.ask(6, h, uint64(1), "xyz")
		x.ask(5, h, uint64(0), uint32(10))
		x.ask(4, h)
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

	{"SFTP: renaming, appending, space and what it does not know", func(w *wire) {
		x := w.sftp()
		x.send(1, uint32(3))
		x.receive()
		const r, wr, appending, creat = uint32(1), uint32(2), uint32(4), uint32(8)
		put := func(name, content string) {
			h := handle(x.ask(3, name, wr|creat, uint32(0)))
			x.ask(6, h, uint64(0), content)
			x.ask(4, h)
		}
		get := func(name string) {
			h := handle(x.ask(3, name, r, uint32(0)))
			x.ask(5, h, uint64(0), uint32(100))
			x.ask(4, h)
		}
		put("/tmp/r1", "one")
		put("/tmp/r2", "two")
		x.ask(18, "/tmp/r1", "/tmp/r2") // over the other
		get("/tmp/r2")
		h := handle(x.ask(3, "/tmp/r2", wr|appending, uint32(0)))
		x.ask(6, h, uint64(0), "AP")
		x.ask(4, h)
		get("/tmp/r2")
		x.ask(18, "/tmp/r2", "/tmp") // over a directory
		x.ask(200, "posix-rename@openssh.com", "/tmp/r2", "/tmp")
		b := x.reply(200, "statvfs@openssh.com", "/tmp")
		w.note("%d, %d bytes", b[0], len(b))
		for _, name := range []string{"limits@openssh.com", "lsetstat@openssh.com", "copy-data", "expand-path@openssh.com"} {
			x.ask(200, name, "/tmp")
		}
		if os.Geteuid() == 0 { // what the fake cannot do is noted beside the file
			x.ask(9, "/tmp/r2", uint32(2), uint32(1<<32-2), uint32(5))
			x.ask(9, "/tmp/r2", uint32(2), uint32(5), uint32(1<<32-2))
			x.ask(17, "/tmp/r2")
		}
		x.ask(13, "/tmp/r2")
	}, []string{"one", "APe", "201, 93 bytes"}},

	{"SFTP: requests without waiting for answers", func(w *wire) {
		x := w.sftp()
		x.send(1, uint32(3))
		x.receive()
		h := handle(x.ask(3, "/tmp/window", uint32(1|2|8), uint32(0)))
		const chunks = 40
		for n := range chunks {
			x.send(6, uint32(1000+n), h, uint64(n*1000), strings.Repeat(string(rune('a'+n%26)), 1000))
		}
		answers := map[byte]int{}
		for range chunks {
			answers[x.receive()[0]]++
		}
		w.note("%v", answers)
		for n := range chunks {
			x.send(5, uint32(2000+n), h, uint64(n*1000), uint32(1000))
		}
		ids := map[string]bool{}
		for range chunks {
			b := x.receive()
			require.Len(w.t, b, 9+1000)
			ids[string(b[1:5])] = true
		}
		w.note("%d answers", len(ids))
		x.ask(4, h)
		_, b := w.get("GET", "/1.0/instances/INSTANCE/files?path=/tmp/window", "", "")
		w.note("%d bytes", len(b))
	}, []string{"map[101:40]", "40 answers", "40000 bytes"}},

	{"SFTP: a packet that makes no sense", func(w *wire) {
		x, bystander := w.sftp(), w.sftp()
		for _, s := range []*sftpWire{x, bystander} {
			s.send(1, uint32(3))
			s.receive()
		}
		x.ask(99)
		// It takes the process with it that all sessions and the real server's file requests share.
		w.note("another session: %q", bystander.reply(16, "/"))
		until(w.t, func() bool {
			res, _ := w.get("GET", "/1.0/instances/INSTANCE/files?path=/etc", "", "")
			return res.StatusCode == 200
		})
	}, []string{`sftp 99: ""`, `another session: ""`}},
}
