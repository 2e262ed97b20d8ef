package lxdtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// StartTLS listens on the loopback interface with TLS 1.3. Server and client
// certificate are made for this server alone. As a real daemon does, it takes any
// client certificate in the handshake and compares fingerprints at each request.
func (s *Server) StartTLS() {
	now := time.Now()
	server, serverPEM, _ := certificate("server", now)
	clientPair, clientPEM, keyPEM := certificate("client", now)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(fmt.Sprintf("lxdtest: %v", err))
	}
	s.ServerCert, s.ClientCert, s.ClientKey = serverPEM, clientPEM, keyPEM
	s.Trust(clientPair.Leaf)
	config := &tls.Config{
		Certificates: []tls.Certificate{server},
		ClientAuth:   tls.RequestClientCert,
		MinVersion:   tls.VersionTLS13,
		// A client that offers HTTP/2 gets it, as from a real daemon, and then no WebSocket.
		NextProtos: []string{"h2", "http/1.1"},
	}
	url := "https://" + l.Addr().String()
	s.serve(tls.NewListener(&trackingListener{Listener: l, s: s}, config), url)
	s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: s.ClientTLS()}}
}

// Certificate is the server's certificate, nil without TLS.
func (s *Server) Certificate() *x509.Certificate {
	block, _ := pem.Decode([]byte(s.ServerCert))
	if block == nil {
		return nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	return cert
}

// ClientTLS is a configuration for clients: it pins the server's certificate and
// has the client's.
func (s *Server) ClientTLS() *tls.Config {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(s.ServerCert))
	config := &tls.Config{RootCAs: pool, NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS13}
	if pair, err := tls.X509KeyPair([]byte(s.ClientCert), []byte(s.ClientKey)); err == nil {
		config.Certificates = []tls.Certificate{pair}
	}
	return config
}

// Trust adds a client certificate to those that the server trusts.
func (s *Server) Trust(cert *x509.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trusted[fingerprint(cert)] = true
}

func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// identity is who asks, and whether the server trusts them.
func (s *Server) identity(r *http.Request) (who string, trusted bool) {
	if r.TLS == nil {
		return "unix", true
	}
	if len(r.TLS.PeerCertificates) == 0 {
		return "", false
	}
	who = fingerprint(r.TLS.PeerCertificates[0])
	s.mu.Lock()
	defer s.mu.Unlock()
	return who, s.trusted[who]
}

// certificate makes a self-signed pair like those that LXD makes for itself.
func certificate(name string, now time.Time) (pair tls.Certificate, certPEM, keyPEM string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(fmt.Sprintf("lxdtest: %v", err))
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(fmt.Sprintf("lxdtest: %v", err))
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"lxdtest"}, CommonName: name + "@lxdtest"},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		// The official client takes the first DNS name as the name to verify.
		DNSNames:              []string{"lxdtest"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(fmt.Sprintf("lxdtest: %v", err))
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		panic(fmt.Sprintf("lxdtest: %v", err))
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(fmt.Sprintf("lxdtest: %v", err))
	}
	pair = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	certPEM = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	keyPEM = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	return pair, certPEM, keyPEM
}

// WriteClientConfig writes a configuration for the lxc command into dir, which exists. Its
// only remote, and the default one, is called "fake":
//
//	LXD_CONF=dir lxc exec fake:c1 -- ls
func (s *Server) WriteClientConfig(dir string) error {
	address := s.URL
	if s.Socket != "" {
		address = "unix://" + s.Socket
	}
	files := map[string]string{"config.yml": "default-remote: fake\nremotes:\n  fake:\n    addr: " + address +
		"\n    auth_type: tls\n    protocol: lxd\n    public: false\naliases: {}\n"}
	if s.Socket == "" {
		files["client.crt"], files["client.key"] = s.ClientCert, s.ClientKey
		files["servercerts/fake.crt"] = s.ServerCert
	}
	for name, content := range files {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}
