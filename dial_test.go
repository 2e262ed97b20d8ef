package transport_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/lxdtest"
)

// clearEnv makes a test independent of where the machine's own servers and configurations are.
func clearEnv(t *testing.T) (home string) {
	t.Helper()
	home = t.TempDir()
	for _, name := range []string{"LXD_SOCKET", "LXD_DIR", "LXD_CONF", "INCUS_SOCKET", "INCUS_DIR", "INCUS_CONF"} {
		t.Setenv(name, "")
	}
	t.Setenv("HOME", home)
	return home
}

// works runs a command.
func works(t *testing.T, host *transport.LXD, err error) {
	t.Helper()
	require.NoError(t, err)
	defer func() { assert.NoError(t, host.Close()) }()
	out, err := transport.Output(soon(t), host, transport.Command{Args: []string{"echo", "hello"}})
	assert.NoError(t, err)
	assert.Equal(t, "hello\n", string(out))
}

func fakeServer(t *testing.T, secure bool) *lxdtest.Server {
	t.Helper()
	s := lxdtest.NewUnstartedServer()
	s.Handler = commands
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	if secure {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s
}

func TestDialLocal(t *testing.T) {
	home := clearEnv(t)
	ctx := soon(t)
	if _, err := os.Stat("/var/lib/lxd/unix.socket"); err != nil {
		_, err := transport.DialLXD(ctx, "", "c1", nil)
		if err != nil { // there may be another local server after all
			assert.ErrorIs(t, err, transport.ErrNoServer)
			assert.ErrorContains(t, err, "/var/snap/lxd/common/lxd/unix.socket")
		}
	}
	s := fakeServer(t, false)
	host, err := transport.DialLXD(ctx, "unix://"+s.Socket, "c1", nil)
	works(t, host, err)

	t.Setenv("INCUS_SOCKET", s.Socket)
	t.Setenv("LXD_DIR", home)
	_, err = transport.DialLXD(ctx, "local", "c1", nil)
	assert.ErrorContains(t, err, filepath.Join(home, "unix.socket"), "what is named is there or nowhere")
	assert.ErrorIs(t, err, transport.ErrNoServer)
	assert.NotErrorIs(t, err, fs.ErrNotExist, "that is about files in the instance")
	t.Setenv("LXD_DIR", "")
	for _, name := range []string{"INCUS_SOCKET", "LXD_SOCKET"} {
		t.Setenv(name, s.Socket)
		for _, remote := range []string{"", "local", "unix://", "unix:"} {
			host, err = transport.DialLXD(ctx, remote, "c1", nil)
			works(t, host, err)
		}
		t.Setenv(name, "")
	}
}

// TestDialUserSocket: Incus has a socket for users who may have one project only, and the incus command takes that one where there is no other.
func TestDialUserSocket(t *testing.T) {
	dir := clearEnv(t)
	s := lxdtest.NewUnstartedServer()
	s.Version, s.Handler = lxdtest.Incus6, commands
	s.AddInstance(lxdtest.Instance{Name: "c1", Project: fmt.Sprint("user-", os.Geteuid())})
	s.Start()
	t.Cleanup(s.Close)
	t.Setenv("INCUS_DIR", dir)
	_, err := transport.DialLXD(soon(t), "", "c1", nil)
	assert.ErrorIs(t, err, transport.ErrNoServer)
	assert.ErrorContains(t, err, filepath.Join(dir, "unix.socket"))
	if err := os.Symlink(s.Socket, filepath.Join(dir, "unix.socket.user")); err != nil {
		t.Skip(err)
	}
	stale, err := net.Listen("unix", filepath.Join(dir, "unix.socket")) // the socket is there, and nobody listens
	require.NoError(t, err)
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, stale.Close())
	host, err := transport.DialLXD(soon(t), "", "c1", nil)
	works(t, host, err)
	host, err = transport.DialLXD(soon(t), "", "c1", &transport.LXDOptions{Project: "default"})
	require.NoError(t, err)
	defer host.Close()
	assert.ErrorIs(t, host.Exec(soon(t), transport.Command{Args: []string{"true"}}), transport.ErrNoHost)
}

