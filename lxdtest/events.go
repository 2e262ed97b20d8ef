package lxdtest

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/gorilla/websocket"
)

func lower(s string) string { return strings.ToLower(s) }

// A listener is a connection to /1.0/events.
type listener struct {
	types   []string
	project string // "": all
	queue   chan []byte
}

type eventJSON struct {
	Type      string    `json:"type"`
	Timestamp time.Time `json:"timestamp"`
	Metadata  any       `json:"metadata"`
	Location  string    `json:"location"`
	Project   string    `json:"project"`
}

// emit tells the listeners. One that does not keep up loses events, as with the real
// server.
func (s *Server) emit(kind, project string, metadata any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.listeners) == 0 {
		return
	}
	b := encode(eventJSON{Type: kind, Timestamp: time.Now().UTC(), Metadata: metadata, Location: "none", Project: project})
	for l := range s.listeners {
		if !slices.Contains(l.types, kind) || l.project != "" && l.project != project {
			continue
		}
		select {
		case l.queue <- b:
		default:
		}
	}
}

// lifecycle is an event about an instance.
func (s *Server) lifecycle(by *requestorJSON, action string, i *instance, context map[string]any) {
	e := struct {
		Action    string         `json:"action"`
		Source    string         `json:"source"`
		Context   map[string]any `json:"context,omitempty"`
		Requestor *requestorJSON `json:"requestor,omitempty"`
		Name      string         `json:"name,omitempty"`
		Project   string         `json:"project,omitempty"`
	}{Action: action, Source: i.url(), Context: context}
	if s.Version.EventDetails {
		e.Name, e.Project, e.Requestor = i.Name, i.Project, by
	}
	s.emit("lifecycle", i.Project, e)
}

func (s *Server) getEvents(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	types := []string{"logging", "operation", "lifecycle"}
	if t := q.Get("type"); t != "" {
		types = strings.Split(t, ",")
		for _, name := range types {
			if !slices.Contains([]string{"logging", "operation", "lifecycle", "ovn"}, name) {
				s.fail(w, s.Version.BadEventType, `"`+name+`" isn't a supported event type`)
				return
			}
		}
	}
	l := &listener{types: types, project: project(r), queue: make(chan []byte, 1000)}
	if q.Get("all-projects") != "" {
		l.project = ""
	}
	k, err := s.upgrade(w, r, w.(*answer).gate.point, "listener for events")
	if err != nil {
		return
	}
	defer k.close()
	s.mu.Lock()
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	s.spawn("reader of a listener for events", func() {
		defer k.close()
		for {
			if _, _, err := k.ws.ReadMessage(); err != nil {
				return
			}
		}
	})
	for {
		select {
		case <-k.gone:
			return
		case b := <-l.queue:
			err := k.gate.pass(OnSend, b, func(b []byte) error {
				k.writing.Lock()
				defer k.writing.Unlock()
				return k.ws.WriteMessage(websocket.TextMessage, b)
			})
			if err != nil {
				return
			}
		}
	}
}
