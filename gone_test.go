package transport_test

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/lxdtest"
)

// A server that does not notice a command's end, until the control socket is closed, does not hold Exec.
func TestEndThatTheServerDoesNotNotice(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewUnstartedServer()
	s.Handler = func(p *lxdtest.Process) int {
		for name := range p.Env {
			if strings.HasPrefix(name, transport.MarkPrefix) {
				signals := p.Notify(10)
				_, _ = p.Stdout.Write([]byte("up"))
				<-signals // the server listens to the control socket then
				return 7
			}
		}
		_, _ = p.Stdout.Write([]byte("gone\n")) // whoever has no mark asks for one that has
		return 0
	}
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	s.Start()
	t.Cleanup(s.Close)
	s.Inject(lxdtest.Fault{Route: lxdtest.RouteExec, Moment: lxdtest.OnExit, Nth: 1, Do: func(p *lxdtest.Point) lxdtest.Verdict {
		control := func(task string) bool { return strings.HasPrefix(task, "control ") }
		assert.Eventually(t, func() bool { return !slices.ContainsFunc(s.Open(), control) }, patience, 10*time.Millisecond)
		return lxdtest.Proceed
	}})
	host := newLXD(t, connect(t, s), "c1", nil)
	up := make(chan struct{})
	p, err := host.Start(soon(t), transport.Command{Args: []string{"ends"}, Stdout: upThen(func() { close(up) })})
	require.NoError(t, err)
	<-up
	require.NoError(t, p.Signal(transport.SIGUSR1))
	code, exited := transport.ExitCode(p.Wait())
	assert.True(t, exited)
	assert.Equal(t, 7, code)
	assert.Len(t, s.Execs(), 2)
}

// A command that has only closed its outputs is not taken for one that has ended, not even if it has cleared its environment, too.
func TestCommandThatClosesItsOutputs(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		for _, script := range []string{
			"exec >&- 2>&-; sleep 12; exit 7",
			"exec env -i sh -c 'exec >&- 2>&-; sleep 12; exit 7'",
		} {
			t.Run(script, func(t *testing.T) {
				t.Parallel()
				code, exited := transport.ExitCode(host.Exec(soon(t), transport.Command{Args: transport.Shell(script)}))
				assert.True(t, exited)
				assert.Equal(t, 7, code)
			})
		}
	})
}

func TestGone(t *testing.T) {
	t.Parallel()
	reallxd.Need(t)
	s := reallxd.Unix(t)
	host := newLXD(t, s, reallxd.Own(t, s), nil)
	ctx := soon(t)
	for _, c := range []struct {
		what, script string
	}{
		{"as it is", "env; echo up; exec >&- 2>&-; read x"},
		{"without its environment", "env; echo up; exec env -i sh -c 'exec >&- 2>&-; read x'"},
	} {
		up := make(chan struct{})
		w := upThen(func() { close(up) })
		stdin, end := io.Pipe()
		p, err := host.Start(ctx, transport.Command{Args: transport.Shell(c.script), Stdin: stdin, Stdout: w})
		require.NoError(t, err)
		<-up
		mark := markIn(t, w)
		assert.False(t, transport.Gone(ctx, host, mark), c.what)
		end.Close()
		_ = p.Wait()
		assert.True(t, transport.Gone(ctx, host, mark), c.what)
	}

	// Another command of ours says nothing of this one, and one of somebody else's leaves it open.
	ours, err := host.Start(ctx, transport.Command{Args: []string{"sleep", "1000"}})
	require.NoError(t, err)
	assert.True(t, transport.Gone(ctx, host, "NOSUCHMARK"))
	require.NoError(t, ours.Signal(transport.SIGKILL))
	_ = ours.Wait()
}

// markIn finds the mark among the variables that a command has printed.
func markIn(t *testing.T, w *watcher) string {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for line := range bytes.Lines(w.seen.Bytes()) {
		if rest, ok := bytes.CutPrefix(line, []byte(transport.MarkPrefix)); ok {
			mark, _, _ := bytes.Cut(rest, []byte("="))
			return string(mark)
		}
	}
	t.Fatal("the command has no mark")
	return ""
}
