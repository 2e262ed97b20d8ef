// Build takes a project into a fresh LXD container, builds and tests it there, and brings an artifact back:
//
//	go run ./examples/build [-dir project] [-run script] [-get /file/in/container] [-to file]
//
// Without flags it does so with the Go module in the current directory: the machine's Go toolchain and the module with its
// dependencies go in, go vet and go test run inside, the coverage profile comes out. It exits with the script's own
// exit status. Ctrl-C stops the build; the container is deleted either way.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"

	"github.com/lxdtransport/transport"
)

const goTest = `export PATH=$PATH:/usr/local/go/bin CGO_ENABLED=0 GOFLAGS='-mod=vendor -buildvcs=false' GOTOOLCHAIN=local
go version && go vet ./... && go test -parallel 8 -coverprofile=/root/cover.out ./...`

var (
	dir    = flag.String("dir", ".", "the project")
	script = flag.String("run", goTest, "what /bin/sh is to do in it")
	get    = flag.String("get", "/root/cover.out", "the artifact in the container")
	to     = flag.String("to", "cover.out", "where it is to go")
	image  = flag.String("image", "busybox", "alias of a container image on the LXD server")
)

func main() {
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx)
	code, exited := transport.ExitCode(err)
	switch {
	case ctx.Err() != nil:
		code = 130
	case !exited:
		code = 1
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
	}
	os.Exit(code)
}

func run(ctx context.Context) (err error) {
	server, err := lxd.ConnectLXDUnix("", nil) // LXD_SOCKET, LXD_DIR or the usual place
	if err != nil {
		return err
	}
	name := fmt.Sprintf("build-%d", time.Now().UnixNano())
	step("launching %s from image %s", name, *image)
	if err := create(server, name, *image); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove(server, name)) }()
	if err := setState(server, name, "start"); err != nil {
		return err
	}

	host, err := transport.NewLXD(server, name, nil)
	if err != nil {
		return err
	}
	defer host.Close()

	step("copying %s into %s", *dir, name)
	if err := copyIn(ctx, host, *dir, "/src", ".git", "vendor"); err != nil {
		return err
	}
	if *script == goTest {
		if err := copyGo(ctx, host); err != nil {
			return err
		}
	}
	step("building")
	err = host.Exec(ctx, transport.Command{Args: transport.Shell(*script), Dir: "/src", Stdout: os.Stdout, Stderr: os.Stderr})
	if err != nil {
		return err
	}
	step("%s -> %s", *get, *to)
	f, err := os.Create(*to)
	if err != nil {
		return err
	}
	return errors.Join(host.Download(ctx, *get, f, nil), f.Close())
}

// copyGo copies the toolchain of this machine and the module's dependencies.
func copyGo(ctx context.Context, host transport.Transport) error {
	vendor, err := os.MkdirTemp("", "vendor")
	if err != nil {
		return err
	}
	defer os.RemoveAll(vendor)
	cmd := exec.CommandContext(ctx, "go", "mod", "vendor", "-o", vendor)
	cmd.Dir, cmd.Stderr = *dir, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go mod vendor: %w", err)
	}
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env GOROOT: %w", err)
	}
	step("copying the dependencies and %s", runtime.Version())
	if err := copyIn(ctx, host, vendor, "/src/vendor"); err != nil {
		return err
	}
	return copyIn(ctx, host, strings.TrimSpace(string(root)), "/usr/local/go", "test", "api", "doc")
}

// copyIn copies a directory into the container, without what is named.
func copyIn(ctx context.Context, host transport.Transport, from, to string, without ...string) error {
	stats, err := transport.UploadTree(ctx, host, to, os.DirFS(from), &transport.TreeOptions{
		Symlinks: transport.KeepSymlinks,
		Match:    func(path string, _ fs.DirEntry) bool { return !slices.Contains(without, path) },
		Skipped:  func(path string, why error) { step("left out: %s: %v", path, why) },
	})
	if err == nil {
		step("%d files, %d MiB", stats.Files, stats.Bytes>>20)
	}
	return err
}

func create(server lxd.InstanceServer, name, image string) error {
	op, err := server.CreateInstance(api.InstancesPost{Name: name, Source: api.InstanceSource{Type: "image", Alias: image}})
	return wait(op, err, "creating", name)
}

func remove(server lxd.InstanceServer, name string) error {
	stopErr := setState(server, name, "stop") // fails if it does not run
	op, err := server.DeleteInstance(name)
	if err := wait(op, err, "deleting", name); err != nil {
		return errors.Join(stopErr, err)
	}
	return nil
}

func setState(server lxd.InstanceServer, name, action string) error {
	op, err := server.UpdateInstanceState(name, api.InstanceStatePut{Action: action, Force: true, Timeout: 30}, "")
	return wait(op, err, action+" of", name)
}

func wait(op lxd.Operation, err error, what, name string) error {
	if err == nil {
		err = op.Wait()
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", what, name, err)
	}
	return nil
}

func step(format string, args ...any) { fmt.Fprintf(os.Stderr, "==> "+format+"\n", args...) }
