package transport_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

// onLXD runs a test over every way to the real server, each with a transport of its own. Of what the test has run there, no process may be left in the
// instance, and no operation at the server.
func onLXD(t *testing.T, test func(t *testing.T, host *transport.LXD)) {
	t.Helper()
	t.Parallel()
	name := reallxd.Instance(t)
	for _, s := range reallxd.Servers(t) {
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			test(t, newLXD(t, s, name, leaving(t, reallxd.Unix(t), name)))
		})
	}
}

// leaving returns the options of a transport, to be made next, of which no process is left in the instance and no operation at the server
// when it has been closed.
func leaving(t *testing.T, s lxd.InstanceServer, instance string) *transport.LXDOptions {
	begun := new(commandsBegun)
	t.Cleanup(func() { assert.NoError(t, begun.left(s, instance)) })
	return &transport.LXDOptions{Logger: slog.New(begun)}
}

// commandsBegun listens to a transport's log for the commands that it starts.
type commandsBegun struct {
	mu                sync.Mutex
	operations, marks []string
}

func (c *commandsBegun) Enabled(context.Context, slog.Level) bool { return true }
func (c *commandsBegun) WithAttrs([]slog.Attr) slog.Handler       { return c }
func (c *commandsBegun) WithGroup(string) slog.Handler            { return c }

func (c *commandsBegun) Handle(_ context.Context, r slog.Record) error {
	if r.Message != "command started" {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "operation":
			c.operations = append(c.operations, a.Value.String())
		case "mark":
			if mark := a.Value.String(); mark != "" { // else it is one of the transport's own
				c.marks = append(c.marks, transport.MarkPrefix+mark)
			}
		}
		return true
	})
	return nil
}

// left says what is left of them.
func (c *commandsBegun) left(s lxd.InstanceServer, instance string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.marks) == 0 {
		return nil
	}
	return reallxd.LeftOf(s, instance, c.operations, c.marks, patience)
}

func newLXD(t testing.TB, s lxd.InstanceServer, instance string, opts *transport.LXDOptions) *transport.LXD {
	t.Helper()
	host, err := transport.NewLXD(s, instance, opts)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, host.Close()) })
	return host
}

// offline is a connection that has not been used yet.
func offline(t testing.TB, socket string) lxd.InstanceServer {
	t.Helper()
	s, err := lxd.ConnectLXDUnix(socket, &lxd.ConnectionArgs{SkipGetServer: true})
	require.NoError(t, err)
	return s
}

func TestNewLXDRefuses(t *testing.T) {
	t.Parallel()
	unix := offline(t, "/nowhere/unix.socket")
	https, err := lxd.ConnectLXD("https://127.0.0.1:1", &lxd.ConnectionArgs{SkipGetServer: true})
	require.NoError(t, err)
	for _, c := range []struct {
		server   lxd.InstanceServer
		instance string
		opts     *transport.LXDOptions
		want     string
	}{
		{nil, "c1", nil, "server) is nil"},
		{unix, "", nil, "name is empty"},
		{unix, "c1/snap0", nil, "not in snapshots"},
		{unix, "c1", &transport.LXDOptions{MaxExecs: -1}, "MaxExecs is negative"},
		{unix, "c1", &transport.LXDOptions{ServerFingerprint: "00"}, "does not use our TLS"},
		{https, "c1", &transport.LXDOptions{ServerFingerprint: "00"}, "not 64 hexadecimal digits"},
		{https, "c1", &transport.LXDOptions{TLSServerCert: "x"}, "not PEM"},
		{https, "c1", &transport.LXDOptions{TLSClientCert: "x", TLSClientKey: "secret key"}, "TLSClientCert and TLSClientKey"},
	} {
		_, err := transport.NewLXD(c.server, c.instance, c.opts)
		if assert.ErrorContains(t, err, c.want) {
			assert.NotContains(t, err.Error(), "secret key")
		}
	}
}

func TestSocketThatDoesNotExist(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "unix.socket")
	host := newLXD(t, offline(t, socket), "c1", nil)
	err := host.Exec(soon(t), transport.Command{Args: []string{"true"}})
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.ErrorContains(t, err, "there is no such socket")
	for _, tried := range []string{socket, "/var/snap/lxd/common/lxd/unix.socket", "/var/lib/lxd/unix.socket", "$LXD_SOCKET", "$LXD_DIR"} {
		assert.ErrorContains(t, err, tried)
	}
	err = host.Upload(soon(t), "/f", strings.NewReader(""), nil)
	assert.ErrorContains(t, err, "there is no such socket")
	assert.NotErrorIs(t, err, os.ErrNotExist, "that is for a file in the instance")
}

