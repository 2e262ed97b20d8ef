package transport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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
	"github.com/lxdtransport/transport/lxdtest"
)

// What a cancelled command leaves behind on the real server: nothing.

var errKillTest = errors.New("enough")

var tokens atomic.Int64

// newToken returns a number of seconds to sleep that no other process of this run sleeps, by which a test knows its own.
func newToken() string { return strconv.FormatInt(1_000_000+tokens.Add(1), 10) }

// upThen runs f when a command writes "up".
func upThen(f func()) *watcher { return &watcher{f: f} }

type watcher struct {
	mu   sync.Mutex
	f    func()
	seen bytes.Buffer
}

func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen.Write(p)
	if w.f != nil && strings.Contains(w.seen.String(), "up") {
		w.f()
		w.f = nil
	}
	return len(p), nil
}

// assertNone fails if a process with a token among its arguments is left. Exec has returned: none may be left for a moment.
func assertNone(t *testing.T, instance, token string) {
	t.Helper()
	processes, err := reallxd.Processes(reallxd.Unix(t), instance)
	require.NoError(t, err)
	for _, p := range processes {
		assert.NotContains(t, p, token, "it is left")
	}
}

// descend is started with a script, whose $1 is a token, says "up" when all is in place, and has then left processes behind.
var descend = []struct {
	name   string
	script string
	cmd    transport.Command
	code   int
	killed int // at least; what the command itself started may have ended by TERM, too
	want   string

	blocked bool // its input neither comes nor ends
}{
	{name: "child", script: `sleep $1 & echo up; wait`, code: 143, killed: 1, want: "it was ended by TERM; "},
	{name: "grandchildren", script: `sh -c 'sh -c "sleep $1; :" sh $1 & sh -c "sleep $1; :" sh $1 & echo up; wait' sh $1; :`, code: 143, killed: 5},
	{name: "setsid", script: `setsid sleep $1 </dev/null >/dev/null 2>&1 & echo up; wait`, code: 143, killed: 1},
	{name: "adopted by init", script: `(setsid sh -c 'sleep $1 </dev/null >/dev/null 2>&1 &' sh $1); echo up; exec sleep $1`, code: 143, killed: 1},
	{name: "no environment", script: `sh -c 'env -i sleep $1 & wait' sh $1 & echo up; wait`, code: 143, killed: 2},
	// Here the parent is the command itself. Had it died of TERM, nothing would tell its child from others.
	{name: "no environment, and TERM ignored", script: `trap '' TERM; env -i sh -c 'sleep $1 & wait' sh $1 & echo up; wait`,
		cmd: transport.Command{WaitDelay: 200 * time.Millisecond}, code: 137, killed: 2, want: "it was ended by KILL; "},
	{name: "holds the streams", script: `sleep $1 & sleep $1 <&0 >/dev/null 2>&1 & sleep $1 >/dev/null & echo up; wait`, code: 143, killed: 3},
	{name: "holds the streams after the end", script: `sleep $1 & echo up; exit 0`, killed: 1},
	{name: "TERM ignored", script: `trap '' TERM; sleep $1 & setsid sleep $1 & echo up; while :; do wait; done`,
		cmd: transport.Command{WaitDelay: 200 * time.Millisecond}, code: 137, killed: 2, want: "it was ended by KILL; "},
	{name: "forks for ever", script: `sh -c 'trap "" TERM; while :; do sleep $1 & usleep 5000; done' sh $1 & echo up; wait`, code: 143, killed: 2},
	{name: "two that watch each other", script: `cat >/tmp/watch-$1 <<'END'
trap '' TERM; setsid sleep $1 & while [ -d /proc/$2 ]; do usleep 1000; done; sh $0 $1 $$ &
while [ -d /proc/$! ]; do usleep 1000; done; exec sh $0 $1 $$
END
setsid sh /tmp/watch-$1 $1 $$ & echo up; wait; rm -f /tmp/watch-$1`, code: 143, killed: 2},
	{name: "stopped", script: `sleep $1 & kill -STOP $!; echo up; wait`, code: 143, killed: 1},
	{name: "pid namespace", script: `setsid unshare -f -p sleep $1 & while ! grep -q "sleep$" /proc/[0-9]*/comm; do :; done; echo up; wait`, code: 143, killed: 1},
	{name: "other user", script: `setsid sleep $1 & sleep $1 & echo up; wait`, cmd: transport.Command{User: &transport.User{UID: 1000, GID: 1000}}, code: 143, killed: 2},
	{name: "terminal", script: `setsid sleep $1 & sleep $1 & echo up; wait`, cmd: transport.Command{TTY: &transport.TTY{}}, code: 143},
	{name: "terminal, and TERM ignored", script: `trap '' TERM HUP; setsid sleep $1 & sleep $1 & echo up; while :; do wait; done`,
		cmd: transport.Command{TTY: &transport.TTY{}, WaitDelay: 200 * time.Millisecond}, code: 137, killed: 1, want: "it was ended by KILL; "},
	{name: "input that nobody reads", script: `sleep $1 & echo up; wait`, cmd: transport.Command{Stdin: zeros{}}, code: 143, killed: 1},
	{name: "input that does not come", script: `sleep $1 & echo up; cat; wait`, blocked: true, code: 143, killed: 1},
	{name: "itself stopped", script: `sleep $1 & (while ! grep -q ") T" /proc/$$/stat; do usleep 10000; done; echo up) & kill -STOP $$; echo no`,
		cmd: transport.Command{WaitDelay: 200 * time.Millisecond}, code: 137, killed: 1, want: "it was ended by KILL; "},
	{name: "forked twice", script: `(sh -c '(sleep $1 & sleep $1 & ) & sleep $1 &' sh $1 &); usleep 100000; echo up; exec sleep $1`, code: 143, killed: 3},
	{name: "two hundred", script: `b() { trap '' TERM HUP; if [ $2 -gt 0 ]; then b $1 $(($2-1)) & b $1 $(($2-1)) & fi; setsid sleep $1 & wait; }
b $1 6 & while [ $(grep -l sleep /proc/[0-9]*/comm 2>/dev/null | wc -l) -lt 127 ]; do usleep 100000; done; echo up; wait`, code: 143, killed: 200},
	{name: "other signal", script: `sleep $1 & echo up; wait`, cmd: transport.Command{CancelSignal: transport.SIGUSR1}, code: 138, killed: 1, want: "it was ended by USR1; "},
	{name: "a status of its own", script: `trap 'exit 7' TERM; sleep $1 & echo up; while :; do wait; done`, code: 7, killed: 1, want: "it ended by itself after TERM; "},
	{name: "success after TERM", script: `trap 'exit 0' TERM; sleep $1 & echo up; while :; do wait; done`, killed: 1, want: "it ended by itself after TERM; "},
	{name: "many lines in the environment", script: `setsid sleep $1 & echo up; wait`, cmd: transport.Command{Env: map[string]string{
		"LINES": strings.Repeat("\nTRANSPORT_COMMAND_X=1\n\\", 100)}}, code: 143, killed: 1},
}

