package sftp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Flags of Open, draft section 6.3.
const (
	Read   = 0x01
	Write  = 0x02
	Create = 0x08
	Excl   = 0x20
)

// Attrs are a file's attributes, those that Has says.
type Attrs struct {
	Has      uint32 // HasSize and so on
	Size     uint64
	UID, GID uint32
	Mode     uint32 // with the type bits of stat(2)
	ATime    uint32 // seconds since 1970
	MTime    uint32
}

// What Attrs has.
const (
	HasSize  = 0x01
	HasOwner = 0x02
	HasMode  = 0x04
	HasTimes = 0x08

	hasExtended = 0x80000000
)

// Type bits of Attrs.Mode, Linux's.
const (
	TypeMask      = 0o170000
	TypeSocket    = 0o140000
	TypeLink      = 0o120000
	TypeRegular   = 0o100000
	TypeBlock     = 0o060000
	TypeDirectory = 0o040000
	TypeChar      = 0o020000
	TypeFIFO      = 0o010000
)

func (a Attrs) append(b []byte) []byte {
	be := binary.BigEndian
	b = be.AppendUint32(b, a.Has)
	if a.Has&HasSize != 0 {
		b = be.AppendUint64(b, a.Size)
	}
	if a.Has&HasOwner != 0 {
		b = be.AppendUint32(be.AppendUint32(b, a.UID), a.GID)
	}
	if a.Has&HasMode != 0 {
		b = be.AppendUint32(b, a.Mode)
	}
	if a.Has&HasTimes != 0 {
		b = be.AppendUint32(be.AppendUint32(b, a.ATime), a.MTime)
	}
	return b
}

func (d *decoder) attrs() (a Attrs) {
	a.Has = d.uint32()
	if a.Has&HasSize != 0 {
		a.Size = d.uint64()
	}
	if a.Has&HasOwner != 0 {
		a.UID, a.GID = d.uint32(), d.uint32()
	}
	if a.Has&HasMode != 0 {
		a.Mode = d.uint32()
	}
	if a.Has&HasTimes != 0 {
		a.ATime, a.MTime = d.uint32(), d.uint32()
	}
	if a.Has&hasExtended != 0 {
		for n := d.uint32(); n > 0 && !d.bad; n-- {
			d.string()
			d.string()
		}
	}
	return a
}

func (c *Client) simple(ctx context.Context, kind byte, body []byte) error {
	return c.send(kind, body, nil, nil).status(ctx, typeStatus)
}

func (c *Client) stat(ctx context.Context, kind byte, what string) (Attrs, error) {
	call := c.send(kind, appendString(nil, what), nil, nil)
	if err := call.status(ctx, typeAttrs); err != nil {
		return Attrs{}, err
	}
	d := decoder{rest: call.body}
	a := d.attrs()
	if d.bad {
		return Attrs{}, fmt.Errorf("%w: attributes that break off", ErrProtocol)
	}
	return a, nil
}

// Stat returns a file's attributes; of a symbolic link those of what it leads to.
func (c *Client) Stat(ctx context.Context, path string) (Attrs, error) {
	return c.stat(ctx, typeStat, path)
}

// Lstat returns a file's attributes; of a symbolic link its own.
func (c *Client) Lstat(ctx context.Context, path string) (Attrs, error) {
	return c.stat(ctx, typeLstat, path)
}

// Setstat sets what a has.
func (c *Client) Setstat(ctx context.Context, path string, a Attrs) error {
	return c.simple(ctx, typeSetstat, a.append(appendString(nil, path)))
}

// Mkdir creates a directory.
func (c *Client) Mkdir(ctx context.Context, path string, mode uint32) error {
	return c.simple(ctx, typeMkdir, Attrs{Has: HasMode, Mode: mode}.append(appendString(nil, path)))
}

// Remove removes a file.
func (c *Client) Remove(ctx context.Context, path string) error {
	return c.simple(ctx, typeRemove, appendString(nil, path))
}

// Rename gives a file another name, at once, in the place of a file that had it.
func (c *Client) Rename(ctx context.Context, from, to string) error {
	return c.simple(ctx, typeExtended, appendString(appendString(appendString(nil, extPosixRename), from), to))
}

// File is an open file. Its methods may not be called concurrently.
type File struct {
	c      *Client
	handle string
}

// Open opens a file. mode is for one that is created.
func (c *Client) Open(ctx context.Context, path string, flags, mode uint32) (*File, error) {
	body := binary.BigEndian.AppendUint32(appendString(nil, path), flags)
	a := Attrs{}
	if flags&Create != 0 {
		a = Attrs{Has: HasMode, Mode: mode}
	}
	call := c.send(typeOpen, a.append(body), nil, nil)
	if err := call.status(ctx, typeHandle); err != nil {
		return nil, err
	}
	d := decoder{rest: call.body}
	handle := d.string()
	if d.bad || len(handle) > maxHandle {
		return nil, fmt.Errorf("%w: a file handle that breaks off or has more than %d bytes", ErrProtocol, maxHandle)
	}
	return &File{c, string(handle)}, nil
}

// Close closes the file.
func (f *File) Close(ctx context.Context) error {
	return f.c.simple(ctx, typeClose, appendString(nil, f.handle))
}

// Stat returns the attributes of the open file.
func (f *File) Stat(ctx context.Context) (Attrs, error) { return f.c.stat(ctx, typeFstat, f.handle) }

// Setstat sets what a has.
func (f *File) Setstat(ctx context.Context, a Attrs) error {
	return f.c.simple(ctx, typeFsetstat, a.append(appendString(nil, f.handle)))
}

