//go:build unix

package transporttest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lxdtransport/transport"
)

func brokenTransports() []broken {
	var all []broken
	for _, some := range [][]broken{brokenExecs(), brokenStreams(), brokenCancels(), brokenStarts(), brokenUploads(), brokenDownloads(), brokenTrees(), brokenCloses()} {
		all = append(all, some...)
	}
	return all
}

// onlyExit returns the *ExitError if an error is nothing else.
func onlyExit(err error) *transport.ExitError {
	exit, _ := err.(*transport.ExitError)
	return exit
}

func brokenExecs() []broken {
	return []broken{
		{"keeps all promises", nil, func(w *wrapper) {
			result(w, func(_ context.Context, _ transport.Command, err error) error { return err })
		}},
		{"swallows status 255", []string{"exec/exit-statuses"}, func(w *wrapper) {
			result(w, func(_ context.Context, _ transport.Command, err error) error {
				if exit := onlyExit(err); exit != nil && exit.Code == 255 {
					return nil
				}
				return err
			})
		}},
		{"takes 126 and 127 for failures of its own", []string{"exec/status-126-127"}, func(w *wrapper) {
			result(w, func(_ context.Context, _ transport.Command, err error) error {
				if exit := onlyExit(err); exit != nil && (exit.Code == 126 || exit.Code == 127) {
					return errors.New("operation failed")
				}
				return err
			})
		}},
		{"tells the wrong signal", []string{"exec/ended-by-signal"}, func(w *wrapper) {
			result(w, func(_ context.Context, _ transport.Command, err error) error {
				if exit := onlyExit(err); exit != nil && exit.Signal != "" {
					exit.Signal = transport.SIGQUIT
				}
				return err
			})
		}},
		{"guesses signals from statuses", []string{"exec/exit-statuses"}, func(w *wrapper) {
			result(w, func(_ context.Context, _ transport.Command, err error) error {
				if exit := onlyExit(err); exit != nil && exit.Code == 143 {
					exit.Signal = transport.SIGTERM
				}
				return err
			})
		}},
		{"keeps no stderr", []string{"exec/stderr-in-ExitError"}, func(w *wrapper) {
			result(w, func(_ context.Context, _ transport.Command, err error) error {
				if exit := onlyExit(err); exit != nil {
					exit.Stderr = nil
				}
				return err
			})
		}},
		{"tries again when a command was killed", []string{"exec/runs-once"}, func(w *wrapper) {
			result(w, func(ctx context.Context, cmd transport.Command, err error) error {
				if exit := onlyExit(err); exit != nil && exit.Code == 137 {
					return w.host.Exec(ctx, cmd)
				}
				return err
			})
		}},
		{"mixes up commands that run at the same time", []string{"exec/many-at-once"}, func(w *wrapper) {
			meet := make(chan struct{})
			result(w, func(_ context.Context, cmd transport.Command, err error) error {
				if len(cmd.Args) < 3 || !strings.HasPrefix(cmd.Args[2], `cat; echo "$1"`) {
					return err
				}
				select { // there is an even number of them
				case meet <- struct{}{}:
					return nil
				case <-meet:
					return err
				}
			})
		}},
		{"leaves a goroutine until Close with every command", []string{"exec/leaves-no-goroutine"}, func(w *wrapper) {
			closed := make(chan struct{})
			var once sync.Once
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				go func() { <-closed }()
				return w.host.Exec(ctx, cmd)
			}
			w.close = func() error { once.Do(func() { close(closed) }); return w.host.Close() }
		}},
		{"leaves a descriptor with every command", []string{"exec/leaves-no-descriptor"}, func(w *wrapper) {
			var mu sync.Mutex
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				if r, w2, err := os.Pipe(); err == nil {
					w2.Close()
					mu.Lock()
					w.atEnd = append(w.atEnd, func() { r.Close() })
					mu.Unlock()
				}
				return w.host.Exec(ctx, cmd)
			}
		}},
		{"leaves a goroutine for good when nothing was started", []string{
			"exec/bad-input-is-named-not-shown", "exec/ctx-ends-before", "exec/dir-missing", "exec/secrets-not-in-errors", "close/ErrClosed-everywhere",
		}, func(w *wrapper) {
			result(w, func(_ context.Context, _ transport.Command, err error) error {
				if errors.Is(err, transport.ErrNotStarted) {
					go func() { <-w.unblock }()
				}
				return err
			})
		}},
		{"appends to Args", []string{"exec/nothing-modified"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) { _ = append(cmd.Args, "--") })
		}},
		{"adds to Env", []string{"exec/nothing-modified"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Env != nil && cmd.Env["A"] != "" && cmd.Env["A=B"] == "" {
					cmd.Env["TERM"] = "xterm"
				}
			})
		}},
		{"drops empty arguments", []string{"exec/argv-as-is"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				var args []string
				for _, a := range cmd.Args {
					if a != "" {
						args = append(args, a)
					}
				}
				cmd.Args = args
			})
		}},
		{"replaces what is not UTF-8 in arguments", []string{"exec/not-UTF-8"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				cmd.Args = slices.Clone(cmd.Args)
				for i, a := range cmd.Args {
					cmd.Args[i] = strings.ToValidUTF8(a, "\uFFFD")
				}
			})
		}},
		{"replaces what is not UTF-8 in the environment", []string{"exec/not-UTF-8"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				cmd.Env = maps.Clone(cmd.Env)
				for name, value := range cmd.Env {
					cmd.Env[name] = strings.ToValidUTF8(value, "\uFFFD")
				}
			})
		}},
		{"loses variables of the host", []string{"exec/env"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if len(cmd.Env) == 0 || cmd.Validate() != nil {
					return
				}
				cmd.Env = maps.Clone(cmd.Env)
				for _, name := range []string{"HOME", "LANG"} {
					if _, set := cmd.Env[name]; !set {
						cmd.Env[name] = ""
					}
				}
			})
		}},
		{"cuts values at line breaks", []string{"exec/env"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				env := map[string]string{}
				for name, value := range cmd.Env {
					env[name], _, _ = strings.Cut(value, "\n")
				}
				cmd.Env = env
			})
		}},
		{"cuts the directory at blanks", []string{"exec/dir"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) { cmd.Dir, _, _ = strings.Cut(cmd.Dir, " ") })
		}},
		{"runs in / when the directory is missing", []string{"exec/dir-missing", "exec/secrets-not-in-errors"}, func(w *wrapper) {
			result(w, func(ctx context.Context, cmd transport.Command, err error) error {
				if err != nil && strings.Contains(err.Error(), "chdir") {
					cmd.Dir = ""
					return w.host.Exec(ctx, cmd)
				}
				return err
			})
		}},
		{"ignores User", []string{"exec/user"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Validate() == nil {
					cmd.User = nil
				}
			})
		}},
		{"does not say that nothing was started", []string{
			"exec/bad-input-is-named-not-shown", "exec/dir-missing", "exec/ctx-ends-before", "close/ErrClosed-everywhere",
		}, func(w *wrapper) {
			result(w, func(_ context.Context, _ transport.Command, err error) error {
				if errors.Is(err, transport.ErrNotStarted) {
					return errors.Unwrap(fmt.Errorf("%w", &without{err}))
				}
				return err
			})
		}},
		{"shows the environment in errors", []string{"exec/bad-input-is-named-not-shown", "exec/secrets-not-in-errors"}, func(w *wrapper) {
			result(w, func(_ context.Context, cmd transport.Command, err error) error {
				if err != nil && onlyExit(err) == nil {
					return fmt.Errorf("%v %v: %w", cmd.Args, cmd.Env, err)
				}
				return err
			})
		}},
	}
}

