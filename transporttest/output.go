package transporttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lxdtransport/transport"
)

// The caller's writers.

const flood = 4 << 20 // more than pipes and sockets hold

var outputRows = []row{
	{name: "exec/stdout-and-stderr-apart", why: "without a terminal there are two streams",
		run: func(ctx context.Context, host transport.Transport) error {
			var out, errOut bytes.Buffer
			cmd := sh("echo out; echo err >&2")
			cmd.Stdout, cmd.Stderr = &out, &errOut
			if err := run(ctx, host, cmd); err != nil {
				return err
			}
			return errors.Join(equal("stdout", out.String(), "out\n"), equal("stderr", errOut.String(), "err\n"))
		}},
	{name: "exec/large-both-streams", why: "who reads one stream after the other waits for ever when the other is full", needs: []Capability{WholeStderr},
		run: func(ctx context.Context, host transport.Transport) error {
			var out, errOut bytes.Buffer
			cmd := sh(`head -c "$1" /dev/zero | tr '\0' o & head -c "$1" /dev/zero | tr '\0' e >&2; wait`, fmt.Sprint(flood))
			cmd.Stdout, cmd.Stderr = &out, &errOut
			if err := run(ctx, host, cmd); err != nil {
				return err
			}
			return errors.Join(
				equal("stdout", out.String(), strings.Repeat("o", flood)),
				equal("stderr", errOut.String(), strings.Repeat("e", flood)),
			)
		}},
	{name: "exec/stderr-is-whole-or-an-error", why: "a cut log without an error looks like a whole one",
		run: stderrWholeOrError},
	{name: "exec/nil-writers-are-drained", why: "a stream that nobody reads must not stop the command", needs: []Capability{WholeStderr},
		run: func(ctx context.Context, host transport.Transport) error {
			return run(ctx, host, sh(`head -c "$1" /dev/zero; head -c "$1" /dev/zero >&2`, fmt.Sprint(flood)))
		}},
	{name: "exec/same-writer-never-concurrent", why: "callers give one bytes.Buffer for both streams, as os/exec allows", needs: []Capability{WholeStderr},
		run: sameWriter},
	{name: "exec/writer-error-is-returned-and-cancels", why: "a full disk must not look like a good build, nor let it run on for nobody",
		run: writerError},
	{name: "exec/writer-error-drains-the-other-stream", why: "what one writer could not take says nothing about the other",
		run: func(ctx context.Context, host transport.Transport) error {
			full := errors.New("disk full")
			good := newScreen()
			cmd := sh(`trap 'printf good >&2; exit 3' TERM; echo bad; while :; do sleep 0.05; done`)
			cmd.Stdout = writerFunc(func([]byte) (int, error) { return 0, full })
			cmd.Stderr = good
			result, err := returns(ctx, execute(ctx, host, cmd))
			if err != nil {
				return err
			}
			return errors.Join(is(result, full), status(result, 3), equal("the other stream", good.String(), "good"))
		}},
	{name: "exec/short-write-is-an-error", why: "io.Writer forbids it, and yet it happens",
		run: func(ctx context.Context, host transport.Transport) error {
			cmd := sh("echo output")
			cmd.Stdout = writerFunc(func(p []byte) (int, error) { return len(p) - 1, nil })
			return is(host.Exec(ctx, cmd), io.ErrShortWrite)
		}},
	{name: "exec/slow-writer-loses-nothing", why: "WaitDelay is for hosts; the time that the caller's own writer takes must not cut what the command wrote",
		run: func(ctx context.Context, host transport.Transport) error {
			var out bytes.Buffer
			cmd := sh("head -c 200000 /dev/zero; printf end")
			cmd.WaitDelay = 100 * time.Millisecond
			var once sync.Once
			cmd.Stdout = writerFunc(func(p []byte) (int, error) {
				once.Do(func() { time.Sleep(5 * cmd.WaitDelay) }) // the length is the point
				return out.Write(p)
			})
			if err := run(ctx, host, cmd); err != nil {
				return err
			}
			return equal("output", out.String(), strings.Repeat("\x00", 200000)+"end")
		}},
	{name: "exec/memory-bounded-flood", why: "a slow writer has to slow the command, or one log ends the orchestrator",
		run: boundedFlood},
	{name: "exec/no-write-after-return", why: "callers read their buffer when Exec has returned",
		run: noWriteAfterReturn},
}

func stderrWholeOrError(ctx context.Context, host transport.Transport) error {
	want := strings.Repeat("e", flood)
	for range 3 {
		var errOut bytes.Buffer
		cmd := sh(`head -c "$1" /dev/zero | tr '\0' e >&2`, fmt.Sprint(flood))
		cmd.Stderr = &errOut
		err := run(ctx, host, cmd)
		switch got := errOut.String(); {
		case errors.Is(err, transport.ErrNotStarted):
			return err
		case got != want && err == nil:
			return fmt.Errorf("the result is nil, but %d bytes arrived, not %d", len(got), len(want))
		case !strings.HasPrefix(want, got):
			return errors.New("something else arrived than was written")
		}
	}
	return nil
}

