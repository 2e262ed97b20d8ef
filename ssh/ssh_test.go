//go:build unix

package ssh_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	xssh "golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/sshd"
	"github.com/lxdtransport/transport/ssh"
)

// What the suite in transporttest cannot know of this transport.

func refused(t *testing.T, s *sshd.Server, opts *ssh.Options) error {
	t.Helper()
	host, err := ssh.Dial(t.Context(), s.Address, opts)
	if err == nil {
		host.Close()
	}
	require.Error(t, err)
	return err
}

func TestHostKeys(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	sshd.Keygen(t, "-t", "ed25519", "-N", "", "-f", s.File("other"))
	other, err := os.ReadFile(s.File("other.pub"))
	require.NoError(t, err)
	known, err := os.ReadFile(s.File("known"))
	require.NoError(t, err)
	name, _, _ := strings.Cut(string(known), " ")
	s.Write(t, "mismatch", name+" "+string(other))
	s.Write(t, "empty", "")
	s.Write(t, "revoked", "@revoked "+string(known))
	of := func(file string) *ssh.Options {
		opts := options(s)
		opts.KnownHosts = []string{s.File(file)}
		return opts
	}

	err = refused(t, s, of("mismatch"))
	e, ok := errors.AsType[*knownhosts.KeyError](err)
	require.True(t, ok, "%v", err)
	assert.Len(t, e.Want, 1)

	err = refused(t, s, of("empty"))
	e, ok = errors.AsType[*knownhosts.KeyError](err)
	require.True(t, ok, "%v", err)
	assert.Empty(t, e.Want)
	assert.ErrorContains(t, err, "SHA256:")
	assert.ErrorContains(t, err, "is not known")

	_, ok = errors.AsType[*knownhosts.RevokedError](refused(t, s, of("revoked")))
	assert.True(t, ok)
	assert.ErrorIs(t, refused(t, s, of("missing")), fs.ErrNotExist)

	key := func(text []byte) xssh.PublicKey {
		k, _, _, _, err := xssh.ParseAuthorizedKey(text)
		require.NoError(t, err)
		return k
	}
	mine, err := os.ReadFile(s.File("host.pub"))
	require.NoError(t, err)
	opts := options(s)
	opts.KnownHosts, opts.HostKeys = nil, []xssh.PublicKey{key(other)}
	err = refused(t, s, opts)
	_, ok = errors.AsType[*knownhosts.KeyError](err)
	assert.True(t, ok, "%v", err)
	opts.HostKeys = append(opts.HostKeys, key(mine))
	dial(t, s, opts)

	opts = options(s)
	opts.KnownHosts, opts.InsecureIgnoreHostKey = nil, true
	dial(t, s, opts)
	opts.KnownHosts = []string{s.File("known")}
	assert.ErrorContains(t, refused(t, s, opts), "contradicts")
}

// A host that has an ed25519 key, too, is asked for the ECDSA key that is known.
func TestHostKeyOfAnotherKind(t *testing.T) {
	t.Parallel()
	sshd.Find(t)
	file := t.TempDir() + "/ecdsa"
	sshd.Keygen(t, "-t", "ecdsa", "-N", "", "-f", file)
	two := sshd.Start(t, "HostKey "+file)
	public, err := os.ReadFile(file + ".pub")
	require.NoError(t, err)
	_, at, _ := strings.Cut(two.Address, "@")
	two.Write(t, "known", knownhosts.Normalize(at)+" "+string(public))
	dial(t, two, options(two))
}

func TestKeys(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	sshd.Keygen(t, "-t", "ed25519", "-N", "", "-f", s.File("wrong"))
	opts := options(s)
	opts.KeyFiles = []string{s.File("wrong")}
	assert.ErrorIs(t, refused(t, s, opts), transport.ErrUnauthorized)
	opts.KeyFiles = []string{s.File("wrong"), s.File("client")}
	dial(t, s, opts)
	opts.KeyFiles = []string{s.File("missing")}
	assert.ErrorIs(t, refused(t, s, opts), fs.ErrNotExist)
	opts.KeyFiles = []string{s.File("known")}
	assert.ErrorContains(t, refused(t, s, opts), "key file "+s.File("known"))

	text, err := os.ReadFile(s.File("client"))
	require.NoError(t, err)
	key, err := xssh.ParseRawPrivateKey(text)
	require.NoError(t, err)
	signer, err := xssh.NewSignerFromKey(key)
	require.NoError(t, err)
	opts.KeyFiles, opts.Signers = nil, []xssh.Signer{signer}
	dial(t, s, opts)
}

