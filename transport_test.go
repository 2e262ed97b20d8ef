package transport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

func TestMain(m *testing.M) {
	before := takeCensus()
	code := m.Run()
	if err := reallxd.CleanUp(); err != nil {
		fmt.Fprintln(os.Stderr, "cleaning up:", err)
		code = 1
	}
	if code == 0 {
		if err := before.left(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// patience is how long a test waits for what has to come.
const patience = 30 * time.Second

// slowTests asks for the tests that mostly wait, and for the full size of those that are smaller otherwise.
var slowTests = os.Getenv("TRANSPORT_SLOW_TESTS") != ""

// sized is full where slow tests are asked for.
func sized(full, otherwise int) int {
	if slowTests {
		return full
	}
	return otherwise
}

func soon(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	t.Cleanup(cancel)
	return ctx
}

func TestExitError(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  transport.ExitError
		want string
	}{
		{transport.ExitError{Code: 1}, "status 1"},
		{transport.ExitError{Code: 126}, "cannot be executed"},
		{transport.ExitError{Code: 127}, "not found"},
		{transport.ExitError{Code: 143}, "ended by signal 15"},
		{transport.ExitError{Code: 255}, "status 255"},
		{transport.ExitError{Code: 137, Signal: transport.SIGKILL, Stderr: []byte("secret")}, "ended by signal KILL"},
	} {
		assert.Contains(t, c.err.Error(), c.want)
		assert.NotContains(t, c.err.Error(), "secret")
		assert.Equal(t, c.err.Code, c.err.ExitCode())
	}
}

func TestExitCode(t *testing.T) {
	t.Parallel()
	exit := &transport.ExitError{Code: 3}
	for _, c := range []struct {
		err    error
		code   int
		exited bool
	}{
		{nil, 0, true},
		{exit, 3, true},
		{fmt.Errorf("wrapped: %w", exit), 3, true},
		{errors.Join(context.Canceled, exit), 3, true},
		{context.Canceled, -1, false},
		{transport.ErrOutputLost, -1, false},
	} {
		code, exited := transport.ExitCode(c.err)
		assert.Equal(t, c.code, code, c.err)
		assert.Equal(t, c.exited, exited, c.err)
	}
}

func TestErrClosedIsNetErrClosed(t *testing.T) {
	t.Parallel()
	assert.ErrorIs(t, transport.ErrClosed, net.ErrClosed)
}

func TestValidate(t *testing.T) {
	t.Parallel()
	args := []string{"true"}
	for _, c := range []struct {
		cmd  transport.Command
		want string
	}{
		{transport.Command{}, "Args is empty"},
		{transport.Command{Args: []string{"echo", "a\x00b"}}, "Args[1] contains a NUL byte"},
		{transport.Command{Args: args, Env: map[string]string{"A=B": "hunter2"}}, `"A=B"`},
		{transport.Command{Args: args, Env: map[string]string{"A\nB": "hunter2"}}, `"A\nB"`},
		{transport.Command{Args: args, Env: map[string]string{"": "hunter2"}}, "empty name"},
		{transport.Command{Args: args, Env: map[string]string{"PASSWORD": "hunter2\x00"}}, `"PASSWORD"`},
		{transport.Command{Args: args, Dir: "src"}, `"src" is not absolute`},
		{transport.Command{Args: args, User: &transport.User{UID: 1<<32 - 1}}, "4294967295 is not a user"},
		{transport.Command{Args: args, User: &transport.User{GID: 1<<32 - 1}}, "4294967295 is not a user"},
		{transport.Command{Args: args, CancelSignal: "SIGTERM"}, `unknown signal "SIGTERM"`},
		{transport.Command{Args: args, WaitDelay: -1}, "WaitDelay is negative"},
		{transport.Command{Args: args, TTY: &transport.TTY{Term: "a\nb"}}, "Term"},
	} {
		err := c.cmd.Validate()
		if assert.ErrorContains(t, err, c.want) {
			assert.NotContains(t, err.Error(), "hunter2", "a value is in the text")
		}
	}
	assert.NoError(t, transport.Command{Args: []string{"a b", "", "'\"\n"}, Env: map[string]string{"A": "a\nb=c"}, Dir: "/"}.Validate())
}

func TestShellPassesArguments(t *testing.T) {
	t.Parallel()
	assert.Equal(t, []string{"/bin/sh", "-c", `echo "$1"`, "sh", "a b", "$HOME"}, transport.Shell(`echo "$1"`, "a b", "$HOME"))
}

// memory is the smallest Transport: its Exec is a function.
type memory struct {
	transport.Transport
	exec func(context.Context, transport.Command) error
}

func (m memory) Exec(ctx context.Context, cmd transport.Command) error { return m.exec(ctx, cmd) }

func TestStartNeedsAStarter(t *testing.T) {
	t.Parallel()
	_, err := transport.Start(t.Context(), memory{}, transport.Command{Args: []string{"true"}})
	assert.ErrorIs(t, err, errors.ErrUnsupported)
}

func TestOutput(t *testing.T) {
	t.Parallel()
	exit := &transport.ExitError{Code: 1}
	m := memory{exec: func(_ context.Context, cmd transport.Command) error {
		io.WriteString(cmd.Stdout, "out")
		return exit
	}}
	out, err := transport.Output(t.Context(), m, transport.Command{Args: []string{"x"}})
	assert.Equal(t, "out", string(out))
	assert.Same(t, exit, err)

	_, err = transport.Output(t.Context(), m, transport.Command{Stdout: io.Discard})
	assert.ErrorContains(t, err, "already set")
}

func TestOutputIsBounded(t *testing.T) {
	t.Parallel()
	block := []byte(strings.Repeat("x", 1<<20))
	written := 0
	m := memory{exec: func(_ context.Context, cmd transport.Command) error {
		for {
			n, err := cmd.Stdout.Write(block)
			written += n
			if err != nil {
				return err
			}
			if written > 1<<30 {
				return nil
			}
		}
	}}
	out, err := transport.Output(t.Context(), m, transport.Command{})
	require.ErrorIs(t, err, transport.ErrLimit)
	assert.Equal(t, 64<<20, len(out))
	assert.True(t, bytes.HasPrefix(out, block))
}
