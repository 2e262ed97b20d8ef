package job

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

// chunked writes in pieces of random length.
func chunked(t testing.TB, w interface{ Write([]byte) (int, error) }, s string, rng *rand.Rand) {
	for p := []byte(s); len(p) > 0; {
		n := 1 + rng.IntN(min(len(p), 7))
		k, err := w.Write(p[:n])
		require.NoError(t, err)
		require.Equal(t, n, k)
		p = p[n:]
	}
}

func TestCleaner(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ name, in, want string }{
		{"text", "plain\ttext\n", "plain\ttext\n"},
		{"UTF-8", "Grüße 世界 🦀 \u00a0\n", "Grüße 世界 🦀 \u00a0\n"},
		{"colours", "\x1b[1;31mred\x1b[0m\n", "red\n"},
		{"private parameters", "\x1b[?25lx\x1b[?2004h", "x"},
		{"intermediate characters", "a\x1b[4 qb\x1b(Bc\x1b#8d", "abcd"},
		{"OSC with BEL", "\x1b]0;title\x07text", "text"},
		{"OSC with ST", "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"},
		{"OSC with UTF-8 that contains the byte 9C", "\x1b]0;✓✜\x1b\\text", "text"},
		{"DCS", "\x1bPq#0;2\nabc\x1b\\text", "text"},
		{"SOS, PM, APC", "\x1bXa\x1b\\1\x1b^b\x1b\\2\x1b_c\x1b\\3", "123"},
		{"C1 in UTF-8", "a\u009b31mb\u009d0;t\u009cc\u0090x\u009cd\u0080e", "abcde"},
		{"C1 as bytes", "a\x9b31mb\x9d0;t\x9cc\x90x\x9cd\x80e", "abcde"},
		{"C1 byte behind the beginning of a rune", "\xe2\x1b[m\x82\xac", "\ufffd\ufffd"},
		{"a control string that another sequence breaks off", "\x1b]0;t\x1b[1mtext", "text"},
		{"CAN breaks off", "a\x1b[3\x18b", "ab"},
		{"a control in a sequence", "a\x1b[3\n1mb", "a\nb"},
		{"CRLF", "a\r\nb\r\r\n", "a\nb\n"},
		{"lone CR", "10%\r20%\r\n", "10%\n20%\n"},
		{"CR at the beginning of a line", "\rx\n\ry", "x\ny"},
		{"CR, then a sequence", "a\r\x1b[Kb\n", "a\nb\n"},
		{"CR at the end", "a\r", "a\n"},
		{"other controls", "a\x00\x07\x08\x0b\x0c\x0e\x7fb", "ab"},
		{"no UTF-8", "a\xff\xfeb\xc3", "a\ufffd\ufffdb\ufffd"},
		{"unfinished ESC", "a\x1b", "a"},
		{"unfinished CSI", "a\x1b[12", "a"},
		{"unfinished OSC", "a\x1b]0;all of the rest\n", "a0;all of the rest\n"},
		{"OSC without end", "\x1b]" + strings.Repeat("x", maxString+10), strings.Repeat("x", maxString+10)},
		{"CSI without end", "\x1b[" + strings.Repeat("1", maxCSI+1) + "x", "x"},
		{"next line", "a\x1bEb\u0085c", "ab\nc"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, row.want, cleaned(row.in))
			for seed := range uint64(20) {
				var b bytes.Buffer
				c := newCleaner(&b)
				chunked(t, c, row.in, rand.New(rand.NewPCG(seed, 1)))
				require.NoError(t, c.Close())
				require.Equal(t, row.want, b.String(), "seed %d", seed)
			}
		})
	}
}

