//go:build unix

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// command runs an external program as a Go program would that uses it: its output comes through a pipe. Its input is a file without
// blocks, so that no copying of ours stands in its way.
func command(stdin int64, out io.Writer, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stdout = out
	if stdin > 0 {
		f, err := os.CreateTemp("", "transport-bench-zeros-")
		if err != nil {
			return err
		}
		os.Remove(f.Name())
		defer f.Close()
		if err := f.Truncate(stdin); err != nil {
			return err
		}
		cmd.Stdin = f
	}
	return finish(cmd)
}

// finish runs a command.
func finish(cmd *exec.Cmd) error {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return nil
}

var errNoFiles = errors.New("is not measured with files")

// lxcCommand is `lxc exec`, or another of lxc's ways to copy a tree.
type lxcCommand struct{ instance, tool string }

func (l *lxcCommand) exec(args ...string) []string {
	return append([]string{"lxc", "exec", "-T", l.instance, "--"}, args...)
}

func (l *lxcCommand) run(args []string, stdin int64, out io.Writer) error {
	return command(stdin, out, "lxc", l.exec(args...)[1:]...)
}

func (l *lxcCommand) upload(string, string) error   { return errNoFiles }
func (l *lxcCommand) download(string, string) error { return errNoFiles }
func (l *lxcCommand) remove(string) error           { return errNoFiles }
func (l *lxcCommand) usage() (cpuTime, error)       { return childrenCPU() }
func (l *lxcCommand) close()                        {}

// sshCommand is OpenSSH with a master connection that stays open, as whoever wants it fast runs it. Its CPU time
// is the commands' and the master's, which does the encryption.
type sshCommand struct {
	server  *sshServer
	tool    string // "": ssh for commands, scp for files
	control string
	master  *exec.Cmd
}

func openSSH(server *sshServer, cipher, tool string) (*sshCommand, error) {
	s := &sshCommand{server: server, tool: tool, control: filepath.Join(server.Dir, fmt.Sprintf("master-%d", os.Getpid()))}
	args := append(server.options(), "-M", "-N", "-o", "ControlPath="+s.control)
	if cipher != "" {
		args = append(args, "-c", cipher)
	}
	// The local command is run when the master is ready.
	s.master = exec.Command("ssh", append(args, "-o", "PermitLocalCommand=yes", "-o", "LocalCommand=echo ready", server.host())...)
	var stderr bytes.Buffer
	s.master.Stderr = &stderr
	ready, err := s.master.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.master.Start(); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(ready, make([]byte, len("ready"))); err != nil {
		s.close()
		return nil, fmt.Errorf("ssh master: %s", bytes.TrimSpace(stderr.Bytes()))
	}
	return s, nil
}

func (s *sshCommand) run(args []string, stdin int64, out io.Writer) error {
	option := "-T"
	if stdin == 0 {
		option = "-n"
	}
	return command(stdin, out, "ssh", s.ssh(option, args...)[1:]...)
}

// ssh makes a command for what args do at the other side.
func (s *sshCommand) ssh(option string, args ...string) []string {
	quoted := make([]string, len(args))
	for i, a := range args {
		quoted[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	return append(append([]string{"ssh", option}, s.options()...), s.server.host(), strings.Join(quoted, " "))
}

// options are those of every program of OpenSSH's, for the connection that stands.
func (s *sshCommand) options() []string {
	return append(s.server.options(), "-o", "ControlPath="+s.control)
}

// place is where a remote file is: sshd serves the machine, not the instance.
func (s *sshCommand) place(remote string) string {
	return filepath.Join(s.server.Dir, filepath.Base(remote))
}

func (s *sshCommand) scp(args ...string) error {
	return command(0, nil, "scp", append(append(s.options(), "-q"), args...)...)
}

// sftp has no command for a file on its command line, but for a whole batch.
func (s *sshCommand) sftp(batch ...string) error {
	cmd := exec.Command("sftp", append(s.options(), "-q", "-b", "-", s.server.host())...)
	cmd.Stdin = strings.NewReader(strings.Join(batch, " ") + "\n")
	return finish(cmd)
}

func (s *sshCommand) upload(local, remote string) error {
	if s.tool == "sftp" {
		return s.sftp("put", local, s.place(remote))
	}
	return s.scp(local, s.server.host()+":"+s.place(remote))
}

func (s *sshCommand) download(remote, local string) error {
	if s.tool == "sftp" {
		return s.sftp("get", s.place(remote), local)
	}
	return s.scp(s.server.host()+":"+s.place(remote), local)
}

func (s *sshCommand) remove(remote string) error { return os.Remove(s.place(remote)) }

func (s *sshCommand) usage() (cpuTime, error) {
	commands, err := childrenCPU()
	if err != nil {
		return 0, err
	}
	master, err := processCPU(s.master.Process.Pid)
	return commands + master, err
}

func (s *sshCommand) close() {
	s.master.Process.Kill()
	s.master.Wait()
}
