//go:build unix

package transporttest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lxdtransport/transport"
)

// during are the cases in which ctx ends while a command runs.
func during(more ...string) []string {
	return append(more,
		"exec/ctx-ends-during", "exec/deadline-ends-during", "exec/cancelled-command-ends-as-it-likes", "exec/cancel-signal",
		"exec/kill-after-waitdelay", "exec/cancel-signal-KILL", "exec/returns-in-time-with-blocked-stdin", "tty/ctx-ends-during",
		"exec/waitdelay-by-default",
	)
}

// tooLong is longer than a case waits here, and not so long that it holds the tests.
const tooLong = 18 * time.Second

func brokenCancels() []broken {
	return []broken{
		{"ignores a context that has ended", []string{"exec/ctx-ends-before", "exec/secrets-not-in-errors"}, func(w *wrapper) {
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				if ctx.Err() != nil {
					ctx = context.WithoutCancel(ctx)
				}
				return w.host.Exec(ctx, cmd)
			}
		}},
		{"ignores cancel", during("exec/returns-soon-after-ctx", "exec/returns-in-time-with-blocked-writer", "exec/no-write-after-return", "exec/children-die-with-ctx", "exec/strays-die-with-ctx"), func(w *wrapper) {
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				if ctx.Err() == nil {
					ctx = context.WithoutCancel(ctx)
				}
				return w.host.Exec(ctx, cmd)
			}
		}},
		{"forgets the status of a cancelled command", during(), func(w *wrapper) {
			result(w, func(ctx context.Context, cmd transport.Command, err error) error {
				if ctx.Err() != nil && err != nil && !errors.Is(err, transport.ErrNotStarted) && !errors.Is(err, transport.ErrOutputLost) {
					return context.Cause(ctx)
				}
				return err
			})
		}},
		{"makes a status of 0 when it was cancelled", []string{"exec/cancelled-command-ends-as-it-likes"}, func(w *wrapper) {
			result(w, func(ctx context.Context, cmd transport.Command, err error) error {
				if _, exited := transport.ExitCode(err); ctx.Err() != nil && !exited && !errors.Is(err, transport.ErrNotStarted) {
					return errors.Join(&transport.ExitError{}, err)
				}
				return err
			})
		}},
		{"takes a deadline for a cancel", []string{"exec/deadline-ends-during"}, func(w *wrapper) {
			result(w, func(_ context.Context, cmd transport.Command, err error) error {
				if errors.Is(err, context.DeadlineExceeded) {
					exit, _ := errors.AsType[*transport.ExitError](err)
					return errors.Join(exit, context.Canceled)
				}
				return err
			})
		}},
		{"carries an old context's end over", []string{
			"exec/ctx-ends-after", "exec/children-die-with-ctx", "exec/strays-die-with-ctx", "exec/cancelled-command-ends-as-it-likes",
			"exec/no-write-after-return", "exec/ctx-ends-before",
		}, func(w *wrapper) {
			var mu sync.Mutex
			var old []context.Context
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				mu.Lock()
				defer mu.Unlock()
				for _, c := range old {
					if c.Err() != nil && len(cmd.Args) > 0 && cmd.Args[0] != "rm" {
						return c.Err()
					}
				}
				if len(cmd.Args) == 0 || cmd.Args[0] == "printf" || cmd.Args[0] == "true" || cmd.Env != nil {
					return w.host.Exec(ctx, cmd)
				}
				old = append(old, ctx)
				mu.Unlock()
				defer mu.Lock()
				return w.host.Exec(ctx, cmd)
			}
		}},
		{"ignores CancelSignal", []string{"exec/cancel-signal", "exec/cancel-signal-KILL"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Validate() == nil {
					cmd.CancelSignal = ""
					cmd.WaitDelay = min(cmd.WaitDelay, tooLong)
				}
			})
		}},
		{"kills at once", []string{
			"exec/ctx-ends-during", "exec/deadline-ends-during", "exec/cancelled-command-ends-as-it-likes", "exec/cancel-signal",
			"exec/kill-after-waitdelay", "exec/waitdelay-by-default", "exec/returns-in-time-with-blocked-stdin", "tty/ctx-ends-during",
			"exec/writer-error-is-returned-and-cancels", "exec/writer-error-drains-the-other-stream", "exec/stdin-error-cancels",
			"close/cancels-commands-and-waits",
		}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Validate() == nil {
					cmd.CancelSignal = transport.SIGKILL
				}
			})
		}},
		{"never kills, and never cuts", []string{
			"exec/kill-after-waitdelay", "exec/background-child-does-not-hold", "exec/background-child-status-is-known",
			"exec/returns-in-time-with-blocked-writer",
		}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Validate() == nil && cmd.WaitDelay > 0 {
					cmd.WaitDelay = tooLong
				}
			})
		}},
		{"kills before its time", []string{"exec/kill-after-waitdelay"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Validate() == nil && cmd.WaitDelay >= time.Second {
					cmd.WaitDelay /= 100
				}
			})
		}},
		{"kills after a second unless it is told otherwise", []string{"exec/waitdelay-by-default"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Validate() == nil && cmd.WaitDelay == 0 {
					cmd.WaitDelay = time.Second
				}
			})
		}},
		{"never kills unless it is told otherwise", []string{"exec/waitdelay-by-default"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Validate() == nil && cmd.WaitDelay == 0 {
					cmd.WaitDelay = tooLong
				}
			})
		}},
		{"returns late when ctx has ended", []string{"exec/returns-soon-after-ctx"}, func(w *wrapper) {
			result(w, func(ctx context.Context, _ transport.Command, err error) error {
				if ctx.Err() != nil && !errors.Is(err, transport.ErrNotStarted) {
					time.Sleep(6 * time.Second)
				}
				return err
			})
		}},
		{"lets children live that have left the session", []string{"exec/strays-die-with-ctx"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) { unmark(cmd, "setsid", "") })
		}},
		{"lets all children live", []string{"exec/children-die-with-ctx", "exec/strays-die-with-ctx"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) { unmark(cmd, "echo up", "setsid ") })
		}},
		{"hides that a stream was cut", []string{
			"exec/background-child-does-not-hold", "exec/background-child-status-is-known", "exec/returns-in-time-with-blocked-writer",
		}, func(w *wrapper) {
			result(w, func(_ context.Context, cmd transport.Command, err error) error {
				if errors.Is(err, transport.ErrOutputLost) {
					return fmt.Errorf("%w", &withoutLost{err})
				}
				return err
			})
		}},
		{"forgets the status when a stream was cut", []string{"exec/background-child-status-is-known"}, func(w *wrapper) {
			result(w, func(ctx context.Context, cmd transport.Command, err error) error {
				if errors.Is(err, transport.ErrOutputLost) && ctx.Err() == nil {
					return transport.ErrOutputLost
				}
				return err
			})
		}},
		{"always waits for WaitDelay", []string{"exec/background-child-without-streams"}, func(w *wrapper) {
			result(w, func(ctx context.Context, cmd transport.Command, err error) error {
				if ctx.Err() == nil && cmd.WaitDelay > 0 && err == nil {
					select {
					case <-ctx.Done():
					case <-time.After(cmd.WaitDelay):
					}
				}
				return err
			})
		}},
	}
}

