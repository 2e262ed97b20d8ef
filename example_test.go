package transport_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	lxd "github.com/canonical/lxd/client"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

// socket is that of a fake LXD here; of a real one "" is enough.
func socket() (path string, done func()) {
	s := lxdtest.NewUnstartedServer()
	s.Handler = func(p *lxdtest.Process) int {
		switch p.Args[0] {
		case "make":
			fmt.Fprintln(p.Stdout, "building in", p.Dir)
			return 2
		case "/bin/sh":
			io.Copy(p.Stdout, p.Stdin)
			fmt.Fprintln(p.Stdout, p.Args[4:])
			return 0
		}
		<-p.Context().Done()
		return 0
	}
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	s.Start()
	if err := s.WriteFile("c1", "/src/Makefile", nil, 0o644); err != nil {
		panic(err)
	}
	return s.Socket, s.Close
}

// A command with its output, and what became of it.
func ExampleLXD_Exec() {
	socket, done := socket()
	defer done()

	server, err := lxd.ConnectLXDUnix(socket, nil)
	if err != nil {
		panic(err)
	}
	host, err := transport.NewLXD(server, "c1", nil)
	if err != nil {
		panic(err)
	}
	defer host.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	err = host.Exec(ctx, transport.Command{
		Args:   []string{"make", "test"},
		Dir:    "/src",
		Env:    map[string]string{"CI": "true"},
		Stdout: os.Stdout,
		Stderr: os.Stderr,
	})
	switch code, exited := transport.ExitCode(err); {
	case exited && code == 0:
		fmt.Println("passed")
	case exited && ctx.Err() == nil:
		fmt.Println("failed with status", code)
	case errors.Is(err, transport.ErrNotStarted):
		fmt.Println("safe to try again:", err)
	default:
		fmt.Println(err)
	}
	// Output:
	// building in /src
	// failed with status 2
}

// The end of the context ends the command, and the error tells how.
func ExampleLXD_Exec_cancel() {
	socket, done := socket()
	defer done()
	server, err := lxd.ConnectLXDUnix(socket, nil)
	if err != nil {
		panic(err)
	}
	host, err := transport.NewLXD(server, "c1", nil)
	if err != nil {
		panic(err)
	}
	defer host.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	err = host.Exec(ctx, transport.Command{Args: []string{"sleep", "1000"}})
	code, _ := transport.ExitCode(err)
	fmt.Println(errors.Is(err, context.DeadlineExceeded), code)
	// Output: true 143
}

// A file each way, and a script whose arguments nobody has to quote.
func ExampleShell() {
	socket, done := socket()
	defer done()
	server, err := lxd.ConnectLXDUnix(socket, nil)
	if err != nil {
		panic(err)
	}
	host, err := transport.NewLXD(server, "c1", nil)
	if err != nil {
		panic(err)
	}
	defer host.Close()

	ctx := context.Background()
	err = host.Upload(ctx, "/src/notes/it's here.txt", strings.NewReader("content\n"), &transport.UploadOptions{Mode: 0o600, MkdirAll: true})
	if err != nil {
		panic(err)
	}
	var file strings.Builder
	if err := host.Download(ctx, "/src/notes/it's here.txt", &file, &transport.DownloadOptions{Limit: 1 << 20}); err != nil {
		panic(err)
	}
	out, err := transport.Output(ctx, host, transport.Command{
		Args:  transport.Shell(`cat; echo "$1" "$2"`, "it's here.txt", "$HOME"),
		Stdin: strings.NewReader(file.String()),
	})
	fmt.Print(string(out), err)
	// Output:
	// content
	// [it's here.txt $HOME]
	// <nil>
}