func TestEncryptedKey(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	sshd.Keygen(t, "-p", "-P", "", "-N", "open sesame", "-f", s.File("client"))
	opts := options(s)
	assert.ErrorContains(t, refused(t, s, opts), "Options.Passphrase")
	opts.Passphrase = func(string) ([]byte, error) { return []byte("hunter2hunter2"), nil }
	assert.NotContains(t, refused(t, s, opts).Error(), "hunter2")
	mine := errors.New("nobody there")
	opts.Passphrase = func(string) ([]byte, error) { return nil, mine }
	assert.ErrorIs(t, refused(t, s, opts), mine)
	opts.Passphrase = func(file string) ([]byte, error) {
		assert.Equal(t, s.File("client"), file)
		return []byte("open sesame"), nil
	}
	dial(t, s, opts)
}

func TestAgent(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	text, err := os.ReadFile(s.File("client"))
	require.NoError(t, err)
	key, err := xssh.ParseRawPrivateKey(text)
	require.NoError(t, err)
	ring := agent.NewKeyring()
	dir, err := os.MkdirTemp("", "agent") // a socket's path must be short
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", dir+"/s")
	require.NoError(t, err)
	var serving sync.WaitGroup
	defer serving.Wait()
	defer l.Close()
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				_ = agent.ServeAgent(ring, conn)
			})
		}
	})
	opts := options(s)
	opts.KeyFiles, opts.Agent = nil, dir+"/s"
	assert.ErrorIs(t, refused(t, s, opts), transport.ErrUnauthorized)
	require.NoError(t, ring.Add(agent.AddedKey{PrivateKey: key}))
	host, err := ssh.Dial(t.Context(), s.Address, opts)
	require.NoError(t, err)
	defer host.Close()
	require.NoError(t, host.Exec(t.Context(), transport.Command{Args: []string{"true"}}))
	opts.Agent = dir + "/none"
	assert.ErrorContains(t, refused(t, s, opts), "ssh-agent")
}

func TestDialRefuses(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	for _, change := range []func(*ssh.Options){
		func(o *ssh.Options) { o.Liveness = time.Millisecond },
		func(o *ssh.Options) { o.Timeout = -1 },
		func(o *ssh.Options) { o.MaxExecs = -1 },
	} {
		opts := options(s)
		change(opts)
		assert.ErrorContains(t, refused(t, s, opts), "Options.")
	}
	_, err := ssh.Dial(t.Context(), "root@", options(s))
	assert.ErrorContains(t, err, "no host")
	opts := options(s)
	opts.DialContext = func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.DNSError{Err: "no such host", Name: "nowhere", IsNotFound: true}
	}
	assert.ErrorIs(t, refused(t, s, opts), transport.ErrNoHost)
}

// A host that takes the connection and says nothing.
func TestTimeout(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	opts := options(s)
	opts.Timeout = 200 * time.Millisecond
	_, err = ssh.Dial(t.Context(), "root@"+l.Addr().String(), opts)
	assert.ErrorContains(t, err, "no connection within 200ms")
	mine := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(mine)
	_, err = ssh.Dial(ctx, s.Address, options(s))
	assert.ErrorIs(t, err, mine)
}

// proxy passes connections on until it is told to keep everything to itself, or to break them.
type proxy struct {
	mu      sync.Mutex
	conns   []net.Conn
	stalled chan struct{}
	stall   func()
}

func newProxy(t *testing.T, opts *ssh.Options) *proxy {
	t.Helper()
	p := &proxy{stalled: make(chan struct{})}
	p.stall = sync.OnceFunc(func() { close(p.stalled) })
	var copying sync.WaitGroup
	opts.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		theirs, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		mine, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return nil, err
		}
		middle, err := l.Accept()
		if err != nil {
			return nil, err
		}
		p.mu.Lock()
		p.conns = append(p.conns, theirs, middle)
		p.mu.Unlock()
		pass := func(to, from net.Conn) {
			defer to.Close()
			buf := make([]byte, 32<<10)
			for {
				n, err := from.Read(buf)
				select {
				case <-p.stalled:
					if err != nil {
						return
					}
					continue // thrown away
				default:
				}
				if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
					return
				}
			}
		}
		copying.Go(func() { pass(theirs, middle) })
		copying.Go(func() { pass(middle, theirs) })
		return mine, nil
	}
	t.Cleanup(func() {
		p.cut()
		copying.Wait()
	})
	return p
}

// cut breaks all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

// running starts a command and returns when it runs.
func running(t *testing.T, host *ssh.Transport, cmd transport.Command) transport.Process {
	t.Helper()
	r, w := io.Pipe()
	cmd.Stdout = w
	if cmd.Stdin == nil { // does not end before the test: a command that reads it ends with its connection
		stdin, stop := io.Pipe()
		cmd.Stdin = stdin
		t.Cleanup(func() { stop.Close() })
	}
	p, err := host.Start(t.Context(), cmd)
	require.NoError(t, err)
	_, err = io.ReadFull(r, make([]byte, 3))
	require.NoError(t, err)
	go io.Copy(io.Discard, r) // ends with the pipe
	t.Cleanup(func() { w.Close() })
	return p
}

