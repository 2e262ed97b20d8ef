package job

import (
	"io"
	"unicode/utf8"
)

// maxString bounds a control string (OSC, DCS and the like) that does not end, maxCSI a control sequence.
const (
	maxString = 64 << 10
	maxCSI    = 256
)

// cleaner removes what moves a terminal's cursor, colours it or makes it do things, and passes on text: UTF-8 with tabs and line
// feeds. Whatever the chunks are that it gets, what it writes is the same.
//
//   - ESC sequences, CSI, OSC, DCS, SOS, PM and APC go, whether introduced by ESC or by a C1 control, encoded in UTF-8 or as
//     a single byte. A control string that is longer than maxString or does not end is text.
//   - A carriage return before a line feed goes; another one is the end of a line, so that a progress display is legible.
//   - Other C0 and C1 controls and DEL go. Bytes that are not UTF-8 are U+FFFD.
type cleaner struct {
	w       io.Writer
	state   int
	partial []byte // the beginning of a rune
	held    []byte // a control string's text, in case that it does not end
	params  int    // characters of a CSI or ESC sequence
	cr      bool   // a carriage return waits for what follows
	begun   bool   // the line has something
	out     []byte
}

// States of the cleaner, those of ECMA-48 as terminals have them.
const (
	ground = iota
	escape // after ESC, and its intermediate characters
	csi
	controlString
	controlStringEscape // after ESC in a control string: a backslash ends it
)

func newCleaner(w io.Writer) *cleaner { return &cleaner{w: w} }

// Write cleans p. It returns len(p) unless the writer behind it fails.
func (c *cleaner) Write(p []byte) (int, error) {
	n := len(p)
	c.out = c.out[:0]
	if len(c.partial) > 0 {
		// The rune's other bytes are at most three.
		k := min(len(p), utf8.UTFMax)
		joined := append(append(make([]byte, 0, 2*utf8.UTFMax), c.partial...), p[:k]...)
		used := 0
		for used < len(c.partial) && utf8.FullRune(joined[used:]) {
			r, size := decode(joined[used:])
			c.rune(r)
			used += size
		}
		if used < len(c.partial) {
			c.partial = append(c.partial[:0], joined[used:]...) // p is all in it
			return n, c.flush()
		}
		p = p[used-len(c.partial):]
		c.partial = c.partial[:0]
	}
	for len(p) > 0 {
		if b := p[0]; b >= ' ' && b < 0x7f && c.state == ground && !c.cr {
			i := 1
			for i < len(p) && p[i] >= ' ' && p[i] < 0x7f {
				i++
			}
			c.out, c.begun = append(c.out, p[:i]...), true
			p = p[i:]
			continue
		}
		if !utf8.FullRune(p) {
			c.partial = append(c.partial[:0], p...)
			break
		}
		r, size := decode(p)
		c.rune(r)
		p = p[size:]
	}
	return n, c.flush()
}

// Close writes what was held back. It does not close the writer.
func (c *cleaner) Close() error {
	c.out = c.out[:0]
	for range c.partial {
		c.rune(utf8.RuneError)
	}
	c.partial = nil
	if c.state == controlString || c.state == controlStringEscape {
		c.giveUp()
	}
	c.state = ground
	if c.cr {
		c.cr = false
		c.endLine()
	}
	return c.flush()
}

func (c *cleaner) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.w.Write(c.out)
	return err
}

// decode is utf8.DecodeRune, but a byte that is no UTF-8 and a C1 control as such is that.
func decode(p []byte) (rune, int) {
	r, size := utf8.DecodeRune(p)
	if r == utf8.RuneError && size == 1 && p[0] >= 0x80 && p[0] <= 0x9f {
		return rune(p[0]), 1
	}
	return r, size
}

func (c *cleaner) rune(r rune) {
	// These begin anew from wherever they come.
	switch {
	case r == 0x1b && c.state == controlString:
		c.state = controlStringEscape
		return
	case c.state == controlStringEscape:
		c.state, c.held = ground, c.held[:0]
		if r == '\\' {
			return
		}
		c.rune(0x1b)
		c.rune(r)
		return
	case r == 0x1b:
		c.state, c.params = escape, 0
		return
	case r >= 0x80 && r <= 0x9f:
		c.state, c.held = ground, c.held[:0]
		c.introduce(r)
		return
	case r == 0x18 || r == 0x1a: // CAN and SUB break a sequence off.
		c.state, c.held = ground, c.held[:0]
		return
	}
	switch c.state {
	case ground:
		c.text(r)
	case controlString:
		if r == 0x07 { // as xterm ends an OSC
			c.state, c.held = ground, c.held[:0]
			return
		}
		if c.held = utf8.AppendRune(c.held, r); len(c.held) > maxString {
			c.giveUp()
		}
	case escape:
		switch {
		case r < ' ' || r == 0x7f: // a control within a sequence is obeyed
			c.text(r)
		case r <= '/':
			c.count()
		case c.params == 0 && (r == '[' || r == ']' || r == 'P' || r == 'X' || r == '^' || r == '_'):
			c.introduce(r + 0x40)
		case r <= '~':
			c.state = ground
		default:
			c.state = ground
			c.text(r)
		}
	case csi:
		switch {
		case r < ' ' || r == 0x7f:
			c.text(r)
		case r <= '?':
			c.count()
		case r <= '~':
			c.state = ground
		default:
			c.state = ground
			c.text(r)
		}
	}
}

// introduce begins what a C1 control introduces.
func (c *cleaner) introduce(r rune) {
	switch r {
	case 0x9b:
		c.state, c.params = csi, 0
	case 0x9d, 0x90, 0x98, 0x9e, 0x9f:
		c.state, c.held = controlString, c.held[:0]
	case 0x85: // next line
		c.state = ground
		c.text('\n')
	default:
		c.state = ground
	}
}

// count breaks off a sequence that is too long to be one.
func (c *cleaner) count() {
	if c.params++; c.params > maxCSI {
		c.state = ground
	}
}

// giveUp takes a control string for text. No control that begins a sequence can be in it.
func (c *cleaner) giveUp() {
	held := string(c.held)
	c.state, c.held = ground, c.held[:0]
	for _, r := range held {
		c.text(r)
	}
}

func (c *cleaner) text(r rune) {
	if c.cr {
		switch r {
		case '\r':
			return
		case '\n':
			c.cr = false
		default:
			c.cr = false
			if c.begun {
				c.endLine()
			}
		}
	}
	switch {
	case r == '\n':
		c.endLine()
	case r == '\r':
		c.cr = true
	case r == '\t', r >= ' ' && r != 0x7f:
		c.out, c.begun = utf8.AppendRune(c.out, r), true
	}
}

func (c *cleaner) endLine() { c.out, c.begun = append(c.out, '\n'), false }

// cleaned is what a cleaner makes of a text.
func cleaned(s string) string {
	var b buffer
	c := newCleaner(&b)
	_, _ = c.Write([]byte(s))
	_ = c.Close()
	return string(b)
}

type buffer []byte

func (b *buffer) Write(p []byte) (int, error) {
	*b = append(*b, p...)
	return len(p), nil
}
