package provisioner_test

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/builder"
	lxdbuilder "github.com/lxdtransport/transport/builder/lxd"
	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/provisioner"
)

// debian is a fresh container of Debian with a way to the distribution's mirror.
func debian(t *testing.T) (transport.Transport, *builder.Host) {
	t.Helper()
	reallxd.Need(t)
	server := reallxd.Unix(t)
	t.Cleanup(server.Disconnect)
	if _, _, err := server.GetImageAlias("debian/12"); err != nil {
		const how = "needs a Debian image: scripts/lxd debian"
		if os.Getenv("REQUIRE_DEBIAN") == "1" {
			t.Fatal(how)
		}
		t.Skip(how)
	}
	hosts, err := lxdbuilder.New(server, &lxdbuilder.Options{Prefix: "prov", Profiles: []string{"default", "network"}})
	require.NoError(t, err)
	h, err := hosts.Get(t.Context(), builder.Spec{OS: "debian_bookworm"})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, hosts.Release(context.WithoutCancel(t.Context()), h)) })
	require.NotEmpty(t, h.Address, "it is ready")
	to, err := transport.NewLXD(server, h.Name, nil)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, to.Close()) })
	return to, h
}

// TestRealDebian adds a repository with its key to a Debian, and installs a package from it.
func TestRealDebian(t *testing.T) {
	t.Parallel()
	host, h := debian(t)
	output := func(script string) string {
		t.Helper()
		out, err := transport.Output(t.Context(), host, transport.Command{Args: transport.Shell(script)})
		require.NoError(t, err)
		return strings.TrimSpace(string(out))
	}
	state := output("systemctl is-system-running || true")
	require.Contains(t, []string{"running", "degraded"}, state)
	mirror := output(`sed -n 's/^deb \([^ ]*\) bookworm main.*/\1/p' /etc/apt/sources.list`)
	require.NotEmpty(t, mirror)
	var key bytes.Buffer
	require.NoError(t, host.Download(t.Context(), "/usr/share/keyrings/debian-archive-keyring.gpg", &key, nil))

	var said bytes.Buffer
	p := provisioner.New(&provisioner.Options{Output: &said})
	on := provisioner.Host{Name: h.Name, OS: h.OS}
	prepare := func(env provisioner.Environment) error { return p.Prepare(t.Context(), host, on, env) }

	err := prepare(provisioner.Environment{Packages: []string{"no-such-package-anywhere"}})
	require.ErrorContains(t, err, "apt-get install: ")
	require.ErrorContains(t, err, "Unable to locate package no-such-package-anywhere")
	require.NotContains(t, err.Error(), "attempts", "it does not try again")

	// The host's own lists go: what is installed then comes from the repository, and only its key counts.
	require.Empty(t, output("mv /etc/apt/sources.list /root/ && rm -f /etc/apt/trusted.gpg.d/* && rm -rf /var/lib/apt/lists/*"))
	env := provisioner.Environment{
		Repositories: []provisioner.Repository{{URL: mirror, Components: []string{"main"}, Key: key.String()}},
		Packages:     []string{"hello"},
	}
	require.NoError(t, prepare(env), said.String())
	require.Equal(t, "Hello, world!", output("hello"))
	require.NoError(t, prepare(env), "once more")
	require.Equal(t, "1 1", output("echo $(ls /etc/apt/sources.list.d | wc -l) $(ls /etc/apt/keyrings | wc -l)"))
	require.Equal(t, "", output("ls /etc/apt/trusted.gpg.d"), "nothing for all repositories")

	// A key that the repository is not signed with.
	var wrong bytes.Buffer
	require.NoError(t, host.Download(t.Context(), "/usr/share/keyrings/debian-archive-bookworm-security-automatic.gpg", &wrong, nil))
	env.Repositories[0].Key = wrong.String()
	require.Empty(t, output("rm -rf /var/lib/apt/lists/*"))
	err = prepare(env)
	require.ErrorContains(t, err, "apt-get update: ")
	require.ErrorContains(t, err, "NO_PUBKEY")
	require.NotContains(t, err.Error(), "attempts")
}
