package transport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"reflect"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/canonical/lxd/shared/api"
	"github.com/gorilla/websocket"
)

// One command's life: request, sockets, end, verdict.
//
// The goroutine that runs it waits for the operation; each socket has a goroutine of its own, so that a slow stdout cannot
// hold stderr or the control socket. Nothing waits for a context or a timer: they act by cutting what the goroutines wait for.

const (
	// killGrace is how long after KILL the host has to report the end, before Exec returns without it.
	killGrace = 3 * time.Second

	// statusGrace is how long after the outputs were cut the host has to report the status.
	statusGrace = time.Second

	// fateTime is how long the fate of a command whose sockets could not be connected is asked for: LXD waits for them as long as we do.
	fateTime = connectTimeout + killGrace

	// answerGrace is how long after the end of the command's process, or of the link to it, the request that waits for the operation may go on.
	answerGrace = time.Second

	// dirPatience is how long the sockets wait for the answer whether the working directory exists: LXD waits 5 s for them. dirMost bounds the question.
	dirPatience = 2 * time.Second
	dirMost     = 10 * time.Second

	// writeGrace is how long, after everything was cut, a Write of the caller's may go on.
	writeGrace = time.Second

	// connectPatience is how long sockets take to connect before the operation is watched meanwhile.
	connectPatience = time.Second

	// arrivalGrace is how long, after the end of a command that has run before its sockets were all connected here, their answers may be on
	// their way.
	arrivalGrace = 3 * time.Second

	// childGrace is how long after the command's end its status is waited for at least: LXD since 5.0.3 waits a second for whoever holds the
	// output.
	childGrace = 2500 * time.Millisecond

	// maxTail is the most output that is taken after the command's end once WaitDelay has passed: more than pipes and sockets
	// hold, so that what comes after it is from a process that the command left behind.
	maxTail = 16 << 20

	// maxArgument is the most bytes of one argument or KEY=VALUE that Linux passes on, MAX_ARG_STRLEN without the NUL.
	maxArgument = 128<<10 - 1
)

// Exec runs a command in the instance. See [Transport].
func (t *LXD) Exec(ctx context.Context, cmd Command) error {
	e, err := t.start(ctx, cmd, callersCommand)
	if err != nil {
		return err
	}
	return goOn(e.run())
}

