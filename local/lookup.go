package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/lxdtransport/transport"
)

// What has to be found before a command runs: its directory, its file, its environment.

// spawn starts the command's process. An *ExitError says that it cannot be run, as a shell would say it. No error has an
// argument in its text.
func (e *execution) spawn() error {
	cmd := e.cmd
	dir, err := e.t.workDir(cmd.Dir)
	if err != nil {
		return err
	}
	sys, err := processAttributes(cmd)
	if err != nil {
		return err
	}
	env, searchPath := e.environment(dir)
	file, err := e.t.lookUp(cmd.Args[0], dir, searchPath)
	if err != nil {
		return statusOf(err)
	}
	theirs, err := e.streams()
	if err != nil {
		return err
	}
	defer closeAll(theirs)
	attr := &os.ProcAttr{Dir: dir, Env: env, Files: theirs, Sys: sys}
	e.proc, err = os.StartProcess(file, cmd.Args, attr)
	if errors.Is(err, syscall.ENOEXEC) {
		// A text file without #! is run by the shell, as execvp does it.
		e.proc, err = os.StartProcess("/bin/sh", append([]string{"sh", file}, cmd.Args[1:]...), attr)
	}
	if err != nil {
		for _, o := range e.outputs {
			o.f.Close()
		}
		if e.in != nil {
			e.in.w.Close()
			if e.in.src != nil {
				e.in.src.stop()
			}
		}
		return statusOf(err)
	}
	return nil
}

// statusOf is 127 for what is not there, 126 for what cannot be run, and the bare cause for what has nothing to do with the
// file: that may work another time.
func statusOf(err error) error {
	err = bare(err)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR), errors.Is(err, exec.ErrNotFound):
		return &transport.ExitError{Code: 127}
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENOEXEC), errors.Is(err, syscall.ELOOP):
		return &transport.ExitError{Code: 126}
	}
	return err
}

// bare takes the path and the system call off an error: they are told otherwise, or are secret.
func bare(err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		return p.Err
	}
	if l, ok := errors.AsType[*os.LinkError](err); ok {
		return l.Err
	}
	return err
}

// workDir is Command.Dir on this machine.
func (t *Transport) workDir(name string) (string, error) {
	if name == "" {
		return t.dir, nil
	}
	info, err := t.root.Stat(relative(name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("chdir %s: the directory does not exist: %w", name, bare(err))
	case err != nil:
		return "", fmt.Errorf("chdir %s: %w", name, bare(err))
	case !info.IsDir():
		return "", fmt.Errorf("chdir %s: it is not a directory: %w", name, syscall.ENOTDIR)
	}
	return t.below(name), nil
}

// below is a remote path on this machine.
func (t *Transport) below(name string) string { return filepath.Join(t.dir, relative(name)) }

// environment returns the command's environment and the PATH in it.
func (e *execution) environment(dir string) (env []string, searchPath string) {
	set := map[string]string{"PWD": dir}
	if tty := e.cmd.TTY; tty != nil {
		set["TERM"] = tty.Term
		if tty.Term == "" {
			set["TERM"] = "xterm"
		}
	}
	for name, value := range e.cmd.Env {
		set[name] = value
	}
	for _, pair := range e.t.env {
		name, value, _ := strings.Cut(pair, "=")
		if _, ok := set[name]; !ok {
			set[name] = value
		}
	}
	e.mark = newMark()
	if e.mark != "" {
		set[e.mark] = "1"
	}
	for name, value := range set {
		env = append(env, name+"="+value)
	}
	return env, set["PATH"]
}

// lookUp finds the file to run as execvp does.
func (t *Transport) lookUp(name, dir, searchPath string) (string, error) {
	switch {
	case name == "":
		return "", exec.ErrNotFound
	case path.IsAbs(name):
		if err := runnable(t.below(name)); !errors.Is(err, fs.ErrNotExist) {
			return t.below(name), err
		}
		return name, runnable(name)
	case strings.Contains(name, "/"):
		file := filepath.Join(dir, filepath.FromSlash(name))
		return file, runnable(file)
	}
	found := exec.ErrNotFound
	for _, d := range filepath.SplitList(searchPath) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		for _, file := range []string{filepath.Join(d, name), filepath.Join(d, name+".exe")} {
			switch err := runnable(file); {
			case err == nil:
				return file, nil
			case !errors.Is(err, fs.ErrNotExist):
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
	case info.IsDir(), info.Mode()&0o111 == 0 && filepath.Ext(file) != ".exe":
		return syscall.EACCES
	}
	return nil
}
