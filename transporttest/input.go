package transporttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing/iotest"
	"time"

	"github.com/lxdtransport/transport"
)

// The caller's reader.

var inputRows = []row{
	{name: "exec/nil-stdin-is-eof", why: "a command that waits for input that never comes hangs the build",
		run: func(ctx context.Context, host transport.Transport) error {
			return prints(ctx, host, "0 end", sh(`printf '%d ' $(wc -c); read x || printf end`))
		}},
	{name: "exec/stdin-through-cat", why: "every byte arrives, in order, whatever its value, and then the end",
		run: func(ctx context.Context, host transport.Transport) error {
			want := pattern(1 << 20)
			for what, r := range map[string]io.Reader{
				"a plain reader":          only(bytes.NewReader(want)),
				"one byte with the end":   iotest.DataErrReader(only(bytes.NewReader(want))),
				"an io.WriterTo":          bytes.NewReader(want),
				"Reads that bring naught": stuttering(bytes.NewReader(want)),
			} {
				cmd := transport.Command{Args: []string{"cat"}, Stdin: r}
				if err := prints(ctx, host, string(want), cmd); err != nil {
					return fmt.Errorf("%s: %w", what, err)
				}
			}
			return prints(ctx, host, "", transport.Command{Args: []string{"cat"}, Stdin: strings.NewReader("")})
		}},
	{name: "exec/stdin-is-interactive", why: "a conversation needs every line when it is there, and the end when it is there",
		run: conversation},
	{name: "exec/stdin-never-read", why: "a command that does not want its input is no failure",
		run: func(ctx context.Context, host transport.Transport) error {
			result, err := returns(ctx, execute(ctx, host, transport.Command{Args: []string{"true"}, Stdin: zeros}))
			if err := errors.Join(err, result); err != nil {
				return err
			}
			cmd := sh("head -c 10 | wc -c >&2; exit 3")
			cmd.Stdin = zeros
			if result, err = returns(ctx, execute(ctx, host, cmd)); err != nil {
				return err
			}
			return exits(result, 3)
		}},
	{name: "exec/stdin-never-ends", why: "os/exec itself waits for a Read that does not return; a command that has ended must not",
		run: func(ctx context.Context, host transport.Transport) error {
			stdin, out := newBlocked(), newScreen()
			defer stdin.unblock()
			cmd := sh("echo done; exit 4")
			cmd.Stdin, cmd.Stdout = stdin, out
			result, err := returns(ctx, execute(ctx, host, cmd))
			if err != nil {
				return err
			}
			return errors.Join(exits(result, 4), equal("output", out.String(), "done\n"))
		}},
	{name: "exec/stdin-error-cancels", why: "a command must not take a part of its input for the whole and install it",
		run: func(ctx context.Context, host transport.Transport) error {
			broken := errors.New("broken source")
			out := newScreen()
			cmd := sh("cat >/dev/null; echo took it for the whole")
			cmd.Stdin, cmd.Stdout = io.MultiReader(strings.NewReader("a part"), failing(broken)), out
			result, err := returns(ctx, execute(ctx, host, cmd))
			if err != nil {
				return err
			}
			return errors.Join(is(result, broken), status(result, 143), equal("output", out.String(), ""))
		}},
	{name: "exec/streams-are-not-closed", why: "the caller's files are the caller's: os.Stdin serves the next command, too",
		run: func(ctx context.Context, host transport.Transport) error {
			hangs := newBlocked()
			defer hangs.unblock()
			streams := map[string]*handle{
				"Stdin": {Reader: strings.NewReader("x")}, "Stdout": {Writer: io.Discard}, "Stderr": {Writer: io.Discard}, "a Stdin that nobody reads": {Reader: hangs},
			}
			staysOpen(ctx, streams)
			cmd := sh("cat; echo err >&2")
			cmd.Stdin, cmd.Stdout, cmd.Stderr = streams["Stdin"], streams["Stdout"], streams["Stderr"]
			if err := run(ctx, host, cmd); err != nil {
				return err
			}
			cmd = sh("exit 0")
			cmd.Stdin = streams["a Stdin that nobody reads"]
			result, err := returns(ctx, execute(ctx, host, cmd))
			return errors.Join(err, result)
		}},
	{name: "exec/stdin-is-not-read-after-return", why: "callers read on where the command stopped, as far as it was not read ahead",
		run: func(ctx context.Context, host transport.Transport) error {
			returned, late := make(chan struct{}), make(chan struct{}, 1)
			cmd := transport.Command{Args: []string{"head", "-c", "10"}, Stdin: readerFunc(func(p []byte) (int, error) {
				select {
				case <-returned:
					select {
					case late <- struct{}{}:
					default:
					}
				default:
				}
				return copy(p, "0123456789"), nil
			})}
			if err := prints(ctx, host, "0123456789", cmd); err != nil {
				return err
			}
			close(returned)
			select {
			case <-late:
				return errors.New("the Stdin was read after Exec had returned")
			case <-time.After(window):
				return nil
			}
		}},
}

// stuttering is a reader of which every other Read brings nothing.
func stuttering(r io.Reader) io.Reader {
	odd := false
	return readerFunc(func(p []byte) (int, error) {
		if odd = !odd; odd {
			return 0, nil
		}
		return r.Read(p)
	})
}

func conversation(ctx context.Context, host transport.Transport) error {
	r, w := io.Pipe()
	defer w.Close()
	out := newScreen()
	cmd := sh(`while read x; do echo "got $x"; done; echo end`)
	cmd.Stdin, cmd.Stdout = r, out
	result := execute(ctx, host, cmd)
	for _, word := range []string{"one", "two", "three"} {
		if _, err := io.WriteString(w, word+"\n"); err != nil {
			return err
		}
		if err := out.shows(ctx, "got "+word+"\n"); err != nil {
			return err
		}
	}
	w.Close()
	if err := out.shows(ctx, "end\n"); err != nil {
		return fmt.Errorf("the end of Stdin did not arrive: %w", err)
	}
	err, late := returns(ctx, result)
	return errors.Join(late, err)
}
