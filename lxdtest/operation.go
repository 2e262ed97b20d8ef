package lxdtest

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Status codes of operations and instances.
const (
	codeStopped   = 102
	codeRunning   = 103
	codePending   = 105
	codeFrozen    = 110
	codeError     = 112
	codeSuccess   = 200
	codeFailure   = 400
	codeCancelled = 401
)

var statusNames = map[int]string{
	codeStopped: "Stopped", codeRunning: "Running", codePending: "Pending", codeFrozen: "Frozen", codeError: "Error",
	codeSuccess: "Success", codeFailure: "Failure", codeCancelled: "Cancelled",
}

// executing is the description of a command's operation.
const executing = "Executing command"

// An operation is what LXD does in the background.
type operation struct {
	s           *Server
	id          string
	class       string
	description string
	project     string
	requestor   string
	by          *requestorJSON
	created     time.Time
	resources   map[string][]string
	mayCancel   bool
	exec        *execution // nil: another kind of operation
	done        chan struct{}

	mu        sync.Mutex // guards what follows
	updated   time.Time
	status    int
	metadata  map[string]any
	err       string
	forgotten bool
	expiry    *time.Timer
}

// operationJSON is an operation on the wire.
type operationJSON struct {
	ID          string              `json:"id"`
	Class       string              `json:"class"`
	Description string              `json:"description"`
	CreatedAt   time.Time           `json:"created_at"`
	UpdatedAt   time.Time           `json:"updated_at"`
	Status      string              `json:"status"`
	StatusCode  int                 `json:"status_code"`
	Resources   map[string][]string `json:"resources"`
	Metadata    map[string]any      `json:"metadata"`
	MayCancel   bool                `json:"may_cancel"`
	Err         string              `json:"err"`
	ErrCode     *int                `json:"err_code,omitempty"`
	Location    string              `json:"location"`
	Requestor   *requestorJSON      `json:"requestor,omitempty"`
}

type requestorJSON struct {
	Username string `json:"username"`
	Protocol string `json:"protocol"`
	Address  string `json:"address"`
}

// newOperation registers an operation that runs already. The two events of its birth are
// sent, as by the real one, after all is in place.
func (s *Server) newOperation(r *http.Request, class, description string, i *instance, bothResources bool, metadata map[string]any) *operation {
	who, _ := s.identity(r)
	now := time.Now().UTC()
	op := &operation{
		s: s, id: s.newID(now), class: class, description: description, project: i.Project, requestor: who, by: s.requestorOf(r),
		created: now, updated: now, status: codeRunning, metadata: metadata, done: make(chan struct{}),
		resources: s.resources(i, class, description, bothResources),
	}
	if s.Version.EntityURL {
		if op.metadata == nil {
			op.metadata = map[string]any{}
		}
		op.metadata["entity_url"] = i.url()
	}
	s.mu.Lock()
	s.operations[op.id] = op
	s.mu.Unlock()
	return op
}

// born tells the listeners.
func (op *operation) born() {
	state := op.render(true)
	state.StatusCode, state.Status = codePending, statusNames[codePending]
	op.s.emit("operation", op.project, state)
	state.StatusCode, state.Status = codeRunning, statusNames[codeRunning]
	op.s.emit("operation", op.project, state)
}

// resources are what the operation is about. A release that says it in the metadata was seen to leave out that of an exec; lxc launch
// cannot do without.
func (s *Server) resources(i *instance, class, description string, both bool) map[string][]string {
	if s.Version.EntityURL && description == executing {
		return map[string][]string{}
	}
	res := map[string][]string{"instances": {i.url()}}
	if both && i.model != nil {
		res["instances"] = append(res["instances"], i.model.url())
	}
	if both && (!s.Version.NoContainers || class == "task" && description == executing) {
		old := "/1.0/instances/"
		if s.Version.OldResources {
			old = "/1.0/containers/"
		}
		res["containers"] = []string{old + i.Name}
		if i.model != nil {
			res["containers"] = append(res["containers"], old+i.model.Name)
		}
	}
	return res
}