func FuzzCleaner(f *testing.F) {
	f.Add("a\x1b[31mb\xe2\x82\r\n\u009d0;x\x9c", uint64(1))
	f.Add("\x1b]0;\xf0\x9f\x1b\\\x90\xf0", uint64(2))
	f.Fuzz(func(t *testing.T, s string, seed uint64) {
		want := cleaned(s)
		require.True(t, utf8.ValidString(want))
		for _, r := range want {
			require.False(t, r != '\n' && r != '\t' && (r < ' ' || r >= 0x7f && r <= 0x9f), "%q of %q", want, s)
		}
		require.Equal(t, want, cleaned(want), "cleaning twice")
		var b bytes.Buffer
		c := newCleaner(&b)
		chunked(t, c, s, rand.New(rand.NewPCG(seed, 1)))
		require.NoError(t, c.Close())
		require.Equal(t, want, b.String(), "of %q", s)
		if utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return r != '\n' && r != '\t' && (r < ' ' || r >= 0x7f && r <= 0x9f) }) {
			require.Equal(t, s, want, "text is left alone")
		}
	})
}

func masked(t testing.TB, s string, rng *rand.Rand, secrets ...string) string {
	var b bytes.Buffer
	m := newMasker(&b, newDictionary(secretForms(secrets)))
	if rng == nil {
		_, err := m.Write([]byte(s))
		require.NoError(t, err)
	} else {
		chunked(t, m, s, rng)
	}
	require.NoError(t, m.Close())
	return b.String()
}

func TestMasker(t *testing.T) {
	t.Parallel()
	const secret = "p&ss/wörd?+1"
	b64 := func(prefix string) string { return base64.StdEncoding.EncodeToString([]byte(prefix + secret + "tail")) }
	for _, row := range []struct{ name, in, want string }{
		{"as it is", "a " + secret + " b", "a *** b"},
		{"at the end", "a " + secret, "a ***"},
		{"twice in a row", secret + secret, "***"},
		{"a beginning only", "p&ss/wör", "p&ss/wör"},
		{"a beginning, then all", "p&ssp&ss/wörd?+1x", "p&ss***x"},
		{"query", "u=" + url.QueryEscape(secret), "u=***"},
		{"path", "u=" + url.PathEscape(secret), "u=***"},
		{"RFC 3986", "u=p%26ss%2Fw%C3%B6rd%3F%2B1", "u=***"},
		{"RFC 3986 with slashes", "u=p%26ss/w%C3%B6rd%3F%2B1", "u=***"},
		{"lower case escapes", "u=" + strings.ToLower(url.QueryEscape(secret)), "u=***"},
		{"JSON", `"p\u0026ss/wörd?+1"`, `"***"`},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, row.want, masked(t, row.in, nil, secret))
			for seed := range uint64(20) {
				require.Equal(t, row.want, masked(t, row.in, rand.New(rand.NewPCG(seed, 2)), secret))
			}
		})
	}
	for _, prefix := range []string{"", "x", "xy", "xyz"} {
		for _, enc := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
			coded := enc.EncodeToString([]byte(prefix + secret + "tail"))
			out := masked(t, coded, rand.New(rand.NewPCG(3, 3)), secret)
			require.Contains(t, out, mask, coded)
			// No more than the characters at the edges, which hold bits of its neighbours, are left.
			require.LessOrEqual(t, len(out), len(coded)-len(secret)*8/6+2+len(mask), "%s of %s", out, b64(prefix))
		}
	}
	require.Equal(t, "*** and *** and ***", masked(t, "one and abc and a-longer-one", nil, "one", "abc", "", "a-longer-one", "longer"))
	pem := "-----BEGIN KEY-----\r\nc2VjcmV0bGluZTE=\r\nZW5kb2ZpdA==\r\n-----END KEY-----\r\n"
	require.NotContains(t, masked(t, cleaned("key: "+pem), nil, pem), "c2Vjcm")
	require.Equal(t, "  > ***\n", masked(t, "  > c2VjcmV0bGluZTE=\n", nil, pem), "a line of it alone")
}