func TestDialRemote(t *testing.T) {
	home := clearEnv(t)
	ctx := soon(t)
	for _, secure := range []bool{false, true} {
		s := fakeServer(t, secure)
		for _, where := range []string{"LXD_CONF", "", ".config/lxc", "snap/lxd/common/config", ".config/incus"} {
			dir := filepath.Join(home, filepath.FromSlash(where))
			switch where {
			case "LXD_CONF":
				dir = t.TempDir()
				t.Setenv(where, dir)
			case "":
				dir = t.TempDir()
				t.Setenv("INCUS_CONF", dir)
			}
			require.NoError(t, os.MkdirAll(dir, 0o700))
			require.NoError(t, s.WriteClientConfig(dir))
			host, err := transport.DialLXD(ctx, "fake", "c1", nil)
			works(t, host, err)
			host, err = transport.DialInstance(ctx, "fake:c1", nil)
			works(t, host, err)
			host, err = transport.DialInstance(ctx, "c1", nil) // the default remote
			works(t, host, err)
			server, err := transport.ConnectLXD(ctx, "fake", nil)
			require.NoError(t, err)
			host, err = transport.NewLXD(server, "c1", nil)
			works(t, host, err)
			server, err = transport.ConnectLXD(ctx, "fake", &transport.LXDOptions{Project: "other"})
			require.NoError(t, err)
			info, err := server.GetConnectionInfo()
			require.NoError(t, err)
			assert.Equal(t, "other", info.Project)
			_, err = transport.DialLXD(ctx, "other", "c1", nil)
			assert.ErrorContains(t, err, "config.yml")
			assert.ErrorContains(t, err, "fake", "what there is")
			t.Setenv("LXD_CONF", "")
			t.Setenv("INCUS_CONF", "")
			require.NoError(t, os.RemoveAll(dir))
		}
	}
}

// TestConnectLXD: the official client's connection has the same certificate to compare, the same errors and the same project as a transport's.
func TestConnectLXD(t *testing.T) {
	clearEnv(t)
	dir := t.TempDir()
	t.Setenv("LXD_DIR", dir)
	server, err := transport.ConnectLXD(soon(t), "", nil)
	assert.ErrorIs(t, err, transport.ErrNoServer)
	assert.ErrorContains(t, err, filepath.Join(dir, "unix.socket"))
	assert.Nil(t, server)

	local := fakeServer(t, false)
	t.Setenv("LXD_SOCKET", local.Socket)
	for _, remote := range []string{"", "local", "unix://" + local.Socket} {
		server, err = transport.ConnectLXD(soon(t), remote, nil)
		require.NoError(t, err, remote)
		_, _, err = server.GetInstance("c1")
		assert.NoError(t, err, remote)
		server.Disconnect()
	}

	s, other := fakeServer(t, true), fakeServer(t, true)
	server, err = transport.ConnectLXD(soon(t), s.URL, options(s))
	require.NoError(t, err)
	host, err := transport.NewLXD(server, "c1", nil)
	works(t, host, err)
	server.Disconnect()
	before := len(s.Requests())
	opts := options(s)
	opts.TLSServerCert = other.ServerCert
	server, err = transport.ConnectLXD(soon(t), s.URL, opts)
	assert.ErrorContains(t, err, "is pinned")
	assert.Nil(t, server)
	assert.Len(t, s.Requests(), before, "nothing is sent to a server that is not the pinned one")
	stranger := options(other)
	stranger.TLSServerCert = s.ServerCert
	_, err = transport.ConnectLXD(soon(t), s.URL, stranger)
	assert.ErrorIs(t, err, transport.ErrUnauthorized)
	_, err = transport.ConnectLXD(soon(t), "ftp://x", nil)
	assert.ErrorContains(t, err, "https://")

	conf := t.TempDir()
	t.Setenv("LXD_CONF", conf)
	require.NoError(t, s.WriteClientConfig(conf))
	file := filepath.Join(conf, "config.yml")
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(file, []byte(strings.Replace(string(b), s.URL, s.URL+"\n    project: builds", 1)), 0o600))
	server, err = transport.ConnectLXD(soon(t), "fake", nil)
	require.NoError(t, err)
	defer server.Disconnect()
	info, err := server.GetConnectionInfo()
	require.NoError(t, err)
	assert.Equal(t, "builds", info.Project, "that of the remote")
}

