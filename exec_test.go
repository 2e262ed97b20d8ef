package transport_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

func sh(script string, args ...string) transport.Command {
	return transport.Command{Args: transport.Shell(script, args...)}
}

func TestStatuses(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		for _, n := range []int{0, 1, 2, 42, 126, 127, 128, 137, 143, 255} {
			err := host.Exec(soon(t), sh("exit "+strconv.Itoa(n)))
			code, exited := transport.ExitCode(err)
			assert.True(t, exited, "exit %d: %v", n, err)
			assert.Equal(t, n, code)
		}
		for want, cmd := range map[int]transport.Command{
			127:     {Args: []string{"/no/such/command"}},
			126:     {Args: []string{"/etc"}},
			128 + 9: sh("kill -KILL $$"),
			128 + 1: sh("kill -HUP $$"),
		} {
			err := host.Exec(soon(t), cmd)
			exit, ok := err.(*transport.ExitError)
			if assert.True(t, ok, "%v: %v", cmd.Args, err) {
				assert.Equal(t, want, exit.Code)
				assert.Empty(t, exit.Signal)
			}
		}
		// A file without the x bit.
		require.NoError(t, host.Upload(soon(t), "/root/script-"+host127(t), strings.NewReader("#!/bin/sh\n"), nil))
		code, _ := transport.ExitCode(host.Exec(soon(t), transport.Command{Args: []string{"/root/script-" + host127(t)}}))
		assert.Equal(t, 126, code)
	})
}

// host127 makes names that the parallel runs of one test do not share.
func host127(t *testing.T) string { return strings.NewReplacer("/", "-").Replace(t.Name()) }

func TestManyInARowAndAtOnce(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		for range sized(200, 50) {
			require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"true"}}))
		}
		errs := make(chan error, 100)
		for range cap(errs) {
			go func() { errs <- host.Exec(soon(t), transport.Command{Args: []string{"true"}}) }()
		}
		for range cap(errs) {
			assert.NoError(t, <-errs)
		}
	})
}

// random makes n random bytes one by one, and their sum.
type random struct {
	left int64
	sum  hash.Hash
}

func newRandom(n int64) *random { return &random{left: n, sum: sha256.New()} }

func (r *random) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), r.left)
	rand.Read(p[:n])
	r.sum.Write(p[:n])
	r.left -= n
	return int(n), nil
}

func TestThroughCat(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		in, out := newRandom(64<<20), sha256.New()
		require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"cat"}, Stdin: in, Stdout: out}))
		assert.Equal(t, in.sum.Sum(nil), out.Sum(nil))
	})
}

func TestBothOutputsAtOnce(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		const n = 64 << 20
		want := sha256.New()
		io.CopyN(want, zeros{}, n)
		stdout, stderr := sha256.New(), sha256.New()
		require.NoError(t, host.Exec(soon(t), transport.Command{
			Args:   transport.Shell("head -c $1 /dev/zero & head -c $1 /dev/zero >&2; wait", strconv.Itoa(n)),
			Stdout: stdout, Stderr: stderr,
		}))
		assert.Equal(t, want.Sum(nil), stdout.Sum(nil))
		assert.Equal(t, want.Sum(nil), stderr.Sum(nil))
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestStdinThatIsNotRead(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		assert.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"true"}, Stdin: zeros{}}))
		out, err := transport.Output(soon(t), host, transport.Command{Args: transport.Shell("head -c 10 | wc -c; exit 3"), Stdin: zeros{}})
		assert.Equal(t, "10", strings.TrimSpace(string(out)))
		code, _ := transport.ExitCode(err)
		assert.Equal(t, 3, code)
	})
}

func TestStdinThatNeverEnds(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		blocked, unblock := io.Pipe()
		defer unblock.Close()
		out, err := transport.Output(soon(t), host, transport.Command{Args: []string{"echo", "done"}, Stdin: blocked})
		assert.NoError(t, err)
		assert.Equal(t, "done\n", string(out))
	})
}

func TestStdinThatFails(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		broken := errors.New("broken source")
		// The command must not see the end of its input, or it would take the half for the whole.
		var out bytes.Buffer
		err := host.Exec(soon(t), transport.Command{
			Args:   transport.Shell("cat >/dev/null; echo whole"),
			Stdin:  io.MultiReader(strings.NewReader("half"), errReader{broken}),
			Stdout: &out,
		})
		assert.ErrorIs(t, err, broken)
		assert.ErrorContains(t, err, "Stdin: broken source")
		assert.Empty(t, out.String())
		code, exited := transport.ExitCode(err)
		assert.True(t, exited)
		assert.Equal(t, 143, code)
	})
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func TestNoStdinIsEmpty(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		out, err := transport.Output(soon(t), host, transport.Command{Args: transport.Shell("wc -c; read x || echo end")})
		assert.NoError(t, err)
		assert.Equal(t, []string{"0", "end"}, strings.Fields(string(out)))
	})
}

