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

// Err waits for the answer to a request that has no other than whether it was carried out.
func (call *Call) Err(ctx context.Context) error { return call.status(ctx, typeStatus) }

func (c *Client) ask(kind byte, what string) *Call {
	return c.send(new(Call), kind, nil, func(b []byte) []byte { return appendString(b, what) })
}

func (c *Client) askAttrs(kind byte, what string, a Attrs) *Call {
	return c.send(new(Call), kind, nil, func(b []byte) []byte { return a.append(appendString(b, what)) })
}

func (call *Call) attrs(ctx context.Context) (Attrs, error) {
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
	return c.ask(typeStat, path).attrs(ctx)
}

// Lstat returns a file's attributes; of a symbolic link its own.
func (c *Client) Lstat(ctx context.Context, path string) (Attrs, error) {
	return c.ask(typeLstat, path).attrs(ctx)
}

// Setstat sets what a has.
func (c *Client) Setstat(ctx context.Context, path string, a Attrs) error {
	return c.AskSetstat(path, a).Err(ctx)
}

// AskSetstat is Setstat that does not wait.
func (c *Client) AskSetstat(path string, a Attrs) *Call { return c.askAttrs(typeSetstat, path, a) }

// Mkdir creates a directory.
func (c *Client) Mkdir(ctx context.Context, path string, mode uint32) error {
	return c.AskMkdir(path, mode).Err(ctx)
}

// AskMkdir is Mkdir that does not wait.
func (c *Client) AskMkdir(path string, mode uint32) *Call {
	return c.askAttrs(typeMkdir, path, Attrs{Has: HasMode, Mode: mode})
}

// Remove removes a file. Servers made with Go remove an empty directory, too.
func (c *Client) Remove(ctx context.Context, path string) error { return c.AskRemove(path).Err(ctx) }

// AskRemove is Remove that does not wait.
func (c *Client) AskRemove(path string) *Call { return c.ask(typeRemove, path) }

// Rename gives a file another name, at once, in the place of a file that had it.
func (c *Client) Rename(ctx context.Context, from, to string) error {
	return c.send(new(Call), typeExtended, nil, func(b []byte) []byte {
		return appendString(appendString(appendString(b, extPosixRename), from), to)
	}).Err(ctx)
}

// AskSymlink makes path a symbolic link. The target comes first, as with OpenSSH and github.com/pkg/sftp, and not as in the draft.
func (c *Client) AskSymlink(target, path string) *Call {
	return c.send(new(Call), typeSymlink, nil, func(b []byte) []byte { return appendString(appendString(b, target), path) })
}

// AskReadlink asks where a symbolic link leads. Its answer is a Target.
func (c *Client) AskReadlink(path string) *Call { return c.ask(typeReadlink, path) }

// Target waits for where a link leads.
func (call *Call) Target(ctx context.Context) (string, error) {
	if err := call.status(ctx, typeName); err != nil {
		return "", err
	}
	d := decoder{rest: call.body}
	n, target := d.uint32(), d.string()
	if d.bad || n != 1 {
		return "", fmt.Errorf("%w: %d targets of a link, or one that breaks off", ErrProtocol, n)
	}
	return string(target), nil
}

// Dir is an open directory. Its methods may not be called concurrently.
type Dir struct {
	c      *Client
	handle string
}

// Entry is a file in a directory.
type Entry struct {
	Name string
	Attrs
}

// Opendir opens a directory.
func (c *Client) Opendir(ctx context.Context, path string) (*Dir, error) {
	return c.AskOpendir(path).Dir(ctx)
}

// AskOpendir is Opendir that does not wait.
func (c *Client) AskOpendir(path string) *Call { return c.ask(typeOpendir, path) }

// Dir waits for a directory to be open.
func (call *Call) Dir(ctx context.Context) (*Dir, error) {
	handle, err := call.handle(ctx)
	if err != nil {
		return nil, err
	}
	return &Dir{call.c, handle}, nil
}

// AskRead asks for the next entries. Its answer is Entries.
func (d *Dir) AskRead() *Call {
	return d.c.send(&Call{most: maxPacket}, typeReaddir, nil, func(b []byte) []byte { return appendString(b, d.handle) })
}

