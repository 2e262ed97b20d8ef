package lxdtest

import (
	"errors"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// A socket is one WebSocket of an operation, or a listener for events.
type socket struct {
	s    *Server
	ws   *websocket.Conn
	gate gate // what goes out
	in   gate // what comes in
	gone chan struct{}
	once sync.Once

	writing sync.Mutex // one message after the other
}

// errRefused is upgrade's when a fault has answered in its place.
var errRefused = errors.New("lxdtest: refused by a fault")

// upgrade answers the handshake. A socket that comes back has to be closed.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request, p Point, name string) (*socket, error) {
	upgrader := websocket.Upgrader{
		HandshakeTimeout: 5 * time.Second,
		CheckOrigin:      func(*http.Request) bool { return true },
		Error: func(w http.ResponseWriter, _ *http.Request, status int, _ error) {
			// The real one's answer has no reason in it.
			http.Error(w, http.StatusText(status), status)
		},
	}
	verdict := (&gate{s: s, point: p}).strike(OnResponse)
	if w.(*answer).wrote {
		return nil, errRefused // by the fault itself
	}
	w.(*answer).mute = verdict != Proceed
	ws, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return nil, err
	}
	k := &socket{s: s, ws: ws, gone: make(chan struct{})}
	p.socket, p.answer = k, nil
	k.gate = gate{s: s, point: p}
	k.in = gate{s: s, point: p}
	if s.Version.StallTimeout > 0 {
		setStallTimeout(tracked(ws.NetConn()).Conn, s.Version.StallTimeout)
	}
	// The connection may be cut from elsewhere, and the end of the server cuts it.
	s.spawn(name, func() {
		select {
		case <-s.closing:
		case <-tracked(ws.NetConn()).gone:
		case <-k.gone:
		}
		k.close()
	})
	if verdict == Cut {
		// The server has the socket, and the client cannot know it.
		k.close()
	}
	if s.Version.PingInterval > 0 && (r.TLS != nil || s.Version.PingOnUnix) {
		s.spawn(name+" pings", k.ping)
	}
	return k, nil
}

// ping sends one at once and then one at every interval, until one cannot be
// written.
func (k *socket) ping() {
	t := time.NewTicker(k.s.Version.PingInterval)
	defer t.Stop()
	for {
		switch k.gate.strike(OnPing) {
		case Cut:
			k.close()
			return
		case Proceed:
			deadline := time.Now().Add(5 * time.Second)
			if k.ws.WriteControl(websocket.PingMessage, []byte(k.s.Version.PingPayload), deadline) != nil {
				return
			}
		}
		select {
		case <-t.C:
		case <-k.gone:
			return
		}
	}
}

// send sends one binary message.
func (k *socket) send(data []byte) error {
	return k.gate.pass(OnSend, data, func(b []byte) error {
		k.writing.Lock()
		defer k.writing.Unlock()
		return k.ws.WriteMessage(websocket.BinaryMessage, b)
	})
}

// mark says that no more output comes: an empty text message.
func (k *socket) mark() {
	switch k.gate.strike(OnMark) {
	case Cut:
		k.close()
		return
	case Proceed:
		k.writing.Lock()
		_ = k.ws.WriteMessage(websocket.TextMessage, nil)
		k.writing.Unlock()
	}
	if k.gate.strike(OnMarked) == Cut {
		k.close()
	}
}

// close closes the connection without a close message, as LXD does. If the client has
// sent what nobody has read, its kernel hears of a reset.
func (k *socket) close() {
	k.once.Do(func() {
		close(k.gone)
		_ = k.ws.Close()
	})
}

// copyIn hands the payload of binary messages to w, up to the first text message, close message, or
// error. Nothing behind the text message is read.
func (k *socket) copyIn(w io.Writer) error {
	for {
		kind, r, err := k.ws.NextReader()
		if err != nil {
			return err
		}
		if kind == websocket.TextMessage {
			return nil
		}
		if k.s.Version.StdinWhole {
			whole, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			if err := k.deliver(whole, w); err != nil {
				return err
			}
			continue
		}
		buf := make([]byte, 32<<10)
		for {
			n, err := r.Read(buf)
			if n > 0 {
				if err := k.deliver(buf[:n], w); err != nil {
					return err
				}
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				return err
			}
		}
	}
}

func (k *socket) deliver(data []byte, w io.Writer) error {
	if len(data) == 0 {
		return nil
	}
	err := k.in.pass(OnReceive, data, func(b []byte) error {
		_, err := w.Write(b)
		return err
	})
	if err == errCut {
		k.close()
	}
	return err
}

// socketName is the name of the socket that a dial is for, so that faults can tell.
func (s *Server) socketName(route Route, r *http.Request) string {
	if route != RouteWebsocket {
		return ""
	}
	if op := s.findOperation(r.PathValue("id")); op != nil {
		return op.socketName(r.URL.Query().Get("secret"))
	}
	return ""
}

// getWebsocket is the dial of one socket.
func (s *Server) getWebsocket(w http.ResponseWriter, r *http.Request) {
	secret := r.URL.Query().Get("secret")
	op := s.findOperation(r.PathValue("id"))
	switch {
	case op == nil && secret == "":
		s.fail(w, 400, s.Version.MissingSecret)
		return
	case op == nil:
		s.fail(w, 404, "Operation not found")
		return
	case s.Version.CheckOrigin && foreign(r):
		s.fail(w, 403, "Forbidden")
		return
	}
	if refusal := op.refuseDial(r, secret); refusal != nil {
		s.fail(w, refusal.Status, refusal.Text)
		return
	}
	name := op.socketName(secret)
	a := w.(*answer)
	p := a.gate.point
	p.Instance, p.Socket = op.exec.instance.Name, name
	op.exec.announce(name)
	k, err := s.upgrade(w, r, p, "socket "+name+" of operation "+op.id)
	if err != nil {
		// gorilla has answered with a line; the real one adds its own error to it.
		if !a.hijacked && err != errRefused {
			_, _ = a.Write(s.errorBody(500, err.Error()))
		}
		return
	}
	op.exec.connect(name, k)
}

// foreign reports whether a browser says that a page of another host asks.
func foreign(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return false
	}
	u, err := url.Parse(origin)
	return err != nil || u.Host != r.Host
}
