package lxdtest_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/lxdtest"
)

// TestTraces has every conversation with the fake alone. What it expects was seen on LXD 5.0.2. Where there is an LXD, TestDifferential has them all, too, and one
// of the two ways will do here.
func TestTraces(t *testing.T) {
	t.Parallel()
	ways := map[string]bool{"unix": false, "https": true}
	if reallxd.Available() {
		oneWay(ways)
	}
	for name, https := range ways {
		for _, c := range scenarios {
			t.Run(name+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				w := fakeWire(t, c.fake(t, lxdtest.LXD50, "c1", https), "c1")
				c.do(w)
				if w.transcript() == "" {
					t.Skip("it is not to be had here")
				}
				w.expect(c.want)
			})
		}
	}
}

// expect finds the parts in the transcript, in this order.
func (w *wire) expect(parts []string) {
	w.t.Helper()
	rest := w.transcript()
	for _, want := range parts {
		_, after, ok := strings.Cut(rest, want)
		require.True(w.t, ok, "%s is missing behind what has been found:\n%s\nin:\n%s", want, rest, w.transcript())
		rest = after
	}
}

// fakeFor is a server like LXD 5.0.2, but quicker, with one instance that runs commands of this machine.
func fakeFor(t testing.TB, instance string) *lxdtest.Server {
	return scenario{}.fake(t, lxdtest.LXD50, instance, false)
}

// fake is fakeFor for a conversation.
func (c scenario) fake(t testing.TB, version lxdtest.Version, instance string, https bool) *lxdtest.Server {
	s := lxdtest.NewUnstartedServer()
	s.Handler = lxdtest.LocalCommands("")
	s.Version = version
	s.Images = []string{"model"}
	s.AddInstance(lxdtest.Instance{Name: instance})
	if c.name == "files that the kernel makes up" {
		s.AddInstance(lxdtest.Instance{Name: instance + "k", Root: "/"})
	}
	quick(&s.Version)
	c.hurry(&s.Version)
	if https {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s
}

// TestDifferential has every conversation with the fake and with a real LXD 5.0 and compares the
// transcripts line by line, over the unix socket and over HTTPS.
func TestDifferential(t *testing.T) {
	differs(t, lxdtest.LXD50, map[string]*wire{"unix": realUnix(t), "https": realTLS(t)})
}

// TestDifferentialOnIncus is TestDifferential for the Incus that scripts/incus runs, where it is a release that the fake knows: over the unix socket or
// over HTTPS, by chance, or with TRANSPORT_SLOW_TESTS=1 both. It is for a machine that does nothing else: Incus gives what a command has left behind one second.
func TestDifferentialOnIncus(t *testing.T) {
	version, ways := realIncus(t)
	oneWay(ways)
	differs(t, version, ways)
}

// oneWay leaves one of the ways, by chance, or with TRANSPORT_SLOW_TESTS=1 both.
func oneWay[T any](ways map[string]T) {
	if os.Getenv("TRANSPORT_SLOW_TESTS") == "" {
		delete(ways, []string{"unix", "https"}[rand.IntN(2)])
	}
}

// realIncus are wires to the Incus that scripts/incus runs, and what the fake calls its release.
func realIncus(t *testing.T) (lxdtest.Version, map[string]*wire) {
	reallxd.NeedIncus(t)
	variable := func(name string) string { return os.Getenv(strings.Replace(name, "_LXD_", "_INCUS_", 1)) }
	ways := map[string]*wire{"unix": unixWire(t, variable), "https": tlsWire(t, variable)}
	_, b := ways["unix"].get("GET", "/1.0", "", "")
	require.NotEmpty(t, b, "Incus does not answer")
	for _, v := range []lxdtest.Version{lxdtest.Incus6, lxdtest.Incus7} {
		if strings.Contains(string(b), `"server_version":"`+v.Release+`"`) {
			for _, w := range ways {
				w.headers = v.HeaderPrefix
			}
			return v, ways
		}
	}
	t.Skipf("lxdtest does not know this release: %s", b)
	return lxdtest.Version{}, nil
}

// differs has every conversation with the fake and with the real server.
func differs(t *testing.T, version lxdtest.Version, ways map[string]*wire) {
	for name, real := range ways {
		ownInstance(real, "", "")
		t.Run(name, func(t *testing.T) {
			for _, c := range scenarios {
				t.Run(c.name, func(t *testing.T) {
					if c.slow() && os.Getenv("TRANSPORT_SLOW_TESTS") == "" {
						t.Skip("set TRANSPORT_SLOW_TESTS to have it")
					}
					if version.Name == lxdtest.Incus7.Name && c.name == "a signal in an instance that is frozen" {
						t.Skip("with version 2 of cgroups, which newer LXC uses, the kernel ends what is frozen by a signal that it does not catch")
					}
					if !c.alone() {
						t.Parallel()
					}
					f := fakeWire(t, c.fake(t, version, real.instance, real.socket == ""), real.instance)
					c.do(f)
					// The real server does not wait longer than 5 s for a client that a busy machine has kept from dialling: that is no difference.
					// Nor is what it does by chance once in hundreds of times, such as an operation that fails because its connection was cut before
					// a good-bye could be said on it: it does not do so again and again.
					for tries := 1; ; tries++ {
						a := &attempt{TB: t}
						w := real.of(real.instance)
						w.t = a
						failure := a.run(func() { c.do(w) })
						if differs := failure != "" || w.transcript() != f.transcript(); differs && (tries < 3 || w.late && tries < 5) {
							t.Logf("again: %s\n%s", failure, w.transcript())
							continue
						}
						require.Empty(t, failure)
						require.Equal(t, w.transcript(), f.transcript(), "expected is the real server's")
						break
					}
				})
			}
		})
	}
}

// realUnix is a wire to the server that the environment names. It skips the test, or with REQUIRE_LXD=1 fails it, if there
// is none.
func realUnix(t *testing.T) *wire {
	fromEnvironment(t, "TRANSPORT_LXD_SOCKET")
	return unixWire(t, os.Getenv)
}

// realTLS is realUnix over HTTPS.
func realTLS(t *testing.T) *wire {
	fromEnvironment(t, "TRANSPORT_LXD_ADDR")
	return tlsWire(t, os.Getenv)
}

// unixWire is a wire to the server that the variables describe.
func unixWire(t *testing.T, variable func(name string) string) *wire {
	return &wire{t: t, socket: variable("TRANSPORT_LXD_SOCKET"), instance: fmt.Sprintf("lxdtest-%d", os.Getpid()), image: variable("TRANSPORT_LXD_IMAGE"), headers: "X-LXD-"}
}

// tlsWire is unixWire over HTTPS.
func tlsWire(t *testing.T, variable func(name string) string) *wire {
	pool := x509.NewCertPool()
	pem, err := os.ReadFile(variable("TRANSPORT_LXD_SERVER_CERT"))
	require.NoError(t, err)
	pool.AppendCertsFromPEM(pem)
	pair, err := tls.LoadX509KeyPair(variable("TRANSPORT_LXD_CERT"), variable("TRANSPORT_LXD_KEY"))
	require.NoError(t, err)
	config := &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}, ServerName: "127.0.0.1"}
	address := strings.TrimPrefix(variable("TRANSPORT_LXD_ADDR"), "https://")
	return &wire{t: t, address: address, tls: config, instance: fmt.Sprintf("lxdtests-%d", os.Getpid()), image: variable("TRANSPORT_LXD_IMAGE"), headers: "X-LXD-"}
}

