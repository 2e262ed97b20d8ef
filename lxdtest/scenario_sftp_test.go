package lxdtest_test

import (
	"strings"
	"time"
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
}
