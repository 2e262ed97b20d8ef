package transport_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestDownstream runs the tests of a module that imports this one, as programs of others do: with requirements of its own,
// no network, and nothing in the module cache but what this module needs itself.
func TestDownstream(t *testing.T) {
	t.Parallel()
	tool, err := exec.LookPath("go")
	require.NoError(t, err)
	cmd := exec.CommandContext(soon(t), tool, "test", "./...")
	cmd.Dir = filepath.Join("testdata", "downstream")
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "GOPROXY=off", "GOSUMDB=off", "GOWORK=off", "GOTOOLCHAIN=local")
	out, err := cmd.CombinedOutput()
	assert.NoError(t, err, "%s", out)
}
