//go:build unix

package ssh_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/ssh"
)

// server is a sshd of our own, with keys of its own, on a port of the loopback interface.
type server struct {
	dir     string
	address string // user@host:port
}

func (s *server) options() *ssh.Options {
	return &ssh.Options{KeyFiles: []string{s.file("client")}, KnownHosts: []string{s.file("known")}}
}

func (s *server) file(name string) string { return filepath.Join(s.dir, name) }

// runDir is where Debian's sshd wants to chroot to. It is made once, and removed by TestMain.
const runDir = "/run/sshd"

var (
	makeRunDir sync.Once
	madeRunDir bool
)

// findServer returns the path of sshd.
func findServer(t testing.TB) string {
	t.Helper()
	name, err := exec.LookPath("sshd")
	if err != nil {
		name = "/usr/sbin/sshd" // is not in everybody's PATH
		_, err = os.Stat(name)
	}
	if err == nil {
		_, err = exec.LookPath("ssh-keygen")
	}
	if err != nil {
		if os.Getenv("REQUIRE_SSH") == "1" {
			t.Fatalf("REQUIRE_SSH=1, and there is no sshd: %v", err)
		}
		t.Skip("needs sshd and ssh-keygen: apt-get install openssh-server openssh-client")
	}
	return name
}

// newServer starts a sshd. Lines of configuration come before its own, and so instead of them.
func newServer(t testing.TB, config ...string) *server {
	t.Helper()
	sshd := findServer(t)
	me, err := user.Current()
	require.NoError(t, err)
	s := &server{dir: t.TempDir()}
	for _, name := range []string{"host", "client"} {
		keygen(t, "-t", "ed25519", "-N", "", "-f", s.file(name))
	}
	if os.Getuid() == 0 {
		makeRunDir.Do(func() { madeRunDir = os.Mkdir(runDir, 0o755) == nil })
	}
	// Another process may take the port before sshd does.
	for try := 0; ; try++ {
		port := freePort(t)
		s.address = me.Username + "@127.0.0.1:" + port
		err := s.start(t, sshd, port, config)
		if err == nil {
			break
		}
		require.Less(t, try, 5, "%v", err)
	}
	public, err := os.ReadFile(s.file("host.pub"))
	require.NoError(t, err)
	_, hostport, _ := strings.Cut(s.address, "@")
	_, port, _ := strings.Cut(hostport, ":")
	s.write(t, "known", fmt.Sprintf("[127.0.0.1]:%s %s", port, public))
	return s
}

func (s *server) write(t testing.TB, name, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(s.file(name), []byte(text), 0o600))
}

func (s *server) start(t testing.TB, sshd, port string, config []string) error {
	t.Helper()
	// SHLVL: Debian's bash would read the user's .bashrc for every command otherwise, which may take long.
	s.write(t, "config", strings.NewReplacer("DIR", s.dir, "PORT", port).Replace(strings.Join(config, "\n")+`
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
	cmd := exec.Command(sshd, "-D", "-e", "-f", s.file("config"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	var said strings.Builder
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if !strings.HasPrefix(lines.Text(), "Server listening") {
			said.WriteString(lines.Text() + "\n")
			continue
		}
		read := make(chan struct{})
		go func() { // ends with sshd, and keeps it from waiting for a reader
			defer close(read)
			for lines.Scan() {
			}
		}()
		t.Cleanup(func() {
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
			<-read
			_ = cmd.Wait()
		})
		return nil
	}
	_ = cmd.Wait()
	return fmt.Errorf("sshd: %s", said.String())
}

func keygen(t testing.TB, args ...string) {
	t.Helper()
	out, err := exec.Command("ssh-keygen", append([]string{"-q"}, args...)...).CombinedOutput()
	require.NoError(t, err, "ssh-keygen: %s", out)
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	return port
}

func dial(t testing.TB, s *server, opts *ssh.Options) *ssh.Transport {
	t.Helper()
	host, err := ssh.Dial(t.Context(), s.address, opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, host.Close()) })
	return host
}
