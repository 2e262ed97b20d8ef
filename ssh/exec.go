package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/lxdtransport/transport"
)

const (
	// defaultWaitDelay is what a WaitDelay of 0 means.
	defaultWaitDelay = 5 * time.Second

	// killGrace is how long after KILL the host has to end the command and to say so.
	killGrace = 2 * time.Second

	// writeGrace is how long, after the streams were cut, a Write of the caller's may go on.
	writeGrace = time.Second

	// signalTime bounds Process.Signal.
	signalTime = 10 * time.Second

	// confirmTime is how long the host has to confirm the end of a command whose ctx has ended.
	confirmTime = 2 * time.Second
)

// Exec runs a command and waits for it. See [transport.Transport].
func (t *Transport) Exec(ctx context.Context, cmd transport.Command) error {
	e, err := t.start(ctx, cmd)
	if err == nil {
		err = e.run()
	}
	return goOn(err)
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
	return goOn(p.err)
}

func (p *process) Signal(sig transport.Signal) error {
	// Not in the command's ctx, which ends with the command, while kill may still have to say that it was it.
	ctx, cancel := context.WithTimeoutCause(context.Background(), signalTime, fmt.Errorf("no answer within %v", signalTime))
	defer cancel()
	if err := p.e.signal(ctx, sig); err != nil {
		return fmt.Errorf("ssh: signal to a command: %w", err)
	}
	return nil
}

func (p *process) Resize(size transport.TerminalSize) error {
	e := p.e
	if e.cmd.TTY == nil {
		return errors.New("ssh: resize of a command: it has no terminal (Command.TTY)")
	}
	if e.over() {
		return fmt.Errorf("ssh: resize of a command: %w", os.ErrProcessDone)
	}
	_, err := within(e.ctx, func() (bool, error) {
		return e.s.SendRequest("window-change", false, windowSize(size))
	}, nil)
	if err != nil && e.over() {
		err = os.ErrProcessDone
	}
	if err != nil {
		return fmt.Errorf("ssh: resize of a command: %w", err)
	}
	return nil
}

// execution is a command that is running.
type execution struct {
	t        *Transport
	cmd      transport.Command
	internal bool            // one of our own, which is not cleaned up after
	ctx      context.Context // ends with the caller's, with Close, and with an error of the caller's reader or writers
	cancel   context.CancelCauseFunc
	end      func() // gives back what start took

	s       *session
	mark    string
	report  *report // the wrapper's
	in      *input
	outputs []*output
	stderr  *edges // what ExitError.Stderr will have, or nil

	// Used by run alone.
	interrupted, killed bool
	swept               string // what was done about what the command has left behind
	sealed              bool   // the host was there after the end of all streams

	mu      sync.Mutex // guards copyErr
	copyErr error      // the first error of the caller's reader and writers
}

// start starts the command and the goroutines of its streams.
func (t *Transport) start(ctx context.Context, cmd transport.Command) (*execution, error) {
	if err := cmd.Validate(); err != nil {
		return nil, notStarted(err)
	}
	ctx, end, err := t.begin(ctx)
	if err != nil {
		return nil, notStarted(err)
	}
	if t.execs != nil {
		select {
		case t.execs <- struct{}{}:
		case <-ctx.Done():
			end()
			return nil, notStarted(context.Cause(ctx))
		}
		begun := end
		end = func() {
			<-t.execs
			begun()
		}
	}
	return t.launch(ctx, cmd, end, false)
}

// launch is start, and for commands of our own.
func (t *Transport) launch(ctx context.Context, cmd transport.Command, end func(), internal bool) (_ *execution, err error) {
	e := &execution{t: t, cmd: cmd, internal: internal, end: end, mark: newMark()}
	e.ctx, e.cancel = context.WithCancelCause(ctx)
	defer func() {
		if err != nil {
			e.cancel(nil)
			e.end()
		}
	}()
	if e.ctx.Err() != nil {
		return nil, notStarted(context.Cause(e.ctx))
	}
	head, err := header(cmd, e.mark)
	if err != nil {
		return nil, notStarted(err)
	}
	if e.s, err = t.session(e.ctx, internal); err != nil {
		return nil, notStarted(err)
	}
	if err := e.ask(); err != nil {
		e.s.end()
		return nil, notStarted(err)
	}
	e.streams()
	for _, o := range e.outputs {
		go o.run() // waited for by finish, unless the host does not end it
	}
	sent, err := within(e.ctx, func() (int, error) { return io.WriteString(e.s, head) }, nil)
	if err != nil && e.ctx.Err() == nil && sent < len(head) {
		// It cannot have run: its last line is missing.
		lost := e.s.conn.link.lost()
		e.abandon()
		return nil, notStarted(fmt.Errorf("the connection was lost: %w", lost))
	}
	empty := cmd.Stdin == nil && cmd.TTY == nil && err == nil
	if empty {
		go e.in.run() // ends the input; waited for by finish
	}
	if why := e.begun(); why != nil {
		e.abandon()
		return nil, notStarted(why)
	}
	switch {
	case empty:
	case e.ctx.Err() != nil:
		close(e.in.ended)
	default: // not before: a command that has not started has read nothing
		if cmd.Stdin != nil {
			e.in.src = newSource(cmd.Stdin)
		}
		go e.in.run() // waited for by finish
	}
	return e, nil
}