func TestArgumentsEnvironmentDirectoryUser(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		args := []string{"printf", `%s\n`, "", " ", "a b", `"'\`, "$HOME `id`", "-n", "--", "*", "ä", "line\nbreak"}
		env := map[string]string{"A": "b c", "QUOTE": `"'$\`, "EMPTY": "", "LINES": "1\n2", "EQ": "a=b", "HOME": "/tmp"}
		before, beforeEnv := slices.Clone(args), maps.Clone(env)
		out, err := transport.Output(soon(t), host, transport.Command{Args: args, Env: env})
		require.NoError(t, err)
		assert.Equal(t, strings.Join(args[2:], "\n")+"\n", string(out))

		script := `for n in A QUOTE EMPTY LINES EQ HOME; do eval "printf '%s|' \"\$$n\""; done; pwd; id -u; id -g`
		out, err = transport.Output(soon(t), host, transport.Command{Args: transport.Shell(script), Env: env, Dir: "/usr/bin", User: &transport.User{UID: 1000, GID: 65534}})
		require.NoError(t, err)
		assert.Equal(t, "b c|\"'$\\||1\n2|a=b|/tmp|/usr/bin\n1000\n65534\n", string(out))
		assert.Equal(t, before, args)
		assert.Equal(t, beforeEnv, env)
	})
}

func TestDirectoryThatDoesNotExist(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		for dir, want := range map[string]string{"/no/such/dir": "does not exist", "/bin/busybox": "not a directory"} {
			cmd := sh("echo ran")
			cmd.Dir = dir
			out, err := transport.Output(soon(t), host, cmd)
			assert.ErrorIs(t, err, transport.ErrNotStarted)
			assert.ErrorContains(t, err, "chdir "+dir)
			assert.ErrorContains(t, err, want)
			assert.Empty(t, out, "LXD would have run it in /")
		}
	})
}

func TestArgumentsThatAreTooLong(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		most := strings.Repeat("x", 128<<10-1)
		out, err := transport.Output(soon(t), host, transport.Command{Args: []string{"echo", most}})
		require.NoError(t, err)
		assert.Len(t, out, len(most)+1)

		err = host.Exec(soon(t), transport.Command{Args: []string{"echo", most + "x"}})
		assert.ErrorIs(t, err, transport.ErrNotStarted)
		assert.ErrorContains(t, err, "Args[1] has 131072 bytes")

		many := []string{"echo"}
		for range 20 {
			many = append(many, most)
		}
		ctx := soon(t)
		for { // LXD, too, needs time for so much, of which there is little on a busy machine
			err = host.Exec(ctx, transport.Command{Args: many})
			assert.ErrorIs(t, err, transport.ErrNotStarted)
			if ctx.Err() != nil || !strings.Contains(err.Error(), "Timed out waiting for websockets to connect") {
				break
			}
		}
		assert.ErrorContains(t, err, "argument list too long")
	})
}

func TestWhatJSONCannotCarry(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		for _, cmd := range []transport.Command{
			{Args: []string{"echo", "\xff"}},
			{Args: []string{"true"}, Env: map[string]string{"A": "\xff"}},
			{Args: []string{"true"}, Dir: "/\xff"},
		} {
			err := host.Exec(soon(t), cmd)
			assert.ErrorIs(t, err, transport.ErrNotStarted)
			assert.ErrorContains(t, err, "not valid UTF-8")
		}
	})
}

func TestMisuseIsNotStarted(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		err := host.Exec(soon(t), transport.Command{})
		assert.ErrorIs(t, err, transport.ErrNotStarted)
		assert.ErrorContains(t, err, "Args is empty")
	})
}

func TestContextThatHasEnded(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		mine := errors.New("not today")
		ctx, cancel := context.WithCancelCause(soon(t))
		cancel(mine)
		err := host.Exec(ctx, transport.Command{Args: []string{"true"}})
		assert.ErrorIs(t, err, mine)
		assert.ErrorIs(t, err, transport.ErrNotStarted)
	})
}