func fromEnvironment(t *testing.T, variable string) {
	if os.Getenv(variable) == "" {
		if os.Getenv("REQUIRE_LXD") == "1" {
			t.Fatalf("%s is not set: run scripts/lxd up", variable)
		}
		t.Skip("there is no LXD to compare with: run scripts/lxd up and set what it prints")
	}
}

// TestDifferentialTrust compares what clients over HTTPS are told that the server does and does not know.
func TestDifferentialTrust(t *testing.T) {
	real := realTLS(t)
	s := lxdtest.NewTLSServer()
	t.Cleanup(s.Close)
	fake := s.ClientTLS()
	for _, known := range []bool{true, false} {
		t.Run(fmt.Sprintf("known %v", known), func(t *testing.T) {
			transcripts := [2]string{}
			for n, w := range []*wire{{t: t, address: real.address, tls: real.tls.Clone(), instance: "nobody", headers: real.headers}, fakeWire(t, s, "nobody")} {
				if n == 1 {
					w.tls = fake.Clone()
				}
				if !known {
					w.tls.Certificates = nil
				}
				for _, path := range []string{"/", "/1.0/instances/nobody", "/1.0/operations/x", "/1.0/operations/x/websocket?secret=x", "/1.0/instances/nobody/files?path=/x", "/nonsense"} {
					w.do("GET", path, "", "")
				}
				w.do("POST", "/1.0/instances/nobody/exec", "", `{"command":["true"]}`)
				_, b := w.get("GET", "/1.0", "", "")
				var a struct {
					Metadata map[string]any `json:"metadata"`
				}
				require.NoError(t, json.Unmarshal(b, &a))
				for _, k := range []string{"auth", "api_status", "api_version", "public", "auth_methods", "api_extensions"} {
					w.note("%s: %v", k, a.Metadata[k])
				}
				_, env := a.Metadata["environment"]
				w.note("environment: %v", env)
				w.tls.NextProtos = []string{"h2", "http/1.1"}
				c, err := w.dial(t.Context())
				require.NoError(t, err)
				st := c.(*tls.Conn).ConnectionState()
				w.note("TLS %x, protocol %q", st.Version, st.NegotiatedProtocol)
				c.Close()
				transcripts[n] = w.transcript()
			}
			require.Equal(t, transcripts[0], transcripts[1], "expected is the real server's")
		})
	}
}