func TestMaskerFindsWhatURLEncodersMake(t *testing.T) {
	t.Parallel()
	const secret = "a b!c~d'e(f)g*h/i$j&k+l=m:n@o"
	for _, coded := range []string{
		"a%20b%21c~d%27e%28f%29g%2Ah%2Fi%24j%26k%2Bl%3Dm%3An%40o", // jq @uri
		"a%20b!c~d'e(f)g*h%2Fi%24j%26k%2Bl%3Dm%3An%40o",           // encodeURIComponent
		"a%20b!c~d'e(f)g*h/i$j&k+l=m:n@o",                         // encodeURI
		"a+b%21c%7Ed%27e%28f%29g*h%2Fi%24j%26k%2Bl%3Dm%3An%40o",   // a form
		"a%20b%21c~d%27e%28f%29g%2Ah/i%24j%26k%2Bl%3Dm%3An%40o",   // Python's quote
		url.QueryEscape(secret), url.PathEscape(secret), url.UserPassword("u", secret).String()[2:],
	} {
		require.Equal(t, "<***>", masked(t, "<"+coded+">", nil, secret))
		require.Equal(t, "<***>", masked(t, "<"+strings.ToLower(coded)+">", nil, secret))
	}
}

func TestMaskerFindsWrappedBase64(t *testing.T) {
	t.Parallel()
	for _, length := range []int{60, 200, 3000} {
		rng := rand.New(rand.NewPCG(uint64(length), 1))
		secret := make([]byte, length)
		for i := range secret {
			secret[i] = byte('!' + rng.IntN(90))
		}
		for _, prefix := range []string{"", "user:", "a", "ab"} {
			if prefix != "" && length > 700 {
				continue
			}
			coded := base64.StdEncoding.EncodeToString([]byte(prefix + string(secret)))
			for _, width := range []int{76, 64} {
				var lines strings.Builder
				for rest := coded; rest != ""; rest = rest[min(width, len(rest)):] {
					lines.WriteString(rest[:min(width, len(rest))] + "\n")
				}
				out := masked(t, lines.String(), rng, string(secret))
				for line := range strings.Lines(out) {
					require.Less(t, len(strings.ReplaceAll(line, mask, "")), window+8, "%d bytes behind %q: %s", length, prefix, out)
				}
			}
		}
	}
}

// TestMaskerIsNotSlowedDown has every byte end a long secret, and then hold back a long beginning of one.
func TestMaskerIsNotSlowedDown(t *testing.T) {
	t.Parallel()
	secret := strings.Repeat("a", 40_000)
	text := strings.Repeat("a", 4<<20)
	require.Equal(t, mask, masked(t, text, nil, secret))
	require.Equal(t, text, masked(t, text, nil, secret+"b"))
	require.Equal(t, text+mask, masked(t, text+secret+"b", nil, secret+"b"))
}

// naive masks in the obvious way.
func naive(s string, forms []string) string {
	secret := make([]bool, len(s))
	for _, f := range forms {
		for i := 0; i+len(f) <= len(s); i++ {
			if s[i:i+len(f)] == f {
				for k := range len(f) {
					secret[i+k] = true
				}
			}
		}
	}
	var b strings.Builder
	for i := range len(s) {
		if !secret[i] {
			b.WriteByte(s[i])
		} else if i == 0 || !secret[i-1] {
			b.WriteString(mask)
		}
	}
	return b.String()
}

func FuzzMasker(f *testing.F) {
	f.Add("some abcabcabd text", "abcabd", "bca", uint64(1))
	f.Add("aaaaaaab", "aaab", "aa", uint64(2))
	f.Fuzz(func(t *testing.T, s, one, two string, seed uint64) {
		forms := secretForms([]string{one, two})
		require.Equal(t, naive(s, forms), masked(t, s, rand.New(rand.NewPCG(seed, 1)), one, two))
	})
}

func TestLog(t *testing.T) {
	t.Parallel()
	clock := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC)
	var b bytes.Buffer
	l := NewLog(&b, &LogOptions{Secrets: []string{"hunter2"}, Timestamps: true, Now: func() time.Time { return clock }})
	out, err := l.Stream(), l.Stream()
	for _, w := range []struct {
		s *Stream
		p string
	}{{out, "one hun"}, {err, "war\x1b["}, {out, "ter2\ntwo"}, {err, "1mning\n"}, {out, " is long\n"}, {err, "end"}} {
		_, e := w.s.Write([]byte(w.p))
		require.NoError(t, e)
	}
	require.NoError(t, out.Close())
	require.NoError(t, err.Close())
	require.NoError(t, l.Close())
	const at = "2026-01-02T03:04:05.006Z "
	require.Equal(t, at+"one ***\n"+at+"warning\n"+at+"two is long\n"+at+"end\n", b.String())
}

