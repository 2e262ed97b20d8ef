package transport_test

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
)

// A tokenServer trusts the certificate that comes with a token, which it takes once. As LXD does, it trusts a moment after it took the
// token: here, where several are expected, when the next has been refused.
type tokenServer struct {
	*httptest.Server
	several bool

	mu      sync.Mutex
	tokens  map[string]bool // true: it was taken
	trusted map[string]bool // fingerprints
	refused map[string]chan struct{}
}

func newTokenServer(t *testing.T, several bool) *tokenServer {
	t.Helper()
	s := &tokenServer{several: several, tokens: map[string]bool{}, trusted: map[string]bool{}, refused: map[string]chan struct{}{}}
	s.Server = httptest.NewUnstartedServer(s)
	s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS13}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// token makes one.
func (s *tokenServer) token(secret string) string {
	sum := sha256.Sum256(s.Certificate().Raw)
	token := base64.StdEncoding.EncodeToString(fmt.Appendf(nil, `{"client_name":"x","fingerprint":%q,"secret":%q}`, hex.EncodeToString(sum[:]), secret))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens[token], s.refused[token] = false, make(chan struct{})
	return token
}

func (s *tokenServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	sum := sha256.Sum256(r.TLS.PeerCertificates[0].Raw)
	who := hex.EncodeToString(sum[:])
	if r.Method == http.MethodGet {
		s.mu.Lock()
		defer s.mu.Unlock()
		auth := "untrusted"
		if s.trusted[who] {
			auth = "trusted"
		}
		fmt.Fprintf(w, `{"type":"sync","metadata":{"auth":%q,"api_extensions":["explicit_trust_token"]}}`, auth)
		return
	}
	var post struct {
		Token string `json:"trust_token"`
	}
	err := json.NewDecoder(r.Body).Decode(&post)
	s.mu.Lock()
	taken, known := s.tokens[post.Token]
	refused := s.refused[post.Token]
	s.tokens[post.Token] = true
	s.mu.Unlock()
	if err != nil || !known || taken {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, `{"type":"error","error":"not authorized","error_code":403}`)
		if known {
			s.mu.Lock()
			defer s.mu.Unlock()
			select {
			case <-refused:
			default:
				close(refused)
			}
		}
		return
	}
	if s.several {
		select {
		case <-refused:
		case <-r.Context().Done():
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trusted[who] = true
	fmt.Fprint(w, `{"type":"sync"}`)
}

// TestEnrollManyAtOnce: many who enroll into one new directory at once, with one token, have one and the same pair, which the server trusts.
func TestEnrollManyAtOnce(t *testing.T) {
	t.Parallel()
	s := newTokenServer(t, true)
	for round := range 10 {
		dir := filepath.Join(t.TempDir(), "new", "directory")
		token := s.token(fmt.Sprint("secret", round))
		ctx := soon(t)
		const many = 8
		got, errs := make([]*transport.Credentials, many), make([]error, many)
		var all sync.WaitGroup
		for i := range many {
			all.Go(func() {
				got[i], errs[i] = transport.Enroll(ctx, s.URL, token, &transport.EnrollOptions{Dir: dir})
			})
		}
		all.Wait()
		for i := range many {
			require.NoError(t, errs[i])
			assert.Equal(t, got[0], got[i])
		}
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key"))
		require.NoError(t, err)
		sum := sha256.Sum256(pair.Certificate[0])
		s.mu.Lock()
		assert.True(t, s.trusted[hex.EncodeToString(sum[:])])
		assert.Len(t, s.trusted, round+1, "nobody else's")
		s.mu.Unlock()
		files, err := os.ReadDir(dir)
		require.NoError(t, err)
		assert.Len(t, files, 3, "client.crt, client.key, server.crt")
	}
}

// TestEnrollEndedHalfWay: a key that is there without a certificate, of a process that was killed between the two or of the user's, gets one, and
// is not replaced.
func TestEnrollEndedHalfWay(t *testing.T) {
	t.Parallel()
	s := newTokenServer(t, false)
	dir := t.TempDir()
	ec := fakeServer(t, true).ClientKey
	require.NoError(t, os.WriteFile(filepath.Join(dir, "client.key"), []byte(ec), 0o600))
	c, err := transport.Enroll(soon(t), s.URL, s.token("once"), &transport.EnrollOptions{Dir: dir})
	require.NoError(t, err)
	assert.Equal(t, ec, c.ClientKey)
	_, err = tls.X509KeyPair([]byte(c.ClientCert), []byte(c.ClientKey))
	assert.NoError(t, err)
}