func TestHostThatVanishes(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	opts := options(s)
	opts.Liveness = time.Second
	p := newProxy(t, opts)
	host := dial(t, s, opts)
	proc := running(t, host, transport.Command{Args: transport.Shell("echo up; exec cat"), Stdin: zeros{}})
	p.stall()
	start := time.Now()
	err := proc.Wait()
	assert.Less(t, time.Since(start), 20*time.Second)
	assert.ErrorIs(t, err, transport.ErrOutputLost)
	assert.ErrorContains(t, err, "has not answered for 1s")
	assert.ErrorContains(t, err, "may still run")
	assert.NotErrorIs(t, err, transport.ErrNotStarted)
	_, exited := transport.ExitCode(err)
	assert.False(t, exited)
}

// zeros never end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// ctx ends while the link is silent, long before that is noticed.
func TestContextEndsWhileTheHostIsSilent(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	opts := options(s)
	p := newProxy(t, opts)
	host := dial(t, s, opts)
	mine := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	r, w := io.Pipe()
	stdin, stop := io.Pipe()
	defer stop.Close()
	proc, err := host.Start(ctx, transport.Command{Args: transport.Shell("echo up; exec cat"), Stdin: stdin, Stdout: w, WaitDelay: 100 * time.Millisecond})
	require.NoError(t, err)
	_, err = io.ReadFull(r, make([]byte, 3))
	require.NoError(t, err)
	p.stall()
	start := time.Now()
	cancel(mine)
	err = proc.Wait()
	assert.Less(t, time.Since(start), 20*time.Second)
	assert.ErrorIs(t, err, mine)
	assert.ErrorIs(t, err, transport.ErrOutputLost)
	assert.ErrorContains(t, err, "may still run")
	assert.ErrorContains(t, err, "not confirmed")

	ctx, cancelLate := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancelLate()
	assert.ErrorIs(t, host.Exec(ctx, transport.Command{Args: []string{"true"}}), transport.ErrNotStarted)
	assert.ErrorIs(t, host.Download(ctx, "/etc/passwd", io.Discard, nil), context.DeadlineExceeded)
	p.cut()
}

func TestConnectionThatBreaks(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	opts := options(s)
	p := newProxy(t, opts)
	host := dial(t, s, opts)
	proc := running(t, host, transport.Command{Args: transport.Shell("echo up; exec cat")})
	p.cut()
	err := proc.Wait()
	assert.ErrorIs(t, err, transport.ErrOutputLost)
	assert.ErrorContains(t, err, "the connection was lost")
	assert.ErrorContains(t, err, "may still run")
	assert.NotErrorIs(t, err, transport.ErrNotStarted)

	// The next call makes a new one.
	out, err := transport.Output(t.Context(), host, transport.Command{Args: []string{"echo", "back"}})
	require.NoError(t, err)
	assert.Equal(t, "back\n", string(out))
	name := t.TempDir() + "/f"
	require.NoError(t, host.Upload(t.Context(), name, strings.NewReader("x"), nil))

	// A transfer fails, and leaves nothing behind.
	src := io.MultiReader(strings.NewReader(strings.Repeat("y", 3<<20)), readerFunc(func([]byte) (int, error) {
		p.cut()
		return 0, io.EOF
	}))
	err = host.Upload(t.Context(), name, src, nil)
	_, ok := errors.AsType[*fs.PathError](err)
	assert.True(t, ok, "%v", err)
	entries, readErr := os.ReadDir(strings.TrimSuffix(name, "/f"))
	require.NoError(t, readErr)
	assert.Len(t, entries, 1, "%v", err)
	var got bytes.Buffer
	require.NoError(t, host.Download(t.Context(), name, &got, nil))
	assert.Equal(t, "x", got.String())

	down := writerFunc(func(p2 []byte) (int, error) { p.cut(); return len(p2), nil })
	require.NoError(t, host.Upload(t.Context(), name, strings.NewReader(strings.Repeat("z", 8<<20)), nil))
	assert.ErrorContains(t, host.Download(t.Context(), name, down, nil), "the connection was lost")
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// The output ends with the connection, after the status has come: what is missing is missing.
func TestConnectionThatBreaksAfterTheStatus(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	opts := options(s)
	p := newProxy(t, opts)
	host := dial(t, s, opts)
	// Its child holds the output, so that the status comes alone.
	proc := running(t, host, transport.Command{Args: transport.Shell("sleep 2 & echo up; exit 3"), WaitDelay: time.Minute})
	require.Eventually(t, func() bool { return errors.Is(proc.Signal(transport.SIGCONT), os.ErrProcessDone) }, 20*time.Second, time.Millisecond)
	p.cut()
	err := proc.Wait()
	code, _ := transport.ExitCode(err)
	assert.Equal(t, 3, code)
	assert.ErrorIs(t, err, transport.ErrOutputLost)
	assert.ErrorContains(t, err, "the connection was lost")
}

// A server that allows few sessions gets more connections, and none of the commands fails.
func TestFewSessions(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t, "MaxSessions 2")
	opts := options(s)
	opts.MaxExecs = 6
	host := dial(t, s, opts)
	results := make(chan error)
	for i := range 12 {
		go func() {
			out, err := transport.Output(t.Context(), host, transport.Command{Args: []string{"echo", fmt.Sprint(i)}})
			if err == nil && string(out) != fmt.Sprintln(i) {
				err = fmt.Errorf("%q", out)
			}
			results <- err
		}()
	}
	for range 12 {
		assert.NoError(t, <-results)
	}
	ctx, cancel := context.WithCancel(t.Context())
	p, err := host.Start(ctx, transport.Command{Args: []string{"sleep", "60"}})
	require.NoError(t, err)
	cancel()
	code, _ := transport.ExitCode(p.Wait())
	assert.Equal(t, 143, code)
}