func TestDialBadConfiguration(t *testing.T) {
	clearEnv(t)
	s := fakeServer(t, true)
	key := func(dir string) string { return filepath.Join(dir, "client.key") }
	for name, c := range map[string]struct {
		spoil func(dir string) error
		want  []string
	}{
		"half-written": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "config.yml"), []byte("remotes:\n  fake: {addr: htt"), 0o600)
		}, []string{"config.yml"}},
		"no address": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "config.yml"), []byte("remotes:\n  fake: {}"), 0o600)
		}, []string{"config.yml", "no address"}},
		"a server of images": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "config.yml"), []byte("remotes:\n  fake: {addr: https://x, protocol: simplestreams}"), 0o600)
		}, []string{"config.yml", "images"}},
		"not a file": {func(dir string) error {
			file := filepath.Join(dir, "config.yml")
			if err := os.Remove(file); err != nil {
				return err
			}
			return os.Mkdir(file, 0o700)
		}, []string{"config.yml"}},
		"a key for everyone": {func(dir string) error { return os.Chmod(key(dir), 0o644) }, []string{"client.key", "chmod 600"}},
		"half a key": {func(dir string) error {
			return os.WriteFile(key(dir), []byte("-----BEGIN PRIVATE KEY-----\nMIG"), 0o600)
		}, []string{"client.key", "PEM"}},
		"an encrypted key": {func(dir string) error {
			return os.WriteFile(key(dir), pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")}), 0o600)
		}, []string{"client.key", "encrypted"}},
		"no key": {func(dir string) error { return os.Remove(key(dir)) }, []string{"client.key"}},
		"not a certificate": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "servercerts", "fake.crt"), []byte("nothing"), 0o600)
		}, []string{"fake.crt", "PEM"}},
		"nobody logged in": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "config.yml"), []byte("remotes:\n  fake: {addr: "+s.URL+", auth_type: oidc}"), 0o600)
		}, []string{"config.yml", "log in"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("LXD_CONF", dir)
			require.NoError(t, s.WriteClientConfig(dir))
			require.NoError(t, c.spoil(dir))
			_, err := transport.DialLXD(soon(t), "fake", "c1", nil)
			for _, text := range c.want {
				assert.ErrorContains(t, err, text)
			}
		})
	}
	assert.Empty(t, s.Requests())
}

// options are credentials for a fake server.
func options(s *lxdtest.Server) *transport.LXDOptions {
	return &transport.LXDOptions{TLSClientCert: s.ClientCert, TLSClientKey: s.ClientKey, TLSServerCert: s.ServerCert}
}

