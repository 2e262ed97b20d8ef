package job

import (
	"fmt"
	"io"
	"unicode/utf8"
)

// tailSize is the most of the end of a log that is kept when the log passes its limit: that is where the errors are.
const tailSize = 64 << 10

// limiter passes on so much that the whole, with the last of what was left out, is no longer than its limit; only the line
// that says how much was left out comes on top. It cuts between characters.
type limiter struct {
	w       io.Writer
	room    int64 // what may still be passed on
	tail    []byte
	size    int // of tail, at most
	dropped int64
	begun   bool // the last that was passed on was no line feed
}

func newLimiter(w io.Writer, limit int64) *limiter {
	l := &limiter{w: w, room: limit, size: int(min(limit/4, tailSize))}
	l.room -= int64(l.size)
	return l
}

// Write passes p on while there is room. It returns len(p) unless the writer behind it fails.
func (l *limiter) Write(p []byte) (int, error) {
	n := len(p)
	pass := min(int64(n), l.room)
	for pass > 0 && pass < int64(n) && !utf8.RuneStart(p[pass]) {
		pass--
	}
	if pass > 0 {
		l.room -= pass
		l.begun = p[pass-1] != '\n'
		if _, err := l.w.Write(p[:pass]); err != nil {
			return 0, err
		}
		p = p[pass:]
	}
	if len(p) == 0 {
		return n, nil
	}
	l.room = 0
	l.dropped += int64(len(p))
	if len(p) >= l.size {
		l.tail = append(l.tail[:0], p[len(p)-l.size:]...)
		return n, nil
	}
	// Twice the size, so that each byte is moved but seldom.
	if len(l.tail)+len(p) > 2*l.size {
		l.tail = l.tail[:copy(l.tail, l.tail[len(l.tail)+len(p)-l.size:])]
	}
	l.tail = append(l.tail, p...)
	return n, nil
}

// Close writes how much was left out, and the end of it. It does not close the writer.
func (l *limiter) Close() error {
	if l.dropped == 0 {
		return nil
	}
	tail := l.tail[max(0, len(l.tail)-l.size):]
	for len(tail) > 0 && !utf8.RuneStart(tail[0]) {
		tail = tail[1:]
	}
	text := ""
	// Where nothing is missing the tail goes on where the text ended.
	if left := l.dropped - int64(len(tail)); left > 0 {
		if l.begun {
			text = "\n"
		}
		text += fmt.Sprintf("[%d bytes of the log are left out here]\n", left)
	}
	l.dropped = 0
	_, err := l.w.Write(append([]byte(text), tail...))
	return err
}
