package transporttest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/lxdtransport/transport"
)

// Commands in the background.

var startRows = []row{
	{name: "start/wait-more-than-once", why: "several goroutines may wait, and all learn the same", needs: []Capability{Start},
		run: func(ctx context.Context, host transport.Transport) error {
			p, err := transport.Start(ctx, host, sh("exit 5"))
			if err != nil {
				return err
			}
			for range 3 {
				if err := exits(p.Wait(), 5); err != nil {
					return err
				}
			}
			a, b := background(p.Wait), background(p.Wait)
			return errors.Join(exits(<-a, 5), exits(<-b, 5))
		}},
	{name: "start/returns-while-it-runs", why: "that is what it is for", needs: []Capability{Start},
		run: func(ctx context.Context, host transport.Transport) error {
			stdin := newBlocked()
			defer stdin.unblock()
			cmd := transport.Command{Args: []string{"cat"}, Stdin: stdin}
			var p transport.Process
			started := background(func() (err error) { p, err = transport.Start(ctx, host, cmd); return err })
			result, err := returns(ctx, started)
			if err := errors.Join(err, result); err != nil {
				return err
			}
			stdin.unblock()
			return p.Wait()
		}},
	{name: "start/not-started", why: "what Exec says before the command ran, Start says", needs: []Capability{Start},
		run: func(ctx context.Context, host transport.Transport) error {
			p, err := transport.Start(ctx, host, in("/no/such/dir", sh("exit 0")))
			if p != nil || err == nil {
				return errors.New("a Start in a directory that does not exist returned a Process")
			}
			return is(err, transport.ErrNotStarted)
		}},
	{name: "start/ctx-governs-life", why: "ctx is not only for the start", needs: []Capability{Start},
		run: func(ctx context.Context, host transport.Transport) error {
			mine := errors.New("enough")
			cmdCtx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			p, err := transport.Start(cmdCtx, host, sh("exec sleep 1000"))
			if err != nil {
				return err
			}
			cancel(mine)
			result, err := returns(ctx, background(p.Wait))
			return errors.Join(err, is(result, mine), status(result, 143))
		}},
	{name: "start/nobody-waits", why: "a process that nobody waits for leaks nothing and runs to its end", needs: []Capability{Start},
		run: func(ctx context.Context, host transport.Transport) error {
			out := newScreen()
			cmd := sh("echo ran")
			cmd.Stdout = out
			if _, err := transport.Start(ctx, host, cmd); err != nil {
				return err
			}
			return out.shows(ctx, "ran\n")
		}},
	{name: "signal/reaches-the-command", why: "a signal means the same on every host", needs: []Capability{Start, Signals},
		run: func(ctx context.Context, host transport.Transport) error {
			out := newScreen()
			cmd := sh("trap 'echo usr1' USR1; trap 'exit 9' USR2; " + idle)
			cmd.Stdout = out
			p, err := transport.Start(ctx, host, cmd)
			if err != nil {
				return err
			}
			if err := out.shows(ctx, "up\n"); err != nil {
				return err
			}
			if err := p.Signal(transport.SIGUSR1); err != nil {
				return err
			}
			if err := out.shows(ctx, "usr1\n"); err != nil {
				return err
			}
			if err := p.Signal(transport.SIGUSR2); err != nil {
				return err
			}
			result, err := returns(ctx, background(p.Wait))
			if err := errors.Join(err, exits(result, 9)); err != nil {
				return err
			}
			if p, err = transport.Start(ctx, host, sh("exec sleep 1000")); err != nil {
				return err
			}
			if err := p.Signal("ALRM"); err != nil {
				return err
			}
			result, err = returns(ctx, background(p.Wait))
			return errors.Join(err, exits(result, 142))
		}},
	{name: "signal/not-to-children", why: "a shell that handles a signal decides about its children", needs: []Capability{Start, Signals},
		run: func(ctx context.Context, host transport.Transport) error {
			out := newScreen()
			cmd := sh(`sleep 60 >/dev/null 2>&1 & trap 'kill -KILL $!; wait $!; echo "child $?"; exit 0' USR1; ` + idle)
			cmd.Stdout = out
			p, err := transport.Start(ctx, host, cmd)
			if err != nil {
				return err
			}
			if err := out.shows(ctx, "up\n"); err != nil {
				return err
			}
			if err := p.Signal(transport.SIGUSR1); err != nil {
				return err
			}
			result, err := returns(ctx, background(p.Wait))
			if err := errors.Join(err, result); err != nil {
				return err
			}
			return equal("output", out.String(), "up\nchild 137\n")
		}},
	{name: "signal/after-end-is-ErrProcessDone", why: "callers cannot know that a command has just ended", needs: []Capability{Start},
		run: func(ctx context.Context, host transport.Transport) error {
			p, err := transport.Start(ctx, host, sh("exit 0"))
			if err != nil {
				return err
			}
			if err := p.Wait(); err != nil {
				return err
			}
			return errors.Join(is(p.Signal(transport.SIGTERM), os.ErrProcessDone), is(p.Signal(transport.SIGKILL), os.ErrProcessDone))
		}},
	{name: "signal/unknown-name", why: "a signal that is none is an error with its name, not another signal", needs: []Capability{Start},
		run: func(ctx context.Context, host transport.Transport) error {
			stdin := newBlocked()
			defer stdin.unblock()
			p, err := transport.Start(ctx, host, transport.Command{Args: []string{"cat"}, Stdin: stdin})
			if err != nil {
				return err
			}
			for _, sig := range []transport.Signal{"NOPE", "SIGTERM", "15"} {
				if err := p.Signal(sig); err == nil || !strings.Contains(err.Error(), string(sig)) {
					return fmt.Errorf("signal %q: want an error that names it, got %w", sig, orNil(err))
				}
			}
			stdin.unblock()
			return p.Wait()
		}},
	{name: "resize/without-terminal-is-an-error", why: "misuse is an error, not a panic", needs: []Capability{Start},
		run: func(ctx context.Context, host transport.Transport) error {
			stdin := newBlocked()
			defer stdin.unblock()
			p, err := transport.Start(ctx, host, transport.Command{Args: []string{"cat"}, Stdin: stdin})
			if err != nil {
				return err
			}
			if p.Resize(transport.TerminalSize{Cols: 80, Rows: 25}) == nil {
				return errors.New("a Resize of a command without a terminal returned nil")
			}
			stdin.unblock()
			return p.Wait()
		}},
}
