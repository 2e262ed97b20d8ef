//go:build unix

package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
)

// sshServer is a sshd of our own, with keys of its own, on a port of the loopback interface.
type sshServer struct {
	Dir  string
	Port string
	User string

	cmd     *exec.Cmd
	madeRun bool
}

// runDir is where Debian's sshd wants to chroot to.
const runDir = "/run/sshd"

func startSSH(ctx context.Context, dir string) (_ *sshServer, err error) {
	for _, name := range []string{"ssh", "scp", "ssh-keygen"} {
		if _, err := exec.LookPath(name); err != nil {
			return nil, err
		}
	}
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		sshd = "/usr/sbin/sshd" // is not in everybody's PATH
		if _, err := os.Stat(sshd); err != nil {
			return nil, err
		}
	}
	me, err := user.Current()
	if err != nil {
		return nil, err
	}
	s := &sshServer{Dir: filepath.Join(dir, "ssh"), User: me.Username}
	if err := os.Mkdir(s.Dir, 0o700); err != nil {
		return nil, err
	}
	for _, name := range []string{"host", "client"} {
		if out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(s.Dir, name)).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ssh-keygen: %w: %s", err, out)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // tells a free port
	if err != nil {
		return nil, err
	}
	_, s.Port, _ = net.SplitHostPort(l.Addr().String())
	l.Close()
	public, err := os.ReadFile(filepath.Join(s.Dir, "host.pub"))
	if err != nil {
		return nil, err
	}
	// SHLVL: Debian's bash would read the user's .bashrc for every command otherwise, which may take long.
	config := strings.NewReplacer("DIR", s.Dir, "PORT", s.Port).Replace(`
ListenAddress 127.0.0.1
Port PORT
HostKey DIR/host
AuthorizedKeysFile DIR/client.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PidFile none
MaxSessions 100
SetEnv SHLVL=1
Subsystem sftp internal-sftp
`)
	for name, content := range map[string]string{"config": config, "known": fmt.Sprintf("[127.0.0.1]:%s %s", s.Port, public)} {
		if err := os.WriteFile(filepath.Join(s.Dir, name), []byte(content), 0o600); err != nil {
			return nil, err
		}
	}
	if os.Getuid() == 0 {
		s.madeRun = os.Mkdir(runDir, 0o755) == nil
	}
	s.cmd = exec.Command(sshd, "-D", "-e", "-f", filepath.Join(s.Dir, "config"))
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stderr, err := s.cmd.StderrPipe()
	if err == nil {
		err = s.cmd.Start()
	}
	if err != nil {
		s.stop()
		return nil, err
	}
	var said bytes.Buffer
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "Server listening") {
			go func() { // ends with sshd, and keeps it from waiting for a reader
				for lines.Scan() {
				}
			}()
			return s, nil
		}
		said.WriteString(lines.Text() + "\n")
	}
	s.stop()
	return nil, fmt.Errorf("sshd: %s", bytes.TrimSpace(said.Bytes()))
}

func (s *sshServer) stop() {
	if s.cmd != nil && s.cmd.Process != nil {
		syscall.Kill(-s.cmd.Process.Pid, syscall.SIGTERM)
		s.cmd.Wait()
	}
	if s.madeRun {
		os.Remove(runDir)
	}
}

func (s *sshServer) host() string { return s.User + "@127.0.0.1" }

// options keep ssh from everything that the user has configured.
func (s *sshServer) options() []string {
	options := []string{"-F", "none"}
	for _, o := range []string{
		"Port=" + s.Port, "IdentityFile=" + filepath.Join(s.Dir, "client"), "IdentitiesOnly=yes", "IdentityAgent=none",
		"UserKnownHostsFile=" + filepath.Join(s.Dir, "known"), "GlobalKnownHostsFile=none", "BatchMode=yes", "LogLevel=ERROR",
	} {
		options = append(options, "-o", o)
	}
	return options
}
