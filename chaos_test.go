package transport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

// The real server behind a link that fails, with instances that go away.

// counted checks that what a command writes is the beginning of what "seq 1 N" writes.
type counted struct {
	line, n int64
	rest    []byte
	bad     string
	at      int64 // calls f when so many bytes are there
	f       func()
}

func (c *counted) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	c.rest = append(c.rest, p...)
	for c.bad == "" {
		i := bytes.IndexByte(c.rest, '\n')
		if i < 0 {
			break
		}
		c.line++
		if got := string(c.rest[:i]); got != strconv.FormatInt(c.line, 10) {
			c.bad = fmt.Sprintf("line %d is %q", c.line, got)
		}
		c.rest = c.rest[i+1:]
	}
	if len(c.rest) > 20 {
		c.bad = "a line does not end"
	}
	c.rest = append([]byte(nil), c.rest...)
	if c.f != nil && c.n >= c.at {
		c.f()
		c.f = nil
	}
	return len(p), nil
}

// work is what commands do while the link fails: nothing, much output, much input.
var work = []struct {
	name string
	// start makes a command that calls ready when it is in the middle of it.
	start func(mine string, ready func()) (transport.Command, func(t *testing.T))
}{
	{"silence", func(mine string, ready func()) (transport.Command, func(t *testing.T)) {
		return transport.Command{Args: transport.Shell("echo up; exec sleep $1", mine), Stdout: upThen(ready)}, func(*testing.T) {}
	}},
	{"flood", func(mine string, ready func()) (transport.Command, func(t *testing.T)) {
		w := &counted{at: 4 << 20, f: ready}
		return transport.Command{Args: transport.Shell("exec seq 1 9$1", mine), Stdout: w}, func(t *testing.T) {
			assert.Empty(t, w.bad, "what arrived is a whole beginning")
			assert.GreaterOrEqual(t, w.n, int64(4<<20))
		}
	}},
	{"stdin", func(mine string, ready func()) (transport.Command, func(t *testing.T)) {
		return transport.Command{Args: transport.Shell("cat >/dev/null; exec sleep $1", mine), Stdin: &sender{at: 4 << 20, f: ready}}, func(*testing.T) {}
	}},
}

// sender is an endless source that calls a function when so many bytes have been taken.
type sender struct {
	n, at int64
	f     func()
}

func (s *sender) Read(p []byte) (int, error) {
	s.n += int64(len(p))
	if s.f != nil && s.n >= s.at {
		s.f()
		s.f = nil
	}
	return len(p), nil
}

func TestChaosOnTheLink(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		for _, way := range []string{"unix", "https"} {
			for _, w := range work {
				for _, fault := range []struct {
					name string
					do   func(p *proxy)
					// back says that new connections find the server, so that the status can be asked for
					back bool
				}{
					{"cut with RST", func(p *proxy) { p.cut(true, false) }, true},
					{"cut with FIN", func(p *proxy) { p.cut(false, false) }, true},
					{"cut and down", func(p *proxy) { p.cut(true, true) }, false},
					{"half-open", func(p *proxy) { p.freeze(true) }, false},
				} {
					if way == "unix" && fault.name == "cut with RST" {
						continue // a unix socket knows none
					}
					t.Run(way+" "+fault.name+" in "+w.name, func(t *testing.T) {
						t.Parallel()
						liveness := 3 * time.Second
						if fault.back { // nothing has to be given up, however busy the machine is
							liveness = patience
						}
						link, host := linkedFor(t, way, instance, liveness)
						mine := newToken()
						var failed time.Time
						cmd, check := w.start(mine, func() { failed = time.Now(); fault.do(link) })
						cmd.WaitDelay = time.Second
						err := host.Exec(soon(t), cmd)
						assert.Less(t, time.Since(failed), bound)
						check(t)
						assert.ErrorIs(t, err, transport.ErrOutputLost)
						assert.NotErrorIs(t, err, transport.ErrNotStarted, "a caller would run it twice")
						assert.NotErrorIs(t, err, context.Canceled)
						code, exited := transport.ExitCode(err)
						switch {
						case exited:
							assert.True(t, fault.back, "%v", err)
							assert.Contains(t, []int{137, 141}, code, "LXD kills it when it loses us")
						case fault.back:
							// "cat" that has seen the end of its input may have been killed after its own end; LXD told no status then, or 0.
							assert.NotContains(t, err.Error(), "not known", "LXD was there to be asked")
						default:
							assert.ErrorContains(t, err, "may still run")
							assert.NotContains(t, err.Error(), "has ended")
						}
						link.cut(true, true) // now LXD notices, and ends it
						assert.NoError(t, gone(t, instance, mine))
					})
				}
			}
		}
	})
}

