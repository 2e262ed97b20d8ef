//go:build unix

package transport_test

import (
	"bytes"
	"errors"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

// outOfFiles runs many commands on a daemon that has too few descriptors for them. Each has a verdict that is true, and has run once or not at all.
func outOfFiles(t *testing.T, d *reallxd.Daemon, instance string) {
	t.Helper()
	const n = 60
	for i, s := range d.Servers(t) {
		host := newLXD(t, s, instance, nil)
		require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"mkdir", "/root/" + s.Name}}))
		errs, outs := make([]error, n), make([]bytes.Buffer, n)
		lift := d.LimitFiles(t, 40+20*i)
		var all sync.WaitGroup
		for i := range n {
			all.Go(func() {
				// What it writes to the file tells how often it has run; the rest is what the verdict is about.
				errs[i] = host.Exec(soon(t), transport.Command{Args: transport.Shell(`echo x >>"$1"; echo out; exit 3`, "/root/"+s.Name+"/"+strconv.Itoa(i)), Stdout: &outs[i]})
			})
		}
		all.Wait()
		lift()
		require.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"true"}}), "with descriptors again")
		listed, err := transport.Output(soon(t), host, transport.Command{Args: transport.Shell(`cd "$1" && for f in *; do echo "$f $(cat "$f" | wc -l)"; done`, "/root/"+s.Name)})
		require.NoError(t, err)
		ran := map[string]string{}
		for line := range strings.Lines(string(listed)) {
			name, times, _ := strings.Cut(strings.TrimSpace(line), " ")
			ran[name] = times
		}
		count := map[string]int{}
		for i, err := range errs {
			times := ran[strconv.Itoa(i)]
			assert.NotEqual(t, "2", times, "it was started again")
			code, exited := transport.ExitCode(err)
			switch {
			case errors.Is(err, transport.ErrNotStarted):
				count["not started"]++
				assert.Empty(t, times, "it has run: %v", err)
			case exited && err.Error() == (&transport.ExitError{Code: 3}).Error():
				count["status"]++
				assert.Equal(t, "1", times)
				assert.Equal(t, "out\n", outs[i].String())
			default:
				count["otherwise"]++
				t.Logf("%s: ran %s, %v", s.Name, times, err)
				if exited {
					assert.Contains(t, []int{3, 137, 141}, code, "%v", err)
				}
				assert.Error(t, err, "it did not exit with 0")
			}
		}
		t.Logf("%s: %v", s.Name, count)
	}
	require.NoError(t, newLXD(t, d.Servers(t)[0], instance, nil).Exec(soon(t), sh("rm -r /root/*")))
	require.NoError(t, reallxd.Left(d.Servers(t)[0], instance, patience))
}
