package lxdtest

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// LocalCommands is a [Handler] that runs real commands of this machine. dir is the directory that
// stands for the instance's root, "" the instance's own [Instance.Root].
//
//   - The working directory is dir joined with the one that was asked for, or else with HOME, which is /root for root and not
//     set for others. Where that does not exist it is dir. What was uploaded to /src/a is seen as a by a command that runs in /src.
//   - An absolute path in argv[0] is looked up below dir first, then on this machine.
//   - HOME is dir/root; PATH is this machine's unless the client has set one.
//   - User and group are obeyed where the test runs as root.
//
// Exit statuses, signals, pipes that background children hold open, and, on Linux, terminals are those
// of this machine's kernel. Nothing is confined: a command sees the whole machine.
func LocalCommands(dir string) Handler {
	return func(p *Process) int {
		root := dir
		if root == "" {
			root = p.Root
		}
		if !p.takeOver() {
			return 0
		}
		cmd, code := localCommand(p, root)
		if cmd == nil {
			return code
		}
		err := cmd.Start()
		if errors.Is(err, syscall.ENOEXEC) {
			// A text file without #! is run by the shell, as execvp does it.
			cmd.Args = append([]string{"/bin/sh", cmd.Path}, cmd.Args[1:]...)
			cmd.Path, cmd.Process = "/bin/sh", nil
			again := *cmd
			cmd = &exec.Cmd{
				Path: again.Path, Args: again.Args, Env: again.Env, Dir: again.Dir, Stdin: again.Stdin, Stdout: again.Stdout,
				Stderr: again.Stderr, SysProcAttr: again.SysProcAttr,
			}
			err = cmd.Start()
		}
		if err != nil {
			return statusOfError(err)
		}
		p.started(func(n int) { signalProcess(cmd.Process, n) })
		_ = cmd.Wait()
		return exitStatus(cmd.ProcessState)
	}
}

// statusOfError is 127 for what is not there and 126 for what cannot be run.
func statusOfError(err error) int {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
		return 127
	}
	return 126
}

// localCommand prepares the command, or says why not.
func localCommand(p *Process, root string) (*exec.Cmd, int) {
	home := filepath.Join(root, "root")
	if !isDir(home) {
		home = root
	}
	dir := root
	// HOME is not set for other users: LXD does not know it.
	if wanted := cmp.Or(p.Dir, p.Env["HOME"]); wanted != "" && isDir(below(root, wanted)) {
		dir = below(root, wanted)
	}
	env := []string{}
	path := os.Getenv("PATH")
	for k, v := range p.Env {
		switch {
		case k == "HOME" && v == "/root":
			v = home
		case k == "PATH" && strings.HasPrefix(v, defaultPath):
			v = path
		case k == "PATH":
			path = v
		}
		env = append(env, k+"="+v)
	}
	slices.Sort(env)
	// Without these two a command cannot live on Windows, and TMPDIR is private on macOS.
	for _, k := range []string{"SystemRoot", "TMPDIR"} {
		if v, ok := os.LookupEnv(k); ok && p.Env[k] == "" {
			env = append(env, k+"="+v)
		}
	}
	file, err := lookUp(p.Args[0], root, dir, path)
	if err != nil {
		return nil, statusOfError(err)
	}
	cmd := &exec.Cmd{Path: file, Args: p.Args, Env: env, Dir: dir, Stdin: p.files[0], Stdout: p.files[1], Stderr: p.files[2]}
	prepare(cmd, p)
	return cmd, 0
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// below is a path of the instance on this machine. It does not leave the directory.
func below(root, path string) string { return filepath.Join(root, filepath.FromSlash("/"+path)) }

// lookUp finds the file to run as execvp does.
func lookUp(name, root, dir, path string) (string, error) {
	if name == "" {
		return "", fs.ErrNotExist
	}
	if strings.ContainsAny(name, `/`+string(filepath.Separator)) {
		candidates := []string{filepath.Join(dir, name)}
		if filepath.IsAbs(name) || strings.HasPrefix(name, "/") {
			candidates = []string{below(root, name), name}
		}
		err := fs.ErrNotExist
		for _, c := range candidates {
			if err = runnable(c); !errors.Is(err, fs.ErrNotExist) {
				return c, err
			}
		}
		return "", err
	}
	found := fs.ErrNotExist
	for _, d := range filepath.SplitList(path) {
		for _, c := range []string{filepath.Join(d, name), filepath.Join(d, name+".exe")} {
			err := runnable(c)
			if err == nil {
				return c, nil
			}
			if !errors.Is(err, fs.ErrNotExist) {
				found = err
			}
		}
	}
	return "", found
}

func runnable(file string) error {
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, syscall.ENOTDIR):
		return fs.ErrNotExist
	case err != nil:
		return err
	case info.IsDir() || info.Mode()&0o111 == 0 && !strings.HasSuffix(file, ".exe"):
		return fs.ErrPermission
	}
	return nil
}
