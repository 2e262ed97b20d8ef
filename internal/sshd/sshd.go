// Package sshd starts an SSH server of this machine for tests, with keys of its own, on a port of the loopback interface.
package sshd

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Server is a running sshd.
type Server struct {
	Dir     string // has the keys host and client, their public halves with .pub, and known, a known_hosts file
	Address string // user@host:port
}

// File is the path of a file in Dir.
func (s *Server) File(name string) string { return filepath.Join(s.Dir, name) }

// Find returns the path of sshd. Without one the test is skipped, or fails if REQUIRE_SSH is 1.
func Find(t testing.TB) string {
	t.Helper()
	name, err := exec.LookPath("sshd")
	if err != nil {
		name = "/usr/sbin/sshd" // is not in everybody's PATH
		_, err = os.Stat(name)
	}
	if err == nil {
		_, err = exec.LookPath("ssh-keygen")
	}
	if err == nil {
		return name
	}
	if os.Getenv("REQUIRE_SSH") == "1" {
		t.Fatalf("REQUIRE_SSH=1, and there is no sshd: %v", err)
	}
	t.Skip("needs sshd and ssh-keygen: apt-get install openssh-server openssh-client")
	return ""
}

// Start starts a server, which ends with the test. Lines of configuration come before its own, and so instead of them; DIR in them is its
// directory.
func Start(t testing.TB, config ...string) *Server {
	t.Helper()
	sshd := Find(t)
	if os.Getuid() == 0 {
		_ = os.Mkdir(runDir, 0o755) // sshd says what is wrong
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Dir: t.TempDir()}
	Keygen(t, "-t", "ed25519", "-N", "", "-f", s.File("host"))
	Keygen(t, "-t", "ed25519", "-N", "", "-f", s.File("client"))
	// Another process may take the port before sshd does.
	var port string
	for try := 0; ; try++ {
		port = freePort(t)
		if err = s.run(t, sshd, port, config); err == nil {
			break
		}
		if try == 5 {
			t.Fatal(err)
		}
	}
	public, err := os.ReadFile(s.File("host.pub"))
	if err != nil {
		t.Fatal(err)
	}
	s.Address = me.Username + "@127.0.0.1:" + port
	s.Write(t, "known", fmt.Sprintf("[127.0.0.1]:%s %s", port, public))
	return s
}

// Write writes a file in Dir.
func (s *Server) Write(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(s.File(name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *Server) run(t testing.TB, sshd, port string, config []string) error {
	t.Helper()
	// SHLVL: Debian's bash would read the user's .bashrc for every command otherwise, which may take long.
	s.Write(t, "config", strings.NewReplacer("DIR", s.Dir, "PORT", port).Replace(strings.Join(config, "\n")+`
ListenAddress 127.0.0.1
Port PORT
HostKey DIR/host
AuthorizedKeysFile DIR/client.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PidFile none
MaxStartups 100
SetEnv SHLVL=1
Subsystem sftp internal-sftp
`))
	cmd := exec.Command(sshd, "-D", "-e", "-f", s.File("config"))
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if !strings.HasPrefix(lines.Text(), "Server listening") {
			said.WriteString(lines.Text() + "\n")
			continue
		}
		read := make(chan struct{})
		go func() { // ends with sshd and its sessions, and keeps them from waiting for a reader
			defer close(read)
			for lines.Scan() {
			}
		}()
		t.Cleanup(func() {
			_ = cmd.Process.Signal(syscall.SIGTERM)
			<-read
			_ = cmd.Wait()
		})
		return nil
	}
	_ = cmd.Wait()
	return fmt.Errorf("sshd: %s", said.String())
}

// Keygen runs ssh-keygen.
func Keygen(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("ssh-keygen", append([]string{"-q"}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// runDir is where Debian's sshd wants to chroot to. It stays: another process may have a server, too.
const runDir = "/run/sshd"
