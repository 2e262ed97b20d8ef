// Package sftp is a client of the SFTP protocol, version 3, as far as moving files needs it, for a peer that is not trusted.
//
// It differs from github.com/pkg/sftp in what this module cannot do without: every call obeys a context, no answer can make it
// allocate or write more than was asked for, an answer that does not fit ends the connection with an error instead of a panic, and
// many reads or writes of one file are under way at once without a goroutine for each.
package sftp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Packet types of draft-ietf-secsh-filexfer-02, section 3.
const (
	typeInit          = 1
	typeVersion       = 2
	typeOpen          = 3
	typeClose         = 4
	typeRead          = 5
	typeWrite         = 6
	typeLstat         = 7
	typeFstat         = 8
	typeFsetstat      = 10
	typeSetstat       = 9
	typeRemove        = 13
	typeMkdir         = 14
	typeStat          = 17
	typeStatus        = 101
	typeHandle        = 102
	typeData          = 103
	typeAttrs         = 105
	typeExtended      = 200
	protocolVersion   = 3
	extPosixRename    = "posix-rename@openssh.com"
	maxPacket         = 256<<10 + 1<<10 // what common servers send at most, and a header
	maxHandle         = 256             // draft, section 6.2
	maxStatusText     = 4 << 10
	headerSize        = 4 + 1 + 4 // length, type, request id
	initialPendingCap = 16
)

// ErrProtocol says that the peer sent what the protocol does not allow. The connection has been closed.
var ErrProtocol = errors.New("the other side does not keep to the SFTP protocol")

// Client is one connection. It is safe for concurrent use.
type Client struct {
	conn io.ReadWriteCloser

	writing sync.Mutex // held during a write to conn

	mu      sync.Mutex // guards what follows
	pending map[uint32]*call
	next    uint32
	err     error // why the connection has ended

	ended chan struct{} // closed when the reading goroutine has ended
}

// call is a request that waits for its answer.
type call struct {
	done chan struct{} // closed when what follows is set
	kind byte
	body []byte // of the answer; for DATA the part of buf that was filled
	err  error  // the connection has ended

	buf []byte // where DATA goes
}

// New starts the protocol on a connection, which it owns from then on, also when it fails. It returns when the peer has
// answered.
func New(ctx context.Context, conn io.ReadWriteCloser) (*Client, error) {
	c := &Client{conn: conn, pending: make(map[uint32]*call, initialPendingCap), ended: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err := c.hello()
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("start of SFTP: %w", err)
	}
	go c.read() // Close waits for it
	return c, nil
}

func (c *Client) hello() error {
	if _, err := c.conn.Write([]byte{0, 0, 0, 5, typeInit, 0, 0, 0, protocolVersion}); err != nil {
		return err
	}
	kind, body, err := readPacket(c.conn)
	if err != nil {
		return err
	}
	d := decoder{rest: body}
	if v := d.uint32(); kind != typeVersion || d.bad || v < protocolVersion {
		return fmt.Errorf("%w: it answered the greeting with packet type %d, version %d", ErrProtocol, kind, v)
	}
	return nil
}

// readPacket reads a packet without a request id.
func readPacket(r io.Reader) (kind byte, body []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[:4])
	if n < 1 || n > maxPacket {
		return 0, nil, fmt.Errorf("%w: a packet of %d bytes", ErrProtocol, n)
	}
	body = make([]byte, n-1)
	_, err = io.ReadFull(r, body)
	return head[4], body, err
}

// Close ends the connection. Calls that wait fail. It returns when no goroutine is left.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.ended
	return err
}

// read hands answers to the calls that wait for them until the connection ends.
func (c *Client) read() {
	err := c.readAll()
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	c.conn.Close()
	c.mu.Lock()
	c.err = fmt.Errorf("the SFTP connection has ended: %w", err)
	for id, call := range c.pending {
		delete(c.pending, id)
		call.err = c.err
		close(call.done)
	}
	c.mu.Unlock()
	close(c.ended)
}