func TestContextEndsDuring(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		for _, c := range []struct {
			name string
			cmd  transport.Command
			code int
		}{
			{"TERM", sh("echo up; exec sleep 1000"), 143},
			{"own status", sh("trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done"), 7},
			{"other signal", transport.Command{Args: transport.Shell("trap 'exit 8' USR1; echo up; while :; do sleep 0.05; done"), CancelSignal: transport.SIGUSR1}, 8},
			{"KILL", transport.Command{Args: transport.Shell("trap '' TERM; echo up; while :; do sleep 0.05; done"), WaitDelay: 200 * time.Millisecond}, 137},
			{"KILL at once", transport.Command{Args: transport.Shell("trap '' TERM; echo up; while :; do sleep 0.05; done"), CancelSignal: transport.SIGKILL}, 137},
			{"terminal", transport.Command{Args: transport.Shell("echo up; exec sleep 1000"), TTY: &transport.TTY{}}, 143},
		} {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				mine := errors.New("enough")
				ctx, cancel := context.WithCancelCause(soon(t))
				c.cmd.Stdout = onWrite(func() { cancel(mine) })
				err := host.Exec(ctx, c.cmd)
				assert.ErrorIs(t, err, mine)
				code, exited := transport.ExitCode(err)
				assert.True(t, exited, err)
				assert.Equal(t, c.code, code)
				assert.NotErrorIs(t, err, transport.ErrNotStarted)
				assert.NotErrorIs(t, err, transport.ErrOutputLost)
			})
		}
	})
}

// onWrite is a writer that calls a function.
type onWrite func()

func (f onWrite) Write(p []byte) (int, error) { f(); return len(p), nil }

// A process in the way of all signals, as a frozen container's, cannot hold Exec.
func TestHardBound(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		ctx, cancel := context.WithCancel(soon(t))
		defer cancel()
		// The child holds the output, so that LXD 5.0 does not report the end of its parent.
		cmd := sh("sleep 20 & echo up; exec sleep 1000")
		cmd.Stdout, cmd.WaitDelay = onWrite(cancel), 300*time.Millisecond
		start := time.Now()
		err := host.Exec(ctx, cmd)
		assert.ErrorIs(t, err, context.Canceled)
		assert.Less(t, time.Since(start), 10*time.Second)
	})
}

func TestContextEndsAfter(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		ctx, cancel := context.WithCancel(soon(t))
		p, err := transport.Start(ctx, host, transport.Command{Args: []string{"true"}})
		require.NoError(t, err)
		require.NoError(t, p.Wait())
		cancel()
		assert.NoError(t, p.Wait(), "the second time as the first")
	})
}

func TestWriterThatFails(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		full := errors.New("disk full")
		for _, stderr := range []bool{false, true} {
			var good bytes.Buffer
			cmd := sh("echo good; echo bad >&2; exec sleep 1000")
			cmd.Stdout, cmd.Stderr = &good, failingWriter{full}
			if !stderr {
				cmd = sh("echo good >&2; echo bad; exec sleep 1000")
				cmd.Stdout, cmd.Stderr = failingWriter{full}, &good
			}
			err := host.Exec(soon(t), cmd)
			assert.ErrorIs(t, err, full)
			code, exited := transport.ExitCode(err)
			assert.True(t, exited)
			assert.Equal(t, 143, code, "the command was cancelled")
			assert.Equal(t, "good\n", good.String(), "the other stream was drained")
		}
		err := host.Exec(soon(t), transport.Command{Args: []string{"echo", "x"}, Stdout: shortWriter{}})
		assert.ErrorIs(t, err, io.ErrShortWrite)
	})
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

type shortWriter struct{}

func (shortWriter) Write(p []byte) (int, error) { return len(p) - 1, nil }

// alone fails when it is written to twice at once.
type alone struct {
	busy  atomic.Bool
	twice atomic.Bool
	n     int
}

func (w *alone) Write(p []byte) (int, error) {
	if !w.busy.CompareAndSwap(false, true) {
		w.twice.Store(true)
	}
	w.n += len(p) // the race detector looks at this, too
	w.busy.Store(false)
	return len(p), nil
}

func TestOneWriterForBoth(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		var w alone
		cmd := sh("head -c 4000000 /dev/zero & head -c 4000000 /dev/zero >&2; wait")
		cmd.Stdout, cmd.Stderr = &w, &w
		require.NoError(t, host.Exec(soon(t), cmd))
		assert.False(t, w.twice.Load())
		assert.Equal(t, 8000000, w.n)

		// Writers that cannot be compared are two.
		var mu sync.Mutex
		var got int
		f := uncomparable{func(p []byte) { mu.Lock(); defer mu.Unlock(); got += len(p) }}
		cmd = sh("echo a; echo b >&2")
		cmd.Stdout, cmd.Stderr = f, f
		require.NoError(t, host.Exec(soon(t), cmd))
		assert.Equal(t, 4, got)
	})
}

