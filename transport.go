// Package transport runs commands on build hosts and copies data to and from
// them. Its transport for LXD needs nothing in the container or virtual machine:
// no SSH, no cloud-init, no agent of its own. It talks to LXD's REST API and maps
// the WebSockets of the exec endpoint onto io.Reader and io.Writer.
//
//	server, err := lxd.ConnectLXDUnix("", nil)
//	…
//	host, err := transport.NewLXD(server, "c1", nil)
//	…
//	defer host.Close()
//	err = host.Exec(ctx, transport.Command{
//		Args:   []string{"make", "test"},
//		Dir:    "/src",
//		Stdout: os.Stdout,
//		Stderr: os.Stderr,
//	})
//
// Whoever knows os/exec knows the rest: Exec returns nil when the command exited
// with status 0 and all of its output was written, an [*ExitError] when it exited
// with another status, and something else when anything else happened.
package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path"
	"strings"
	"time"
)

// Transport runs commands on one build host and copies data to and from it.
// It is safe for concurrent use. Remote paths are absolute and slash-separated
// whatever operating system the orchestrator runs on.
//
// Every method that takes a context returns soon after the context ends, with an
// error that matches [context.Cause] of it. After Close every method returns
// [ErrClosed].
//
// [Starter] is an optional interface that a Transport may have besides.
type Transport interface {
	// Exec runs a command and waits for it.
	//
	// It returns
	//   - nil when the command exited with status 0, every byte of its output was
	//     handed to the writers, and ctx did not interrupt it;
	//   - an [*ExitError] when the host reported another status, and nothing else
	//     went wrong;
	//   - otherwise an error for which errors.Is and errors.As find every cause, the
	//     first one first: the command's own status (*ExitError), the end of ctx
	//     (context.Cause), an error of Stdin or of one of the writers,
	//     [ErrOutputLost]. [ErrNotStarted] is among them when it is certain
	//     that the command did not start; only then is it safe to try again.
	//
	// When ctx ends, the command gets CancelSignal, after WaitDelay it is killed, and
	// Exec returns no later than WaitDelay and a few seconds after the end of
	// ctx. If the host could not confirm that the command has ended, the error says so.
	//
	// When Exec returns, it will not call the writers again. Only a Stdin.Read
	// that does not return may still be waiting, and after ctx has ended a Write
	// that does not return; what they return is thrown away. A panic in one of them ends
	// the command, and goes on in the goroutine that called Exec, or Wait.
	Exec(ctx context.Context, cmd Command) error

	// Upload writes what src delivers to the file dst. Other processes on the host see
	// the old file or the whole new one, never a part. On any error the
	// destination is as it was and no temporary file is left; where that could
	// not be had, the error says so. The source may be of any length and kind.
	//
	// The error is an [*fs.PathError]; errors.Is tells fs.ErrNotExist (a directory on the
	// way does not exist), fs.ErrPermission, [ErrNoHost], [ErrNotRunning]
	// and [ErrUnauthorized] apart. An error of src is wrapped as it is.
	Upload(ctx context.Context, dst string, src io.Reader, opts *UploadOptions) error

	// Download writes the content of the file src to dst. It returns nil exactly when
	// as many bytes as the host said the file has were handed to dst. Directories, FIFOs,
	// sockets and devices are refused. The errors are those of Upload.
	Download(ctx context.Context, src string, dst io.Writer, opts *DownloadOptions) error

	// Close ends running commands as if their contexts had ended, waits for them,
	// and releases what the transport holds. It may be called more than once.
	io.Closer
}

// Starter is a [Transport] that can run a command in the background.
type Starter interface {
	// Start starts a command and returns when the host has everything to run it.
	// ctx governs the command's whole life, not only its start. The errors are those of
	// [Transport.Exec] from before the command ran.
	Start(ctx context.Context, cmd Command) (Process, error)
}

// Process is a command that was started. It is safe for concurrent use.
type Process interface {
	// Wait waits for the command and returns what [Transport.Exec] would have
	// returned. It may be called more than once, by several goroutines; a process
	// that nobody waits for leaks nothing.
	Wait() error

	// Signal sends a signal to the command; not to its children. That it returns nil
	// says that the signal was sent, not that it arrived. After the command has ended it is
	// os.ErrProcessDone.
	Signal(sig Signal) error

	// Resize changes the size of the command's terminal. It is an error unless the command has a
	// [TTY], and os.ErrProcessDone after it has ended.
	Resize(size TerminalSize) error
}

