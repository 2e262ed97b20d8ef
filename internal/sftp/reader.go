package sftp

import (
	"context"
	"io"
)

// Reader reads a file from one offset to another, with many reads under way at once.
type Reader struct {
	f      *File
	offset int64 // of what comes next
	asked  int64 // up to where it was asked for
	end    int64
	size   int // of a read; 0: not known yet
	most   int // reads
	given  int // how many answers were handed over
	gap    int // what a short answer has left out
	ended  bool

	ahead []*ask // oldest first
	free  []*ask
	last  *ask // its bytes have been handed over
}

// ask is a read with its buffer.
type ask struct {
	call Call
	buf  []byte
}

// Reader returns a reader of the bytes from offset to end.
func (f *File) Reader(offset, end int64) *Reader {
	return &Reader{f: f, offset: offset, asked: offset, end: end}
}

// Next returns the next bytes, which are valid until it is called again. It is io.EOF at end, or at the end of the file if that comes before. After
// another error the reader is of no use; reads may still be under way.
func (r *Reader) Next(ctx context.Context) ([]byte, error) {
	if r.last != nil {
		r.free = append(r.free, r.last)
		r.last = nil
	}
	switch {
	case r.ended || r.offset >= r.end:
		return nil, io.EOF
	case r.size == 0:
		return r.first(ctx)
	case r.gap > 0:
		b, err := r.data(ctx, r.f.AskRead(r.offset, make([]byte, r.gap)))
		r.gap -= len(b)
		return b, err
	}
	r.ask()
	a := r.ahead[0]
	r.ahead = r.ahead[1:]
	wanted := len(a.call.buf)
	b, err := r.data(ctx, &a.call)
	if err != nil {
		return nil, err
	}
	r.gap = wanted - len(b)
	r.given++
	r.last = a
	return b, nil
}

// first sends the first read, which shows how much comes at once.
func (r *Reader) first(ctx context.Context) ([]byte, error) {
	b, err := r.data(ctx, r.f.AskRead(r.offset, make([]byte, min(readSize, r.end-r.offset))))
	if err != nil {
		return nil, err
	}
	r.size, r.asked = len(b), r.offset
	r.most = min(maxReads, max(1, readAhead/r.size))
	return b, nil
}

// ask asks for more, when a good part of what was asked for has come, so that many reads are sent at once. They are few at first: most
// files end soon.
func (r *Reader) ask() {
	want := min(r.most, 2+2*r.given)
	if n := len(r.ahead); n > want-want/4 || n > 0 && r.asked >= r.end {
		return
	}
	for len(r.ahead) < want && r.asked < r.end {
		var a *ask
		if n := len(r.free); n > 0 {
			a, r.free = r.free[n-1], r.free[:n-1]
		} else {
			a = &ask{buf: make([]byte, r.size)}
		}
		part := a.buf[:min(int64(r.size), r.end-r.asked)]
		r.f.askRead(&a.call, r.asked, part)
		r.asked += int64(len(part))
		r.ahead = append(r.ahead, a)
	}
}

func (r *Reader) data(ctx context.Context, call *Call) ([]byte, error) {
	b, err := call.Data(ctx)
	if err != nil {
		r.ended = err == io.EOF
		return nil, err
	}
	r.offset += int64(len(b))
	return b, nil
}

// ReadTo hands the bytes from offset to end to write, in order. It stops at the end of the file, wherever that is. It returns the number of bytes handed
// over. Reads may still be under way when it fails.
func (f *File) ReadTo(ctx context.Context, offset, end int64, write func([]byte) error) (n int64, err error) {
	for r := f.Reader(offset, end); ; {
		b, err := r.Next(ctx)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		n += int64(len(b))
		if err := write(b); err != nil {
			return n, err
		}
	}
}