func TestLogLongLinesOfTwoStreamsDoNotMix(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	l := NewLog(&b, nil)
	one, two := l.Stream(), l.Stream()
	fmt.Fprint(one, strings.Repeat("1", maxLine+1))
	fmt.Fprint(two, "2\n")
	fmt.Fprint(one, "1\n")
	require.NoError(t, one.Close())
	require.NoError(t, two.Close())
	require.NoError(t, l.Close())
	require.Equal(t, strings.Repeat("1", maxLine+1)+"\n2\n1\n", b.String())
}

func TestLogIsBounded(t *testing.T) {
	t.Parallel()
	for _, limit := range []int64{4, 100, 1000, 1 << 20} {
		for seed := range uint64(10) {
			rng := rand.New(rand.NewPCG(seed, uint64(limit)))
			var in strings.Builder
			for range rng.IntN(4 * int(min(limit, 2000))) {
				fmt.Fprintf(&in, "line %d\n", rng.IntN(1000))
			}
			var b bytes.Buffer
			l := NewLog(&b, &LogOptions{MaxBytes: limit})
			s := l.Stream()
			chunked(t, s, in.String(), rng)
			require.NoError(t, s.Close())
			require.NoError(t, l.Close())
			note := regexp.MustCompile(`\n?\[(\d+) bytes of the log are left out here\]\n`)
			got := b.String()
			if int64(in.Len()) <= limit {
				require.Equal(t, in.String(), got)
				continue
			}
			parts := note.Split(got, -1)
			require.Len(t, parts, 2)
			require.True(t, strings.HasPrefix(in.String(), parts[0]))
			require.True(t, strings.HasSuffix(in.String(), parts[1]))
			require.LessOrEqual(t, int64(len(parts[0])+len(parts[1])), limit)
			left := note.FindStringSubmatch(got)[1]
			require.Equal(t, fmt.Sprint(in.Len()-len(parts[0])-len(parts[1])), left)
		}
	}
}

// appearances is how a secret may be written: as it is, in base64 behind some other bytes, for URLs, in JSON. hidden is what must not be in the log then.
func appearances(secret string) (written, hidden []string) {
	add := func(w, h string) { written, hidden = append(written, w), append(hidden, h) }
	add(secret, secret)
	for _, enc := range []*base64.Encoding{base64.StdEncoding, base64.RawURLEncoding} {
		for before := range 3 {
			coded := enc.EncodeToString([]byte("xyz"[:before] + secret + "end"))
			// What is at the edges holds bits of other bytes, too.
			add(coded, coded[(8*before+5)/6:8*(before+len(secret))/6])
		}
	}
	for _, w := range []string{url.QueryEscape(secret), url.PathEscape(secret), strings.ReplaceAll(url.QueryEscape(secret), "+", "%20")} {
		add(w, w)
	}
	j, _ := json.Marshal(secret)
	add(string(j), string(j[1:len(j)-1]))
	return written, hidden
}

