package lxdtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// execRequest is the body of POST /1.0/instances/NAME/exec.
type execRequest struct {
	Command          []string          `json:"command"`
	WaitForWebsocket bool              `json:"wait-for-websocket"`
	Interactive      bool              `json:"interactive"`
	Environment      map[string]string `json:"environment"`
	Width            int               `json:"width"`
	Height           int               `json:"height"`
	RecordOutput     bool              `json:"record-output"`
	User             uint32            `json:"user"`
	Group            uint32            `json:"group"`
	Cwd              string            `json:"cwd"`
}

// An Exec is what became of one command that a client wanted to run.
type Exec struct {
	ID          string // of the operation
	Instance    string
	Project     string
	Args        []string
	Env         map[string]string // as the client sent it
	Dir         string
	User, Group uint32
	Interactive bool
	Record      bool           // record-output
	Started     bool           // all sockets were there in time
	Exited      bool           // with ExitCode
	ExitCode    int            // -1 if it could not be started
	Signals     []int          // that the process was sent, 9 for a cut control socket among them
	Sizes       []Size         // that the terminal was given
	Stdin       int64          // bytes that were handed to the process
	Dials       map[string]int // connections, by the name of the socket
}

// An execution is a command from the request to the final operation.
type execution struct {
	s        *Server
	op       *operation
	instance *instance
	req      execRequest
	env      map[string]string
	secrets  map[string]string // of the sockets; none without wait-for-websocket

	ready     chan struct{} // the needed sockets are connected
	stall     chan struct{} // one was connected twice, in a release that cannot bear it
	stuck     sync.Once     // closes it
	control   chan struct{} // the control socket is connected
	cancelled chan struct{} // before the start
	gone      chan struct{} // the server is: nobody waits for the end

	mu       sync.Mutex // guards what follows
	sockets  map[string]*socket
	orphans  []*socket // second connections: open, and nobody reads
	dials    map[string]int
	process  *Process
	started  bool
	over     bool
	killed   bool // cancelled in the way of DeleteCancels
	lost     bool // with its virtual machine
	stdin    int64
	exitCode *int
	closers  []io.Closer // the server's ends of the streams
	isGone   bool
}

// postExec starts a command, or prepares its sockets.
func (s *Server) postExec(w http.ResponseWriter, r *http.Request) {
	i, ok := s.instanceOf(w, r)
	if !ok {
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		s.fail(w, 500, err.Error())
		return
	}
	// The type's name is part of the error texts of encoding/json, which clients get to see.
	type InstanceExecPost execRequest
	var post InstanceExecPost
	if err := json.Unmarshal(body, &post); err != nil {
		s.fail(w, 400, strings.ReplaceAll(err.Error(), "lxdtest.", "api."))
		return
	}
	req := execRequest(post)
	switch status := i.currentStatus(); {
	case status == Frozen:
		s.fail(w, 400, "Instance is frozen")
		return
	case status != Running:
		s.fail(w, 400, "Instance is not running")
		return
	case s.Version.StrictRecording && req.RecordOutput && req.WaitForWebsocket:
		s.fail(w, 400, `Cannot use "record-output" in combination with "wait-for-websocket"`)
		return
	case s.Version.StrictRecording && req.RecordOutput && req.Interactive:
		s.fail(w, 400, `Cannot use "interactive" in combination with "record-output"`)
		return
	}
	x := &execution{
		s: s, instance: i, req: req, env: i.environment(req),
		ready: make(chan struct{}), stall: make(chan struct{}), control: make(chan struct{}),
		cancelled: make(chan struct{}), gone: make(chan struct{}),
		sockets: map[string]*socket{}, dials: map[string]int{},
	}
	class := "task"
	var metadata map[string]any
	if req.WaitForWebsocket {
		class = "websocket"
		names := []string{"0", "1", "2", "control"}
		if req.Interactive {
			names = []string{"0", "control"}
		}
		x.secrets = map[string]string{}
		for _, n := range names {
			x.secrets[n] = newSecret()
		}
		metadata = map[string]any{"command": req.Command, "environment": x.env, "fds": x.secrets, "interactive": req.Interactive}
	}
	op := s.newOperation(r, class, executing, i, true, metadata)
	x.op, op.exec = op, x
	op.mayCancel = s.Version.Delete == DeleteKills || s.Version.Delete == DeleteCancels && req.WaitForWebsocket
	s.mu.Lock()
	s.execs = append(s.execs, x)
	s.mu.Unlock()
	state := op.render(false)
	op.born()
	s.spawn("exec "+op.id, x.run)
	s.accept(w, op, state)
}

