package provisioner_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/provisioner"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host is a transport to a host that is not there: a script answers for it.
type host struct {
	release string
	uid     string
	answer  func(args []string) (says string, code int) // of what the host does not answer by itself

	mu       sync.Mutex
	commands []string
	envs     []map[string]string
	files    map[string]string
	modes    map[string]fs.FileMode
}

const (
	bookworm = "ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n"
	noble    = "ID=ubuntu\nID_LIKE=debian\nVERSION_ID=\"24.04\"\nVERSION_CODENAME=noble\n"
	rocky    = "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.4\"\n"
	alpine   = "ID=alpine\nVERSION_ID=3.20.1\n"
)

func newHost(release string) *host {
	return &host{release: release, uid: "0", files: map[string]string{}, modes: map[string]fs.FileMode{}}
}

func (h *host) Exec(ctx context.Context, cmd transport.Command) error {
	if err := cmd.Validate(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	line := strings.Join(cmd.Args, " ")
	says, code := "", 0
	switch {
	case line == "id -u":
		says = h.uid + "\n"
	case strings.Contains(line, "cat /etc/os-release"):
		says = h.release
		if says == "" {
			code = 1
		}
	case strings.Contains(line, "command -v"):
		says = "dnf\n"
		if h.answer != nil {
			if s, c := h.answer(cmd.Args); s != "" || c != 0 {
				says, code = s, c
			}
		}
	default:
		h.commands = append(h.commands, line)
		h.envs = append(h.envs, cmd.Env)
		if h.answer != nil {
			says, code = h.answer(cmd.Args)
		}
		if cmd.Args[0] == "mktemp" {
			says = "/tmp/tmp.1\n"
		}
	}
	if cmd.Stdout != nil {
		if _, err := io.WriteString(cmd.Stdout, says); err != nil {
			return err
		}
	}
	if code != 0 {
		return &transport.ExitError{Code: code}
	}
	return nil
}

func (h *host) Upload(_ context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
	b, err := io.ReadAll(src)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.files[dst], h.modes[dst] = string(b), opts.Mode
	return err
}

func (h *host) Download(_ context.Context, src string, dst io.Writer, _ *transport.DownloadOptions) error {
	content, ok := h.files[src]
	if !ok {
		return &fs.PathError{Op: "download", Path: src, Err: fs.ErrNotExist}
	}
	_, err := io.WriteString(dst, content)
	return err
}

func (h *host) Close() error { return nil }

// one returns the only file below a directory.
func (h *host) one(t *testing.T, dir string) (name, content string) {
	t.Helper()
	for n, c := range h.files {
		if filepath.Dir(n) == dir {
			require.Empty(t, name, "there are several in %s", dir)
			name, content = n, c
		}
	}
	require.NotEmpty(t, name, "there is nothing in %s", dir)
	return name, content
}

func (h *host) ran(part string) bool {
	for _, c := range h.commands {
		if strings.Contains(c, part) {
			return true
		}
	}
	return false
}

func prepare(t *testing.T, h *host, opts *provisioner.Options, env provisioner.Environment) error {
	t.Helper()
	return provisioner.New(opts).Prepare(t.Context(), h, provisioner.Host{Name: "c1"}, env)
}

func TestNothingToDo(t *testing.T) {
	t.Parallel()
	h := newHost(bookworm)
	require.NoError(t, prepare(t, h, nil, provisioner.Environment{OS: "debian_12"}))
	require.Empty(t, h.commands)
}

func TestAptPackages(t *testing.T) {
	t.Parallel()
	for _, release := range []string{bookworm, noble, "ID=devuan\nID_LIKE=debian\n"} {
		h := newHost(release)
		require.NoError(t, prepare(t, h, nil, provisioner.Environment{Packages: []string{"g++", "libfoo=1:2.0~rc1-1"}}))
		require.Len(t, h.commands, 2)
		assert.Contains(t, h.commands[0], "APT::Update::Error-Mode=any update")
		assert.True(t, strings.HasSuffix(h.commands[1], " install g++ libfoo=1:2.0~rc1-1"), h.commands[1])
		assert.Equal(t, "noninteractive", h.envs[1]["DEBIAN_FRONTEND"])
	}
}

func TestUnknownSystem(t *testing.T) {
	t.Parallel()
	err := prepare(t, newHost("ID=plan9\n"), nil, provisioner.Environment{Packages: []string{"x"}})
	require.ErrorContains(t, err, `"plan9"`)
	h := newHost("") // says nothing of itself
	require.NoError(t, prepare(t, h, nil, provisioner.Environment{OS: "debian_7", Packages: []string{"x"}}))
	require.True(t, h.ran("apt-get"))
}

func TestBadNames(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ release, name string }{
		{bookworm, ""}, {bookworm, "-o"}, {bookworm, "a b"}, {bookworm, "a\nb"}, {bookworm, "bash-"}, {rocky, "--setopt=x"}, {rocky, "@"}, {rocky, "@a\nb"}, {rocky, "@ a"}, {bookworm, "@development"}, {alpine, "@a b"}, {alpine, "!busybox"}, {alpine, "a\tb"},
	} {
		h := newHost(c.release)
		require.ErrorContains(t, prepare(t, h, nil, provisioner.Environment{Packages: []string{"good", c.name}}), "the package")
		require.Empty(t, h.commands)
	}
}

