package transporttest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/lxdtransport/transport"
)

// The end of ctx.

// idle is a command that says that it is there and goes on until it is told otherwise. Its sleeps are short, for a shell
// runs its traps between commands.
const idle = "echo up; while :; do sleep 0.05; done"

var cancelRows = []row{
	{name: "exec/ctx-ends-before", why: "a context that has ended runs nothing, and it is safe to try again",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			mine := errors.New("not today")
			ended, cancel := context.WithCancelCause(ctx)
			cancel(mine)
			err = host.Exec(ended, in(dir, sh("echo >ran")))
			if err := is(err, mine, transport.ErrNotStarted); err != nil {
				return err
			}
			return prints(ctx, host, "", in(dir, transport.Command{Args: []string{"ls"}}))
		}},
	{name: "exec/ctx-ends-during", why: "the error tells both, why it ended and how, and that it is not safe to try again",
		run: func(ctx context.Context, host transport.Transport) error {
			result, err := cancelled(ctx, host, sh("echo up; exec sleep 1000"))
			if err != nil {
				return err
			}
			return errors.Join(status(result, 143), isNot(result, transport.ErrNotStarted, transport.ErrOutputLost))
		}},
	{name: "exec/deadline-ends-during", why: "callers look for context.DeadlineExceeded",
		run: func(ctx context.Context, host transport.Transport) error {
			// A deadline that passes on demand.
			timed := &onDemand{Context: ctx, done: make(chan struct{})}
			out := newScreen()
			cmd := sh("echo up; exec sleep 1000")
			cmd.Stdout = out
			result := execute(timed, host, cmd)
			if err := out.shows(ctx, "up"); err != nil {
				return err
			}
			close(timed.done)
			err, late := returns(ctx, result)
			if late != nil {
				return late
			}
			return errors.Join(is(err, context.DeadlineExceeded), status(err, 143))
		}},
	{name: "exec/ctx-ends-after", why: "a result that stands is not changed, and one command's context is not another's",
		run: func(ctx context.Context, host transport.Transport) error {
			cmdCtx, cancel := context.WithCancel(ctx)
			defer cancel()
			if err := run(cmdCtx, host, sh("exit 0")); err != nil {
				return err
			}
			cancel()
			return run(ctx, host, sh("exit 0"))
		}},
	{name: "exec/cancelled-command-ends-as-it-likes", why: "TERM asks; what the command answers is its status, and its last words arrive",
		run: func(ctx context.Context, host transport.Transport) error {
			out := newScreen()
			cmd := sh("trap 'echo bye; exit 7' TERM; " + idle)
			cmd.Stdout = out
			result, err := cancelled(ctx, host, cmd)
			if err != nil {
				return err
			}
			if err := errors.Join(status(result, 7), isNot(result, transport.ErrOutputLost), equal("output", out.String(), "up\nbye\n")); err != nil {
				return err
			}
			result, err = cancelled(ctx, host, sh("trap 'exit 0' TERM; "+idle))
			if err == nil {
				if exit, ok := errors.AsType[*transport.ExitError](result); ok {
					err = fmt.Errorf("status 0 became an ExitError with status %d", exit.Code)
				}
			}
			return err
		}},
	{name: "exec/cancel-signal", why: "some programs end well by INT only", needs: []Capability{Signals},
		run: func(ctx context.Context, host transport.Transport) error {
			cmd := sh("trap 'exit 8' USR1; trap 'exit 9' TERM; " + idle)
			cmd.CancelSignal = transport.SIGUSR1
			result, err := cancelled(ctx, host, cmd)
			return errors.Join(err, status(result, 8))
		}},
	{name: "exec/kill-after-waitdelay", why: "a command that does not listen must not hold the orchestrator",
		run: func(ctx context.Context, host transport.Transport) error {
			return deaf(ctx, host, 2*time.Second, 2*time.Second)
		}},
	{name: "exec/waitdelay-by-default", why: "who sets nothing gets 5 s: not less, for a database to write its files, and not for ever",
		run: func(ctx context.Context, host transport.Transport) error {
			return deaf(ctx, host, 0, 4*time.Second)
		}},
	{name: "exec/returns-soon-after-ctx", why: "WaitDelay and a few seconds are all that the end of ctx may take",
		run: func(ctx context.Context, host transport.Transport) error {
			// A machine that is busy needs more for everything: what another command takes is added, and one of three is enough.
			var took, most time.Duration
			for range 3 {
				start := time.Now()
				if err := run(ctx, host, sh("exit 0")); err != nil {
					return err
				}
				cmd := sh("echo up; exec sleep 1000")
				cmd.WaitDelay = 100 * time.Millisecond
				most = cmd.WaitDelay + 5*time.Second + 3*time.Since(start)
				start = time.Now()
				if _, err := cancelled(ctx, host, cmd); err != nil {
					return err
				}
				if took = time.Since(start); took <= most {
					return nil
				}
			}
			return fmt.Errorf("a command that ended when ctx did took %v, which was to be %v at most", took, most)
		}},
	{name: "exec/cancel-signal-KILL", why: "who asks for KILL gets it at once",
		run: func(ctx context.Context, host transport.Transport) error {
			cmd := sh("trap '' TERM; " + idle)
			cmd.CancelSignal, cmd.WaitDelay = transport.SIGKILL, time.Hour
			result, err := cancelled(ctx, host, cmd)
			return errors.Join(err, status(result, 137))
		}},
	{name: "exec/returns-in-time-with-blocked-writer", why: "the bound holds whatever the caller's writer does",
		run: func(ctx context.Context, host transport.Transport) error {
			w := newBlocked()
			defer w.unblock()
			mine := errors.New("enough")
			cmdCtx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			cmd := sh("while :; do echo output; done")
			cmd.Stdout, cmd.WaitDelay = w, 100*time.Millisecond
			result := execute(cmdCtx, host, cmd)
			if _, err := within(ctx, w.entered, "output"); err != nil {
				return err
			}
			cancel(mine)
			err, late := returns(ctx, result)
			if late != nil {
				return late
			}
			benchOf(ctx).atEnd = append(benchOf(ctx).atEnd, func() error {
				if n := w.calls.Load(); n != 1 {
					return fmt.Errorf("the writer was called %d times, the last after Exec had returned", n)
				}
				return nil
			})
			return is(err, mine, transport.ErrOutputLost)
		}},
	{name: "exec/returns-in-time-with-blocked-stdin", why: "the bound holds whatever the caller's reader does",
		run: func(ctx context.Context, host transport.Transport) error {
			stdin := newBlocked()
			defer stdin.unblock()
			cmd := sh("echo up; exec cat")
			cmd.Stdin = stdin
			result, err := cancelled(ctx, host, cmd)
			return errors.Join(err, status(result, 143))
		}},
}