// newID makes a UUID.
func (s *Server) newID(now time.Time) string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	version := byte(0x40)
	if s.Version.UUIDv7 {
		version = 0x70
		var ms [8]byte
		binary.BigEndian.PutUint64(ms[:], uint64(now.UnixMilli()))
		copy(b[:6], ms[2:])
	}
	b[6] = b[6]&0x0f | version
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func newSecret() string {
	var b [32]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func (s *Server) findOperation(id string) *operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.operations[id]
}

func (op *operation) url() string { return "/1.0/operations/" + op.id }

// render is the operation as its creator sees it, or as others do.
func (op *operation) render(others bool) operationJSON {
	op.mu.Lock()
	defer op.mu.Unlock()
	j := operationJSON{
		ID: op.id, Class: op.class, Description: op.description, CreatedAt: op.created, UpdatedAt: op.updated,
		Status: statusNames[op.status], StatusCode: op.status, Resources: op.resources, Metadata: maps.Clone(op.metadata),
		MayCancel: op.mayCancel, Err: op.err, Location: "none",
	}
	if op.s.Version.CancelUntilEnd && op.status >= codeSuccess {
		j.MayCancel = false
	}
	if j.Metadata == nil && op.s.Version.EmptyMetadata {
		j.Metadata = map[string]any{}
	}
	if others && op.s.Version.HideSecrets {
		delete(j.Metadata, "fds")
	}
	if op.s.Version.ErrCode {
		code := 0
		if op.status >= codeFailure {
			code = op.status
		}
		j.ErrCode = &code
	}
	if op.s.Version.Requestor {
		j.Requestor = op.by
	}
	return j
}

func (s *Server) requestorOf(r *http.Request) *requestorJSON {
	if r.TLS == nil {
		return &requestorJSON{Username: "root", Protocol: "unix", Address: "@"}
	}
	who, _ := s.identity(r)
	return &requestorJSON{Username: who, Protocol: "tls", Address: "127.0.0.1"}
}

func (op *operation) final() bool {
	op.mu.Lock()
	defer op.mu.Unlock()
	return op.status >= codeSuccess
}

// update adds to the metadata and tells the listeners.
func (op *operation) update(metadata map[string]any) {
	op.mu.Lock()
	if op.status >= codeSuccess {
		op.mu.Unlock()
		return
	}
	if op.metadata == nil {
		op.metadata = map[string]any{}
	}
	maps.Copy(op.metadata, metadata)
	op.updated = time.Now().UTC()
	op.mu.Unlock()
	op.s.emit("operation", op.project, op.render(true))
}

// finish makes the operation final, once. It is forgotten some seconds later.
func (op *operation) finish(status int, text string) {
	op.mu.Lock()
	if op.status >= codeSuccess || op.forgotten {
		op.mu.Unlock()
		return
	}
	op.status, op.err = status, text
	close(op.done)
	op.expiry = time.AfterFunc(op.s.Version.OperationLifetime, op.remove)
	op.mu.Unlock()
	op.s.emit("operation", op.project, op.render(true))
}

func (op *operation) remove() {
	op.s.mu.Lock()
	delete(op.s.operations, op.id)
	op.s.mu.Unlock()
	if op.exec != nil {
		op.exec.orphan()
	}
}

// die takes the operation out of the world, as the death of the daemon does.
func (op *operation) die() {
	op.mu.Lock()
	defer op.mu.Unlock()
	if op.forgotten {
		return
	}
	op.forgotten = true
	if op.expiry != nil {
		op.expiry.Stop()
	}
	if op.exec != nil {
		op.exec.orphan()
	}
}

func (op *operation) socketName(secret string) string {
	if op.exec == nil || secret == "" {
		return ""
	}
	for name, s := range op.exec.secrets {
		if s == secret {
			return name
		}
	}
	return ""
}

// refuseDial says why a socket cannot be had.
func (op *operation) refuseDial(r *http.Request, secret string) *Refusal {
	s := op.s
	status, text, state := 500, "", op.render(true)
	if s.Version.FinishedOwnCode {
		status = 400
	}
	switch {
	case op.class != "websocket":
		return &Refusal{status, "Only websocket operations can be connected"}
	case op.final():
		text = "Only running operations can be connected"
		if s.Version.FinishedOwnCode && state.Err != "" {
			status, text = 500, "Failed connecting to operation: "+state.Err
		}
		return &Refusal{status, text}
	case secret == "":
		return &Refusal{500, "missing secret"}
	case op.socketName(secret) == "":
		return &s.Version.BadSecret
	}
	if who, _ := s.identity(r); s.Version.RequestorCheck != "" && who != op.requestor {
		return &Refusal{403, s.Version.RequestorCheck}
	}
	return nil
}