const armor = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nxx\n-----END PGP PUBLIC KEY BLOCK-----\n"

func TestAptRepository(t *testing.T) {
	t.Parallel()
	h := newHost(bookworm)
	require.NoError(t, prepare(t, h, nil, provisioner.Environment{
		Repositories: []provisioner.Repository{{URL: "https://user:s3cret@apt.example.com:8443/debian/", Components: []string{"main", "extra"}, Key: armor}},
		Packages:     []string{"tool"},
	}))
	name, source := h.one(t, "/etc/apt/sources.list.d")
	base := strings.TrimSuffix(filepath.Base(name), ".sources")
	require.NotEqual(t, filepath.Base(name), base)
	require.Equal(t, "Types: deb\nURIs: https://apt.example.com:8443/debian/\nSuites: bookworm\nComponents: main extra\nSigned-By: /etc/apt/keyrings/"+base+".asc\n", source)
	require.Equal(t, armor, h.files["/etc/apt/keyrings/"+base+".asc"])
	auth := "/etc/apt/auth.conf.d/" + base + ".conf"
	require.Equal(t, "machine apt.example.com:8443/debian login user password s3cret\n", h.files[auth])
	require.Equal(t, fs.FileMode(0o600), h.modes[auth])
	require.Equal(t, fs.FileMode(0o644), h.modes[name])
	require.False(t, h.ran("s3cret"), "the password is in no command")
	require.False(t, h.ran("apt-key"))
	require.True(t, h.ran("test -e /etc/ssl/certs/ca-certificates.crt"))
	updates := 0
	for _, c := range h.commands {
		if strings.HasSuffix(c, " update") {
			updates++
		}
	}
	require.Equal(t, 1, updates)

	again := newHost(bookworm) // gives the files the same names
	require.NoError(t, prepare(t, again, nil, provisioner.Environment{
		Repositories: []provisioner.Repository{{URL: "https://user:other@apt.example.com:8443/debian/", Components: []string{"main", "extra"}, Key: "\x99binary"}},
	}))
	require.Contains(t, again.files, name)
	require.Contains(t, again.files, "/etc/apt/keyrings/"+base+".gpg")
}

func TestAptCertificates(t *testing.T) {
	t.Parallel()
	h := newHost(bookworm)
	h.answer = func(args []string) (string, int) {
		if args[0] == "test" {
			return "", 1
		}
		return "", 0
	}
	require.NoError(t, prepare(t, h, nil, provisioner.Environment{
		Repositories: []provisioner.Repository{{URL: "https://a.example.com", Distribution: "./"}},
	}))
	require.True(t, h.ran("install ca-certificates"))
	_, source := h.one(t, "/etc/apt/sources.list.d")
	require.Equal(t, "Types: deb\nURIs: https://a.example.com\nSuites: ./\n", source)
	require.True(t, strings.HasSuffix(h.commands[len(h.commands)-1], " update"), "the new repository is read")
}

