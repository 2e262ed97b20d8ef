//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/lxdtransport/transport"
)

// kinds are what is run in turns. Each returns an error unless the result is the one right one.
var kinds = []struct {
	name string
	run  func(ctx context.Context, host *transport.LXD, i int) error
}{
	{"true", silent},
	{"output", output},
	{"stdin", stdin},
	{"true", silent},
	{"status", status},
	{"true", silent},
	{"cancelled", cancelled},
	{"terminal", terminal},
	{"upload and download", transfer},
	{"true", silent},
	{"writer that fails", writerFails},
	{"not found", notFound},
}

var (
	errEnough = errors.New("enough")
	errFull   = errors.New("full")
	payload   = bytes.Repeat([]byte("0123456789abcdef"), 16<<10) // 256 KiB
)

func silent(ctx context.Context, host *transport.LXD, _ int) error {
	return host.Exec(ctx, transport.Command{Args: []string{"true"}})
}

func output(ctx context.Context, host *transport.LXD, _ int) error {
	var stdout, stderr counter
	err := host.Exec(ctx, transport.Command{Args: transport.Shell("head -c 300000 /dev/zero; head -c 200000 /dev/zero >&2"), Stdout: &stdout, Stderr: &stderr})
	if err == nil && (stdout != 300000 || stderr != 200000) {
		err = fmt.Errorf("%d and %d bytes of output", stdout, stderr)
	}
	return err
}

type counter int

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

func stdin(ctx context.Context, host *transport.LXD, _ int) error {
	var out bytes.Buffer
	err := host.Exec(ctx, transport.Command{Args: []string{"cat"}, Stdin: bytes.NewReader(payload), Stdout: &out})
	if err == nil && !bytes.Equal(out.Bytes(), payload) {
		err = fmt.Errorf("%d bytes came back, other ones or not as many as were sent", out.Len())
	}
	return err
}

func status(ctx context.Context, host *transport.LXD, i int) error {
	want := 1 + i%255
	err := host.Exec(ctx, transport.Command{Args: transport.Shell(`echo why >&2; exit "$1"`, fmt.Sprint(want))})
	return expect(err, want)
}

func expect(err error, want int) error {
	if code, exited := transport.ExitCode(err); !exited || code != want {
		return fmt.Errorf("status %d was expected: %w", want, err)
	}
	return nil
}

// cancelled ends a command that has a child in a session of its own.
func cancelled(ctx context.Context, host *transport.LXD, _ int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err := host.Exec(ctx, transport.Command{
		Args:      transport.Shell("setsid sleep 1000 >/dev/null 2>&1 & echo up; exec sleep 1000"),
		Stdout:    writerFunc(func(p []byte) (int, error) { cancel(errEnough); return len(p), nil }),
		WaitDelay: 5 * time.Second,
	})
	if !errors.Is(err, errEnough) || !strings.Contains(err.Error(), "descendants killed: 1") {
		return fmt.Errorf("it was cancelled, with one descendant: %w", err)
	}
	return expect(err, 143)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func terminal(ctx context.Context, host *transport.LXD, _ int) error {
	var out bytes.Buffer
	err := host.Exec(ctx, transport.Command{
		// LXD 5.0 may lose what is written to a terminal just before the end.
		Args: transport.Shell("stty size; sleep 0.2"), TTY: &transport.TTY{Size: transport.TerminalSize{Cols: 100, Rows: 30}}, Stdout: &out,
	})
	if err == nil && strings.TrimSpace(out.String()) != "30 100" {
		err = fmt.Errorf("the terminal said %q", out.String())
	}
	return err
}

func transfer(ctx context.Context, host *transport.LXD, i int) error {
	name := fmt.Sprintf("/root/soak-%d", i%64)
	if err := host.Upload(ctx, name, bytes.NewReader(payload), nil); err != nil {
		return err
	}
	var back bytes.Buffer
	if err := host.Download(ctx, name, &back, nil); err != nil {
		return err
	}
	if !bytes.Equal(back.Bytes(), payload) {
		return fmt.Errorf("%d bytes came back, other ones or not as many as were sent", back.Len())
	}
	return nil
}

func writerFails(ctx context.Context, host *transport.LXD, _ int) error {
	err := host.Exec(ctx, transport.Command{Args: []string{"yes"}, Stdout: writerFunc(func([]byte) (int, error) { return 0, errFull }), Stderr: io.Discard})
	if !errors.Is(err, errFull) {
		return fmt.Errorf("its writer failed: %w", err)
	}
	return expect(err, 143)
}

func notFound(ctx context.Context, host *transport.LXD, _ int) error {
	return expect(host.Exec(ctx, transport.Command{Args: []string{"/no/such/command"}}), 127)
}