func TestDialTrust(t *testing.T) {
	clearEnv(t)
	s, other := fakeServer(t, true), fakeServer(t, true)
	ctx := soon(t)
	host, err := transport.DialLXD(ctx, s.URL, "c1", options(s))
	works(t, host, err)
	sum := sha256.Sum256(s.Certificate().Raw)
	opts := options(s)
	opts.TLSServerCert, opts.ServerFingerprint = "", hex.EncodeToString(sum[:])
	host, err = transport.DialLXD(ctx, s.URL, "c1", opts)
	works(t, host, err)

	before := len(s.Requests())
	for name, change := range map[string]func(o *transport.LXDOptions){
		"another certificate": func(o *transport.LXDOptions) { o.TLSServerCert = other.ServerCert },
		"wrong fingerprint": func(o *transport.LXDOptions) {
			o.TLSServerCert, o.ServerFingerprint = "", strings.Repeat("0", 64)
		},
		"no pin": func(o *transport.LXDOptions) { o.TLSServerCert = "" },
	} {
		opts := options(s)
		change(opts)
		_, err := transport.DialLXD(ctx, s.URL, "c1", opts)
		assert.ErrorContains(t, err, "certificate", name)
	}
	assert.Len(t, s.Requests(), before, "nothing is sent before the check")

	opts = options(s)
	opts.TLSClientCert, opts.TLSClientKey = other.ClientCert, other.ClientKey
	_, err = transport.DialLXD(ctx, s.URL, "c1", opts)
	assert.ErrorIs(t, err, transport.ErrUnauthorized)
	assert.ErrorContains(t, err, "LXD")
}

// issued makes a certificate, signed by itself if by is nil.
func issued(t *testing.T, by *tls.Certificate, from, to time.Time) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(from.UnixNano()), Subject: pkix.Name{CommonName: "server"}, NotBefore: from, NotAfter: to,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: by == nil, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	parent, signer := template, any(key)
	if by != nil {
		parent, signer = by.Leaf, by.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	require.NoError(t, err)
	leaf, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func inPEM(c *tls.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Leaf.Raw}))
}

// TestDialCertificates: who may be a server, by its certificate alone.
func TestDialCertificates(t *testing.T) {
	home := clearEnv(t)
	fake := fakeServer(t, true)
	now := time.Now()
	ca := issued(t, nil, now.Add(-time.Hour), now.Add(time.Hour))
	good := issued(t, ca, now.Add(-time.Hour), now.Add(time.Hour))
	expired := issued(t, ca, now.Add(-2*time.Hour), now.Add(-time.Hour))
	stranger := issued(t, nil, now.Add(-time.Hour), now.Add(time.Hour))
	for name, c := range map[string]struct {
		server *tls.Certificate
		stored string // the remote's own
		ca     string
		ok     bool
	}{
		"the stored one":                       {server: good, stored: inPEM(good), ok: true},
		"an expired one, though it is stored":  {server: expired, stored: inPEM(expired)},
		"trusted, and for the name, but other": {server: good, stored: inPEM(stranger), ca: ""},
		"of the authority":                     {server: good, ca: inPEM(ca), ok: true},
		"of the authority, but expired":        {server: expired, ca: inPEM(ca)},
		"of another authority, but stored":     {server: stranger, stored: inPEM(stranger), ca: inPEM(ca), ok: true},
		"of the authority, another stored":     {server: good, stored: inPEM(stranger), ca: inPEM(ca)},
		"of no authority":                      {server: stranger, ca: inPEM(ca)},
		"unknown":                              {server: stranger},
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int32
			s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				w.Header().Set("Content-Type", "application/json")
				io.WriteString(w, `{"type":"sync","metadata":{"auth":"trusted","environment":{"server":"lxd","server_version":"5.0.2"}}}`)
			}))
			s.TLS = &tls.Config{Certificates: []tls.Certificate{*c.server}, ClientAuth: tls.RequestClientCert}
			s.Config.ErrorLog = log.New(io.Discard, "", 0)
			s.StartTLS()
			defer s.Close()
			dir := filepath.Join(home, ".config", "lxc")
			require.NoError(t, os.RemoveAll(dir))
			require.NoError(t, os.MkdirAll(filepath.Join(dir, "servercerts"), 0o700))
			write := func(name, content string) {
				if content != "" {
					require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
				}
			}
			write("config.yml", "remotes:\n  r: {addr: \""+s.URL+"\", protocol: lxd}\n")
			write("client.crt", fake.ClientCert)
			write("client.key", fake.ClientKey)
			write("servercerts/r.crt", c.stored)
			write("client.ca", c.ca)
			host, err := transport.DialLXD(soon(t), "r", "c1", nil)
			if c.ok {
				require.NoError(t, err)
				assert.NoError(t, host.Close())
				assert.EqualValues(t, 1, asked.Load())
				return
			}
			assert.ErrorContains(t, err, "certificate")
			assert.Zero(t, asked.Load(), "requests")
		})
	}
}

