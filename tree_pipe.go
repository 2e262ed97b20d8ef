package transport

import (
	"errors"
	"io"
	"sync"
)

// errCut: the other end of a pipe has gone, for reasons that are known there.
var errCut = errors.New("the stream was cut")

const (
	pipeChunk  = 64 << 10 // what one frame of LXD's takes
	pipeChunks = 16
)

// pipe joins a writer and a reader in different goroutines, as io.Pipe does, with a buffer in between, so that neither waits for every step of
// the other. Each of its ends belongs to one goroutine, but for closeRead and closeWrite.
type pipe struct {
	full, free chan []byte
	current    []byte // the writer's
	rest       []byte // the reader's
	reading    []byte // what rest is a part of

	once   [2]sync.Once
	ended  chan struct{} // closed by closeWrite
	endErr error
	cut    chan struct{} // closed by closeRead
	cutErr error
}

func newPipe() *pipe {
	p := &pipe{
		full: make(chan []byte, pipeChunks), free: make(chan []byte, pipeChunks),
		ended: make(chan struct{}), cut: make(chan struct{}),
	}
	for range pipeChunks {
		p.free <- nil // made when it is needed
	}
	return p
}

// Write takes bytes. They reach the reader when a chunk is full, or with flush.
func (p *pipe) Write(b []byte) (n int, err error) {
	for len(b) > 0 {
		if p.current == nil {
			select {
			case p.current = <-p.free:
			case <-p.cut:
				return n, p.cutErr
			}
			if p.current == nil {
				p.current = make([]byte, 0, pipeChunk)
			}
			p.current = p.current[:0]
		}
		m := copy(p.current[len(p.current):cap(p.current)], b)
		p.current = p.current[:len(p.current)+m]
		b, n = b[m:], n+m
		if len(p.current) == cap(p.current) {
			if err := p.flush(); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

// flush hands what was written to the reader.
func (p *pipe) flush() error {
	if len(p.current) == 0 {
		return nil
	}
	select {
	case p.full <- p.current:
		p.current = nil
		return nil
	case <-p.cut:
		return p.cutErr
	}
}

func (p *pipe) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		if p.reading != nil {
			p.free <- p.reading
			p.reading = nil
		}
		select {
		case p.reading = <-p.full:
		case <-p.cut:
			return 0, p.cutErr
		case <-p.ended:
			select {
			case p.reading = <-p.full: // what came before the end
			default:
				return 0, p.endErr
			}
		}
		p.rest = p.reading
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

// closeWrite ends the stream; nil is io.EOF for the reader. What was not flushed is lost.
func (p *pipe) closeWrite(err error) {
	if err == nil {
		err = io.EOF
	}
	p.once[0].Do(func() { p.endErr = err; close(p.ended) })
}

// closeRead makes every Write and Read fail from now on.
func (p *pipe) closeRead(err error) {
	p.once[1].Do(func() { p.cutErr = err; close(p.cut) })
}
