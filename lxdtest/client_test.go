package lxdtest_test

import (
	"bytes"
	"context"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lxdtransport/transport/lxdtest"
)

// Most tests wait most of the time: many run beside each other, unless -parallel says otherwise.
func TestMain(m *testing.M) {
	_ = flag.Set("test.parallel", "8")
	goleak.VerifyTestMain(m)
}

// official connects the official client over each kind of connection.
func official(t *testing.T, do func(t *testing.T, s *lxdtest.Server, c lxd.InstanceServer)) {
	t.Helper()
	for _, v := range lxdtest.Versions() {
		t.Run(v.Name, func(t *testing.T) {
			t.Run("unix", func(t *testing.T) {
				t.Parallel()
				s := lxdtest.NewUnstartedServer()
				s.Version = v
				s.AddInstance(lxdtest.Instance{Name: "c1", Handler: lxdtest.LocalCommands("")})
				s.Start()
				defer s.Close()
				c, err := lxd.ConnectLXDUnix(s.Socket, nil)
				require.NoError(t, err)
				defer c.Disconnect()
				do(t, s, c)
			})
			t.Run("https", func(t *testing.T) {
				t.Parallel()
				s := lxdtest.NewUnstartedServer()
				s.Version = v
				s.AddInstance(lxdtest.Instance{Name: "c1", Handler: lxdtest.LocalCommands("")})
				s.StartTLS()
				defer s.Close()
				c, err := lxd.ConnectLXD(s.URL, &lxd.ConnectionArgs{
					TLSServerCert: s.ServerCert, TLSClientCert: s.ClientCert, TLSClientKey: s.ClientKey,
				})
				require.NoError(t, err)
				defer c.Disconnect()
				do(t, s, c)
			})
		})
	}
}