func TestNothingIsLeftOfTheCancelled(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		servers := reallxd.Servers(t)
		for i, c := range descend {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				if c.blocked {
					stdin, end := io.Pipe()
					defer end.Close()
					c.cmd.Stdin = stdin
				}
				cancelAndLook(t, newLXD(t, servers[i%len(servers)], instance, nil), instance, c.script, c.cmd, c.code, c.killed, c.want)
			})
		}
	})
}

// cancelAndLook runs a script until it is up, ends its context, and looks at the verdict and at what is left.
func cancelAndLook(t *testing.T, host *transport.LXD, instance, script string, cmd transport.Command, code, killed int, want string) {
	t.Helper()
	mine := newToken()
	ctx, cancel := context.WithCancelCause(soon(t))
	defer cancel(nil)
	cmd.Args, cmd.Stdout = transport.Shell(script, mine), upThen(func() { cancel(errKillTest) })
	err := host.Exec(ctx, cmd)
	assertNone(t, instance, mine)
	assert.ErrorIs(t, err, errKillTest)
	if code != 0 {
		got, exited := transport.ExitCode(err)
		assert.True(t, exited, "%v", err)
		assert.Equal(t, code, got, "%v", err)
	}
	if assert.Error(t, err) {
		var n int
		_, tail, _ := strings.Cut(err.Error(), "descendants killed: ")
		fmt.Sscan(tail, &n)
		assert.GreaterOrEqual(t, n, killed, "%v", err)
		assert.ErrorContains(t, err, "descendants killed: ")
		assert.ErrorContains(t, err, want)
	}
}

