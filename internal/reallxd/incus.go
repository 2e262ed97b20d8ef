package reallxd

import (
	"os"
	"testing"
)

// NeedIncus skips the test where there is no Incus, or fails it if REQUIRE_INCUS is set.
func NeedIncus(t testing.TB) {
	t.Helper()
	need(t, "TRANSPORT_INCUS_SOCKET", "REQUIRE_INCUS", "Incus", "scripts/incus")
}

// Incus returns the ways to the Incus that scripts/incus runs, new connections each time, and the name of a running instance on it.
func Incus(t testing.TB) (ways []Server, instance string) {
	t.Helper()
	NeedIncus(t)
	return []Server{
		{"unix", unix(t, os.Getenv("TRANSPORT_INCUS_SOCKET"))},
		{"https", https(t, os.Getenv("TRANSPORT_INCUS_ADDR"), "TRANSPORT_INCUS")},
	}, os.Getenv("TRANSPORT_INCUS_INSTANCE")
}
