//go:build unix

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

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"
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

// createInstance makes and starts the instance that everything is measured in.
func (b *bench) createInstance(ctx context.Context) (remove func() error, err error) {
	if os.Getenv("TRANSPORT_LXD_SOCKET") == "" {
		return nil, errors.New(`there is no LXD: scripts/lxd up && eval "$(scripts/lxd env)"`)
	}
	s, err := connect("unix")
	if err != nil {
		return nil, err
	}
	name := "bench-" + strings.ToLower(rand.Text()[:10])
	err = do(s, http.MethodPost, "/1.0/instances", api.InstancesPost{
		Name:   name,
		Source: api.InstanceSource{Type: "image", Alias: os.Getenv("TRANSPORT_LXD_IMAGE")},
	})
	if err != nil {
		return nil, err
	}
	change := func(action string) error {
		return do(s, http.MethodPut, "/1.0/instances/"+name+"/state", api.InstanceStatePut{Action: action, Force: true, Timeout: 30})
	}
	remove = func() error {
		return errors.Join(change("stop"), do(s, http.MethodDelete, "/1.0/instances/"+name, nil))
	}
	if err := change("start"); err != nil {
		return nil, errors.Join(err, do(s, http.MethodDelete, "/1.0/instances/"+name, nil))
	}
	if ctx.Err() != nil {
		return nil, errors.Join(context.Cause(ctx), remove())
	}
	b.instance = name
	return remove, nil
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

func (b *bench) serverVersion() string {
	s, err := connect("unix")
	if err != nil {
		return "?"
	}
	info, _, err := s.GetServer()
	if err != nil {
		return "?"
	}
	return info.Environment.ServerVersion
}