// Execs returns the commands that clients wanted to run, in the order of their requests.
func (s *Server) Execs() []Exec {
	s.mu.Lock()
	execs := slices.Clone(s.execs)
	s.mu.Unlock()
	list := make([]Exec, len(execs))
	for n, x := range execs {
		list[n] = x.snapshot()
	}
	return list
}

func (x *execution) snapshot() Exec {
	x.mu.Lock()
	defer x.mu.Unlock()
	e := Exec{
		ID: x.op.id, Instance: x.instance.Name, Project: x.instance.Project, Args: slices.Clone(x.req.Command),
		Env: maps.Clone(x.req.Environment), Dir: x.req.Cwd, User: x.req.User, Group: x.req.Group,
		Interactive: x.req.Interactive, Record: x.req.RecordOutput, Started: x.started, Stdin: x.stdin, Dials: maps.Clone(x.dials),
	}
	if x.exitCode != nil {
		e.Exited, e.ExitCode = true, *x.exitCode
	}
	if x.process != nil {
		x.process.mu.Lock()
		e.Signals, e.Sizes = slices.Clone(x.process.signals), slices.Clone(x.process.sizes)
		x.process.mu.Unlock()
	}
	return e
}

// needed are the sockets without which the command does not start.
func (x *execution) needed() []string {
	if x.req.Interactive {
		return []string{"0", "control"}
	}
	return []string{"0", "1", "2"}
}

// announce notes a dial, before the client hears of its success.
func (x *execution) announce(name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.dials[name]++
	if x.dials[name] == 2 && x.s.Version.DuplicateBug && !x.started {
		x.stuck.Do(func() { close(x.stall) })
	}
}

// connect takes in a socket.
func (x *execution) connect(name string, k *socket) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.over || x.isGone {
		k.close()
		return
	}
	if x.sockets[name] != nil {
		x.orphans = append(x.orphans, k)
		return
	}
	x.sockets[name] = k
	if name == "control" {
		close(x.control)
	}
	needed := x.needed()
	missing := func(n string) bool { return x.sockets[n] == nil }
	if slices.Contains(needed, name) && !slices.ContainsFunc(needed, missing) {
		close(x.ready)
	}
}

func (x *execution) socket(name string) *socket {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.sockets[name]
}

// run is the life of the command.
func (x *execution) run() {
	if x.req.WaitForWebsocket && !x.await() {
		return
	}
	// A real server needs this time for a fork. Clients rely on it unknowingly: gorilla's reader gives up
	// when the answer to the first ping meets a socket that is closed already.
	if d := x.s.Version.StartDelay; d > 0 {
		select {
		case <-time.After(d):
		case <-x.cancelled: // too late not to start it: see below
		case <-x.gone:
			return
		}
	}
	if text, hasCode := x.cannotStart(); text != "" {
		x.hangUp()
		if hasCode {
			x.setExit(-1)
			x.op.update(map[string]any{"return": -1})
		}
		x.op.finish(codeFailure, text)
		return
	}
	var wait func() // for the output to be out
	var err error
	if x.req.WaitForWebsocket {
		wait, err = x.attach()
	} else {
		wait, err = x.record()
	}
	if err != nil {
		x.s.logf("lxdtest: %v", err)
		x.hangUp()
		x.op.finish(codeFailure, err.Error())
		return
	}
	p := x.process
	select {
	case <-x.cancelled:
		p.deliver(9)
	default:
	}
	x.s.lifecycle(x.op.by, "instance-exec", x.instance, map[string]any{"command": x.req.Command})
	x.s.spawn("process "+strconv.Quote(x.req.Command[0])+" of operation "+x.op.id, func() { p.run(x.handler()) })
	x.strike(OnStart)
	select {
	case <-p.exited:
	case <-x.gone:
		return
	}
	x.strike(OnExit)
	if k := x.socket("control"); k != nil {
		k.close()
	}
	wait()
	if x.strike(OnFinal) == Skip {
		<-x.gone // and it runs on for ever
		return
	}
	x.finish(p.code)
}

