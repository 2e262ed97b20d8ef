package transport

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/canonical/lxd/shared/api"

	"github.com/lxdtransport/transport/internal/clientconfig"
)

// Credentials are what a client needs for a server that trusts it.
type Credentials struct {
	Address               string // https://host:port
	ClientCert, ClientKey string // PEM
	ServerCert            string // PEM
}

// Options returns options for [DialLXD] with the credentials.
func (c *Credentials) Options() *LXDOptions {
	return &LXDOptions{TLSClientCert: c.ClientCert, TLSClientKey: c.ClientKey, TLSServerCert: c.ServerCert}
}

// EnrollOptions are the options of [Enroll]; nil means all defaults.
type EnrollOptions struct {
	// Dir is a directory for client.crt, client.key and server.crt, which is created if it is missing. What is there already is used, and nothing in it is
	// overwritten but server.crt. Several processes may enroll into it at once, with one token: they get the same pair. "": nothing is stored, and
	// every call makes a new key, unless Client has one.
	Dir string

	// Client has a certificate and a key to enroll instead of those of Dir or new ones.
	Client *Credentials
}

// Enroll trades a one-time token, as `lxc config trust add` and `incus config trust add` print it on the server, for the server's trust in a
// client certificate. It makes a key pair if there is none. The server's certificate has to be the one that the token names: nothing is sent
// before that was checked. address is https://host:port; "" tries the addresses in the token.
//
// It may be called again with the same Dir: where the server trusts the certificate already the token is not used, and may be "". ctx bounds the
// whole. A token that was used or has expired is [ErrUnauthorized]. The token is in no error.
func Enroll(ctx context.Context, address, token string, opts *EnrollOptions) (*Credentials, error) {
	if opts == nil {
		opts = new(EnrollOptions)
	}
	c, err := enroll(ctx, address, token, opts)
	if err != nil {
		return nil, fmt.Errorf("transport: enroll: %w", err)
	}
	return c, nil
}

func enroll(ctx context.Context, address, token string, opts *EnrollOptions) (*Credentials, error) {
	t := new(api.CertificateAddToken)
	if token = strings.TrimSpace(token); token != "" {
		if b, err := base64.StdEncoding.DecodeString(token); err != nil || json.Unmarshal(b, t) != nil || t.Fingerprint == "" || t.Secret == "" {
			return nil, errors.New("the token is none: it has to be the one line of base64 that `lxc config trust add` prints")
		}
	}
	c, err := opts.pair(t.ClientName)
	if err != nil {
		return nil, err
	}
	addresses := []string{address}
	if address == "" {
		addresses = nil
		for _, a := range t.Addresses {
			addresses = append(addresses, "https://"+a)
		}
	}
	if addresses == nil {
		return nil, errors.New("neither address nor token says where the server is")
	}
	pins := &LXDOptions{TLSClientCert: c.ClientCert, TLSClientKey: c.ClientKey, ServerFingerprint: t.Fingerprint}
	if t.Fingerprint == "" {
		if c.ServerCert == "" {
			return nil, errors.New("there is no token, and no certificate of the server from an earlier time")
		}
		pins.TLSServerCert = c.ServerCert
	}
	var errs []error
	for _, a := range addresses {
		c.Address = strings.TrimSuffix(a, "/")
		err := c.enroll(ctx, token, t.ClientName, pins)
		if err == nil {
			return c, opts.store(c)
		}
		errs = append(errs, fmt.Errorf("%s: %w", c.Address, err))
		if errors.Is(err, ErrUnauthorized) || ctx.Err() != nil {
			break // the token is used up, or the time
		}
	}
	return nil, errors.Join(errs...)
}

// pair finds the client's key pair, or makes one.
func (o *EnrollOptions) pair(name string) (*Credentials, error) {
	c := new(Credentials)
	if o.Client != nil {
		*c = *o.Client
	}
	if o.Dir != "" {
		if b, err := os.ReadFile(filepath.Join(o.Dir, "server.crt")); err == nil && c.ServerCert == "" {
			c.ServerCert = string(b)
		}
	}
	if c.ClientCert != "" {
		return c, nil
	}
	var err error
	if o.Dir != "" {
		c.ClientCert, c.ClientKey, err = storedPair(o.Dir, name)
	} else if c.ClientKey, err = newKey(); err == nil {
		c.ClientCert, err = newCert(c.ClientKey, name)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// storedPair finds the pair in a directory, or makes one there. Of several that do so at once, whichever is first has made the key, then
// whichever is first a certificate for it, and all have the same pair. One that ends half way leaves a key, which is used the next time.
func storedPair(dir, name string) (cert, key string, err error) {
	certFile, keyFile := filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")
	if cert, key, err = clientconfig.Pair(certFile, keyFile); err != nil || cert != "" {
		return cert, key, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", "", err
	}
	if key, err = newKey(); err != nil {
		return "", "", err
	}
	if err := write(keyFile, key, 0o600, renameNew); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", "", err
	}
	if key, err = clientconfig.Key(keyFile); err != nil {
		return "", "", err
	}
	if cert, err = newCert(key, name); err != nil {
		return "", "", fmt.Errorf("%s: %w", keyFile, err)
	}
	if err := write(certFile, cert, 0o644, renameNew); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", "", err
	}
	return clientconfig.Pair(certFile, keyFile)
}