// Command describes a command to run. A Transport modifies nothing in it, and does
// not use Args and Env after Exec or Start has returned.
type Command struct {
	// Args is the command and its arguments, as execve gets them: no shell reads them, nothing in
	// them needs quoting. See [Shell] for when a shell is wanted. A name without
	// a slash is looked up in the host's PATH.
	Args []string

	// Env is added to the environment that the host gives every command.
	Env map[string]string

	// Dir is the working directory, an absolute path. "" is the host's default: the user's home
	// or "/".
	Dir string

	// User is whom the command runs as; nil is the host's default user, root on LXD.
	User *User

	// Stdin is what the command reads. nil is an empty input: end of file at once. It is
	// read by a goroutine of the transport, which may have read ahead of the command when that
	// ends. An error of Stdin other than io.EOF cancels the command, for the command must not
	// take a part for the whole.
	Stdin io.Reader

	// Stdout and Stderr get the command's output, each from one goroutine at a time. nil: the output is
	// read and thrown away. They may be the same value, if it can be compared
	// with ==; it then never sees two Writes at once. A writer that is
	// slow slows the command. An error of a writer cancels the command.
	Stdout, Stderr io.Writer

	// TTY gives the command a terminal: it is nil for three separate streams. With a terminal everything
	// arrives on Stdout, with the terminal's line ends, and Stderr is not used. The end of
	// Stdin is sent as the character that ends a terminal's input (Ctrl-D).
	TTY *TTY

	// CancelSignal is sent to the command when ctx ends; "" is TERM.
	CancelSignal Signal

	// WaitDelay is how long the command may go on after CancelSignal before it is killed. It is also how
	// long output may be waited for after the command has exited, when something
	// that it left behind holds its streams open. 0 is 5 seconds.
	WaitDelay time.Duration
}

// User is a numeric user and group of the host. Names are the business of the host's own files, which no
// transport reads.
type User struct{ UID, GID uint32 }

// TTY is a terminal for a command.
type TTY struct {
	Term string       // the TERM environment variable; "": xterm
	Size TerminalSize // zero: the host's default, 80 by 25 on LXD
}

// TerminalSize is the size of a terminal in characters.
type TerminalSize struct{ Cols, Rows uint16 }

// Signal is a POSIX signal name without the SIG prefix, as in
// golang.org/x/crypto/ssh, so that it means the same thing whatever operating system the
// orchestrator runs on.
type Signal string

// The signals that programs commonly take. Others are sent by their names as well.
const (
	SIGHUP   Signal = "HUP"
	SIGINT   Signal = "INT"
	SIGQUIT  Signal = "QUIT"
	SIGKILL  Signal = "KILL"
	SIGUSR1  Signal = "USR1"
	SIGUSR2  Signal = "USR2"
	SIGTERM  Signal = "TERM"
	SIGCONT  Signal = "CONT"
	SIGSTOP  Signal = "STOP"
	SIGWINCH Signal = "WINCH"
)

// UploadOptions are the options of [Transport.Upload]; nil means all defaults.
type UploadOptions struct {
	// Mode is the file's permissions; of its other bits only setuid, setgid and
	// sticky are taken. 0 is 0644 for a new file and the old mode for one that is replaced.
	Mode fs.FileMode

	// Owner is the file's owner. nil is the host's default user for a new file and the old
	// owner for one that is replaced.
	Owner *User

	// ModTime is the file's modification time, of which hosts may keep whole seconds only. Zero is the
	// time of the upload.
	ModTime time.Time

	// MkdirAll creates missing parent directories, mode 0755, owned like the file. They are not removed
	// when the upload fails.
	MkdirAll bool

	// Progress is called with the number of bytes sent so far, from the goroutine that
	// copies, never concurrently with itself.
	Progress func(sent int64)
}

