package transport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

// workload is what is done while something happens.
type workload struct {
	name   string
	kind   workKind
	upload bool // of a file or tree
	code   int  // the command's status
	stdin  []byte
	stdout []byte // what it writes when nothing happens
	stderr []byte
	tty    bool
	cancel bool // ctx ends when the first output arrives

	packets int // of SFTP that a file takes, each way
}

type workKind int

const (
	aCommand workKind = iota
	aFile
	aTree
)

// letters are n bytes of which every part is different.
func letters(n int) []byte {
	b := make([]byte, 0, n+8)
	for i := 0; len(b) < n; i++ {
		b = fmt.Appendf(b, "%07x.", i)
	}
	return b[:n]
}

var (
	matrixFlood = letters(200 << 10)
	matrixFile  = letters(300 << 10)
	matrixTree  = fstest.MapFS{
		"a":      {Data: letters(5000), Mode: 0o644},
		"d/b":    {Data: letters(100), Mode: 0o755},
		"d/e/c":  {Data: nil, Mode: 0o600},
		"d/last": {Data: letters(70000), Mode: 0o644},
	}
)

func workloads() []*workload {
	return []*workload{
		{name: "small", stdout: []byte("hi"), stderr: []byte("error")},
		{name: "status", code: 127, stdout: []byte("hi"), stderr: []byte("error")},
		{name: "flood", stdout: matrixFlood, stderr: matrixFlood},
		{name: "stdin flood", stdin: matrixFlood, stdout: matrixFlood},
		{name: "tty", tty: true, code: 3, stdout: letters(3000)},
		{name: "cancel", cancel: true, code: 143, stdout: []byte("up")},
		{name: "upload", kind: aFile, upload: true, packets: 10},
		{name: "download", kind: aFile, packets: 8},
		{name: "upload tree", kind: aTree, upload: true, stdout: []byte("gnu\n")},
		{name: "download tree", kind: aTree, stdout: letters(80 << 10)},
	}
}

// matrixCommands are the commands of the workloads, and the one that kills what a cancelled one has left behind.
func matrixCommands(p *lxdtest.Process) int {
	for _, w := range workloads() {
		if w.name != p.Args[0] {
			continue
		}
		switch {
		case w.cancel:
			p.Stdout.Write(w.stdout)
			<-p.Context().Done()
		case w.stdin != nil:
			io.Copy(p.Stdout, p.Stdin)
		default:
			var both sync.WaitGroup
			both.Go(func() { p.Stderr.Write(w.stderr) })
			p.Stdout.Write(w.stdout)
			both.Wait()
		}
		return w.code
	}
	io.Copy(io.Discard, p.Stdin)
	io.WriteString(p.Stdout, "done\n")
	return 0
}

// flavour is a version and a way to it.
type flavour struct {
	name    string
	version lxdtest.Version
	unix    bool
}

func flavours() []*flavour {
	return []*flavour{
		{"5.0.2 unix", lxdtest.LXD50, true},
		{"6.9 TLS", lxdtest.LXD6, false},
	}
}

