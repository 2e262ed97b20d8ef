package transporttest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/lxdtransport/transport"
)

// What a command leaves behind.

// A process that was left behind holds the FIFO "alive" open. Its end is the end of that FIFO, which even a process that nobody
// has reaped cannot hold.
const (
	holdAlive = `mkfifo alive; sleep 60 3<>alive `
	untilDead = `(: >alive) & exec cat alive`
)

var leftRows = []row{
	{name: "exec/background-child-does-not-hold", why: "a daemon that was started without a redirect holds the pipe, not the build",
		run: func(ctx context.Context, host transport.Transport) error {
			_, err := withChild(ctx, host, "exit 0")
			return err
		}},
	{name: "exec/background-child-status-is-known", why: "a stream that was cut does not hide the command's own status", needs: []Capability{EarlyStatus},
		run: func(ctx context.Context, host transport.Transport) error {
			result, err := withChild(ctx, host, "exit 3")
			if err == nil {
				err = status(result, 3)
			}
			return err
		}},
	{name: "exec/background-child-without-streams", why: "one that holds nothing is not waited for, and is not killed",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			cmd := in(dir, sh(holdAlive+`>/dev/null 2>&1 </dev/null & echo $!`))
			cmd.WaitDelay = time.Hour
			out := newScreen()
			cmd.Stdout = out
			result, err := returns(ctx, execute(ctx, host, cmd))
			if err := errors.Join(err, result); err != nil {
				return err
			}
			return run(ctx, host, sh(`kill -KILL "$1"`, strings.TrimSpace(out.String())))
		}},
	{name: "exec/children-die-with-ctx", why: "the compiler that make started must not go on when the build was cancelled", needs: []Capability{Children},
		run: func(ctx context.Context, host transport.Transport) error {
			return dies(ctx, host, holdAlive+`& echo up; wait`)
		}},
	{name: "exec/strays-die-with-ctx", why: "a daemon in a session of its own would hold the host's ports in the next build", needs: []Capability{Strays},
		run: func(ctx context.Context, host transport.Transport) error {
			return dies(ctx, host, `mkfifo alive; setsid sh -c 'sleep 60 3<>alive </dev/null >/dev/null 2>&1 & exec 3<>alive; echo up' & wait; exec sleep 1000`)
		}},
}

// withChild runs a command that leaves a child behind that holds its output, and then ends.
func withChild(ctx context.Context, host transport.Transport, end string) (result, err error) {
	out := newScreen()
	cmd := sh("sleep 60 & echo $!; " + end)
	cmd.Stdout, cmd.WaitDelay = out, 300*time.Millisecond
	result, err = returns(ctx, execute(ctx, host, cmd))
	if err != nil {
		return nil, err
	}
	pid := strings.TrimSpace(out.String())
	if err := run(ctx, host, sh(`kill -KILL "$1"`, pid)); err != nil {
		return nil, fmt.Errorf("the child was killed, or its number %q did not arrive: %w", pid, err)
	}
	if err := is(result, transport.ErrOutputLost); err != nil {
		return nil, fmt.Errorf("a stream was cut: %w", err)
	}
	return result, isNot(result, transport.ErrNotStarted, context.Canceled, context.DeadlineExceeded)
}

// dies runs a script that leaves something behind that holds alive, cancels it, and waits for the end of that.
func dies(ctx context.Context, host transport.Transport, script string) error {
	dir, err := scratch(ctx, host)
	if err != nil {
		return err
	}
	cmd := in(dir, sh(script))
	cmd.WaitDelay = time.Second
	if _, err := cancelled(ctx, host, cmd); err != nil {
		return err
	}
	short, cancel := context.WithTimeout(ctx, benchOf(ctx).soon/2)
	defer cancel()
	if err := host.Exec(short, in(dir, sh(untilDead))); err != nil {
		return fmt.Errorf("a process that the command had started still runs after Exec has returned: %w", err)
	}
	return nil
}
