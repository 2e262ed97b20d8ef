package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"sync"
	"time"

	"github.com/lxdtransport/transport"
)

const (
	// defaultWaitDelay is what a WaitDelay of 0 means.
	defaultWaitDelay = 5 * time.Second

	// killGrace is how long after KILL the kernel has to end the command: one that waits for a dead disk
	// does not.
	killGrace = 3 * time.Second

	// writeGrace is how long, after the streams were cut, a Write of the caller's may go on.
	writeGrace = time.Second
)

// Exec runs a command and waits for it. See [transport.Transport].
func (t *Transport) Exec(ctx context.Context, cmd transport.Command) error {
	e, err := t.start(ctx, cmd)
	if err != nil {
		return err
	}
	return e.run()
}

// Start runs a command in the background. See [transport.Starter].
func (t *Transport) Start(ctx context.Context, cmd transport.Command) (transport.Process, error) {
	e, err := t.start(ctx, cmd)
	if err != nil {
		return nil, err
	}
	p := &process{e: e, done: make(chan struct{})}
	go func() { // ends with the command
		defer close(p.done)
		p.err = e.run()
	}()
	return p, nil
}

// process is a [transport.Process].
type process struct {
	e    *execution
	done chan struct{} // closed when err is set
	err  error
}

func (p *process) Wait() error {
	<-p.done
	return p.err
}

func (p *process) Signal(sig transport.Signal) error {
	if err := p.e.signal(sig); err != nil {
		return fmt.Errorf("local: signal to a command: %w", err)
	}
	return nil
}

func (p *process) Resize(size transport.TerminalSize) error {
	e := p.e
	if e.cmd.TTY == nil {
		return errors.New("local: resize of a command: it has no terminal (Command.TTY)")
	}
	select {
	case <-e.exited:
		return fmt.Errorf("local: resize of a command: %w", os.ErrProcessDone)
	default:
	}
	if err := resizeTerminal(e.terminal, size); err != nil {
		return fmt.Errorf("local: resize of a command: %w", err)
	}
	return nil
}

// execution is a command that is running.
type execution struct {
	t      *Transport
	cmd    transport.Command
	ctx    context.Context // ends with the caller's, with Close, and with an error of the caller's reader or writers
	cancel context.CancelCauseFunc
	end    func() // gives back what start took

	status   *transport.ExitError // of a command that cannot be run, else nil; then nothing else is set
	proc     *os.Process
	mark     string   // by which its descendants are found
	terminal *os.File // our end, or nil
	in       *input   // nil: empty
	outputs  []*output
	stderr   *edges // what ExitError.Stderr will have, or nil

	exited  chan struct{} // closed when the next two are set
	state   *os.ProcessState
	waitErr error

	interrupted, killed bool // ctx has ended, and done that; used by run alone

	mu      sync.Mutex // guards copyErr
	copyErr error      // the first error of the caller's reader and writers
}

// start starts the command and the goroutines of its streams.
func (t *Transport) start(caller context.Context, cmd transport.Command) (_ *execution, err error) {
	if err := cmd.Validate(); err != nil {
		return nil, notStarted(err)
	}
	ctx, end, err := t.begin(caller)
	if err != nil {
		return nil, notStarted(err)
	}
	defer func() {
		if err != nil {
			end()
		}
	}()
	e := &execution{t: t, cmd: cmd, end: end, exited: make(chan struct{})}
	e.ctx, e.cancel = context.WithCancelCause(ctx)
	if e.ctx.Err() != nil {
		return nil, notStarted(context.Cause(e.ctx))
	}
	if err := e.spawn(); err != nil {
		if exit, ok := errors.AsType[*transport.ExitError](err); ok {
			e.status = exit
			close(e.exited)
			return e, nil
		}
		return nil, notStarted(err)
	}
	go func() { // ends with the process
		e.state, e.waitErr = e.proc.Wait()
		close(e.exited)
	}()
	for _, o := range e.outputs {
		go o.run() // waited for by finish
	}
	if e.in != nil {
		go e.in.run() // waited for by finish
	}
	return e, nil
}