// Entries waits for entries of a directory, one at least. It is io.EOF behind the last ones.
func (call *Call) Entries(ctx context.Context) ([]Entry, error) {
	if err := call.status(ctx, typeName); err != nil {
		return nil, eof(err)
	}
	d := decoder{rest: call.body}
	n := d.uint32()
	// No entry has less than two empty strings and no attributes.
	if n == 0 || int64(n) > int64(len(d.rest)/12) {
		return nil, fmt.Errorf("%w: a listing of %d entries in %d bytes", ErrProtocol, n, len(call.body))
	}
	entries := make([]Entry, 0, n)
	for range n {
		name := string(d.string())
		d.string()
		entries = append(entries, Entry{name, d.attrs()})
	}
	if d.bad {
		return nil, fmt.Errorf("%w: a listing that breaks off", ErrProtocol)
	}
	return entries, nil
}

// AskClose closes the directory.
func (d *Dir) AskClose() *Call { return d.c.ask(typeClose, d.handle) }

// eof makes the status for the end io.EOF.
func eof(err error) error {
	if s, ok := errors.AsType[*StatusError](err); ok && s.Code == codeEOF {
		return io.EOF
	}
	return err
}

// File is an open file. Its methods may not be called concurrently.
type File struct {
	c      *Client
	handle string
}

// Open opens a file. mode is for one that is created.
func (c *Client) Open(ctx context.Context, path string, flags, mode uint32) (*File, error) {
	return c.AskOpen(path, flags, mode).File(ctx)
}

// AskOpen is Open that does not wait.
func (c *Client) AskOpen(path string, flags, mode uint32) *Call {
	return c.send(new(Call), typeOpen, nil, func(b []byte) []byte {
		a := Attrs{}
		if flags&Create != 0 {
			a = Attrs{Has: HasMode, Mode: mode}
		}
		return a.append(binary.BigEndian.AppendUint32(appendString(b, path), flags))
	})
}

// File waits for a file to be open.
func (call *Call) File(ctx context.Context) (*File, error) {
	handle, err := call.handle(ctx)
	if err != nil {
		return nil, err
	}
	return &File{call.c, handle}, nil
}

func (call *Call) handle(ctx context.Context) (string, error) {
	if err := call.status(ctx, typeHandle); err != nil {
		return "", err
	}
	d := decoder{rest: call.body}
	handle := d.string()
	if d.bad || len(handle) > maxHandle {
		return "", fmt.Errorf("%w: a handle that breaks off or has more than %d bytes", ErrProtocol, maxHandle)
	}
	return string(handle), nil
}

// Close closes the file.
func (f *File) Close(ctx context.Context) error { return f.AskClose().Err(ctx) }

// AskClose is Close that does not wait. The server closes the file when all reads and writes that were asked for before are done.
func (f *File) AskClose() *Call { return f.c.ask(typeClose, f.handle) }

// Stat returns the attributes of the open file.
func (f *File) Stat(ctx context.Context) (Attrs, error) {
	return f.c.ask(typeFstat, f.handle).attrs(ctx)
}

// Setstat sets what a has.
func (f *File) Setstat(ctx context.Context, a Attrs) error { return f.AskSetstat(a).Err(ctx) }

// AskSetstat is Setstat that does not wait.
func (f *File) AskSetstat(a Attrs) *Call { return f.c.askAttrs(typeFsetstat, f.handle, a) }

// AskWrite writes data, which belongs to the call until that is done.
func (f *File) AskWrite(offset int64, data []byte) *Call {
	return f.c.send(new(Call), typeWrite, data, func(b []byte) []byte {
		b = binary.BigEndian.AppendUint64(appendString(b, f.handle), uint64(offset))
		return binary.BigEndian.AppendUint32(b, uint32(len(data)))
	})
}

// AskRead asks for len(buf) bytes, which belong to the call until that is done. Its answer is Data.
func (f *File) AskRead(offset int64, buf []byte) *Call { return f.askRead(new(Call), offset, buf) }

func (f *File) askRead(call *Call, offset int64, buf []byte) *Call {
	call.buf = buf
	return f.c.send(call, typeRead, nil, func(b []byte) []byte {
		b = binary.BigEndian.AppendUint64(appendString(b, f.handle), uint64(offset))
		return binary.BigEndian.AppendUint32(b, uint32(len(buf)))
	})
}

// Data waits for the answer to a read. It is io.EOF at the end of the file.
func (call *Call) Data(ctx context.Context) ([]byte, error) {
	if err := call.status(ctx, typeData); err != nil {
		return nil, eof(err)
	}
	if len(call.body) == 0 {
		// Neither bytes nor the end: a server could go on so for ever.
		return nil, fmt.Errorf("%w: a read answered with no bytes", ErrProtocol)
	}
	return call.body, nil
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
		call *Call
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
			ahead = append(ahead, write{f.AskWrite(sent, data), data})
			sent += int64(len(data))
		}
		if err == io.EOF {
			err := confirm(0)
			return confirmed, err
		}
	}
}
