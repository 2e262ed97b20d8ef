// Package reallxd finds the servers that scripts/lxd, scripts/cluster and scripts/incus run, for tests and benchmarks.
package reallxd

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

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
	need(t, "TRANSPORT_LXD_SOCKET", "REQUIRE_LXD", "LXD", "scripts/lxd")
}

func need(t testing.TB, variable, require, what, script string) {
	t.Helper()
	if os.Getenv(variable) != "" {
		return
	}
	if os.Getenv(require) != "" {
		t.Fatalf(`%s is set, but there is no %s: %s up && eval "$(%[3]s env)"`, require, what, script)
	}
	t.Skipf(`needs a real %s: %s up && eval "$(%[2]s env)"`, what, script)
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
	return unix(t, os.Getenv("TRANSPORT_LXD_SOCKET"))
}

// HTTPS connects with the client certificate.
func HTTPS(t testing.TB) lxd.InstanceServer {
	t.Helper()
	return https(t, os.Getenv("TRANSPORT_LXD_ADDR"), "TRANSPORT_LXD")
}

func unix(t testing.TB, socket string) lxd.InstanceServer {
	t.Helper()
	s, err := lxd.ConnectLXDUnix(socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// https connects with the certificates that the variables with this prefix name.
func https(t testing.TB, address, prefix string) lxd.InstanceServer {
	t.Helper()
	s, err := lxd.ConnectLXD(address, &lxd.ConnectionArgs{
		TLSClientCert: File(t, prefix+"_CERT"),
		TLSClientKey:  File(t, prefix+"_KEY"),
		TLSServerCert: File(t, prefix+"_SERVER_CERT"),
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

// CleanUp deletes the shared instance. TestMain calls it after the tests. It fails if they have left something in it.
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
	// Two tests leave a "sleep 20" on purpose.
	left := Left(s, shared.name, 30*time.Second)
	if err := setState(s, shared.name, "stop"); err != nil {
		return errors.Join(left, err)
	}
	return errors.Join(left, do(s, http.MethodDelete, "/1.0/instances/"+shared.name, nil))
}

// Create makes a stopped instance from the image that the environment names.
func Create(t testing.TB, s lxd.InstanceServer) string {
	t.Helper()
	return CreateFrom(t, s, os.Getenv("TRANSPORT_LXD_IMAGE"))
}

// CreateFrom makes a stopped instance from the image with this alias.
func CreateFrom(t testing.TB, s lxd.InstanceServer, image string) string {
	t.Helper()
	name := "t" + strings.ToLower(rand.Text()[:10])
	err := do(s, http.MethodPost, "/1.0/instances", api.InstancesPost{
		Name:   name,
		Source: api.InstanceSource{Type: "image", Alias: image},
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

// Do sends a request and waits for its operation.
func Do(t testing.TB, s lxd.InstanceServer, method, path string, body any) {
	t.Helper()
	if err := do(s, method, path, body); err != nil {
		t.Error(err)
	}
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
	if err := json.Unmarshal(resp.Metadata, &op); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if op.StatusCode != api.Success {
		return fmt.Errorf("%s %s: %s %s", method, path, op.Status, op.Err)
	}
	return nil
}

// Processes lists the processes in a running instance, without its init and the scan itself: "PID ARGUMENTS" of each. It needs the image's
// own /bin/busybox, and no shell.
func Processes(s lxd.InstanceServer, name string) ([]string, error) {
	const scan = `for d in /proc/[0-9]*; do
	p=${d#/proc/}
	if [ "$p" = 1 ] || [ "$p" = $$ ]; then continue; fi
	a=$(busybox tr '\000\n' '  ' 2>/dev/null <$d/cmdline) && [ -n "$a" ] && echo "$p $a"
done
:`
	lines, err := scanned(s, name, scan)
	// The scan's substitutions are copies of itself.
	return slices.DeleteFunc(lines, func(line string) bool {
		return strings.Contains(line, "busybox sh -c for d in /proc") || strings.HasSuffix(line, " [busybox]")
	}), err
}

// Marked lists the processes in a running instance that have one of some variables in their environment: "PID ARGUMENTS" of each.
func Marked(s lxd.InstanceServer, name string, variables []string) ([]string, error) {
	const scan = `for f in $(busybox grep -lsE "$0" /proc/[0-9]*/environ); do
	p=${f%/environ}
	echo "${p#/proc/} $(busybox tr '\000\n' '  ' 2>/dev/null <$p/cmdline)"
done
:`
	return scanned(s, name, scan, "("+strings.Join(variables, "|")+")=")
}

// scanned returns the lines, but empty ones, that a script prints in an instance.
func scanned(s lxd.InstanceServer, name, script string, args ...string) ([]string, error) {
	resp, _, err := s.RawQuery(http.MethodPost, "/1.0/instances/"+name+"/exec", api.InstanceExecPost{
		Command: append([]string{"/bin/busybox", "sh", "-c", script}, args...), RecordOutput: true, Environment: map[string]string{},
	}, "")
	var op api.Operation
	if err == nil {
		err = json.Unmarshal(resp.Metadata, &op)
	}
	if err == nil {
		resp, _, err = s.RawQuery(http.MethodGet, "/1.0/operations/"+op.ID+"/wait", nil, "")
	}
	if err == nil {
		err = json.Unmarshal(resp.Metadata, &op)
	}
	if err != nil {
		return nil, fmt.Errorf("looking for processes in %s: %w", name, err)
	}
	output, _ := op.Metadata["output"].(map[string]any)
	if code, ok := op.Metadata["return"].(float64); !ok || code != 0 || output == nil {
		return nil, fmt.Errorf("looking for processes in %s: %v %s", name, op.Metadata["return"], op.Err)
	}
	var said []byte
	for fd, url := range output {
		path, _ := url.(string)
		if fd == "1" {
			body, err := s.GetInstanceLogfile(name, path[strings.LastIndexByte(path, '/')+1:])
			if err != nil {
				return nil, err
			}
			said, err = io.ReadAll(body)
			body.Close()
			if err != nil {
				return nil, err
			}
		}
		s.RawQuery(http.MethodDelete, path, nil, "")
	}
	var lines []string
	for line := range strings.Lines(string(said)) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return lines, nil
}

// Operations lists the operations of an instance that have not ended.
func Operations(s lxd.InstanceServer, name string) ([]string, error) {
	resp, _, err := s.RawQuery(http.MethodGet, "/1.0/operations?recursion=1", nil, "")
	if err != nil {
		return nil, err
	}
	var byStatus map[string][]api.Operation
	if err := json.Unmarshal(resp.Metadata, &byStatus); err != nil {
		return nil, err
	}
	var open []string
	for _, ops := range byStatus {
		for _, op := range ops {
			if op.StatusCode.IsFinal() {
				continue
			}
			for _, list := range op.Resources {
				if slices.ContainsFunc(list, func(r string) bool { return strings.HasSuffix(r, "/"+name) }) {
					open = append(open, fmt.Sprintf("%s %s %v since %s, interactive: %v", op.ID, op.Description, op.Metadata["command"], op.CreatedAt.Format(time.TimeOnly), op.Metadata["interactive"]))
					break
				}
			}
		}
	}
	return open, nil
}

// Left waits until no process and no operation is left of what was run in an instance, and says what is left otherwise.
func Left(s lxd.InstanceServer, name string, patience time.Duration) error {
	return left(s, name, func(string) bool { return true }, func() ([]string, error) { return Processes(s, name) }, patience)
}

// LeftOf waits until none of some operations runs, and no process in an instance has one of some variables, and says what is left otherwise.
func LeftOf(s lxd.InstanceServer, name string, operations, variables []string, patience time.Duration) error {
	ours := func(id string) bool { return slices.Contains(operations, id) }
	return left(s, name, ours, func() ([]string, error) { return Marked(s, name, variables) }, patience)
}

// left waits until none of the operations that count runs, and there are no processes.
func left(s lxd.InstanceServer, name string, counts func(id string) bool, processes func() ([]string, error), patience time.Duration) error {
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		running, err := Operations(s, name)
		if err != nil {
			return err
		}
		running = slices.DeleteFunc(running, func(line string) bool {
			id, _, _ := strings.Cut(line, " ")
			return !counts(id)
		})
		alive, err := processes()
		if err != nil {
			return err
		}
		if len(running)+len(alive) == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("left in %s: operations %q, processes %q", name, running, alive)
		}
	}
}

// Own makes a running instance for one test, which must leave nothing in it, and removes it afterwards. The test may have stopped or
// deleted it.
func Own(t testing.TB, s lxd.InstanceServer) string {
	t.Helper()
	name := Create(t, s)
	t.Cleanup(func() {
		var state api.InstanceState
		resp, _, err := s.RawQuery(http.MethodGet, "/1.0/instances/"+name+"/state", nil, "")
		if api.StatusErrorCheck(err, http.StatusNotFound) {
			return
		}
		if err == nil {
			err = json.Unmarshal(resp.Metadata, &state)
		}
		if err == nil && state.StatusCode == api.Running {
			err = Left(s, name, 20*time.Second)
		}
		if err != nil {
			t.Error(err)
		}
		if state.StatusCode != api.Stopped {
			if err := setState(s, name, "stop"); err != nil {
				t.Error(err)
			}
		}
		Delete(t, s, name)
	})
	Start(t, s, name)
	return name
}

// Change changes an instance's state: "start", "stop", "restart", "freeze", "unfreeze".
func Change(t testing.TB, s lxd.InstanceServer, name, action string, force bool) {
	t.Helper()
	var err error
	for range 3 { // a clean stop of an instance that has just been started may come before its init can understand it
		if err = do(s, http.MethodPut, "/1.0/instances/"+name+"/state", api.InstanceStatePut{Action: action, Force: force, Timeout: 30}); err == nil || force {
			break
		}
	}
	if err != nil {
		t.Error(err)
	}
}