// DownloadOptions are the options of [Transport.Download]; nil means all defaults.
type DownloadOptions struct {
	// Offset is the number of bytes to leave out at the beginning, to resume a download.
	// One that lies behind the end of the file is an error.
	Offset int64

	// Limit is the most bytes that may arrive; a file with more is [ErrLimit]. 0: no limit.
	Limit int64

	// Stat is called once, before the first byte is written. The info's Sys is a *[User].
	Stat func(fs.FileInfo)

	// Progress is called with the number of bytes received so far, Offset not counted, from the
	// goroutine that copies, never concurrently with itself.
	Progress func(received int64)
}

// ExitError says that a command ran and ended with a status other than 0.
type ExitError struct {
	// Code is the exit status as the host reports it, 1 to 255. A host that reports a command that
	// was ended by signal n as 128+n, as shells and LXD do, cannot tell it from one that exited so
	// itself; one that could not be run is 126 or 127.
	Code int

	// Signal is "" unless the command was ended by a signal and the host says so.
	Signal Signal

	// Stderr holds the first and the last 32 KiB of the command's standard error, only when
	// Command.Stderr was nil.
	Stderr []byte
}

// Error tells the status, and what shells mean by it. It does not contain Stderr.
func (e *ExitError) Error() string {
	switch {
	case e.Signal != "":
		return fmt.Sprintf("transport: command was ended by signal %s", e.Signal)
	case e.Code == 126:
		return "transport: command exited with status 126 (by convention: found, but cannot be executed)"
	case e.Code == 127:
		return "transport: command exited with status 127 (by convention: not found)"
	case e.Code > 128 && e.Code <= 128+64:
		return fmt.Sprintf("transport: command exited with status %d (by convention: ended by signal %d)", e.Code, e.Code-128)
	}
	return fmt.Sprintf("transport: command exited with status %d", e.Code)
}

// ExitCode returns e.Code.
func (e *ExitError) ExitCode() int { return e.Code }

// ExitCode returns the exit status that err tells of: (0, true) for nil, (n, true) where err is or wraps an
// [*ExitError], and (-1, false) for any other error: the command's status is not known.
func ExitCode(err error) (code int, exited bool) {
	if err == nil {
		return 0, true
	}
	if e, ok := errors.AsType[*ExitError](err); ok {
		return e.Code, true
	}
	return -1, false
}

// The errors that callers act upon. They are wrapped: test for them with errors.Is.
var (
	// ErrNotStarted: the command cannot have started. It is safe to try again.
	ErrNotStarted error = errors.New("the command was not started")

	// ErrOutputLost: the command ended but some of its output did not arrive.
	ErrOutputLost error = errors.New("output was lost")

	// ErrNotRunning: the host exists and is stopped, frozen or in error.
	ErrNotRunning error = errors.New("the host is not running")

	// ErrNoHost: there is no such host.
	ErrNoHost error = errors.New("there is no such host")

	// ErrUnauthorized: the host, or who manages it, does not allow it.
	ErrUnauthorized error = errors.New("not authorized")

	// ErrLimit: a limit that the caller set was passed.
	ErrLimit error = errors.New("limit passed")

	// ErrClosed: the transport was closed. It matches net.ErrClosed.
	ErrClosed error = fmt.Errorf("the transport was closed: %w", net.ErrClosed)
)

// defaultWaitDelay is what a WaitDelay of 0 means.
const defaultWaitDelay = 5 * time.Second

// Validate reports in a sentence what is wrong with a command that no host could run as it is meant. Every Transport calls it
// before anything else; it is exported for their authors. No value of an argument or of an environment variable is in the
// error.
func (c Command) Validate() error {
	if len(c.Args) == 0 {
		return errors.New("Command.Args is empty: the first element is the command to run")
	}
	for i, a := range c.Args {
		if strings.IndexByte(a, 0) >= 0 {
			return fmt.Errorf("Command.Args[%d] contains a NUL byte, which no argument can", i)
		}
	}
	for name, value := range c.Env {
		switch {
		case name == "":
			return errors.New("Command.Env has a variable with an empty name")
		case strings.ContainsAny(name, "=\x00\n\r"):
			return fmt.Errorf("Command.Env: the name %q contains '=', NUL or a line break, which a name cannot", name)
		case strings.IndexByte(value, 0) >= 0:
			return fmt.Errorf("Command.Env: the value of %q contains a NUL byte, which no value can", name)
		}
	}
	if c.Dir != "" {
		if err := checkPath(c.Dir); err != nil {
			return fmt.Errorf("Command.Dir: %w", err)
		}
	}
	if u := c.User; u != nil && (u.UID == noID || u.GID == noID) {
		// The kernel takes this number for "leave it as it is", so the command would run as root.
		return fmt.Errorf("Command.User: %d is not a user or group", uint32(noID))
	}
	if s := c.CancelSignal; s != "" {
		if _, err := signalNumber(s); err != nil {
			return fmt.Errorf("Command.CancelSignal: %w", err)
		}
	}
	if c.WaitDelay < 0 {
		return fmt.Errorf("Command.WaitDelay is negative: %v", c.WaitDelay)
	}
	if t := c.TTY; t != nil && strings.ContainsAny(t.Term, "\x00\n\r") {
		return errors.New("Command.TTY: Term contains NUL or a line break")
	}
	return nil
}

