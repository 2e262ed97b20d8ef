package transport

import (
	"context"
	_ "embed"
	"time"
)

// Now and then a server does not notice that a command has ended: all of its output is there, with the marks of its end, and yet the operation
// goes on, with an open control socket. Closing that makes the server tell the command's own status, but would kill a command that has only
// closed its outputs. So the instance is asked whether the command is still there.

// goneAfter is how long after the end of all outputs that is asked first. Each further question comes after twice as long, but no more than
// goneMost.
const (
	goneAfter = 5 * time.Second
	goneMost  = 5 * time.Minute
)

// goneScript says "gone" if the command has certainly ended.
//
//go:embed gone.sh
var goneScript string

// watchFor asks after d whether the command has gone. mu is held.
func (e *execution) watchFor(d time.Duration) {
	if e.mark == "" || e.finished || e.killed || !e.exited.IsZero() {
		return
	}
	e.absence = time.AfterFunc(d, func() { e.step(func() { e.releaseIfGone(d) }) })
}

// releaseIfGone closes the control socket of a command that has gone.
func (e *execution) releaseIfGone(waited time.Duration) {
	gone := e.t.gone(e.asking, e.mark)
	e.mu.Lock()
	defer e.mu.Unlock()
	if !gone {
		e.watchFor(min(2*waited, goneMost))
		return
	}
	e.t.log.Debug("the command has ended, and the server did not notice", "operation", e.id)
	abort(e.control.conn)
}

// gone reports whether it is certain that a command has ended.
func (t *LXD) gone(ctx context.Context, mark string) bool {
	out, err := t.runScript(ctx, goneScript, []string{mark})
	return err == nil && string(out) == "gone\n"
}