// TestFaultMatrix is not run beside others: it alone keeps all cores busy, and servers have windows of seconds.
func TestFaultMatrix(t *testing.T) {
	start := time.Now()
	all, left := cells(os.Getenv("MATRIX") == "full")
	seen := map[string]bool{}
	for _, c := range all {
		require.False(t, seen[c.String()], "twice: %v", c)
		seen[c.String()] = true
	}
	t.Logf("%d cells", len(all))
	if part, err := strconv.ParseFloat(os.Getenv("MATRIX_PART"), 64); err == nil {
		all = slices.DeleteFunc(all, func(cell) bool { return rand.Float64() >= part })
		t.Logf("%d of them at random", len(all))
	}
	// Most of those that stall do nothing but wait: all of them together need no more time than one.
	slow := slices.DeleteFunc(slices.Clone(all), func(c cell) bool { return !c.waits() })
	quick := slices.DeleteFunc(slices.Clone(all), cell.waits)
	t.Run("cells", func(t *testing.T) {
		var wg sync.WaitGroup
		run := func(cells []cell, workers int) {
			next := make(chan cell)
			for range workers {
				wg.Go(func() {
					for c := range next {
						// Labels are passed on to all goroutines that the transport starts.
						pprof.Do(t.Context(), pprof.Labels("cell", c.String()), func(context.Context) { c.run(t) })
					}
				})
			}
			wg.Go(func() {
				defer close(next)
				for _, c := range cells {
					next <- c
				}
			})
		}
		run(slow, 64)
		run(quick, 8)
		wg.Wait()
	})
	assert.Eventually(t, func() bool { return len(leftGoroutines()) == 0 }, patience, 50*time.Millisecond, "goroutines are left of: %v", leftGoroutines())
	t.Logf("%d cells in %v, %d of them wait for something that never comes", len(all), time.Since(start).Round(time.Second/10), len(slow))
	for why, n := range left {
		t.Logf("%5d left out: %s", n, why)
	}
}

// leftGoroutines names the cells of which goroutines are left.
func leftGoroutines() (cells []string) {
	var out bytes.Buffer
	pprof.Lookup("goroutine").WriteTo(&out, 1)
	for _, m := range labelled.FindAllStringSubmatch(out.String(), -1) {
		cells = append(cells, m[1])
	}
	return cells
}

var labelled = regexp.MustCompile(`# labels: \{"cell":"([^"]*)"`)

// waits reports whether a cell lasts long without doing anything.
func (c cell) waits() bool {
	return c.harm.class == "stalled" || c.harm.class == "died" || c.spot.route == both || c.spot.route == lxdtest.RouteOperation ||
		(c.spot.socket != "" && (c.spot.name == "asked" || c.spot.name == "acted"))
}

// outcome is what came of a cell.
type outcome struct {
	err            error
	stdout, stderr []byte
	took           time.Duration
	ctxErr         error
}

// lockedBuffer is written by a transport that may have been left alone.
type lockedBuffer struct {
	mu      sync.Mutex
	b       []byte
	onWrite func()
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b = append(b.b, p...)
	if b.onWrite != nil {
		b.onWrite()
	}
	return len(p), nil
}

func (b *lockedBuffer) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.b)
}

// bound is the longest that any cell may take: Liveness, WaitDelay and all graces that follow each other, and a busy machine.
const bound = 40 * time.Second

func (c cell) server() *lxdtest.Server {
	s := lxdtest.NewUnstartedServer()
	s.Version = c.on.version
	s.Version.StartDelay, s.Version.OperationLifetime = 2*time.Millisecond, patience
	if s.Version.ChildGrace > 0 {
		// Nothing is left behind here, and a busy machine may take a second between a write and the read of it.
		s.Version.ChildGrace = patience
	}
	if c.spot.socket != "" && (c.spot.name == "asked" || c.spot.name == "acted") && c.harm.class != "delayed" {
		s.Version.ConnectWindow = 1500 * time.Millisecond // nothing comes in time in these
	} else {
		s.Version.ConnectWindow = patience
	}
	s.Handler = matrixCommands
	if c.work.kind != aCommand {
		s.Handler = lxdtest.LocalCommands("")
	}
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	if c.on.unix {
		s.Start()
	} else {
		s.StartTLS()
	}
	return s
}

