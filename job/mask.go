package job

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// mask is what stands for a secret in a log.
const mask = "***"

// minForm is the length from which on an encoded form of a secret is masked, and a line of one with several: a shorter one would be found in
// too much that is none.
const minForm = 6

// secretForms is how secrets may appear in a log: as they are, what a cleaner makes of them, line by line, in base64 at each of
// three places that the beginning of a group of three bytes can be, in URLs and in JSON.
func secretForms(secrets []string) []string {
	seen := map[string]bool{}
	var forms []string
	add := func(s string, least int) {
		if len(s) >= least && strings.Trim(s, "\n\r") != "" && !seen[s] {
			seen[s] = true
			forms = append(forms, s)
		}
	}
	for _, secret := range secrets {
		for _, s := range []string{secret, cleaned(secret), strings.Trim(cleaned(secret), "\n")} {
			add(s, 1)
			for _, line := range strings.Split(s, "\n") {
				add(line, minForm)
			}
			for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
				for offset := range 3 {
					coded := base64At(enc, s, offset)
					add(coded, minForm)
					for _, part := range wrapped(coded, offset) {
						add(part, minForm)
					}
				}
			}
			for _, as := range urlEncodings {
				u := as.encode(s)
				add(u, minForm)
				add(lowerEscapes(u), minForm)
			}
			if j, err := json.Marshal(s); err == nil {
				add(string(j[1:len(j)-1]), minForm)
			}
		}
	}
	return forms
}

// base64At is the characters that a secret determines alone when offset bytes of something else are before it.
func base64At(enc *base64.Encoding, s string, offset int) string {
	coded := enc.EncodeToString(append(make([]byte, offset), s...))
	first := (8*offset + 5) / 6
	last := 8 * (offset + len(s)) / 6
	if first >= last {
		return ""
	}
	return coded[first:last]
}

// Base64 is written in lines of 76 or 64 characters, so that a long secret is not found as a whole. Of one that begins where the
// text begins the lines are known. Others are found by windows of so many characters, if they are not so long that this would take too much memory; what is left
// of their lines is shorter than a window.
const (
	window    = 16
	maxWindow = 1 << 10
)

// wrapped is what may be found of a secret in base64 that is written in several lines.
func wrapped(coded string, offset int) (parts []string) {
	if len(coded) <= 64-window {
		return nil
	}
	if offset == 0 {
		for _, width := range []int{76, 64} {
			for rest := coded; len(rest) > 0; rest = rest[min(width, len(rest)):] {
				parts = append(parts, rest[:min(width, len(rest))])
			}
		}
	}
	if len(coded) <= maxWindow {
		for i := 0; i+window <= len(coded); i++ {
			parts = append(parts, coded[i:i+window])
		}
	}
	return parts
}

// urlEncoding is what a URL encoder leaves alone besides letters and digits, and what it makes of a space.
type urlEncoding struct{ keeps, space string }

var urlEncodings = []urlEncoding{
	{"-_.~", "%20"},                 // RFC 3986: curl, PHP's rawurlencode, jq's @uri
	{"-_.~", "+"},                   // url.QueryEscape, Python's quote_plus
	{"-_.~/", "%20"},                // Python's quote
	{"-_.~$&+=:@", "%20"},           // url.PathEscape
	{"-_.~$&+,;=", "%20"},           // url.UserPassword
	{"-_.!~*'()", "%20"},            // encodeURIComponent
	{"-_.!~*'();/?:@&=+$,#", "%20"}, // encodeURI
	{"-_.*", "+"},                   // HTML forms, Java's URLEncoder
}

