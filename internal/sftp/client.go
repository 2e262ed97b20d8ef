// Package sftp is a client of the SFTP protocol, version 3, as far as moving files needs it, for a peer that is not trusted.
//
// It differs from github.com/pkg/sftp in what this module cannot do without: every call obeys a context, no answer can make it
// allocate or write more than was asked for, an answer that does not fit ends the connection with an error instead of a panic, and
// many reads or writes of one file are under way at once without a goroutine for each.
package sftp

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Packet types of draft-ietf-secsh-filexfer-02, section 3.
const (
	typeInit        = 1
	typeVersion     = 2
	typeOpen        = 3
	typeClose       = 4
	typeRead        = 5
	typeWrite       = 6
	typeLstat       = 7
	typeFstat       = 8
	typeSetstat     = 9
	typeFsetstat    = 10
	typeOpendir     = 11
	typeReaddir     = 12
	typeRemove      = 13
	typeMkdir       = 14
	typeStat        = 17
	typeReadlink    = 19
	typeSymlink     = 20
	typeStatus      = 101
	typeHandle      = 102
	typeData        = 103
	typeName        = 104
	typeAttrs       = 105
	typeExtended    = 200
	protocolVersion = 3

	extPosixRename    = "posix-rename@openssh.com"
	maxPacket         = 256<<10 + 1<<10 // what common servers send at most, and a header
	maxAnswer         = 32 << 10        // of an answer that is neither data nor a listing: paths have 4 KiB
	maxHandle         = 256             // draft, section 6.2
	maxStatusText     = 4 << 10
	headerSize        = 4 + 1 + 4 // length, type, request id
	initialPendingCap = 16

	// readBuffer is what is read from the connection at once: some packets of 32 KiB each. 64 KiB were measured to be a little slower.
	readBuffer = 256 << 10
	// copyBelow is up to which size data is copied, to be sent along with other requests.
	copyBelow = 16 << 10
)

// ErrProtocol says that the peer sent what the protocol does not allow. The connection has been closed.
var ErrProtocol = errors.New("the other side does not keep to the SFTP protocol")

// Client is one connection. It is safe for concurrent use.
type Client struct {
	conn io.ReadWriteCloser
	in   *bufio.Reader

	mu      sync.Mutex // guards what follows
	pending map[uint32]*Call
	next    uint32
	out     []piece // what is to be sent
	own     bool    // the last of out can be appended to
	err     error   // why the connection has ended

	wake    chan struct{}  // there is something in out
	ended   chan struct{}  // closed when the reading goroutine has ended
	running sync.WaitGroup // the reading and the writing goroutine
}

// piece is a part of what is sent.
type piece struct {
	bytes []byte
	sent  chan struct{} // closed when it was sent, if somebody wants to know
}

// Call is a request that waits for its answer. Exactly one of its methods is to be called, once, or none.
type Call struct {
	done chan struct{} // gets one value when what follows is set
	kind byte
	body []byte // of the answer; for DATA the part of buf that was filled
	err  error  // the connection has ended

	buf  []byte // where DATA goes
	most int    // bytes of any other answer
	c    *Client

	sent chan struct{} // closed when the data that was not copied was sent; nil if there was none
}

// New starts the protocol on a connection, which it owns from then on, also when it fails. It returns when the peer has
// answered.
func New(ctx context.Context, conn io.ReadWriteCloser) (*Client, error) {
	c := &Client{
		conn: conn, in: bufio.NewReaderSize(conn, readBuffer), pending: make(map[uint32]*Call, initialPendingCap),
		wake: make(chan struct{}, 1), ended: make(chan struct{}),
	}
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
	c.running.Go(c.read) // Close waits for both
	c.running.Go(c.write)
	return c, nil
}

func (c *Client) hello() error {
	if _, err := c.conn.Write([]byte{0, 0, 0, 5, typeInit, 0, 0, 0, protocolVersion}); err != nil {
		return err
	}
	kind, body, err := readPacket(c.in)
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
	if _, err := io.ReadFull(r, head[:4]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[:4])
	if n < 1 || n > maxPacket {
		return 0, nil, fmt.Errorf("%w: a packet of %d bytes", ErrProtocol, n)
	}
	if _, err := io.ReadFull(r, head[4:]); err != nil {
		return 0, nil, err
	}
	body = make([]byte, n-1)
	_, err = io.ReadFull(r, body)
	return head[4], body, err
}