// faults are the cell's.
func (c cell) faults() []lxdtest.Fault {
	p := c.spot
	f := lxdtest.Fault{Route: p.route, Socket: p.socket, Moment: p.moment, Do: c.harm.do, Nth: p.nth}
	if p.once || p.socket != "" || p.route == lxdtest.RouteSFTP && p.nth == 0 {
		f.Nth = 1
	}
	if p.name == "middle" {
		f.Nth, f.Bytes = 0, 20
		if n := int64(len(c.sent())); n > 0 {
			f.Bytes = max(n/2, 1)
		}
		if p.once {
			f.Nth = 1
		}
	}
	if p.name == "receive" && p.socket == "0" {
		f.Nth, f.Bytes = 0, max(int64(len(c.work.stdin))/2, 1024)
	}
	switch p.route {
	case both:
		f.Route = lxdtest.RouteWait
		g := f
		g.Route = lxdtest.RouteOperation
		return []lxdtest.Fault{f, g}
	case lxdtest.RouteOperation:
		// Only a failure is told in an error's body.
		return []lxdtest.Fault{f}
	case explaining:
		refused := lxdtest.Fault{Route: lxdtest.RouteExec, Do: lxdtest.Refuse(500, "no")}
		if c.work.kind == aFile {
			refused.Route = lxdtest.RouteSFTP
		}
		f.Route, f.Method = lxdtest.RouteInstances, "GET"
		return []lxdtest.Fault{refused, f}
	}
	return []lxdtest.Fault{f}
}

