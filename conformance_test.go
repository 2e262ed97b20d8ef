package transport_test

import (
	"math/rand/v2"
	"testing"

	lxd "github.com/canonical/lxd/client"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/lxdtest"
	"github.com/lxdtransport/transport/transporttest"
)

// conforms runs the suite over LXD transports into one instance, with the options that are made for each.
func conforms(t *testing.T, server lxd.InstanceServer, instance string, opts func(*testing.T) *transport.LXDOptions, caps ...transporttest.Capability) {
	t.Helper()
	transporttest.Run(t, func(t *testing.T) transport.Transport {
		host, err := transport.NewLXD(server, instance, opts(t))
		if err != nil {
			t.Fatal(err)
		}
		return host
	}, append(caps, transporttest.Start, transporttest.Signals, transporttest.TTY, transporttest.Children, transporttest.Strays, transporttest.SameHost)...)
}

func defaults(*testing.T) *transport.LXDOptions { return nil }

// nothingLeft is for a real LXD: no case leaves a process in the instance, or an operation.
func nothingLeft(s lxd.InstanceServer, instance string) func(*testing.T) *transport.LXDOptions {
	return func(t *testing.T) *transport.LXDOptions { return leaving(t, s, instance) }
}

// TestConformanceOnTheFake takes one release at random under the race detector, and one over HTTPS, which is enough: what the releases differ in is
// not the way to them.
func TestConformanceOnTheFake(t *testing.T) {
	t.Parallel()
	versions := lxdtest.Versions()
	if underRace && !slowTests {
		n := rand.IntN(len(versions))
		versions = versions[n : n+1]
	}
	for _, v := range versions {
		t.Run(v.Name, func(t *testing.T) { conformsOnFake(t, v, (*lxdtest.Server).Start) })
	}
	t.Run(lxdtest.LXD50.Name+" over HTTPS", func(t *testing.T) { conformsOnFake(t, lxdtest.LXD50, (*lxdtest.Server).StartTLS) })
}

func conformsOnFake(t *testing.T, v lxdtest.Version, start func(*lxdtest.Server)) {
	t.Parallel()
	s := lxdtest.NewUnstartedServer()
	s.Version = v
	s.Handler = lxdtest.LocalCommands("")
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	start(s)
	t.Cleanup(s.Close)
	caps := []transporttest.Capability{transporttest.WholeStderr}
	if v.ChildGrace > 0 {
		caps = append(caps, transporttest.EarlyStatus)
	}
	conforms(t, connect(t, s), "c1", defaults, caps...)
}

func TestConformanceOnLXD(t *testing.T) {
	t.Parallel()
	instance := reallxd.Instance(t)
	for _, s := range reallxd.Servers(t) {
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			conforms(t, s, instance, nothingLeft(s, instance), transporttest.Users, transporttest.WholeStderr)
		})
	}
}

// oneWay is one of the ways at random, all with TRANSPORT_SLOW_TESTS=1: of servers for which LXD itself, which is asked both ways, stands in most things.
func oneWay(servers []reallxd.Server) []reallxd.Server {
	if slowTests {
		return servers
	}
	n := rand.IntN(len(servers))
	return servers[n : n+1]
}

// Through a member that does not have the instance: it passes everything on to the one that has. It answers the pings on the stderr
// socket, which LXD before 5.0.5 does not read, so that closing it resets the connection, and what is under way is lost: no WholeStderr.
func TestConformanceOnCluster(t *testing.T) {
	t.Parallel()
	members := reallxd.Cluster(t)
	entry, there := members[0], members[2]
	for _, s := range oneWay(entry.Servers(t)) {
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			conforms(t, s, there.Instance, defaults, transporttest.Users)
		})
	}
}

func TestConformanceOnIncus(t *testing.T) {
	t.Parallel()
	servers, instance := reallxd.Incus(t)
	for _, s := range oneWay(servers) {
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			conforms(t, s, instance, defaults, transporttest.Users, transporttest.EarlyStatus, transporttest.WholeTTY, transporttest.WholeStderr)
		})
	}
}
