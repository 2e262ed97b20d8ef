package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// operation is what we need of an LXD operation.
type operation struct {
	ID         string `json:"id"`
	StatusCode int    `json:"status_code"`
	Err        string `json:"err"`
	Metadata   struct {
		FDs    map[string]string `json:"fds"`
		Return json.RawMessage   `json:"return"` // decoded by hand: what is not a status must not spoil the rest
	} `json:"metadata"`
}

// final reports whether the operation has ended: Success, Failure or Cancelled.
func (op *operation) final() bool { return op.StatusCode >= 200 }

// fate is what is known of a command.
type fate struct {
	exited bool // it ran and ended, with this status
	code   int
	text   string // what LXD says of an operation that failed otherwise
	err    error  // why nothing is known, else
}

// fate tells a final operation's. A command that exited with 126 or 127 is a failed operation with a status.
func (op *operation) fate() fate {
	code, err := strconv.Atoi(string(op.Metadata.Return))
	if err == nil && code >= 0 && code <= 255 {
		return fate{exited: true, code: code}
	}
	return fate{text: op.Err}
}

// notStarted reports whether it is certain that the command did not start. LXD tells that in words only.
func (f fate) notStarted() bool {
	if f.exited || f.err != nil {
		return false
	}
	for _, s := range []string{
		"Timed out waiting for websockets to connect",
		"argument list too long",         // of the server's helper
		"fork/exec ",                     // the helper's, whatever the reason
		"pipe2: ",                        // for its output: too many open files
		"PID of executing child process", // "Failed to retrieve", "Failed retrieving": the helper did not get so far
		"agent isn't currently running",  // of a virtual machine
		"agent is not currently running", // newer
	} {
		if strings.Contains(f.text, s) {
			return true
		}
	}
	return false
}

const (
	// defaultLiveness is what a LXDOptions.Liveness of 0 means. A third of it is how long one request waits: below the minute after which
	// proxies commonly cut a silent connection.
	defaultLiveness = time.Minute
	// minLiveness is the shortest: LXD counts the time that it is asked to wait in whole seconds.
	minLiveness = 3 * time.Second
	// askPause is between requests when they fail at once.
	askPause = 250 * time.Millisecond

	// forgetAfter is how long LXD remembers an operation that has ended. When the link to a command has ended there is no
	// point in asking for longer.
	forgetAfter = 5 * time.Second
)

// errRunning: that was the server's last word.
var errRunning = errors.New("the server says that it is running")

// errNoAnswer: the first question has not been answered yet.
var errNoAnswer = errors.New("no answer has come")

var errGone = errors.New("the server does not know the operation any more: it was restarted, or asked more than 5 s after the command's end")

// waitOperation waits until an operation ends, or ctx does. The answer comes in several forms: the operation; an error body
// with status 200 or another for an operation that failed, or that has not ended in the time asked for. An error, and an answer that
// does not come, is therefore followed by a plain question.
//
// When ended has, the operation is about to end or LXD has been restarted: a request that was under way by then, and has not been answered, is on a
// connection that nobody answers on, and there is no time to wait for it.
func (t *LXD) waitOperation(ctx context.Context, id string, ended context.Context) fate {
	path := operationPath(id)
	every := t.liveness / 3 // and as much again for the answer to come, and for another try
	wait := url.Values{"timeout": {strconv.Itoa(int(every / time.Second))}}
	failing := time.Now() // since when no answer has come
	last := errNoAnswer
	var lost time.Time // since when, after ended, none has come
	for {
		asked := time.Now()
		left := t.liveness - time.Since(failing)
		op, err := t.askWait(ctx, ended, path, wait, min(2*every, left))
		if err != nil && ctx.Err() == nil {
			if !errors.As(err, new(*apiError)) && ended.Err() == nil {
				t.rest.stale()
			}
			// Whether anybody answers is the question now: no waiting, for which there is no time left.
			op, err = t.getOperation(ctx, path, nil, min(every, max(t.liveness-time.Since(failing), time.Second)))
			if no := (*apiError)(nil); errors.As(err, &no) && no.code == http.StatusNotFound && !no.foreign {
				return fate{err: errGone}
			}
		}
		switch {
		case err == nil && op.final():
			return op.fate()
		case ctx.Err() != nil:
			return fate{err: last}
		case err == nil:
			failing, lost = time.Now(), time.Time{}
			last = errRunning
		default:
			last = err
			if ended.Err() != nil && lost.IsZero() {
				lost = time.Now()
			}
			if time.Since(failing) >= t.liveness || !lost.IsZero() && time.Since(lost) >= forgetAfter {
				return fate{err: fmt.Errorf("the server has not answered for %v: %w", time.Since(failing).Round(time.Second), err)}
			}
		}
		if time.Since(asked) < askPause {
			pause(ctx, askPause)
		}
	}
}

// askWait asks the server to answer when the operation has ended. It gives up when ended does, or does not last long from then on.
func (t *LXD) askWait(ctx, ended context.Context, path string, wait url.Values, most time.Duration) (*operation, error) {
	if ended.Err() != nil {
		return t.getOperation(ctx, path+"/wait", url.Values{"timeout": {"1"}}, min(most, 2*time.Second))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ended, cancel)()
	return t.getOperation(ctx, path+"/wait", wait, most)
}

func operationPath(id string) string { return "/1.0/operations/" + url.PathEscape(id) }

func (t *LXD) getOperation(ctx context.Context, path string, query url.Values, most time.Duration) (*operation, error) {
	ctx, cancel := within(ctx, most)
	defer cancel()
	var op operation
	if err := t.rest.call(ctx, http.MethodGet, path, query, nil, &op); err != nil {
		return nil, err
	}
	return &op, nil
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	<-ctx.Done()
}