// FuzzLog sends text with a secret through the whole chain, in chunks and at once: the log is the same, has no control characters, is not longer than it may be, and
// the secret is in it in no form, even where colours or chunks cut it in two.
func FuzzLog(f *testing.F) {
	f.Add("before\x1b[1", "mafter\r", "word", "\x1b[0;31m", uint64(1), uint16(0))
	f.Add("€\xe2\x82", "\x9b1m\n", "päss/wörd?+&", "\u009d0;t\x07", uint64(2), uint16(40))
	f.Add("line\nline", "\u0090", "two\nlines of it", "\x1bPq#\x1b\\", uint64(3), uint16(300))
	f.Fuzz(func(t *testing.T, before, after, secret, within string, seed uint64, limit uint16) {
		for _, r := range secret {
			if r < ' ' && r != '\n' && r != '\t' || r >= 0x7f && r <= 0x9f || r == utf8.RuneError || r == '*' {
				t.Skip("what becomes of such a secret depends on the text around it")
			}
		}
		secret = "k€y" + secret // so that it is in nothing that the log says by itself
		if cleaned("x"+within+"y") != "xy" {
			within = ""
		}
		rng := rand.New(rand.NewPCG(seed, 1))
		written, hidden := appearances(secret)
		i := rng.IntN(len(written))
		cut := rng.IntN(len(written[i]) + 1)
		for !utf8.ValidString(written[i][:cut]) {
			cut--
		}
		// An unfinished sequence in front would swallow the beginning, and so do two secrets: a line feed alone does not end it.
		text := before + "\x18\n" + written[i][:cut] + within + written[i][cut:] + "\n" + after
		if cleaned(before+"\x18") != cleaned(before)+cleaned("\x18") {
			text = "\n" + written[i][:cut] + within + written[i][cut:] + "\n" + after
		}
		opts := &LogOptions{Secrets: []string{secret}, Timestamps: seed%2 == 0, Now: func() time.Time { return time.Time{} }, MaxBytes: int64(limit)}
		var logs [2]bytes.Buffer
		for k := range logs {
			l := NewLog(&logs[k], opts)
			s := l.Stream()
			if k == 0 {
				_, err := s.Write([]byte(text))
				require.NoError(t, err)
			} else {
				chunked(t, held{t, s, secret}, text, rng)
			}
			require.NoError(t, s.Close())
			require.NoError(t, l.Close())
		}
		out := logs[0].String()
		require.Equal(t, out, logs[1].String(), "of %q", text)
		require.True(t, utf8.ValidString(out), "%q of %q", out, text)
		for _, r := range out {
			require.False(t, r != '\n' && r != '\t' && (r < ' ' || r >= 0x7f && r <= 0x9f), "%q of %q", out, text)
		}
		if len(hidden[i]) >= minForm {
			require.NotContains(t, out, hidden[i], "of %q", text)
		}
		if limit > 0 {
			require.LessOrEqual(t, len(regexp.MustCompile(`\n?\[\d+ bytes of the log are left out here\]\n`).ReplaceAllString(out, "")), int(limit))
		}
	})
}

// held is a stream whose memory is looked at after each Write.
type held struct {
	t      *testing.T
	s      *Stream
	secret string
}

func (h held) Write(p []byte) (int, error) {
	n, err := h.s.Write(p)
	require.LessOrEqual(h.t, len(h.s.clean.held), maxString+utf8.UTFMax)
	require.Less(h.t, len(h.s.clean.partial), utf8.UTFMax)
	require.Less(h.t, len(h.s.mask.held), 2*6*len(h.secret)+1) // the longest form is JSON's \u0026
	require.LessOrEqual(h.t, len(h.s.line), maxLine)
	return n, err
}

func TestLogIsBoundedBetweenCharacters(t *testing.T) {
	t.Parallel()
	for limit := int64(1); limit < 40; limit++ {
		var b bytes.Buffer
		l := NewLog(&b, &LogOptions{MaxBytes: limit})
		s := l.Stream()
		fmt.Fprint(s, strings.Repeat("€🦀ä", 20))
		require.NoError(t, s.Close())
		require.NoError(t, l.Close())
		require.True(t, utf8.Valid(b.Bytes()), "%d: %q", limit, b.String())
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

func TestLogReportsTheWritersError(t *testing.T) {
	t.Parallel()
	full := errors.New("disk full")
	l := NewLog(failing{full}, nil)
	s := l.Stream()
	_, err := s.Write([]byte("x\n"))
	require.ErrorIs(t, err, full)
	require.ErrorIs(t, s.Close(), full)
	require.ErrorIs(t, l.Close(), full)
}

func BenchmarkLog(b *testing.B) {
	line := strings.Repeat("\x1b[32mok\x1b[0m   github.com/lxdtransport/transport  1.234s\n", 100)
	l := NewLog(&buffer{}, &LogOptions{Secrets: []string{"hunter2", "correct horse battery staple"}, Timestamps: true, MaxBytes: 1000})
	s := l.Stream()
	b.SetBytes(int64(len(line)))
	for b.Loop() {
		_, _ = s.Write([]byte(line))
	}
}