// linked is a transport over a link that can fail, which finds out soon.
func linked(t *testing.T, way, instance string) (*proxy, *transport.LXD) {
	t.Helper()
	return linkedFor(t, way, instance, 3*time.Second)
}

// linkedFor is linked with another Liveness.
func linkedFor(t *testing.T, way, instance string, liveness time.Duration) (*proxy, *transport.LXD) {
	t.Helper()
	var link *proxy
	var server lxd.InstanceServer
	if way == "unix" {
		link, server = unixLink(t)
	} else {
		link, server = httpsLink(t)
	}
	return link, newLXD(t, server, instance, &transport.LXDOptions{Liveness: liveness})
}

// gone waits until no process with a token is left.
func gone(t *testing.T, instance, token string) error {
	t.Helper()
	for end := time.Now().Add(patience); ; <-time.After(50 * time.Millisecond) {
		processes, err := reallxd.Processes(reallxd.Unix(t), instance)
		left := strings.Join(processes, "\n")
		if err != nil || !strings.Contains(left, token) {
			return err
		}
		if time.Now().After(end) {
			return errors.New("it is left: " + left)
		}
	}
}

// killLeft kills what is left with a token.
func killLeft(t *testing.T, instance, token string) {
	t.Helper()
	server := reallxd.Unix(t)
	processes, err := reallxd.Processes(server, instance)
	require.NoError(t, err)
	for _, p := range processes {
		if pid, args, _ := strings.Cut(p, " "); strings.Contains(args, token) {
			newLXD(t, server, instance, nil).Exec(soon(t), transport.Command{Args: []string{"kill", "-KILL", pid}}) // unless it has just ended
		}
	}
	assert.NoError(t, gone(t, instance, token))
}

// A link on which nothing passes any more cannot hold anything that begins on it, nor the end of a context.
func TestHalfOpenFromTheBeginning(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		for _, way := range []string{"unix", "https"} {
			for name, run := range map[string]func(host *transport.LXD) error{
				"exec": func(host *transport.LXD) error {
					return host.Exec(t.Context(), transport.Command{Args: []string{"true"}})
				},
				"exec in a directory": func(host *transport.LXD) error {
					return host.Exec(t.Context(), transport.Command{Args: []string{"true"}, Dir: "/root"})
				},
			} {
				t.Run(way+" "+name, func(t *testing.T) {
					t.Parallel()
					link, host := linked(t, way, instance)
					require.NoError(t, run(host))
					link.freeze(true)
					start := time.Now()
					assert.ErrorIs(t, run(host), transport.ErrNotStarted)
					assert.Less(t, time.Since(start), bound)
				})
			}
			t.Run(way+" cancel", func(t *testing.T) {
				t.Parallel()
				link, host := linked(t, way, instance)
				mine := newToken()
				ctx, cancel := context.WithCancelCause(soon(t))
				defer cancel(nil)
				start := time.Now()
				err := host.Exec(ctx, transport.Command{Args: transport.Shell("sleep $1 & echo up; wait", mine), WaitDelay: time.Second,
					Stdout: upThen(func() { start = time.Now(); link.freeze(true); cancel(errEnough) })})
				assert.Less(t, time.Since(start), bound)
				assert.ErrorIs(t, err, errEnough)
				assert.ErrorContains(t, err, "its end was not confirmed; whether it has left processes behind was not confirmed")
				assert.ErrorContains(t, err, "may still run")
				link.cut(true, true)
				// What the command itself left is nobody's now: LXD kills but the one process that it has started.
				killLeft(t, instance, mine)
			})
		}
	})
}

