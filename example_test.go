package transport_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"testing/fstest"
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

// localHost connects to a fake LXD whose instance runs this machine's commands. With a real one it is NewLXD or DialLXD alone.
func localHost() (host *transport.LXD, done func()) {
	s := lxdtest.NewUnstartedServer()
	s.Handler = lxdtest.LocalCommands("")
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	s.Start()
	server, err := lxd.ConnectLXDUnix(s.Socket, nil)
	if err != nil {
		panic(err)
	}
	if host, err = transport.NewLXD(server, "c1", nil); err != nil {
		panic(err)
	}
	return host, func() { host.Close(); s.Close() }
}

// A download that broke is resumed where it did.
func ExampleLXD_Download_resume() {
	host, done := localHost()
	defer done()
	ctx := context.Background()
	image := strings.Repeat("0123456789abcdef", 1<<14)
	if err := host.Upload(ctx, "/srv/image", strings.NewReader(image), &transport.UploadOptions{MkdirAll: true}); err != nil {
		panic(err)
	}

	// part is what the first try has left: a file on disk elsewhere.
	var part strings.Builder
	broken, cancel := context.WithCancel(ctx)
	err := host.Download(broken, "/srv/image", &part, &transport.DownloadOptions{
		Progress: func(int64) { cancel() }, // the network goes away
	})
	fmt.Println("first try:", errors.Is(err, context.Canceled), part.Len() > 0)

	// Offset leaves out what is there. Whoever cannot be sure that the file is still the same one compares its time in Stat.
	err = host.Download(ctx, "/srv/image", &part, &transport.DownloadOptions{Offset: int64(part.Len())})
	fmt.Println("second try:", err, part.String() == image)
	// Output:
	// first try: true true
	// second try: <nil> true
}

// Sources go up from any fs.FS, such as an embed.FS, and results come down, of which no more is taken than was expected.
func ExampleUploadTree() {
	host, done := localHost()
	defer done()
	ctx := context.Background()

	sources := fstest.MapFS{ // or an embed.FS, or os.DirFS(".")
		"build.sh":    {Data: []byte("mkdir out; wc -c <src/main.c | tr -d ' ' >out/size; mkfifo out/trap; head -c 5000 /dev/zero >out/log\n"), Mode: 0o755},
		"src/main.c":  {Data: []byte("int main(void) { return 0; }\n"), Mode: 0o644},
		".git/config": {Data: []byte("…"), Mode: 0o644},
	}
	stats, err := transport.UploadTree(ctx, host, "/build", sources, &transport.TreeOptions{
		Match: func(path string, d fs.DirEntry) bool { return path != ".git" },
	})
	if err != nil {
		panic(err)
	}
	fmt.Println("sent", stats.Files, "files in", stats.Dirs, "directory")
	if err := host.Exec(ctx, transport.Command{Args: transport.Shell(". ./build.sh"), Dir: "/build"}); err != nil {
		panic(err)
	}

	dir, err := os.MkdirTemp("", "results")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	results, err := os.OpenRoot(dir)
	if err != nil {
		panic(err)
	}
	defer results.Close()
	limits := &transport.TreeOptions{
		MaxBytes: 1 << 20, MaxFileBytes: 4096, MaxEntries: 100, MaxDepth: 5,
		Skipped: func(path string, why error) { fmt.Println("left out:", path, "-", why) },
	}
	_, err = transport.DownloadTree(ctx, host, "/build/out", results, limits)
	left, _ := fs.ReadDir(results.FS(), ".")
	fmt.Println("too much:", errors.Is(err, transport.ErrLimit), len(left))

	limits.Match = func(path string, d fs.DirEntry) bool { return path != "log" }
	stats, err = transport.DownloadTree(ctx, host, "/build/out", results, limits)
	size, _ := results.ReadFile("size")
	fmt.Println(stats.Files, "file,", err, string(size))
	// Output:
	// sent 2 files in 1 directory
	// too much: true 0
	// left out: trap - it is a FIFO
	// 1 file, <nil> 29
}