// Start runs a command in the instance, in the background. See [Starter].
func (t *LXD) Start(ctx context.Context, cmd Command) (Process, error) {
	e, err := t.start(ctx, cmd, callersCommand)
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

// process is a [Process].
type process struct {
	e    *execution
	done chan struct{} // closed when err is set
	err  error
}

func (p *process) Wait() error {
	<-p.done
	return goOn(p.err)
}

func (p *process) Signal(sig Signal) error {
	number, err := signalNumber(sig)
	if err != nil {
		return fmt.Errorf("transport: signal to a command on %q: %w", p.e.t.instance, err)
	}
	return p.e.tell("signal to", func(c *control) error { return c.signal(number) })
}

func (p *process) Resize(size TerminalSize) error {
	if p.e.cmd.TTY == nil {
		return fmt.Errorf("transport: resize of a command on %q: it has no terminal (Command.TTY)", p.e.t.instance)
	}
	return p.e.tell("resize of", func(c *control) error { return c.resize(size) })
}

// execution is a command that is running.
type execution struct {
	t      *LXD
	cmd    Command
	caller context.Context // the caller's
	outer  context.Context // ends with it and with Close
	ctx    context.Context // ends with that, and with an error of the caller's reader or writers
	cancel context.CancelCauseFunc
	end    func() // gives back what start took
	mark   string // of its processes; "": none
	id     string // of the operation

	conns   []*websocket.Conn // set before the goroutines start, as are the next three
	control *control
	input   *input
	outputs []*output
	stderr  *edges // what ExitError.Stderr will have, or nil

	asking  context.Context // bounds the wait for the operation
	giveUp  context.CancelFunc
	ended   context.Context // ends answerGrace after the command's process, or the link to it
	hurry   context.CancelFunc
	drained chan struct{}  // closed when all outputs have ended
	cutoff  chan struct{}  // closed when a Write that has not returned is left alone
	readers sync.WaitGroup // the goroutines of outputs and control
	steps   sync.WaitGroup // callbacks that are under way: interrupt, kill, lookAfter, cutOff

	mu          sync.Mutex // guards what follows
	undrained   int
	finished    bool        // callbacks do nothing any more
	exited      time.Time   // when the end of the command's process was seen
	then        []progress  // of the outputs, as of exited
	interrupted bool        // a signal was sent because ctx had ended
	killed      bool        // KILL, too
	cut         bool        // outputs were cut on purpose
	broken      bool        // outputs had ended without their mark before: the link was lost, not only the command
	over        bool        // and the wait for the operation was given up
	late        *time.Timer // ends ended
	settled     bool        // LXD has told the command's end
	next        *time.Timer // the next step after interrupt
	drain       *time.Timer // looks after outputs that do not end
	absence     *time.Timer // looks for the command when all outputs have
	spare       *time.Timer // cuts them after a sweep
	copyErr     error       // the first
	sweep       *sweep      // what the command left behind is being killed, or has been
}

// sweep is the killing of what a command left behind.
type sweep struct {
	done   chan struct{} // closed when result is set
	cancel context.CancelFunc
	alive  bool // the command's own process was to be killed, too; guarded by the execution's mu
	result reaped
}

// purpose says on whose behalf a command runs.
type purpose bool

const (
	callersCommand  purpose = false
	internalCommand purpose = true // one of ours, on behalf of one of the caller's, also after Close has begun
)

// start requests the command and connects its sockets.
func (t *LXD) start(caller context.Context, cmd Command, what purpose) (_ *execution, err error) {
	e := &execution{t: t, cmd: cmd, caller: caller}
	defer func() {
		if err != nil {
			err = e.wrap(err)
			if e.end != nil {
				e.end()
			}
		}
	}()
	outer, end := caller, func() {}
	if what == callersCommand {
		e.mark = newMark()
		if outer, end, err = t.begin(caller); err != nil {
			return nil, notStarted(err)
		}
	}
	e.end, e.outer = end, outer
	if err := cmd.Validate(); err != nil {
		return nil, notStarted(err)
	}
	if err := checkFits(cmd); err != nil {
		return nil, notStarted(err)
	}
	e.ctx, e.cancel = context.WithCancelCause(outer)
	if e.ctx.Err() != nil {
		return nil, notStarted(context.Cause(e.ctx))
	}
	if what == callersCommand {
		if err := acquire(e.ctx, t.execs); err != nil {
			return nil, notStarted(err)
		}
		e.end = func() { release(t.execs); end() }
		if err := acquire(e.ctx, t.starts); err != nil {
			return nil, notStarted(err)
		}
		defer release(t.starts)
	}

	secrets, err := e.requestIn(cmd.Dir)
	if e.ctx.Err() != nil {
		err = context.Cause(e.ctx)
	}
	if err != nil {
		// Whatever became of the request: without its sockets no command is started.
		return nil, notStarted(err)
	}
	if err := e.connect(secrets); err != nil {
		return nil, err
	}
	t.log.Debug("command started", "operation", e.id, "mark", e.mark)
	return e, nil
}

// requestIn requests the command if its directory exists: LXD runs it in "/" otherwise, without a word. The question goes beside the request. When its
// answer comes too late for the sockets, LXD gives that request up, having started nothing, and there is another one.
func (e *execution) requestIn(dir string) (secrets map[string]string, err error) {
	if dir == "" || dir == "/" {
		return e.request()
	}
	ctx, cancel := context.WithCancel(e.ctx)
	defer cancel()
	exists := make(chan error, 1)
	go func() { exists <- e.t.checkDir(ctx, dir) }() // waited for below
	if secrets, err = e.request(); err != nil {
		cancel()
		<-exists
		return nil, err
	}
	late := time.NewTimer(dirPatience)
	defer late.Stop()
	select {
	case err = <-exists:
		return secrets, err
	case <-late.C:
	}
	if err = <-exists; err != nil {
		return nil, err
	}
	return e.request()
}

// checkFits refuses what LXD would not pass on as it is: its JSON carries nothing but UTF-8, and too long an argument fails in the
// server's helper process with a sentence that does not say which one it was.
func checkFits(cmd Command) error {
	for i, a := range cmd.Args {
		if err := fits(a, len(a)); err != nil {
			return fmt.Errorf("Command.Args[%d] %w", i, err)
		}
	}
	for name, value := range cmd.Env {
		if err := fits(name+value, len(name)+len("=")+len(value)); err != nil {
			return fmt.Errorf("Command.Env: %q with its value %w", name, err)
		}
	}
	if err := fits(cmd.Dir, len(cmd.Dir)); err != nil {
		return fmt.Errorf("Command.Dir %w", err)
	}
	return nil
}

func fits(s string, n int) error {
	if n > maxArgument {
		return fmt.Errorf("has %d bytes, Linux passes at most %d on; send it over Stdin or upload it", n, maxArgument)
	}
	if !utf8.ValidString(s) {
		return errors.New("is not valid UTF-8, and LXD passes on nothing else; send it over Stdin or upload it")
	}
	return nil
}

func notStarted(err error) error {
	if errors.Is(err, ErrNotStarted) {
		return err
	}
	return &causes{text: err.Error() + " (the command was not started)", errs: []error{ErrNotStarted, err}}
}

// wrap adds what was being done.
func (e *execution) wrap(err error) error {
	return fmt.Errorf("transport: exec on %q: %w", e.t.instance, err)
}

// request asks for the command and returns the secrets of its sockets.
func (e *execution) request() (map[string]string, error) {
	cmd := e.cmd
	post := api.InstanceExecPost{
		Command:     cmd.Args,
		WaitForWS:   true,
		Interactive: cmd.TTY != nil,
		Environment: maps.Clone(cmd.Env),
		Cwd:         cmd.Dir,
	}
	if post.Environment == nil {
		post.Environment = map[string]string{}
	}
	if cmd.User != nil {
		post.User, post.Group = cmd.User.UID, cmd.User.GID
	}
	if tty := cmd.TTY; tty != nil {
		post.Width, post.Height = int(tty.Size.Cols), int(tty.Size.Rows)
		if _, set := cmd.Env["TERM"]; !set {
			post.Environment["TERM"] = cmp.Or(tty.Term, "xterm")
		}
	}
	if e.mark != "" {
		post.Environment[markPrefix+e.mark] = "1"
	}
	ctx, cancel := within(e.ctx, e.t.liveness)
	defer cancel()
	var op operation
	if err := e.t.rest.call(ctx, http.MethodPost, e.t.path("/exec"), e.t.query(), post, &op); err != nil {
		if e.ctx.Err() != nil {
			return nil, context.Cause(e.ctx)
		}
		if ctx.Err() != nil {
			e.t.rest.stale()
		}
		return nil, e.t.explain(e.ctx, err)
	}
	e.id = op.ID
	secrets := op.Metadata.FDs
	if e.id == "" {
		return nil, errors.New("the server's answer has no operation")
	}
	return secrets, nil
}

// connect connects all sockets at once and starts their goroutines. LXD starts the command when the last socket but control is there.
// Stdin's is asked for when control stands: a command that ended before would leave nobody to be told of, and LXD 5.0 dies of a
// socket that is connected just when an operation ends.
func (e *execution) connect(secrets map[string]string) error {
	ctx, stop := within(e.ctx, min(connectTimeout, e.t.liveness))
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type result struct {
		name string
		conn *websocket.Conn
		err  error
	}
	names := []string{"control", "0", "1", "2"}
	if e.cmd.TTY != nil {
		names = names[:2]
	}
	results := make(chan result, len(names))
	controlled := make(chan struct{})
	for _, name := range names {
		if secrets[name] == "" {
			return notStarted(fmt.Errorf("the server's answer has no secret for socket %q", name))
		}
		go func() { // waited for below
			var hold chan struct{}
			if name == "0" {
				hold = controlled
			}
			conn, err := e.t.rest.dial(ctx, e.id, secrets[name], hold)
			results <- result{name, conn, err}
		}()
	}
	// Where a socket is slow, the operation is watched: when LXD has given up on it, it tells why for 5 s only, and the other sockets
	// are waited for in vain.
	watched := make(chan fate, 1)
	watch := time.AfterFunc(connectPatience, func() {
		f := e.t.waitOperation(ctx, e.id, ctx)
		switch {
		case f.notStarted():
			cancel(errOver)
		case f.err == nil: // it has got them all, and its answers are on their way
			time.AfterFunc(arrivalGrace, func() { cancel(errOver) })
		}
		watched <- f
	})
	conns := make(map[string]*websocket.Conn, len(names))
	var first error
	refused := false
	for range names {
		r := <-results
		if r.err == nil {
			conns[r.name] = r.conn
			e.conns = append(e.conns, r.conn)
			if r.name == "control" {
				close(controlled)
			}
			continue
		}
		if first == nil {
			first = r.err
		}
		if d, ok := errors.AsType[*dialError](r.err); ok && d.refused && r.name != "control" {
			refused = true // without it the command does not start
		}
		cancel(r.err) // the others are of no use any more
	}
	known := fate{err: errors.New("the server was not asked")}
	if !watch.Stop() {
		cancel(nil)
		known = <-watched
	}
	if first != nil {
		e.closeAll()
		return e.notConnected(first, refused, known)
	}
	e.serve(conns)
	return nil
}

// serve starts the goroutines of the sockets.
func (e *execution) serve(conns map[string]*websocket.Conn) {
	e.drained, e.cutoff = make(chan struct{}), make(chan struct{})
	e.asking, e.giveUp = context.WithCancel(context.WithoutCancel(e.caller))
	e.ended, e.hurry = context.WithCancel(context.WithoutCancel(e.caller))
	cmd := e.cmd
	output := func(name, socket string, w io.Writer, turn *sync.Mutex) {
		e.outputs = append(e.outputs, &output{name: name, w: w, turn: turn, conn: conns[socket], fail: e.fail})
	}
	if cmd.TTY != nil {
		output("terminal", "0", cmd.Stdout, new(sync.Mutex))
	} else {
		stdout, stderr := new(sync.Mutex), new(sync.Mutex)
		if same(cmd.Stdout, cmd.Stderr) {
			stderr = stdout
		}
		output("stdout", "1", cmd.Stdout, stdout)
		if cmd.Stderr != nil {
			output("stderr", "2", cmd.Stderr, stderr)
		} else {
			e.stderr = new(edges)
			output("stderr", "2", e.stderr, stderr)
		}
	}
	e.undrained = len(e.outputs)
	for _, o := range e.outputs {
		e.readers.Go(func() {
			o.run()
			if cmd.TTY != nil {
				e.hangUp(o)
			}
			e.mu.Lock()
			defer e.mu.Unlock()
			if e.undrained--; e.undrained == 0 {
				close(e.drained)
				e.watchFor(goneAfter)
			}
		})
	}
	e.control = &control{conn: conns["control"]}
	ping := func() {}
	if cmd.TTY == nil {
		ping = func() { discardPings(conns["0"]) }
	}
	e.readers.Go(func() { e.control.run(ping, e.cutLink, e.t.liveness); e.exit() })
	e.input = &input{r: cmd.Stdin, tty: cmd.TTY != nil, conn: conns["0"], done: make(chan struct{}), fail: e.fail}
	if cmd.Stdin == nil {
		e.input.run()
	} else {
		go e.input.run() // ends with the command, unless Stdin.Read does not return
	}
}

// hangUp tells the end of a terminal. LXD keeps the operation running until we have said that we have seen it: by a close frame, or by
// cutting the connection where input that nobody reads stands in its way.
func (e *execution) hangUp(o *output) {
	if o.conn.WriteControl(websocket.CloseMessage, nil, time.Now().Add(readGrace)) != nil {
		abort(o.conn)
	}
}

// errOver is why sockets are not waited for any more.
var errOver = errors.New("LXD has ended the operation before all were there")

// notConnected makes the error of a command of which not all sockets could be connected, all others being closed. refused says that the
// server has not connected one that the command needs; f, unless it is an error, is what became of it.
func (e *execution) notConnected(first error, refused bool, f fate) error {
	if e.ctx.Err() != nil {
		first = context.Cause(e.ctx)
	}
	if refused {
		err := e.whyRefused(first, f)
		if cause := context.Cause(e.ctx); cause != nil && !errors.Is(err, cause) { // it has ended meanwhile
			err = &causes{text: fmt.Sprintf("%v; %v", cause, err), errs: []error{cause, err}}
		}
		return notStarted(err)
	}
	// All sockets may have been connected as the server sees it. Then the command has run, and was killed when we closed
	// control, but not what it had started. LXD tells, at the latest when it has waited for the sockets in vain. All questions together have
	// a bound: a server may answer one kind of them for ever, and hang at the other.
	inTime, cancel := within(context.WithoutCancel(e.ctx), fateTime+reapTime)
	defer cancel()
	defer context.AfterFunc(e.ctx, func() { time.AfterFunc(statusGrace+reapTime, cancel) })()
	if f.err != nil {
		f = e.fateWithout(inTime)
	}
	var left reaped
	for round := 0; e.mark != "" && !f.notStarted() && round < 3; round++ {
		ctx, cancel := within(inTime, reapTime)
		now := e.t.reaper.reap(ctx, e.mark)
		cancel()
		left = reaped{killed: left.killed + now.killed, left: now.left, err: now.err}
		if f.err == nil || inTime.Err() != nil || now.err != nil && !errors.Is(f.err, errRunning) { // it is known, or nobody answers
			break
		}
		f = e.fateWithout(inTime) // until what held it open had been killed, it may not have ended
	}
	if cause := context.Cause(e.ctx); cause != nil && !errors.Is(first, cause) { // it has ended meanwhile
		first = &causes{text: fmt.Sprintf("%v; %v", cause, first), errs: []error{cause, first}}
	}
	switch {
	case f.notStarted():
		return notStarted(fmt.Errorf("the sockets could not all be connected: %w", first))
	case f.exited && f.code != 0:
		return &causes{errs: []error{&ExitError{Code: f.code}, ErrOutputLost, first},
			text: fmt.Sprintf("the sockets could not all be connected, and yet the command ran, and ended with status %d: %v; %v", f.code, first, left)}
	case f.exited:
		return &causes{errs: []error{ErrOutputLost, first},
			text: fmt.Sprintf("the sockets could not all be connected, and yet the command ran, and ended with status 0, its output is lost: %v; %v", first, left)}
	}
	return fmt.Errorf("the sockets could not all be connected, and it is not known whether the command ran: %w; %v", first, left)
}

// whyRefused explains an answer to the dial of a socket. LXD refuses one of an operation that has ended without a word about why, which it tells
// for a while whoever asks.
func (e *execution) whyRefused(err error, f fate) error {
	if errors.As(err, new(*apiError)) && f.err != nil {
		if op, askErr := e.t.getOperation(e.ctx, operationPath(e.id), nil, forgetAfter); askErr == nil && op.final() {
			f = op.fate()
		}
	}
	err = e.t.explain(e.ctx, err)
	if f.err == nil && f.text != "" {
		err = fmt.Errorf("%w: %s", err, quoted(f.text))
	}
	return err
}

// fateWithout asks for the fate of a command whose sockets are closed.
func (e *execution) fateWithout(ctx context.Context) fate {
	ctx, cancel := within(ctx, fateTime)
	defer cancel()
	defer context.AfterFunc(e.ctx, func() { time.AfterFunc(statusGrace, cancel) })()
	return e.t.waitOperation(ctx, e.id, over)
}

// same reports whether two writers are the same value. Values that cannot be compared are not.
func same(a, b io.Writer) bool {
	return a != nil && b != nil && reflect.TypeOf(a).Comparable() && reflect.TypeOf(b).Comparable() && comparableEqual(a, b)
}

// comparableEqual survives interfaces inside of comparable structs that hold what cannot be compared.
func comparableEqual(a, b any) bool {
	defer func() { _ = recover() }()
	return a == b
}

// run waits for the command and returns the verdict.
func (e *execution) run() error {
	defer e.end()
	stop := context.AfterFunc(e.ctx, e.interrupt)
	f := e.t.waitOperation(e.asking, e.id, e.ended)
	e.mu.Lock()
	e.settled = f.exited
	e.mu.Unlock()
	e.exit()
	select {
	case <-e.drained:
	case <-e.cutoff:
	}
	e.mu.Lock()
	s := e.sweep
	e.mu.Unlock()
	if s != nil {
		select {
		case <-s.done:
		case <-e.cutoff:
		}
	}
	stop()
	e.finish()
	err := e.verdict(f)
	code, _ := ExitCode(err)
	e.t.log.Debug("command ended", "operation", e.id, "status", code, "lost", errors.Is(err, ErrOutputLost), "interrupted", e.interrupted)
	return err
}

// finish stops what is under way. When it returns, no goroutine is left but those in a Read or Write of the caller's that does not
// return, and they will call neither again.
func (e *execution) finish() {
	e.mu.Lock()
	e.finished = true
	for _, t := range []*time.Timer{e.late, e.next, e.drain, e.absence, e.spare} {
		if t != nil {
			t.Stop()
		}
	}
	if e.sweep != nil {
		e.sweep.cancel()
	}
	e.mu.Unlock()
	e.giveUp()
	e.hurry()
	e.closeAll()
	e.steps.Wait()
	e.input.stop()
	writing := false
	for _, o := range e.outputs {
		writing = o.detach() || writing
	}
	if !writing {
		e.readers.Wait()
		return
	}
	// No Write begins any more. One that is under way is as a rule at its end, unless the caller's writer blocks.
	read := make(chan struct{})
	go func() {
		e.readers.Wait()
		close(read)
	}()
	last := time.NewTimer(writeGrace)
	defer last.Stop()
	select {
	case <-read:
	case <-last.C:
	}
}

// step runs f unless the command has finished, for finish to wait for.
func (e *execution) step(f func()) {
	e.mu.Lock()
	if e.finished {
		e.mu.Unlock()
		return
	}
	e.steps.Add(1)
	e.mu.Unlock()
	defer e.steps.Done()
	f()
}

// tell sends something on the control socket for the caller.
func (e *execution) tell(what string, send func(*control) error) error {
	err := os.ErrProcessDone
	e.step(func() {
		e.mu.Lock()
		gone := !e.exited.IsZero()
		e.mu.Unlock()
		if !gone {
			err = send(e.control)
		}
	})
	if err != nil {
		return fmt.Errorf("transport: %s a command on %q: %w", what, e.t.instance, err)
	}
	return nil
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

// exit notes that the command's process has ended, or that the link to it has. What its outputs still hold is waited for, but not
// for ever: something that the command left behind may hold them open.
func (e *execution) exit() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.finished || !e.exited.IsZero() {
		return
	}
	e.exited = time.Now()
	e.late = time.AfterFunc(answerGrace, e.hurry)
	if e.interrupted {
		e.clean(false)
	}
	if e.killed {
		return // it was we who closed the control socket; cutOff comes
	}
	for _, o := range e.outputs {
		e.then = append(e.then, o.progress())
	}
	e.drain = time.AfterFunc(e.waitDelay(), e.lookAfter)
}

// lookAfter cuts the outputs when one of them has waited for messages for WaitDelay since the command's end. Messages that follow each
// other closely take their time from nobody, however slow the link or the caller's writer is: what the command wrote before its
// end has to arrive whole. But more than pipes and sockets can hold is not the command's.
//
// When LXD has told the end, all output is on its way, with its mark, and nothing can be added to it: it may take its time then, as long as
// something moves.
func (e *execution) lookAfter() {
	e.step(func() {
		e.mu.Lock()
		delay, again := e.waitDelay(), time.Duration(0)
		for i, o := range e.outputs {
			now := o.progress()
			if now.ended {
				continue
			}
			waited := min(now.still, time.Since(e.exited))
			if !e.settled {
				waited = max(waited, now.waited-e.then[i].waited)
			}
			if waited >= delay || now.received-e.then[i].received > maxTail {
				s := e.sweep
				e.mu.Unlock()
				e.afterSweep(s, e.cutOutputs)
				return
			}
			again = max(again, delay-waited, 10*time.Millisecond)
		}
		if again > 0 {
			e.drain.Reset(again)
		} else {
			// All output is there, but the operation has not ended.
			e.drain = time.AfterFunc(killGrace, e.cutOff)
		}
		e.mu.Unlock()
	})
}

// afterSweep calls cut, which ends a wait: at once, unless what the command left behind is being killed. That may be what is waited for, and its
// end lets all the rest come, for which there is a moment then. The killing has a bound of its own.
func (e *execution) afterSweep(s *sweep, cut func()) {
	if s == nil {
		cut()
		return
	}
	<-s.done // finish sees to it
	e.mu.Lock()
	defer e.mu.Unlock()
	e.spare = time.AfterFunc(statusGrace, cut)
}

// cutLink ends all connections when they are found to be dead. LXD ends the command when it notices.
func (e *execution) cutLink() { e.step(e.closeAll) }

// cutOutputs ends the wait for the outputs, and soon that for the operation.
func (e *execution) cutOutputs() {
	e.step(func() {
		e.mu.Lock()
		e.noteBroken()
		e.cut = true
		e.drain = time.AfterFunc(max(statusGrace, childGrace-time.Since(e.exited)), e.cutOff)
		e.mu.Unlock()
		e.closeAll()
	})
}

// noteBroken notes whether the link was lost, before the outputs are cut on purpose. mu is held.
func (e *execution) noteBroken() {
	for _, o := range e.outputs {
		if whole, _ := o.result(); !e.cut && !whole && o.progress().ended {
			e.broken = true
		}
	}
}

// interrupt is called when ctx has ended.
func (e *execution) interrupt() {
	if e.mark == "" {
		e.cutOff()
		return
	}
	e.step(func() {
		e.mu.Lock()
		if e.finished {
			e.mu.Unlock()
			return
		}
		if !e.exited.IsZero() {
			s := e.clean(false)
			e.next = time.AfterFunc(e.waitDelay(), func() { e.step(func() { e.afterSweep(s, e.cutOff) }) })
			e.mu.Unlock()
			return
		}
		e.interrupted = true
		e.next = time.AfterFunc(e.waitDelay(), e.kill)
		e.mu.Unlock()

		sig := e.cmd.CancelSignal
		if sig == "" {
			sig = SIGTERM
		}
		number, _ := signalNumber(sig) // Validate has seen it
		if sig == SIGKILL || e.control.signal(number) != nil {
			e.kill()
		}
	})
}

// kill ends the command's process in all ways that there are: with all that descends from it, and then in both ways that LXD knows.
func (e *execution) kill() {
	e.step(func() {
		e.mu.Lock()
		if e.killed || e.finished {
			e.mu.Unlock()
			return
		}
		e.killed = true
		e.next.Stop()
		e.next = time.AfterFunc(reapFirst+killGrace, e.cutOff)
		s := e.clean(e.exited.IsZero())
		e.mu.Unlock()
		first := time.NewTimer(reapFirst)
		defer first.Stop()
		select {
		case <-s.done:
		case <-first.C:
			e.mu.Lock()
			if e.exited.IsZero() {
				s.alive = false // it dies of what follows, and is not among those that the script finds
			}
			e.mu.Unlock()
		case <-e.cutoff:
		}
		e.control.signal(signals[SIGKILL])
		abort(e.control.conn)
	})
}

// clean begins to kill what the command has left behind; alive says that this has to include itself. mu is held.
func (e *execution) clean(alive bool) *sweep {
	before := e.sweep
	ctx, cancel := context.WithCancel(context.WithoutCancel(e.caller))
	s := &sweep{done: make(chan struct{}), cancel: cancel, alive: alive}
	e.sweep = s
	e.steps.Go(func() {
		defer close(s.done)
		if before != nil { // what it has found counts, and may have more to do now
			<-before.done
			before.cancel()
		}
		s.result = e.t.reaper.reap(ctx, e.mark)
		if before == nil {
			return
		}
		if s.result.err != nil && before.result.err == nil {
			s.result = reaped{left: before.result.left}
		}
		s.result.killed += before.result.killed
		e.mu.Lock()
		s.alive = s.alive || before.alive
		e.mu.Unlock()
	})
	return s
}

// cutOff ends the wait for the outputs and for the operation.
func (e *execution) cutOff() {
	e.step(func() {
		e.mu.Lock()
		first := !e.over
		e.noteBroken()
		e.cut, e.over = true, true
		e.mu.Unlock()
		if !first {
			return
		}
		e.closeAll()
		e.giveUp()
		time.AfterFunc(writeGrace, func() { close(e.cutoff) })
	})
}

func (e *execution) closeAll() {
	for _, conn := range e.conns {
		abort(conn)
	}
}
