//go:build unix

package local

import (
	"io/fs"
	"os"
	"syscall"

	"github.com/lxdtransport/transport"
)

// readFlags keep a file that has become a FIFO meanwhile from holding who opens it.
const readFlags = os.O_RDONLY | syscall.O_NONBLOCK

func ownerOf(info fs.FileInfo) *transport.User {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return &transport.User{UID: st.Uid, GID: st.Gid}
	}
	return nil
}
