package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/lxdtransport/transport/job"
)

// screen shows a run: the log as it is on a pipe, with a line beneath it on a terminal that says what runs, or
// everything as JSON.
type screen struct {
	job   *job.Job
	width func() int // of the terminal; nil: it is none
	json  bool

	mu     sync.Mutex // guards the rest
	out    io.Writer
	part   []byte // of a line of the log
	status func(time.Duration) string
	since  time.Time
	shown  bool // there is a status line
	stages int  // that were begun
	closed bool
	stop   chan struct{} // closed: the clock is to stop
	done   chan struct{} // closed: it has
}

// interval is how often the time in the status line moves on.
const interval = time.Second

func newScreen(out io.Writer, j *job.Job, asJSON bool) *screen {
	s := &screen{job: j, out: out, json: asJSON, stop: make(chan struct{}), done: make(chan struct{})}
	if f, ok := out.(*os.File); ok && !asJSON && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" {
		s.width = func() int {
			w, _, err := term.GetSize(int(f.Fd()))
			if err != nil || w <= 0 {
				return 80
			}
			return w
		}
	}
	if s.width == nil {
		close(s.done)
		return s
	}
	go func() {
		defer close(s.done)
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-s.stop:
				return
			case <-tick.C:
				s.mu.Lock()
				s.draw(nil)
				s.mu.Unlock()
			}
		}
	}()
	return s
}

// Write shows a part of the log.
func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.json:
		s.part = append(s.part, p...)
		for {
			line, rest, ok := bytes.Cut(s.part, []byte("\n"))
			if !ok {
				return len(p), nil
			}
			if err := s.line(line); err != nil {
				return 0, err
			}
			s.part = s.part[:copy(s.part, rest)]
		}
	case s.width == nil:
		return s.out.Write(p)
	}
	s.part = append(s.part, p...)
	if end := bytes.LastIndexByte(s.part, '\n') + 1; end > 0 {
		if err := s.draw(s.part[:end]); err != nil {
			return 0, err
		}
		s.part = s.part[:copy(s.part, s.part[end:])]
	}
	return len(p), nil
}

// line writes a line of the log as JSON. s.mu is held.
func (s *screen) line(line []byte) error {
	return json.NewEncoder(s.out).Encode(struct {
		Event string    `json:"event"`
		Time  time.Time `json:"time"`
		Line  string    `json:"line"`
	}{"log", time.Now(), string(line)})
}

// event shows a change of the job's state.
func (s *screen) event(e job.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.json {
		_ = json.NewEncoder(s.out).Encode(e)
		return
	}
	text := ""
	switch {
	case e.Done:
		return
	case e.Kind == job.Waiting:
		text = "waiting for a host"
	case e.Kind == job.Started:
		text = "preparing " + e.Host
	case e.Kind == job.StageRuns:
		s.stages++
		text = fmt.Sprintf("%d/%d %s", s.stages, len(s.job.Sequence), e.Stage)
	case e.Kind == job.StepRuns:
		text = fmt.Sprintf("%d/%d %s · %s %d/%d", s.stages, len(s.job.Sequence), e.Stage, e.Action, e.Step, e.Steps)
	case e.Kind == job.Failing:
		text = e.Stage + " failed"
	default: // the end
		s.status = nil
		if s.width != nil {
			_ = s.draw(fmt.Appendf(nil, "%s %s, %v\n", s.job.Name, e.Kind, e.Duration.Round(100*time.Millisecond)))
		}
		return
	}
	s.since = e.Time
	s.status = func(took time.Duration) string { return fmt.Sprintf("[%s] %v", text, took.Truncate(time.Second)) }
	_ = s.draw(nil)
}

// draw writes whole lines of the log above the status line. s.mu is held.
func (s *screen) draw(lines []byte) error {
	if s.width == nil || s.closed {
		return nil
	}
	var b []byte
	if s.shown {
		b = append(b, "\r\x1b[K"...)
		s.shown = false
	}
	b = append(b, lines...)
	if s.status != nil {
		b = append(b, cut(s.status(time.Since(s.since)), s.width()-1)...)
		s.shown = true
	}
	if len(b) == 0 {
		return nil
	}
	_, err := s.out.Write(b)
	return err
}

// cut shortens a text to so many characters.
func cut(s string, n int) string {
	for utf8.RuneCountInString(s) > max(n, 0) {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s
}

// close ends the display. It may be called more than once.
func (s *screen) close() {
	s.mu.Lock()
	if !s.closed {
		s.status = nil
		switch {
		case len(s.part) == 0:
			_ = s.draw(nil)
		case s.json:
			_ = s.line(s.part)
		default:
			_ = s.draw(append(s.part, '\n'))
		}
		s.closed = true
		close(s.stop)
	}
	s.mu.Unlock()
	<-s.done
}