// cancelled runs a command until it shows "up" and ends its context. It returns the command's result, which matches the cause, or
// why there is none.
func cancelled(ctx context.Context, host transport.Transport, cmd transport.Command) (result, err error) {
	mine := errors.New("enough")
	cmdCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	out, ok := cmd.Stdout.(*screen)
	if !ok {
		out = newScreen()
		cmd.Stdout = out
	}
	done := execute(cmdCtx, host, cmd)
	if err := out.shows(ctx, "up"); err != nil {
		return nil, err
	}
	cancel(mine)
	if result, err = returns(ctx, done); err != nil {
		return nil, err
	}
	return result, is(result, mine)
}

// deaf cancels a command that hears TERM and does not heed it, which has to be killed after its WaitDelay.
func deaf(ctx context.Context, host transport.Transport, delay, atLeast time.Duration) error {
	mine := errors.New("enough")
	cmdCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	out := newScreen()
	cmd := sh("trap 'echo asked' TERM; " + idle)
	cmd.Stdout, cmd.WaitDelay = out, delay
	done := execute(cmdCtx, host, cmd)
	if err := out.shows(ctx, "up"); err != nil {
		return err
	}
	start := time.Now()
	cancel(mine)
	result, err := returns(slower(ctx, atLeast+time.Second), done)
	if err != nil {
		return err
	}
	if took := time.Since(start); took < atLeast {
		return fmt.Errorf("it was killed %v after the end of ctx, and WaitDelay is %v", took, delay)
	}
	if !strings.Contains(out.String(), "asked") {
		return fmt.Errorf("it was killed without having been asked to end; its output is %s", brief(out.String()))
	}
	return errors.Join(is(result, mine), status(result, 137))
}

// onDemand is a context whose deadline passes when done is closed.
type onDemand struct {
	context.Context
	done chan struct{}
}

func (c *onDemand) Deadline() (time.Time, bool) { return time.Now().Add(time.Hour), true }
func (c *onDemand) Done() <-chan struct{}       { return c.done }
func (c *onDemand) Err() error {
	select {
	case <-c.done:
		return context.DeadlineExceeded
	default:
		return nil
	}
}
