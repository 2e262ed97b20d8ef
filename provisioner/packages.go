package provisioner

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/lxdtransport/transport"
)

// Options are the options of [New]; nil means all defaults.
type Options struct {
	// Attempts is how often a step is tried that depends on mirrors. 0: 5. Between them is a pause of 2 s, then 4 s and so on, half a minute
	// at most.
	Attempts int

	// Output gets what the package managers say, one Write at a time. nil: it is thrown away, but for the end, which is in errors.
	Output io.Writer

	// HTTPClient fetches keys and .repo files. nil: http.DefaultClient.
	HTTPClient *http.Client

	// KeyServer is where keys of a KeyID come from. "": https://keyserver.ubuntu.com.
	KeyServer string

	// InsecureKeyURLs allows a KeyURL to be http.
	InsecureKeyURLs bool

	// InsecureShortKeyIDs allows a KeyID of 8 digits, to which anybody can make a key that fits.
	InsecureShortKeyIDs bool

	// Logger gets the steps at level Debug. nil: silent.
	Logger *slog.Logger
}

// Packages is a [Provisioner] that uses the package manager of the host: apt on Debian, Ubuntu and their likes; dnf, microdnf or yum on
// Fedora, RHEL and their likes; apk on Alpine.
//
// Commands run as the host's default user. If that is not root, sudo is used, which must not ask for a password.
type Packages struct {
	opts Options
	mu   sync.Mutex // held during a Write to Output
}

var _ Provisioner = (*Packages)(nil)

const (
	defaultAttempts  = 5
	firstPause       = 2 * time.Second
	mostPause        = 30 * time.Second
	defaultKeyServer = "https://keyserver.ubuntu.com"
)

// New returns a provisioner.
func New(opts *Options) *Packages {
	if opts == nil {
		opts = new(Options)
	}
	p := &Packages{opts: *opts}
	p.opts.Attempts = cmp.Or(max(p.opts.Attempts, 0), defaultAttempts)
	p.opts.HTTPClient = cmp.Or(p.opts.HTTPClient, http.DefaultClient)
	p.opts.KeyServer = strings.TrimSuffix(cmp.Or(p.opts.KeyServer, defaultKeyServer), "/")
	if p.opts.Logger == nil {
		p.opts.Logger = slog.New(slog.DiscardHandler)
	}
	return p
}

// Prepare adds the repositories and installs the packages. With neither it does nothing. See [Provisioner].
func (p *Packages) Prepare(ctx context.Context, t transport.Transport, h Host, env Environment) error {
	if len(env.Repositories) == 0 && len(env.Packages) == 0 {
		return nil
	}
	s := &session{p: p, ctx: ctx, t: t, env: env, log: p.opts.Logger.With("host", h.Name)}
	if err := s.prepare(cmp.Or(env.OS, h.OS)); err != nil {
		return fmt.Errorf("provisioner: %s: %w", cmp.Or(h.Name, "the host"), err)
	}
	return nil
}

// session is one host that is being prepared.
type session struct {
	p    *Packages
	ctx  context.Context
	t    transport.Transport
	env  Environment
	log  *slog.Logger
	os   osRelease
	sudo bool
}

// manager is what sets a package manager apart.
type manager interface {
	check(name string) error // of a package
	addRepository(r Repository) error
	install(packages []string) error
}

func (s *session) prepare(os string) error {
	if err := s.find(os); err != nil {
		return err
	}
	m, err := s.manager()
	if err != nil {
		return err
	}
	for _, name := range s.env.Packages {
		word, group := strings.CutPrefix(name, "@")
		if group {
			word = strings.ReplaceAll(word, " ", "") // "Development Tools"
		}
		err := checkWord(word)
		if err == nil && strings.HasPrefix(name, "-") {
			err = errors.New("it begins with a hyphen")
		}
		if err == nil {
			err = m.check(name)
		}
		if err != nil {
			return fmt.Errorf("the package %q: %w", name, err)
		}
	}
	for _, r := range s.env.Repositories {
		s.log.Debug("adding a repository", "url", redacted(r.URL))
		if err := m.addRepository(r); err != nil {
			return fmt.Errorf("adding the repository %s: %w", redacted(r.URL), err)
		}
	}
	return m.install(s.env.Packages)
}

// find asks the host what and whose it is.
func (s *session) find(os string) error {
	id, err := transport.Output(s.ctx, s.t, transport.Command{Args: []string{"id", "-u"}})
	if err != nil {
		return fmt.Errorf("asking who we are: %w", err)
	}
	s.sudo = strings.TrimSpace(string(id)) != "0"
	text, err := transport.Output(s.ctx, s.t, transport.Command{Args: transport.Shell(`cat /etc/os-release 2>/dev/null || cat /usr/lib/os-release`)})
	if _, exited := transport.ExitCode(err); !exited {
		return fmt.Errorf("asking what the host is: %w", err)
	}
	s.os = parseRelease(string(text))
	if err != nil || s.os.id == "" {
		s.os.id, s.os.version, _ = strings.Cut(os, "_")
	}
	return nil
}