// Fifty commands that are cancelled at once are cleaned up after in few further execs, and others are left alone.
func TestCloseKillsAll(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		link, server := unixLink(t)
		host, err := transport.NewLXD(server, instance, nil)
		require.NoError(t, err)
		others := newLXD(t, reallxd.Unix(t), instance, nil)
		bystander, up := newToken(), make(chan struct{})
		stdin, end := io.Pipe()
		other, err := others.Start(soon(t), transport.Command{Args: transport.Shell("sleep $1 & echo up; read x; kill $!; exit 5", bystander),
			Stdout: upThen(func() { close(up) }), Stdin: stdin})
		require.NoError(t, err)
		<-up
		const n = 50
		mine := newToken()
		var ready, done sync.WaitGroup
		errs := make([]error, n)
		for i := range n {
			ready.Add(1)
			done.Go(func() {
				errs[i] = host.Exec(soon(t), transport.Command{Args: transport.Shell("setsid sleep $1 & sleep $1 & echo up; wait", mine),
					Stdout: upThen(ready.Done)})
			})
		}
		ready.Wait()
		requests := link.count("POST /1.0/instances/" + instance + "/exec")
		assert.Equal(t, n, requests)
		start := time.Now()
		require.NoError(t, host.Close())
		took := time.Since(start)
		done.Wait()
		assertNone(t, instance, mine)
		assert.Less(t, took, patience)
		more := link.count("POST /1.0/instances/"+instance+"/exec") - requests
		t.Logf("Close took %v and %d execs", took, more)
		assert.LessOrEqual(t, more, 12, "the reaper works for all at once")
		for _, err := range errs {
			assert.ErrorIs(t, err, transport.ErrClosed)
			code, _ := transport.ExitCode(err)
			assert.Equal(t, 143, code, "%v", err)
			assert.ErrorContains(t, err, "descendants killed: 2")
		}
		processes, err := reallxd.Processes(reallxd.Unix(t), instance)
		require.NoError(t, err)
		assert.Contains(t, strings.Join(processes, "\n"), "sleep "+bystander)
		end.Close()
		code, _ := transport.ExitCode(other.Wait())
		assert.Equal(t, 5, code)
	})
}

