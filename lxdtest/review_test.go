package lxdtest_test

import (
	"bytes"
	"context"
	"log"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/lxdtest"
)

// lockedBuffer is a log that may be read meanwhile.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func started(t *testing.T, s *lxdtest.Server, h lxdtest.Handler) *wire {
	t.Helper()
	quick(&s.Version)
	s.AddInstance(lxdtest.Instance{Name: "c1", Handler: h})
	s.Start()
	t.Cleanup(s.Close)
	return fakeWire(t, s, "c1")
}

// TestHandlerThatDoesNotReturn: a failed assertion in a handler, and a panic, end the command and nothing else.
func TestHandlerThatDoesNotReturn(t *testing.T) {
	t.Parallel()
	out := new(lockedBuffer)
	s := lxdtest.NewUnstartedServer()
	s.ErrorLog = log.New(out, "", 0)
	w := started(t, s, func(p *lxdtest.Process) int {
		if p.Args[0] == "panic" {
			panic("boom")
		}
		runtime.Goexit()
		return 0
	})
	w.exec(ws(`["fail"]`)).all().finish()
	require.Contains(t, w.transcript(), `"return":1`)
	w.exec(ws(`["panic"]`)).all().finish()
	require.Contains(t, w.transcript(), `"return":134`)
	require.Contains(t, out.String(), "boom")
}

// TestFaultsThatCannotStrike are refused: a test that waits for one would be green for ever.
func TestFaultsThatCannotStrike(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewUnstartedServer()
	defer s.Close()
	for _, f := range []lxdtest.Fault{
		{}, {Do: lxdtest.Drop, Moment: "later"}, {Do: lxdtest.Drop, Route: "nowhere"}, {Do: lxdtest.Drop, Socket: "stdout"}, {Do: lxdtest.Drop, Nth: -1},
	} {
		require.Panics(t, func() { s.Inject(f) }, "%+v", f)
	}
}

// TestDieInTheMiddle: the sockets of a command end with it, and an operation that never becomes final stays as it is.
func TestDieInTheMiddle(t *testing.T) {
	t.Parallel()
	for _, m := range []lxdtest.Moment{lxdtest.OnStart, lxdtest.OnExit, lxdtest.OnFinal} {
		s := lxdtest.NewUnstartedServer()
		w := started(t, s, func(p *lxdtest.Process) int { return 0 })
		s.Inject(lxdtest.Fault{Route: lxdtest.RouteExec, Moment: m, Do: lxdtest.Drop})
		e := w.exec(ws(`["x"]`)).all()
		for n := range e.sockets {
			e.ended(n)
		}
		require.Equal(t, 1, s.Struck())
	}
}

// TestSwallowedSignal: what the server does not hear it does not obey.
func TestSwallowedSignal(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewUnstartedServer()
	w := started(t, s, func(p *lxdtest.Process) int { <-p.Context().Done(); return 0 })
	s.Inject(lxdtest.Fault{Route: lxdtest.RouteWebsocket, Socket: "control", Moment: lxdtest.OnReceive, Nth: 1, Do: lxdtest.Swallow})
	e := w.exec(ws(`["x"]`)).all()
	until(t, func() bool { return s.Execs()[0].Started })
	e.text("control", `{"command":"signal","signal":15}`)
	e.text("control", `{"command":"signal","signal":10}`)
	e.finish()
	require.Equal(t, []int{10}, s.Execs()[0].Signals)
}

// TestBackgroundWorkEnds with the server, and after that nothing begins.
func TestBackgroundWorkEnds(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewUnstartedServer()
	begun, ended := make(chan struct{}), make(chan struct{})
	w := started(t, s, func(p *lxdtest.Process) int {
		p.Go(func(ctx context.Context) { close(begun); <-ctx.Done(); close(ended) })
		return 0
	})
	w.exec(ws(`["x"]`)).all()
	<-begun
	s.Close()
	<-ended
	require.PanicsWithValue(t, "lxdtest: AddInstance: the server has been closed", func() { s.AddInstance(lxdtest.Instance{Name: "c2"}) })
	other := lxdtest.NewUnstartedServer()
	other.Close()
	require.Panics(t, other.Start)
	other.Close()
}

// TestPartOfAnUpload: what came before the cut is there, and no more.
func TestPartOfAnUpload(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewUnstartedServer()
	started(t, s, nil)
	s.Inject(lxdtest.Fault{Route: lxdtest.RouteFiles, Method: "POST", Moment: lxdtest.OnReceive, Bytes: 3, Do: lxdtest.Drop})
	req, err := s.Client().Post(s.URL+"/1.0/instances/c1/files?path=/tmp/f", "application/octet-stream", strings.NewReader("content"))
	if err == nil {
		req.Body.Close()
	}
	require.Equal(t, 1, s.Struck())
	until(t, func() bool { b, _ := s.ReadFile("c1", "/tmp/f"); return string(b) == "con" })
}
