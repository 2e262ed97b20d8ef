package transport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// verdict makes the result of a command of all that is known, the first cause first: the command's own status, then the end of
// ctx, then what came of both: output that was cut, errors of the caller's reader and writers.
func (e *execution) verdict(f fate) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var errs []error
	if f.exited && f.code != 0 {
		exit := &ExitError{Code: f.code}
		if e.stderr != nil {
			exit.Stderr = e.stderr.Bytes()
		}
		errs = append(errs, exit)
	}
	swept := e.sweep != nil && e.sweep.result.killed+e.sweep.result.left > 0
	if e.outer.Err() != nil && (e.interrupted || e.cut || swept || !f.exited) {
		errs = append(errs, context.Cause(e.outer))
	}
	switch {
	case f.exited:
	case f.notStarted():
		return e.wrap(errors.Join(append(errs, notStarted(fmt.Errorf("%s could not start it: %s", e.t.rest.who(), quoted(f.text))))...))
	default:
		errs = append(errs, e.unknown(f))
	}
	var lost []string
	for _, o := range e.outputs {
		if whole, received := o.result(); !whole {
			lost = append(lost, fmt.Sprintf("%s after %d bytes", o.name, received))
		}
	}
	if lost != nil {
		why := "the connection broke off"
		if e.cut {
			why = "the wait for its end was given up"
		}
		errs = append(errs, fmt.Errorf("%w: %s: %s", ErrOutputLost, strings.Join(lost, " and "), why))
	}
	if e.copyErr != nil {
		errs = append(errs, e.copyErr)
	}
	// A ctx that ends when all is over but the telling changes nothing.
	if e.sweep != nil && (e.interrupted || e.cut || swept || e.copyErr != nil) {
		errs = append(errs, errors.New(e.ending(f)))
	}
	if len(errs) == 0 {
		return nil
	}
	if exit, ok := errs[0].(*ExitError); ok && len(errs) == 1 {
		return exit
	}
	texts := make([]string, len(errs))
	for i, err := range errs {
		texts[i] = strings.TrimPrefix(err.Error(), "transport: ")
	}
	return e.wrap(&causes{text: strings.Join(texts, "; "), errs: slices.Clip(errs)})
}

// ending says what the end of ctx has led to, as far as that is confirmed.
func (e *execution) ending(f fate) string {
	sig := cmp.Or(e.cmd.CancelSignal, SIGTERM)
	how := "its end was not confirmed"
	switch number, _ := signalNumber(sig); {
	case !f.exited:
	case !e.interrupted:
		how = "it had ended by itself"
	case e.killed && f.code == 128+signals[SIGKILL]:
		how = "it was ended by KILL"
	case f.code == 128+number:
		how = "it was ended by " + string(sig)
	default:
		how = fmt.Sprintf("it ended by itself after %s", sig)
	}
	left := e.sweep.result
	if e.sweep.alive && left.killed > 0 && (!f.exited || f.code == 128+signals[SIGKILL]) { // else it was gone by then
		left.killed--
	}
	return how + "; " + left.String()
}

// unknown says what is known of a command whose status is not.
func (e *execution) unknown(f fate) error {
	switch {
	case f.err == nil && f.text == "":
		return fmt.Errorf("the command has ended, but %s tells no status that is one", e.t.rest.who())
	case f.err == nil:
		return fmt.Errorf("the command's status is not known; %s says: %s", e.t.rest.who(), quoted(f.text))
	case e.killed:
		return fmt.Errorf("%s has not confirmed the end of the command after KILL: it, or what it left behind, may still run (%w)", e.t.rest.who(), f.err)
	case e.cut && !e.broken && (errors.Is(f.err, errRunning) || errors.Is(f.err, errNoAnswer)): // it closed the control socket, which it does at the end
		return fmt.Errorf("the command has ended, but %s does not tell its status; some versions keep it back until the last process that holds the command's output has ended: redirect the output of what is to run on (%w)", e.t.rest.who(), f.err)
	}
	return fmt.Errorf("the command's status is not known, it may still run: %w", f.err)
}

// edges keeps the first and the last of what is written to it.
type edges struct {
	mu         sync.Mutex
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
	if over := len(b.tail) - edge; over > edge {
		b.omitted += int64(over)
		b.tail = append(b.tail[:0], b.tail[over:]...)
	}
	return n, nil
}

func (b *edges) String() string { return string(b.Bytes()) }

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