// TestDialOIDC: a person logged in with lxc or incus, which have stored the token.
func TestDialOIDC(t *testing.T) {
	dir := clearEnv(t)
	t.Setenv("LXD_CONF", dir)
	const token = "a-token-that-is-secret"
	var asked, known atomic.Int32
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		w.Header().Set("Content-Type", "application/json")
		auth := "untrusted"
		if r.Header.Get("Authorization") == "Bearer "+token {
			known.Add(1)
			auth = "trusted"
		}
		io.WriteString(w, `{"type":"sync","metadata":{"auth":"`+auth+`","environment":{"server":"lxd","server_version":"6.2"}}}`)
	}))
	defer s.Close()
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	for _, sub := range []string{"servercerts", "oidctokens"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, sub), 0o700))
	}
	write := func(name, content string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	pinned := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	write("config.yml", "remotes:\n  r: {addr: \""+s.URL+"\", protocol: lxd, auth_type: oidc}\n")
	write("servercerts/r.crt", pinned)
	write("oidctokens/r.json", `{"access_token":"`+token+`","token_type":"Bearer","refresh_token":"x"}`)
	host, err := transport.DialLXD(soon(t), "r", "c1", nil)
	require.NoError(t, err)
	assert.NoError(t, host.Close())
	assert.NotZero(t, known.Load())

	before := asked.Load()
	write("servercerts/r.crt", fakeServer(t, true).ServerCert)
	_, err = transport.DialLXD(soon(t), "r", "c1", nil)
	assert.ErrorContains(t, err, "certificate")
	assert.NotContains(t, err.Error(), token)
	assert.Equal(t, before, asked.Load(), "the token is for the server only")
	write("servercerts/r.crt", pinned)
	write("oidctokens/r.json", `{"access_token":"`+token)
	_, err = transport.DialLXD(soon(t), "r", "c1", nil)
	assert.ErrorContains(t, err, "oidctokens/r.json")
	assert.NotContains(t, err.Error(), token)
}

// TestErrorsNameTheServer: by its product, also where nobody has asked it before.
func TestErrorsNameTheServer(t *testing.T) {
	t.Parallel()
	for _, v := range lxdtest.Versions() {
		s := lxdtest.NewUnstartedServer()
		s.Version = v
		s.Start()
		t.Cleanup(s.Close)
		dialed, err := transport.DialLXD(soon(t), "unix://"+s.Socket, "nope", nil)
		require.NoError(t, err)
		defer dialed.Close()
		for _, host := range []*transport.LXD{dialed, newLXD(t, connect(t, s), "nope", nil)} {
			err = host.Exec(soon(t), transport.Command{Args: []string{"true"}})
			assert.ErrorIs(t, err, transport.ErrNoHost)
			assert.ErrorContains(t, err, v.Name+" answered")
		}
	}
}

