//go:build unix

package ssh

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/pkg/sftp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
)

// shells are those of this machine that may be /bin/sh on another.
func shells(t *testing.T) (found [][]string) {
	t.Helper()
	for _, c := range [][]string{{"/bin/sh"}, {"dash"}, {"bash", "--posix"}, {"busybox", "sh"}, {"ksh"}, {"mksh"}} {
		if path, err := exec.LookPath(c[0]); err == nil {
			found = append(found, append([]string{path}, c[1:]...))
		}
	}
	return found
}

// throughShell runs a command as the host does, with a shell of this machine in the place of the host's.
func throughShell(t *testing.T, shell []string, cmd transport.Command) (out string, err error) {
	t.Helper()
	const mark = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	head, err := header(cmd, mark)
	require.NoError(t, err)
	for line := range strings.Lines(head) {
		require.LessOrEqual(t, len(line), lineSize+1)
		require.True(t, plain(strings.TrimSuffix(line, "\n")))
	}
	script, ok := strings.CutPrefix(loader, "exec /bin/sh -c '")
	require.True(t, ok)
	script = strings.TrimSuffix(script, "'")
	c := exec.Command(shell[0], append(shell[1:], "-c", script)...)
	c.Stdin = strings.NewReader(head + "the input")
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	c.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8"}
	err = c.Run()
	r := &report{mark: mark, found: make(chan struct{})}
	rest := r.skip(stdout.Bytes())
	require.True(t, r.done, "%s", stderr.String())
	return string(rest), err
}

// Every byte but NUL gets through every shell, in arguments, variables and directories, and the command has its input to itself.
func TestEveryByteThroughEveryShell(t *testing.T) {
	t.Parallel()
	all := make([]byte, 0, 255)
	for c := 1; c < 256; c++ {
		all = append(all, byte(c))
	}
	odd := string(all)
	dir := t.TempDir() + "/it's \xff odd\n"
	require.NoError(t, os.Mkdir(dir, 0o755))
	for _, shell := range shells(t) {
		cmd := transport.Command{
			Args: []string{"env", "sh", "-c", `printf '%s|' "$@" "$A" "$BAD" "$PATH_LIKE"; pwd; cat`, "sh", odd, "", "-n", "it's", "\n", `\0101`, "$HOME`id`", "end\n\n", odd},
			Env:  map[string]string{"A": odd, "BAD": "a\xc3", "PATH_LIKE": "ä'", "UID": "77", "IFS": "x", "a.b": "c", "LC_ALL": "no_SUCH.locale"},
			Dir:  dir,
		}
		out, err := throughShell(t, shell, cmd)
		require.NoError(t, err, shell)
		want := strings.Join(cmd.Args[5:], "|") + "|" + odd + "|a\xc3|ä'|" + dir + "\nthe input"
		assert.Equal(t, want, out, "%v", shell)

		cmd.Args = []string{"env"}
		out, err = throughShell(t, shell, cmd)
		require.NoError(t, err, shell)
		for _, line := range []string{"UID=77", "IFS=x", "a.b=c", "LC_ALL=no_SUCH.locale", markPrefix + "ABCDEFGHIJKLMNOPQRSTUVWXYZ=1"} {
			assert.Contains(t, "\n"+out, "\n"+line+"\n", "%v", shell)
		}
		for _, ours := range []string{"TRANSPORT_H", "TRANSPORT_L", "OLDPWD"} {
			assert.NotContains(t, "\n"+out, "\n"+ours+"=", "%v", shell)
		}
	}
}

// A header of which the end is missing runs nothing.
func TestHalfAHeader(t *testing.T) {
	t.Parallel()
	head, err := header(transport.Command{Args: []string{"touch", t.TempDir() + "/ran", strings.Repeat("x", 2*lineSize)}}, newMark())
	require.NoError(t, err)
	for _, n := range []int{0, 1, lineSize, lineSize + 1, len(head) - 1} {
		c := exec.Command("/bin/sh", "-c", loader)
		c.Stdin = strings.NewReader(head[:n])
		out, err := c.CombinedOutput()
		assert.ErrorContains(t, err, "125")
		assert.Empty(t, string(out))
	}
}

func TestReportIsFoundHoweverItIsCut(t *testing.T) {
	t.Parallel()
	const mark = "ABCDEFGHIJ"
	text := "noise\r\nABCDEABCDEFGHIJ" + strings.Repeat("x", 100) + "ABCDEFGHIJ " + strings.Repeat("x", 100) + "\nABCDEFGHIJ 123\r\noutput ABCDEFGHIJ 4\n"
	for size := 1; size <= len(text); size++ {
		r := &report{mark: mark, found: make(chan struct{})}
		var out []byte
		for rest := []byte(text); len(rest) > 0; {
			n := min(size, len(rest))
			out = append(out, r.skip(rest[:n])...)
			rest = rest[n:]
		}
		assert.Equal(t, "123", r.word, "in pieces of %d", size)
		assert.Equal(t, "output ABCDEFGHIJ 4\n", string(out), "in pieces of %d", size)
	}
}

// There is one script, which cannot be embedded from elsewhere.
func TestReapScriptIsTheOneOfLXD(t *testing.T) {
	t.Parallel()
	theirs, err := os.ReadFile("../reap.sh")
	require.NoError(t, err)
	assert.Equal(t, string(theirs), reapScript)
}

type noClose struct{ io.Writer }

func (noClose) Close() error { return nil }

// Files are created with mode 0600 by the request that creates them, and nothing else is changed.
func TestFilesAreCreatedPrivately(t *testing.T) {
	t.Parallel()
	answers, server := io.Pipe()
	defer server.Close()
	sent := make(chan []byte, 100)
	w := &privately{w: noClose{writerFunc(func(p []byte) (int, error) { sent <- bytes.Clone(p); return len(p), nil })}}
	go func() { server.Write([]byte{0, 0, 0, 5, 2, 0, 0, 0, 3}) }() // VERSION 3
	c, err := sftp.NewClientPipe(answers, w)
	require.NoError(t, err)
	<-sent // INIT
	opened := make(chan error, 1)
	go func() {
		_, err := c.OpenFile("/some/where", os.O_WRONLY|os.O_CREATE|os.O_EXCL)
		opened <- err
	}()
	p := <-sent
	require.Len(t, p, int(binary.BigEndian.Uint32(p))+4)
	assert.EqualValues(t, fxpOpen, p[4])
	assert.Equal(t, []byte{0, 0, 0, 4, 0, 0, 1, 0o200}, p[len(p)-8:])
	assert.Contains(t, string(p), "/some/where")
	server.Close()
	assert.Error(t, <-opened)

	for _, other := range [][]byte{
		{0, 0, 0, 1, 9}, append([]byte{0, 0, 0, 20, fxpOpen}, make([]byte, 19)...), // not one that creates
		append([]byte{0, 0, 0, 40, 6}, make([]byte, 20)...), append([]byte{0, 0, 0, 15, fxpOpen}, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0), // data
	} {
		n, err := w.Write(other)
		require.NoError(t, err)
		assert.Equal(t, len(other), n)
		assert.Equal(t, other, <-sent)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