func TestBadRepositories(t *testing.T) {
	t.Parallel()
	for want, r := range map[string]provisioner.Repository{
		"list of components": {URL: "http://a.example.com", Distribution: "x"},
		"no components":      {URL: "http://a.example.com", Distribution: "x/", Components: []string{"main"}},
		"http://":            {URL: "ftp://a.example.com", Distribution: "x", Components: []string{"main"}},
		"the URL":            {URL: "http://a.example.com\nx", Distribution: "x", Components: []string{"main"}},
		"component":          {URL: "http://a.example.com", Distribution: "x", Components: []string{"main\nSigned-By: /dev/null"}},
		"https://":           {URL: "http://a.example.com", Distribution: "x", Components: []string{"main"}, KeyURL: "http://a.example.com/key"},
		"8 digits":           {URL: "http://a.example.com", Distribution: "x", Components: []string{"main"}, KeyID: "DEADBEEF"},
		"40 or 16":           {URL: "http://a.example.com", Distribution: "x", Components: []string{"main"}, KeyID: "hello"},
		"for Ubuntu":         {URL: "ppa:a/b"},
		"user name":          {URL: "http://u:a%20b@a.example.com", Distribution: "x", Components: []string{"main"}},
	} {
		h := newHost(bookworm)
		err := prepare(t, h, nil, provisioner.Environment{Repositories: []provisioner.Repository{r}})
		assert.ErrorContains(t, err, want)
		assert.Empty(t, h.files)
	}
}

// testKey is a packet that looks like a key of version 4.
func testKey() []byte {
	body := append([]byte{4, 0, 0, 0, 1, 22}, bytes.Repeat([]byte{7}, 40)...)
	return append([]byte{0x98, byte(len(body))}, body...)
}

// web is a server of keys and Launchpad's knowledge.
func web(t *testing.T, handle http.HandlerFunc) *provisioner.Options {
	t.Helper()
	s := httptest.NewTLSServer(handle)
	t.Cleanup(s.Close)
	client := s.Client()
	client.Transport = toServer{client.Transport, s.Listener.Addr().String()}
	t.Cleanup(client.CloseIdleConnections)
	return &provisioner.Options{HTTPClient: client}
}

// toServer sends all requests to a server.
type toServer struct {
	http.RoundTripper
	addr string
}

func (s toServer) RoundTrip(req *http.Request) (*http.Response, error) {
	out := req.Clone(req.Context())
	out.Host = req.URL.Host
	out.URL.Host = s.addr
	resp, err := s.RoundTripper.RoundTrip(out)
	if resp != nil {
		resp.Request = req
	}
	return resp, err
}