// ask requests everything that a command needs of the host.
func (e *execution) ask() error {
	if tty := e.cmd.TTY; tty != nil {
		size := tty.Size
		if size == (transport.TerminalSize{}) {
			size = transport.TerminalSize{Cols: 80, Rows: 25}
		}
		term := tty.Term
		if term == "" {
			term = "xterm"
		}
		err := e.s.request(e.ctx, "pty-req", struct {
			Term                      string
			Cols, Rows, Width, Height uint32
			Modes                     string
		}{term, uint32(size.Cols), uint32(size.Rows), 0, 0, "\x00"})
		if err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
	}
	return e.s.request(e.ctx, "exec", struct{ Command string }{loader})
}

func windowSize(size transport.TerminalSize) []byte {
	b := make([]byte, 16) // and no size in pixels
	b[2], b[3] = byte(size.Cols>>8), byte(size.Cols)
	b[6], b[7] = byte(size.Rows>>8), byte(size.Rows)
	return b
}

// begun waits until the wrapper has reported or ctx has ended. It returns why the command has certainly not started, or nil.
func (e *execution) begun() error {
	out := e.outputs[0]
	select {
	case <-e.report.found:
	case <-out.ended:
		select {
		case <-e.report.found:
		default:
			return e.unreported()
		}
	case <-e.ctx.Done():
		return nil // run finds out
	}
	switch e.report.word {
	case noDir:
		return fmt.Errorf("chdir %s: the directory does not exist: %w", e.cmd.Dir, os.ErrNotExist)
	case notADir:
		return fmt.Errorf("chdir %s: it is not a directory: %w", e.cmd.Dir, syscall.ENOTDIR)
	case noEntry:
		return fmt.Errorf("chdir %s: %w", e.cmd.Dir, os.ErrPermission)
	case noUser:
		u := e.cmd.User
		return also(fmt.Errorf("Command.User %d:%d: %s cannot become it on the host; that needs root, and setpriv (util-linux)",
			u.UID, u.GID, e.t.target.user), transport.ErrUnauthorized)
	}
	return nil
}

// unreported says why the command has not started if its output has ended before the wrapper's report. nil: it may have.
func (e *execution) unreported() error {
	select {
	case <-e.s.known:
	case <-e.s.closed:
	case <-e.ctx.Done():
		return nil
	}
	select {
	case <-e.s.known:
	default:
		return nil
	}
	if !e.s.conn.answers(e.ctx) {
		return nil
	}
	// What it has printed is not told: a host that echoes has the command's secrets in it.
	return fmt.Errorf("the login shell of %s ended with status %d before it came to the command: is it a shell, may it run commands, and is there a /bin/sh?",
		e.t.target.user, e.s.status.Code)
}

// abandon gives a command up that has not started.
func (e *execution) abandon() {
	for _, o := range e.outputs {
		o.detach()
	}
	e.s.end()
}

// streams makes the command's streams.
func (e *execution) streams() {
	cmd := e.cmd
	e.in = &input{ch: e.s, tty: cmd.TTY != nil, done: make(chan struct{}), ended: make(chan struct{}), fail: e.fail}
	turn := new(sync.Mutex)
	if cmd.TTY != nil {
		e.output("terminal", e.s, cmd.Stdout, turn)
		e.report = e.outputs[0].report
		return
	}
	e.output("stdout", e.s, cmd.Stdout, turn)
	e.report = e.outputs[0].report
	if !same(cmd.Stdout, cmd.Stderr) {
		turn = new(sync.Mutex)
	}
	w := cmd.Stderr
	if w == nil {
		e.stderr = new(edges)
		w = e.stderr
	}
	e.output("stderr", e.s.Stderr(), w, turn)
}