func (o *EnrollOptions) store(c *Credentials) error {
	if o.Dir == "" {
		return nil
	}
	file := filepath.Join(o.Dir, "server.crt")
	if b, err := os.ReadFile(file); err == nil && string(b) == c.ServerCert {
		return nil
	}
	return write(file, c.ServerCert, 0o644, os.Rename)
}

// write makes a file at once: rename gives it its name when it is whole.
func write(name, content string, mode fs.FileMode, rename func(from, to string) error) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".transport-*.tmp")
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// newKey makes a key like that of LXD's own client.
func newKey() (string, error) {
	private, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return "", err
	}
	k, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k})), nil
}

// newCert makes a certificate for a key, signed by itself, as LXD's own client does.
func newCert(key, name string) (string, error) {
	private, err := parseKey(key)
	if err != nil {
		return "", err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		return "", err
	}
	if name == "" {
		name = "transport"
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name, Organization: []string{"transport"}},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0), // clocks differ
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), nil
}

// parseKey takes the forms in which openssl, lxc and incus write keys.
func parseKey(key string) (crypto.Signer, error) {
	block, _ := pem.Decode([]byte(key))
	if block == nil {
		return nil, errors.New("it is not a key in PEM")
	}
	if k, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
		return k, nil
	}
	if k, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return k, nil
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	signer, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T signs nothing", k)
	}
	return signer, nil
}

// enroll asks one address for trust.
func (c *Credentials) enroll(ctx context.Context, token, name string, pins *LXDOptions) error {
	u, err := url.Parse(c.Address)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return errors.New("the address is not of the form https://host:port")
	}
	if u.Port() == "" {
		u.Host = net.JoinHostPort(u.Hostname(), "8443")
		c.Address = u.String()
	}
	config, err := pins.tlsConfig(&tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}) // the pin is stricter
	if err != nil {
		return err
	}
	client := &http.Client{
		Transport:     &http.Transport{TLSClientConfig: config, Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: connectTimeout},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	defer client.CloseIdleConnections()
	ask := func(method, path string, body, out any) error {
		var content io.Reader
		if body != nil {
			b, err := json.Marshal(body)
			if err != nil {
				return err
			}
			content = bytes.NewReader(b)
		}
		ctx, cancel := within(ctx, connectTimeout)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, method, c.Address+path, content)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return (&restClient{base: c.Address}).explainDial(err)
		}
		c.ServerCert = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: resp.TLS.PeerCertificates[0].Raw}))
		return decode(resp, out)
	}
	var info serverInfo
	if err := ask(http.MethodGet, "/1.0", nil, &info); err != nil {
		return err
	}
	if info.Auth == "trusted" {
		return nil
	}
	if token == "" {
		return fmt.Errorf("%s does not trust the certificate, and there is no token: %w", info.product(), ErrUnauthorized)
	}
	// LXD before explicit_trust_token knows the password only, and Incus, which has no such extension and does not say who it is before it
	// trusts, the token only. Both ignore what they do not know.
	post := map[string]string{"type": "client", "name": name, "trust_token": token}
	if !slices.Contains(info.Extensions, "explicit_trust_token") {
		post["password"] = token
	}
	if err := ask(http.MethodPost, "/1.0/certificates", post, nil); err != nil {
		no, said := errors.AsType[*apiError](err)
		// Another process with the same pair and token may have been faster, and its certificate is trusted a moment after its token is used.
		for n := 0; said && n < 4 && ctx.Err() == nil; n++ {
			if ask(http.MethodGet, "/1.0", nil, &info) == nil && info.Auth == "trusted" {
				return nil
			}
			pause(ctx, askPause)
		}
		if said && no.code < http.StatusInternalServerError {
			return &causes{text: fmt.Sprintf("%s refuses the token, which may have been used or have expired (`lxc config trust add` makes a new one): %v", info.product(), err), errs: []error{ErrUnauthorized, err}}
		}
		return err
	}
	info = serverInfo{}
	if err := ask(http.MethodGet, "/1.0", nil, &info); err != nil {
		return err
	}
	if info.Auth != "trusted" {
		return fmt.Errorf("%s took the token, but does not trust the certificate: %w", info.product(), ErrUnauthorized)
	}
	return nil
}
