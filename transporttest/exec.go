package transporttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lxdtransport/transport"
)

// What Exec returns.

var execRows = []row{
	{name: "exec/nil-means-exit-0-and-whole-output", why: "a result that is reported before the tail of the output has arrived loses the last lines of builds",
		run: func(ctx context.Context, host transport.Transport) error {
			var want strings.Builder
			for i := range 3000 {
				fmt.Fprintf(&want, "line %d\n", i)
			}
			want.WriteString("no line break at the end")
			return prints(ctx, host, want.String(),
				sh(`i=0; while [ $i -lt 3000 ]; do echo "line $i"; i=$((i+1)); done; printf 'no line break at the end'`))
		}},
	{name: "exec/exit-statuses", why: "a failed build must not pass, whatever its status",
		run: func(ctx context.Context, host transport.Transport) error {
			if err := host.Exec(ctx, sh("exit 0")); err != nil {
				return fmt.Errorf("exit 0: want nil, got %w", err)
			}
			for _, n := range []int{1, 2, 42, 125, 128, 143, 254, 255} {
				err := host.Exec(ctx, sh("exit "+strconv.Itoa(n)))
				if err := exits(err, n); err != nil {
					return fmt.Errorf("exit %d: %w", n, err)
				}
				if exit, _ := errors.AsType[*transport.ExitError](err); exit.Signal != "" {
					return fmt.Errorf("exit %d: ExitError.Signal is %q, and there was no signal", n, exit.Signal)
				}
			}
			return nil
		}},
	{name: "exec/status-126-127", why: "some hosts report a command that cannot be run as a failure of their own; it ran, as far as a shell can tell",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			if err := run(ctx, host, in(dir, sh(`printf '#!/bin/sh\nexit 0\n' >script; chmod 644 script`))); err != nil {
				return err
			}
			for _, c := range []struct {
				what string
				want int
				cmd  transport.Command
			}{
				{"a name that is nowhere", 127, transport.Command{Args: []string{"no-such-command-anywhere"}}},
				{"a path that is nowhere", 127, transport.Command{Args: []string{"/no/such/command"}}},
				{"a directory", 126, transport.Command{Args: []string{"/dev"}}},
				{"a file without x", 126, in(dir, transport.Command{Args: []string{"./script"}})},
				{"a shell that exits so", 127, sh("exit 127")},
				{"a shell that exits so", 126, sh("exit 126")},
			} {
				if err := exits(host.Exec(ctx, c.cmd), c.want); err != nil {
					return fmt.Errorf("%s: %w", c.what, err)
				}
			}
			return nil
		}},
	{name: "exec/ended-by-signal", why: "the kernel's memory killer ends builds with KILL; that is 137 everywhere",
		run: func(ctx context.Context, host transport.Transport) error {
			// not HUP, which is ignored by all that nohup has started, nor INT, by what runs in a script's background
			for name, n := range map[transport.Signal]int{"ALRM": 142, "KILL": 137, "TERM": 143} {
				err := host.Exec(ctx, sh("kill -"+string(name)+" $$"))
				if err := exits(err, n); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				if exit, _ := errors.AsType[*transport.ExitError](err); exit.Signal != "" && exit.Signal != name {
					return fmt.Errorf("%s: ExitError.Signal is %q", name, exit.Signal)
				}
			}
			return nil
		}},
	{name: "exec/stderr-in-ExitError", why: "who did not ask for stderr needs its beginning and its end to see what went wrong", needs: []Capability{WholeStderr},
		run: stderrInExitError},
	{name: "exec/runs-once", why: "a library that tries again what may have run deploys twice",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			for _, end := range []string{"exit 0", "exit 1", "exit 127", "kill -KILL $$"} {
				if err := host.Exec(ctx, in(dir, sh("echo ran >>ran; "+end))); errors.Is(err, transport.ErrNotStarted) {
					return err
				}
			}
			return prints(ctx, host, "4", in(dir, sh(`wc -l <ran | tr -d ' \n'`)))
		}},
	{name: "exec/many-at-once", why: "a transport is safe for concurrent use, and mixes up no two commands",
		run: func(ctx context.Context, host transport.Transport) error {
			results := make(chan error)
			const n = 20
			for i := range n {
				go func() {
					var out bytes.Buffer
					err := host.Exec(ctx, transport.Command{
						Args:  transport.Shell(`cat; echo "$1"; exit "$1"`, strconv.Itoa(i+1)),
						Stdin: strings.NewReader(fmt.Sprintf("in %d\n", i+1)), Stdout: &out,
					})
					err = exits(err, i+1)
					results <- errors.Join(err, equal("output", out.String(), fmt.Sprintf("in %d\n%d\n", i+1, i+1)))
				}()
			}
			var all error
			for range n {
				all = errors.Join(all, <-results)
			}
			return all
		}},
	{name: "exec/leaves-no-goroutine", why: "an orchestrator runs for months; what one command leaves behind must not wait for Close",
		run: leavesNoGoroutine},
	{name: "exec/leaves-no-descriptor", why: "a process may have 1024 of them, and an orchestrator runs more commands",
		run: leavesNoDescriptor},
	{name: "exec/nothing-modified", why: "callers use a Command again",
		run: nothingModified},
}