// A host that runs something else for every command has not started it, and what it prints may hold secrets.
func TestForcedCommand(t *testing.T) {
	t.Parallel()
	const secret = "hunter2hunter2"
	for name, forced := range map[string]string{"no shell": "exit 1", "an echo": "cat", "chatter": "echo hello"} {
		s := sshd.Start(t, "ForceCommand "+forced)
		host := dial(t, s, options(s))
		err := host.Exec(t.Context(), transport.Command{Args: []string{"true", secret}, Env: map[string]string{"A": secret}})
		assert.ErrorIs(t, err, transport.ErrNotStarted, name)
		assert.NotContains(t, err.Error(), secret, name)
	}
}

// What start-up files print is not output.
func TestChatter(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t, `ForceCommand echo "Welcome!"; echo "No mail." >&2; eval "$SSH_ORIGINAL_COMMAND"`)
	host := dial(t, s, options(s))
	var out, errOut bytes.Buffer
	cmd := transport.Command{Args: transport.Shell("echo out; echo err >&2; exit 3"), Stdout: &out, Stderr: &errOut}
	code, exited := transport.ExitCode(host.Exec(t.Context(), cmd))
	assert.True(t, exited)
	assert.Equal(t, 3, code)
	assert.Equal(t, "out\n", out.String())
	assert.Equal(t, "err\n", errOut.String())
}

// More than a terminal holds, and more than an argument may have, gets through.
func TestLongCommands(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	host := dial(t, s, options(s))
	var args []string
	for range 5 {
		args = append(args, strings.Repeat("x", 50_000))
	}
	for _, tty := range []*transport.TTY{nil, new(transport.TTY)} {
		cmd := transport.Command{Args: transport.Shell("printf %s $#", args...), TTY: tty}
		out, err := transport.Output(t.Context(), host, cmd)
		require.NoError(t, err)
		assert.Equal(t, "5", string(out))
	}
}

func TestPanicGoesOn(t *testing.T) {
	t.Parallel()
	s := sshd.Start(t)
	host := dial(t, s, options(s))
	bad := writerFunc(func([]byte) (int, error) { panic("mine") })
	assert.Panics(t, func() {
		_ = host.Exec(t.Context(), transport.Command{Args: transport.Shell("echo x; exec sleep 60"), Stdout: bad})
	})
	assert.Panics(t, func() { _ = host.Download(t.Context(), "/etc/passwd", bad, nil) })
	assert.Panics(t, func() {
		src := readerFunc(func([]byte) (int, error) { panic("mine") })
		_ = host.Upload(t.Context(), t.TempDir()+"/f", src, nil)
	})
	require.NoError(t, host.Exec(t.Context(), transport.Command{Args: []string{"true"}}))
}

// What the kernel makes up has no size.
func TestDownloadFromProc(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/status"); err != nil {
		t.Skip("needs /proc")
	}
	s := sshd.Start(t)
	host := dial(t, s, options(s))
	want, err := os.ReadFile("/proc/filesystems")
	require.NoError(t, err)
	var got bytes.Buffer
	require.NoError(t, host.Download(t.Context(), "/proc/filesystems", &got, nil))
	assert.Equal(t, string(want), got.String())
	assert.ErrorIs(t, host.Download(t.Context(), "/proc/filesystems", &got, &transport.DownloadOptions{Limit: 3}), transport.ErrLimit)
}
