package job

import (
	"errors"
	"io"
	"sync"
	"time"
)

// LogOptions are the options of [NewLog]; nil means all defaults.
type LogOptions struct {
	// Secrets are masked: wherever one is in the output, also in base64, URL-encoded or as a JSON string, *** stands for it.
	// Empty ones are ignored.
	Secrets []string

	// Timestamps puts the time, in UTC with milliseconds, in front of each line.
	Timestamps bool

	// MaxBytes is the most that is written, without the line that says how much was left out. What is kept is the beginning and the
	// last 64 KiB. 0: 64 MiB; negative: no limit.
	MaxBytes int64

	// Now is the clock. nil: time.Now.
	Now func() time.Time
}

const defaultMaxBytes = 64 << 20

// Log writes the output of several streams into one writer, as a CI system shows it: without terminal control
// sequences, without secrets, line by line, with times, bounded. It is safe for concurrent use; the writer sees one Write at a time.
type Log struct {
	secrets *dictionary

	mu      sync.Mutex // guards the rest
	w       io.Writer  // stamp → limit → the caller's
	stamp   *stamper
	limit   *limiter // nil: none
	current *Stream  // whose unfinished line is the last that was written
	err     error    // the first of the writer
	closed  bool
}

// NewLog returns a log that writes to w. nil options mean all defaults.
func NewLog(w io.Writer, opts *LogOptions) *Log {
	if opts == nil {
		opts = &LogOptions{}
	}
	l := &Log{secrets: newDictionary(secretForms(opts.Secrets))}
	limit := opts.MaxBytes
	if limit == 0 {
		limit = defaultMaxBytes
	}
	if limit > 0 {
		l.limit = newLimiter(w, limit)
		w = l.limit
	}
	if opts.Timestamps {
		now := opts.Now
		if now == nil {
			now = time.Now
		}
		l.stamp = &stamper{w: w, now: now}
		w = l.stamp
	}
	l.w = w
	return l
}

// Stream returns a writer for one stream of output: a command's stdout and its stderr are two, for a control sequence
// or a secret that is split in one has nothing to do with what arrives in the other. Close it to see its last line.
func (l *Log) Stream() *Stream {
	s := &Stream{log: l}
	s.mask = newMasker((*lines)(s), l.secrets)
	s.clean = newCleaner(s.mask)
	return s
}

// Close writes what is left to say. The streams have to be closed before. It does not close the writer. The error is
// the first that the writer returned.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return l.err
	}
	l.closed = true
	l.endLine(nil)
	if l.limit != nil && l.err == nil {
		l.err = l.limit.Close()
	}
	return l.err
}

// endLine ends the line of another stream than s. l.mu is held.
func (l *Log) endLine(s *Stream) {
	if l.current != nil && l.current != s {
		l.current = nil
		l.write([]byte("\n"))
	}
}

func (l *Log) write(p []byte) {
	if l.err == nil {
		_, l.err = l.w.Write(p)
	}
}

// Stream is one stream of a [Log]. It is not safe for concurrent use.
type Stream struct {
	log   *Log
	clean *cleaner // → mask → lines
	mask  *masker
	line  []byte // without its end yet
}

var _ io.WriteCloser = (*Stream)(nil)

// Write writes output. An error is the log's writer's.
func (s *Stream) Write(p []byte) (int, error) { return s.clean.Write(p) }

// Close writes what was held back: the beginning of a secret or a control sequence, a line without an end. The stream
// may be used again.
func (s *Stream) Close() error {
	err := errors.Join(s.clean.Close(), s.mask.Close())
	if len(s.line) > 0 {
		err = errors.Join(err, s.emit(s.line, false))
		s.line = s.line[:0]
	}
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	if s.log.current == s {
		s.log.endLine(nil)
	}
	return errors.Join(err, s.log.err)
}

// maxLine is how much of a line is held until its end; a longer one is written in parts.
const maxLine = 16 << 10

// lines is a stream's last writer: it hands whole lines to the log, so that streams do not mix within one.
type lines Stream

func (w *lines) Write(p []byte) (int, error) {
	s := (*Stream)(w)
	n := len(p)
	end := lastLine(p)
	if end > 0 {
		whole := p[:end]
		if len(s.line) > 0 {
			whole = append(s.line, whole...)
			s.line = s.line[:0]
		}
		if err := s.emit(whole, true); err != nil {
			return 0, err
		}
	}
	s.line = append(s.line, p[end:]...)
	if len(s.line) > maxLine {
		if err := s.emit(s.line, false); err != nil {
			return 0, err
		}
		s.line = s.line[:0]
	}
	return n, nil
}

// lastLine is the index behind the last line feed.
func lastLine(p []byte) int {
	for i := len(p) - 1; i >= 0; i-- {
		if p[i] == '\n' {
			return i + 1
		}
	}
	return 0
}

// emit writes lines, or with whole false a part of one.
func (s *Stream) emit(p []byte, whole bool) error {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	s.log.endLine(s)
	s.log.write(p)
	s.log.current = s
	if whole {
		s.log.current = nil
	}
	return s.log.err
}

// stamper puts the time in front of each line.
type stamper struct {
	w     io.Writer
	now   func() time.Time
	begun bool // within a line
	out   []byte
}

const stampLayout = "2006-01-02T15:04:05.000Z "

// Write returns len(p) unless the writer behind it fails.
func (s *stamper) Write(p []byte) (int, error) {
	s.out = s.out[:0]
	now := s.now().UTC()
	for _, b := range p {
		if !s.begun {
			s.out = now.AppendFormat(s.out, stampLayout)
		}
		s.out = append(s.out, b)
		s.begun = b != '\n'
	}
	if _, err := s.w.Write(s.out); err != nil {
		return 0, err
	}
	return len(p), nil
}
