package lxdtest_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/lxdtest"
)

// ways are those to a server: its unix socket, and HTTPS with a client certificate.
var ways = []string{"unix", "https"}

// TestTraces has every conversation with the fake alone. What it expects was seen on LXD 5.0.2.
func TestTraces(t *testing.T) {
	t.Parallel()
	for _, way := range ways {
		for _, c := range scenarios {
			t.Run(way+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				w := fakeWire(t, fakeFor(t, "c1", way), "c1")
				c.do(w)
				rest := w.transcript()
				for _, want := range c.want {
					_, after, ok := strings.Cut(rest, want)
					require.True(t, ok, "%s is missing behind what has been found:\n%s\nin:\n%s", want, rest, w.transcript())
					rest = after
				}
			})
		}
	}
}

// fakeFor is a server like LXD 5.0.2, but quicker, with one instance that runs commands of this machine.
func fakeFor(t testing.TB, instance, way string) *lxdtest.Server {
	s := lxdtest.NewUnstartedServer()
	s.Handler = lxdtest.LocalCommands("")
	s.Images = []string{os.Getenv("TRANSPORT_LXD_IMAGE")}
	s.AddInstance(lxdtest.Instance{Name: instance})
	quick(&s.Version)
	if way == "https" {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s
}

// TestDifferential has every conversation with the fake and with a real LXD 5.0 and compares the
// transcripts line by line.
func TestDifferential(t *testing.T) {
	for _, way := range ways {
		t.Run(way, func(t *testing.T) {
			real := realWire(t, way)
			for _, c := range scenarios {
				t.Run(c.name, func(t *testing.T) {
					// All SFTP sessions share one process on the real server, which nonsense can end.
					if !strings.HasPrefix(c.name, "SFTP") {
						t.Parallel()
					}
					w := &wire{t: t, socket: real.socket, address: real.address, tls: real.tls, instance: real.instance}
					f := fakeWire(t, fakeFor(t, w.instance, way), w.instance)
					done := make(chan struct{})
					go func() {
						defer close(done)
						c.do(w)
					}()
					c.do(f)
					<-done
					require.Equal(t, w.transcript(), f.transcript(), "expected is the real server's")
				})
			}
		})
	}
}

// realWire is a wire to the server that the environment names, with an instance of its own. It skips the
// test, or with REQUIRE_LXD=1 fails it, if there is none.
func realWire(t *testing.T, way string) *wire {
	w := &wire{t: t, instance: fmt.Sprintf("lxdtest-%d-%s", os.Getpid(), way)}
	if way == "https" {
		w.address, w.tls = realTLS(t)
	} else {
		w.socket = need(t, "TRANSPORT_LXD_SOCKET")
	}
	image := os.Getenv("TRANSPORT_LXD_IMAGE")
	wait := func(method, path, body string) {
		_, b := w.get(method, path, "", body)
		_, b = w.get("GET", "/1.0/operations/"+w.session(b).id+"/wait", "", "")
		require.Contains(t, string(b), `"status":"Success"`)
	}
	wait("POST", "/1.0/instances", `{"name":"`+w.instance+`","source":{"type":"image","alias":"`+image+`"}}`)
	t.Cleanup(func() {
		wait("PUT", "/1.0/instances/INSTANCE/state", `{"action":"stop","force":true}`)
		wait("DELETE", "/1.0/instances/INSTANCE", "")
	})
	wait("PUT", "/1.0/instances/INSTANCE/state", `{"action":"start"}`)
	return w
}

// need is a variable that scripts/lxd sets.
func need(t *testing.T, name string) string {
	value := os.Getenv(name)
	if value == "" {
		if os.Getenv("REQUIRE_LXD") == "1" {
			t.Fatalf("%s is not set: run scripts/lxd up", name)
		}
		t.Skip("there is no LXD to compare with: run scripts/lxd up and set what it prints")
	}
	return value
}

// realTLS is the address of the server that the environment names, and how it is met by a client that it trusts.
func realTLS(t *testing.T) (address string, config *tls.Config) {
	address = strings.TrimPrefix(need(t, "TRANSPORT_LXD_ADDR"), "https://")
	pool := x509.NewCertPool()
	pem, err := os.ReadFile(os.Getenv("TRANSPORT_LXD_SERVER_CERT"))
	require.NoError(t, err)
	pool.AppendCertsFromPEM(pem)
	pair, err := tls.LoadX509KeyPair(os.Getenv("TRANSPORT_LXD_CERT"), os.Getenv("TRANSPORT_LXD_KEY"))
	require.NoError(t, err)
	return address, &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}, ServerName: "127.0.0.1"}
}

// TestDifferentialTLS compares what clients over HTTPS are told that the server does and does not know.
func TestDifferentialTLS(t *testing.T) {
	address, trusted := realTLS(t)
	s := lxdtest.NewTLSServer()
	t.Cleanup(s.Close)
	fake := s.ClientTLS()
	for _, known := range []bool{true, false} {
		t.Run(fmt.Sprintf("known %v", known), func(t *testing.T) {
			transcripts := [2]string{}
			for n, w := range []*wire{{t: t, address: address, tls: trusted.Clone(), instance: "nobody"}, fakeWire(t, s, "nobody")} {
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