// handler is what runs. A user that the instance does not have cannot be become. LXD's agent in a virtual machine does not start a command whose working directory is
// not there, where a container's runs it in /.
func (x *execution) handler() Handler {
	if unmapped(int64(x.req.User)) || unmapped(int64(x.req.Group)) {
		return func(*Process) int { return 1 }
	}
	if x.instance.Type == VM && x.req.Cwd != "" {
		if info, err := x.instance.tree.stat(x.req.Cwd); err != nil || !info.IsDir() {
			return func(*Process) int { return 127 }
		}
	}
	return x.instance.handler()
}

// finish tells the result.
func (x *execution) finish(code int) {
	x.mu.Lock()
	cancelled := x.killed
	if x.lost {
		code = x.s.Version.VMLost
	}
	x.mu.Unlock()
	x.hangUp()
	x.setExit(code)
	if cancelled {
		x.op.finish(codeCancelled, "")
		return
	}
	metadata := map[string]any{"return": code}
	if x.req.RecordOutput && !x.req.WaitForWebsocket {
		metadata["output"] = map[string]string{"1": x.logURL("stdout"), "2": x.logURL("stderr")}
	}
	x.op.update(metadata)
	switch {
	case x.s.Version.FailedStatus && code == 127:
		x.op.finish(codeFailure, "Command not found")
	case x.s.Version.FailedStatus && code == 126:
		x.op.finish(codeFailure, "Command not executable")
	default:
		x.op.finish(codeSuccess, "")
	}
}

func (x *execution) setExit(code int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.exitCode = &code
}

// strike carries out the faults at a moment of the process. Cut is the end of all its sockets, as if the client had vanished.
func (x *execution) strike(m Moment) Verdict {
	g := gate{s: x.s, point: Point{Route: RouteExec, Method: "POST", Instance: x.instance.Name, server: x.s}}
	v := g.strike(m)
	if v == Cut {
		x.mu.Lock()
		sockets := slices.Collect(maps.Values(x.sockets))
		x.mu.Unlock()
		for _, k := range sockets {
			k.close()
		}
	}
	return v
}

// await waits for the sockets, and reports whether they came.
func (x *execution) await() bool {
	var late <-chan time.Time
	if window := x.s.Version.ConnectWindow; window > 0 {
		t := time.NewTimer(time.Until(x.op.created.Add(window)))
		defer t.Stop()
		late = t.C
	}
	select {
	case <-x.ready:
		select {
		case <-x.stall:
			<-x.gone
			return false
		default:
			return true
		}
	case <-x.stall:
		// The lock that the second connection left behind is never released: the time-out
		// does not help either.
		<-x.gone
		return false
	case <-late:
		x.hangUp()
		x.op.finish(codeFailure, "Timed out waiting for websockets to connect")
	case <-x.cancelled:
		x.hangUp()
		x.op.finish(codeCancelled, "")
	case <-x.gone:
	}
	return false
}

// maxArg is what the kernel lets through as one argument, its end included.
const maxArg = 128 << 10

