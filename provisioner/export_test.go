package provisioner

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

// Fingerprint is for the tests.
func Fingerprint(t *testing.T, key []byte) string {
	t.Helper()
	print, err := fingerprint(key)
	require.NoError(t, err)
	return print
}

// FingerprintOfFile is for the tests.
func FingerprintOfFile(t *testing.T, name string) string {
	t.Helper()
	key, err := os.ReadFile(name)
	require.NoError(t, err)
	return Fingerprint(t, key)
}