// Connections die without a word, but new ones are as good as ever: a router has forgotten them.
func TestHalfOpenOldConnections(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		t.Run("cancel", func(t *testing.T) {
			t.Parallel()
			link, host := linked(t, "https", instance)
			mine := newToken()
			ctx, cancel := context.WithCancelCause(soon(t))
			defer cancel(nil)
			err := host.Exec(ctx, transport.Command{Args: transport.Shell("setsid sleep $1 & echo up; wait", mine), WaitDelay: time.Second,
				Stdout: upThen(func() { link.freeze(false); cancel(errEnough) })})
			assertNone(t, instance, mine)
			code, _ := transport.ExitCode(err)
			assert.Equal(t, 137, code, "the status was asked for on another connection: %v", err)
			assert.ErrorIs(t, err, transport.ErrOutputLost)
			assert.ErrorContains(t, err, "it was ended by KILL; descendants killed: 1")
		})
		if !slowTests {
			return // the rest takes 45 s
		}
		for _, w := range work {
			t.Run(w.name, func(t *testing.T) {
				t.Parallel()
				link, server := httpsLink(t)
				host := newLXD(t, server, instance, &transport.LXDOptions{Liveness: 9 * time.Second})
				mine := newToken()
				var failed time.Time
				cmd, check := w.start(mine, func() { failed = time.Now(); link.freeze(false) })
				cmd.WaitDelay = time.Second
				err := host.Exec(soon(t), cmd)
				// LXD says a word on every socket every ten seconds. It is asked on new connections, and says that the command runs.
				t.Logf("%v: %v", time.Since(failed), err)
				assert.Less(t, time.Since(failed), 30*time.Second+bound)
				check(t)
				assert.ErrorIs(t, err, transport.ErrOutputLost)
				assert.ErrorContains(t, err, "may still run: the server says that it is running")
				link.cut(true, true)
				assert.NoError(t, gone(t, instance, mine))
			})
		}
	})
}

func TestSlowLink(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		for _, way := range []string{"unix", "https"} {
			t.Run(way, func(t *testing.T) {
				t.Parallel()
				link, host := linked(t, way, instance)
				link.slow(400<<10, 100*time.Millisecond)
				in, out := bytes.Repeat([]byte("0123456789abcdef"), 4<<10), new(bytes.Buffer)
				require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"cat"}, Stdin: bytes.NewReader(in), Stdout: out, WaitDelay: time.Second}))
				assert.True(t, bytes.Equal(in, out.Bytes()), "%d bytes", out.Len())
				w := new(counted)
				require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"seq", "1", "20000"}, Stdout: w, WaitDelay: time.Second}))
				assert.Empty(t, w.bad)
				assert.EqualValues(t, 20000, w.line)
				code, _ := transport.ExitCode(host.Exec(soon(t), sh("exit 3")))
				assert.Equal(t, 3, code)
				require.NoError(t, host.Upload(soon(t), "/root/slow-"+way, bytes.NewReader(in), nil))
				out.Reset()
				require.NoError(t, host.Download(soon(t), "/root/slow-"+way, out, nil))
				assert.True(t, bytes.Equal(in, out.Bytes()), "%d bytes", out.Len())
			})
		}
	})
}

