//go:build linux

package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

// terminal is a pseudo-terminal with a person in front of it.
type terminal struct {
	t      *testing.T
	person *os.File
	tty    *os.File

	mu    sync.Mutex
	shown bytes.Buffer
	more  chan struct{}
}

func open(t *testing.T) *terminal {
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	require.NoError(t, err)
	require.NoError(t, unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	tty, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|syscall.O_NOCTTY, 0)
	require.NoError(t, err)
	x := &terminal{t: t, person: person, tty: tty, more: make(chan struct{}, 1)}
	x.resize(100, 30)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(x, person)
	}()
	t.Cleanup(func() {
		x.types("\n") // for the Read of the input that no shell is there for any more
		tty.Close()
		<-done // the copying: a read fails when nobody has the terminal
		person.Close()
	})
	return x
}

func (x *terminal) Write(p []byte) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	select {
	case x.more <- struct{}{}:
	default:
	}
	return x.shown.Write(p)
}

func (x *terminal) resize(cols, rows uint16) {
	require.NoError(x.t, unix.IoctlSetWinsize(int(x.tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: cols, Row: rows}))
}

func (x *terminal) types(keys string) {
	_, err := io.WriteString(x.person, keys)
	require.NoError(x.t, err)
}

// shows waits until something stands on the terminal.
func (x *terminal) shows(text string) {
	x.t.Helper()
	late := time.After(30 * time.Second)
	for {
		x.mu.Lock()
		now := x.shown.String()
		x.mu.Unlock()
		if strings.Contains(now, text) {
			return
		}
		select {
		case <-x.more:
		case <-late:
			require.Failf(x.t, "the terminal does not show it", "%q after %q", text, now)
		}
	}
}

func (x *terminal) settings() unix.Termios {
	s, err := unix.IoctlGetTermios(int(x.tty.Fd()), unix.TCGETS)
	require.NoError(x.t, err)
	return *s
}

func TestShell(t *testing.T) {
	s := lxdtest.NewServer()
	t.Cleanup(s.Close)
	s.AddInstance(lxdtest.Instance{Name: "c1", Handler: lxdtest.LocalCommands("")})
	server, err := lxd.ConnectLXDUnix(s.Socket, nil)
	require.NoError(t, err)
	host, err := transport.NewLXD(server, "c1", nil)
	require.NoError(t, err)
	t.Cleanup(func() { host.Close() })

	for name, leave := range map[string]func(x *terminal, cancel func()){
		"exit":   func(x *terminal, _ func()) { x.types("exit 5\n") },
		"ctrl-d": func(x *terminal, _ func()) { x.types("\x04") },
		"signal": func(_ *terminal, cancel func()) { cancel() },
	} {
		t.Run(name, func(t *testing.T) {
			x := open(t)
			before := x.settings()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() {
				done <- shell(ctx, host, x.tty, x.tty, transport.Command{
					Args: []string{"/bin/sh"}, Env: map[string]string{"PS1": "ready> "}, WaitDelay: time.Second,
				})
			}()
			x.shows("ready> ")
			assert.NotEqual(t, before, x.settings(), "raw mode")
			x.types("stty size\n")
			x.shows("30 100")
			x.resize(90, 20)
			require.NoError(t, syscall.Kill(os.Getpid(), syscall.SIGWINCH)) // the terminal is not this process's own
			x.types("while [ \"$(stty size)\" != '20 90' ]; do :; done; echo is $((40 + 2))\n")
			x.shows("is 42")
			// with the signal seen to, for one that comes just before a command has begun is lost on busybox's shell
			x.types("sh -c 'trap \"echo cau\"\"ght; exit\" INT; echo u\"\"p; while :; do sleep 0.1; done'\n")
			x.shows("up\r\n")
			x.types("\x03") // Ctrl-C is the shell's
			x.shows("^C")
			x.shows("caught\r\nready> ") // what is typed before may be thrown away with the rest of the line
			x.types("echo inter''rupted\n")
			x.shows("interrupted")
			leave(x, cancel)
			err := <-done
			switch name {
			case "exit":
				code, _ := transport.ExitCode(err)
				assert.Equal(t, 5, code)
			case "ctrl-d":
				code, exited := transport.ExitCode(err)
				assert.True(t, exited, "%v", err)
				assert.NotEqual(t, 137, code)
			case "signal":
				assert.ErrorIs(t, err, context.Canceled)
			}
			assert.Equal(t, before, x.settings(), "as it was")
		})
	}
}
