package lxdtest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// A Route is a kind of request, as faults and [Server.Requests] name it.
type Route string

const (
	RouteServer     Route = "server"    // /1.0 and what else describes the server: images, projects, profiles
	RouteInstances  Route = "instances" // /1.0/instances and what is directly below it
	RouteExec       Route = "exec"      // POST /1.0/instances/NAME/exec, and the process that it starts
	RouteOperation  Route = "operation" // /1.0/operations and one operation
	RouteWait       Route = "wait"      // /1.0/operations/ID/wait
	RouteWebsocket  Route = "websocket" // a socket of an operation
	RouteEvents     Route = "events"    // /1.0/events
	RouteFiles      Route = "files"     // /1.0/instances/NAME/files
	RouteSFTP       Route = "sftp"      // /1.0/instances/NAME/sftp
	RouteLogs       Route = "logs"      // recorded output
	routeNotDefined Route = "not found"
)

type handlerFunc func(w http.ResponseWriter, r *http.Request)

type methods map[string]handlerFunc

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	add := func(pattern string, route Route, m methods) {
		mux.Handle(pattern, s.entry(route, m))
	}
	add("/{$}", RouteServer, methods{"GET": s.getRoot})
	add("/1.0", RouteServer, methods{"GET": s.getServer})
	add("/1.0/events", RouteEvents, methods{"GET": s.getEvents})
	add("/1.0/operations", RouteOperation, methods{"GET": s.getOperations})
	add("/1.0/operations/{id}", RouteOperation, methods{"GET": s.getOperation, "DELETE": s.deleteOperation})
	add("/1.0/operations/{id}/wait", RouteWait, methods{"GET": s.getWait})
	add("/1.0/operations/{id}/websocket", RouteWebsocket, methods{"GET": s.getWebsocket})
	collections := []string{"instances"}
	if s.Version.ContainersAlias {
		collections = append(collections, "containers", "virtual-machines")
	}
	for _, c := range collections {
		add("/1.0/"+c, RouteInstances, methods{"GET": s.getInstances, "POST": s.postInstance})
		one := "/1.0/" + c + "/{name}"
		add(one, RouteInstances, methods{"GET": s.getInstance, "PUT": s.putInstance, "PATCH": s.putInstance, "DELETE": s.deleteInstance})
		add(one+"/state", RouteInstances, methods{"GET": s.getState, "PUT": s.putState})
		add(one+"/exec", RouteExec, methods{"POST": s.postExec})
		add(one+"/files", RouteFiles, methods{"GET": s.getFile, "HEAD": s.getFile, "POST": s.postFile, "DELETE": s.deleteFile})
		add(one+"/sftp", RouteSFTP, methods{"GET": s.getSFTP})
		add(one+"/snapshots", RouteInstances, methods{"GET": s.getNothing})
		add(one+"/backups", RouteInstances, methods{"GET": s.getNothing})
		log := methods{"GET": s.getLog, "DELETE": s.deleteLog}
		add(one+"/logs/{file}", RouteLogs, log)
		if s.Version.ExecOutputDir {
			add(one+"/logs/exec-output/{file}", RouteLogs, log)
		}
	}
	add("/1.0/images", RouteServer, methods{"GET": s.getImages})
	add("/1.0/images/{fingerprint}", RouteServer, methods{"GET": s.getImage})
	add("/1.0/images/aliases", RouteServer, methods{"GET": s.getAliases})
	add("/1.0/images/aliases/{name}", RouteServer, methods{"GET": s.getAlias})
	add("/1.0/projects", RouteServer, methods{"GET": s.getProjects})
	add("/1.0/projects/{name}", RouteServer, methods{"GET": s.getProject})
	add("/1.0/profiles", RouteServer, methods{"GET": s.getProfiles})
	add("/1.0/profiles/{name}", RouteServer, methods{"GET": s.getProfile})
	nowhere := s.entry(routeNotDefined, nil)
	mux.Handle("/", nowhere)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.Version.StrictPaths && strings.Contains(r.URL.Path, "//") {
			nowhere.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// entry is where every request comes in: it is counted, recorded, and struck by
// faults here.
func (s *Server) entry(route Route, m methods) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		end, ok := s.enter(r.Method + " " + r.URL.Path)
		if !ok {
			panic(http.ErrAbortHandler)
		}
		defer end()
		point := Point{
			Route: route, Method: r.Method, Instance: r.PathValue("name"), Socket: s.socketName(route, r),
			Request: r, server: s,
		}
		a := &answer{ResponseWriter: w, gate: gate{s: s, point: point}}
		a.gate.point.answer = a
		defer func() {
			s.mu.Lock()
			s.requests = append(s.requests, Request{
				Route: route, Method: r.Method, Path: r.URL.Path, Query: redact(r.URL.Query()), Header: r.Header.Clone(),
				Status: a.status, Written: a.gate.count,
			})
			s.mu.Unlock()
			switch {
			case a.cut && a.hijacked:
				a.raw.Close()
			case a.cut:
				panic(http.ErrAbortHandler)
			}
		}()
		switch a.gate.strike(OnRequest) {
		case Cut:
			a.cut = true
			return
		case Skip:
			a.cut = !a.wrote
			return
		}
		if body := r.Body; body != nil && body != http.NoBody {
			r.Body = &receiver{ReadCloser: body, gate: gate{s: s, point: a.gate.point}}
		}
		if m == nil {
			s.fail(a, 404, s.Version.Texts.NotFound)
			return
		}
		if r.Method != "GET" && route != RouteOperation && s.isEnding() {
			s.fail(a, 503, "LXD is shutting down")
			return
		}
		// The sockets of an operation are guarded by their secrets, and /1.0 tells
		// strangers that they are.
		if _, trusted := s.identity(r); !trusted && route != RouteWebsocket && r.URL.Path != "/1.0" && r.URL.Path != "/" {
			s.fail(a, 403, s.Version.Texts.Forbidden)
			return
		}
		h, ok := m[r.Method]
		if !ok {
			s.fail(a, 501, "not implemented")
			return
		}
		h(a, r)
	})
}