func TestKeys(t *testing.T) {
	t.Parallel()
	key := testKey()
	text := "-----BEGIN PGP PUBLIC KEY BLOCK-----\nComment: x\n\n" + base64.StdEncoding.EncodeToString(key) + "\n=AAAA\n-----END PGP PUBLIC KEY BLOCK-----\n"
	print := provisioner.Fingerprint(t, key)
	require.Equal(t, print, provisioner.Fingerprint(t, []byte(text)))
	opts := web(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Host == "keyserver.ubuntu.com" && r.URL.Path == "/pks/lookup" && r.URL.Query().Get("op") == "get":
			io.WriteString(w, text) // whatever was asked for
		case r.Host == "keys.example.com":
			w.Write(key)
		case r.Host == "api.launchpad.net" && r.URL.Path == "/1.0/~git-core/+archive/ubuntu/ppa":
			fmt.Fprintf(w, `{"signing_key_fingerprint": %q}`, print)
		default:
			http.NotFound(w, r)
		}
	})
	for _, r := range []provisioner.Repository{
		{URL: "http://a.example.com", Components: []string{"main"}, KeyID: "0x" + strings.ToLower(print)},
		{URL: "http://a.example.com", Components: []string{"main"}, KeyID: print[24:]},
		{URL: "ppa:git-core/ppa"},
	} {
		h := newHost(noble)
		require.NoError(t, prepare(t, h, opts, provisioner.Environment{Repositories: []provisioner.Repository{r}}))
		name, content := h.one(t, "/etc/apt/keyrings")
		require.Equal(t, text, content)
		require.True(t, strings.HasSuffix(name, ".asc"))
		if strings.HasPrefix(r.URL, "ppa:") {
			_, source := h.one(t, "/etc/apt/sources.list.d")
			require.Contains(t, source, "URIs: https://ppa.launchpadcontent.net/git-core/ppa/ubuntu\nSuites: noble\nComponents: main\n")
		}
	}
	h := newHost(noble)
	r := provisioner.Repository{URL: "http://a.example.com", Components: []string{"main"}, KeyURL: "https://keys.example.com/key.gpg"}
	require.NoError(t, prepare(t, h, opts, provisioner.Environment{Repositories: []provisioner.Repository{r}}))
	name, _ := h.one(t, "/etc/apt/keyrings")
	require.True(t, strings.HasSuffix(name, ".gpg"))

	r = provisioner.Repository{URL: "http://a.example.com", Components: []string{"main"}, KeyID: strings.Repeat("AB", 20)}
	require.ErrorContains(t, prepare(t, newHost(noble), opts, provisioner.Environment{Repositories: []provisioner.Repository{r}}), "gave the key "+print)
	r = provisioner.Repository{URL: "http://a.example.com", Components: []string{"main"}, KeyURL: "https://nowhere.example.com/key.gpg"}
	require.ErrorContains(t, prepare(t, newHost(noble), opts, provisioner.Environment{Repositories: []provisioner.Repository{r}}), "404")
	require.Error(t, prepare(t, newHost(noble), opts, provisioner.Environment{Repositories: []provisioner.Repository{{URL: "ppa:no/such"}}}))
}

// TestFingerprint compares with gpg where that is installed.
func TestFingerprint(t *testing.T) {
	t.Parallel()
	gpg, err := exec.LookPath("gpg")
	if err != nil {
		t.Skip("needs gpg")
	}
	keyrings, _ := filepath.Glob("/usr/share/keyrings/*archive*.gpg")
	if len(keyrings) == 0 {
		t.Skip("needs a keyring below /usr/share/keyrings")
	}
	for _, keyring := range keyrings {
		out, err := exec.CommandContext(t.Context(), gpg, "--homedir", t.TempDir(), "--with-colons", "--show-keys", keyring).Output()
		require.NoError(t, err)
		_, rest, _ := strings.Cut(string(out), "\nfpr:::::::::")
		want, _, _ := strings.Cut(rest, ":")
		require.Equal(t, want, provisioner.FingerprintOfFile(t, keyring), keyring)
	}
}

func TestFetchTriesAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		client := &http.Client{Transport: roundTripper(func(req *http.Request) (*http.Response, error) {
			asked++
			if asked == 1 {
				return nil, errors.New("connection reset")
			}
			status := 200
			if asked == 2 {
				status = 503
			}
			return &http.Response{StatusCode: status, Status: http.StatusText(status), Body: io.NopCloser(strings.NewReader(armor)), Request: req}, nil
		})}
		h := newHost(bookworm)
		require.NoError(t, prepare(t, h, &provisioner.Options{HTTPClient: client}, provisioner.Environment{Repositories: []provisioner.Repository{
			{URL: "http://a.example.com", Components: []string{"main"}, KeyURL: "https://a.example.com/key"},
		}}))
		require.Equal(t, 3, asked)
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

