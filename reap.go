package transport

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// What a cancelled command leaves behind in the instance is found by a variable in its environment, whose name no other command has and
// which processes inherit, and by descent from processes that have it. A script finds and kills it: for all commands that have been
// cancelled by then at once.

// markPrefix begins the names of the variables. reap.sh knows it, too.
const markPrefix = "TRANSPORT_COMMAND_"

// newMark returns the part of a variable's name that follows markPrefix.
func newMark() string { return rand.Text() }

// reapScript needs nothing but a shell and /proc, and is faster with grep.
//
//go:embed reap.sh
var reapScript string

const (
	// reapTime bounds one run of a script.
	reapTime = 5 * time.Second
	// reapFirst is how long KILL waits for the script, which sees more while the command lives: who descends from it.
	reapFirst = 3 * time.Second
)

// reaped is what became of the processes that a command had left behind.
type reaped struct {
	killed int // the command's own process among them, if it lived
	left   int // did not die
	err    error
}

// reaper collects the commands that are to be cleaned up after, so that a thousand that are cancelled at once are one run or two of the script,
// and not a thousand. It has no goroutine of its own: one of those who wait does the work for all.
type reaper struct {
	run func(ctx context.Context, marks []string) (map[string]*reaped, error)

	mu      sync.Mutex // guards what follows
	busy    bool       // somebody runs the script, or has been told to
	waiting []*reaping
}

type reaping struct {
	mark string
	lead chan struct{} // closed: do it for all
	done chan struct{} // closed when result is set
	reaped
}

// reap kills all processes that have a mark. It returns when the script has run, or when ctx ends.
func (r *reaper) reap(ctx context.Context, mark string) reaped {
	me := &reaping{mark: mark, lead: make(chan struct{}), done: make(chan struct{})}
	r.mu.Lock()
	r.waiting = append(r.waiting, me)
	if !r.busy {
		r.busy = true
		close(me.lead)
	}
	r.mu.Unlock()
	select {
	case <-me.done:
		return me.reaped
	case <-me.lead:
	case <-ctx.Done():
		r.mu.Lock()
		defer r.mu.Unlock()
		select {
		case <-me.done:
			return me.reaped
		case <-me.lead:
			r.next()
		default:
		}
		return reaped{err: context.Cause(ctx)}
	}

	r.mu.Lock()
	batch := r.waiting
	r.waiting = nil
	r.mu.Unlock()
	marks := make([]string, len(batch))
	for i, w := range batch {
		marks[i] = w.mark
	}
	found, err := r.run(ctx, marks)
	for _, w := range batch {
		if f := found[w.mark]; f != nil {
			w.reaped = *f
		}
		w.err = err
		close(w.done)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next()
	return me.reaped
}

// next hands the work on. mu is held.
func (r *reaper) next() {
	for len(r.waiting) > 0 {
		next := r.waiting[0]
		select {
		case <-next.lead: // it was told before, and has gone
			r.waiting = r.waiting[1:]
			continue
		default:
		}
		close(next.lead)
		return
	}
	r.busy = false
}

// runReaper runs the script in the instance.
func (t *LXD) runReaper(ctx context.Context, marks []string) (map[string]*reaped, error) {
	out, err := t.runScript(ctx, reapScript, marks)
	found, whole := parseReaped(out)
	if err == nil && !whole {
		err = errors.New("the script that looks for them was not heard to its end")
	}
	if code, exited := ExitCode(err); exited && (code == 126 || code == 127) {
		err = errors.New("there is no /bin/sh to look for them with")
	}
	return found, err
}

// runScript runs a script of ours in the instance, with marks on its input, and returns what it has printed, also when it fails. reapTime bounds it.
func (t *LXD) runScript(ctx context.Context, script string, marks []string) ([]byte, error) {
	ctx, cancel := within(ctx, reapTime)
	defer cancel()
	var out limitedBuffer
	e, err := t.start(ctx, Command{
		Args: Shell(script), Stdin: strings.NewReader(strings.Join(marks, "\n") + "\n"), Stdout: &out, WaitDelay: reapTime,
	}, internalCommand)
	if err == nil {
		err = e.run()
	}
	return out.buf.Bytes(), err
}

// parseReaped reads what the script says.
func parseReaped(out []byte) (found map[string]*reaped, whole bool) {
	found = map[string]*reaped{}
	for line := range bytes.Lines(out) {
		word, mark, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
		if word == "done" {
			return found, true
		}
		if found[mark] == nil {
			found[mark] = new(reaped)
		}
		switch word {
		case "killed":
			found[mark].killed++
		case "left":
			found[mark].left++
		}
	}
	return found, false
}

// String says what became of them.
func (r reaped) String() string {
	switch {
	case r.err != nil:
		return fmt.Sprintf("whether it has left processes behind was not confirmed: %v", r.err)
	case r.left > 0:
		return fmt.Sprintf("descendants killed: %d, of which %d did not die", r.killed, r.left)
	}
	return fmt.Sprintf("descendants killed: %d", r.killed)
}
