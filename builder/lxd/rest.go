package lxd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"
)

// rest sends requests over the official client's connection with a context, which the client's own methods do not take.
type rest struct {
	server  lxd.InstanceServer
	base    string // http://unix.socket or https://host:port
	project string // the connection's
}

func newREST(server lxd.InstanceServer) (*rest, error) {
	info, err := server.GetConnectionInfo()
	if err != nil {
		return nil, err
	}
	return &rest{server: server, base: strings.TrimSuffix(info.URL, "/"), project: info.Project}, nil
}

const (
	// maxAnswer bounds an answer: a list of all instances may be long.
	maxAnswer = 256 << 20

	// waitPart is how long one request waits for an operation: below the minute after which proxies commonly cut a silent connection.
	waitPart = 20 * time.Second

	// firstPause and mostPause are between two questions whether something has happened that nobody tells.
	firstPause = 20 * time.Millisecond
	mostPause  = 500 * time.Millisecond
)

// apiError is an answer that says no.
type apiError struct {
	code int
	text string
}

func (e *apiError) Error() string {
	if e.text == "" {
		return fmt.Sprintf("LXD answered %d %s", e.code, http.StatusText(e.code))
	}
	return fmt.Sprintf("LXD answered %d: %s", e.code, quoted(e.text))
}

func hasCode(err error, code int) bool {
	no, ok := errors.AsType[*apiError](err)
	return ok && no.code == code
}

func notFound(err error) bool { return hasCode(err, http.StatusNotFound) }

// quoted makes what the other side said fit for an error: bounded, on one line, no control characters.
func quoted(s string) string {
	const most = 512
	if len(s) > most {
		s = s[:most] + "…"
	}
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}

func in(project string) url.Values {
	if project == "" {
		return url.Values{}
	}
	return url.Values{"project": {project}}
}

func instancePath(name string) string { return "/1.0/instances/" + url.PathEscape(name) }

// do sends a request. Its answer's metadata is decoded into out, which may be nil; operation is the ID of an operation that was started.
func (r *rest) do(ctx context.Context, method, path string, query url.Values, body, out any) (operation string, err error) {
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	var content io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return "", err
		}
		content = bytes.NewReader(encoded)
	}
	u := r.base + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, content)
	if err != nil {
		return "", err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := r.server.DoHTTP(req)
	if err == nil {
		defer resp.Body.Close()
		return decode(resp, out)
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	return "", err
}

func decode(resp *http.Response, out any) (operation string, err error) {
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		if ctx := resp.Request.Context(); ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		return "", fmt.Errorf("LXD's answer broke off: %w", err)
	}
	var a struct {
		Type      string          `json:"type"`
		ErrorCode int             `json:"error_code"`
		Error     string          `json:"error"`
		Metadata  json.RawMessage `json:"metadata"`
	}
	if json.Unmarshal(data, &a) != nil || a.Type == "" {
		return "", &apiError{resp.StatusCode, "what is not LXD's JSON"}
	}
	if a.Type == "error" || resp.StatusCode >= 300 {
		e := &apiError{resp.StatusCode, a.Error}
		if e.code < 300 && a.ErrorCode != 0 {
			e.code = a.ErrorCode
		}
		return "", e
	}
	if a.Type == "async" {
		var op api.Operation
		if err := json.Unmarshal(a.Metadata, &op); err != nil || op.ID == "" {
			return "", errors.New("LXD's answer names no operation")
		}
		return op.ID, nil
	}
	if out != nil {
		if err := json.Unmarshal(a.Metadata, out); err != nil {
			return "", fmt.Errorf("LXD's answer is not as expected: %w", err)
		}
	}
	return "", nil
}

func (r *rest) get(ctx context.Context, path string, query url.Values, out any) error {
	_, err := r.do(ctx, http.MethodGet, path, query, nil, out)
	return err
}

// run sends a request and waits for its operation, if it starts one.
func (r *rest) run(ctx context.Context, method, path string, query url.Values, body any) error {
	id, err := r.do(ctx, method, path, query, body, nil)
	if err == nil && id != "" {
		_, err = r.wait(ctx, id)
	}
	return err
}

// opError is an operation that failed.
type opError struct{ text string }

func (e *opError) Error() string { return "LXD: " + quoted(e.text) }

// errForgotten is an operation that LXD does not know (any more): it forgets those that have ended 5 s ago.
var errForgotten = errors.New("LXD does not know the operation any more")

// wait waits for an operation until it ends or ctx does. The operation goes on then. Releases tell a failure, and the end of the time that
// the request waits, in several ways: after an answer that says no the plain question settles it.
func (r *rest) wait(ctx context.Context, id string) (*api.Operation, error) {
	path := "/1.0/operations/" + url.PathEscape(id)
	query := url.Values{"timeout": {strconv.Itoa(int(waitPart / time.Second))}}
	var pause backoff
	failing := time.Time{}
	for {
		var op api.Operation
		err := r.get(ctx, path+"/wait", query, &op)
		if err != nil && ctx.Err() == nil {
			op = api.Operation{}
			if err = r.get(ctx, path, nil, &op); notFound(err) {
				return nil, errForgotten
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil && hasCode(err, http.StatusForbidden):
			return nil, err
		case err != nil:
			// The daemon may be restarting, which ends operations; or a proxy may have had enough.
			if failing.IsZero() {
				failing = time.Now()
			} else if time.Since(failing) > waitPart {
				return nil, err
			}
			pause.wait(ctx)
		case op.StatusCode == api.Success:
			return &op, nil
		case op.StatusCode.IsFinal():
			return &op, &opError{op.Err}
		default:
			failing = time.Time{}
			pause.wait(ctx) // in case /wait does not
		}
	}
}

// backoff is the pause between two tries, longer each time.
type backoff struct{ next time.Duration }

func (b *backoff) wait(ctx context.Context) {
	if b.next == 0 {
		b.next = firstPause
	}
	ctx, cancel := context.WithTimeout(ctx, b.next)
	defer cancel()
	<-ctx.Done()
	b.next = min(b.next*3/2, mostPause)
}
