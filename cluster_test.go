package transport_test

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

// loopBound is how long a verdict may take with this Liveness: 27 s, as the option's comment counts, and a busy machine. Most come within 4 s, all
// that were seen within 13 s. clusterBound is for Liveness as it is, without anything said about it.
const (
	liveness     = 3 * time.Second
	loopBound    = 45 * time.Second
	clusterBound = 90 * time.Second
)

// A ran is one command and its verdict.
type ran struct {
	id, out string
	err     error
	took    time.Duration
}

// A clusterLoop runs commands in one instance through one member, one after the other. Each adds a line to a file in the instance.
type clusterLoop struct {
	entry, there reallxd.Member
	host         *transport.LXD

	mu  sync.Mutex
	all []ran
}

// run goes on until ctx ends. commands is the context of the commands, which are to have verdicts of their own.
func (l *clusterLoop) run(ctx, commands context.Context) {
	pace := time.NewTicker(50 * time.Millisecond) // a refusal comes at once
	defer pace.Stop()
	for n := 0; ctx.Err() == nil; n++ {
		r := ran{id: fmt.Sprintf("via-%s-%d", l.entry.Name, n)}
		var out strings.Builder
		start := time.Now()
		r.err = l.host.Exec(commands, transport.Command{Args: transport.Shell(`echo $1 >>/root/ran; echo $1`, r.id), Stdout: &out})
		r.took, r.out = time.Since(start), out.String()
		l.mu.Lock()
		l.all = append(l.all, r)
		l.mu.Unlock()
		<-pace.C
	}
}

// verdicts are how many there are, and how many of them are successes.
func (l *clusterLoop) verdicts() (all, good int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.all {
		if r.err == nil {
			good++
		}
	}
	return len(l.all), good
}

