package transport

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// watchedConn is a connection that is cut when nothing has moved on it for patience although an answer is waited for. A source that gives
// nothing and a writer that takes nothing are no silence of the server's.
type watchedConn struct {
	io.ReadWriteCloser
	patience time.Duration

	mu      sync.Mutex // guards what follows
	moves   int64
	silent  bool // it was cut
	stopped bool
	timer   *time.Timer // nil before watch
}

func (c *watchedConn) Read(p []byte) (int, error)  { return c.moved(c.ReadWriteCloser.Read(p)) }
func (c *watchedConn) Write(p []byte) (int, error) { return c.moved(c.ReadWriteCloser.Write(p)) }

func (c *watchedConn) moved(n int, err error) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.moves++
	if err != nil && c.silent {
		err = fmt.Errorf("the server has not answered for %v", c.patience)
	}
	return n, err
}

// looks is how often within patience the connection is looked at.
const looks = 4

// watch begins the watching, which ends with Close.
func (c *watchedConn) watch(waiting func() bool) {
	last, same := int64(-1), 0
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return
	}
	c.timer = time.AfterFunc(c.patience/looks, func() {
		wanted := waiting()
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.stopped {
			return
		}
		if !wanted || c.moves != last {
			last, same = c.moves, 0
		} else if same++; same >= looks {
			c.silent = true
			go c.ReadWriteCloser.Close() // TLS says farewell, for up to 5 s
			return
		}
		c.timer.Reset(c.patience / looks)
	})
}

func (c *watchedConn) Close() error {
	c.mu.Lock()
	c.stopped = true
	if c.timer != nil {
		c.timer.Stop()
	}
	c.mu.Unlock()
	return c.ReadWriteCloser.Close()
}