type uncomparable struct{ f func([]byte) }

func (u uncomparable) Write(p []byte) (int, error) { u.f(p); return len(p), nil }

func TestStderrOfAFailure(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		var exit *transport.ExitError
		require.ErrorAs(t, host.Exec(soon(t), sh("echo why >&2; exit 1")), &exit)
		assert.Equal(t, "why\n", string(exit.Stderr))

		require.ErrorAs(t, host.Exec(soon(t), sh("echo first >&2; head -c 1000000 /dev/zero >&2; echo last >&2; exit 1")), &exit)
		assert.True(t, bytes.HasPrefix(exit.Stderr, []byte("first\n")))
		assert.True(t, bytes.HasSuffix(exit.Stderr, []byte("last\n")))
		assert.Contains(t, string(exit.Stderr), "omitting "+strconv.Itoa(1000000+6+5-64<<10)+" bytes")

		cmd := sh("echo why >&2; exit 1")
		cmd.Stderr = io.Discard
		require.ErrorAs(t, host.Exec(soon(t), cmd), &exit)
		assert.Empty(t, exit.Stderr)
	})
}

// slow takes its time for every Write, until it has been told to hurry.
type slow struct {
	release chan struct{}
	n       int
}

func (w *slow) Write(p []byte) (int, error) {
	<-w.release
	w.n += len(p)
	return len(p), nil
}

// What the command wrote before its end arrives whole although the writer takes longer than WaitDelay.
func TestSlowWriterLosesNothing(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		w := &slow{release: make(chan struct{})}
		cmd := sh("head -c 100000 /dev/zero")
		cmd.Stdout, cmd.WaitDelay = w, 100*time.Millisecond
		timer := time.AfterFunc(time.Second, func() { close(w.release) })
		defer timer.Stop()
		require.NoError(t, host.Exec(soon(t), cmd))
		assert.Equal(t, 100000, w.n)
	})
}

// A writer that does not return cannot hold Exec for ever after the end of ctx, and is not called again.
func TestWriterThatBlocks(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		w := &blocking{entered: make(chan struct{}), release: make(chan struct{})}
		ctx, cancel := context.WithCancel(soon(t))
		defer cancel()
		go func() { <-w.entered; cancel() }()
		err := host.Exec(ctx, transport.Command{Args: []string{"yes"}, Stdout: w, WaitDelay: 100 * time.Millisecond})
		assert.ErrorIs(t, err, context.Canceled)
		assert.ErrorIs(t, err, transport.ErrOutputLost)
		close(w.release)
		assert.EqualValues(t, 1, w.calls.Load())
	})
}

type blocking struct {
	entered, release chan struct{}
	calls            atomic.Int32
}

func (w *blocking) Write(p []byte) (int, error) {
	if w.calls.Add(1) == 1 {
		close(w.entered)
	}
	<-w.release
	return len(p), nil
}

func TestBackgroundChild(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		var out bytes.Buffer
		cmd := sh("sleep 20 & echo started")
		cmd.Stdout, cmd.WaitDelay = &out, 2*time.Second
		start := time.Now()
		err := host.Exec(soon(t), cmd)
		assert.Less(t, time.Since(start), 10*time.Second)
		assert.Equal(t, "started\n", out.String())
		if err != nil { // on LXD before 5.0.3
			assert.ErrorIs(t, err, transport.ErrOutputLost)
			assert.ErrorContains(t, err, "redirect")
		}
		// One that does not hold the streams is nobody's business.
		assert.NoError(t, host.Exec(soon(t), sh("sleep 20 >/dev/null 2>&1 </dev/null & true")))
	})
}

// linger ends a script on a terminal. LXD 5.0 may lose what a command has written to its terminal just before its end, with `lxc
// exec` as well; the command has to stay for a moment.
const linger = "; code=$?; sleep 0.5; exit $code"

