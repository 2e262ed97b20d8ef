//go:build unix

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"
)

// Every contestant works in a process of its own, so that nobody's memory, goroutines or connections are counted as another's. The worker
// gets tasks as JSON on its input and answers each with a result on its output.

const workerArg = "bench-worker"

// task is what a worker has to do. The first one names the contestant only.
type task struct {
	Spec  *spec  `json:",omitempty"`
	Do    string // a method of worker
	N     int    // commands
	Bytes int64
	Dir   string // for local files; of a tree: what is copied
	Dest  string // the directory that a tree is copied into
}

// result is what a task took.
type result struct {
	Error   string          `json:",omitempty"`
	Each    []time.Duration // of every command, if they came one after another
	Wall    time.Duration
	CPU     cpuTime
	PeakKiB int64 // of this process, so far

	// Of many at once:
	Right    int // commands that ended as they should
	FirstBad string
	Running  int    // when memory was measured
	Memory   memory // above what it was before
}

type worker struct {
	c    contestant
	in   *json.Decoder
	out  *json.Encoder
	file int // the number of the next one

	profile string // prefix of files, "": none
}

// work is the whole life of a worker.
func work(in io.Reader, out io.Writer) error {
	w := &worker{in: json.NewDecoder(in), out: json.NewEncoder(out)}
	for {
		var t task
		switch err := w.in.Decode(&t); {
		case err == io.EOF:
			if w.c != nil {
				w.c.close()
			}
			return nil
		case err != nil:
			return err
		}
		var r result
		if err := w.do(t, &r); err != nil {
			r.Error = err.Error()
		}
		var err error
		if r.PeakKiB, err = statusKiB("VmHWM"); err != nil {
			return err
		}
		if err := w.out.Encode(r); err != nil {
			return err
		}
	}
}

func (w *worker) do(t task, r *result) error {
	if t.Spec != nil {
		var err error
		if w.c, err = t.Spec.open(); err != nil {
			return err
		}
		w.profile = t.Spec.Profile
		for range 2 { // connections and whatever else only the first command needs
			if err := w.c.run([]string{"true"}, 0, nil); err != nil {
				return err
			}
		}
		return nil
	}
	switch t.Do {
	case "exec":
		return w.timed(r, func() error {
			for range t.N {
				start := time.Now()
				if err := w.c.run([]string{"true"}, 0, nil); err != nil {
					return err
				}
				r.Each = append(r.Each, time.Since(start))
			}
			return nil
		})
	case "stdout":
		var count counter
		err := w.timed(r, func() error {
			return w.c.run([]string{"sh", "-c", fmt.Sprintf("dd if=/dev/zero bs=64k count=%d 2>/dev/null", t.Bytes>>16)}, 0, &count)
		})
		if err == nil && int64(count) != t.Bytes {
			err = fmt.Errorf("%d bytes came instead of %d", count, t.Bytes)
		}
		return err
	case "stdin":
		return w.timed(r, func() error {
			return w.c.run([]string{"sh", "-c", "cat >/dev/null"}, t.Bytes, nil)
		})
	case "up", "down":
		return w.copy(t, r)
	case "tree-up", "tree-down":
		c, ok := w.c.(treeContestant)
		if !ok {
			return errors.New("it is not measured with trees")
		}
		return w.timed(r, func() error {
			if t.Do == "tree-up" {
				return c.uploadTree(t.Dir, t.Dest)
			}
			return c.downloadTree(t.Dir, t.Dest)
		})
	case "many":
		return w.many(t, r)
	}
	return errors.New("no such task: " + t.Do)
}

// timed measures time and CPU of f.
func (w *worker) timed(r *result, f func() error) error {
	runtime.GC() // of what was before
	before, err := w.c.usage()
	if err != nil {
		return err
	}
	stop, err := startProfile(w.profile)
	if err != nil {
		return err
	}
	defer stop()
	start := time.Now()
	if err := f(); err != nil {
		return err
	}
	r.Wall = time.Since(start)
	after, err := w.c.usage()
	r.CPU = after - before
	return err
}

