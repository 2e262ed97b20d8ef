package local

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/lxdtransport/transport"
)

// verdict makes the result of a command of all that is known, the first cause first: the command's own status, then the end of
// ctx, then what came of both.
func (e *execution) verdict() error {
	e.mu.Lock()
	copyErr := e.copyErr
	e.mu.Unlock()
	var errs []error
	known := true
	select {
	case <-e.exited:
		if e.waitErr != nil {
			known = false
			errs = append(errs, fmt.Errorf("the command's status is not known: %w", bare(e.waitErr)))
			break
		}
		if code, sig := exitStatus(e.state); code != 0 {
			exit := &transport.ExitError{Code: code, Signal: sig}
			if e.stderr != nil {
				exit.Stderr = e.stderr.Bytes()
			}
			errs = append(errs, exit)
		}
	default:
		known = false
	}
	if cause := context.Cause(e.ctx); e.interrupted && cause != copyErr {
		errs = append(errs, cause)
	}
	if !known && e.waitErr == nil {
		errs = append(errs, fmt.Errorf("the command has not ended within %v after KILL, it may still run", killGrace))
	}
	var lost []string
	for _, o := range e.outputs {
		o.mu.Lock()
		if !o.whole {
			lost = append(lost, fmt.Sprintf("%s after %d bytes", o.name, o.received))
		}
		o.mu.Unlock()
	}
	if lost != nil {
		errs = append(errs, fmt.Errorf("%w: %s: the wait for its end was given up", transport.ErrOutputLost, strings.Join(lost, " and ")))
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
	texts := make([]string, len(errs))
	for i, err := range errs {
		texts[i] = strings.TrimPrefix(err.Error(), "transport: ")
	}
	return &causes{text: "local: exec: " + strings.Join(texts, "; "), errs: errs}
}

// edges keeps the first and the last of what is written to it.
type edges struct {
	head, tail []byte
	omitted    int64
}

const edge = 32 << 10

func (b *edges) Write(p []byte) (int, error) {
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