func TestDialRealLXD(t *testing.T) {
	reallxd.Need(t)
	instance := reallxd.Instance(t)
	socket, address := os.Getenv("TRANSPORT_LXD_SOCKET"), os.Getenv("TRANSPORT_LXD_ADDR")
	clearEnv(t)
	ctx := soon(t)
	t.Setenv("LXD_SOCKET", socket)
	host, err := transport.DialLXD(ctx, "", instance, nil)
	works(t, host, err)
	host, err = transport.DialLXD(ctx, address, instance, &transport.LXDOptions{
		TLSClientCert: reallxd.File(t, "TRANSPORT_LXD_CERT"), TLSClientKey: reallxd.File(t, "TRANSPORT_LXD_KEY"),
		TLSServerCert: reallxd.File(t, "TRANSPORT_LXD_SERVER_CERT"),
	})
	works(t, host, err)
	_, err = transport.DialLXD(ctx, address, instance, &transport.LXDOptions{TLSServerCert: reallxd.File(t, "TRANSPORT_LXD_SERVER_CERT")})
	assert.ErrorIs(t, err, transport.ErrUnauthorized)

	// As a person sets it up.
	lxc, err := exec.LookPath("lxc")
	if err != nil {
		t.Skip("needs the lxc command")
	}
	t.Setenv("LXD_CONF", t.TempDir())
	run := func(args ...string) string {
		out, err := exec.CommandContext(ctx, lxc, args...).CombinedOutput()
		require.NoError(t, err, "lxc %v: %s", args, out)
		return string(out)
	}
	token := lastLine(run("config", "trust", "add", "--name", "dial-test"))
	defer func() {
		t.Setenv("LXD_SOCKET", socket)
		for line := range strings.Lines(run("config", "trust", "list", "--format", "csv")) {
			if fields := strings.Split(line, ","); strings.Contains(line, "dial-test") {
				run("config", "trust", "remove", strings.TrimSpace(fields[3]))
			}
		}
	}()
	t.Setenv("LXD_SOCKET", socket)
	run("remote", "add", "mine", token)
	t.Setenv("LXD_SOCKET", "/nowhere")
	host, err = transport.DialInstance(ctx, "mine:"+instance, nil)
	works(t, host, err)
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return strings.TrimSpace(s[strings.LastIndexByte(s, '\n')+1:])
}

func TestEnroll(t *testing.T) {
	reallxd.Need(t)
	ctx := soon(t)
	instance := reallxd.Instance(t)
	lxc := func(args ...string) string {
		out, err := exec.CommandContext(ctx, "lxc", args...).CombinedOutput()
		require.NoError(t, err, "lxc %v: %s", args, out)
		return string(out)
	}
	name := "enroll-" + strings.ToLower(rand.Text()[:6])
	token := lastLine(lxc("config", "trust", "add", "--name", name))
	dir := filepath.Join(t.TempDir(), "credentials")
	var all sync.WaitGroup
	for range 4 { // at once: the token is good for one of them, and what it makes trusted is everyone's
		all.Go(func() {
			_, err := transport.Enroll(ctx, "", token, &transport.EnrollOptions{Dir: dir})
			assert.NoError(t, err)
		})
	}
	all.Wait()
	c, err := transport.Enroll(ctx, "", token, &transport.EnrollOptions{Dir: dir})
	require.NoError(t, err, "it is trusted already")
	defer func() {
		block, _ := pem.Decode([]byte(c.ClientCert))
		sum := sha256.Sum256(block.Bytes)
		lxc("config", "trust", "remove", hex.EncodeToString(sum[:])[:12])
	}()
	info, err := os.Stat(filepath.Join(dir, "client.key"))
	require.NoError(t, err)
	assert.EqualValues(t, 0o600, info.Mode().Perm())
	host, err := transport.DialLXD(ctx, c.Address, instance, c.Options())
	works(t, host, err)
	_, err = transport.Enroll(ctx, c.Address, "", &transport.EnrollOptions{Dir: dir})
	assert.NoError(t, err, "without a token")

	_, err = transport.Enroll(ctx, "", token, nil)
	assert.ErrorIs(t, err, transport.ErrUnauthorized, "it has been used")
	assert.NotContains(t, err.Error(), token)
	_, err = transport.Enroll(ctx, "", "bm90aGluZw==", nil)
	assert.ErrorContains(t, err, "token")

	// Somebody else at the address.
	fake := fakeServer(t, true)
	_, err = transport.Enroll(ctx, fake.URL, token, nil)
	assert.ErrorContains(t, err, "certificate")
	assert.Empty(t, fake.Requests())
}

