// Package local is a [transport.Transport] on this machine: commands run with os/exec's means, and files are
// those below one directory, which they cannot leave by any name or symbolic link (os.Root).
//
// It serves programs that build on the machine they run on, and it is the reference that the
// suite in transporttest is calibrated on. Nothing is confined: a command sees the whole machine and may do
// what this process may do.
//
// It is made for Unix. On Linux it keeps all promises; elsewhere there are no terminals, and a process that a cancelled
// command left behind is only found while it is in the command's process group. On Windows commands
// can only be killed, and there are no users.
package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"github.com/lxdtransport/transport"
)

// Options are the options of [New]; nil means all defaults.
type Options struct {
	// Env is the environment of every command, in the form of os.Environ; Command.Env is added to it.
	// nil: that of this process at the time of New.
	Env []string
}

// Transport runs commands on this machine. It is a [transport.Starter]. On top of what [transport.Transport]
// promises:
//
//   - The remote path / is the directory that was given to New. A command's working directory is that directory
//     joined with Command.Dir: the uploaded file /src/a is a for a command that runs in /src. Without a
//     Dir it runs in the directory itself.
//   - A command whose name is an absolute path is looked for below the directory first, then on the machine.
//   - A command runs in a process group of its own. [transport.Process].Signal and CancelSignal go to the command alone, KILL
//     after WaitDelay to the group.
//   - On Linux every command has a variable TRANSPORT_COMMAND_… in its environment, by which what it left behind is found
//     when its context ends, in whatever session it is. A process that has thrown it away is not found.
type Transport struct {
	dir  string // absolute
	root *os.Root
	env  []string

	closing context.Context // ends with Close, cause ErrClosed
	close   context.CancelCauseFunc

	mu      sync.Mutex // guards the rest
	closed  bool
	running sync.WaitGroup // methods that have not returned; Add is called with mu held and closed false
}

var (
	_ transport.Transport = (*Transport)(nil)
	_ transport.Starter   = (*Transport)(nil)
)

// New returns a transport whose files are those below dir, which has to exist.
func New(dir string, opts *Options) (*Transport, error) {
	if dir == "" {
		return nil, errors.New("local: the directory (dir) is empty")
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("local: %w", err)
	}
	root, err := os.OpenRoot(abs)
	if err != nil {
		return nil, fmt.Errorf("local: %w", err)
	}
	t := &Transport{dir: abs, root: root}
	if opts == nil || opts.Env == nil {
		t.env = os.Environ()
	} else {
		t.env = append(t.env, opts.Env...)
	}
	t.closing, t.close = context.WithCancelCause(context.Background())
	return t, nil
}

// Close ends running commands as if their contexts had ended, stops transfers, and waits for all of them. It may
// be called more than once; every call returns after all is done.
func (t *Transport) Close() error {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.close(transport.ErrClosed)
	t.running.Wait()
	return t.root.Close()
}

// begin counts a method as running and binds its context to the transport's end. end must be called when it has returned.
func (t *Transport) begin(ctx context.Context) (_ context.Context, end func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, nil, transport.ErrClosed
	}
	t.running.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(t.closing, func() { cancel(transport.ErrClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
		t.running.Done()
	}, nil
}

// relative is a remote path as os.Root wants it.
func relative(name string) string {
	name = strings.TrimPrefix(path.Clean(name), "/")
	if name == "" {
		return "."
	}
	return filepath.FromSlash(name)
}

// causes is an error with a text of its own for which errors.Is and errors.As find several.
type causes struct {
	text string
	errs []error
}

func (c *causes) Error() string   { return c.text }
func (c *causes) Unwrap() []error { return c.errs }

func notStarted(err error) error {
	return &causes{
		text: "local: exec: " + err.Error() + " (the command was not started)",
		errs: []error{transport.ErrNotStarted, err},
	}
}
