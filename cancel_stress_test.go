package transport_test

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

// TestCancelAtAnyMoment: of the request, of the sockets' connecting, of the command's start. Nothing is left, whenever it is.
func TestCancelAtAnyMoment(t *testing.T) {
	t.Parallel()
	reallxd.Need(t)
	server, name := reallxd.Unix(t), reallxd.Own(t, reallxd.Unix(t))
	host := newLXD(t, server, name, nil)
	for range 4 {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			for range 10 {
				ctx, cancel := context.WithTimeoutCause(soon(t), time.Duration(rand.Int64N(int64(120*time.Millisecond))), errEnough)
				token := newToken()
				err := host.Exec(ctx, transport.Command{Args: transport.Shell("setsid sleep $1 & sleep $1 & wait", token)})
				cancel()
				assert.ErrorIs(t, err, errEnough)
				assertNone(t, name, token)
			}
		})
	}
}
