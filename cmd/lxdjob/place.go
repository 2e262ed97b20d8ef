package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	lxd "github.com/canonical/lxd/client"

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
func (s *settings) find(ctx context.Context, stderr io.Writer) (*place, error) {
	p, err := s.connect(ctx)
	if err == nil || s.remote != "" || !errors.Is(err, transport.ErrNoServer) || errors.Is(err, transport.ErrUnauthorized) {
		return p, err
	}
	fmt.Fprintln(stderr, "lxdjob: no LXD server on this machine: running on a fake one, with this machine's commands, without isolation, and installing no packages")
	return s.fake()
}

// connect connects to a real server.
func (s *settings) connect(ctx context.Context) (*place, error) {
	server, err := transport.ConnectLXD(ctx, s.remote, &transport.LXDOptions{Project: s.project})
	if err != nil {
		return nil, err
	}
	return newPlace(server, &lxdbuilder.Options{Prefix: "job", Profiles: s.profiles}, newProvisioner, server.Disconnect)
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
