package transport_test

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

func TestTreeRoundTrip(t *testing.T) {
	src := runtime.GOROOT() + "/src"
	instance := reallxd.Instance(t)
	var server lxd.InstanceServer
	for _, s := range reallxd.Servers(t) {
		server = s
		break
	}
	host, err := transport.NewLXD(server, instance, nil)
	require.NoError(t, err)
	defer host.Close()
	dst := "/tree-" + strings.ToLower(t.Name())
	defer host.Exec(t.Context(), transport.Command{Args: []string{"rm", "-rf", dst}})
	start := time.Now()
	stats, err := transport.UploadTree(t.Context(), host, dst, os.DirFS(src), &transport.TreeOptions{Symlinks: transport.KeepSymlinks})
	require.NoError(t, err)
	fmt.Println("up", time.Since(start), stats)
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	require.NoError(t, err)
	defer root.Close()
	start = time.Now()
	stats, err = transport.DownloadTree(t.Context(), host, dst, root, &transport.TreeOptions{Symlinks: transport.KeepSymlinks})
	require.NoError(t, err)
	fmt.Println("down", time.Since(start), stats)
	list := func(d string) string {
		cmd := exec.Command("sh", "-c", `cd "$1" && find . -mindepth 1 -printf '%P %m %Ts %l %y\n' | sort`, "sh", d)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		return string(out)
	}
	want, got := strings.Split(list(src), "\n"), strings.Split(list(dir), "\n")
	require.Equal(t, len(want), len(got))
	bad := 0
	for i := range want {
		if want[i] != got[i] {
			if bad++; bad < 10 {
				t.Errorf("%s != %s", want[i], got[i])
			}
		}
	}
	out, err := exec.Command("diff", "-r", "--no-dereference", src, dir).CombinedOutput()
	require.NoError(t, err, string(out))
}