func TestRetries(t *testing.T) {
	t.Parallel()
	packages := provisioner.Environment{Packages: []string{"x"}}
	for _, c := range []struct {
		name, says string
		failures   int // of the update
		code       int
		want       string // in the error; "": none
		updates    int
	}{
		{"a hiccup", "E: Failed to fetch http://x  503", 2, 100, "", 3},
		{"a mirror that is down", "E: Failed to fetch http://x  503", 99, 100, "after 5 attempts", 5},
		{"a key that is missing", "NO_PUBKEY 0123", 99, 100, "NO_PUBKEY", 1},
		{"no apt-get", "", 99, 127, "127", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				h := newHost(bookworm)
				n := 0
				h.answer = func(args []string) (string, int) {
					if args[len(args)-1] == "update" {
						if n++; n <= c.failures {
							return c.says, c.code
						}
					}
					return "", 0
				}
				err := prepare(t, h, nil, packages)
				if c.want == "" {
					require.NoError(t, err)
				} else {
					require.ErrorContains(t, err, c.want)
					require.ErrorContains(t, err, "apt-get update")
					require.ErrorContains(t, err, c.says)
					require.ErrorContains(t, err, "c1")
					code, exited := transport.ExitCode(err)
					require.True(t, exited)
					require.Equal(t, c.code, code)
				}
				require.Equal(t, c.updates, n)
			})
		})
	}
}

func TestInstallReadsListsAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newHost(bookworm)
		failed := false
		h.answer = func(args []string) (string, int) {
			if args[len(args)-1] == "x" && !failed {
				failed = true
				return "E: Failed to fetch http://x/x.deb  404  Not Found", 100
			}
			return "", 0
		}
		require.NoError(t, prepare(t, h, nil, provisioner.Environment{Packages: []string{"x"}}))
		require.Len(t, h.commands, 4)
		require.True(t, strings.HasSuffix(h.commands[2], " update"))
	})
}

func TestContextEndsRetries(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := newHost(bookworm)
		h.answer = func([]string) (string, int) { return "E: hiccup", 100 }
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		err := provisioner.New(nil).Prepare(ctx, h, provisioner.Host{}, provisioner.Environment{Packages: []string{"x"}})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "hiccup")
		require.Equal(t, time.Second, time.Since(began))
	})
}

func TestOutput(t *testing.T) {
	t.Parallel()
	h := newHost(bookworm)
	h.answer = func(args []string) (string, int) {
		if args[len(args)-1] == "x" {
			return strings.Repeat("line\n", 10000) + "\x1b[31mUnable to locate package x\n", 100
		}
		return "reading\n", 0
	}
	var out bytes.Buffer
	err := prepare(t, h, &provisioner.Options{Output: &out}, provisioner.Environment{Packages: []string{"x"}})
	require.ErrorContains(t, err, "line\n[31mUnable to locate package x")
	require.Less(t, len(err.Error()), 5000)
	require.Equal(t, len("reading\n")+50000+len("\x1b[31mUnable to locate package x\n"), out.Len())
}

func TestSudo(t *testing.T) {
	t.Parallel()
	h := newHost(bookworm)
	h.uid = "1000"
	require.NoError(t, prepare(t, h, nil, provisioner.Environment{
		Repositories: []provisioner.Repository{{URL: "http://a.example.com", Components: []string{"main"}}}, Packages: []string{"x"},
	}))
	require.True(t, h.ran("sudo -n env DEBIAN_FRONTEND=noninteractive LC_ALL=C apt-get"))
	require.True(t, h.ran("sudo -n env install -D -o root -g root -m 0644 /tmp/tmp.1/file /etc/apt/sources.list.d/transport-"))
	require.True(t, h.ran("rm -rf /tmp/tmp.1"))
	require.Contains(t, h.files["/tmp/tmp.1/file"], "a.example.com")
}