// TestRestrictedCertificate: it may work in its project, and is told what it may not do elsewhere.
func TestRestrictedCertificate(t *testing.T) {
	t.Parallel()
	reallxd.Need(t)
	restricted(t, reallxd.Unix(t), os.Getenv("TRANSPORT_LXD_ADDR"), os.Getenv("TRANSPORT_LXD_IMAGE"), reallxd.Instance(t), "LXD 5.", "")
}

func TestRestrictedCertificateOnIncus(t *testing.T) {
	t.Parallel()
	servers, instance := reallxd.Incus(t)
	restricted(t, servers[0], os.Getenv("TRANSPORT_INCUS_ADDR"), os.Getenv("TRANSPORT_INCUS_IMAGE"), instance, "Incus ", "")
}

// A restricted identity may not ask for the cluster's members. Others may have been started again just now: the instance is not made on one of them.
func TestRestrictedCertificateOnCluster(t *testing.T) {
	t.Parallel()
	members := reallxd.Cluster(t)
	restricted(t, members[0].Unix(t), members[0].Addr, os.Getenv("TRANSPORT_CLUSTER_IMAGE"), members[2].Instance, "LXD 5.", "&target="+members[0].Name)
}

func restricted(t *testing.T, server lxd.InstanceServer, address, image, outside, product, target string) {
	t.Helper()
	ctx := soon(t)
	project := "restricted-" + strings.ToLower(rand.Text()[:6])
	reallxd.Do(t, server, http.MethodPost, "/1.0/projects", api.ProjectsPost{Name: project, ProjectPut: api.ProjectPut{
		Config: map[string]string{"features.images": "false", "features.profiles": "false"},
	}})
	defer reallxd.Do(t, server, http.MethodDelete, "/1.0/projects/"+project, nil)
	reallxd.Do(t, server, http.MethodPost, "/1.0/instances?project="+project+target, api.InstancesPost{Name: "inside", Source: api.InstanceSource{Type: "image", Alias: image}})
	defer reallxd.Do(t, server, http.MethodDelete, "/1.0/instances/inside?project="+project, nil)
	change := func(action string) {
		reallxd.Do(t, server, http.MethodPut, "/1.0/instances/inside/state?project="+project, api.InstanceStatePut{Action: action, Force: true, Timeout: 30})
	}
	change("start")
	defer change("stop")
	c, err := transport.Enroll(ctx, address, tokenFrom(t, server, map[string]any{"name": project, "restricted": true, "projects": []string{project}}), nil)
	require.NoError(t, err)
	defer distrust(t, server, c)

	opts := c.Options()
	opts.Project = project
	host, err := transport.DialLXD(ctx, c.Address, "inside", opts)
	works(t, host, err)
	opts.Project = "default"
	host, err = transport.DialLXD(ctx, c.Address, outside, opts)
	require.NoError(t, err)
	defer host.Close()
	for what, err := range map[string]error{
		"exec":     host.Exec(ctx, transport.Command{Args: []string{"true"}}),
		"upload":   host.Upload(ctx, "/root/x", strings.NewReader("x"), nil),
		"download": host.Download(ctx, "/etc/passwd", io.Discard, nil),
	} {
		assert.ErrorIs(t, err, transport.ErrUnauthorized, what)
		assert.ErrorContains(t, err, product, what)
		assert.ErrorContains(t, err, `instance "`+outside+`" in project "default"`, what)
		if what == "exec" {
			assert.ErrorIs(t, err, transport.ErrNotStarted)
			t.Log(err)
		}
	}
}

// tokenFrom gets a token for a new client. It is made of the operation that waits for its use, as the servers' own commands do.
func tokenFrom(t *testing.T, server lxd.InstanceServer, client map[string]any) string {
	t.Helper()
	client["type"], client["token"] = "client", true
	resp, _, err := server.RawQuery(http.MethodPost, "/1.0/certificates", client, "")
	require.NoError(t, err)
	op, err := resp.MetadataAsOperation()
	require.NoError(t, err)
	token, err := json.Marshal(map[string]any{
		"client_name": client["name"], "fingerprint": op.Metadata["fingerprint"], "addresses": op.Metadata["addresses"], "secret": op.Metadata["secret"],
		"expires_at": "0001-01-01T00:00:00Z",
	})
	require.NoError(t, err)
	return base64.StdEncoding.EncodeToString(token)
}

