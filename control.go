package transport

import (
	"strconv"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// control is the socket that takes signals and window sizes. LXD answers nothing on it, closes it when the command's
// process has ended, and kills that process when we close it.
type control struct {
	conn *websocket.Conn
	mu   sync.Mutex // held during a write
}

// controlTimeout bounds a write to a control socket: the messages are small, so that it only waits when the link is dead.
const controlTimeout = 5 * time.Second

const (
	// pingTime is after how long without a ping a connection is suspected, where LXD greets with one: then it sends one every 10 s.
	pingTime = 30 * time.Second
	// pingGrace is how long after that one is still waited for: it may be there, and it is we who were stopped.
	pingGrace = 2 * time.Second
)

type controlMessage struct {
	Command string            `json:"command"`
	Args    map[string]string `json:"args,omitempty"`
	Signal  int               `json:"signal,omitempty"`
}

func (c *control) send(m controlMessage) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.conn.SetWriteDeadline(time.Now().Add(controlTimeout)); err != nil {
		return err
	}
	return c.conn.WriteJSON(m)
}

func (c *control) signal(number int) error {
	return c.send(controlMessage{Command: "signal", Signal: number})
}

// resize sends the size in decimal strings, which every version wants.
func (c *control) resize(size TerminalSize) error {
	return c.send(controlMessage{Command: "window-resize", Args: map[string]string{
		"width":  strconv.Itoa(int(size.Cols)),
		"height": strconv.Itoa(int(size.Rows)),
	}})
}

// run reads until the server closes the socket. LXD pings all sockets at the same time: ping is called when it does. When it does not any
// more for patience, silent is called: the connection is dead, though new ones may not be. Servers that do not ping on unix
// sockets, or never, do not begin either.
func (c *control) run(ping, silent func(), patience time.Duration) {
	var late *time.Timer
	suspect := make(chan struct{}, 1) // full: it is late, and a grace has begun
	patience = max(patience, pingTime)
	check := func() {
		select {
		case suspect <- struct{}{}:
			late.Reset(pingGrace)
		default:
			silent()
		}
	}
	c.conn.SetPingHandler(func(string) error {
		ping()
		select {
		case <-suspect:
		default:
		}
		if late == nil {
			late = time.AfterFunc(time.Hour, check)
		}
		late.Reset(patience)
		return nil
	})
	for {
		if _, _, err := c.conn.NextReader(); err != nil {
			break
		}
	}
	if late != nil {
		late.Stop()
	}
}