func TestDNF(t *testing.T) {
	t.Parallel()
	h := newHost(rocky)
	opts := web(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "[x]\nbaseurl=http://x\n") })
	require.NoError(t, prepare(t, h, opts, provisioner.Environment{
		Repositories: []provisioner.Repository{
			{URL: "https://u:pw@rpm.example.com/el9", Key: armor},
			{URL: "https://rpm.example.com/x.repo"},
			{URL: "https://rpm.example.com/release.rpm"},
		},
		Packages: []string{"gcc", "@development", "@Development Tools"},
	}))
	var own, foreign string
	for name, content := range h.files {
		if filepath.Dir(name) != "/etc/yum.repos.d" {
			continue
		}
		if strings.HasPrefix(content, "[x]") {
			foreign = name
		} else {
			own = name
			require.Equal(t, fs.FileMode(0o600), h.modes[name])
		}
	}
	require.NotEmpty(t, foreign)
	base := strings.TrimSuffix(filepath.Base(own), ".repo")
	key := "/etc/pki/rpm-gpg/RPM-GPG-KEY-" + base
	require.Equal(t, "["+base+"]\nname=https://rpm.example.com/el9\nbaseurl=https://rpm.example.com/el9\nenabled=1\ngpgcheck=1\ngpgkey=file://"+key+"\nusername=u\npassword=pw\n", h.files[own])
	require.Equal(t, []string{"rpm --import " + key, "dnf -y install https://rpm.example.com/release.rpm", "dnf -y install gcc @development @Development Tools"}, h.commands)

	old := newHost("ID=centos\nVERSION_ID=7\n")
	old.answer = func(args []string) (string, int) {
		if args[0] == "/bin/sh" {
			return "yum\n", 0
		}
		return "", 0
	}
	require.NoError(t, prepare(t, old, nil, provisioner.Environment{Packages: []string{"gcc"}}))
	require.Equal(t, []string{"yum -y --setopt=skip_missing_names_on_install=0 install gcc"}, old.commands)

	none := newHost("ID=fedora\n")
	none.answer = func(args []string) (string, int) { return "", 1 }
	require.ErrorContains(t, prepare(t, none, nil, provisioner.Environment{Packages: []string{"gcc"}}), "neither dnf")
	for want, url := range map[string]string{"command line": "https://u:pw@x.example.com/a.rpm", "http://": "/x.repo"} {
		require.ErrorContains(t, prepare(t, newHost(rocky), nil, provisioner.Environment{Repositories: []provisioner.Repository{{URL: url}}}), want)
	}
}

func TestAPK(t *testing.T) {
	t.Parallel()
	h := newHost(alpine)
	h.files["/etc/apk/repositories"] = "https://dl-cdn.alpinelinux.org/alpine/v3.20/main"
	env := provisioner.Environment{
		Repositories: []provisioner.Repository{
			{URL: "https://dl-cdn.alpinelinux.org/alpine", Distribution: "edge", Components: []string{"main", "testing"}},
			{URL: "https://apk.example.com/x/", Key: "-----BEGIN PUBLIC KEY-----", KeyURL: "https://apk.example.com/x@example.com-1.rsa.pub"},
		},
		Packages: []string{"build-base"},
	}
	require.NoError(t, prepare(t, h, nil, env))
	want := "https://dl-cdn.alpinelinux.org/alpine/v3.20/main\nhttps://dl-cdn.alpinelinux.org/alpine/edge/main\nhttps://dl-cdn.alpinelinux.org/alpine/edge/testing\nhttps://apk.example.com/x\n"
	require.Equal(t, want, h.files["/etc/apk/repositories"])
	require.Contains(t, h.files, "/etc/apk/keys/x@example.com-1.rsa.pub")
	require.Equal(t, []string{"apk update", "apk add build-base"}, h.commands)
	require.NoError(t, prepare(t, h, nil, env))
	require.Equal(t, want, h.files["/etc/apk/repositories"], "nothing twice")
	for _, r := range []provisioner.Repository{{URL: "https://x.example.com", KeyID: "AB"}, {URL: "https://x.example.com", Key: "x"}} {
		require.Error(t, prepare(t, newHost(alpine), nil, provisioner.Environment{Repositories: []provisioner.Repository{r}}))
	}
}

func TestTransportFails(t *testing.T) {
	t.Parallel()
	err := provisioner.New(nil).Prepare(t.Context(), broken{}, provisioner.Host{Name: "c1"}, provisioner.Environment{Packages: []string{"x"}})
	require.ErrorIs(t, err, transport.ErrNoHost)
}

type broken struct{ *host }

func (broken) Exec(context.Context, transport.Command) error { return transport.ErrNoHost }
