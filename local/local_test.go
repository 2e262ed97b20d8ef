package local_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/local"
)

// What the suite in transporttest cannot know of this transport.

func posix(t *testing.T) {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("needs /bin/sh")
	}
	t.Parallel()
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	_, err := local.New("", nil)
	assert.ErrorContains(t, err, "empty")
	_, err = local.New(filepath.Join(t.TempDir(), "missing"), nil)
	assert.ErrorIs(t, err, fs.ErrNotExist)
}

func TestRootIsTheDirectory(t *testing.T) {
	posix(t)
	host, dir := newLocal(t, nil)
	require.NoError(t, host.Upload(t.Context(), "/f", strings.NewReader("x"), nil))
	got, err := os.ReadFile(filepath.Join(dir, "f"))
	require.NoError(t, err)
	assert.Equal(t, "x", string(got))
	out, err := transport.Output(t.Context(), host, transport.Command{Args: []string{"pwd"}})
	require.NoError(t, err)
	assert.Equal(t, dir+"\n", string(out))
}

func TestFilesStayBelowTheDirectory(t *testing.T) {
	posix(t)
	host, dir := newLocal(t, nil)
	outside := directory(t)
	require.NoError(t, os.WriteFile(filepath.Join(outside, "f"), []byte("secret"), 0o600))
	require.NoError(t, os.Symlink(outside, filepath.Join(dir, "out")))
	require.NoError(t, os.Symlink(filepath.Join(outside, "f"), filepath.Join(dir, "link")))
	for _, name := range []string{"/out/f", "/link", "/../../../../../../etc/passwd"} {
		var got bytes.Buffer
		assert.Error(t, host.Download(t.Context(), name, &got, nil), name)
		assert.Empty(t, got.Bytes(), name)
	}
	assert.Error(t, host.Upload(t.Context(), "/out/g", strings.NewReader("x"), &transport.UploadOptions{MkdirAll: true}))
	entries, err := os.ReadDir(outside)
	require.NoError(t, err)
	assert.Len(t, entries, 1)
	assert.ErrorIs(t, host.Exec(t.Context(), transport.Command{Args: []string{"true"}, Dir: "/out"}), transport.ErrNotStarted)
	require.NoError(t, host.Upload(t.Context(), "/../../f", strings.NewReader("x"), nil))
	assert.FileExists(t, filepath.Join(dir, "f"))
}

func TestEnvironment(t *testing.T) {
	posix(t)
	host, _ := newLocal(t, &local.Options{Env: []string{"PATH=" + os.Getenv("PATH"), "A=1", "B=2"}})
	out, err := transport.Output(t.Context(), host, transport.Command{
		Args: transport.Shell(`echo "$A $B ${HOME-none}"`), Env: map[string]string{"B": "3"},
	})
	require.NoError(t, err)
	assert.Equal(t, "1 3 none\n", string(out))
}

func TestWhichFileRuns(t *testing.T) {
	posix(t)
	host, _ := newLocal(t, nil)
	script := &transport.UploadOptions{Mode: 0o755, MkdirAll: true}
	require.NoError(t, host.Upload(t.Context(), "/opt/tool", strings.NewReader("#!/bin/sh\necho mine\n"), script))
	require.NoError(t, host.Upload(t.Context(), "/opt/plain", strings.NewReader("echo plain $1\n"), script))
	require.NoError(t, host.Upload(t.Context(), "/opt/lost", strings.NewReader("#!/no/such/interpreter\n"), script))
	for _, c := range []struct {
		cmd  transport.Command
		want string
	}{
		{transport.Command{Args: []string{"/opt/tool"}}, "mine\n"}, // below the directory first
		{transport.Command{Args: []string{"./tool"}, Dir: "/opt"}, "mine\n"},
		{transport.Command{Args: []string{"opt/tool"}}, "mine\n"},
		{transport.Command{Args: []string{"tool"}, Env: map[string]string{"PATH": "opt"}}, "mine\n"},
		{transport.Command{Args: []string{"/opt/plain", "x"}}, "plain x\n"}, // as execvp runs it
	} {
		out, err := transport.Output(t.Context(), host, c.cmd)
		require.NoError(t, err, c.cmd.Args)
		assert.Equal(t, c.want, string(out))
	}
	code, _ := transport.ExitCode(host.Exec(t.Context(), transport.Command{Args: []string{"/opt/lost"}}))
	assert.Equal(t, 127, code)
}

func TestArgumentsThatAreTooLong(t *testing.T) {
	posix(t)
	host, _ := newLocal(t, nil)
	err := host.Exec(t.Context(), transport.Command{Args: []string{"true", strings.Repeat("x", 8<<20)}})
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.NotContains(t, err.Error(), "xx")
}

// A child that writes without an end cannot hold Exec.
func TestBackgroundChildThatFloods(t *testing.T) {
	posix(t)
	host, _ := newLocal(t, nil)
	start := time.Now()
	err := host.Exec(t.Context(), transport.Command{
		Args: transport.Shell("yes & exit 3"), Stdout: io.Discard, WaitDelay: 100 * time.Millisecond,
	})
	assert.ErrorIs(t, err, transport.ErrOutputLost)
	code, _ := transport.ExitCode(err)
	assert.Equal(t, 3, code)
	assert.Less(t, time.Since(start), 20*time.Second)
}

// ctx that ends while what was left behind holds the output ends that, too, and then nothing is lost.
func TestContextEndsWhileAChildHoldsTheOutput(t *testing.T) {
	posix(t)
	host, _ := newLocal(t, nil)
	r, w := io.Pipe()
	defer r.Close()
	p, err := host.Start(t.Context(), transport.Command{
		Args: transport.Shell("sleep 60 & echo up"), Stdout: w, WaitDelay: time.Minute,
	})
	require.NoError(t, err)
	_, err = io.ReadFull(r, make([]byte, 3))
	require.NoError(t, err)
	require.NoError(t, host.Close())
	err = p.Wait()
	assert.ErrorIs(t, err, transport.ErrClosed)
	assert.NotErrorIs(t, err, transport.ErrOutputLost)
}

func TestNoTerminalElsewhere(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "linux" {
		t.Skip("there are terminals on Linux")
	}
	host, _ := newLocal(t, nil)
	err := host.Exec(t.Context(), transport.Command{Args: []string{"true"}, TTY: new(transport.TTY)})
	assert.True(t, errors.Is(err, errors.ErrUnsupported) || runtime.GOOS == "windows", "%v", err)
}
