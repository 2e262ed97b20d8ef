package sftp

import (
	"fmt"
	"io/fs"
	"strings"
	"syscall"
)

// Status codes of the draft, section 7.
const (
	codeOK               = 0
	codeEOF              = 1
	codeNoSuchFile       = 2
	codePermissionDenied = 3
	codeUnsupported      = 8
)

// StatusError is an answer that says no.
type StatusError struct {
	Code uint32
	Text string
}

// Error is the system's own sentence where there is one.
func (e *StatusError) Error() string {
	if err := e.Unwrap(); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("SFTP status %d: %q", e.Code, e.Text)
}

// Unwrap returns the system error that was meant, as far as that can be told. The protocol has codes for two; LXD's server, like
// every one made with Go, puts the text of the others behind the code for failure.
func (e *StatusError) Unwrap() error {
	switch e.Code {
	case codeNoSuchFile:
		return fs.ErrNotExist
	case codePermissionDenied:
		return fs.ErrPermission
	case codeUnsupported:
		return syscall.ENOTSUP
	}
	for _, known := range texts {
		if strings.HasSuffix(strings.TrimRight(e.Text, `") `), known.text) {
			return known.err
		}
	}
	return nil
}

// texts are what Go calls Linux's errors: the other side's, whatever this one runs on.
var texts = []struct {
	text string
	err  syscall.Errno
}{
	{"no such file or directory", syscall.ENOENT},
	{"operation not permitted", syscall.EPERM},
	{"permission denied", syscall.EACCES},
	{"file exists", syscall.EEXIST},
	{"is a directory", syscall.EISDIR},
	{"not a directory", syscall.ENOTDIR},
	{"directory not empty", syscall.ENOTEMPTY},
	{"no space left on device", syscall.ENOSPC},
	{"disk quota exceeded", syscall.EDQUOT},
	{"file too large", syscall.EFBIG},
	{"read-only file system", syscall.EROFS},
	{"file name too long", syscall.ENAMETOOLONG},
	{"too many levels of symbolic links", syscall.ELOOP},
	{"invalid cross-device link", syscall.EXDEV},
	{"text file busy", syscall.ETXTBSY},
	{"device or resource busy", syscall.EBUSY},
	{"too many open files", syscall.EMFILE},
	{"invalid argument", syscall.EINVAL},
	{"input/output error", syscall.EIO},
}
