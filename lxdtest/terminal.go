package lxdtest

import (
	"io"
	"os"
)

// A terminal is what an interactive command gets: a real one where this package knows how to
// open it, otherwise a pair of pipes, without echo and without special characters.
type terminal struct {
	child  [3]*os.File
	in     io.WriteCloser // what the client types
	out    *os.File       // what it sees
	resize func(Size)
}

func openTerminal(size Size) (*terminal, error) {
	if t, err := openPTY(size); err == nil {
		return t, nil
	}
	stdin, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	out, stdout, err := os.Pipe()
	if err != nil {
		stdin.Close()
		in.Close()
		return nil, err
	}
	return &terminal{child: [3]*os.File{stdin, stdout, stdout}, in: in, out: out, resize: func(Size) {}}, nil
}

// Close closes the server's end.
func (t *terminal) Close() error {
	t.in.Close()
	return t.out.Close()
}
