//go:build linux

package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"

	"github.com/lxdtransport/transport"
)

// connect makes a connection of the official client, over "unix" or "https".
func connect(way string) (lxd.InstanceServer, error) {
	if way == "unix" {
		return lxd.ConnectLXDUnix(os.Getenv("TRANSPORT_LXD_SOCKET"), nil)
	}
	var args lxd.ConnectionArgs
	for variable, field := range map[string]*string{
		"TRANSPORT_LXD_CERT":        &args.TLSClientCert,
		"TRANSPORT_LXD_KEY":         &args.TLSClientKey,
		"TRANSPORT_LXD_SERVER_CERT": &args.TLSServerCert,
	} {
		content, err := os.ReadFile(os.Getenv(variable))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", variable, err)
		}
		*field = string(content)
	}
	return lxd.ConnectLXD(os.Getenv("TRANSPORT_LXD_ADDR"), &args)
}

func createInstance() (name string, remove func() error, err error) {
	if os.Getenv("TRANSPORT_LXD_SOCKET") == "" {
		return "", nil, errors.New(`there is no LXD: scripts/lxd up && eval "$(scripts/lxd env)"`)
	}
	s, err := connect("unix")
	if err != nil {
		return "", nil, err
	}
	name = "soak-" + strings.ToLower(rand.Text()[:10])
	err = do(s, http.MethodPost, "/1.0/instances", api.InstancesPost{
		Name:   name,
		Source: api.InstanceSource{Type: "image", Alias: os.Getenv("TRANSPORT_LXD_IMAGE")},
	})
	if err != nil {
		return "", nil, err
	}
	change := func(action string) error {
		return do(s, http.MethodPut, "/1.0/instances/"+name+"/state", api.InstanceStatePut{Action: action, Force: true, Timeout: 30})
	}
	remove = func() error {
		return errors.Join(change("stop"), do(s, http.MethodDelete, "/1.0/instances/"+name, nil))
	}
	if err := change("start"); err != nil {
		return "", nil, errors.Join(err, do(s, http.MethodDelete, "/1.0/instances/"+name, nil))
	}
	return name, remove, nil
}

// do sends a request and waits for its operation, without the events socket that the client's own calls use.
func do(s lxd.InstanceServer, method, path string, body any) error {
	resp, _, err := s.RawQuery(method, path, body, "")
	var op api.Operation
	if err == nil && resp.Type == api.AsyncResponse {
		if err = json.Unmarshal(resp.Metadata, &op); err == nil {
			resp, _, err = s.RawQuery(http.MethodGet, "/1.0/operations/"+op.ID+"/wait", nil, "")
		}
		if err == nil {
			err = json.Unmarshal(resp.Metadata, &op)
		}
		if err == nil && op.Err != "" {
			err = errors.New(op.Err)
		}
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

// left fails if a process is left in the instance, or an operation of its own is open at the daemon.
func (s *soak) left(ctx context.Context, instance string) error {
	server, err := connect("unix")
	if err != nil {
		return err
	}
	var open, processes string
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		ops, err := server.GetOperations()
		if err != nil {
			return err
		}
		open = ""
		for _, op := range ops {
			if op.StatusCode == api.Running && strings.Contains(fmt.Sprint(op.Resources), "/"+instance) {
				open += " " + op.ID
			}
		}
		// What has no parent in the instance but is not its init was started by an exec.
		out, err := transport.Output(ctx, s.hosts[0], transport.Command{Args: transport.Shell(
			`for d in /proc/[0-9]*; do p=${d#/proc/}; case $p in 1|$$) continue;; esac; read -r x <$d/comm && case $x in init|syslogd|klogd|getty) ;; *) echo "$p $x";; esac; done 2>/dev/null`)})
		if err != nil {
			return err
		}
		if processes = strings.TrimSpace(string(out)); open == "" && processes == "" {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("left at the end: operations [%s], processes [%s]", open, processes)
		}
	}
}
