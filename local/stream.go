package local

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

const (
	// bufferSize is half of what a pipe holds: the command fills one half while we empty the other.
	bufferSize = 32 << 10

	// maxTail is the most that a pipe may hold, as far as users without privileges can have it: what comes after it was
	// written after the command's end.
	maxTail = 1 << 20

	// overrun is how long after WaitDelay output may still be read that is there already.
	overrun = time.Second
)

// copyError is an error of one of the caller's readers or writers.
type copyError struct {
	stream string
	err    error
}

func (e *copyError) Error() string { return fmt.Sprintf("%s: %v", e.stream, e.err) }
func (e *copyError) Unwrap() error { return e.err }

// output copies one of the command's streams to the caller's writer.
type output struct {
	name  string // stdout, stderr or terminal
	f     *os.File
	w     io.Writer
	turn  *sync.Mutex // held during a Write; shared by two outputs with the same writer
	delay time.Duration
	fail  func(error)   // told the first error of w
	ended chan struct{} // closed by run

	// The end of a terminal's stream only says that nobody has the terminal open just now; to close our end then would
	// hang up on a command that is about to exit.
	terminal <-chan struct{} // closed when the command has exited; nil: not a terminal
	given    chan struct{}   // closed by cut

	mu       sync.Mutex // guards what follows
	detached bool       // w must not be called again
	isCut    bool
	exitedAt time.Time
	busy     time.Time     // since when a Write has been under way or waited for its turn; zero: none
	spent    time.Duration // in Writes, since exitedAt
	tail     int           // bytes received since exitedAt
	received int64
	writeErr error
	whole    bool // the end of the stream was seen
}

// run copies until the stream ends. After an error of the writer it reads on and throws away: nobody but the command itself decides
// how it ends.
func (o *output) run() {
	defer close(o.ended)
	defer o.f.Close()
	buf := make([]byte, bufferSize)
	for o.prepare() {
		n, err := o.f.Read(buf)
		if n > 0 {
			o.write(buf[:n])
		}
		if err != nil {
			end := err == io.EOF || o.terminal != nil && isTerminalEnd(err)
			if end && o.waitForExit() {
				continue
			}
			o.mu.Lock()
			o.whole = end
			o.mu.Unlock()
			return
		}
	}
}

// waitForExit waits for the exit of a command with a terminal. It reports whether there was something to wait for, so that there may be
// more to read.
func (o *output) waitForExit() bool {
	if o.terminal == nil {
		return false
	}
	select {
	case <-o.terminal:
		return false
	default:
	}
	select {
	case <-o.terminal:
	case <-o.given:
	}
	return true
}

// exited says that the command has ended: from now on the stream has WaitDelay to end.
func (o *output) exited() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.exitedAt = time.Now()
	if !o.busy.IsZero() {
		o.busy = o.exitedAt // only what is after it counts
	}
	_ = o.f.SetReadDeadline(o.exitedAt.Add(o.delay))
}

// prepare sets the time that the next Read has, and reports whether there is any. The time that the caller's writer takes does not
// count: what the command wrote before its end has to arrive whole, however slow that writer is.
func (o *output) prepare() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.isCut:
		return false
	case o.exitedAt.IsZero():
		return true
	}
	left := o.delay - (time.Since(o.exitedAt) - o.spent)
	if left <= 0 && (o.tail > maxTail || -left > overrun) {
		return false
	}
	// A deadline that has passed would fail a Read of what is there.
	return o.f.SetReadDeadline(time.Now().Add(max(left, 20*time.Millisecond))) == nil
}

// cut makes the stream end now.
func (o *output) cut() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.isCut {
		o.isCut = true
		close(o.given)
	}
	if o.f.SetReadDeadline(time.Unix(1, 0)) != nil {
		o.f.Close()
	}
}

// write hands p to the writer unless that has failed or is not to be called any more.
func (o *output) write(p []byte) {
	o.mu.Lock()
	o.received += int64(len(p))
	if !o.exitedAt.IsZero() {
		o.tail += len(p)
	}
	skip := o.w == nil || o.writeErr != nil || o.detached
	if !skip {
		o.busy = time.Now()
	}
	o.mu.Unlock()
	if skip {
		return
	}

	o.turn.Lock()
	defer o.turn.Unlock()
	o.mu.Lock()
	skip = o.detached
	o.mu.Unlock()
	var n int
	var err error
	if !skip {
		n, err = o.w.Write(p)
		if err == nil && n < len(p) {
			err = io.ErrShortWrite
		}
	}
	o.mu.Lock()
	if !o.exitedAt.IsZero() {
		o.spent += time.Since(o.busy)
	}
	o.busy = time.Time{}
	o.writeErr = err
	skip = o.detached
	o.mu.Unlock()
	if err != nil && !skip {
		o.fail(&copyError{o.name, err})
	}
}