// accept answers a request that started an operation.
func (s *Server) accept(w http.ResponseWriter, op *operation, state operationJSON) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Location", op.url())
	body := encodePlain(envelope{Type: "async", Status: "Operation created", StatusCode: 100, Operation: op.url(), Metadata: state})
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusAccepted)
	_, _ = w.Write(body)
}

func (s *Server) getOperation(w http.ResponseWriter, r *http.Request) {
	op := s.findOperation(r.PathValue("id"))
	if op == nil {
		s.fail(w, 404, "Operation not found")
		return
	}
	s.reply(w, op.render(true))
}

// getOperations lists by status.
func (s *Server) getOperations(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	operations := slices.Collect(maps.Values(s.operations))
	s.mu.Unlock()
	slices.SortFunc(operations, func(a, b *operation) int { return a.created.Compare(b.created) })
	all := r.URL.Query().Get("all-projects") != ""
	urls, full := map[string][]string{}, map[string][]operationJSON{}
	for _, op := range operations {
		if !all && op.project != project(r) {
			continue
		}
		state := op.render(true)
		key := lower(state.Status)
		urls[key] = append(urls[key], op.url())
		full[key] = append(full[key], state)
	}
	if r.URL.Query().Get("recursion") == "1" {
		s.reply(w, full)
		return
	}
	s.reply(w, urls)
}

// getWait waits for an operation to end and tells it in the way of the release.
func (s *Server) getWait(w http.ResponseWriter, r *http.Request) {
	timeout := -1
	if t := r.URL.Query().Get("timeout"); t != "" {
		n, err := strconv.Atoi(t)
		if err != nil {
			s.fail(w, 500, err.Error())
			return
		}
		timeout = n
	}
	op := s.findOperation(r.PathValue("id"))
	if op == nil {
		s.fail(w, 404, "Operation not found")
		return
	}
	style := s.Version.Wait
	if style == WaitErrorBody || style == WaitEarly {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(200)
		w.(*answer).flush()
	}
	ctx := r.Context()
	if timeout >= 0 {
		c, cancel := context.WithTimeout(ctx, time.Duration(timeout)*time.Second)
		defer cancel()
		ctx = c
	}
	if c, ok := r.Context().Value(connKey{}).(*conn); ok && c != nil {
		s.mu.Lock()
		c.waiting = true
		s.waits++
		s.mu.Unlock()
	}
	timedOut := false
	select {
	case <-op.done:
	default:
		select {
		case <-op.done:
		case <-ctx.Done():
			timedOut = true
		case <-s.closing:
			w.(*answer).cut = true
			return
		}
	}
	state := op.render(true)
	refusal := Refusal{state.StatusCode, state.Err}
	if timedOut {
		refusal = Refusal{500, "context deadline exceeded"}
	}
	failed := timedOut || state.Err != ""
	switch {
	case failed && style == WaitHTTPError:
		s.fail(w, refusal.Status, refusal.Text)
	case failed && style == WaitErrorBody:
		if !strings.HasPrefix(refusal.Text, "Command not ") { // found, or executable: these have a status of their own
			refusal.Status = 500
		}
		_, _ = w.Write(s.errorBody(refusal.Status, refusal.Text))
	default:
		s.reply(w, state)
	}
}

// deleteOperation cancels, where the release can do so.
func (s *Server) deleteOperation(w http.ResponseWriter, r *http.Request) {
	op := s.findOperation(r.PathValue("id"))
	if op == nil {
		s.fail(w, 404, "Operation not found")
		return
	}
	if op.final() {
		s.fail(w, 400, "Only running operations can be cancelled")
		return
	}
	style := s.Version.Delete
	if style == DeleteCancels && op.class != "websocket" {
		style = DeleteRefused
	}
	if style == DeleteRefused || op.exec == nil {
		s.fail(w, 400, "This operation can't be cancelled")
		return
	}
	op.exec.cancel(style)
	select {
	case <-op.done:
	case <-r.Context().Done():
	case <-s.closing:
	}
	s.reply(w, empty)
}