func (e *execution) output(name string, r io.Reader, w io.Writer, turn *sync.Mutex) {
	e.outputs = append(e.outputs, &output{
		name: name, r: r, w: w, turn: turn, fail: e.fail, ended: make(chan struct{}),
		report: &report{mark: e.mark, found: make(chan struct{})},
	})
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

// over reports whether the command has ended, or nothing more will be heard of it.
func (e *execution) over() bool {
	select {
	case <-e.s.known:
		return true
	case <-e.s.closed:
		return true
	default:
		return false
	}
}

// run waits for the command and returns the verdict.
func (e *execution) run() error {
	defer e.end()
	var since time.Time // of the end of ctx
	select {
	case <-e.s.known:
	case <-e.s.closed:
	case <-e.ctx.Done():
		since = time.Now()
		e.interrupt()
	}
	for _, o := range e.outputs {
		o.exited()
	}
	if !e.drained() && e.ctx.Err() != nil {
		if !e.interrupted {
			since = time.Now()
			e.interrupted = true
			e.sweep()
		}
		e.hurry(time.Until(since.Add(e.waitDelay())))
	}
	e.confirm()
	e.finish()
	return e.verdict()
}

// interrupt ends the command because ctx has ended, and all that it started.
func (e *execution) interrupt() {
	e.interrupted = true
	if e.internal {
		return
	}
	sig := e.cmd.CancelSignal
	if sig == "" {
		sig = transport.SIGTERM
	}
	ctx, cancel := context.WithTimeout(context.Background(), e.waitDelay())
	defer cancel()
	select { // it may be about to start
	case <-e.report.found:
	case <-e.s.closed:
	case <-ctx.Done():
	}
	if sig == transport.SIGKILL || e.signal(ctx, sig) != nil || !e.exits(ctx) {
		e.killed = !e.over()
	}
	if heard := e.sweep(); heard && e.killed {
		ctx, cancel := context.WithTimeout(context.Background(), killGrace)
		defer cancel()
		e.exits(ctx)
	}
}

// exits waits until the command has ended, or ctx.
func (e *execution) exits(ctx context.Context) bool {
	select {
	case <-e.s.known:
	case <-e.s.closed:
	case <-ctx.Done():
		return e.over()
	}
	return true
}

// signal runs kill on the host.
func (e *execution) signal(ctx context.Context, sig transport.Signal) error {
	// A name that is none is wrong at any time.
	if err := (transport.Command{Args: []string{"x"}, CancelSignal: sig}).Validate(); err != nil {
		return err
	}
	if e.over() {
		return os.ErrProcessDone
	}
	pid, ok := e.pid()
	if !ok {
		return errors.New("the host has not told the command's process number")
	}
	_, err := e.t.own(ctx, transport.Command{Args: transport.Shell(`kill -s "$1" "$2"`, string(sig), pid)})
	if err != nil && e.over() {
		return os.ErrProcessDone
	}
	if err != nil {
		return fmt.Errorf("kill -s %s on the host: %w", sig, err)
	}
	return nil
}

// pid is the command's process number.
func (e *execution) pid() (string, bool) {
	select {
	case <-e.report.found:
	default:
		return "", false
	}
	n, err := strconv.Atoi(e.report.word)
	return e.report.word, err == nil && n > 1
}

// drained waits until all outputs have ended. It gives up when ctx ends, or when the command has ended and they have had WaitDelay.
func (e *execution) drained() bool {
	for _, o := range e.outputs {
		for ended := false; !ended; {
			left := o.left(e.waitDelay())
			if left <= 0 {
				select {
				case <-o.ended: // just now
					ended = true
					continue
				default:
					return false
				}
			}
			timer := time.NewTimer(left)
			select {
			case <-o.ended:
				ended = true
			case <-timer.C:
			case <-e.ctx.Done():
				// What has ended has.
				select {
				case <-o.ended:
					ended = true
				default:
					timer.Stop()
					return false
				}
			}
			timer.Stop()
		}
	}
	return true
}

// hurry waits for the outputs for d.
func (e *execution) hurry(d time.Duration) {
	timer := time.NewTimer(max(d, writeGrace))
	defer timer.Stop()
	for _, o := range e.outputs {
		select {
		case <-o.ended:
		case <-timer.C:
			return
		}
	}
}

// confirm asks the host whether it is still there, after the end of the streams: a connection that breaks off ends them, too.
func (e *execution) confirm() {
	for _, o := range e.outputs {
		select {
		case <-o.ended:
		default:
			return
		}
	}
	select {
	case <-e.s.known:
	default:
		return
	}
	// The end of ctx leaves it some time, and the connection's own end all the time it needs.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stop := context.AfterFunc(e.ctx, func() { time.AfterFunc(confirmTime, cancel) })
	defer stop()
	e.sealed = e.s.conn.answers(ctx)
}

// finish stops what is under way. When it returns, no goroutine is left but those in a Read or Write of the caller's that does
// not return, and those that wait for the host's last word about the session; none of them will call the caller's again.
func (e *execution) finish() {
	e.in.stop()
	for _, o := range e.outputs {
		o.detach()
	}
	e.s.end()
	e.cancel(nil)
}