func TestInstanceThatGoesAway(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		server := reallxd.Unix(t)
		for _, c := range []struct {
			name string
			do   func(t *testing.T, instance string)
		}{
			{"stopped by force", func(t *testing.T, instance string) { reallxd.Change(t, server, instance, "stop", true) }},
			{"stopped", func(t *testing.T, instance string) { reallxd.Change(t, server, instance, "stop", false) }},
			{"restarted", func(t *testing.T, instance string) { reallxd.Change(t, server, instance, "restart", true) }},
			{"deleted", func(t *testing.T, instance string) {
				reallxd.Change(t, server, instance, "stop", true)
				reallxd.Delete(t, server, instance)
			}},
		} {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				instance := reallxd.Own(t, server)
				host := newLXD(t, server, instance, nil)
				type running struct {
					name  string
					p     transport.Process
					check func(*testing.T)
				}
				var all []running
				var ready atomic.Int32
				in := make(chan struct{})
				for _, w := range work {
					cmd, check := w.start(newToken(), func() {
						if ready.Add(1) == 3 {
							close(in)
						}
					})
					p, err := host.Start(soon(t), cmd)
					require.NoError(t, err)
					all = append(all, running{w.name, p, check})
				}
				<-in
				c.do(t, instance)
				start := time.Now()
				for _, r := range all {
					err := r.p.Wait()
					code, exited := transport.ExitCode(err)
					assert.True(t, exited, "%s: %v", r.name, err)
					// A clean stop begins with TERM. The end of an input cannot be told from its source's.
					assert.Contains(t, []int{137, 143}, code, "%s: %v", r.name, err)
					r.check(t)
				}
				assert.Less(t, time.Since(start), bound)
				err := host.Exec(soon(t), transport.Command{Args: []string{"true"}})
				switch c.name {
				case "restarted":
					assert.NoError(t, err)
				case "deleted":
					assert.ErrorIs(t, err, transport.ErrNoHost)
				default:
					assert.ErrorIs(t, err, transport.ErrNotRunning)
				}
			})
		}
	})
}

func TestInstanceThatIsFrozen(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		server := reallxd.Unix(t)
		t.Run("and goes on", func(t *testing.T) {
			t.Parallel()
			instance := reallxd.Own(t, server)
			host := newLXD(t, server, instance, &transport.LXDOptions{Liveness: 3 * time.Second})
			ready := make(chan struct{})
			stdin, end := io.Pipe()
			p, err := host.Start(soon(t), transport.Command{Args: transport.Shell("echo up; read x; exit 4"), Stdin: stdin, Stdout: upThen(func() { close(ready) })})
			require.NoError(t, err)
			<-ready
			reallxd.Change(t, server, instance, "freeze", true)
			end.Close()
			assert.ErrorIs(t, host.Exec(soon(t), transport.Command{Args: []string{"true"}}), transport.ErrNotRunning)
			reallxd.Change(t, server, instance, "unfreeze", true)
			code, _ := transport.ExitCode(p.Wait())
			assert.Equal(t, 4, code)
		})
		t.Run("and is cancelled", func(t *testing.T) {
			t.Parallel()
			instance := reallxd.Own(t, server)
			host := newLXD(t, server, instance, nil)
			ctx, cancel := context.WithCancelCause(soon(t))
			defer cancel(nil)
			ready, mine := make(chan struct{}), newToken()
			p, err := host.Start(ctx, transport.Command{Args: transport.Shell("sleep $1 & echo up; wait", mine), Stdout: upThen(func() { close(ready) }), WaitDelay: time.Second})
			require.NoError(t, err)
			<-ready
			reallxd.Change(t, server, instance, "freeze", true)
			start := time.Now()
			cancel(errEnough)
			err = p.Wait()
			assert.Less(t, time.Since(start), bound)
			assert.ErrorIs(t, err, errEnough)
			_, exited := transport.ExitCode(err)
			assert.False(t, exited, "%v", err)
			assert.ErrorContains(t, err, "has not confirmed the end of the command after KILL")
			assert.ErrorContains(t, err, "is not running but frozen")
			reallxd.Change(t, server, instance, "unfreeze", true)
			// TERM waited for it. Its child was out of reach.
			killLeft(t, instance, mine)
		})
	})
}

func TestDiskFull(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		server := reallxd.Unix(t)
		instance := reallxd.Own(t, server)
		host := newLXD(t, server, instance, nil)
		require.NoError(t, host.Exec(soon(t), sh("mount -t tmpfs -o size=1m none /mnt && echo old >/mnt/file")))
		big := make([]byte, 4<<20)
		for _, file := range []string{"/mnt/new", "/mnt/file"} {
			err := host.Upload(soon(t), file, bytes.NewReader(big), nil)
			assert.ErrorContains(t, err, file)
			assert.NotErrorIs(t, err, io.ErrUnexpectedEOF)
			t.Log(err)
		}
		_, err := transport.UploadTree(soon(t), host, "/mnt/tree", fstest.MapFS{"a/big": {Data: big, Mode: 0o644}}, nil)
		assert.ErrorIs(t, err, syscall.ENOSPC, "%v", err)
		t.Log(err)
		out, err := transport.Output(soon(t), host, sh("cat /mnt/file; ls -A /mnt"))
		require.NoError(t, err)
		assert.Equal(t, "old\nfile\ntree\n", string(out), "the old file is as it was, and no temporary one is left")
		require.NoError(t, host.Exec(soon(t), sh("rm -r /mnt/tree")))
		require.NoError(t, host.Upload(soon(t), "/mnt/file", strings.NewReader("new"), nil), "with room there is no trouble")
	})
}