func TestTerminal(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		var out bytes.Buffer
		require.NoError(t, host.Exec(soon(t), transport.Command{
			Args: transport.Shell("stty size; echo $TERM; echo err >&2; test -t 0 && test -t 2 && echo tty" + linger),
			TTY:  &transport.TTY{Term: "vt100", Size: transport.TerminalSize{Cols: 123, Rows: 45}}, Stdout: &out,
		}))
		assert.Equal(t, "45 123\r\nvt100\r\nerr\r\ntty\r\n", out.String())

		for _, in := range []string{"", "line\n", "no line"} {
			out.Reset()
			require.NoError(t, host.Exec(soon(t), transport.Command{
				Args: transport.Shell("stty -echo; echo $TERM; cat" + linger), TTY: &transport.TTY{}, Stdin: strings.NewReader(in), Stdout: &out,
			}), "the end of the input has to arrive: %q", in)
			assert.Contains(t, out.String(), "xterm\r\n")
			assert.Contains(t, out.String(), strings.TrimSpace(in))
		}
		// The tail is not lost.
		out.Reset()
		err := host.Exec(soon(t), transport.Command{Args: transport.Shell("seq 100000; (exit 5)" + linger), TTY: &transport.TTY{}, Stdout: &out})
		code, _ := transport.ExitCode(err)
		assert.Equal(t, 5, code, "%v", err)
		assert.True(t, strings.HasSuffix(out.String(), "\r\n100000\r\n"))
	})
}

// TestTerminalThatNobodyReads: input that nobody reads holds nothing up. LXD 5.0 may keep the status back then, and the operation for ever, for
// which the instance is the test's own.
func TestTerminalThatNobodyReads(t *testing.T) {
	t.Parallel()
	reallxd.Need(t)
	server := reallxd.Unix(t)
	name := reallxd.Create(t, server)
	reallxd.Start(t, server, name)
	t.Cleanup(func() {
		reallxd.Stop(t, server, name)
		reallxd.Delete(t, server, name)
	})
	for _, server := range reallxd.Servers(t) {
		host := newLXD(t, server, name, nil)
		err := host.Exec(soon(t), transport.Command{Args: transport.Shell("stty raw; sleep 0.5; exit 6"), TTY: &transport.TTY{}, Stdin: zeros{}, WaitDelay: time.Second})
		code, exited := transport.ExitCode(err)
		assert.True(t, code == 6 || !exited && err != nil, "%v", err)
	}
}

func TestStartSignalResize(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		up := make(chan struct{})
		var once sync.Once
		var mu sync.Mutex
		var out bytes.Buffer
		w := writerFunc(func(p []byte) (int, error) {
			once.Do(func() { close(up) })
			mu.Lock()
			defer mu.Unlock()
			return out.Write(p)
		})
		p, err := transport.Start(soon(t), host, transport.Command{
			Args:   transport.Shell("trap 'stty size; sleep 0.5; exit 9' USR2; echo up; while :; do sleep 0.05; done"),
			TTY:    &transport.TTY{Size: transport.TerminalSize{Cols: 80, Rows: 24}},
			Stdout: w,
		})
		require.NoError(t, err)
		<-up
		require.NoError(t, p.Resize(transport.TerminalSize{Cols: 200, Rows: 50}))
		require.NoError(t, p.Signal(transport.SIGUSR2))
		code, _ := transport.ExitCode(p.Wait())
		assert.Equal(t, 9, code)
		assert.Contains(t, out.String(), "50 200")
		assert.ErrorContains(t, p.Signal("NOPE"), "unknown signal")

		p, err = host.Start(soon(t), transport.Command{Args: []string{"sleep", "1000"}})
		require.NoError(t, err)
		assert.ErrorContains(t, p.Resize(transport.TerminalSize{}), "no terminal")
		require.NoError(t, p.Signal(transport.SIGHUP))
		code, _ = transport.ExitCode(p.Wait())
		assert.Equal(t, 129, code)
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A flood to a slow writer, then cancelled: the memory stays small, the prefix is whole.
func TestFloodIsHeldBack(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		ctx, cancel := context.WithCancel(soon(t))
		defer cancel()
		n := 0
		w := writerFunc(func(p []byte) (int, error) {
			for _, b := range p {
				if want := "y\n"[n%2]; b != want {
					return 0, fmt.Errorf("byte %d is %q", n, b)
				}
				n++
			}
			if n > 8<<20 {
				cancel()
			}
			return len(p), nil
		})
		err := host.Exec(ctx, transport.Command{Args: []string{"yes"}, Stdout: w})
		assert.ErrorIs(t, err, context.Canceled)
		code, _ := transport.ExitCode(err)
		assert.Equal(t, 143, code)
	})
}

func TestErrorsNameTheInstance(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		err := host.Exec(soon(t), transport.Command{Args: []string{"true"}, Dir: "/nope"})
		assert.Regexp(t, `^transport: exec on "t[0-9a-z]+": chdir /nope: `, err)
		var p *fs.PathError
		assert.ErrorAs(t, err, &p)
	})
}
