// Package reallxd finds the LXD that scripts/lxd runs, for tests and benchmarks.
package reallxd

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"
)

// Server is one way to the server.
type Server struct {
	Name string // unix or https
	lxd.InstanceServer
}

// Available reports whether the environment names a server.
func Available() bool { return os.Getenv("TRANSPORT_LXD_SOCKET") != "" }

// Need skips the test where there is no server, or fails it if REQUIRE_LXD is set.
func Need(t testing.TB) {
	t.Helper()
	if Available() {
		return
	}
	if os.Getenv("REQUIRE_LXD") != "" {
		t.Fatal(`REQUIRE_LXD is set, but there is no LXD: scripts/lxd up && eval "$(scripts/lxd env)"`)
	}
	t.Skip(`needs a real LXD: scripts/lxd up && eval "$(scripts/lxd env)"`)
}

// Servers returns the ways to the server, new connections each time.
func Servers(t testing.TB) []Server {
	t.Helper()
	Need(t)
	return []Server{{"unix", Unix(t)}, {"https", HTTPS(t)}}
}

// Unix connects over the socket.
func Unix(t testing.TB) lxd.InstanceServer {
	t.Helper()
	s, err := lxd.ConnectLXDUnix(os.Getenv("TRANSPORT_LXD_SOCKET"), nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// HTTPS connects with the client certificate.
func HTTPS(t testing.TB) lxd.InstanceServer {
	t.Helper()
	s, err := lxd.ConnectLXD(os.Getenv("TRANSPORT_LXD_ADDR"), &lxd.ConnectionArgs{
		TLSClientCert: File(t, "TRANSPORT_LXD_CERT"),
		TLSClientKey:  File(t, "TRANSPORT_LXD_KEY"),
		TLSServerCert: File(t, "TRANSPORT_LXD_SERVER_CERT"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// File returns the content of the file that an environment variable names.
func File(t testing.TB, variable string) string {
	t.Helper()
	b, err := os.ReadFile(os.Getenv(variable))
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return string(b)
}

var shared struct {
	sync.Mutex
	name string
}

// Instance returns the name of a running instance that the tests of this process share. CleanUp deletes it.
func Instance(t testing.TB) string {
	t.Helper()
	Need(t)
	shared.Lock()
	defer shared.Unlock()
	if shared.name == "" {
		s := Unix(t)
		shared.name = Create(t, s)
		Start(t, s, shared.name)
	}
	return shared.name
}

// CleanUp deletes the shared instance. TestMain calls it after the tests.
func CleanUp() error {
	shared.Lock()
	defer shared.Unlock()
	if shared.name == "" {
		return nil
	}
	s, err := lxd.ConnectLXDUnix(os.Getenv("TRANSPORT_LXD_SOCKET"), nil)
	if err != nil {
		return err
	}
	if err := setState(s, shared.name, "stop"); err != nil {
		return err
	}
	return do(s, http.MethodDelete, "/1.0/instances/"+shared.name, nil)
}

// Create makes a stopped instance from the image that the environment names.
func Create(t testing.TB, s lxd.InstanceServer) string {
	t.Helper()
	name := "t" + strings.ToLower(rand.Text()[:10])
	err := do(s, http.MethodPost, "/1.0/instances", api.InstancesPost{
		Name:   name,
		Source: api.InstanceSource{Type: "image", Alias: os.Getenv("TRANSPORT_LXD_IMAGE")},
	})
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// Start starts an instance.
func Start(t testing.TB, s lxd.InstanceServer, name string) { state(t, s, name, "start") }

// Stop stops an instance by force.
func Stop(t testing.TB, s lxd.InstanceServer, name string) { state(t, s, name, "stop") }

// Freeze freezes a running instance.
func Freeze(t testing.TB, s lxd.InstanceServer, name string) { state(t, s, name, "freeze") }

// Delete deletes a stopped instance.
func Delete(t testing.TB, s lxd.InstanceServer, name string) {
	t.Helper()
	if err := do(s, http.MethodDelete, "/1.0/instances/"+name, nil); err != nil {
		t.Error(err)
	}
}

func state(t testing.TB, s lxd.InstanceServer, name, action string) {
	t.Helper()
	if err := setState(s, name, action); err != nil {
		t.Fatal(err)
	}
}

func setState(s lxd.InstanceServer, name, action string) error {
	return do(s, http.MethodPut, "/1.0/instances/"+name+"/state", api.InstanceStatePut{Action: action, Force: true, Timeout: 30})
}

// do sends a request and waits for its operation, without the events socket that the client's own calls leave open.
func do(s lxd.InstanceServer, method, path string, body any) error {
	resp, _, err := s.RawQuery(method, path, body, "")
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	var op api.Operation
	if err := json.Unmarshal(resp.Metadata, &op); err != nil || resp.Type != api.AsyncResponse {
		return err
	}
	resp, _, err = s.RawQuery(http.MethodGet, "/1.0/operations/"+op.ID+"/wait", nil, "")
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if err := json.Unmarshal(resp.Metadata, &op); err != nil || op.Err != "" {
		return fmt.Errorf("%s %s: %s (%w)", method, path, op.Err, err)
	}
	return nil
}