func stderrInExitError(ctx context.Context, host transport.Transport) error {
	stderrOf := func(cmd transport.Command) (string, error) {
		err := host.Exec(ctx, cmd)
		if err := exits(err, 1); err != nil {
			return "", err
		}
		exit, _ := errors.AsType[*transport.ExitError](err)
		if strings.Contains(err.Error(), "why") {
			return "", fmt.Errorf("stderr is in the text of the error: %w", err)
		}
		return string(exit.Stderr), nil
	}
	got, err := stderrOf(sh("echo why >&2; exit 1"))
	if err != nil {
		return err
	}
	if err := equal("ExitError.Stderr", got, "why\n"); err != nil {
		return err
	}
	got, err = stderrOf(sh("echo first >&2; head -c 1000000 /dev/zero >&2; echo last >&2; exit 1"))
	switch {
	case err != nil:
		return err
	case !strings.HasPrefix(got, "first\n"), !strings.HasSuffix(got, "last\n"):
		return fmt.Errorf("the ExitError.Stderr of much output is %s: it lacks the beginning or the end", brief(got))
	case len(got) > 128<<10:
		return fmt.Errorf("the ExitError.Stderr has %d bytes: it is to hold the first and the last 32 KiB", len(got))
	}
	cmd := sh("echo why >&2; exit 1")
	cmd.Stderr = io.Discard
	got, err = stderrOf(cmd)
	if err != nil {
		return err
	}
	return equal("the ExitError.Stderr of a command with a Stderr", got, "")
}

func leavesNoGoroutine(ctx context.Context, host transport.Transport) error {
	ten := func() error {
		for range 10 {
			cmd := sh("cat; exit 1")
			cmd.Stdin = strings.NewReader("x")
			if err := exits(host.Exec(ctx, cmd), 1); err != nil {
				return err
			}
		}
		return nil
	}
	// The first may open connections that are kept.
	if err := ten(); err != nil {
		return err
	}
	label := benchOf(ctx).label
	before := countGoroutines(label)
	for range 2 {
		if err := ten(); err != nil {
			return err
		}
	}
	for deadline := time.Now().Add(benchOf(ctx).soon / 2); ; time.Sleep(10 * time.Millisecond) { // they may be about to end
		after := countGoroutines(label)
		if after < before+10 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("20 commands left %d goroutines behind", after-before)
		}
	}
}

// leavesNoDescriptor runs 25 commands and looks for 20 descriptors that were not there before and stay: other cases, which run at the same time,
// have theirs, but not for ever.
func leavesNoDescriptor(ctx context.Context, host transport.Transport) error {
	// The first may open connections that are kept.
	if err := run(ctx, host, sh("exit 0")); err != nil {
		return err
	}
	before := descriptors()
	for range 25 {
		cmd := sh("cat; exit 1")
		cmd.Stdin = strings.NewReader("x")
		if err := exits(host.Exec(ctx, cmd), 1); err != nil {
			return err
		}
	}
	gone := func(left map[string]bool) {
		now := descriptors()
		maps.DeleteFunc(left, func(d string, _ bool) bool { return !now[d] })
	}
	left := descriptors()
	maps.DeleteFunc(left, func(d string, _ bool) bool { return before[d] })
	for deadline := time.Now().Add(benchOf(ctx).soon); len(left) >= 20; gone(left) {
		if time.Now().After(deadline) {
			return fmt.Errorf("25 commands left %d descriptors behind: %s", len(left), slices.Sorted(maps.Keys(left)))
		}
		time.Sleep(50 * time.Millisecond) // nothing tells when one is closed
	}
	return nil
}

// descriptors are the open files of this process, each with its number. Only Linux tells.
func descriptors() map[string]bool {
	open := map[string]bool{}
	names, _ := filepath.Glob("/proc/self/fd/[0-9]*")
	for _, name := range names {
		if file, err := os.Readlink(name); err == nil {
			open[filepath.Base(name)+" "+file] = true
		}
	}
	return open
}

func nothingModified(ctx context.Context, host transport.Transport) error {
	args := append(make([]string, 0, 10), "sh", "-c", `printf %s "$A"; exit 1`) // with room to append
	env := map[string]string{"A": "b"}
	var out bytes.Buffer
	user, tty := (*transport.User)(nil), (*transport.TTY)(nil)
	cmd := transport.Command{Args: args, Env: env, User: user, TTY: tty, Stdout: &out}
	if err := exits(host.Exec(ctx, cmd), 1); err != nil {
		return err
	}
	switch {
	case strings.Join(args, "|") != `sh|-c|printf %s "$A"; exit 1`, strings.Join(args[:10], "") != strings.Join(args, ""):
		return fmt.Errorf("the Args were modified: %q", args[:10])
	case len(env) != 1 || env["A"] != "b":
		return fmt.Errorf("the Env was modified: %q", env)
	}
	return equal("output", out.String(), "b")
}
