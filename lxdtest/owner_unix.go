//go:build unix

package lxdtest

import (
	"io/fs"
	"os"
	"syscall"
)

// nonBlock keeps an open from waiting for the other end of a FIFO.
const nonBlock = syscall.O_NONBLOCK

// ownerOf is the owner as the instance sees it: who runs the test is root inside.
func ownerOf(info fs.FileInfo) (uid, gid int) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0
	}
	uid, gid = int(st.Uid), int(st.Gid)
	if uid == os.Geteuid() {
		uid = 0
	}
	if gid == os.Getegid() || uid == 0 {
		gid = 0
	}
	return uid, gid
}