const noID = 1<<32 - 1 // (uid_t)-1

// checkPath reports what is wrong with a remote path. Its text stands behind the path.
func checkPath(name string) error {
	switch {
	case name == "":
		return errors.New("the path is empty")
	case strings.IndexByte(name, 0) >= 0:
		return fmt.Errorf("the path %q contains a NUL byte", name)
	case !path.IsAbs(name):
		return fmt.Errorf("the path %q is not absolute: remote paths begin with a slash", name)
	}
	return nil
}

// signals are Linux's numbers, which every architecture that LXD runs on shares: the host's, not the
// orchestrator's.
var signals = map[Signal]int{
	"HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "TRAP": 5, "ABRT": 6, "BUS": 7, "FPE": 8, "KILL": 9, "USR1": 10,
	"SEGV": 11, "USR2": 12, "PIPE": 13, "ALRM": 14, "TERM": 15, "STKFLT": 16, "CHLD": 17, "CONT": 18, "STOP": 19,
	"TSTP": 20, "TTIN": 21, "TTOU": 22, "URG": 23, "XCPU": 24, "XFSZ": 25, "VTALRM": 26, "PROF": 27, "WINCH": 28,
	"IO": 29, "POLL": 29, "PWR": 30, "SYS": 31,
}

func signalNumber(s Signal) (int, error) {
	n, ok := signals[s]
	if !ok {
		return 0, fmt.Errorf("unknown signal %q: names are POSIX's without SIG, such as TERM", string(s))
	}
	return n, nil
}

// Start starts a command in the background where t is a [Starter]; elsewhere the error matches errors.ErrUnsupported. ctx governs
// the command's whole life, not only its start.
func Start(ctx context.Context, t Transport, cmd Command) (Process, error) {
	s, ok := t.(Starter)
	if !ok {
		return nil, fmt.Errorf("transport: %T cannot run a command in the background: %w", t, errors.ErrUnsupported)
	}
	return s.Start(ctx, cmd)
}

// Shell returns the Args that run script with the host's /bin/sh. args arrive in it as $1, $2 and so on, whatever is in them, so
// that nothing has to be quoted:
//
//	transport.Shell(`tar -C "$1" -czf "$2" .`, dir, file)
func Shell(script string, args ...string) []string {
	return append([]string{"/bin/sh", "-c", script, "sh"}, args...)
}

// maxOutput bounds what Output keeps: the command may belong to a hostile host.
const maxOutput = 64 << 20

// Output runs a command and returns its standard output, also along with an error. cmd.Stdout must be nil. If cmd.Stderr is
// nil, the [*ExitError] has a part of the standard error. More than 64 MiB of output is
// [ErrLimit]; give such a command a Stdout of its own.
func Output(ctx context.Context, t Transport, cmd Command) ([]byte, error) {
	if cmd.Stdout != nil {
		return nil, errors.New("transport: Output: Command.Stdout is already set")
	}
	var out limitedBuffer
	cmd.Stdout = &out
	err := t.Exec(ctx, cmd)
	return out.buf.Bytes(), err
}

// limitedBuffer keeps at most maxOutput bytes.
type limitedBuffer struct{ buf bytes.Buffer }

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.buf.Len()+len(p) > maxOutput {
		return 0, fmt.Errorf("more than %d bytes of output: %w", maxOutput, ErrLimit)
	}
	return b.buf.Write(p)
}
