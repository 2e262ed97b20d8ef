package lxdtest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
)

// Tar streams built by hand, block by block, with what no tar would write, and a host whose tar sends them.

// HostileTar is a host whose one command is a tar that says and sends what it likes. Its Handler is a [Handler].
type HostileTar struct {
	Answer string // what comes first on standard output: which tar it is
	Send   any    // what follows: []byte, or func(io.Writer) for what does not end; nil: nothing
	Says   string // on standard error
	Status int
}

// Handler acts the tar towards scripts that ask for its version, and knows no other command.
func (h HostileTar) Handler(p *Process) int {
	if len(p.Args) < 3 || !strings.Contains(p.Args[2], "tar --version") {
		return 127
	}
	// Who does not listen any more gets the status all the same.
	_, _ = io.WriteString(p.Stderr, h.Says)
	_, _ = io.WriteString(p.Stdout, h.Answer)
	switch send := h.Send.(type) {
	case []byte:
		_, _ = p.Stdout.Write(send)
	case func(io.Writer):
		send(p.Stdout)
	}
	return h.Status
}

// RawHeader is a tar header. Its fields are those of the block; "" and 0 are what a well-meaning tar would write.
type RawHeader struct {
	Name, Prefix, Link string
	Kind               byte   // '0'
	Mode, Size, Time   string // the fields' bytes
	Magic              string // "ustar\x0000"
	Patch              func(block []byte)
}

// Magic numbers of the formats.
const (
	RawUSTAR = "ustar\x0000"
	RawGNU   = "ustar  \x00"
	RawV7    = "\x00\x00\x00\x00\x00\x00\x00\x00"
)

// Raw is the header's block, with its checksum.
func (h RawHeader) Raw() []byte {
	or := func(s, otherwise string) string {
		if s == "" {
			return otherwise
		}
		return s
	}
	b := make([]byte, 512)
	copy(b[:100], h.Name)
	copy(b[100:], or(h.Mode, "0000644\x00"))
	copy(b[108:], "0000000\x000000000\x00")
	copy(b[124:136], or(h.Size, RawOctal(0)))
	copy(b[136:148], or(h.Time, RawOctal(1e9)))
	b[156] = '0'
	if h.Kind != 0 {
		b[156] = h.Kind
	}
	copy(b[157:257], h.Link)
	copy(b[257:265], or(h.Magic, RawUSTAR))
	copy(b[345:500], h.Prefix)
	if h.Patch != nil {
		h.Patch(b)
	}
	sum := 8 * int(' ')
	for i, c := range b {
		if i < 148 || i >= 156 {
			sum += int(c)
		}
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// RawOctal is a number in a field of 12 bytes.
func RawOctal(n int64) string { return fmt.Sprintf("%011o\x00", n) }

// RawBase256 is a number in a field of 12 bytes in the form that GNU tar has for large and negative ones.
func RawBase256(n int64) string {
	b := make([]byte, 12)
	if n < 0 {
		b = bytes.Repeat([]byte{0xff}, 12)
	}
	binary.BigEndian.PutUint64(b[4:], uint64(n))
	b[0] |= 0x80
	return string(b)
}

// RawBlocks fills data up to full blocks.
func RawBlocks(data string) []byte {
	return append([]byte(data), make([]byte, (512-len(data)%512)%512)...)
}

// RawTar puts parts together: []byte as it is, a string as blocks of content, a RawHeader as its block.
func RawTar(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case []byte:
			b = append(b, p...)
		case string:
			b = append(b, RawBlocks(p)...)
		case RawHeader:
			b = append(b, p.Raw()...)
		default:
			panic(fmt.Sprintf("a %T in a tar stream", p))
		}
	}
	return b
}

// RawSized is a header of any kind with content of that size behind it.
func RawSized(kind byte, name, content string) []byte {
	return RawTar(RawHeader{Name: name, Kind: kind, Size: RawOctal(int64(len(content)))}, content)
}

// The common entries.
func RawFile(name, content string) []byte { return RawSized('0', name, content) }
func RawDir(name string) []byte           { return RawHeader{Name: name, Kind: '5', Mode: "0000755\x00"}.Raw() }
func RawLink(name, target string) []byte  { return RawHeader{Name: name, Link: target, Kind: '2'}.Raw() }
func RawHard(name, target string) []byte  { return RawHeader{Name: name, Link: target, Kind: '1'}.Raw() }
func RawOf(kind byte, name string) []byte { return RawHeader{Name: name, Kind: kind}.Raw() }
func RawEnd() []byte                      { return make([]byte, 1024) }
func RawTop() []byte                      { return RawDir("./") }

// RawWhole is a stream as a tar begins and ends it.
func RawWhole(parts ...any) []byte {
	return RawTar(append(append([]any{RawTop()}, parts...), RawEnd())...)
}

// RawLong is GNU's way to give the next entry a name ('L') or a target ('K') of any length.
func RawLong(kind byte, name string) []byte {
	content := name + "\x00"
	return RawTar(RawHeader{Name: "././@LongLink", Kind: kind, Magic: RawGNU, Size: RawOctal(int64(len(content)))}, content)
}

// RawPAX is an extended header ('x', or 'g' for all that follow) of keys and values.
func RawPAX(kind byte, records ...string) []byte {
	var b strings.Builder
	for i := 0; i+1 < len(records); i += 2 {
		b.WriteString(RawRecord(records[i], records[i+1]))
	}
	return RawSized(kind, "PaxHeaders.0/x", b.String())
}

// RawRecord is a record of an extended header.
func RawRecord(key, value string) string {
	rest := " " + key + "=" + value + "\n"
	for n := len(rest); ; n++ {
		if s := fmt.Sprint(n) + rest; len(s) == n {
			return s
		}
	}
}

// RawSparse is a file with GNU's old sparse map: pairs of offset and length.
func RawSparse(name string, size int64, extended bool, pairs ...int64) []byte {
	return RawHeader{Name: name, Kind: 'S', Magic: RawGNU, Patch: func(b []byte) {
		for i := 0; i < len(pairs) && i < 8; i++ {
			copy(b[386+12*i:], RawBase256(pairs[i]))
		}
		if extended {
			b[482] = 1
		}
		copy(b[483:495], RawBase256(size))
	}}.Raw()
}
