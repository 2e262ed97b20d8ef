package transport_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

var errBoom = errors.New("boom")

// panics is a caller's reader, writer and file system.
type panics struct{}

func (panics) Read([]byte) (int, error)     { panic(errBoom) }
func (panics) Write([]byte) (int, error)    { panic(errBoom) }
func (panics) Open(string) (fs.File, error) { panic(errBoom) }

// recovered is what a call has panicked with.
func recovered(f func()) (v any) {
	defer func() { v = recover() }()
	f()
	return nil
}

// TestCallerPanics: a panic of the caller's goes on where the caller can recover it, and leaves nothing behind.
func TestCallerPanics(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		require.NoError(t, s.WriteFile("c1", "/f", []byte("content"), 0o644))
		wait := func(cmd transport.Command) func() {
			return func() {
				p, err := host.Start(soon(t), cmd)
				require.NoError(t, err)
				p.Wait()
			}
		}
		for name, f := range map[string]func(){
			"Stdout": func() { host.Exec(soon(t), transport.Command{Args: []string{"wait"}, Stdout: panics{}}) },
			"Stderr": func() { host.Exec(soon(t), transport.Command{Args: []string{"echo"}, Stderr: panics{}}) },
			"Stdin":  func() { host.Exec(soon(t), transport.Command{Args: []string{"cat"}, Stdin: panics{}}) },
			"TTY": func() {
				host.Exec(soon(t), transport.Command{Args: []string{"wait"}, Stdout: panics{}, TTY: &transport.TTY{}})
			},
			"Wait":       wait(transport.Command{Args: []string{"wait"}, Stdout: panics{}}),
			"Upload":     func() { host.Upload(soon(t), "/g", panics{}, nil) },
			"Download":   func() { host.Download(soon(t), "/f", panics{}, nil) },
			"UploadTree": func() { transport.UploadTree(soon(t), host, "/tree", panics{}, nil) },
			"Match": func() {
				transport.UploadTree(soon(t), host, "/tree", fstest.MapFS{"a": {}}, &transport.TreeOptions{Match: func(string, fs.DirEntry) bool { panic(errBoom) }})
			},
		} {
			err, ok := recovered(f).(error)
			if assert.True(t, ok, name) {
				assert.ErrorIs(t, err, errBoom, name)
				assert.ErrorContains(t, err, "callers_test.go", name)
			}
		}
		for _, e := range s.Execs() {
			assert.True(t, e.Exited, "%v", e.Args)
		}
		for _, f := range s.Files("c1") {
			assert.NotContains(t, strings.TrimPrefix(f.Path, "/tmp"), "tmp", "it is left")
		}
		require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"exit", "0"}}))
	})
}

// TestCallerBlocks: a writer that does not return holds the end of ctx up for no longer than promised.
func TestCallerBlocks(t *testing.T) {
	onFake(t, func(t *testing.T, s *lxdtest.Server, host *transport.LXD) {
		unblock := make(chan struct{})
		defer close(unblock)
		ctx, cancel := context.WithCancelCause(soon(t))
		err := host.Exec(ctx, transport.Command{Args: []string{"yes"}, WaitDelay: 200 * time.Millisecond, Stdout: writerFunc(func(p []byte) (int, error) {
			cancel(errBoom)
			<-unblock
			return len(p), nil
		})})
		assert.ErrorIs(t, err, errBoom)
		assert.ErrorIs(t, err, transport.ErrOutputLost)
		assert.Eventually(t, func() bool { return s.Execs()[0].Exited }, patience, 10*time.Millisecond)
	})
}

// TestMaxExecsIsFair: who has waited longest is the next.
func TestMaxExecsIsFair(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewUnstartedServer()
	begun := make(chan struct{})
	s.Handler = func(p *lxdtest.Process) int {
		if p.Args[0] == "first" {
			close(begun)
		}
		io.Copy(io.Discard, p.Stdin)
		return 0
	}
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	s.Start()
	t.Cleanup(s.Close)
	host := newLXD(t, connect(t, s), "c1", &transport.LXDOptions{MaxExecs: 1})
	hold, release := io.Pipe()
	first, err := host.Start(soon(t), transport.Command{Args: []string{"first"}, Stdin: hold})
	require.NoError(t, err)
	<-begun
	want := []string{"first"}
	var all sync.WaitGroup
	for range 8 {
		name := newToken()
		want = append(want, name)
		all.Go(func() {
			pprof.Do(t.Context(), pprof.Labels("waits", name), func(context.Context) {
				assert.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{name}}))
			})
		})
		require.Eventually(t, func() bool {
			var out bytes.Buffer
			pprof.Lookup("goroutine").WriteTo(&out, 1)
			for _, g := range strings.Split(out.String(), "\n\n") {
				if strings.Contains(g, name) && strings.Contains(g, "transport.acquire") {
					return true
				}
			}
			return false
		}, patience, 10*time.Millisecond)
	}
	release.Close()
	require.NoError(t, first.Wait())
	all.Wait()
	var got []string
	for _, e := range s.Execs() {
		got = append(got, e.Args[0])
	}
	assert.Equal(t, want, got)
}