// TestClusterLosesMembers runs commands on three instances through each member, while members are killed, stopped and started again. What
// the verdicts say is held against the files in the instances: none ran twice, none ran that was not started, each ran that succeeded. At random the
// leader is killed and another member stopped or the other way round; with TRANSPORT_SLOW_TESTS=1 both.
func TestClusterLosesMembers(t *testing.T) {
	members := reallxd.ClusterToBreak(t)
	var loops []*clusterLoop
	for _, entry := range members {
		for _, there := range members {
			host, err := transport.DialLXD(soon(t), entry.Addr, there.Instance, &transport.LXDOptions{
				TLSClientCert: reallxd.File(t, "TRANSPORT_CLUSTER_CERT"),
				TLSClientKey:  reallxd.File(t, "TRANSPORT_CLUSTER_KEY"),
				TLSServerCert: reallxd.File(t, "TRANSPORT_CLUSTER_SERVER_CERT"),
				Liveness:      liveness,
			})
			require.NoError(t, err)
			t.Cleanup(func() { assert.NoError(t, host.Close()) })
			loops = append(loops, &clusterLoop{entry: entry, there: there, host: host})
		}
	}
	for _, l := range loops[:len(members)] {
		require.NoError(t, l.host.Exec(soon(t), transport.Command{Args: []string{"rm", "-f", "/root/ran"}}))
	}
	ctx, stop := context.WithCancel(context.Background())
	commands, abandon := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { stop(); abandon(); running.Wait() })
	for _, l := range loops {
		running.Go(func() { l.run(ctx, commands) })
	}
	alive := members // are meant to be
	// more waits until each loop has n verdicts more, or as many successes. LXD 5.0 may die by itself when it goes on after a stop.
	more := func(n int, successes bool, of func(*clusterLoop) bool) {
		t.Helper()
		type goal struct {
			*clusterLoop
			all, good int
		}
		var goals []goal
		for _, l := range loops {
			if of(l) {
				all, good := l.verdicts()
				goals = append(goals, goal{l, all + n, good + n})
			}
		}
		look := time.NewTicker(20 * time.Millisecond)
		defer look.Stop()
		for start, looked := time.Now(), time.Now(); ; <-look.C {
			goals = slices.DeleteFunc(goals, func(g goal) bool {
				all, good := g.verdicts()
				return successes && good >= g.good || !successes && all >= g.all
			})
			if len(goals) == 0 {
				return
			}
			if time.Since(looked) > time.Second {
				reallxd.Mend(t, alive...)
				looked = time.Now()
			}
			if l := goals[0].clusterLoop; time.Since(start) > 2*clusterBound {
				l.mu.Lock()
				defer l.mu.Unlock()
				t.Fatalf("nothing new through %s to %s; the last of it: %+v", l.entry.Name, l.there.Name, l.all[max(0, len(l.all)-3):])
			}
		}
	}
	everyone := func(*clusterLoop) bool { return true }
	began := time.Now()
	phase := func(what string) {
		t.Helper()
		t.Logf("%3.0f s: %s", time.Since(began).Seconds(), what)
	}
	more(3, true, everyone)
	phase("all work")
	type loss struct {
		what   string
		leader bool // of the database
		down   func(reallxd.Member, testing.TB)
	}
	losses := []loss{
		{"killed", true, reallxd.Member.Kill}, {"stopped", false, reallxd.Member.Stop},
		{"stopped", true, reallxd.Member.Stop}, {"killed", false, reallxd.Member.Kill},
	}
	if first := 2 * rand.IntN(2); !slowTests {
		losses = losses[first : first+2]
	}
	for _, lost := range losses {
		m := reallxd.Leader(t, members)
		who := "the leader"
		if !lost.leader {
			m, who = members[m.Number%len(members)], "not the leader"
		}
		phase(fmt.Sprintf("%s, %s, is %s", m.Name, who, lost.what))
		alive = slices.DeleteFunc(slices.Clone(members), func(other reallxd.Member) bool { return other.Number == m.Number })
		lost.down(m, t)
		more(2, false, everyone)
		phase("everyone has verdicts")
		// LXD 5.0 may have no database anywhere as long as the leader hangs. Without any other the surviving members' instances work, through
		// others if need be.
		if lost.what != "stopped" || !lost.leader {
			more(2, true, func(l *clusterLoop) bool { return l.there.Number != m.Number })
			phase("the others' instances work")
		}
		m.Start(t)
		alive = members
		phase(m.Name + " is up")
		more(2, true, everyone)
		phase("all work")
	}
	stop()
	late := time.AfterFunc(2*clusterBound, abandon) // whatever has no verdict by then gets a late one
	running.Wait()
	late.Stop()

	for i, there := range members {
		var out strings.Builder
		require.NoError(t, loops[i].host.Exec(soon(t), transport.Command{Args: []string{"cat", "/root/ran"}, Stdout: &out}))
		times := map[string]int{}
		for id := range strings.Lines(out.String()) {
			times[strings.TrimSpace(id)]++
		}
		for _, l := range loops {
			if l.there.Number != there.Number {
				continue
			}
			var good, refused, unknown int
			var longest time.Duration
			for _, r := range l.all {
				name := fmt.Sprintf("%s to %s: %v", r.id, there.Name, r.err)
				assert.LessOrEqual(t, times[r.id], 1, name)
				assert.Less(t, r.took, loopBound, name)
				longest = max(longest, r.took)
				if r.took > 3*liveness {
					t.Logf("%v: %s", r.took.Round(time.Second/10), name)
				}
				code, exited := transport.ExitCode(r.err)
				switch {
				case r.err == nil:
					good++
					assert.Equal(t, 1, times[r.id], name)
					assert.Equal(t, r.id+"\n", r.out, name)
				case errors.Is(r.err, transport.ErrNotStarted):
					refused++
					assert.Zero(t, times[r.id], name)
				default:
					unknown++
					// LXD kills a command whose link it has lost, if need be before it has written.
					killed := code == 128+int(syscall.SIGKILL) && errors.Is(r.err, transport.ErrOutputLost)
					assert.False(t, exited && !killed && times[r.id] == 0, name)
				}
			}
			t.Logf("%s to %s: %d succeeded, %d not started, %d not known; %.1f s at most", l.entry.Name, there.Name, good, refused, unknown, longest.Seconds())
		}
	}
}