func sameWriter(ctx context.Context, host transport.Transport) error {
	var busy, twice atomic.Bool
	var total atomic.Int64
	w := &struct{ io.Writer }{writerFunc(func(p []byte) (int, error) {
		if !busy.CompareAndSwap(false, true) {
			twice.Store(true)
		}
		total.Add(int64(len(p)))
		time.Sleep(time.Microsecond) // so that the other one comes meanwhile
		busy.Store(false)
		return len(p), nil
	})}
	cmd := sh(`head -c "$1" /dev/zero & head -c "$1" /dev/zero >&2; wait`, fmt.Sprint(flood))
	cmd.Stdout, cmd.Stderr = w, w
	if err := run(ctx, host, cmd); err != nil {
		return err
	}
	switch {
	case twice.Load():
		return errors.New("the writer was called twice at the same time")
	case total.Load() != 2*flood:
		return fmt.Errorf("%d bytes were written, not %d", total.Load(), 2*flood)
	}
	// Writers that cannot be compared are two, and no reason to panic.
	f := writerFunc(func(p []byte) (int, error) { return len(p), nil })
	cmd = sh("echo a; echo b >&2")
	cmd.Stdout, cmd.Stderr = f, f
	return run(ctx, host, cmd)
}

func writerError(ctx context.Context, host transport.Transport) error {
	full := errors.New("disk full")
	bad := writerFunc(func([]byte) (int, error) { return 0, full })
	for _, cmd := range []transport.Command{
		{Args: transport.Shell("echo x; exec sleep 1000"), Stdout: bad},
		{Args: transport.Shell("echo x >&2; exec sleep 1000"), Stderr: bad},
	} {
		result, err := returns(ctx, execute(ctx, host, cmd))
		if err != nil {
			return fmt.Errorf("the command was not cancelled: %w", err)
		}
		if err := errors.Join(is(result, full), status(result, 143), isNot(result, transport.ErrNotStarted)); err != nil {
			return err
		}
	}
	return nil
}

// boundedFlood lets a command write 32 MiB to a writer that takes nothing. That the command gets to its end shows that someone keeps it.
func boundedFlood(ctx context.Context, host transport.Transport) error {
	slow, done := newBlocked(), newScreen()
	defer slow.unblock()
	var total atomic.Int64
	const size = 32 << 20 // more than pipes and sockets of any kind hold
	cmd := sh(`head -c "$1" /dev/zero; echo written >&2`, fmt.Sprint(size))
	cmd.Stdout = writerFunc(func(p []byte) (int, error) {
		total.Add(int64(len(p)))
		return slow.Write(p)
	})
	cmd.Stderr = done
	result := execute(ctx, host, cmd)
	if _, err := within(ctx, slow.entered, "output"); err != nil {
		return err
	}
	_, written := done.look()
	select {
	case <-written:
		return fmt.Errorf("the command could write %d bytes although the writer had taken none", size)
	case <-time.After(2 * window):
	}
	slow.unblock()
	err, late := returns(ctx, result)
	if err := errors.Join(late, err); err != nil {
		return err
	}
	if n := total.Load(); n != size {
		return fmt.Errorf("%d bytes arrived, not %d", n, size)
	}
	return nil
}

func noWriteAfterReturn(ctx context.Context, host transport.Transport) error {
	for _, how := range []string{"the end of ctx", "a writer's error", "the command's end"} {
		mine := errors.New("enough")
		cmdCtx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		var returned, late atomic.Bool
		n := 0
		w := writerFunc(func(p []byte) (int, error) {
			if returned.Load() {
				late.Store(true)
			}
			if n += len(p); n < 100000 {
				return len(p), nil
			}
			switch how {
			case "the end of ctx":
				cancel(mine)
			case "a writer's error":
				return 0, mine
			}
			return len(p), nil
		})
		cmd := sh("while :; do head -c 100000 /dev/zero; done")
		if how == "the command's end" {
			cmd = sh("sleep 2 & head -c 200000 /dev/zero")
		}
		cmd.Stdout, cmd.WaitDelay = w, 200*time.Millisecond
		result, err := returns(ctx, execute(cmdCtx, host, cmd))
		returned.Store(true)
		if err != nil {
			return err
		}
		if how != "the command's end" {
			if err := is(result, mine); err != nil {
				return err
			}
		}
		benchOf(ctx).atEnd = append(benchOf(ctx).atEnd, func() error {
			if late.Load() {
				return fmt.Errorf("the writer was called after Exec had returned because of %s", how)
			}
			return nil
		})
	}
	return nil
}