// cannotStart says why a command cannot be started at all, and whether there is a return
// code nevertheless.
func (x *execution) cannotStart() (text string, hasCode bool) {
	if x.instance.Type == VM && x.instance.NoAgent {
		return x.s.Version.Texts.AgentDown, false
	}
	if len(x.req.Command) == 0 {
		return x.s.Version.Texts.NoPID, true
	}
	long := slices.ContainsFunc(x.req.Command, func(a string) bool { return len(a) >= maxArg })
	for k, v := range x.req.Environment {
		long = long || len(k)+1+len(v) >= maxArg
	}
	if long {
		return "fork/exec " + x.s.Version.Executable + ": argument list too long", true
	}
	return "", false
}

// newProcess fills in what the handler sees.
func (x *execution) newProcess(files [3]*os.File) *Process {
	p := newProcess(files)
	p.Instance, p.Args, p.Env, p.Dir = x.instance.Name, slices.Clone(x.req.Command), maps.Clone(x.env), x.req.Cwd
	p.logf = x.s.logf
	p.spawn = func(f func()) { x.spawn("background process", f) }
	p.Env["container"] = "lxc"
	if x.instance.Type == VM {
		delete(p.Env, "container")
	}
	p.User, p.Group, p.TTY, p.Root = x.req.User, x.req.Group, x.req.Interactive, x.instance.tree.dir
	// (uid_t)-1: the kernel leaves the user as it is.
	if p.User == 1<<32-1 {
		p.User = 0
	}
	if p.Group == 1<<32-1 {
		p.Group = 0
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.process, x.started = p, true
	if x.instance.currentStatus() == Frozen {
		p.freeze()
	}
	if x.isGone {
		p.deliver(9)
	}
	return p
}

// attach connects the process and the sockets, and returns how to wait for the end of the
// output.
func (x *execution) attach() (wait func(), err error) {
	if x.req.Interactive {
		return x.attachTerminal()
	}
	var child, server [3]*os.File
	for n := range child {
		r, w, err := os.Pipe()
		if err != nil {
			for m := range n {
				child[m].Close()
				server[m].Close()
			}
			return nil, err
		}
		child[n], server[n] = w, r
	}
	child[0], server[0] = server[0], child[0]
	x.own(server[0], server[1], server[2])
	p := x.newProcess(child)

	k0, k1, k2 := x.socket("0"), x.socket("1"), x.socket("2")
	x.spawn("stdin", func() {
		_ = k0.copyIn(&counter{x: x, w: server[0]})
		server[0].Close()
	})
	var outputs sync.WaitGroup
	for _, o := range []struct {
		name string
		k    *socket
		f    *os.File
	}{{"stdout", k1, server[1]}, {"stderr", k2, server[2]}} {
		outputs.Add(1)
		x.spawn(o.name, func() {
			defer outputs.Done()
			grace := x.s.Version.ChildGrace
			if x.instance.Type == VM {
				grace = 0
			}
			x.copyOut(o.k, &drain{f: o.f, exited: p.exited, grace: grace})
			// From now on the process's writes fail, and a background child's.
			o.f.Close()
			o.k.mark()
			o.k.close()
		})
	}
	// One message, or the end of the connection, is all that the server ever takes note of on
	// stdout: without a control socket it is the sign that the client has died.
	x.spawn("stdout watcher", func() {
		_, _, _ = k1.ws.NextReader()
		if x.socket("control") == nil {
			x.kill(p)
		}
	})
	if x.s.Version.ReadsStderr {
		x.spawn("stderr watcher", func() {
			for {
				if _, _, err := k2.ws.NextReader(); err != nil {
					return
				}
			}
		})
	}
	x.spawn("control", func() { x.obey(p) })
	return outputs.Wait, nil
}

// kill ends the process because the client has hung up; a daemon that has died kills nobody.
func (x *execution) kill(p *Process) {
	select {
	case <-x.gone:
	default:
		p.deliver(9)
	}
}

// attachTerminal is attach with one socket for everything.
func (x *execution) attachTerminal() (wait func(), err error) {
	t, err := openTerminal(Size{80, 25})
	if err != nil {
		return nil, err
	}
	x.own(t)
	p := x.newProcess(t.child)
	p.mu.Lock()
	p.size = Size{80, 25}
	if x.req.Width > 0 && x.req.Height > 0 {
		p.size = Size{x.req.Width, x.req.Height}
		t.resize(p.size)
	}
	p.resize = t.resize
	p.mu.Unlock()

	k := x.socket("0")
	answered := make(chan struct{}) // the client has said that it will send no more
	x.spawn("terminal input", func() {
		defer close(answered)
		_ = k.copyIn(&counter{x: x, w: &keyboard{p, t.in}})
	})
	var output sync.WaitGroup
	output.Add(1)
	x.spawn("terminal output", func() {
		defer output.Done()
		grace := x.s.Version.ChildGrace
		if grace == 0 {
			grace = time.Second
		}
		d := &drain{f: t.out, exited: p.exited, grace: grace}
		if x.s.Version.InputHangsUp {
			d.over = answered
		}
		x.copyOut(k, d)
		if d.cut {
			t.Close()
		}
		k.mark()
	})
	x.spawn("control", func() { x.obey(p) })
	return func() {
		output.Wait()
		// The operation does not end before the client has answered the mark: with a text, a
		// close message, or by hanging up.
		select {
		case <-answered:
		case <-x.gone:
		}
	}, nil
}

// A keyboard turns an interrupt character into the signal for processes that have no
// terminal of their own.
type keyboard struct {
	p *Process
	w io.Writer
}

func (k *keyboard) Write(b []byte) (int, error) {
	n, err := k.w.Write(b)
	k.p.mu.Lock()
	external := k.p.external
	k.p.mu.Unlock()
	if !external && slices.Contains(b, 0x03) {
		k.p.deliver(2)
	}
	return n, err
}

// copyOut sends output to the client until there is none, or nobody who takes it.
func (x *execution) copyOut(k *socket, r io.Reader) {
	buf := make([]byte, x.s.Version.MessageMax)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if e := k.send(buf[:n]); e != nil {
				if errors.Is(e, errCut) {
					k.close()
				}
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// A drain reads the output of a process. After the end of the main process it gives others that
// hold the pipe no more than a moment of grace.
type drain struct {
	f        *os.File
	exited   <-chan struct{}
	grace    time.Duration // 0: for ever
	deadline time.Time
	over     <-chan struct{} // once it is closed, what comes is thrown away, and is the last
	cut      bool            // it was
}

func (d *drain) Read(p []byte) (int, error) {
	for {
		if d.grace > 0 {
			// An error means that this kind of file knows no deadlines; then it is for ever.
			_ = d.f.SetReadDeadline(time.Now().Add(d.grace))
		}
		n, err := d.f.Read(p)
		if n > 0 {
			select {
			case <-d.over:
				d.cut = true
				return 0, io.EOF
			default:
			}
		}
		over := false
		select {
		case <-d.exited:
			over = true
		default:
		}
		switch {
		case n > 0 && over && d.grace > 0:
			// The chunk that comes too late is the last one: a full pipe is not lost, a chatty
			// child does not go on for ever.
			if d.deadline.IsZero() {
				d.deadline = time.Now().Add(d.grace)
			} else if time.Now().After(d.deadline) {
				return n, io.EOF
			}
			return n, nil
		case n > 0:
			return n, nil
		case errors.Is(err, os.ErrDeadlineExceeded) && !over:
			continue
		default:
			return 0, io.EOF
		}
	}
}

// A counter counts what reaches the process.
type counter struct {
	x *execution
	w io.Writer
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.x.mu.Lock()
	c.x.stdin += int64(n)
	c.x.mu.Unlock()
	return n, err
}

// spawn runs a part of the execution that ends with its sockets and files.
func (x *execution) spawn(name string, f func()) {
	x.s.spawn(name+" of operation "+x.op.id, f)
}

// own notes what has to be closed at the end.
func (x *execution) own(c ...io.Closer) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.closers = append(x.closers, c...)
}

// hangUp closes all sockets, abruptly, and the server's ends of the streams.
func (x *execution) hangUp() {
	x.mu.Lock()
	x.over = true
	sockets := slices.Collect(maps.Values(x.sockets))
	closers := x.closers
	x.closers = nil
	x.mu.Unlock()
	for _, k := range sockets {
		k.close()
	}
	for _, c := range closers {
		c.Close()
	}
}

// cancel is a DELETE of the operation.
func (x *execution) cancel(style DeleteStyle) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case !x.started && x.req.WaitForWebsocket:
		select {
		case <-x.cancelled:
		default:
			close(x.cancelled)
		}
	case x.sockets["control"] != nil:
		x.killed = style == DeleteCancels
		go x.process.deliver(9)
	}
}

