package transporttest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/lxdtransport/transport"
)

// displays runs a shell command with a terminal, which has to print something. It stays until that was seen: see [WholeTTY].
func displays(ctx context.Context, host transport.Transport, want string, cmd transport.Command) error {
	dir, err := scratch(ctx, host)
	if err != nil {
		return err
	}
	out := newScreen()
	cmd.Args[2] += "; while [ ! -e seen ]; do sleep 0.05; done; rm seen"
	cmd.Stdout, cmd.Dir = out, dir
	done := execute(ctx, host, cmd)
	if err := out.shows(ctx, want); err != nil {
		return err
	}
	if err := equal("what the terminal shows", out.String(), want); err != nil {
		return err
	}
	if err := run(ctx, host, in(dir, sh("echo >seen"))); err != nil {
		return err
	}
	result, err := returns(ctx, done)
	return errors.Join(err, result)
}

var terminalRows = []row{
	{name: "tty/one-stream-size-and-term", why: "programs look whether they have a terminal, and how large it is", needs: []Capability{TTY},
		run: func(ctx context.Context, host transport.Transport) error {
			errOut := newScreen()
			cmd := sh("stty size; echo $TERM; echo err >&2; test -t 0 && test -t 1 && test -t 2 && echo tty")
			cmd.TTY, cmd.Stderr = &transport.TTY{Term: "vt100", Size: transport.TerminalSize{Cols: 123, Rows: 45}}, errOut
			if err := displays(ctx, host, "45 123\r\nvt100\r\nerr\r\ntty\r\n", cmd); err != nil {
				return err
			}
			if err := equal("Stderr, which a command with a terminal does not use,", errOut.String(), ""); err != nil {
				return err
			}
			cmd = sh("echo $TERM")
			cmd.TTY = new(transport.TTY)
			return displays(ctx, host, "xterm\r\n", cmd)
		}},
	{name: "tty/stdin-ends", why: "a terminal's input does not end by itself: a character has to say so", needs: []Capability{TTY},
		run: func(ctx context.Context, host transport.Transport) error {
			for input, want := range map[string]string{"": "", "line\n": "line", "no line break": "no line break"} {
				cmd := sh(`test "$(cat)" = "$1"`, want)
				cmd.TTY, cmd.Stdin = new(transport.TTY), strings.NewReader(input)
				result, err := returns(ctx, execute(ctx, host, cmd))
				if err := errors.Join(err, result); err != nil {
					return fmt.Errorf("%q: %w", input, err)
				}
			}
			result, err := returns(ctx, execute(ctx, host, transport.Command{Args: []string{"cat"}, TTY: new(transport.TTY)}))
			return errors.Join(err, result)
		}},
	{name: "tty/status", why: "a terminal changes nothing about statuses", needs: []Capability{TTY},
		run: func(ctx context.Context, host transport.Transport) error {
			cmd := sh("exit 5")
			cmd.TTY = new(transport.TTY)
			return exits(host.Exec(ctx, cmd), 5)
		}},
	{name: "tty/tail-is-not-lost", why: "terminals throw away what nobody has read when they are closed", needs: []Capability{TTY, WholeTTY},
		run: func(ctx context.Context, host transport.Transport) error {
			out := newScreen()
			cmd := sh(`i=0; while [ $i -lt 5000 ]; do echo $i; i=$((i+1)); done; exit 5`)
			cmd.TTY, cmd.Stdout = new(transport.TTY), out
			err := exits(host.Exec(ctx, cmd), 5)
			var want strings.Builder
			for i := range 5000 {
				fmt.Fprintf(&want, "%d\r\n", i)
			}
			return errors.Join(err, equal("output", out.String(), want.String()))
		}},
	{name: "tty/ctx-ends-during", why: "a terminal changes nothing about the end of ctx", needs: []Capability{TTY},
		run: func(ctx context.Context, host transport.Transport) error {
			cmd := sh("echo up; exec sleep 1000")
			cmd.TTY = new(transport.TTY)
			result, err := cancelled(ctx, host, cmd)
			return errors.Join(err, status(result, 143))
		}},
	{name: "tty/resize", why: "windows change", needs: []Capability{TTY, Start},
		run: func(ctx context.Context, host transport.Transport) error {
			out := newScreen()
			cmd := sh(`echo up; while [ "$(stty size)" = "24 80" ]; do sleep 0.05; done; test "$(stty size)" = "50 200" && exit 9`)
			size := transport.TerminalSize{Cols: 200, Rows: 50}
			cmd.TTY, cmd.Stdout = &transport.TTY{Size: transport.TerminalSize{Cols: 80, Rows: 24}}, out
			p, err := transport.Start(ctx, host, cmd)
			if err != nil {
				return err
			}
			if err := out.shows(ctx, "up"); err != nil {
				return err
			}
			if err := p.Resize(size); err != nil {
				return err
			}
			result, err := returns(ctx, background(p.Wait))
			if err := errors.Join(err, exits(result, 9)); err != nil {
				return fmt.Errorf("the size did not become 50 200: %w", err)
			}
			return is(p.Resize(size), os.ErrProcessDone)
		}},
}
