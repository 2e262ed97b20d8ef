// Package ssh is a [transport.Transport] over SSH, for build hosts that are no LXD instances: it needs an SSH server with SFTP and a
// POSIX shell as /bin/sh there, and nothing else.
//
//	host, err := ssh.Dial(ctx, "build@10.0.0.7", nil)
//	…
//	defer host.Close()
//	err = host.Exec(ctx, transport.Command{Args: []string{"make", "test"}, Dir: "/src", Stdout: os.Stdout})
//
// SSH hands one string to the user's login shell. Here that string is always the same: a line that reads the command, its arguments, its environment
// and its directory from standard input, in printable ASCII, and becomes the command. So nothing has to be quoted, no shell
// but /bin/sh reads any of it, AcceptEnv does not matter, and no secret is in the host's process list but what the command itself has in its
// arguments. What the user's shell prints before, from its start-up files, is not output of the command.
//
// What SSH cannot do, or this package over it:
//
//	streams     Both output streams of a command share one window: a Stdout that takes nothing holds up Stderr, too,
//	            when 2 MiB have not been taken.
//	status      A signal that SSH has no name for (all but ABRT ALRM FPE HUP ILL INT KILL PIPE QUIT SEGV TERM USR1 USR2) and that
//	            ended the command is status 128.
//	126         Arguments and environment that are together too long for the kernel are status 126, which the host's shell
//	            says, not ErrNotStarted.
//	user        Command.User needs root, and setpriv (util-linux) on the host; not on busybox.
//	signals     They are sent by a second command, kill, which takes as long as any command.
//	strays      What a command has left behind is found by a variable in its environment, and by descent, as far as the host has /proc;
//	            elsewhere only while it is in the command's process group. A connection that is lost ends no command.
//	sessions    sshd refuses more than MaxSessions (10) at once on a connection. More commands get another connection.
//	files       Times are whole seconds, up to the year 2106. posix-rename@openssh.com is needed to replace a file: all OpenSSH servers have it.
//	names       The environment of the host is that of the login shell's start-up files, as for ssh HOST COMMAND.
//	config      ~/.ssh/config is not read. Passwords are not sent.
package ssh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/user"
	"strings"
	"sync"
	"time"

	xssh "golang.org/x/crypto/ssh"

	"github.com/lxdtransport/transport"
)

// Options are the options of [Dial]; nil means all defaults.
type Options struct {
	// User is whom to log in as. "": the user in the address, or else the one that this process runs as.
	User string

	// KeyFiles are private keys, in files as ssh-keygen writes them. Agent is the socket of an ssh-agent. Signers are keys
	// that are at hand otherwise. If none of the three is given: what ssh takes by default, the agent of SSH_AUTH_SOCK and ~/.ssh/id_ed25519,
	// id_ecdsa and id_rsa, as far as they exist and can be read without a passphrase.
	KeyFiles []string
	Agent    string
	Signers  []xssh.Signer

	// Passphrase is asked for the passphrase of a key file that is encrypted. nil: such a file is an error.
	Passphrase func(file string) ([]byte, error)

	// KnownHosts are files with the keys of hosts, as ssh keeps them. nil: ~/.ssh/known_hosts and
	// /etc/ssh/ssh_known_hosts, as far as they exist. A host that is in none of them is an error, as is one with another key.
	KnownHosts []string

	// HostKeys are the keys of which the host has to have one, instead of KnownHosts. nil: those of KnownHosts.
	HostKeys []xssh.PublicKey

	// InsecureIgnoreHostKey talks to whoever answers. Everything that is sent, secrets and files, may be read and changed by who sits between.
	InsecureIgnoreHostKey bool

	// DialContext makes the connection: DialContext of an [xssh.Client] goes through that host. nil: TCP.
	DialContext func(ctx context.Context, network, address string) (net.Conn, error)

	// Timeout bounds a connection and its login. 0: 30 s.
	Timeout time.Duration

	// Liveness is how long the host may be silent before it is taken for dead: it is asked again and again, whatever commands do. The
	// error of a command then says that it may still run. At least 1 s; 0: a minute.
	Liveness time.Duration

	// MaxExecs is the most commands that run at the same time on this transport; others wait for their turn. 0: no limit.
	MaxExecs int
}

const (
	defaultTimeout  = 30 * time.Second
	defaultLiveness = time.Minute
	minLiveness     = time.Second
)

// Transport runs commands on a host over SSH. It is a [transport.Starter]. On top of what [transport.Transport] promises:
//
//   - Signals go to the command's process alone.
//   - When ctx ends, what the command has started is killed by a second command, which needs /proc on the host. It is recognised by a variable
//     TRANSPORT_COMMAND_… in its environment, and by descent from a process that has it.
//   - A connection that was lost fails what ran over it. The next call makes a new one.
//   - The default user is whom it logs in as; the default directory is that user's home.
type Transport struct {
	target  target
	opts    Options
	keys    []xssh.Signer // of KeyFiles and Signers
	execs   chan struct{} // a place for every running command; nil: no limit
	dialing chan struct{} // has room for one: who makes a connection

	closing context.Context // ends with Close, cause ErrClosed
	close   context.CancelCauseFunc

	mu      sync.Mutex // guards the rest
	closed  bool
	running sync.WaitGroup // methods that have not returned; Add is called with mu held and closed false
	conns   []*connection  // that take new sessions
	ended   sync.WaitGroup // goroutines of connections
	idle    []*files       // SFTP sessions that nobody uses
}

