package transporttest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lxdtransport/transport"
)

// What cases are made of.

// sh is a shell script as a command.
func sh(script string, args ...string) transport.Command {
	return transport.Command{Args: transport.Shell(script, args...)}
}

// in makes a command run in a directory.
func in(dir string, cmd transport.Command) transport.Command {
	cmd.Dir = dir
	return cmd
}

// scratch makes the case's directory in the host and returns its path.
func scratch(ctx context.Context, host transport.Transport) (string, error) {
	b := benchOf(ctx)
	if b.scratch != "" {
		return b.scratch, nil
	}
	name := "tmp/transporttest-" + strings.ToLower(rand.Text())
	if err := run(ctx, host, in("/", sh(`mkdir -p "$1" && chmod 755 "$1"`, name))); err != nil {
		return "", fmt.Errorf("making a directory for the case: %w", err)
	}
	b.scratch = "/" + name
	return b.scratch, nil
}

// run runs a command that has to succeed.
func run(ctx context.Context, host transport.Transport, cmd transport.Command) error {
	if err := host.Exec(ctx, cmd); err != nil {
		return fmt.Errorf("running a command: %w", err)
	}
	return nil
}

// output runs a command that has to succeed and returns what it prints.
func output(ctx context.Context, host transport.Transport, cmd transport.Command) (string, error) {
	var out bytes.Buffer
	cmd.Stdout = &out
	err := run(ctx, host, cmd)
	return out.String(), err
}

// prints runs a command that has to succeed and to print something.
func prints(ctx context.Context, host transport.Transport, want string, cmd transport.Command) error {
	got, err := output(ctx, host, cmd)
	if err != nil {
		return err
	}
	return equal("output", got, want)
}

func equal(what, got, want string) error {
	if got == want {
		return nil
	}
	return fmt.Errorf("%s is %s, not %s", what, brief(got), brief(want))
}

func brief(s string) string {
	if len(s) <= 200 {
		return fmt.Sprintf("%q", s)
	}
	return fmt.Sprintf("%q…%q (%d bytes)", s[:100], s[len(s)-100:], len(s))
}

// exits checks that an error is an *ExitError with a status and says nothing else.
func exits(err error, code int) error {
	if err := status(err, code); err != nil {
		return err
	}
	for _, other := range []error{transport.ErrNotStarted, transport.ErrOutputLost, transport.ErrClosed, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, other) {
			return fmt.Errorf("an error that is only a status matches %q, too: %w", other, err)
		}
	}
	return nil
}

// status checks that an error has a status in it.
func status(err error, code int) error {
	exit, ok := errors.AsType[*transport.ExitError](err)
	switch {
	case !ok:
		return fmt.Errorf("want an *ExitError with status %d, got %w", code, orNil(err))
	case exit.Code != code:
		return fmt.Errorf("want status %d, got %w", code, err)
	}
	return nil
}

// is checks that an error matches all of some.
func is(err error, targets ...error) error {
	for _, target := range targets {
		if !errors.Is(err, target) {
			return fmt.Errorf("want an error that matches %q, got %w", target, orNil(err))
		}
	}
	return nil
}

// isNot checks that an error matches none of some.
func isNot(err error, targets ...error) error {
	for _, target := range targets {
		if errors.Is(err, target) {
			return fmt.Errorf("the error matches %q: %w", target, err)
		}
	}
	return nil
}

var errNil = errors.New("nil")

func orNil(err error) error {
	if err == nil {
		return errNil
	}
	return err
}

// within waits for what has to happen soon.
func within[T any](ctx context.Context, c <-chan T, what string) (v T, err error) {
	timer := time.NewTimer(benchOf(ctx).soon)
	defer timer.Stop()
	select {
	case v = <-c:
		return v, nil
	case <-timer.C:
		return v, fmt.Errorf("%s has not come within %v", what, benchOf(ctx).soon)
	case <-ctx.Done():
		return v, context.Cause(ctx)
	}
}

// slower is a context in which what has to happen soon may take longer.
func slower(ctx context.Context, by time.Duration) context.Context {
	b := *benchOf(ctx)
	b.soon += by
	return context.WithValue(ctx, benchKey{}, &b)
}

// execute runs a command in the background.
func execute(ctx context.Context, host transport.Transport, cmd transport.Command) <-chan error {
	return background(func() error { return host.Exec(ctx, cmd) })
}

func background(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

// returns waits for the result of a call that has to return soon. The second error is that it does not.
func returns(ctx context.Context, done <-chan error) (result, err error) {
	return within(ctx, done, "the return of the call")
}

// window is how long something that must not happen is waited for.
const window = 500 * time.Millisecond

// screen is a writer that shows what was written to it so far.
type screen struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	changed chan struct{} // closed by the next Write
}

func newScreen() *screen { return &screen{changed: make(chan struct{})} }

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
	return s.buf.Write(p)
}

func (s *screen) look() (string, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String(), s.changed
}

func (s *screen) String() string {
	text, _ := s.look()
	return text
}

// shows waits until something stands in what was written.
func (s *screen) shows(ctx context.Context, text string) error {
	for {
		now, changed := s.look()
		if strings.Contains(now, text) {
			return nil
		}
		if _, err := within(ctx, changed, fmt.Sprintf("output %q after %s", text, brief(now))); err != nil {
			return err
		}
	}
}

// writerFunc is a writer that is a function.
type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// readerFunc is a reader that is a function.
type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// only hides everything of a reader but Read.
func only(r io.Reader) io.Reader { return readerFunc(r.Read) }

// failing is a reader that returns an error.
func failing(err error) io.Reader {
	return readerFunc(func([]byte) (int, error) { return 0, err })
}

// zeros never end.
var zeros = readerFunc(func(p []byte) (int, error) { clear(p); return len(p), nil })

// blocked is a reader or writer that does not return before it is released.
type blocked struct {
	entered, release chan struct{}
	once, free       sync.Once
	calls            atomic.Int32
}

func newBlocked() *blocked {
	return &blocked{entered: make(chan struct{}), release: make(chan struct{})}
}

func (b *blocked) wait() {
	b.calls.Add(1)
	b.once.Do(func() { close(b.entered) })
	<-b.release
}

func (b *blocked) Read([]byte) (int, error)    { b.wait(); return 0, io.EOF }
func (b *blocked) Write(p []byte) (int, error) { b.wait(); return len(p), nil }
func (b *blocked) unblock()                    { b.free.Do(func() { close(b.release) }) }

// handle is a stream that counts how often it is closed.
type handle struct {
	io.Reader
	io.Writer
	closed atomic.Int32
}

func (h *handle) Close() error { h.closed.Add(1); return nil }

// staysOpen checks, when the transport has been closed, that no stream was.
func staysOpen(ctx context.Context, streams map[string]*handle) {
	b := benchOf(ctx)
	b.atEnd = append(b.atEnd, func() error {
		for what, h := range streams {
			if n := h.closed.Load(); n > 0 {
				return fmt.Errorf("%s was closed %d times", what, n)
			}
		}
		return nil
	})
}

// pattern is n bytes of which no two pages are equal, so that lost and doubled ones show.
func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return p
}