func TestSocketThatNobodyListensOn(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	l.Close()
	err = newLXD(t, offline(t, socket), "c1", nil).Exec(soon(t), transport.Command{Args: []string{"true"}})
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.ErrorContains(t, err, "no daemon listens")
}

func TestClosed(t *testing.T) {
	t.Parallel()
	host := newLXD(t, offline(t, "/nowhere"), "c1", nil)
	require.NoError(t, host.Close())
	require.NoError(t, host.Close())
	_, err := host.Start(t.Context(), transport.Command{Args: []string{"true"}})
	for _, err := range []error{
		host.Exec(t.Context(), transport.Command{Args: []string{"true"}}),
		host.Upload(t.Context(), "/f", strings.NewReader(""), nil),
		host.Download(t.Context(), "/f", new(bytes.Buffer), nil),
		err,
	} {
		assert.ErrorIs(t, err, transport.ErrClosed)
		assert.ErrorIs(t, err, net.ErrClosed)
	}
}

func TestCloseEndsCommandsAndWaits(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		p, err := host.Start(soon(t), transport.Command{Args: []string{"sleep", "1000"}})
		require.NoError(t, err)
		require.NoError(t, host.Close())
		err = p.Wait()
		assert.ErrorIs(t, err, transport.ErrClosed)
		code, exited := transport.ExitCode(err)
		assert.True(t, exited)
		assert.Equal(t, 143, code)
		assert.ErrorIs(t, p.Signal(transport.SIGTERM), os.ErrProcessDone)
	})
}

func TestInstanceThatIsNotThere(t *testing.T) {
	t.Parallel()
	for _, s := range reallxd.Servers(t) {
		host := newLXD(t, s, "no-such-instance", nil)
		err := host.Exec(soon(t), transport.Command{Args: []string{"true"}})
		assert.ErrorIs(t, err, transport.ErrNoHost)
		assert.ErrorIs(t, err, transport.ErrNotStarted)
		assert.ErrorContains(t, err, `"no-such-instance"`)
		err = host.Download(soon(t), "/f", new(bytes.Buffer), nil)
		assert.ErrorIs(t, err, transport.ErrNoHost)
		assert.NotErrorIs(t, err, os.ErrNotExist)
	}
}

func TestInstanceThatIsNotRunning(t *testing.T) {
	t.Parallel()
	reallxd.Need(t)
	s := reallxd.Unix(t)
	name := reallxd.Create(t, s)
	t.Cleanup(func() { reallxd.Delete(t, s, name) })
	host := newLXD(t, s, name, nil)

	err := host.Exec(soon(t), transport.Command{Args: []string{"true"}})
	assert.ErrorIs(t, err, transport.ErrNotRunning)
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.ErrorContains(t, err, "stopped")

	// Files of a stopped container can be reached.
	require.NoError(t, host.Upload(soon(t), "/root/f", strings.NewReader("x"), nil))
	var got bytes.Buffer
	require.NoError(t, host.Download(soon(t), "/root/f", &got, nil))
	assert.Equal(t, "x", got.String())

	reallxd.Start(t, s, name)
	reallxd.Freeze(t, s, name)
	t.Cleanup(func() { reallxd.Stop(t, s, name) })
	err = host.Exec(soon(t), transport.Command{Args: []string{"true"}})
	assert.ErrorIs(t, err, transport.ErrNotRunning)
	assert.ErrorContains(t, err, "frozen")
}

func TestServerCertificate(t *testing.T) {
	t.Parallel()
	name := reallxd.Instance(t)
	cert := reallxd.File(t, "TRANSPORT_LXD_SERVER_CERT")
	block, _ := pem.Decode([]byte(cert))
	sum := sha256.Sum256(block.Bytes)
	run := func(s lxd.InstanceServer, o *transport.LXDOptions) error {
		return newLXD(t, s, name, o).Exec(soon(t), transport.Command{Args: []string{"true"}})
	}
	assert.NoError(t, run(reallxd.HTTPS(t), &transport.LXDOptions{TLSServerCert: cert}))
	assert.NoError(t, run(reallxd.HTTPS(t), &transport.LXDOptions{ServerFingerprint: strings.ToUpper(hex.EncodeToString(sum[:]))}))

	err := run(reallxd.HTTPS(t), &transport.LXDOptions{ServerFingerprint: strings.Repeat("0", 64)})
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.ErrorContains(t, err, "is pinned")

	// Not pinned, not known: refused, as the connection was made.
	s, err := lxd.ConnectLXD(os.Getenv("TRANSPORT_LXD_ADDR"), &lxd.ConnectionArgs{SkipGetServer: true})
	require.NoError(t, err)
	err = run(s, nil)
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.ErrorContains(t, err, "certificate")
}

