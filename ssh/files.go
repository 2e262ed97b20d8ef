package ssh

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"syscall"
	"time"

	"github.com/pkg/sftp"

	"github.com/lxdtransport/transport"
)

const (
	// mostIdle is how many SFTP sessions are kept for the next file.
	mostIdle = 2

	// cleanUpTime bounds what is done after a failure.
	cleanUpTime = 5 * time.Second

	// chunkSize is what is asked of pkg/sftp at once, which makes packets of 32 KiB of it that are under way at the same time. There are two
	// chunks, so that one is filled while the other is on its way.
	chunkSize = 512 << 10
)

// files is an SFTP session.
type files struct {
	s      *session
	client *sftp.Client
	broken bool // an answer is missing: it must not be used again
}

// files returns an SFTP session.
func (t *Transport) files(ctx context.Context) (*files, error) {
	for {
		f := t.idleFiles()
		if f == nil {
			return t.newFiles(ctx)
		}
		if !f.s.conn.dead() && !f.s.isClosed() {
			return f, nil
		}
		f.s.end()
	}
}

func (t *Transport) idleFiles() *files {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.idle) == 0 {
		return nil
	}
	f := t.idle[len(t.idle)-1]
	t.idle = t.idle[:len(t.idle)-1]
	return f
}

// keep takes a session back. It is kept, unless that would keep a connection as well.
func (t *Transport) keep(f *files) {
	t.mu.Lock()
	if !f.broken && len(t.idle) < mostIdle && len(t.conns) > 0 && f.s.conn == t.conns[0] {
		t.idle = append(t.idle, f)
		f = nil
	}
	t.mu.Unlock()
	if f != nil {
		f.s.end()
	}
}

func (t *Transport) newFiles(ctx context.Context) (*files, error) {
	s, err := t.session(ctx, false)
	if err != nil {
		return nil, err
	}
	if err := s.request(ctx, "subsystem", struct{ Name string }{"sftp"}); err != nil {
		s.end()
		return nil, err
	}
	f := &files{s: s}
	f.client, err = do(ctx, f, func() (*sftp.Client, error) {
		return sftp.NewClientPipe(s.Channel, &privately{w: s.Channel}, sftp.UseConcurrentWrites(true), sftp.UseFstat(true))
	})
	if err != nil {
		s.end()
		return nil, fmt.Errorf("SFTP: %w", err)
	}
	return f, nil
}

// do runs one call of pkg/sftp, which knows no contexts.
func do[T any](ctx context.Context, f *files, call func() (T, error)) (T, error) {
	v, err := within(ctx, call, nil)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		f.broken = true
		err = context.Cause(ctx)
	case f.s.conn.dead():
		f.broken = true
		err = fmt.Errorf("the connection was lost: %w", f.s.conn.link.lost())
	default:
		f.broken = f.broken || f.s.isClosed()
	}
	return v, err
}

// act is do for calls without a result.
func act(ctx context.Context, f *files, call func() error) error {
	_, err := do(ctx, f, func() (struct{}, error) { return struct{}{}, call() })
	return err
}

// privately makes the server create every file with mode 0600. pkg/sftp cannot say a mode, and who opens a file before its mode is changed may read
// what comes into it after that.
type privately struct {
	w    io.WriteCloser
	left int // of the packet that is being written
}

// The numbers of the protocol.
const (
	fxpOpen                = 3
	fxfCreat               = 8
	attrPermissions        = 4
	openTail               = 8 // flags of the file and of the attributes, which are none
	packetHead             = 5 // length and type
	private         uint32 = 0o600
)

func (p *privately) Write(b []byte) (int, error) {
	if p.left > 0 || len(b) < packetHead+openTail {
		if p.left == 0 && len(b) >= 4 {
			p.left = int(binary.BigEndian.Uint32(b)) + 4
		}
		p.left = max(0, p.left-len(b))
		return p.w.Write(b)
	}
	size := int(binary.BigEndian.Uint32(b)) + 4
	tail := len(b) - openTail
	if b[4] != fxpOpen || size != len(b) || binary.BigEndian.Uint32(b[tail:])&fxfCreat == 0 || binary.BigEndian.Uint32(b[tail+4:]) != 0 {
		p.left = max(0, size-len(b))
		return p.w.Write(b)
	}
	mine := binary.BigEndian.AppendUint32(nil, uint32(size)) // 4 more than it was without itself
	mine = append(mine, b[4:tail+4]...)
	mine = binary.BigEndian.AppendUint32(mine, attrPermissions)
	mine = binary.BigEndian.AppendUint32(mine, private)
	if _, err := p.w.Write(mine); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (p *privately) Close() error { return p.w.Close() }

func fileError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

func checkPath(name string) error {
	switch {
	case name == "":
		return errors.New("the path is empty")
	case strings.IndexByte(name, 0) >= 0:
		return fmt.Errorf("the path %q contains a NUL byte", name)
	case !path.IsAbs(name):
		return fmt.Errorf("the path %q is not absolute: remote paths begin with a slash", name)
	}
	return nil
}

// typeError says why something that is no regular file is not read or replaced.
func typeError(mode fs.FileMode) error {
	kind := "no regular file"
	switch t := mode.Type(); {
	case t == 0:
		return nil
	case t&fs.ModeDir != 0:
		return fmt.Errorf("it is a directory: %w", syscall.EISDIR)
	case t&fs.ModeNamedPipe != 0:
		kind = "a FIFO"
	case t&fs.ModeSocket != 0:
		kind = "a socket"
	case t&fs.ModeDevice != 0:
		kind = "a device"
	}
	return fmt.Errorf("it is %s, only regular files are transferred: %w", kind, fs.ErrInvalid)
}

// ownerOf is the owner as the server has told it.
func ownerOf(info fs.FileInfo) transport.User {
	if st, ok := info.Sys().(*sftp.FileStat); ok {
		return transport.User{UID: st.UID, GID: st.GID}
	}
	return transport.User{}
}
