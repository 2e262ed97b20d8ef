//go:build unix

package lxdtest_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/lxdtest"
)

// An end is what happens to a daemon in the middle of a conversation, in two steps: the signal, and a new one that answers.
type end struct{ signal, back func() }

// ends are conversations about the end of a daemon, and what would disturb others at one that is shared.
var ends = []struct {
	name string
	real func(t *testing.T, d *reallxd.Daemon) end
	fake func(s *lxdtest.Server) end
	do   func(w *wire, e end)
	want []string
}{
	{
		name: "a connection that says nothing",
		real: func(*testing.T, *reallxd.Daemon) end { return end{} },
		fake: func(*lxdtest.Server) end { return end{} },
		do: func(w *wire, _ end) {
			silent, err := w.dial(w.t.Context())
			require.NoError(w.t, err)
			answered := make(chan struct{})
			go func() {
				defer close(answered)
				w.do("GET", "/1.0/instances/nobody", "", "")
			}()
			wait := time.NewTimer(time.Second) // for what must not come
			defer wait.Stop()
			select {
			case <-answered:
				w.note("it holds up nobody")
			case <-wait.C:
				w.note("it holds up others")
			}
			silent.Close()
			<-answered
		},
		want: []string{"404"},
	},
	{
		name: "a daemon that is killed",
		real: func(t *testing.T, d *reallxd.Daemon) end {
			return end{func() { d.Kill(t) }, func() { d.Ended(t); d.Up(t) }}
		},
		fake: func(s *lxdtest.Server) end { return end{s.Die, func() {}} },
		do: func(w *wire, e end) {
			s := w.shell("echo ready; cat; echo over >../tmp/over").all()
			s.expect("1", "ready\n")
			quiet, release := w.waiting("daemon")
			e.signal()
			s.frames()
			e.back()
			s.result()
			s.dial("1")
			quiet.result()
			// Its commands have lived on: the one that read has read the end of its input.
			w.until("/1.0/instances/INSTANCE/files?path=/tmp/over")
			w.do("GET", "/1.0/instances/INSTANCE/files?path=/tmp/over", "", "")
			release()
		},
		want: []string{`0: END ""`, `1: BINARY, END "ready\n"`, `2: END ""`, `control: END ""`, "404", "Operation not found", "dial 1: 404", "404", "200", "over"},
	},
	{
		name: "a daemon that is terminated",
		real: func(t *testing.T, d *reallxd.Daemon) end {
			return end{func() { d.Terminate(t) }, func() { d.Ended(t); d.Up(t) }}
		},
		fake: func(s *lxdtest.Server) end {
			over := make(chan struct{})
			return end{func() { go func() { defer close(over); s.Terminate() }() }, func() { <-over }}
		},
		do: func(w *wire, e end) {
			s := w.shell("echo ready; cat; echo over; exit 7").all()
			s.expect("1", "ready\n")
			e.signal()
			until(w.t, func() bool {
				res, _ := w.get("POST", "/1.0/instances/nobody/exec", "", "")
				return res.StatusCode == 503
			})
			told := make(chan struct{})
			go func() { defer close(told); s.result() }()
			w.do("POST", "/1.0/instances/INSTANCE/exec", "", `{"command":["true"]}`)
			w.do("PUT", "/1.0/instances/INSTANCE/state", "", `{"action":"freeze"}`)
			w.do("POST", "/1.0/instances/INSTANCE/files?path=/tmp/late", octets, "x")
			w.do("DELETE", "/1.0/operations/"+s.id, "", "")
			w.do("GET", "/1.0/instances/INSTANCE/files?path=/no/such/file", "", "")
			w.do("GET", "/1.0/operations/"+s.id, "", "")
			s.result("?timeout=0")
			s.binary("0", "still here\n")
			s.expect("1", "still here\n")
			s.text("0", "")
			<-told
			s.frames()
			e.back()
			s.result()
		},
		want: []string{"503", "LXD is shutting down", "503", "503", "400", "can't be cancelled", "404", `"status":"Running"`, `"return":7`, `1: BINARY, TEXT "", END "ready\nstill here\nover\n"`, "404"},
	},
}

// TestEnds has the conversations with the fake alone.
func TestEnds(t *testing.T) {
	t.Parallel()
	for _, way := range []string{"unix", "https"} {
		for _, c := range ends {
			t.Run(way+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				s := scenario{}.fake(t, lxdtest.LXD50, "c1", way == "https")
				w := fakeWire(t, s, "c1")
				c.do(w, c.fake(s))
				w.expect(c.want)
			})
		}
	}
}

// TestDifferentialEnds has them with a real LXD of its own, too.
func TestDifferentialEnds(t *testing.T) {
	reallxd.Need(t)
	d := reallxd.StartDaemon(t, "../scripts/lxd")
	for way, real := range map[string]*wire{"unix": unixWire(t, d.Variable), "https": tlsWire(t, d.Variable)} {
		ownInstance(real, "", "")
		for _, c := range ends {
			t.Run(way+"/"+c.name, func(t *testing.T) {
				w := real.of(real.instance)
				w.t = t
				c.do(w, c.real(t, d))
				s := scenario{}.fake(t, lxdtest.LXD50, w.instance, way == "https")
				f := fakeWire(t, s, w.instance)
				c.do(f, c.fake(s))
				require.Equal(t, w.transcript(), f.transcript(), "expected is the real server's")
			})
		}
	}
}