func (c cell) run(t *testing.T) {
	var s *lxdtest.Server
	pprof.Do(context.Background(), pprof.Labels(), func(context.Context) {
		pprof.SetGoroutineLabels(context.Background()) // the server's goroutines are not the transport's
		s = c.server()
	})
	defer s.Close()
	bad := func(format string, args ...any) {
		t.Helper()
		t.Errorf("%v: %s", c, fmt.Sprintf(format, args...))
		if os.Getenv("MATRIX_LOG") != "" {
			fmt.Fprintf(os.Stderr, "BAD %v: %s\n", c, fmt.Sprintf(format, args...))
		}
	}
	host, err := transport.NewLXD(connect(t, s), "c1", &transport.LXDOptions{Liveness: c.liveness()})
	if err != nil {
		bad("%v", err)
		return
	}
	var struck atomic.Int64
	for _, f := range c.faults() {
		do := f.Do
		f.Do = func(p *lxdtest.Point) lxdtest.Verdict { struck.Add(1); return do(p) }
		s.Inject(f)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	if c.needsContext() {
		defer time.AfterFunc(2*time.Second, func() { cancel(errEnough) }).Stop()
	}
	var o outcome
	began := time.Now()
	switch c.work.kind {
	case aCommand:
		o = c.exec(ctx, cancel, host)
	case aFile:
		o = c.file(ctx, s, host, bad)
	case aTree:
		o = c.tree(ctx, s, host, bad)
	}
	o.took = time.Since(began)
	o.ctxErr = context.Cause(ctx)
	if o.took > bound {
		bad("it took %v", o.took)
	}
	c.check(s, o, bad)
	s.ClearFaults()
	began = time.Now()
	if err := host.Close(); err != nil || time.Since(began) > bound {
		bad("Close after %v: %v", time.Since(began), err)
	}
	// On a busy machine the time to connect is over before.
	if struck.Load() == 0 && !c.needsContext() && c.spot.name != "asked" && c.spot.name != "acted" {
		bad("nothing has happened")
	}
}

// liveness is short where it is what ends the cell; a busy machine is not to be taken for a dead server in the others.
func (c cell) liveness() time.Duration {
	if c.rule()&unknown != 0 || c.harm.class == "stalled" && (c.rule() == notStarted || c.spot.route == explaining) {
		return 6 * time.Second
	}
	return time.Minute
}

var errEnough = errors.New("enough")

func (c cell) exec(ctx context.Context, cancel context.CancelCauseFunc, host *transport.LXD) outcome {
	var stdout, stderr lockedBuffer
	if c.work.cancel {
		stdout.onWrite = func() { cancel(errEnough) }
	}
	cmd := transport.Command{Args: []string{c.work.name}, Stdout: &stdout, Stderr: &stderr, WaitDelay: 10 * time.Second}
	if c.harm.class == "stalled" && c.rule()&(lost|killed|unknown) != 0 {
		cmd.WaitDelay = time.Second
	}
	if c.work.stdin != nil {
		cmd.Stdin = bytes.NewReader(c.work.stdin)
	}
	if c.work.tty {
		cmd.TTY = &transport.TTY{}
	}
	err := host.Exec(ctx, cmd)
	return outcome{err: err, stdout: stdout.bytes(), stderr: stderr.bytes()}
}

func (c cell) file(ctx context.Context, s *lxdtest.Server, host *transport.LXD, bad func(string, ...any)) outcome {
	old := []byte("old")
	if !c.work.upload {
		old = matrixFile
	}
	if err := s.WriteFile("c1", "/file", old, 0o644); err != nil {
		bad("%v", err)
	}
	if !c.work.upload {
		var out lockedBuffer
		err := host.Download(ctx, "/file", &out, nil)
		if got := out.bytes(); err == nil && !bytes.Equal(got, matrixFile) || !bytes.HasPrefix(matrixFile, got) {
			bad("%d bytes came, %v", len(got), err)
		}
		return outcome{err: err}
	}
	err := host.Upload(ctx, "/file", bytes.NewReader(matrixFile), nil)
	s.ClearFaults()
	now, readErr := s.ReadFile("c1", "/file")
	switch {
	case readErr != nil:
		bad("%v", readErr)
	case bytes.Equal(now, matrixFile):
		if err != nil && !strings.Contains(err.Error(), "rename") && !strings.Contains(err.Error(), "replaced") {
			bad("the file was replaced, and that is not said: %v", err)
		}
	case !bytes.Equal(now, old), err == nil:
		bad("the file has %d bytes, %v", len(now), err)
	}
	for _, f := range s.Files("c1") {
		if strings.Contains(f.Path, ".transport-") && (err == nil || !strings.Contains(err.Error(), f.Path)) {
			bad("%s is left, and that is not said: %v", f.Path, err)
		}
	}
	return outcome{err: err}
}

func (c cell) tree(ctx context.Context, s *lxdtest.Server, host *transport.LXD, bad func(string, ...any)) outcome {
	if c.work.upload {
		_, err := transport.UploadTree(ctx, host, "/tree", matrixTree, nil)
		s.ClearFaults()
		for name, f := range matrixTree {
			got, readErr := s.ReadFile("c1", "/tree/"+name)
			if err == nil && !c.cutsInput() && (readErr != nil || !bytes.Equal(got, f.Data)) {
				bad("%s has %d bytes instead of %d", name, len(got), len(f.Data))
			}
		}
		return outcome{err: err}
	}
	for name, f := range matrixTree {
		if err := s.WriteFile("c1", "/tree/"+name, f.Data, f.Mode); err != nil {
			bad("%v", err)
		}
	}
	dir, err := os.MkdirTemp("", "matrix")
	if err != nil {
		bad("%v", err)
		return outcome{}
	}
	defer os.RemoveAll(dir)
	root, err := os.OpenRoot(dir)
	if err != nil {
		bad("%v", err)
		return outcome{}
	}
	defer root.Close()
	_, err = transport.DownloadTree(ctx, host, "/tree", root, nil)
	if left, _ := os.ReadDir(dir); err != nil && len(left) > 0 {
		bad("%v are left after %v", left, err)
	}
	if err == nil {
		for name, f := range matrixTree {
			if got, readErr := os.ReadFile(filepath.Join(dir, name)); readErr != nil || !bytes.Equal(got, f.Data) {
				bad("%s has %d bytes instead of %d", name, len(got), len(f.Data))
			}
		}
	}
	return outcome{err: err}
}

var (
	aSecret   = regexp.MustCompile(`[0-9a-f]{64}`)
	saysNot   = regexp.MustCompile(`status is not known|not known whether|tells? (no|its) status|not confirmed the end|does not tell`)
	isReaping = func(e lxdtest.Exec) bool {
		for name := range e.Env {
			if strings.HasPrefix(name, "TRANSPORT_COMMAND_") {
				return false
			}
		}
		return true
	}
)

// check holds the outcome against the rule and against what holds everywhere.
func (c cell) check(s *lxdtest.Server, o outcome, bad func(string, ...any)) {
	w := c.work
	if o.err != nil && aSecret.MatchString(o.err.Error()) {
		bad("a secret in %q", o.err)
	}
	code, exited := transport.ExitCode(o.err)
	_, bare := o.err.(*transport.ExitError)
	isNotStarted, isLost := errors.Is(o.err, transport.ErrNotStarted), errors.Is(o.err, transport.ErrOutputLost)
	started := 0
	ran := map[string]bool{}
	for _, e := range s.Execs() {
		if isReaping(e) {
			continue
		}
		if e.Started {
			started++
			if args := fmt.Sprintf("%q", e.Args); ran[args] {
				bad("it was started again: %s", args)
			} else {
				ran[args] = true
			}
		}
		for socket, n := range e.Dials {
			if n > 1 {
				bad("socket %s was dialled %d times", socket, n)
			}
		}
	}
	want := c.rule()
	if c.needsContext() && started == 0 {
		want |= notStarted | unknown // on a busy machine ctx ends before
	}
	if c.needsContext() {
		want |= killed // it may also end before the fault
	}
	if c.harm.class == "died" && started == 0 {
		want |= notStarted // it dies while the sockets are being connected
	}
	if w.kind == aFile || w.kind == aTree {
		pathErr := errors.As(o.err, new(*fs.PathError))
		switch {
		case o.err != nil && !pathErr:
			bad("it is no PathError: %v", o.err)
		case o.err == nil && want&undisturbed == 0 && !(w.upload && c.cutsInput()):
			bad("it succeeded")
		case o.err != nil && want == undisturbed && !c.cutsInput():
			bad("%v", o.err)
		case o.ctxErr != nil && !errors.Is(o.err, o.ctxErr):
			bad("ctx has ended: %v", o.err)
		case w.kind == aTree && want == notStarted && !isNotStarted:
			bad("it is not said that nothing was started: %v", o.err)
		case w.kind == aTree && isNotStarted && started > 0:
			bad("it was started %d times: %v", started, o.err)
		}
		return
	}
	if started > 1 {
		bad("it was started %d times", started)
	}
	if !bytes.HasPrefix(w.stdout, o.stdout) || !bytes.HasPrefix(w.stderr, o.stderr) {
		bad("output that the command has not written: %d and %d bytes", len(o.stdout), len(o.stderr))
	}
	whole := len(o.stdout) == len(w.stdout) && len(o.stderr) == len(w.stderr) || c.cutsInput() && w.stdin != nil
	isUnknown := false
	if o.err != nil {
		own, _, _ := strings.Cut(o.err.Error(), "; whether it has left processes") // what follows is about another command
		isUnknown = saysNot.MatchString(own)
	}
	var got verdicts
	switch {
	case isNotStarted:
		got = notStarted
	case isUnknown:
		got = unknown
	case isLost:
		got = lost
	case o.err == nil && w.code == 0, bare && code == w.code, w.cancel && exited && code == w.code && errors.Is(o.err, errEnough):
		got = undisturbed
	case exited && o.err != nil:
		got = killed
	}
	switch {
	case got&want == 0:
		bad("%v is wanted, it is %v: %v", want, got, o.err)
	case o.err == nil && (w.code != 0 || !whole), bare && !whole && code == w.code:
		bad("a false success: %d and %d bytes, %v", len(o.stdout), len(o.stderr), o.err)
	case isNotStarted && started > 0:
		bad("it was started: %v", o.err)
	case isNotStarted && isLost, isNotStarted && exited:
		bad("contradictory: %v", o.err)
	case !isNotStarted && started == 0 && c.harm.class != "died" && !c.needsContext():
		bad("it was not started, which is not said: %v", o.err)
	case (isUnknown || isNotStarted) && exited:
		bad("a status that is not known: %v", o.err)
	case o.ctxErr != nil && !errors.Is(o.err, o.ctxErr) && !(c.needsContext() && got == undisturbed) && !(w.cancel && c.spot.socket == "control") && !(got == notStarted && (!c.waits() || c.harm.class == "refused" || c.harm.class == "page")): // what is refused at once is so before and after the end of ctx
		bad("ctx has ended: %v", o.err)
	}
}
