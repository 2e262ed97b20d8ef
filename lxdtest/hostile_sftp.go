package lxdtest

import (
	"encoding/binary"
	"fmt"
	"sync"
)

// HostileSFTP is an SFTP server that answers as it likes. Its zero value has one file "a" in /src, of which it says the truth.
type HostileSFTP struct {
	// List is the n-th answer to a reading of a directory; nil ends it.
	List func(dir string, n int) []SFTPFile
	// File is the content of a file. "" and a nil function are "content".
	File func(name string) string
	// Link is where a symbolic link leads.
	Link func(name string) string
	// Raw answers in the stead of the others: with bytes, or, not ok, with none at all. nil and ok leaves the answer to the others. what is the path of the
	// request, or of what its handle is of.
	Raw func(kind byte, id uint32, what string) (answer []byte, ok bool)
}

// SFTPFile is a line of a listing.
type SFTPFile struct {
	Name string
	Mode uint32 // with the type, as Linux has it
	Size uint64
	Time uint32
	Has  uint32 // which attributes are sent; 0: size, owner, mode and times
	More []byte // behind the attributes
}

// Attrs are the file's attributes as they are sent.
func (f SFTPFile) Attrs() []byte {
	has := f.Has
	if has == 0 {
		has = attrSize | attrOwner | attrMode | attrTimes
	}
	be := binary.BigEndian
	b := be.AppendUint32(nil, has)
	if has&attrSize != 0 {
		b = be.AppendUint64(b, f.Size)
	}
	if has&attrOwner != 0 {
		b = be.AppendUint64(b, 0)
	}
	if has&attrMode != 0 {
		b = be.AppendUint32(b, f.Mode)
	}
	if has&attrTimes != 0 {
		b = be.AppendUint32(be.AppendUint32(b, f.Time), f.Time)
	}
	return append(b, f.More...)
}

// SFTPString is a string with its length.
func SFTPString(s string) []byte { return putStr(nil, s) }

// SFTPPacket frames an answer.
func SFTPPacket(kind byte, id uint32, body ...[]byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte{0, 0, 0, 0, kind}, id)
	for _, part := range body {
		b = append(b, part...)
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

// SFTPStatus is an answer that says how a request ended.
func SFTPStatus(id, code uint32, text string) []byte {
	return SFTPPacket(fxStatus, id, binary.BigEndian.AppendUint32(nil, code), SFTPString(text), SFTPString(""))
}

// SFTPNames is an answer that lists files.
func SFTPNames(id uint32, files ...SFTPFile) []byte {
	body := binary.BigEndian.AppendUint32(nil, uint32(len(files)))
	for _, f := range files {
		body = append(append(append(body, SFTPString(f.Name)...), SFTPString("")...), f.Attrs()...)
	}
	return SFTPPacket(fxName, id, body)
}

// Faults make a server answer so, to one session after the other.
func (h HostileSFTP) Faults() []Fault {
	var mu sync.Mutex // guards the state
	state := &hostileState{reads: map[string]int{}}
	return []Fault{
		{Route: RouteSFTP, Moment: OnReceive, Do: func(p *Point) Verdict {
			mu.Lock()
			defer mu.Unlock()
			state.kind, state.body = p.Data[0], append([]byte(nil), p.Data[1:]...)
			return Proceed
		}},
		{Route: RouteSFTP, Moment: OnSend, Do: func(p *Point) Verdict {
			mu.Lock()
			defer mu.Unlock()
			b, ok := h.answer(state)
			if !ok {
				return Skip
			}
			if b != nil {
				p.Data = b
			}
			return Proceed
		}},
	}
}

// hostileState is what the server remembers.
type hostileState struct {
	kind    byte // of the request
	body    []byte
	reads   map[string]int // of directories
	handles []string       // what they are of
}

// answer answers one request.
func (h HostileSFTP) answer(s *hostileState) ([]byte, bool) {
	kind, body, reads := s.kind, s.body, s.reads
	if len(body) < 8 {
		return nil, true // the greeting
	}
	id, n := binary.BigEndian.Uint32(body), binary.BigEndian.Uint32(body[4:])
	what := string(body[8 : 8+n])
	rest := body[8+n:]
	var at int
	if _, err := fmt.Sscanf(what, "handle %d", &at); err == nil && at < len(s.handles) {
		what = s.handles[at]
	}
	if h.Raw != nil {
		if b, ok := h.Raw(kind, id, what); b != nil || !ok {
			return b, ok
		}
	}
	content := func() string {
		if h.File != nil {
			if c := h.File(what); c != "" {
				return c
			}
		}
		return "content"
	}
	switch kind {
	case fxOpen, fxOpendir:
		s.handles = append(s.handles, what)
		return SFTPPacket(fxHandle, id, SFTPString(fmt.Sprint("handle ", len(s.handles)-1))), true
	case fxReaddir:
		var files []SFTPFile
		if h.List != nil {
			files = h.List(what, reads[what])
		} else if what == "/src" && reads[what] == 0 {
			files = []SFTPFile{honest("a", 7)}
		}
		reads[what]++
		if files == nil {
			return SFTPStatus(id, 1, "end"), true
		}
		return SFTPNames(id, files...), true
	case fxRead:
		offset, size := binary.BigEndian.Uint64(rest), binary.BigEndian.Uint32(rest[8:])
		c := content()
		if offset >= uint64(len(c)) {
			return SFTPStatus(id, 1, "end"), true
		}
		return SFTPPacket(fxData, id, SFTPString(c[offset:min(offset+uint64(size), uint64(len(c)))])), true
	case fxStat, fxLstat, fxFstat:
		return SFTPPacket(fxAttrs, id, honest(what, uint64(len(content()))).Attrs()), true
	case fxReadlink:
		return SFTPNames(id, SFTPFile{Name: h.Link(what)}), true
	}
	return SFTPStatus(id, 0, ""), true
}

func honest(name string, size uint64) SFTPFile {
	return SFTPFile{Name: name, Mode: 0o100644, Size: size, Time: 1e9}
}
