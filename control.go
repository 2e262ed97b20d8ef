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

// run reads until the server closes the socket. LXD pings all sockets at the same time: ping is called when it does.
func (c *control) run(ping func()) {
	c.conn.SetPingHandler(func(string) error { ping(); return nil })
	for {
		if _, _, err := c.conn.NextReader(); err != nil {
			return
		}
	}
}