// distrust ends the trust in a client.
func distrust(t *testing.T, server lxd.InstanceServer, c *transport.Credentials) {
	t.Helper()
	block, _ := pem.Decode([]byte(c.ClientCert))
	sum := sha256.Sum256(block.Bytes)
	reallxd.Do(t, server, http.MethodDelete, "/1.0/certificates/"+hex.EncodeToString(sum[:]), nil)
}

func TestEnrollOnIncus(t *testing.T) {
	servers, instance := reallxd.Incus(t)
	ctx := soon(t)
	token := tokenFrom(t, servers[0], map[string]any{"name": "enroll-" + strings.ToLower(rand.Text()[:6])})
	dir := filepath.Join(t.TempDir(), "credentials")
	c, err := transport.Enroll(ctx, os.Getenv("TRANSPORT_INCUS_ADDR"), token, &transport.EnrollOptions{Dir: dir})
	require.NoError(t, err)
	defer distrust(t, servers[0], c)
	host, err := transport.DialLXD(ctx, c.Address, instance, c.Options())
	works(t, host, err)
	_, err = transport.Enroll(ctx, c.Address, token, &transport.EnrollOptions{Dir: dir})
	assert.NoError(t, err, "again")
	_, err = transport.Enroll(ctx, c.Address, token, nil)
	assert.ErrorIs(t, err, transport.ErrUnauthorized, "it has been used")
	assert.NotContains(t, err.Error(), token)
}

// TestEnrollBadFiles: what is in the directory is not used, or replaced, where it is not fit for use, and nobody is asked.
func TestEnrollBadFiles(t *testing.T) {
	t.Parallel()
	s := fakeServer(t, true)
	token := base64.StdEncoding.EncodeToString([]byte(`{"client_name":"x","fingerprint":"` + strings.Repeat("0", 64) + `","addresses":["127.0.0.1:1"],"secret":"s"}`))
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")
	for want, spoil := range map[string]func() error{
		"can be read by others": func() error { return os.Chmod(key, 0o640) },
		"is encrypted": func() error {
			return os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")}), 0o600)
		},
		"no such file": func() error { return os.Remove(key) },
	} {
		if want == "can be read by others" && runtime.GOOS == "windows" {
			continue
		}
		require.NoError(t, os.WriteFile(cert, []byte(s.ClientCert), 0o644))
		require.NoError(t, os.WriteFile(key, []byte(s.ClientKey), 0o600))
		require.NoError(t, os.Chmod(key, 0o600))
		require.NoError(t, spoil())
		_, err := transport.Enroll(soon(t), s.URL, token, &transport.EnrollOptions{Dir: dir})
		assert.ErrorContains(t, err, want)
		assert.ErrorContains(t, err, key)
	}
	assert.Empty(t, s.Requests())
}

// TestClusterEntry: the member at the connection's address is gone, or hangs; another takes its place.
func TestClusterEntry(t *testing.T) {
	t.Parallel()
	s := fakeServer(t, true)
	u, err := url.Parse(s.URL)
	require.NoError(t, err)
	hang, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, says nothing
	require.NoError(t, err)
	defer hang.Close()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, gone.Close())
	for _, entry := range []string{hang.Addr().String(), gone.Addr().String()} {
		opts := options(s)
		opts.ClusterAddresses = []string{u.Host}
		host, err := transport.DialLXD(soon(t), "https://"+entry, "c1", opts)
		works(t, host, err)
	}
	_, err = transport.DialLXD(soon(t), "https://"+gone.Addr().String(), "c1", options(s))
	assert.ErrorContains(t, err, gone.Addr().String())
}