// Without a shell nothing is found, and the error says so; with every other shell it is as with the image's own.
func TestShells(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		busybox := func(t *testing.T, host *transport.LXD, args ...string) {
			t.Helper()
			require.NoError(t, host.Exec(soon(t), transport.Command{Args: append([]string{"/bin/busybox"}, args...)}))
		}
		for name, c := range map[string]struct{ put, want string }{
			"none":            {"", "there is no /bin/sh to look for them with"},
			"one that floods": {"#!/bin/busybox yes\n", "was not confirmed: "},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				instance := reallxd.Own(t, reallxd.Unix(t))
				host := newLXD(t, reallxd.Unix(t), instance, nil)
				busybox(t, host, "rm", "/bin/sh")
				if c.put != "" {
					require.NoError(t, host.Upload(soon(t), "/bin/sh", strings.NewReader(c.put), &transport.UploadOptions{Mode: 0o755}))
				}
				mine := newToken()
				ctx, cancel := context.WithCancelCause(soon(t))
				defer cancel(nil)
				start := time.Now()
				err := host.Exec(ctx, transport.Command{Args: []string{"/bin/busybox", "sh", "-c", `trap "" TERM; echo up; while :; do busybox usleep 100000; done`, mine},
					Stdout: upThen(func() { cancel(errKillTest) }), WaitDelay: 500 * time.Millisecond})
				assert.Less(t, time.Since(start), patience)
				assert.ErrorIs(t, err, errKillTest)
				code, _ := transport.ExitCode(err)
				assert.Equal(t, 137, code)
				assert.ErrorContains(t, err, "it was ended by KILL; whether it has left processes behind was not confirmed: ")
				assert.ErrorContains(t, err, c.want)
				assertNone(t, instance, mine)
			})
		}
		for _, name := range []string{"dash", "bash", "ash"} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				instance := reallxd.Own(t, reallxd.Unix(t))
				host := newLXD(t, reallxd.Unix(t), instance, nil)
				if name != "ash" {
					putProgram(t, host, name, "/usr/bin/"+name)
					busybox(t, host, "rm", "/bin/sh")
					busybox(t, host, "ln", "-s", "/usr/bin/"+name, "/bin/sh")
				}
				for _, grep := range []bool{true, false} {
					if !grep {
						busybox(t, host, "rm", "/bin/grep")
						// An ash of busybox runs its own grep without looking for a file, where it was built so.
					}
					for _, c := range descend {
						switch c.name {
						case "grandchildren", "adopted by init", "no environment, and TERM ignored", "holds the streams", "two that watch each other", "other user", "many lines in the environment":
							t.Run(fmt.Sprintf("%s grep=%v", c.name, grep), func(t *testing.T) {
								cancelAndLook(t, host, instance, c.script, c.cmd, c.code, 1, c.want)
							})
						}
					}
				}
			})
		}
	})
}

// What the script says is waited for, however busy the server is.
func TestReaperIsHeardToItsEnd(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewUnstartedServer()
	s.Handler = lxdtest.LocalCommands("")
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	s.Start()
	t.Cleanup(s.Close)
	host := newLXD(t, connect(t, s), "c1", nil)
	ctx, cancel := context.WithCancelCause(soon(t))
	defer cancel(nil)
	err := host.Exec(ctx, transport.Command{Args: transport.Shell("setsid sleep 1000 >/dev/null 2>&1 & echo up; wait"), Stdout: upThen(func() {
		s.Inject(websocket("1", lxdtest.OnMark, lxdtest.Delay(200*time.Millisecond)))
		cancel(errKillTest)
	})})
	assert.ErrorIs(t, err, errKillTest)
	assert.ErrorContains(t, err, "descendants killed: 1")
}

// What the search could not kill is said.
func TestDescendantsThatDoNotDie(t *testing.T) {
	t.Parallel()
	s := fake(t, false, func(p *lxdtest.Process) int {
		if p.Args[0] == "wait" {
			return commands(p)
		}
		marks, _ := io.ReadAll(p.Stdin)
		mark := strings.TrimSpace(string(marks))
		fmt.Fprintf(p.Stdout, "killed %s\nkilled %[1]s\nkilled other\nleft %[1]s\ndone\n", mark)
		return 0
	}, nil)
	host := newLXD(t, connect(t, s), "c1", nil)
	ctx, cancel := context.WithCancelCause(soon(t))
	defer cancel(nil)
	err := host.Exec(ctx, transport.Command{Args: []string{"wait"}, Stdout: upThen(func() { cancel(errKillTest) })})
	assert.ErrorIs(t, err, errKillTest)
	assert.ErrorContains(t, err, "it was ended by TERM; descendants killed: 2, of which 1 did not die")
}

