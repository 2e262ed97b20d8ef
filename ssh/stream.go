package ssh

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"
	"time"

	xssh "golang.org/x/crypto/ssh"
)

// bufferSize is what an SSH packet of x/crypto holds.
const bufferSize = 32 << 10

// copyError is an error of one of the caller's readers or writers.
type copyError struct {
	stream string
	err    error
}

func (e *copyError) Error() string { return fmt.Sprintf("%s: %v", e.stream, e.err) }
func (e *copyError) Unwrap() error { return e.err }

// callerPanic is a panic in the caller's own reader or writer. It goes on in the caller's goroutine when everything has been cleaned up: in a
// goroutine of ours nobody could recover it.
type callerPanic struct {
	value any
	stack []byte
}

func (p *callerPanic) Error() string { return fmt.Sprintf("panic: %v\n\n%s", p.value, p.stack) }

func (p *callerPanic) Unwrap() error {
	err, _ := p.value.(error)
	return err
}

// guarded calls the caller's f. A panic becomes an error, for goOn.
func guarded(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &callerPanic{v, debug.Stack()}
		}
	}()
	return f()
}

// goOn lets a panic that became an error go on.
func goOn(err error) error {
	if p, ok := errors.AsType[*callerPanic](err); ok {
		panic(p)
	}
	return err
}

// output copies one of the command's streams to the caller's writer.
type output struct {
	name   string // stdout, stderr or terminal
	r      io.Reader
	w      io.Writer
	turn   *sync.Mutex // held during a Write; shared by two outputs with the same writer
	fail   func(error) // told the first error of w
	report *report     // comes before the output
	ended  chan struct{}

	mu       sync.Mutex // guards what follows
	detached bool       // w must not be called again
	exitedAt time.Time
	busy     time.Time     // since when a Write has been under way or waited for its turn; zero: none
	spent    time.Duration // in Writes, since exitedAt
	received int64
	writeErr error
	whole    bool          // the end of the stream was seen
	quiet    chan struct{} // closed at the end of the Write that detach has found; nil: none
}

// run copies until the stream ends. After an error of the writer it reads on and throws away: nobody but the command itself decides
// how it ends.
func (o *output) run() {
	defer close(o.ended)
	buf := make([]byte, bufferSize)
	for {
		n, err := o.r.Read(buf)
		if p := o.report.skip(buf[:n]); len(p) > 0 {
			o.write(p)
		}
		if err != nil {
			o.mu.Lock()
			o.whole = err == io.EOF
			o.mu.Unlock()
			return
		}
	}
}

// exited says that the command has ended: from now on its streams have WaitDelay to end.
func (o *output) exited() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.exitedAt = time.Now()
	if !o.busy.IsZero() {
		o.busy = o.exitedAt // only what is after it counts
	}
}

// left is how long the stream may still take. The time that the caller's writer takes does not count: what the command wrote before its end has to
// arrive whole, however slow that writer is.
func (o *output) left(delay time.Duration) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	spent := o.spent
	if !o.busy.IsZero() {
		spent += time.Since(o.busy)
	}
	return delay - (time.Since(o.exitedAt) - spent)
}

// write hands p to the writer unless that has failed or is not to be called any more.
func (o *output) write(p []byte) {
	o.mu.Lock()
	o.received += int64(len(p))
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
	var err error
	if !skip {
		err = guarded(func() error {
			n, err := o.w.Write(p)
			if err == nil && n < len(p) {
				err = io.ErrShortWrite
			}
			return err
		})
	}
	o.mu.Lock()
	if !o.exitedAt.IsZero() {
		o.spent += time.Since(o.busy)
	}
	o.busy = time.Time{}
	o.writeErr = err
	skip = o.detached
	if o.quiet != nil {
		close(o.quiet)
		o.quiet = nil
	}
	o.mu.Unlock()
	if err != nil && !skip {
		o.fail(&copyError{o.name, err})
	}
}

// detach makes sure that the writer is not called again. It waits for a Write that is under way, but not long.
func (o *output) detach() {
	o.mu.Lock()
	o.detached = true
	var quiet chan struct{}
	if !o.busy.IsZero() {
		quiet = make(chan struct{})
		o.quiet = quiet
	}
	o.mu.Unlock()
	if quiet == nil {
		return
	}
	late := time.NewTimer(writeGrace)
	defer late.Stop()
	select {
	case <-quiet:
	case <-late.C:
	}
}

// report finds what the wrapper says before the command's own output: a mark, a word and the end of the line. What comes before is what
// the login shell's start-up files have printed, or a terminal's echo.
type report struct {
	mark  string
	word  string
	found chan struct{} // closed when word is set

	seen []byte // not yet looked at, or the beginning of a mark
	done bool
}

// mostReport bounds a line that looks like a report.
const mostReport = 64

// skip returns what of p is output.
func (r *report) skip(p []byte) []byte {
	if r.done {
		return p
	}
	r.seen = append(r.seen, p...)
	for {
		i := bytes.Index(r.seen, []byte(r.mark+" "))
		if i < 0 {
			r.seen = r.seen[max(0, len(r.seen)-len(r.mark)):]
			return nil
		}
		rest := r.seen[i+len(r.mark)+1:]
		if j := bytes.IndexByte(rest[:min(len(rest), mostReport)], '\n'); j >= 0 {
			r.word = string(bytes.TrimRight(rest[:j], "\r"))
			r.seen, r.done = nil, true
			close(r.found)
			return rest[j+1:]
		} else if len(rest) < mostReport {
			r.seen = r.seen[i:]
			return nil
		}
		r.seen = rest
	}
}

// input copies the caller's Stdin to the command.
type input struct {
	src   *source // nil: empty
	ch    xssh.Channel
	tty   bool
	done  chan struct{} // closed by stop
	ended chan struct{} // closed by run
	fail  func(error)   // told an error of the source

	mu      sync.Mutex // guards what follows
	stopped bool
	busy    bool // in a Write to the host, which may wait for it
}

func (in *input) run() {
	defer close(in.ended)
	if in.src != nil {
		defer in.src.stop()
	}
	newline := true // nothing, or a line, stands before the end
	for in.src != nil {
		p, err := in.src.next(in.done)
		if len(p) > 0 {
			if in.send(func() error { _, err := in.ch.Write(p); return err }) != nil {
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
	_ = in.send(func() error {
		if !in.tty {
			return in.ch.CloseWrite()
		}
		// A terminal's input ends by its end character, once at the beginning of a line and otherwise once more, for the first
		// one ends the line.
		mark := []byte{4, 4}
		if newline {
			mark = mark[:1]
		}
		_, err := in.ch.Write(mark)
		return err
	})
}

func (in *input) send(f func() error) error {
	in.mu.Lock()
	in.busy = !in.stopped
	in.mu.Unlock()
	if !in.busy { // no one but this goroutine sets it
		return errStopped
	}
	err := f()
	in.mu.Lock()
	in.busy = false
	in.mu.Unlock()
	return err
}

// stop ends run and waits for it, unless that waits for the host: then it ends with the session.
func (in *input) stop() {
	close(in.done)
	in.mu.Lock()
	in.stopped = true
	busy := in.busy
	in.mu.Unlock()
	if !busy {
		<-in.ended
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
		var n int
		err := guarded(func() (err error) { n, err = s.r.Read(buf); return err })
		if n < 0 || n > len(buf) {
			n, err = 0, errors.New("its Read returned an impossible count")
		}
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