// TestClusterRunningCommand: what runs on a member, and was begun through it, does not notice that another dies, nor that its transport
// enters the cluster elsewhere.
func TestClusterRunningCommand(t *testing.T) {
	members := reallxd.ClusterToBreak(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*clusterBound)
	defer cancel()
	dial := func(entry reallxd.Member, instance string) *transport.LXD {
		host, err := transport.DialLXD(ctx, entry.Addr, instance, &transport.LXDOptions{
			TLSClientCert: reallxd.File(t, "TRANSPORT_CLUSTER_CERT"),
			TLSClientKey:  reallxd.File(t, "TRANSPORT_CLUSTER_KEY"),
			TLSServerCert: reallxd.File(t, "TRANSPORT_CLUSTER_SERVER_CERT"),
		})
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, host.Close()) })
		return host
	}
	dies, stays := members[0], members[1]
	moves, host := dial(dies, stays.Instance), dial(stays, stays.Instance)
	cat := func(host *transport.LXD) (say func(string), end func()) {
		in, input := io.Pipe()
		output, out := io.Pipe()
		done := make(chan error, 1)
		go func() {
			err := host.Exec(ctx, transport.Command{Args: []string{"cat"}, Stdin: in, Stdout: out})
			in.CloseWithError(err) // nobody takes it any more
			out.CloseWithError(cmp.Or(err, io.EOF))
			done <- err
		}()
		lines := bufio.NewScanner(output)
		return func(line string) {
				_, err := io.WriteString(input, line+"\n")
				require.NoError(t, err)
				require.True(t, lines.Scan(), "%v", lines.Err())
				require.Equal(t, line, lines.Text())
			}, func() {
				input.Close()
				require.False(t, lines.Scan())
				require.NoError(t, <-done)
			}
	}
	say, end := cat(host)
	say("before")
	dies.Kill(t)
	say("without it")
	assert.Eventually(t, func() bool { return moves.Exec(ctx, transport.Command{Args: []string{"true"}}) == nil }, clusterBound, 100*time.Millisecond)
	sayMoved, endMoved := cat(moves) // through another member
	sayMoved("moved")
	dies.Start(t)
	say("with it again")
	sayMoved("with it again")
	end()
	endMoved()
}

// TestClusterWithoutQuorum: one member of three can do nothing, which is said in time, by it or of it. Nothing was started.
func TestClusterWithoutQuorum(t *testing.T) {
	members := reallxd.ClusterToBreak(t)
	server := members[0].HTTPS(t)
	host := newLXD(t, server, members[0].Instance, nil)
	short := newLXD(t, server, members[0].Instance, &transport.LXDOptions{Liveness: liveness})
	require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"rm", "-f", "/root/started"}}))
	members[1].Kill(t)
	members[2].Kill(t)
	var asking sync.WaitGroup
	for bound, host := range map[time.Duration]*transport.LXD{clusterBound: host, loopBound: short} {
		asking.Go(func() {
			start := time.Now()
			err := host.Exec(soon(t), transport.Command{Args: []string{"touch", "/root/started"}})
			assert.ErrorIs(t, err, transport.ErrNotStarted)
			assert.Less(t, time.Since(start), bound)
			t.Logf("after %v: %v", time.Since(start).Round(time.Second), err)
		})
	}
	asking.Wait()
	reallxd.StartAll(t, members...)
	assert.Eventually(t, func() bool {
		return host.Exec(soon(t), transport.Command{Args: []string{"test", "!", "-e", "/root/started"}}) == nil
	}, 2*clusterBound, 100*time.Millisecond)
}