// without hides ErrNotStarted.
type without struct{ err error }

func (e *without) Error() string { return e.err.Error() }
func (e *without) Is(target error) bool {
	return target != transport.ErrNotStarted && errors.Is(e.err, target)
}

func brokenStreams() []broken {
	return []broken{
		{"drops the last byte of long outputs", []string{
			"exec/nil-means-exit-0-and-whole-output", "exec/large-both-streams", "exec/slow-writer-loses-nothing", "exec/stdin-through-cat",
			"exec/same-writer-never-concurrent", "exec/memory-bounded-flood", "tty/tail-is-not-lost", "upload/content", "upload/any-reader",
			"files/source-that-downloads",
		}, func(w *wrapper) {
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				out := cmd.Stdout
				if out == nil {
					return w.host.Exec(ctx, cmd)
				}
				total, held := 0, []byte(nil)
				lossy := writer(func(p []byte) (int, error) {
					total += len(p)
					if total <= 16<<10 {
						return out.Write(p)
					}
					if _, err := out.Write(append(held, p[:len(p)-1]...)); err != nil {
						return 0, err
					}
					held = []byte{p[len(p)-1]}
					return len(p), nil
				})
				if sameWriter(out, cmd.Stderr) {
					cmd.Stderr = nil
				}
				cmd.Stdout = lossy
				return w.host.Exec(ctx, cmd)
			}
		}},
		{"mixes the two streams", []string{"exec/stdout-and-stderr-apart", "exec/large-both-streams", "exec/writer-error-drains-the-other-stream", "exec/memory-bounded-flood"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Stdout != nil && cmd.Stderr != nil && cmd.TTY == nil {
					cmd.Stderr = cmd.Stdout
				}
			})
		}},
		{"drops the last byte of a long stderr", []string{"exec/stderr-is-whole-or-an-error", "exec/large-both-streams"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				out := cmd.Stderr
				if out == nil || sameWriter(out, cmd.Stdout) {
					return
				}
				total := 0
				cmd.Stderr = writer(func(p []byte) (int, error) {
					if total += len(p); total < 4<<20 || len(p) == 0 {
						return out.Write(p)
					}
					n, err := out.Write(p[:len(p)-1])
					if err == nil {
						n = len(p)
					}
					return n, err
				})
			})
		}},
		{"does not drain what nobody wants", []string{"exec/nil-writers-are-drained"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if cmd.Stdout == nil {
					total := 0
					cmd.Stdout = writer(func(p []byte) (int, error) {
						if total += len(p); total > 1<<20 {
							return 0, errors.New("full")
						}
						return len(p), nil
					})
				}
			})
		}},
		{"writes to one writer twice at once", []string{"exec/same-writer-never-concurrent"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				if out := cmd.Stdout; out != nil && cmd.Stderr != nil {
					cmd.Stdout = writer(out.Write)
				}
			})
		}},
		{"swallows the errors of writers", []string{
			"exec/writer-error-is-returned-and-cancels", "exec/writer-error-drains-the-other-stream", "exec/short-write-is-an-error",
			"exec/no-write-after-return", "exec/secrets-not-in-errors",
		}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				for _, stream := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
					if out := *stream; out != nil && !sameWriter(cmd.Stdout, cmd.Stderr) {
						*stream = writer(func(p []byte) (int, error) { _, _ = out.Write(p); return len(p), nil })
					}
				}
			})
		}},
		{"counts the caller's time", []string{"exec/slow-writer-loses-nothing"}, func(w *wrapper) {
			changed(w, func(cmd *transport.Command) {
				out, most := cmd.Stdout, cmd.WaitDelay
				if out == nil || cmd.Validate() != nil || most == 0 || most > 150*time.Millisecond {
					return
				}
				cut := false
				cmd.Stdout = writer(func(p []byte) (int, error) {
					if cut {
						return len(p), nil
					}
					begin := time.Now()
					n, err := out.Write(p)
					cut = time.Since(begin) > most
					return n, err
				})
			})
		}},
		{"buffers without a bound", []string{"exec/memory-bounded-flood", "exec/writer-error-drains-the-other-stream"}, func(w *wrapper) {
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				out := cmd.Stdout
				if out == nil || cmd.Stderr == nil || cmd.TTY != nil || sameWriter(out, cmd.Stderr) || ctx.Err() != nil {
					return w.host.Exec(ctx, cmd)
				}
				var head bytes.Buffer
				shown := make(chan struct{})
				rest := 0 // zeros, not to need the memory, too
				var show sync.Once
				cmd.Stdout = writer(func(p []byte) (int, error) {
					if head.Len()+rest+len(p) > 31<<20 { // nearly all, so that it does not depend on the machine how soon the command ends
						show.Do(func() {
							go func() { // shows that there is something
								defer close(shown)
								_, _ = out.Write(nil)
							}()
						})
					}
					if head.Len() < 5<<20 {
						return head.Write(p)
					}
					rest += len(p)
					return len(p), nil
				})
				err := w.host.Exec(ctx, cmd)
				if head.Len()+rest == 0 {
					return err
				}
				show.Do(func() { close(shown) })
				<-shown
				if _, writeErr := out.Write(head.Bytes()); writeErr != nil {
					return writeErr
				}
				_, _ = out.Write(make([]byte, rest))
				return err
			}
		}},
		{"writes after it has returned", []string{"exec/no-write-after-return", "exec/returns-in-time-with-blocked-writer"}, func(w *wrapper) {
			result(w, func(ctx context.Context, cmd transport.Command, err error) error {
				if errors.Is(err, transport.ErrOutputLost) || ctx.Err() != nil && cmd.Stdout != nil {
					go func() {
						time.Sleep(20 * time.Millisecond)
						_, _ = cmd.Stdout.Write(nil)
					}()
				}
				return err
			})
		}},
		{"leaves the input open when there is none", []string{"exec/nil-stdin-is-eof"}, func(w *wrapper) {
			withStdin(w, func(ctx context.Context, in io.Reader, tty bool) io.Reader {
				if in != nil || tty {
					return in
				}
				return reader(func([]byte) (int, error) {
					<-ctx.Done()
					return 0, ctx.Err()
				})
			})
		}},
		{"drops the last byte of long inputs", []string{"exec/stdin-through-cat", "download/content"}, func(w *wrapper) {
			withStdin(w, func(_ context.Context, in io.Reader, _ bool) io.Reader {
				if in == nil {
					return nil
				}
				total := 0
				return reader(func(p []byte) (int, error) {
					n, err := in.Read(p)
					if total += n; err == io.EOF && total > 16<<10 || total == 1<<20 {
						n = max(n-1, 0)
					}
					return n, err
				})
			})
		}},
		{"collects the input", []string{"exec/stdin-is-interactive"}, func(w *wrapper) {
			withStdin(w, func(_ context.Context, in io.Reader, _ bool) io.Reader {
				if in == nil {
					return nil
				}
				return reader(func(p []byte) (int, error) {
					n, err := io.ReadAtLeast(in, p, min(100, len(p)))
					if err == io.ErrUnexpectedEOF {
						err = nil
					}
					return n, err
				})
			})
		}},
		{"ends the input when the command has ended", []string{
			"exec/stdin-through-cat", "exec/stdin-is-interactive", "exec/many-at-once", "exec/leaves-no-goroutine", "exec/secrets-not-in-errors",
			"exec/streams-are-not-closed", "download/content", "tty/stdin-ends",
		}, func(w *wrapper) {
			withStdin(w, func(ctx context.Context, in io.Reader, _ bool) io.Reader {
				if in == nil {
					return nil
				}
				return reader(func(p []byte) (int, error) {
					n, err := in.Read(p)
					if n == 0 && err == io.EOF {
						<-ctx.Done()
					}
					return n, err
				})
			})
		}},
		{"takes an input that is not read for a failure", []string{"exec/stdin-never-read", "exec/stdin-is-not-read-after-return", "exec/streams-are-not-closed"}, func(w *wrapper) {
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				in := cmd.Stdin
				if in == nil {
					return w.host.Exec(ctx, cmd)
				}
				var ended atomic.Bool
				cmd.Stdin = reader(func(p []byte) (int, error) {
					n, err := in.Read(p)
					if err != nil {
						ended.Store(true)
					}
					return n, err
				})
				err := w.host.Exec(ctx, cmd)
				if err == nil && !ended.Load() {
					err = io.ErrClosedPipe
				}
				return err
			}
		}},
		{"waits for Stdin", []string{"exec/stdin-never-ends", "exec/returns-in-time-with-blocked-stdin", "exec/streams-are-not-closed"}, func(w *wrapper) {
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				in := cmd.Stdin
				if in == nil {
					return w.host.Exec(ctx, cmd)
				}
				var reading sync.Mutex
				ended := false
				cmd.Stdin = reader(func(p []byte) (int, error) {
					reading.Lock()
					defer reading.Unlock()
					n, err := in.Read(p)
					ended = ended || err != nil
					return n, err
				})
				err := w.host.Exec(ctx, cmd)
				reading.Lock()
				defer reading.Unlock()
				if !ended && !errors.Is(err, transport.ErrNotStarted) {
					_, _ = in.Read(make([]byte, 1))
				}
				return err
			}
		}},
		{"takes an error of Stdin for its end", []string{"exec/stdin-error-cancels"}, func(w *wrapper) {
			withStdin(w, func(_ context.Context, in io.Reader, _ bool) io.Reader {
				if in == nil {
					return nil
				}
				return reader(func(p []byte) (int, error) {
					n, err := in.Read(p)
					if err != nil {
						err = io.EOF
					}
					return n, err
				})
			})
		}},
		{"closes what it was given", []string{"exec/streams-are-not-closed"}, func(w *wrapper) {
			result(w, func(_ context.Context, cmd transport.Command, err error) error {
				for _, stream := range []any{cmd.Stdin, cmd.Stdout, cmd.Stderr} {
					if c, ok := stream.(io.Closer); ok {
						c.Close()
					}
				}
				return err
			})
		}},
		{"closes a Stdin that nobody reads", []string{"exec/streams-are-not-closed"}, func(w *wrapper) {
			withStdin(w, func(ctx context.Context, in io.Reader, _ bool) io.Reader {
				if c, ok := in.(io.Closer); ok {
					context.AfterFunc(ctx, func() { c.Close() }) // to end its Read
				}
				return in
			})
		}},
		{"reads Stdin after it has returned", []string{"exec/stdin-is-not-read-after-return"}, func(w *wrapper) {
			result(w, func(_ context.Context, cmd transport.Command, err error) error {
				if cmd.Stdin != nil && err == nil {
					go func() {
						time.Sleep(50 * time.Millisecond)
						_, _ = cmd.Stdin.Read(make([]byte, 1))
					}()
				}
				return err
			})
		}},
	}
}

func sameWriter(a, b io.Writer) bool {
	return a != nil && b != nil && reflect.TypeOf(a).Comparable() && a == b
}

// withStdin changes the input of commands. The context that change gets ends with the command.
func withStdin(w *wrapper, change func(ctx context.Context, in io.Reader, tty bool) io.Reader) {
	w.exec = func(ctx context.Context, cmd transport.Command) error {
		ended, cancel := context.WithCancel(ctx)
		defer cancel()
		cmd.Stdin = change(ended, cmd.Stdin, cmd.TTY != nil)
		return w.host.Exec(ctx, cmd)
	}
}