// Who has ended by the KILL that follows a search that takes long is not counted among those that the search has killed.
func TestDescendantsAreCounted(t *testing.T) {
	t.Parallel()
	var found sync.Once
	s := fake(t, false, func(p *lxdtest.Process) int {
		if p.Args[0] == "wait" {
			return commands(p)
		}
		marks, _ := io.ReadAll(p.Stdin)
		found.Do(func() { fmt.Fprintf(p.Stdout, "killed %s\n", strings.TrimSpace(string(marks))) })
		fmt.Fprintln(p.Stdout, "done")
		return 0
	}, nil)
	host := newLXD(t, connect(t, s), "c1", nil)
	ctx, cancel := context.WithCancelCause(soon(t))
	defer cancel(nil)
	err := host.Exec(ctx, transport.Command{Args: []string{"wait"}, CancelSignal: transport.SIGKILL, Stdout: upThen(func() {
		s.Inject(lxdtest.Fault{Route: lxdtest.RouteExec, Do: lxdtest.Delay(3500 * time.Millisecond)})
		cancel(errKillTest)
	})})
	assert.ErrorIs(t, err, errKillTest)
	assert.ErrorContains(t, err, "it was ended by KILL; descendants killed: 1")
}

// In an instance where processes come and go all the time, many of which have no environment, the search has an end all the same.
func TestKillingInABusyInstance(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		host := newLXD(t, reallxd.Unix(t), instance, nil)
		ctx, cancel := context.WithCancel(soon(t))
		var busy sync.WaitGroup
		defer busy.Wait()
		defer cancel()
		for range 3 {
			up := make(chan struct{})
			busy.Go(func() {
				host.Exec(ctx, transport.Command{Args: transport.Shell("echo up; while :; do env -i sleep 0.01; done"), Stdout: upThen(func() { close(up) })})
			})
			<-up
		}
		quickest := time.Hour
		for range 3 {
			start := time.Now()
			cancelAndLook(t, newLXD(t, reallxd.Unix(t), instance, nil), instance, `setsid sleep $1 & echo up; wait`, transport.Command{}, 143, 1, "it was ended by TERM; ")
			quickest = min(quickest, time.Since(start))
		}
		assert.Less(t, quickest, 2500*time.Millisecond, "that is 50 rounds with their pauses, and 500 ms before there is no confirmation any more")
	})
}

// What is killed may take longer than WaitDelay, on a server that tells the end of a command when the last one has gone that holds its output: the
// status comes all the same.
func TestStatusWaitsForTheKilling(t *testing.T) {
	t.Parallel()
	// ctx may end just before the end of the command is seen
	for name, own := range map[string]string{"ended by TERM": "wait", "ended by itself( after TERM)?": "exit 3"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := fake(t, false, lxdtest.LocalCommands(""), func(v *lxdtest.Version) { *v = lxdtest.LXD50 })
			host := newLXD(t, connect(t, s), "c1", nil)
			ctx, cancel := context.WithCancelCause(soon(t))
			defer cancel(nil)
			up := make(chan struct{})
			p, err := host.Start(ctx, transport.Command{Args: transport.Shell("sleep 1000 & echo up; " + own), Stdout: upThen(func() { close(up) }), WaitDelay: 500 * time.Millisecond})
			require.NoError(t, err)
			<-up
			want := 143
			if own != "wait" {
				want = 3
				for p.Signal(transport.SIGCONT) == nil { // until its end has been seen
					<-time.After(time.Millisecond)
				}
			}
			s.Inject(lxdtest.Fault{Route: lxdtest.RouteExec, Do: lxdtest.Delay(1800 * time.Millisecond)})
			cancel(errKillTest)
			err = p.Wait()
			code, _ := transport.ExitCode(err)
			assert.Equal(t, want, code, "%v", err)
			assert.ErrorIs(t, err, errKillTest)
			assert.NotErrorIs(t, err, transport.ErrOutputLost)
			assert.Regexp(t, name+"; descendants killed: 1", err.Error())
		})
	}
}
