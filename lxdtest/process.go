package lxdtest

import (
	"context"
	"errors"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
)

// A Handler is what runs when a client executes a command. It returns the exit status.
//
// When it returns, its streams are closed. When the process gets a signal that it did not
// ask for with [Process.Notify], it is dead for the client at once, as a real one would be; the
// handler should return when its context ends.
type Handler func(*Process) int

// A Process is one command in an instance, as its [Handler] sees it.
type Process struct {
	Instance string
	Args     []string
	Env      map[string]string // complete, with what LXD adds
	Dir      string            // as it was asked for, "" if it was not
	User     uint32
	Group    uint32
	TTY      bool   // Stdin and Stdout are a terminal, Stderr is the same
	Root     string // the directory on this machine that stands for the instance's /

	// The streams are pipes: a read waits for the client, and a write waits while 64 KiB
	// are on their way. A write after the client has hung up fails with EPIPE and, unless
	// SIGPIPE (13) is asked for, ends the process with 141.
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer

	files      [3]*os.File
	spawn      func(func()) // a goroutine that Close waits for
	ctx        context.Context
	cancel     context.CancelFunc
	background context.Context // of what it leaves behind
	vanish     context.CancelFunc
	logf       func(format string, args ...any)
	exited     chan struct{}

	mu       sync.Mutex // guards what follows
	code     int
	ended    bool
	holders  int // the handler and what it left in the background
	notify   []notification
	size     Size
	resizes  chan Size
	external bool             // a real process: signals are its own affair
	kill     func(signal int) // of a real process that was started
	pending  []int            // signals for a real process that was not
	resize   func(Size)       // of a terminal
	frozen   bool             // with its instance
	held     []int            // signals that came meanwhile
	signals  []int
	sizes    []Size
}

// Size is the size of a terminal.
type Size struct{ Cols, Rows int }

type notification struct {
	signals []int
	ch      chan int
}

func newProcess(files [3]*os.File) *Process {
	p := &Process{files: files, exited: make(chan struct{}), holders: 1, resizes: make(chan Size, 1)}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.background, p.vanish = context.WithCancel(context.Background())
	p.Stdin = files[0]
	p.Stdout, p.Stderr = &output{p, files[1]}, &output{p, files[2]}
	return p
}

// output turns a broken pipe into SIGPIPE.
type output struct {
	p *Process
	f *os.File
}

func (o *output) Write(b []byte) (int, error) {
	n, err := o.f.Write(b)
	if errors.Is(err, syscall.EPIPE) {
		o.p.deliver(13)
	}
	return n, err
}

// Context ends when the process does, by a signal or because the server is closed.
func (p *Process) Context() context.Context { return p.ctx }

// Notify asks for signals, by their Linux numbers; without numbers for all that can be
// caught. They then no longer end the process. A reader that is too slow misses some.
func (p *Process) Notify(signals ...int) <-chan int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := notification{signals, make(chan int, 16)}
	p.notify = append(p.notify, n)
	return n.ch
}

// Size is the size of the terminal.
func (p *Process) Size() Size {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.size
}

// Resizes delivers each new size of the terminal; a slow reader gets the last one.
func (p *Process) Resizes() <-chan Size { return p.resizes }

// Go runs f as a background process that the command leaves behind: f holds stdin, stdout and stderr
// open until it returns, even after the handler has. Its context ends when the instance stops and when the server is closed.
func (p *Process) Go(f func(context.Context)) {
	p.mu.Lock()
	p.holders++
	p.mu.Unlock()
	p.spawn(func() {
		defer p.release()
		f(p.background)
	})
}

// release closes the process's ends of the streams with the last holder.
func (p *Process) release() {
	p.mu.Lock()
	p.holders--
	last := p.holders == 0
	p.mu.Unlock()
	if last {
		p.closeFiles()
	}
}

func (p *Process) closeFiles() {
	for i, f := range p.files {
		// A terminal is one file three times.
		if f != nil && !slices.Contains(p.files[:i], f) {
			f.Close()
		}
	}
}

// run runs the handler. The handler itself may outlive the process.
func (p *Process) run(h Handler) {
	code := 1 // of one that ends its goroutine, as t.FailNow does
	defer func() {
		if err := recover(); err != nil {
			p.logf("lxdtest: panic in the handler of a process: %v\n%s", err, debug.Stack())
			code = 128 + 6 // SIGABRT
		}
		p.end(code & 0xff)
	}()
	if h == nil {
		code = 127
		return
	}
	code = h(p)
}

// end is the end of the process as far as the client can tell.
func (p *Process) end(code int) {
	p.mu.Lock()
	if p.ended {
		p.mu.Unlock()
		return
	}
	p.ended, p.code = true, code
	p.mu.Unlock()
	p.cancel()
	p.release()
	close(p.exited)
}

// Signals with these numbers do nothing to a process that did not ask for them. Stopping
// is not acted out.
var harmless = []int{17, 18, 19, 20, 21, 22, 23, 28}

// deliver sends the process a signal.
func (p *Process) deliver(n int) {
	if n <= 0 || n > 64 {
		return
	}
	p.mu.Lock()
	if p.ended {
		p.mu.Unlock()
		return
	}
	if p.frozen {
		p.held = append(p.held, n)
		p.mu.Unlock()
		return
	}
	p.signals = append(p.signals, n)
	if p.external {
		kill := p.kill
		if kill == nil {
			p.pending = append(p.pending, n)
		}
		p.mu.Unlock()
		if kill != nil {
			kill(n)
		}
		return
	}
	caught := false
	if n != 9 && n != 19 {
		for _, t := range p.notify {
			if len(t.signals) == 0 || slices.Contains(t.signals, n) {
				caught = true
				select {
				case t.ch <- n:
				default:
				}
			}
		}
	}
	p.mu.Unlock()
	if !caught && !slices.Contains(harmless, n) {
		p.end(128 + n)
	}
}

// freeze holds signals back until thaw. A real process stops; a handler goes on.
func (p *Process) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.frozen || p.ended {
		return
	}
	p.frozen = true
	if p.kill != nil {
		p.kill(19)
	}
}

// thaw ends what freeze began, and delivers the signals that have come meanwhile.
func (p *Process) thaw() {
	for _, n := range p.melt() {
		p.deliver(n)
	}
}

// perish is the end of a process with its instance or its server, frozen or not, and of what it has left behind.
func (p *Process) perish() {
	p.melt()
	p.deliver(9)
	p.vanish()
}

// melt is thaw without the signals, which it returns.
func (p *Process) melt() []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	held := p.held
	if p.frozen && p.kill != nil && !p.ended {
		p.kill(18)
	}
	p.frozen, p.held = false, nil
	return held
}

// takeOver says that a real process stands behind this one from now on, unless it is dead already.
func (p *Process) takeOver() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.external = !p.ended
	return p.external
}

// started hands over how to signal the real process, and what has come in before.
func (p *Process) started(kill func(signal int)) {
	p.mu.Lock()
	p.kill = kill
	if p.frozen {
		kill(19)
	}
	pending := p.pending
	p.pending = nil
	p.mu.Unlock()
	for _, n := range pending {
		kill(n)
	}
}

func (p *Process) setSize(size Size) {
	p.mu.Lock()
	p.size = size
	p.sizes = append(p.sizes, size)
	select {
	case <-p.resizes:
	default:
	}
	p.resizes <- size
	resize := p.resize
	p.mu.Unlock()
	if resize != nil {
		resize(size)
	}
	p.deliver(28)
}