// Close ends the connection. Calls that wait fail. It returns when no goroutine is left.
func (c *Client) Close() error {
	err := c.conn.Close()
	c.running.Wait()
	return err
}

// Err returns why the connection has ended, or nil.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// write sends what is asked until the connection ends. That it is a goroutine of its own keeps one that asks from waiting for
// a server that does not read, and lets many requests be sent at once.
func (c *Client) write() {
	for {
		select {
		case <-c.wake:
		case <-c.ended:
			return
		}
		c.mu.Lock()
		batch := c.out
		c.out, c.own = nil, false
		c.mu.Unlock()
		for _, p := range batch {
			if _, err := c.conn.Write(p.bytes); err != nil {
				c.conn.Close() // the reading goroutine ends all calls
				return
			}
			if p.sent != nil {
				close(p.sent)
			}
		}
	}
}

// Waiting reports whether an answer is waited for.
func (c *Client) Waiting() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.pending) > 0
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
		call.done <- struct{}{}
	}
	c.out = nil
	c.mu.Unlock()
	close(c.ended)
}

func (c *Client) readAll() error {
	var head [headerSize]byte
	for {
		// The length first: after one that is too small nothing more need come.
		if _, err := io.ReadFull(c.in, head[:4]); err != nil {
			return err
		}
		n := binary.BigEndian.Uint32(head[:4])
		if n < headerSize-4 || n > maxPacket {
			return fmt.Errorf("%w: a packet of %d bytes", ErrProtocol, n)
		}
		if _, err := io.ReadFull(c.in, head[4:]); err != nil {
			return err
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
		err := call.err
		call.done <- struct{}{}
		if err != nil {
			return err
		}
	}
}

// readBody reads the body of an answer, of DATA straight to where it belongs.
func (c *Client) readBody(call *Call, left int) error {
	if call.kind != typeData {
		if left > call.most {
			return fmt.Errorf("%w: an answer of type %d with %d bytes", ErrProtocol, call.kind, left)
		}
		call.body = make([]byte, left)
		_, err := io.ReadFull(c.in, call.body)
		return err
	}
	var length [4]byte
	if left < len(length) {
		return fmt.Errorf("%w: data without a length", ErrProtocol)
	}
	if _, err := io.ReadFull(c.in, length[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(length[:])
	if int64(n) != int64(left-len(length)) || int64(n) > int64(len(call.buf)) {
		return fmt.Errorf("%w: %d bytes of data in a packet with %d, where at most %d were asked for", ErrProtocol, n, left-len(length), len(call.buf))
	}
	call.body = call.buf[:n]
	_, err := io.ReadFull(c.in, call.body)
	return err
}

// send sends a request. encode appends its body to the packet, up to data, which ends it. data belongs to the call until that is done.
func (c *Client) send(call *Call, kind byte, data []byte, encode func([]byte) []byte) *Call {
	call.c = c
	if call.done == nil {
		call.done = make(chan struct{}, 1)
	}
	call.most = max(call.most, maxAnswer)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		call.err = c.err
		call.done <- struct{}{}
		return call
	}
	id := c.next
	c.next++
	c.pending[id] = call

	var packet []byte
	if c.own {
		packet = c.out[len(c.out)-1].bytes
		c.out = c.out[:len(c.out)-1]
	} else {
		packet = make([]byte, 0, 1<<10)
	}
	start := len(packet)
	packet = encode(append(packet, 0, 0, 0, 0, kind, byte(id>>24), byte(id>>16), byte(id>>8), byte(id)))
	binary.BigEndian.PutUint32(packet[start:], uint32(len(packet)-start-4+len(data)))
	c.own = len(data) <= copyBelow
	if c.own {
		packet = append(packet, data...)
		data = nil
	}
	c.out = append(c.out, piece{bytes: packet})
	if data != nil {
		call.sent = make(chan struct{})
		c.out = append(c.out, piece{data, call.sent})
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
	return call
}

// wait waits for the answer. After the end of ctx the answer is thrown away when it comes.
func (call *Call) wait(ctx context.Context) error {
	select {
	case <-call.done:
	default:
		select {
		case <-call.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if call.err != nil || call.sent == nil {
		return call.err
	}
	// A server may answer before it has got everything, and the caller may use the data for something else as soon as it has the answer.
	select {
	case <-call.sent:
		return nil
	case <-call.c.ended:
		return call.c.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// status waits for an answer that is a status, or one of kind want.
func (call *Call) status(ctx context.Context, want byte) error {
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
