package lxdtest_test

import (
	"bytes"
	"context"
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

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

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
	for _, tls := range []bool{false, true} {
		t.Run(map[bool]string{false: "unix", true: "https"}[tls], func(t *testing.T) {
			t.Parallel()
			s := lxdtest.NewUnstartedServer()
			s.AddInstance(lxdtest.Instance{Name: "c1", Handler: lxdtest.LocalCommands("")})
			if tls {
				s.StartTLS()
			} else {
				s.Start()
			}
			defer s.Close()
			dir := t.TempDir()
			require.NoError(t, s.WriteClientConfig(dir))
			run := func(stdin string, args ...string) string {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				cmd := exec.CommandContext(ctx, lxc, args...)
				cmd.Env = []string{"LXD_CONF=" + dir, "HOME=" + dir, "PATH=" + os.Getenv("PATH")}
				cmd.Stdin = strings.NewReader(stdin)
				out, err := cmd.CombinedOutput()
				require.NoError(t, err, "%s", out)
				return string(out)
			}
			require.Contains(t, run("", "list", "fake:"), "c1")
			require.Equal(t, "in\n", run("in\n", "exec", "fake:c1", "--", "cat"))
			src := filepath.Join(dir, "src")
			require.NoError(t, os.WriteFile(src, []byte("content"), 0o600))
			run("", "file", "push", src, "fake:c1/root/f")
			require.Equal(t, "content", run("", "exec", "fake:c1", "--", "cat", "f"))
			run("", "file", "pull", "fake:c1/root/f", filepath.Join(dir, "dst"))
			got, err := os.ReadFile(filepath.Join(dir, "dst"))
			require.NoError(t, err)
			require.Equal(t, "content", string(got))
		})
	}
}

// quick shortens the times of a release, so that tests do not wait for the real ones.
func quick(v *lxdtest.Version) {
	v.StartDelay = 0
	v.PingInterval = 100 * time.Millisecond
	v.ConnectWindow = 2500 * time.Millisecond
	v.OperationLifetime = 1500 * time.Millisecond
	v.ChildGrace = min(v.ChildGrace, 100*time.Millisecond)
}