// counter counts and forgets. It is no io.ReaderFrom: everybody's own copying is to be seen.
type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// copy copies a file of the task's size, up or down. The destination is a new one each time.
func (w *worker) copy(t task, r *result) error {
	remote := fmt.Sprintf("/root/bench-%d-%d", os.Getpid(), w.file)
	local := filepath.Join(t.Dir, "file")
	w.file++
	up := func() error { return w.c.upload(local, remote) }
	if t.Do == "up" {
		if err := w.timed(r, up); err != nil {
			return err
		}
		return w.c.remove(remote)
	}
	if err := up(); err != nil {
		return err
	}
	copied := filepath.Join(t.Dir, filepath.Base(remote))
	defer os.Remove(copied)
	if err := w.timed(r, func() error { return w.c.download(remote, copied) }); err != nil {
		return err
	}
	info, err := os.Stat(copied)
	if err == nil && info.Size() != t.Bytes {
		err = fmt.Errorf("%d bytes came instead of %d", info.Size(), t.Bytes)
	}
	return errors.Join(err, w.c.remove(remote))
}

// manyPatience is how long commands may take to start, all together, and then to end.
const manyPatience = 2 * time.Minute

// many runs commands at once. Each says that it runs and then waits at a barrier, so that all of them run when memory is measured, however
// slow the server is. The parent opens the barrier when it is told so.
func (w *worker) many(t task, r *result) error {
	base, err := measureMemory()
	if err != nil {
		return err
	}
	settled := make(chan bool, 2*t.N) // true: runs; false: has ended without
	ended := make(chan error, t.N)
	cpu, err := w.c.usage()
	if err != nil {
		return err
	}
	stop, err := startProfile(w.profile)
	if err != nil {
		return err
	}
	defer stop()
	start := time.Now()
	for range t.N {
		go func() {
			out := &said{running: settled}
			err := w.c.run([]string{"sh", "-c", "echo running; read x <" + gate + "; echo ended"}, 0, out)
			if got := out.String(); err == nil && got != "running\nended\n" {
				err = fmt.Errorf("the output is %q", got)
			}
			if !out.told {
				settled <- false
			}
			ended <- err
		}()
	}
	late := time.After(manyPatience)
	for i := 0; i < t.N; i++ {
		select {
		case ok := <-settled:
			if ok {
				r.Running++
			}
		case <-late:
			i = t.N
		}
	}
	before, err := w.c.usage()
	if err != nil {
		return err
	}
	if r.Memory, err = measureMemory(); err != nil {
		return err
	}
	if err := heapProfile(w.profile); err != nil {
		return err
	}
	after, err := w.c.usage()
	if err != nil {
		return err
	}
	r.Memory.RSS -= base.RSS
	r.Memory.Live -= base.Live
	r.Memory.Goroutines -= base.Goroutines
	cpu += after - before // ours, not the contestant's
	if err := w.out.Encode(result{}); err != nil {
		return err
	}
	late = time.After(manyPatience)
	for i := 0; i < t.N; i++ {
		select {
		case err := <-ended:
			if err == nil {
				r.Right++
			} else if r.FirstBad == "" {
				r.FirstBad = err.Error()
			}
		case <-late:
			r.FirstBad = fmt.Sprintf("%d have not ended within %v", t.N-i, manyPatience)
			i = t.N
		}
	}
	r.Wall = time.Since(start)
	after, err = w.c.usage()
	r.CPU = after - cpu
	return err
}

// gate is the barrier's FIFO.
const gate = "/tmp/gate"

// said keeps a command's output, and tells when the first of it comes.
type said struct {
	mu      sync.Mutex // the official client may still write after the command's end
	text    []byte
	told    bool
	running chan<- bool
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text = append(s.text, p...)
	if !s.told {
		s.told = true
		s.running <- true
	}
	return len(p), nil
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.text)
}