func (e urlEncoding) encode(s string) string {
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte(e.keeps, c) >= 0:
			b.WriteByte(c)
		case c == ' ':
			b.WriteString(e.space)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// lowerEscapes writes %2F as %2f.
func lowerEscapes(s string) string {
	b := []byte(s)
	for i := 0; i+2 < len(b); i++ {
		if b[i] == '%' {
			copy(b[i+1:i+3], strings.ToLower(string(b[i+1:i+3])))
			i += 2
		}
	}
	return string(b)
}

// dictionary finds many words at once in one pass (Aho and Corasick). It is not modified once it is built.
type dictionary struct {
	nodes []node
	root  [256]int32 // the root's children; 0: none
}

// node is the beginning of a word. Long secrets make millions of them, most with one child: so children are a list, not a map.
type node struct {
	child   int32 // the first one; 0: none
	sibling int32 // the next child of the same parent; 0: none
	fail    int32
	depth   int32
	match   int32 // length of the longest word that ends here; 0: none
	b       byte  // that leads here
}

func newDictionary(words []string) *dictionary {
	d := &dictionary{nodes: make([]node, 1)}
	for _, w := range words {
		at := int32(0)
		for i := range len(w) {
			to := d.child(at, w[i])
			if to == 0 {
				to = int32(len(d.nodes))
				d.nodes = append(d.nodes, node{depth: d.nodes[at].depth + 1, b: w[i], sibling: d.nodes[at].child})
				if at == 0 {
					d.root[w[i]] = to
				}
				d.nodes[at].child = to
			}
			at = to
		}
		if at != 0 {
			d.nodes[at].match = int32(len(w))
		}
	}
	queue := []int32{0}
	for len(queue) > 0 {
		at := queue[0]
		queue = queue[1:]
		for to := d.nodes[at].child; to != 0; to = d.nodes[to].sibling {
			queue = append(queue, to)
			if at == 0 {
				continue
			}
			n := &d.nodes[to]
			n.fail = d.step(d.nodes[at].fail, n.b)
			n.match = max(n.match, d.nodes[n.fail].match)
		}
	}
	return d
}

// child is the beginning that has one byte more; 0: there is none.
func (d *dictionary) child(at int32, b byte) int32 {
	if at == 0 {
		return d.root[b]
	}
	to := d.nodes[at].child
	for to != 0 && d.nodes[to].b != b {
		to = d.nodes[to].sibling
	}
	return to
}

// step is the longest beginning of a word that the text ends with after one more byte.
func (d *dictionary) step(at int32, b byte) int32 {
	for at != 0 {
		if to := d.child(at, b); to != 0 {
			return to
		}
		at = d.nodes[at].fail
	}
	return d.root[b]
}

// masker writes *** for every run of bytes that belong to secrets. It holds back what may be the beginning of one, and
// nothing else. Whatever the chunks are that it gets, what it writes is the same. The time it takes does not depend on how long secrets are.
type masker struct {
	w      io.Writer
	d      *dictionary
	at     int32
	pos    int64  // of the next byte
	held   []byte // the last of them are not written yet
	first  int    // of these, in held
	spans  []span // that belong to secrets, in order, with something between them; those before the first byte held are gone
	masked bool   // the last that was written was a mask
	out    []byte
}

// span is the bytes at positions from begin to before end.
type span struct{ begin, end int64 }

func newMasker(w io.Writer, d *dictionary) *masker { return &masker{w: w, d: d} }

// Write masks p. It returns len(p) unless the writer behind it fails.
func (m *masker) Write(p []byte) (int, error) {
	if len(m.d.nodes) == 1 {
		return m.w.Write(p)
	}
	m.out = m.out[:0]
	for _, b := range p {
		m.at = m.d.step(m.at, b)
		m.pos++
		n := &m.d.nodes[m.at]
		if n.depth == 0 && len(m.held) == m.first { // most bytes
			m.out, m.masked = append(m.out, b), false
			continue
		}
		m.held = append(m.held, b)
		if n.match > 0 {
			m.cover(m.pos - int64(n.match))
		}
		if keep := int(n.depth); keep < len(m.held)-m.first {
			m.release(len(m.held) - m.first - keep)
		}
	}
	return len(p), m.flush()
}

// cover marks what is from begin to here as a secret.
func (m *masker) cover(begin int64) {
	for len(m.spans) > 0 {
		last := &m.spans[len(m.spans)-1]
		if last.begin < begin {
			if last.end >= begin {
				last.end = m.pos
				return
			}
			break
		}
		m.spans = m.spans[:len(m.spans)-1]
	}
	m.spans = append(m.spans, span{begin, m.pos})
}

// Close writes what was held back. It does not close the writer.
func (m *masker) Close() error {
	m.out = m.out[:0]
	m.release(len(m.held) - m.first)
	m.at, m.masked = 0, false
	return m.flush()
}

// release decides about the first n bytes held.
func (m *masker) release(n int) {
	pos := m.pos - int64(len(m.held)-m.first)
	for _, b := range m.held[m.first : m.first+n] {
		for len(m.spans) > 0 && m.spans[0].end <= pos {
			m.spans = m.spans[1:]
		}
		switch {
		case len(m.spans) == 0 || pos < m.spans[0].begin:
			m.out, m.masked = append(m.out, b), false
		case !m.masked:
			m.out, m.masked = append(m.out, mask...), true
		}
		pos++
	}
	// Moved to the front only when that pays.
	if m.first += n; m.first >= len(m.held)-m.first {
		m.held, m.first = m.held[:copy(m.held, m.held[m.first:])], 0
	}
}

func (m *masker) flush() error {
	if len(m.out) == 0 {
		return nil
	}
	_, err := m.w.Write(m.out)
	return err
}