func TestClientCertificateThatIsNotTrusted(t *testing.T) {
	t.Parallel()
	name := reallxd.Instance(t)
	s, err := lxd.ConnectLXD(os.Getenv("TRANSPORT_LXD_ADDR"), &lxd.ConnectionArgs{
		TLSServerCert: reallxd.File(t, "TRANSPORT_LXD_SERVER_CERT"),
		SkipGetServer: true,
	})
	require.NoError(t, err)
	host := newLXD(t, s, name, nil)
	err = host.Exec(soon(t), transport.Command{Args: []string{"true"}})
	assert.ErrorIs(t, err, transport.ErrUnauthorized)
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.ErrorContains(t, err, "lxc config trust add")
	err = host.Upload(soon(t), "/root/f", strings.NewReader(""), nil)
	assert.ErrorIs(t, err, transport.ErrUnauthorized)
	assert.NotErrorIs(t, err, os.ErrPermission)

	host = newLXD(t, s, name, &transport.LXDOptions{
		TLSClientCert: reallxd.File(t, "TRANSPORT_LXD_CERT"), TLSClientKey: reallxd.File(t, "TRANSPORT_LXD_KEY"),
	})
	assert.NoError(t, host.Exec(soon(t), transport.Command{Args: []string{"true"}}))
}

// UseProject gives a copy of a connection that has lost the socket's path.
func TestConnectionWithProject(t *testing.T) {
	t.Parallel()
	name := reallxd.Instance(t)
	for _, s := range reallxd.Servers(t) {
		assert.NoError(t, newLXD(t, s.UseProject("default"), name, nil).Exec(soon(t), transport.Command{Args: []string{"true"}}))
		err := newLXD(t, s.UseProject("nope"), name, nil).Exec(soon(t), transport.Command{Args: []string{"true"}})
		assert.ErrorIs(t, err, transport.ErrNoHost)
		assert.ErrorContains(t, err, `project "nope"`)
		assert.NoError(t, newLXD(t, s.UseProject("nope"), name, &transport.LXDOptions{Project: "default"}).Exec(soon(t), transport.Command{Args: []string{"true"}}))
	}
}

func TestMaxExecs(t *testing.T) {
	t.Parallel()
	name := reallxd.Instance(t)
	host := newLXD(t, reallxd.Unix(t), name, &transport.LXDOptions{MaxExecs: 1})
	ctx, cancel := context.WithCancelCause(soon(t))
	p, err := host.Start(ctx, transport.Command{Args: []string{"sleep", "1000"}})
	require.NoError(t, err)

	brief, cancelBrief := context.WithTimeout(soon(t), 200*time.Millisecond)
	defer cancelBrief()
	err = host.Exec(brief, transport.Command{Args: []string{"true"}})
	assert.ErrorIs(t, err, transport.ErrNotStarted)
	assert.ErrorIs(t, err, context.DeadlineExceeded)

	waiting := make(chan error, 1)
	go func() { waiting <- host.Exec(soon(t), transport.Command{Args: []string{"true"}}) }()
	mine := errors.New("enough")
	cancel(mine)
	err = p.Wait()
	assert.ErrorIs(t, err, mine)
	assert.NoError(t, <-waiting)
}

func TestSecretsStaySecret(t *testing.T) {
	t.Parallel()
	name := reallxd.Instance(t)
	const secret = "hunter2hunter2"
	for _, s := range reallxd.Servers(t) {
		var log bytes.Buffer
		host := newLXD(t, s, name, &transport.LXDOptions{Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
		var text string
		for _, cmd := range []transport.Command{
			{Args: []string{"sh", "-c", "exit 1", secret}, Env: map[string]string{"S": secret}, Stdin: strings.NewReader(secret)},
			{Args: []string{"/nonexistent/" + secret}},
			{Args: []string{"sleep", "1000", secret}, CancelSignal: transport.SIGKILL},
			{Args: []string{"true", strings.Repeat(secret, 20000)}},
			{Args: []string{"true"}, Env: map[string]string{"S": strings.Repeat(secret, 20000)}},
		} {
			ctx := soon(t)
			if cmd.CancelSignal != "" {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, time.Second)
				defer cancel()
			}
			err := host.Exec(ctx, cmd)
			require.Error(t, err)
			text += err.Error() + "\n"
		}
		require.NoError(t, host.Close())
		assert.NotContains(t, text, secret)
		assert.NotEmpty(t, log.String())
		assert.NotContains(t, log.String(), secret)
		assert.NotRegexp(t, "[0-9a-f]{64}", log.String()+text, "a socket's secret")
	}
}