func (s *session) manager() (manager, error) {
	for _, id := range append([]string{s.os.id}, s.os.like...) {
		switch id {
		case "debian", "ubuntu":
			return &apt{session: s}, nil
		case "alpine":
			return &apk{session: s}, nil
		case "fedora", "rhel", "centos", "rocky", "almalinux", "ol", "amzn":
			return s.newDNF()
		}
	}
	return nil, fmt.Errorf("nothing is known about the operating system %q: apt, dnf, yum and apk are", s.os.id)
}

// osRelease is what matters of /etc/os-release.
type osRelease struct {
	id, version, codename string
	like                  []string
}

func parseRelease(text string) (r osRelease) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, `"'`)
		switch name {
		case "ID":
			r.id = value
		case "VERSION_ID":
			r.version = value
		case "VERSION_CODENAME":
			r.codename = value
		case "ID_LIKE":
			r.like = strings.Fields(value)
		}
	}
	return r
}

// root returns the arguments of a command that runs as root, with an environment.
func (s *session) root(env map[string]string, args ...string) transport.Command {
	if !s.sudo {
		return transport.Command{Args: args, Env: env}
	}
	full := []string{"sudo", "-n", "env"}
	for _, name := range []string{"DEBIAN_FRONTEND", "LC_ALL"} { // the only ones
		if value, ok := env[name]; ok {
			full = append(full, name+"="+value)
		}
	}
	return transport.Command{Args: append(full, args...)}
}

// run runs a command. The error has the end of what it said.
func (s *session) run(cmd transport.Command) (said string, err error) {
	out := &tail{also: s.p.opts.Output, mu: &s.p.mu}
	cmd.Stdout, cmd.Stderr = out, out
	err = s.t.Exec(s.ctx, cmd)
	said = out.String()
	if err != nil && said != "" {
		err = fmt.Errorf("%w; the end of what it said:\n%s", err, strings.TrimRight(said, "\n"))
	}
	return said, err
}

// retry runs a step until it works, has failed as often as it may, or has failed for good, as hopeless knows from what it said.
func (s *session) retry(step string, hopeless []string, again func() error, cmd transport.Command) error {
	pause := firstPause
	for attempt := 1; ; attempt++ {
		s.log.Debug(step, "attempt", attempt)
		said, err := s.run(cmd)
		if err == nil {
			return nil
		}
		err = fmt.Errorf("%s: %w", step, err)
		code, exited := transport.ExitCode(err)
		switch {
		case s.ctx.Err() != nil:
			return err
		case !exited && !errors.Is(err, transport.ErrNotStarted), code == 126, code == 127, containsAny(said, hopeless):
			return err
		case attempt >= s.p.opts.Attempts:
			return fmt.Errorf("after %d attempts: %w", attempt, err)
		}
		if cause := s.pause(&pause); cause != nil {
			return errors.Join(cause, err)
		}
		if again != nil {
			if err := again(); err != nil {
				return err
			}
		}
	}
}

// pause waits, and the next time longer. It returns the cause of the end of the context.
func (s *session) pause(d *time.Duration) error {
	timer := time.NewTimer(*d)
	defer timer.Stop()
	*d = min(2**d, mostPause)
	select {
	case <-timer.C:
		return nil
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

func containsAny(s string, parts []string) bool {
	for _, part := range parts {
		if strings.Contains(s, part) {
			return true
		}
	}
	return false
}

// put writes a file that belongs to root.
func (s *session) put(name string, mode uint32, content string) error {
	opts := &transport.UploadOptions{Mode: 0o666 & modeOf(mode), MkdirAll: true}
	if !s.sudo {
		return s.t.Upload(s.ctx, name, strings.NewReader(content), opts)
	}
	dir, err := transport.Output(s.ctx, s.t, transport.Command{Args: []string{"mktemp", "-d"}})
	if err != nil {
		return fmt.Errorf("making a temporary directory: %w", err)
	}
	tmp := strings.TrimSpace(string(dir))
	opts.Mode = 0o600
	err = s.t.Upload(s.ctx, tmp+"/file", strings.NewReader(content), opts)
	if err == nil {
		_, err = s.run(s.root(nil, "install", "-D", "-o", "root", "-g", "root", "-m", fmt.Sprintf("%04o", mode), tmp+"/file", name))
	}
	_, rmErr := s.run(transport.Command{Args: []string{"rm", "-rf", tmp}})
	return errors.Join(err, rmErr)
}

// exists reports whether the host has a file.
func (s *session) exists(name string) (bool, error) {
	_, err := s.run(transport.Command{Args: []string{"test", "-e", name}})
	if code, exited := transport.ExitCode(err); exited {
		return code == 0, nil
	}
	return false, err
}

// tail keeps the end of what is written to it.
type tail struct {
	also io.Writer
	mu   *sync.Mutex
	buf  bytes.Buffer
}

const tailSize = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.buf.Write(p)
	if over := t.buf.Len() - 2*tailSize; over > 0 {
		t.buf.Next(over + tailSize)
	}
	if t.also != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.also.Write(p)
	}
	return len(p), nil
}

// String returns whole lines, without control characters.
func (t *tail) String() string {
	b := t.buf.Bytes()
	if len(b) > tailSize {
		b = b[len(b)-tailSize:]
		if _, after, ok := bytes.Cut(b, []byte("\n")); ok {
			b = after
		}
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(string(b), "\uFFFD"))
}