func (c *Client) readAll() error {
	var head [headerSize]byte
	for {
		if _, err := io.ReadFull(c.conn, head[:]); err != nil {
			return err
		}
		n := binary.BigEndian.Uint32(head[:4])
		if n < headerSize-4 || n > maxPacket {
			return fmt.Errorf("%w: a packet of %d bytes", ErrProtocol, n)
		}
		left := int(n) - (headerSize - 4)
		id := binary.BigEndian.Uint32(head[5:])
		c.mu.Lock()
		call := c.pending[id]
		delete(c.pending, id)
		c.mu.Unlock()
		if call == nil {
			return fmt.Errorf("%w: an answer to a question that was not asked", ErrProtocol)
		}
		call.kind = head[4]
		call.err = c.readBody(call, left)
		close(call.done)
		if call.err != nil {
			return call.err
		}
	}
}

// readBody reads the body of an answer, of DATA straight to where it belongs.
func (c *Client) readBody(call *call, left int) error {
	if call.kind != typeData {
		call.body = make([]byte, left)
		_, err := io.ReadFull(c.conn, call.body)
		return err
	}
	var length [4]byte
	if left < len(length) {
		return fmt.Errorf("%w: data without a length", ErrProtocol)
	}
	if _, err := io.ReadFull(c.conn, length[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(length[:])
	if int64(n) != int64(left-len(length)) || int64(n) > int64(len(call.buf)) {
		return fmt.Errorf("%w: %d bytes of data in a packet with %d, where at most %d were asked for", ErrProtocol, n, left-len(length), len(call.buf))
	}
	call.body = call.buf[:n]
	_, err := io.ReadFull(c.conn, call.body)
	return err
}

// send sends a request. head is its body up to data, which ends it. buf is where DATA is to go, nil if none is expected; it
// and data belong to the call until that is done.
func (c *Client) send(kind byte, head, data, buf []byte) *call {
	call := &call{done: make(chan struct{}), buf: buf}
	c.mu.Lock()
	if c.err != nil {
		call.err = c.err
		c.mu.Unlock()
		close(call.done)
		return call
	}
	id := c.next
	c.next++
	c.pending[id] = call
	c.mu.Unlock()

	packet := make([]byte, headerSize, headerSize+len(head))
	binary.BigEndian.PutUint32(packet, uint32(headerSize-4+len(head)+len(data)))
	packet[4] = kind
	binary.BigEndian.PutUint32(packet[5:], id)
	packet = append(packet, head...)
	c.writing.Lock()
	_, err := c.conn.Write(packet)
	if err == nil && len(data) > 0 {
		_, err = c.conn.Write(data)
	}
	c.writing.Unlock()
	if err != nil {
		c.conn.Close() // the reading goroutine ends all calls, this one too
	}
	return call
}

// wait waits for the answer. After the end of ctx the answer is thrown away when it comes.
func (call *call) wait(ctx context.Context) error {
	select {
	case <-call.done:
		return call.err
	default:
	}
	select {
	case <-call.done:
		return call.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// status waits for an answer that is a status, or one of kind want.
func (call *call) status(ctx context.Context, want byte) error {
	if err := call.wait(ctx); err != nil {
		return err
	}
	if call.kind == want && want != typeStatus {
		return nil
	}
	if call.kind != typeStatus {
		return fmt.Errorf("%w: packet type %d for an answer", ErrProtocol, call.kind)
	}
	d := decoder{rest: call.body}
	code, text := d.uint32(), d.string()
	if len(text) > maxStatusText {
		text = text[:maxStatusText]
	}
	if code == codeOK && want == typeStatus {
		return nil
	}
	return &StatusError{Code: code, Text: string(text)}
}

// decoder takes a packet apart. After something did not fit, bad is set and the values are zero.
type decoder struct {
	rest []byte
	bad  bool
}

func (d *decoder) take(n int) []byte {
	if n > len(d.rest) {
		d.bad, d.rest = true, nil
		return nil
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) uint32() uint32 {
	if b := d.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	if b := d.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) string() []byte {
	n := d.uint32()
	if d.bad || int64(n) > int64(len(d.rest)) {
		d.bad, d.rest = true, nil
		return nil
	}
	return d.take(int(n))
}

func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}
