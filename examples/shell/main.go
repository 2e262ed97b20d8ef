// Shell opens an interactive shell in an LXD instance, in the terminal that it is run in:
//
//	go run ./examples/shell [-user UID] INSTANCE [COMMAND [ARGUMENT…]]
//
// The terminal is in raw mode meanwhile, so that Ctrl-C and all other keys go to the shell; changes of its size are forwarded; and it is as it was
// before on every way out, a signal to this program included. The exit status is the shell's.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	lxd "github.com/canonical/lxd/client"
	"golang.org/x/term"

	"github.com/lxdtransport/transport"
)

func main() {
	uid := flag.Uint("user", 0, "numeric user, and group, to run as")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: shell [flags] INSTANCE [COMMAND [ARGUMENT...]]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	// Keys make no signals in raw mode: these come from elsewhere.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, hangUp)
	defer stop()
	err := connect(ctx, flag.Arg(0), flag.Args()[1:], uint32(*uid))
	code, exited := transport.ExitCode(err)
	if !exited {
		code = 1
	}
	if err != nil && !(exited && ctx.Err() == nil) {
		fmt.Fprintln(os.Stderr, "shell:", err)
	}
	os.Exit(code)
}

func connect(ctx context.Context, instance string, args []string, uid uint32) error {
	server, err := lxd.ConnectLXDUnix("", nil) // LXD_SOCKET, LXD_DIR or the usual place
	if err != nil {
		return err
	}
	host, err := transport.NewLXD(server, instance, nil)
	if err != nil {
		return err
	}
	defer host.Close()
	if len(args) == 0 {
		args = transport.Shell(`cd "$HOME" 2>/dev/null; if command -v bash >/dev/null; then exec bash -l; fi; exec sh -l`)
	}
	return shell(ctx, host, os.Stdin, os.Stdout, transport.Command{Args: args, User: &transport.User{UID: uid, GID: uid}})
}

// shell runs a command in the terminal that in and out are.
func shell(ctx context.Context, host transport.Transport, in, out *os.File, cmd transport.Command) (err error) {
	cmd.Stdin, cmd.Stdout = in, out
	if !term.IsTerminal(int(in.Fd())) || !term.IsTerminal(int(out.Fd())) {
		cmd.Stderr = os.Stderr
		return host.Exec(ctx, cmd) // as part of a pipeline: three streams
	}
	cmd.TTY = &transport.TTY{Term: os.Getenv("TERM"), Size: size(out)}
	before, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return fmt.Errorf("raw mode: %w", err)
	}
	defer func() { err = errors.Join(err, term.Restore(int(in.Fd()), before)) }()
	p, err := transport.Start(ctx, host, cmd)
	if err != nil {
		return err
	}
	resized, stop := sizes()
	defer stop()
	done := make(chan error, 1)
	go func() { done <- p.Wait() }()
	for {
		select {
		case <-resized:
			// One that comes too late, or does not arrive, is no reason to end the shell.
			_ = p.Resize(size(out))
		case err := <-done:
			return err
		}
	}
}

// size is the terminal's, or nothing, for the host's default.
func size(f *os.File) transport.TerminalSize {
	w, h, err := term.GetSize(int(f.Fd()))
	if err != nil || w < 0 || h < 0 {
		return transport.TerminalSize{}
	}
	return transport.TerminalSize{Cols: uint16(w), Rows: uint16(h)}
}