// A flood to a writer that takes 1 MiB/s, then cancelled: memory stays small, what was written is a whole beginning, and the tree is dead.
// TRANSPORT_FLOOD is its size in MiB, 256 if it is not set.
func TestFloodToASlowWriter(t *testing.T) {
	reallxd.Need(t)
	mib, _ := strconv.Atoi(os.Getenv("TRANSPORT_FLOOD"))
	if mib == 0 {
		mib = 256
	}
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		for _, s := range reallxd.Servers(t) {
			t.Run(s.Name, func(t *testing.T) {
				t.Parallel()
				host := newLXD(t, s, instance, nil)
				mine := newToken()
				ctx, cancel := context.WithCancelCause(soon(t))
				defer cancel(nil)
				before, most := heapInUse(), uint64(0)
				w := new(counted)
				slowFrom, start := int64(mib/16)<<20, time.Time{}
				err := host.Exec(ctx, transport.Command{
					// "seq" writes 9 bytes a line, roughly.
					Args: transport.Shell("sleep $1 & seq 1 $2; wait", mine, strconv.Itoa(mib<<20/9*2)),
					Stdout: writerFunc(func(p []byte) (int, error) {
						if w.n>>24 != (w.n+int64(len(p)))>>24 {
							most = max(most, heapInUse())
						}
						w.Write(p)
						if over := w.n - slowFrom; over > 0 {
							if start.IsZero() {
								start = time.Now()
							}
							<-time.After(time.Until(start.Add(time.Duration(over) * time.Second >> 20)))
							if over > 3<<20 {
								most = max(most, heapInUse())
								cancel(errEnough)
							}
						}
						return len(p), nil
					}),
				})
				assertNone(t, instance, mine)
				assert.ErrorIs(t, err, errEnough)
				code, _ := transport.ExitCode(err)
				assert.Equal(t, 143, code, "%v", err)
				assert.ErrorContains(t, err, "descendants killed: ")
				assert.Empty(t, w.bad)
				assert.GreaterOrEqual(t, w.n, slowFrom+3<<20)
				t.Logf("%d bytes; heap %d KiB before, %d KiB at most; %v", w.n, before>>10, most>>10, err)
				assert.Less(t, most, before+8<<20)
			})
		}
	})
}

// heapInUse is what is in use after a collection.
func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// A reader that takes nothing for longer than the 120 s after which LXD cuts a TCP connection.
func TestReaderThatStallsForLong(t *testing.T) {
	if !slowTests {
		t.Skip("takes 130 s; TRANSPORT_SLOW_TESTS=1 runs it")
	}
	reallxd.Need(t)
	t.Parallel()
	instance := reallxd.Own(t, reallxd.Unix(t))
	for _, s := range reallxd.Servers(t) {
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			host := newLXD(t, s, instance, nil)
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
			defer cancel()
			w := new(counted)
			stalled := false
			err := host.Exec(ctx, transport.Command{Args: []string{"seq", "1", "4000000"}, Stdout: writerFunc(func(p []byte) (int, error) {
				if !stalled {
					stalled = true
					<-time.After(130 * time.Second)
				}
				return w.Write(p)
			})})
			t.Logf("%d lines: %v", w.line, err)
			assert.Empty(t, w.bad)
			if err != nil {
				assert.ErrorIs(t, err, transport.ErrOutputLost)
				assert.NotErrorIs(t, err, transport.ErrNotStarted)
			} else {
				assert.EqualValues(t, 4000000, w.line)
			}
		})
	}
}
