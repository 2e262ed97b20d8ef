package local

import (
	"errors"
	"os"
	"strconv"
	"syscall"
	"unsafe"

	"github.com/lxdtransport/transport"
)

// openTerminal opens a pseudo-terminal by hand: the standard library has no function for it.
func openTerminal(size transport.TerminalSize) (master, slave *os.File, err error) {
	if size == (transport.TerminalSize{}) {
		size = transport.TerminalSize{Cols: 80, Rows: 25}
	}
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	unlock, number := int32(0), uint32(0)
	err = errors.Join(
		ioctl(master, syscall.TIOCSPTLCK, unsafe.Pointer(&unlock)),
		ioctl(master, syscall.TIOCGPTN, unsafe.Pointer(&number)),
		resizeTerminal(master, size),
	)
	if err == nil {
		slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(int(number)), os.O_RDWR|syscall.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, err
	}
	return master, slave, nil
}

func resizeTerminal(f *os.File, size transport.TerminalSize) error {
	winsize := [4]uint16{size.Rows, size.Cols}
	return ioctl(f, syscall.TIOCSWINSZ, unsafe.Pointer(&winsize))
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno syscall.Errno
	err = c.Control(func(fd uintptr) {
		_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, request, uintptr(arg))
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return err
}

// isTerminalEnd reports whether a Read from a terminal failed because nobody has its other end open.
func isTerminalEnd(err error) bool { return errors.Is(err, syscall.EIO) }
