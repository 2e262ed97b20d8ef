package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	lxd "github.com/canonical/lxd/client"
	"go.yaml.in/yaml/v3"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/builder"
	lxdbuilder "github.com/lxdtransport/transport/builder/lxd"
	"github.com/lxdtransport/transport/lxdtest"
	"github.com/lxdtransport/transport/provisioner"
)

// place is where a job runs.
type place struct {
	builder     *lxdbuilder.Builder
	dial        func(context.Context, *builder.Host) (transport.Transport, error)
	provisioner func(log io.Writer) provisioner.Provisioner
	close       func()
}

// find connects to the server that the flags name. Without one in the flags and on this machine it starts a fake one, and says so.
func (s *settings) find(stderr io.Writer) (*place, error) {
	p, err := s.connect()
	if err == nil || s.remote != "" || !missing(err) {
		return p, err
	}
	fmt.Fprintln(stderr, "lxdjob: no LXD server on this machine: running on a fake one, with this machine's commands, without isolation, and installing no packages")
	return s.fake()
}

// missing reports whether there is no server, and not one that this user may not use.
func missing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// connect connects to a real server.
func (s *settings) connect() (*place, error) {
	server, err := dial(s.remote)
	if err != nil {
		return nil, err
	}
	if s.project != "" {
		server = server.UseProject(s.project)
	}
	return newPlace(server, &lxdbuilder.Options{Prefix: "job"}, newProvisioner, server.Disconnect)
}

// fake starts a server whose instances' commands are those of this machine.
func (s *settings) fake() (*place, error) {
	f := lxdtest.NewUnstartedServer()
	f.Handler = lxdtest.LocalCommands("")
	f.Start()
	server, err := lxd.ConnectLXDUnix(f.Socket, nil)
	if err != nil {
		f.Close()
		return nil, err
	}
	return newPlace(server, &lxdbuilder.Options{Prefix: "job", Ready: lxdbuilder.Exec}, func(io.Writer) provisioner.Provisioner { return asItIs{} }, func() {
		server.Disconnect()
		f.Close()
	})
}

func newPlace(server lxd.InstanceServer, opts *lxdbuilder.Options, prov func(io.Writer) provisioner.Provisioner, stop func()) (*place, error) {
	hosts, err := lxdbuilder.New(server, opts)
	if err != nil {
		stop()
		return nil, err
	}
	return &place{
		builder:     hosts,
		provisioner: prov,
		dial: func(_ context.Context, h *builder.Host) (transport.Transport, error) {
			to := server
			if h.Project != "" {
				to = server.UseProject(h.Project)
			}
			return transport.NewLXD(to, h.Name, nil)
		},
		close: stop,
	}, nil
}

func newProvisioner(log io.Writer) provisioner.Provisioner {
	return provisioner.New(&provisioner.Options{Output: log})
}

// asItIs is the provisioner of a machine that is not ours to change.
type asItIs struct{}

func (asItIs) Prepare(context.Context, transport.Transport, provisioner.Host, provisioner.Environment) error {
	return nil
}

// dial connects to a server by the names that the lxc client has for it.
func dial(remote string) (lxd.InstanceServer, error) {
	switch {
	case remote == "" || remote == "local":
		server, err := lxd.ConnectLXDUnix("", nil) // LXD_SOCKET, LXD_DIR or the usual places
		if err != nil {
			return nil, fmt.Errorf("the LXD server of this machine: %w", err)
		}
		return server, nil
	case strings.HasPrefix(remote, "unix:"):
		u, err := url.Parse(remote)
		if err != nil {
			return nil, err
		}
		return lxd.ConnectLXDUnix(u.Path+u.Opaque, nil)
	}
	return dialRemote(remote)
}

// dialRemote connects over the network with the lxc client's certificate.
func dialRemote(remote string) (lxd.InstanceServer, error) {
	conf := os.Getenv("LXD_CONF")
	if conf == "" {
		dir, err := os.UserConfigDir()
		if err != nil {
			return nil, err
		}
		conf = filepath.Join(dir, "lxc")
	}
	args := &lxd.ConnectionArgs{}
	addr, project := remote, ""
	if !strings.HasPrefix(remote, "https://") {
		var known struct {
			Remotes map[string]struct{ Addr, Project string } `yaml:"remotes"`
		}
		data, err := os.ReadFile(filepath.Join(conf, "config.yml"))
		if err != nil {
			return nil, fmt.Errorf("the remote %s: %w", remote, err)
		}
		if err := yaml.Unmarshal(data, &known); err != nil {
			return nil, fmt.Errorf("the remote %s: %w", remote, err)
		}
		r, ok := known.Remotes[remote]
		if !ok || filepath.Base(remote) != remote {
			return nil, fmt.Errorf("the lxc client knows no remote %q", remote)
		}
		if addr, project = r.Addr, r.Project; strings.HasPrefix(addr, "unix:") {
			return dial(addr)
		}
		if args.TLSServerCert, err = optional(filepath.Join(conf, "servercerts", remote+".crt")); err != nil {
			return nil, err
		}
	}
	for file, to := range map[string]*string{"client.crt": &args.TLSClientCert, "client.key": &args.TLSClientKey} {
		var err error
		if *to, err = optional(filepath.Join(conf, file)); err != nil {
			return nil, err
		}
	}
	server, err := lxd.ConnectLXD(addr, args)
	if err != nil {
		return nil, fmt.Errorf("the remote %s: %w", remote, err)
	}
	if project != "" {
		return server.UseProject(project), nil
	}
	return server, nil
}

// optional is the content of a file that need not be there.
func optional(name string) (string, error) {
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(data), err
}