// running is the process, or nil before its start.
func (x *execution) running() *Process {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.process
}

// stopped is the end of the instance.
func (x *execution) stopped() {
	x.mu.Lock()
	p := x.process
	x.lost = x.instance.Type == VM && p != nil && !x.over
	x.mu.Unlock()
	if p != nil {
		p.perish()
	}
}

// orphan cuts the command off from a daemon that has died.
func (x *execution) orphan() {
	x.mu.Lock()
	if x.isGone {
		x.mu.Unlock()
		return
	}
	x.isGone = true
	orphans := x.orphans
	x.mu.Unlock()
	close(x.gone)
	x.hangUp()
	for _, k := range orphans {
		k.close()
	}
}

// abandon ends the command with the server.
func (x *execution) abandon() {
	x.orphan()
	if p := x.running(); p != nil {
		p.perish()
	}
}

// record runs a command without sockets: nothing to read, and output to files or nowhere.
func (x *execution) record() (wait func(), err error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	files := [3]*os.File{null}
	for n, name := range []string{"stdout", "stderr"} {
		path := os.DevNull
		if x.req.RecordOutput {
			path = x.s.logPath(x.instance, "exec_"+x.op.id+"."+name)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				return nil, err
			}
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		files[n+1] = f
	}
	x.newProcess(files)
	return func() {}, nil
}

