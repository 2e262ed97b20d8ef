package reallxd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
)

// Member is one of the three members of the cluster that scripts/cluster runs.
type Member struct {
	Number   int    // 1, 2 or 3
	Name     string // in the cluster
	Socket   string // unix socket
	Addr     string // https://address:port
	Instance string // a running instance on this member; every member gives access to all of them
}

// NeedCluster skips the test where there is no cluster, or fails it if REQUIRE_CLUSTER is set.
func NeedCluster(t testing.TB) {
	t.Helper()
	need(t, "TRANSPORT_CLUSTER_SOCKET_1", "REQUIRE_CLUSTER", "LXD cluster", "scripts/cluster")
}

// Cluster returns the members. A test that kills or stops one uses ClusterToBreak.
func Cluster(t testing.TB) []Member {
	t.Helper()
	NeedCluster(t)
	var all []Member
	for n := 1; n <= 3; n++ {
		of := func(what string) string { return os.Getenv(fmt.Sprintf("TRANSPORT_CLUSTER_%s_%d", what, n)) }
		all = append(all, Member{Number: n, Name: fmt.Sprintf("m%d", n), Socket: of("SOCKET"), Addr: of("ADDR"), Instance: of("INSTANCE")})
	}
	return all
}

// ClusterToBreak is Cluster for a test that kills and stops members, and is not parallel. All run again after it.
func ClusterToBreak(t testing.TB) []Member {
	t.Helper()
	all := Cluster(t)
	t.Cleanup(func() { StartAll(t, all...) })
	return all
}

// Leader is the member that leads the cluster's database just now. All have to run.
func Leader(t testing.TB, members []Member) Member {
	t.Helper()
	all, err := members[0].Unix(t).GetClusterMembers()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range members {
		for _, is := range all {
			if is.ServerName == m.Name && slices.Contains(is.Roles, "database-leader") {
				return m
			}
		}
	}
	t.Fatalf("none of the cluster's members leads: %+v", all)
	panic("not reached")
}

// Servers returns the ways to the member, new connections each time.
func (m Member) Servers(t testing.TB) []Server {
	t.Helper()
	return []Server{{"unix", m.Unix(t)}, {"https", m.HTTPS(t)}}
}

// Unix connects over the member's socket.
func (m Member) Unix(t testing.TB) lxd.InstanceServer {
	t.Helper()
	return unix(t, m.Socket)
}

// HTTPS connects with the client certificate. All members show the same certificate.
func (m Member) HTTPS(t testing.TB) lxd.InstanceServer {
	t.Helper()
	return https(t, m.Addr, "TRANSPORT_CLUSTER")
}

// Kill ends the member's daemon with SIGKILL. Its instances go on.
func (m Member) Kill(t testing.TB) { t.Helper(); m.script(t, "kill") }

// Stop stops the member's daemon with SIGSTOP: it takes connections, and says nothing.
func (m Member) Stop(t testing.TB) { t.Helper(); m.script(t, "stop") }

// Start starts the member's daemon after Kill, or lets it go on after Stop, and returns when commands pass between it and the others that run.
// It needs another one. LXD 5.0 may die when it goes on; then it is started again.
func (m Member) Start(t testing.TB) { t.Helper(); m.script(t, "start") }

// StartAll starts several members, which may be a majority together only.
func StartAll(t testing.TB, members ...Member) { t.Helper(); script(t, "start", members...) }

// Mend starts those of the members again whose daemons have died by themselves, and says so. The others it only looks at.
func Mend(t testing.TB, members ...Member) {
	t.Helper()
	for _, m := range members {
		conn, err := net.DialTimeout("unix", m.Socket, time.Second)
		if err == nil {
			conn.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			continue
		}
		t.Logf("LXD on %s has died by itself, and is started again: %v", m.Name, err)
		m.Start(t)
	}
}

func (m Member) script(t testing.TB, verb string) { t.Helper(); script(t, verb, m) }

func script(t testing.TB, verb string, members ...Member) {
	t.Helper()
	args := []string{verb}
	for _, m := range members {
		args = append(args, fmt.Sprint(m.Number))
	}
	// not the test's context: members are started again by t.Cleanup, after its end
	out, err := exec.Command(os.Getenv("TRANSPORT_CLUSTER_SCRIPT"), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("scripts/cluster %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	if strings.Contains(string(out), "has died") {
		t.Logf("scripts/cluster %s:\n%s", strings.Join(args, " "), out)
	}
}