// redact keeps the secrets of sockets out of what people print in tests.
func redact(q url.Values) string {
	if q.Has("secret") {
		q.Set("secret", "…")
	}
	return q.Encode()
}

func (s *Server) isClosed() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// An answer is a ResponseWriter that faults can strike.
type answer struct {
	http.ResponseWriter
	gate       gate
	status     int
	wrote      bool // the header is written, or a fault has answered
	suppressed bool // what the handler says is thrown away
	cut        bool // the connection ends without (the rest of) the answer
	hijacked   bool
	raw        net.Conn // when hijacked
	mute       bool     // once hijacked, nothing is sent
	stale      string   // Content-Length that an older net/http leaves on the refusal of a Range
}

var errCut = errors.New("lxdtest: connection cut by a fault")

func (a *answer) WriteHeader(status int) {
	if a.wrote {
		return
	}
	a.status = status
	if status == http.StatusRequestedRangeNotSatisfiable && a.stale != "" {
		a.Header().Set("Content-Length", a.stale)
	}
	v := a.gate.strike(OnResponse)
	a.wrote = true
	switch v {
	case Cut:
		a.cut = true
	case Skip:
		a.suppressed = true
	default:
		a.ResponseWriter.WriteHeader(status)
	}
}

func (a *answer) Write(p []byte) (int, error) {
	if !a.wrote {
		a.WriteHeader(200)
	}
	if a.cut {
		return 0, errCut
	}
	if a.suppressed {
		return len(p), nil
	}
	err := a.gate.pass(OnSend, p, func(b []byte) error {
		_, err := a.ResponseWriter.Write(b)
		return err
	})
	if errors.Is(err, errCut) {
		a.flush()
		a.cut = true
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (a *answer) flush() {
	if !a.cut && !a.suppressed {
		_ = http.NewResponseController(a.ResponseWriter).Flush()
	}
}

func (a *answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(a.ResponseWriter).Hijack()
	if err == nil {
		a.hijacked, a.wrote, a.status, a.raw = true, true, 101, c
		if a.mute {
			tracked(c).mute.Store(true)
		}
	}
	return c, rw, err
}

func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// A receiver is the body of a request that faults can strike.
type receiver struct {
	io.ReadCloser
	gate gate
	cut  error // it was struck
}

func (b *receiver) Read(p []byte) (int, error) {
	if b.cut != nil {
		return 0, b.cut
	}
	n, err := b.ReadCloser.Read(p)
	if n == 0 {
		return 0, err
	}
	heard := 0
	b.cut = b.gate.pass(OnReceive, p[:n], func(c []byte) error { heard += copy(p[heard:], c); return nil })
	if b.cut != nil && heard == 0 {
		return 0, b.cut
	}
	return heard, err
}

// envelope is the body of every answer.
type envelope struct {
	Type       string `json:"type"`
	Status     string `json:"status"`
	StatusCode int    `json:"status_code"`
	Operation  string `json:"operation"`
	ErrorCode  int    `json:"error_code"`
	Error      string `json:"error"`
	Metadata   any    `json:"metadata"`
}

// reply sends a synchronous answer.
func (s *Server) reply(w http.ResponseWriter, metadata any) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(encodePlain(envelope{Type: "sync", Status: "Success", StatusCode: 200, Metadata: metadata}))
}

// empty is the metadata of an answer that only says that all went well.
var empty = struct{}{}

// fail sends an error.
func (s *Server) fail(w http.ResponseWriter, status int, text string) {
	body := s.errorBody(status, text)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

func (s *Server) errorBody(status int, text string) []byte {
	body := encode(envelope{Type: "error", ErrorCode: status, Error: text})
	if !s.Version.OneLineErrors {
		body = append(body, '\n')
	}
	return body
}

// encodePlain leaves <, > and & as they are. The real server does so in answers, and not in errors and
// events.
func encodePlain(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(err)
	}
	return b.Bytes()
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return append(b, '\n')
}

// text fills in a template of [Texts].
func fill(template string, pairs ...string) string {
	return strings.NewReplacer(pairs...).Replace(template)
}

func project(r *http.Request) string {
	if p := r.URL.Query().Get("project"); p != "" {
		return p
	}
	return "default"
}
