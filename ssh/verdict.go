package ssh

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/lxdtransport/transport"
)

func notStarted(err error) error {
	return &causes{
		text: "ssh: exec: " + strings.TrimPrefix(err.Error(), "ssh: ") + " (the command was not started)",
		errs: []error{transport.ErrNotStarted, err},
	}
}

// verdict makes the result of a command of all that is known, the first cause first: the command's own status, then the end of
// ctx, then what came of both.
func (e *execution) verdict() error {
	e.mu.Lock()
	copyErr := e.copyErr
	e.mu.Unlock()
	var errs []error
	known := false
	select {
	case <-e.s.known:
		known = true
		if e.s.status.Code != 0 {
			exit := *e.s.status
			if e.stderr != nil {
				exit.Stderr = e.stderr.Bytes()
			}
			errs = append(errs, &exit)
		}
	default:
	}
	if cause := context.Cause(e.ctx); e.interrupted && cause != copyErr {
		errs = append(errs, cause)
	}
	if !known {
		errs = append(errs, e.unknown())
	}
	var lost []string
	for _, o := range e.outputs {
		o.mu.Lock()
		if !o.whole || !e.sealed {
			lost = append(lost, fmt.Sprintf("%s after %d bytes", o.name, o.received))
		}
		o.mu.Unlock()
	}
	if lost != nil {
		why := "the wait for its end was given up"
		if e.s.conn.dead() {
			why = fmt.Sprintf("the connection was lost: %v", e.s.conn.link.lost())
		}
		errs = append(errs, fmt.Errorf("%w: %s: %s", transport.ErrOutputLost, strings.Join(lost, " and "), why))
	}
	if copyErr != nil {
		errs = append(errs, copyErr)
	}
	if len(errs) == 0 {
		return nil
	}
	if exit, ok := errs[0].(*transport.ExitError); ok && len(errs) == 1 {
		return exit
	}
	if e.swept != "" {
		errs = append(errs, errors.New(e.swept))
	}
	texts := make([]string, len(errs))
	for i, err := range errs {
		texts[i] = strings.TrimPrefix(err.Error(), "transport: ")
	}
	return &causes{text: "ssh: exec: " + strings.Join(texts, "; "), errs: errs}
}

// unknown says what is known of a command whose status is not.
func (e *execution) unknown() error {
	switch {
	case e.s.conn.dead():
		return fmt.Errorf("the connection was lost, so that the command's status is not known, and it may still run: %w", e.s.conn.link.lost())
	case e.killed:
		return errors.New("the host has not confirmed the end of the command after KILL, it may still run")
	case e.over():
		return errors.New("the host has ended the session without the command's status")
	}
	return errors.New("the command's status is not known, it may still run")
}

// edges keeps the first and the last of what is written to it.
type edges struct {
	mu         sync.Mutex // guards the rest: a command that was given up may still be printing
	head, tail []byte
	omitted    int64
}

const edge = 32 << 10

func (b *edges) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(p)
	fits := min(edge-len(b.head), n)
	b.head = append(b.head, p[:fits]...)
	b.tail = append(b.tail, p[fits:]...)
	if over := len(b.tail) - edge; over > edge { // twice as much, not to move every byte each time
		b.omitted += int64(over)
		b.tail = append(b.tail[:0], b.tail[over:]...)
	}
	return n, nil
}

// Bytes returns what was kept, with a line in the place of what was not.
func (b *edges) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	tail, omitted := b.tail, b.omitted
	if over := len(tail) - edge; over > 0 {
		tail, omitted = tail[over:], omitted+int64(over)
	}
	out := slices.Clone(b.head)
	if omitted > 0 {
		out = fmt.Appendf(out, "\n... omitting %d bytes ...\n", omitted)
	}
	return append(out, tail...)
}
