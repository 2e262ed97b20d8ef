package transport_test

import (
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

// many is how many commands run at once.
const many = 1000

// A thousand commands at once on one transport: each has the status of its own, and no more run than the option says.
func TestThousandAtOnce(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		limits := []int{50}
		if slowTests {
			limits = append(limits, 0)
		}
		for _, most := range limits {
			t.Run("MaxExecs "+strconv.Itoa(most), func(t *testing.T) {
				host := newLXD(t, reallxd.Unix(t), instance, &transport.LXDOptions{MaxExecs: most})
				var running, peak atomic.Int64
				var all sync.WaitGroup
				for i := range many {
					all.Go(func() {
						var out lockedBuffer
						out.onWrite = sync.OnceFunc(func() {
							n := running.Add(1)
							for p := peak.Load(); n > p && !peak.CompareAndSwap(p, n); p = peak.Load() {
							}
						})
						err := host.Exec(soon(t), transport.Command{Args: transport.Shell(`echo "$1"; exit $(($1 % 256))`, strconv.Itoa(i)), Stdout: &out})
						running.Add(-1)
						code, exited := transport.ExitCode(err)
						assert.True(t, exited, "%v", err)
						assert.Equal(t, i%256, code)
						assert.Equal(t, strconv.Itoa(i)+"\n", string(out.bytes()))
					})
				}
				all.Wait()
				if most > 0 {
					assert.LessOrEqual(t, peak.Load(), int64(most))
				}
			})
		}
	})
}

// Close in the middle of a thousand: each has a verdict that is true, and nothing is left of any.
func TestCloseInTheMiddleOfAThousand(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		instance := reallxd.Own(t, reallxd.Unix(t))
		host := newLXD(t, reallxd.Unix(t), instance, nil)
		mine := newToken()
		var up atomic.Int64
		middle := make(chan struct{})
		errs := make([]error, many)
		outs := make([]*watcher, many)
		var all sync.WaitGroup
		for i := range many {
			outs[i] = upThen(func() {
				if up.Add(1) == many/3 {
					close(middle)
				}
			})
			all.Go(func() {
				errs[i] = host.Exec(soon(t), transport.Command{Args: transport.Shell("setsid sleep $1 & echo up; exec sleep $1", mine), Stdout: outs[i]})
			})
		}
		<-middle
		start := time.Now()
		require.NoError(t, host.Close())
		took := time.Since(start)
		all.Wait()
		assertNone(t, instance, mine)
		var ended, never int
		for i, err := range errs {
			require.ErrorIs(t, err, transport.ErrClosed)
			wrote := strings.Contains(outs[i].seen.String(), "up")
			if errors.Is(err, transport.ErrNotStarted) {
				never++
				assert.False(t, wrote, "it ran: %v", err)
				continue
			}
			ended++
			if code, exited := transport.ExitCode(err); exited {
				assert.Contains(t, []int{137, 143}, code, "%v", err)
			} else {
				assert.ErrorContains(t, err, "not", "it says what is not known: %v", err)
			}
		}
		t.Logf("Close took %v; %d were ended, %d had not started", took, ended, never)
		assert.GreaterOrEqual(t, ended, many/3)
	})
}