const (
	// WriteSize is the most bytes in one write: with its header below the 256 KiB that servers take in a packet.
	WriteSize = 250 << 10
	// WritesAhead is how many writes are under way at once; more were measured to gain nothing.
	WritesAhead = 12

	// readSize is asked for at first. What comes shows how much the server gives at once: 32 KiB commonly, 128 KiB since Incus 7.
	readSize = 256 << 10
	// readAhead is the most bytes that are asked for before they are needed.
	readAhead = 4 << 20
	// maxReads bounds how many reads that is when a server gives little at once.
	maxReads = 256
)

// A Source delivers what is to be written.
type Source interface {
	// Next returns the next bytes, at most WriteSize; the last ones, or none, with io.EOF.
	Next(ctx context.Context) ([]byte, error)
	// Free takes back what Next returned, when it has been written. It must not block.
	Free([]byte)
}

// WriteFrom writes what src delivers, from the beginning of the file, with up to WritesAhead writes under way at once. progress is
// told of what the server has confirmed. It returns the number of bytes that were. When it fails, writes may still be
// under way.
func (f *File) WriteFrom(ctx context.Context, src Source, progress func(int64)) (int64, error) {
	type write struct {
		call *call
		data []byte
	}
	var ahead []write // oldest first
	var sent, confirmed int64
	confirm := func(most int) error {
		for len(ahead) > most {
			w := ahead[0]
			ahead = ahead[1:]
			if err := w.call.status(ctx, typeStatus); err != nil {
				return err
			}
			confirmed += int64(len(w.data))
			progress(confirmed)
			src.Free(w.data)
		}
		return nil
	}
	for {
		if err := confirm(WritesAhead - 1); err != nil {
			return confirmed, err
		}
		data, err := src.Next(ctx)
		if err != nil && err != io.EOF {
			return confirmed, err
		}
		if len(data) > 0 {
			head := binary.BigEndian.AppendUint64(appendString(nil, f.handle), uint64(sent))
			head = binary.BigEndian.AppendUint32(head, uint32(len(data)))
			ahead = append(ahead, write{f.c.send(typeWrite, head, data, nil), data})
			sent += int64(len(data))
		}
		if err == io.EOF {
			err := confirm(0)
			return confirmed, err
		}
	}
}

// read asks for len(buf) bytes.
func (f *File) read(offset int64, buf []byte) *call {
	head := binary.BigEndian.AppendUint64(appendString(nil, f.handle), uint64(offset))
	head = binary.BigEndian.AppendUint32(head, uint32(len(buf)))
	return f.c.send(typeRead, head, nil, buf)
}

// data waits for the answer to a read. It is io.EOF at the end of the file.
func (call *call) data(ctx context.Context) ([]byte, error) {
	err := call.status(ctx, typeData)
	if s, ok := errors.AsType[*StatusError](err); ok && s.Code == codeEOF {
		return nil, io.EOF
	}
	if err != nil {
		return nil, err
	}
	if len(call.body) == 0 {
		// Neither bytes nor the end: a server could go on so for ever.
		return nil, fmt.Errorf("%w: a read answered with no bytes", ErrProtocol)
	}
	return call.body, nil
}

// ReadTo hands the bytes from offset to end to write, in order, with many reads under way at once. It stops at the end of the file,
// wherever that is. It returns the number of bytes handed over. Reads may still be under way when it fails.
func (f *File) ReadTo(ctx context.Context, offset, end int64, write func([]byte) error) (int64, error) {
	start := offset
	hand := func(b []byte) error {
		offset += int64(len(b))
		return write(b)
	}
	// get reads one after the other, until buf or the file has ended.
	get := func(buf []byte) (short bool, err error) {
		for len(buf) > 0 {
			b, err := f.read(offset, buf).data(ctx)
			if err == io.EOF {
				return true, nil
			}
			if err != nil {
				return false, err
			}
			buf = buf[len(b):]
			if err := hand(b); err != nil {
				return false, err
			}
		}
		return false, nil
	}
	if offset >= end {
		return 0, nil
	}

	// The first read shows how much comes at once.
	first := make([]byte, min(readSize, end-offset))
	b, err := f.read(offset, first).data(ctx)
	if err == io.EOF {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	size := len(b)
	if err := hand(b); err != nil {
		return offset - start, err
	}

	type ask struct {
		call *call
		buf  []byte
	}
	var ahead []ask // oldest first
	var free [][]byte
	most := min(maxReads, max(1, readAhead/size))
	for asked := offset; ; {
		// A few at first: most files end soon.
		for want := min(most, 2+2*int((offset-start)/int64(size))); asked < end && len(ahead) < want; {
			var buf []byte
			if n := len(free); n > 0 {
				buf, free = free[n-1], free[:n-1]
			} else {
				buf = make([]byte, size)
			}
			part := buf[:min(int64(size), end-asked)]
			ahead = append(ahead, ask{f.read(asked, part), buf})
			asked += int64(len(part))
		}
		if len(ahead) == 0 {
			return offset - start, nil
		}
		a := ahead[0]
		ahead = ahead[1:]
		b, err := a.call.data(ctx)
		if err == io.EOF {
			return offset - start, nil
		}
		if err != nil {
			return offset - start, err
		}
		rest := len(a.call.buf) - len(b)
		if err := hand(b); err != nil {
			return offset - start, err
		}
		if rest > 0 { // less than asked for: what is missing comes next
			if ended, err := get(make([]byte, rest)); ended || err != nil {
				return offset - start, err
			}
		}
		free = append(free, a.buf)
	}
}