// withoutLost hides ErrOutputLost.
type withoutLost struct{ err error }

func (e *withoutLost) Error() string { return e.err.Error() }
func (e *withoutLost) Is(target error) bool {
	return target != transport.ErrOutputLost && errors.Is(e.err, target)
}

// unmark takes the variable away by which local finds what a script with a word in it leaves behind, and runs its sleep
// after something else.
func unmark(cmd *transport.Command, word, before string) {
	if len(cmd.Args) < 3 || !strings.Contains(cmd.Args[2], word) || !strings.Contains(cmd.Args[2], "mkfifo alive") {
		return
	}
	script := strings.ReplaceAll(cmd.Args[2], "sleep 60", before+"sleep 60")
	if before != "" {
		script = strings.ReplaceAll(script, "echo up", "sleep 0.3; echo up") // until it has
	}
	// The environment that counts is the one that a process began with.
	cmd.Args = transport.Shell(`for v in $(env | sed -n 's/^\(TRANSPORT_COMMAND_[A-Z0-9]*\)=.*/\1/p'); do unset $v; done; exec /bin/sh -c "$1"`, script)
}

func brokenStarts() []broken {
	return []broken{
		{"forgets the result when it was told", []string{"start/wait-more-than-once"}, func(w *wrapper) {
			started(w, func(_ transport.Command, p *process) {
				var once sync.Once
				p.wait = func() (err error) {
					once.Do(func() { err = p.Process.Wait() })
					return err
				}
			})
		}},
		{"waits in Start", []string{
			"start/returns-while-it-runs", "signal/reaches-the-command", "signal/not-to-children", "signal/unknown-name", "start/ctx-governs-life",
			"resize/without-terminal-is-an-error", "tty/resize", "close/cancels-started-commands",
		}, func(w *wrapper) {
			started(w, func(_ transport.Command, p *process) { _ = p.Process.Wait() })
		}},
		{"returns a process that did not start", []string{"start/not-started", "close/ErrClosed-everywhere"}, func(w *wrapper) {
			w.start = func(ctx context.Context, cmd transport.Command) (transport.Process, error) {
				p, err := transport.Start(ctx, w.host, cmd)
				if err != nil {
					return &process{wait: func() error { return err }}, nil
				}
				return p, nil
			}
		}},
		{"heeds ctx only at the start", []string{"start/ctx-governs-life"}, func(w *wrapper) {
			w.start = func(ctx context.Context, cmd transport.Command) (transport.Process, error) {
				return transport.Start(context.WithoutCancel(ctx), w.host, cmd)
			}
		}},
		{"leaves a goroutine until somebody waits", []string{"start/nobody-waits"}, func(w *wrapper) {
			started(w, func(_ transport.Command, p *process) {
				waited := make(chan struct{})
				var once sync.Once
				go func() {
					select {
					case <-waited:
					case <-w.unblock:
					}
				}()
				p.wait = func() error { once.Do(func() { close(waited) }); return p.Process.Wait() }
			})
		}},
		{"sends TERM whatever it is told", []string{"signal/reaches-the-command", "signal/not-to-children", "signal/unknown-name"}, func(w *wrapper) {
			started(w, func(_ transport.Command, p *process) {
				p.signal = func(transport.Signal) error { return p.Process.Signal(transport.SIGTERM) }
			})
		}},
		{"sends signals to children, too", []string{"signal/not-to-children"}, func(w *wrapper) {
			w.start = func(ctx context.Context, cmd transport.Command) (transport.Process, error) {
				const mark = "TRANSPORTTEST_BROKEN"
				value := filepath.Base(w.dir)
				cmd.Env = map[string]string{mark: value}
				p, err := transport.Start(ctx, w.host, cmd)
				if err != nil {
					return nil, err
				}
				return &process{Process: p, signal: func(sig transport.Signal) error {
					if sig != transport.SIGUSR1 {
						return p.Signal(sig)
					}
					signalChildren(mark + "=" + value + "\x00")
					return p.Signal(sig)
				}}, nil
			}
		}},
		{"signals what has ended", []string{"signal/after-end-is-ErrProcessDone"}, func(w *wrapper) {
			started(w, func(_ transport.Command, p *process) {
				p.signal = func(sig transport.Signal) error {
					if err := p.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
						return err
					}
					return nil
				}
			})
		}},
		{"takes an unknown signal for another", []string{"signal/unknown-name"}, func(w *wrapper) {
			started(w, func(_ transport.Command, p *process) {
				p.signal = func(sig transport.Signal) error {
					err := p.Process.Signal(sig)
					if err != nil && strings.Contains(err.Error(), "unknown") {
						return nil
					}
					return err
				}
			})
		}},
		{"resizes without a terminal", []string{"resize/without-terminal-is-an-error"}, func(w *wrapper) {
			started(w, func(cmd transport.Command, p *process) {
				if cmd.TTY == nil {
					p.resize = func(transport.TerminalSize) error { return nil }
				}
			})
		}},
		{"does not resize", []string{"resize/without-terminal-is-an-error", "tty/resize"}, func(w *wrapper) {
			started(w, func(_ transport.Command, p *process) {
				p.resize = func(transport.TerminalSize) error { return nil }
			})
		}},
		{"has no terminals", []string{"tty/one-stream-size-and-term", "tty/tail-is-not-lost"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Validate() == nil && cmd.TTY != nil {
					cmd.TTY = nil
				}
			})
		}},
		{"does not end a terminal's input", []string{"tty/stdin-ends"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if in := cmd.Stdin; cmd.TTY != nil && cmd.Validate() == nil && in != nil {
					cmd.Stdin = reader(func(p []byte) (int, error) {
						n, err := in.Read(p)
						if err == io.EOF {
							<-w.unblock
						}
						return n, err
					})
				}
			})
		}},
		{"forgets TERM", []string{"tty/one-stream-size-and-term"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.TTY != nil && cmd.Validate() == nil {
					tty := *cmd.TTY
					tty.Term = "dumb"
					cmd.TTY = &tty
				}
			})
		}},
		{"has no statuses with a terminal", []string{"tty/status", "tty/tail-is-not-lost"}, func(w *wrapper) {
			result(w, func(_ context.Context, cmd transport.Command, err error) error {
				if cmd.TTY != nil && onlyExit(err) != nil {
					return nil
				}
				return err
			})
		}},
		{"does not cancel what has a terminal", []string{"tty/ctx-ends-during"}, func(w *wrapper) {
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				if cmd.TTY != nil && cmd.Validate() == nil {
					ctx = context.WithoutCancel(ctx)
				}
				return w.host.Exec(ctx, cmd)
			}
		}},
	}
}

// signalChildren sends USR1 to all processes that have something in their environment, and whose parents have it, too.
func signalChildren(mark string) {
	names, _ := filepath.Glob("/proc/[0-9]*/environ")
	marked := map[string]bool{}
	for _, name := range names {
		if env, err := os.ReadFile(name); err == nil && bytes.Contains(env, []byte(mark)) {
			marked[filepath.Base(filepath.Dir(name))] = true
		}
	}
	for pid := range marked {
		stat, _ := os.ReadFile("/proc/" + pid + "/stat") // pid (name) state parent …
		_, rest, _ := bytes.Cut(stat, []byte(") "))
		if f := bytes.Fields(rest); len(f) > 1 && marked[string(f[1])] {
			n, _ := strconv.Atoi(pid)
			_ = syscall.Kill(n, syscall.SIGUSR1)
		}
	}
}