// detach makes sure that the writer is not called again. It reports whether it may still be in a Write.
func (o *output) detach() (stuck bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.detached = true
	return !o.busy.IsZero()
}

// input copies the caller's Stdin to the command.
type input struct {
	src   *source // nil: empty
	w     *os.File
	tty   bool
	done  chan struct{} // closed by stop
	ended chan struct{} // closed by run
	fail  func(error)   // told an error of the source
}

func (in *input) run() {
	defer close(in.ended)
	newline := true // nothing, or a line, stands before the end
	for in.src != nil {
		p, err := in.src.next(in.done)
		if len(p) > 0 {
			if _, err := in.w.Write(p); err != nil {
				return // the command does not read any more, which is its own business
			}
			newline = p[len(p)-1] == '\n'
		}
		if err == io.EOF {
			break
		}
		if errors.Is(err, errStopped) {
			return
		}
		if err != nil {
			// Not closed: the command must not take the part for the whole.
			in.fail(&copyError{"Stdin", err})
			return
		}
	}
	if !in.tty {
		in.w.Close()
		return
	}
	// A terminal's input ends by its end character, once at the beginning of a line and otherwise once more, for the first
	// one ends the line.
	mark := []byte{4, 4}
	if newline {
		mark = mark[:1]
	}
	_, _ = in.w.Write(mark)
}

// stop ends run and waits for it.
func (in *input) stop() {
	close(in.done)
	if in.tty {
		_ = in.w.SetWriteDeadline(time.Unix(1, 0)) // the output reads from the same file
	} else {
		in.w.Close()
	}
	<-in.ended
	if in.src != nil {
		in.src.stop()
	}
}

var errStopped = errors.New("stopped")

// source reads from a reader of the caller's in a goroutine of its own, one Read at a time and only when asked, so that a Read that
// does not return holds nothing but that goroutine. next and stop are called from one goroutine at a time.
type source struct {
	r     io.Reader
	want  chan []byte
	got   chan read // has room for one, so that a late Read holds nobody
	ended chan struct{}
	buf   []byte
	empty int // Reads in a row that brought nothing

	mu       sync.Mutex // guards what follows
	stopped  bool       // no Read may begin any more
	underWay bool       // a Read
}

type read struct {
	n   int
	err error
}

func newSource(r io.Reader) *source {
	s := &source{r: r, want: make(chan []byte), got: make(chan read, 1), ended: make(chan struct{}), buf: make([]byte, bufferSize)}
	go s.run() // ends with stop, or when a Read returns after it
	return s
}

func (s *source) run() {
	defer close(s.ended)
	for buf := range s.want {
		if !s.begin() {
			return
		}
		n, err := s.r.Read(buf)
		s.mu.Lock()
		s.underWay = false
		s.mu.Unlock()
		s.got <- read{n, err}
	}
}

// begin reports whether a Read may begin.
func (s *source) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.underWay = !s.stopped
	return s.underWay
}

// next returns what the next Read brings, which is valid until the next call. After stop is closed it returns errStopped, and has to
// be left alone.
func (s *source) next(stop <-chan struct{}) ([]byte, error) {
	for {
		select {
		case <-stop:
			return nil, errStopped
		default:
		}
		s.want <- s.buf
		select {
		case r := <-s.got:
			if r.n > 0 || r.err != nil {
				s.empty = 0
				return s.buf[:r.n], r.err
			}
			if s.empty++; s.empty > 100 { // as bufio does
				return nil, io.ErrNoProgress
			}
		case <-stop:
			return nil, errStopped
		}
	}
}

// stop ends the goroutine; if a Read is under way, as soon as that returns.
func (s *source) stop() {
	close(s.want)
	s.mu.Lock()
	s.stopped = true
	underWay := s.underWay
	s.mu.Unlock()
	if !underWay {
		<-s.ended
	}
}