func (s *Server) logPath(i *instance, name string) string {
	return filepath.Join(s.tempDir(), "logs", i.Project, i.Name, name)
}

func (x *execution) logURL(stream string) string {
	dir := "/logs/"
	if x.s.Version.ExecOutputDir {
		dir = "/logs/exec-output/"
	}
	return "/1.0/instances/" + x.instance.Name + dir + "exec_" + x.op.id + "." + stream
}

// getLog and deleteLog are for recorded output.
func (s *Server) getLog(w http.ResponseWriter, r *http.Request) {
	i, ok := s.instanceOf(w, r)
	if !ok {
		return
	}
	name, ok := s.logName(w, r)
	if !ok {
		return
	}
	f, err := os.Open(s.logPath(i, name))
	if err != nil {
		s.fail(w, 500, "open "+name+": no such file or directory")
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		s.fail(w, 500, err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", "inline;filename="+name)
	http.ServeContent(w, r, "", info.ModTime(), f)
}

// logName is the name of a file of recorded output, or the request has been refused: where such files have a directory of their own, they are in
// no other one.
func (s *Server) logName(w http.ResponseWriter, r *http.Request) (string, bool) {
	name := filepath.Base(r.PathValue("file"))
	if s.Version.ExecOutputDir && !strings.Contains(r.URL.Path, "/exec-output/") {
		s.fail(w, 400, fmt.Sprintf("Log file name %q not valid", name))
		return "", false
	}
	return name, true
}

func (s *Server) deleteLog(w http.ResponseWriter, r *http.Request) {
	i, ok := s.instanceOf(w, r)
	if !ok {
		return
	}
	name, ok := s.logName(w, r)
	if !ok {
		return
	}
	if err := os.Remove(s.logPath(i, name)); err != nil {
		s.fail(w, 500, "remove "+name+": no such file or directory")
		return
	}
	s.reply(w, empty)
}
