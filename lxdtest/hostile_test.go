package lxdtest_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"testing"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/lxdtest"
)

// What the hostile peer says arrives at clients that know nothing of it.

func TestHostileTarStream(t *testing.T) {
	t.Parallel()
	stream := lxdtest.RawWhole(lxdtest.RawLong('L', "../long"), lxdtest.RawFile("short", "content"), lxdtest.RawLink("l", "/etc"))
	s := lxdtest.NewUnstartedServer()
	s.Handler = lxdtest.HostileTar{Answer: "an answer\n", Send: stream, Status: 3}.Handler
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	s.Start()
	t.Cleanup(s.Close)
	server, err := lxd.ConnectLXDUnix(s.Socket, nil)
	require.NoError(t, err)
	t.Cleanup(server.Disconnect)

	out, status := execute(t, server, "sh", "-c", "tar --version")
	assert.Equal(t, 3, status)
	rest, ok := bytes.CutPrefix(out, []byte("an answer\n"))
	require.True(t, ok)
	in := tar.NewReader(bytes.NewReader(rest))
	var names []string
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		names = append(names, h.Name)
	}
	assert.Equal(t, []string{"./", "../long", "l"}, names)
}

func execute(t *testing.T, server lxd.InstanceServer, args ...string) (stdout []byte, status int) {
	t.Helper()
	var out bytes.Buffer
	done := make(chan bool)
	op, err := server.ExecInstance("c1", api.InstanceExecPost{Command: args, WaitForWS: true}, &lxd.InstanceExecArgs{
		Stdin: io.NopCloser(new(bytes.Reader)), Stdout: nopCloser{&out}, Stderr: nopCloser{io.Discard}, DataDone: done,
	})
	require.NoError(t, err)
	require.NoError(t, op.Wait())
	<-done
	return out.Bytes(), int(op.Get().Metadata["return"].(float64))
}

func TestHostileSFTPServer(t *testing.T) {
	t.Parallel()
	s := lxdtest.NewServer()
	t.Cleanup(s.Close)
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	s.Inject(lxdtest.HostileSFTP{
		List: func(dir string, n int) []lxdtest.SFTPFile {
			if dir != "/x" || n > 0 {
				return nil
			}
			return []lxdtest.SFTPFile{{Name: "../out", Mode: 0o100644, Size: 1 << 40}, {Name: "l", Mode: 0o120777}}
		},
		File: func(name string) string { return "of " + name },
		Link: func(string) string { return "../../etc" },
	}.Faults()...)
	server, err := lxd.ConnectLXDUnix(s.Socket, nil)
	require.NoError(t, err)
	t.Cleanup(server.Disconnect)
	client, err := server.GetInstanceFileSFTP("c1")
	require.NoError(t, err)
	defer client.Close()

	listed, err := client.ReadDir("/x")
	require.NoError(t, err)
	require.Len(t, listed, 2)
	assert.Equal(t, int64(1<<40), listed[0].Size())
	assert.Equal(t, os.ModeSymlink|0o777, listed[1].Mode())
	target, err := client.ReadLink("/x/l")
	require.NoError(t, err)
	assert.Equal(t, "../../etc", target)
	f, err := client.Open("/nowhere")
	require.NoError(t, err)
	content, err := io.ReadAll(f)
	require.NoError(t, err)
	assert.Equal(t, "of /nowhere", string(content))
	require.NoError(t, f.Close())
}