func TestOfficialClientExec(t *testing.T) {
	t.Parallel()
	official(t, func(t *testing.T, s *lxdtest.Server, c lxd.InstanceServer) {
		var stdout, stderr bytes.Buffer
		done := make(chan bool)
		op, err := c.ExecInstance("c1", api.InstanceExecPost{
			// The pause is for the client: when it answers a ping on stderr after the server has hung up, its
			// websocket package takes the failure for the end of what there is to read.
			Command: []string{"sh", "-c", "cat; echo err >&2; sleep 0.2; exit 3"}, WaitForWS: true,
		}, &lxd.InstanceExecArgs{
			Stdin: io.NopCloser(strings.NewReader("hello\n")), Stdout: nopCloser{&stdout}, Stderr: nopCloser{&stderr}, DataDone: done,
		})
		require.NoError(t, err)
		require.NoError(t, op.Wait())
		<-done
		require.Equal(t, "hello\n", stdout.String())
		require.Equal(t, "err\n", stderr.String())
		require.Equal(t, 3.0, op.Get().Metadata["return"])
	})
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func TestOfficialClientFiles(t *testing.T) {
	t.Parallel()
	official(t, func(t *testing.T, s *lxdtest.Server, c lxd.InstanceServer) {
		if s.Version.Server == "incus" {
			t.Skip("the LXD client sends and reads X-LXD headers, Incus wants X-Incus ones")
		}
		big := bytes.Repeat([]byte("0123456789abcdef"), 20000)
		require.NoError(t, c.CreateInstanceFile("c1", "/root/a", lxd.InstanceFileArgs{Content: bytes.NewReader(big), UID: 7, GID: 8, Mode: 0o640}))
		body, info, err := c.GetInstanceFile("c1", "/root/a")
		require.NoError(t, err)
		content, err := io.ReadAll(body)
		body.Close()
		require.NoError(t, err)
		require.Equal(t, big, content)
		require.EqualValues(t, 7, info.UID)
		require.EqualValues(t, 8, info.GID)
		require.Equal(t, 0o640, info.Mode)

		require.NoError(t, c.CreateInstanceFile("c1", "/root/d", lxd.InstanceFileArgs{Type: "directory", Mode: -1}))
		_, info, err = c.GetInstanceFile("c1", "/root/d")
		require.NoError(t, err)
		require.Equal(t, "directory", info.Type)
		require.EqualValues(t, s.Version.DirMode, info.Mode)
		require.NoError(t, c.DeleteInstanceFile("c1", "/root/d"))
		_, _, err = c.GetInstanceFile("c1", "/root/d")
		require.True(t, api.StatusErrorCheck(err, 404), err)
	})
}

func TestOfficialClientSFTP(t *testing.T) {
	t.Parallel()
	official(t, func(t *testing.T, s *lxdtest.Server, c lxd.InstanceServer) {
		f, err := c.GetInstanceFileSFTP("c1")
		require.NoError(t, err)
		defer f.Close()
		big := bytes.Repeat([]byte("0123456789abcdef"), 100000)
		w, err := f.Create("/root/.tmp")
		require.NoError(t, err)
		_, err = w.ReadFrom(bytes.NewReader(big))
		require.NoError(t, err)
		require.NoError(t, w.Chmod(0o600))
		require.NoError(t, w.Close())
		require.NoError(t, f.Chown("/root/.tmp", 1000, 1001))
		when := time.Unix(1700000000, 0)
		require.NoError(t, f.Chtimes("/root/.tmp", when, when))
		require.NoError(t, f.PosixRename("/root/.tmp", "/root/big"))
		info, err := f.Stat("/root/big")
		require.NoError(t, err)
		require.EqualValues(t, len(big), info.Size())
		require.EqualValues(t, 0o600, info.Mode().Perm())
		require.True(t, when.Equal(info.ModTime()))
		_, err = f.Stat("/root/.tmp")
		require.ErrorIs(t, err, os.ErrNotExist)
		r, err := f.Open("/root/big")
		require.NoError(t, err)
		var got bytes.Buffer
		_, err = r.WriteTo(&got)
		require.NoError(t, err)
		require.Equal(t, big, got.Bytes())
		require.NoError(t, r.Close())
		require.NoError(t, f.Mkdir("/root/d"))
		require.NoError(t, f.Symlink("../big", "/root/d/l"))
		target, err := f.ReadLink("/root/d/l")
		require.NoError(t, err)
		require.Equal(t, "../big", target)
		require.NoError(t, f.Link("/root/big", "/root/d/h"))
		list, err := f.ReadDir("/root/d")
		require.NoError(t, err)
		require.Len(t, list, 2)
		_, err = f.StatVFS("/root")
		require.NoError(t, err)
		require.NoError(t, f.Remove("/root/d/l"))
		require.Error(t, f.Remove("/root/d"))
		for _, file := range s.Files("c1") {
			if file.Path == "/root/big" {
				require.Equal(t, 1000, file.UID)
				require.Equal(t, 1001, file.GID)
			}
		}
	})
}

func TestLxcCommand(t *testing.T) {
	t.Parallel()
	lxc, err := exec.LookPath("lxc")
	if err != nil {
		t.Skip("there is no lxc command on this machine (apt-get install lxd-client)")
	}
	for _, v := range lxdtest.Versions() {
		for _, tls := range []bool{false, true} {
			t.Run(v.Name+map[bool]string{false: "/unix", true: "/https"}[tls], func(t *testing.T) {
				t.Parallel()
				s := lxdtest.NewUnstartedServer()
				s.Version, s.Handler = v, lxdtest.LocalCommands("")
				s.AddInstance(lxdtest.Instance{Name: "c1"})
				s.AddInstance(lxdtest.Instance{Name: "v1", Type: lxdtest.VM, Status: lxdtest.Stopped})
				if tls {
					s.StartTLS()
				} else {
					s.Start()
				}
				defer s.Close()
				dir := t.TempDir()
				require.NoError(t, s.WriteClientConfig(dir))
				run := func(status int, stdin string, args ...string) string {
					ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
					defer cancel()
					cmd := exec.CommandContext(ctx, lxc, args...)
					cmd.Env = []string{"LXD_CONF=" + dir, "HOME=" + dir, "PATH=" + os.Getenv("PATH")}
					cmd.Stdin = strings.NewReader(stdin)
					out, err := cmd.CombinedOutput()
					require.Equal(t, status, cmd.ProcessState.ExitCode(), "%v: %v: %s", args, err, out)
					return string(out)
				}
				list := run(0, "", "list", "fake:", "--format", "csv", "--columns", "nst")
				require.Contains(t, list, "c1,RUNNING,CONTAINER")
				require.Contains(t, list, "v1,STOPPED,VIRTUAL-MACHINE")
				require.Equal(t, "in\n", run(0, "in\n", "exec", "fake:c1", "--", "cat"))
				run(3, "", "exec", "fake:c1", "--", "sh", "-c", "exit 3")
				run(127, "", "exec", "fake:c1", "--", "no-such-command")
				run(0, "", "launch", "fake:image", "fake:b1", "--ephemeral", "--config", "user.job=7")
				require.Contains(t, run(0, "", "info", "fake:b1"), "Status: RUNNING")
				require.Equal(t, "7\n", run(0, "", "config", "get", "fake:b1", "user.job"))
				run(0, "", "delete", "--force", "fake:b1")
				run(1, "", "info", "fake:b1")
				if v.Server == "incus" {
					return // lxc sends and reads X-LXD headers, Incus wants X-Incus ones
				}
				src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
				require.NoError(t, os.WriteFile(src, []byte("content"), 0o600))
				run(0, "", "file", "push", src, "fake:c1/root/f")
				require.Equal(t, "content", run(0, "", "exec", "fake:c1", "--", "cat", "f"))
				run(0, "", "file", "pull", "fake:c1/root/f", dst)
				got, err := os.ReadFile(dst)
				require.NoError(t, err)
				require.Equal(t, "content", string(got))
				require.NoError(t, os.Mkdir(filepath.Join(dir, "tree"), 0o755))
				require.NoError(t, os.WriteFile(filepath.Join(dir, "tree", "leaf"), []byte("green"), 0o600))
				run(0, "", "file", "push", "--recursive", filepath.Join(dir, "tree"), "fake:c1/root")
				run(0, "", "file", "pull", "--recursive", "fake:c1/root/tree", filepath.Join(dir, "back"))
				got, err = os.ReadFile(filepath.Join(dir, "back", "tree", "leaf"))
				require.NoError(t, err)
				require.Equal(t, "green", string(got))
				run(0, "", "file", "delete", "fake:c1/root/f")
			})
		}
	}
}

// quick shortens the times of a release, so that tests do not wait for the real ones.
func quick(v *lxdtest.Version) {
	v.StartDelay = 0
	v.PingInterval = 100 * time.Millisecond
	v.ConnectWindow, v.OperationLifetime = patience, patience // for a busy machine
	v.ChildGrace = min(v.ChildGrace, 100*time.Millisecond)
}