// streams makes the command's files, and ours.
func (e *execution) streams() (theirs []*os.File, err error) {
	cmd := e.cmd
	var ours []*os.File
	defer func() {
		if err != nil {
			closeAll(theirs)
			closeAll(ours)
		}
	}()
	pipe := func() (r, w *os.File) {
		if err == nil {
			r, w, err = os.Pipe()
		}
		return r, w
	}
	if cmd.TTY != nil {
		master, slave, err := openTerminal(cmd.TTY.Size)
		if err != nil {
			return nil, fmt.Errorf("terminal: %w", err)
		}
		e.terminal = master
		e.output("terminal", master, cmd.Stdout, new(sync.Mutex))
		e.input(master)
		return []*os.File{slave, slave, slave}, nil
	}
	var stdin, feed *os.File
	if cmd.Stdin == nil {
		stdin, err = os.Open(os.DevNull)
	} else {
		stdin, feed = pipe()
	}
	stdout, stdoutW := pipe()
	stderr, stderrW := pipe()
	theirs, ours = []*os.File{stdin, stdoutW, stderrW}, []*os.File{feed, stdout, stderr}
	if err != nil {
		return theirs, fmt.Errorf("pipe: %w", err)
	}
	turn := new(sync.Mutex)
	e.output("stdout", stdout, cmd.Stdout, turn)
	if !same(cmd.Stdout, cmd.Stderr) {
		turn = new(sync.Mutex)
	}
	w := cmd.Stderr
	if w == nil {
		e.stderr = new(edges)
		w = e.stderr
	}
	e.output("stderr", stderr, w, turn)
	if feed != nil {
		e.input(feed)
	}
	return theirs, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

func (e *execution) output(name string, f *os.File, w io.Writer, turn *sync.Mutex) {
	o := &output{
		name: name, f: f, w: w, turn: turn, delay: e.waitDelay(), fail: e.fail,
		ended: make(chan struct{}), given: make(chan struct{}),
	}
	if e.cmd.TTY != nil {
		o.terminal = e.exited
	}
	e.outputs = append(e.outputs, o)
}

func (e *execution) input(w *os.File) {
	e.in = &input{w: w, tty: e.cmd.TTY != nil, done: make(chan struct{}), ended: make(chan struct{}), fail: e.fail}
	if e.cmd.Stdin != nil {
		e.in.src = newSource(e.cmd.Stdin)
	}
}

// same reports whether two writers are the same value. Values that cannot be compared are not.
func same(a, b io.Writer) (equal bool) {
	if a == nil || b == nil || !reflect.TypeOf(a).Comparable() {
		return false
	}
	// A comparable struct may hold an interface that holds what cannot be compared.
	defer func() { _ = recover() }()
	return a == b
}

// fail takes the first error of the caller's reader or writers and cancels the command.
func (e *execution) fail(err error) {
	e.mu.Lock()
	if e.copyErr == nil {
		e.copyErr = err
	}
	e.mu.Unlock()
	e.cancel(err)
}

func (e *execution) waitDelay() time.Duration {
	if e.cmd.WaitDelay == 0 {
		return defaultWaitDelay
	}
	return e.cmd.WaitDelay
}

// run waits for the command and returns the verdict.
func (e *execution) run() error {
	defer e.end()
	if e.status != nil {
		return e.status
	}
	var since time.Time // of the end of ctx
	select {
	case <-e.exited:
	case <-e.ctx.Done():
		since = time.Now()
		e.interrupt()
	}
	for _, o := range e.outputs {
		o.exited()
	}
	if !e.drained(e.ctx.Done()) {
		if since.IsZero() {
			since = time.Now()
			e.interrupted = true
			e.sweep()
		}
		e.hurry(time.Until(since.Add(e.waitDelay())))
	}
	e.finish()
	return e.verdict()
}

// interrupt ends the command because ctx has ended, and all that it started.
func (e *execution) interrupt() {
	e.interrupted = true
	sig := e.cmd.CancelSignal
	if sig == "" {
		sig = transport.SIGTERM
	}
	err := e.signal(sig)
	if sig == transport.SIGKILL || err != nil && !errors.Is(err, os.ErrProcessDone) || !e.exits(e.waitDelay()) {
		e.killed = true
		_ = e.proc.Kill()
		killGroup(e.proc)
		e.exits(killGrace)
	}
	e.sweep()
}

// exits waits until the command has exited, but no longer than d.
func (e *execution) exits(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-e.exited:
		return true
	case <-timer.C:
		return false
	}
}

// sweep kills what the command has left behind.
func (e *execution) sweep() {
	killGroup(e.proc)
	killMarked(e.mark)
}

func (e *execution) signal(sig transport.Signal) error {
	select {
	case <-e.exited:
		// A name that is none is wrong at any time.
		if err := (transport.Command{Args: []string{"x"}, CancelSignal: sig}).Validate(); err != nil {
			return err
		}
		return os.ErrProcessDone
	default:
		return signalProcess(e.proc, sig)
	}
}

// drained waits until all outputs have ended, or stop is closed.
func (e *execution) drained(stop <-chan struct{}) bool {
	for _, o := range e.outputs {
		select {
		case <-o.ended:
			continue
		default:
		}
		select {
		case <-o.ended:
		case <-stop:
			return false
		}
	}
	return true
}

// hurry waits for the outputs for d, cuts them, and waits for what is in a Write.
func (e *execution) hurry(d time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), max(d, writeGrace))
	defer cancel()
	if e.drained(ctx.Done()) {
		return
	}
	for _, o := range e.outputs {
		o.cut()
	}
	ctx, cancel = context.WithTimeout(context.Background(), writeGrace)
	defer cancel()
	e.drained(ctx.Done())
}

// finish stops what is under way. When it returns, no goroutine is left but those in a Read or Write of the caller's that does
// not return, and they will call neither again.
func (e *execution) finish() {
	if e.in != nil {
		e.in.stop()
	}
	for _, o := range e.outputs {
		if stuck := o.detach(); !stuck {
			<-o.ended
		}
	}
	e.cancel(nil)
}