var (
	_ transport.Transport = (*Transport)(nil)
	_ transport.Starter   = (*Transport)(nil)
)

// target is whom and where.
type target struct{ user, address string }

func (t target) String() string { return t.user + "@" + t.address }

// Dial connects to a host and logs in. address is [user@]host[:port]; the port is 22 unless it is given. ctx governs the dialing, not the
// transport.
//
// The error matches [transport.ErrNoHost] when the name does not exist, [transport.ErrUnauthorized] when the host takes none of the keys,
// and is a [*knownhosts.KeyError] when the host's key is not the known one, or not known.
func Dial(ctx context.Context, address string, opts *Options) (*Transport, error) {
	t, err := prepare(address, opts)
	if err != nil {
		return nil, fmt.Errorf("ssh: %w", err)
	}
	c, _, err := t.reserve(ctx, false)
	if err != nil {
		_ = t.Close()
		return nil, fmt.Errorf("ssh: %s: %w", t.target, err)
	}
	t.release(c, false)
	return t, nil
}

// prepare checks everything that can be checked without the host.
func prepare(address string, opts *Options) (*Transport, error) {
	t := &Transport{dialing: make(chan struct{}, 1)}
	if opts != nil {
		t.opts = *opts
	}
	o := &t.opts
	switch {
	case o.Timeout < 0:
		return nil, fmt.Errorf("Options.Timeout is negative: %v", o.Timeout)
	case o.Liveness != 0 && o.Liveness < minLiveness:
		return nil, fmt.Errorf("Options.Liveness is %v, less than %v", o.Liveness, minLiveness)
	case o.MaxExecs < 0:
		return nil, fmt.Errorf("Options.MaxExecs is negative: %d", o.MaxExecs)
	case o.InsecureIgnoreHostKey && (o.HostKeys != nil || o.KnownHosts != nil):
		return nil, errors.New("Options.InsecureIgnoreHostKey contradicts HostKeys and KnownHosts")
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.Liveness == 0 {
		o.Liveness = defaultLiveness
	}
	if o.MaxExecs > 0 {
		t.execs = make(chan struct{}, o.MaxExecs)
	}
	if o.DialContext == nil {
		o.DialContext = new(net.Dialer).DialContext
	}
	var err error
	if t.target, err = parseTarget(address, o.User); err != nil {
		return nil, err
	}
	if t.keys, err = o.readKeys(); err != nil {
		return nil, err
	}
	t.closing, t.close = context.WithCancelCause(context.Background())
	return t, nil
}

func parseTarget(address, name string) (target, error) {
	host := address
	if i := strings.LastIndexByte(address, '@'); i >= 0 {
		host = address[i+1:]
		if name == "" {
			name = address[:i]
		}
	}
	if host == "" {
		return target{}, fmt.Errorf("the address %q has no host: [user@]host[:port] is wanted", address)
	}
	if _, _, err := net.SplitHostPort(host); err != nil {
		host = net.JoinHostPort(strings.Trim(host, "[]"), "22")
	}
	if name == "" {
		me, err := user.Current()
		if err != nil {
			return target{}, fmt.Errorf("whom to log in as (Options.User): %w", err)
		}
		name = me.Username
	}
	return target{name, host}, nil
}

// Close ends running commands as if their contexts had ended, stops transfers, waits for all of them, and closes the
// connections. It may be called more than once; every call returns after all is done.
func (t *Transport) Close() error {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.close(transport.ErrClosed)
	t.running.Wait()
	t.mu.Lock()
	conns := t.conns
	t.conns = nil
	t.idle = nil // ends with its connection
	t.mu.Unlock()
	for _, c := range conns {
		c.link.drop(transport.ErrClosed)
	}
	t.ended.Wait()
	return nil
}

// begin counts a method as running and binds its context to the transport's end. end must be called when it has returned.
func (t *Transport) begin(ctx context.Context) (_ context.Context, end func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, nil, transport.ErrClosed
	}
	t.running.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(t.closing, func() { cancel(transport.ErrClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
		t.running.Done()
	}, nil
}

// causes is an error with a text of its own for which errors.Is and errors.As find several.
type causes struct {
	text string
	errs []error
}

func (c *causes) Error() string   { return c.text }
func (c *causes) Unwrap() []error { return c.errs }

func also(err, sentinel error) error { return &causes{text: err.Error(), errs: []error{sentinel, err}} }

// within runs f, which may block as long as its connection lives, and waits for it until ctx ends. What f returns after that is given to late.
func within[T any](ctx context.Context, f func() (T, error), late func(T)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result)
	go func() { // ends with f, which ends with its connection at the latest
		v, err := f()
		select {
		case done <- result{v, err}:
		case <-ctx.Done():
			if err == nil && late != nil {
				late(v)
			}
		}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}
