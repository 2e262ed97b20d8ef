package transport_test

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
)

// posixSignals are all names of POSIX's <signal.h>, and what Linux has besides.
var posixSignals = strings.Fields(`ABRT ALRM BUS CHLD CONT FPE HUP ILL INT KILL PIPE POLL PROF QUIT SEGV STOP SYS TERM TRAP TSTP TTIN TTOU URG USR1 USR2
	VTALRM WINCH XCPU XFSZ IO PWR STKFLT`)

// TestEverySignal: each arrives as the one that the instance's own shell knows by that name.
func TestEverySignal(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		for _, name := range posixSignals {
			switch name {
			case "KILL", "STOP": // nobody can catch them
				continue
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				up := make(chan struct{})
				p, err := host.Start(soon(t), transport.Command{
					// "wait" is what a shell interrupts for a trap.
					Args:   transport.Shell(`trap 'kill $!; exit 42' "$1"; sleep 1000 >/dev/null 2>&1 & echo up; wait; kill $!; exit 1`, name),
					Stdout: upThen(func() { close(up) }),
				})
				require.NoError(t, err)
				<-up
				require.NoError(t, p.Signal(transport.Signal(name)))
				code, exited := transport.ExitCode(p.Wait())
				assert.True(t, exited)
				assert.Equal(t, 42, code, "it got another signal")
			})
		}
		t.Run("STOP, CONT and KILL", func(t *testing.T) {
			t.Parallel()
			stdout := &lockedBuffer{}
			up := make(chan struct{})
			stdout.onWrite = func() { close(up); stdout.onWrite = nil }
			p, err := host.Start(soon(t), transport.Command{Args: transport.Shell("echo $$; exec sleep 1000"), Stdout: stdout})
			require.NoError(t, err)
			<-up
			pid := strings.TrimSpace(string(stdout.bytes()))
			state := func(want string) {
				t.Helper()
				// ") X": the third field of its stat.
				require.NoError(t, host.Exec(soon(t), sh(`while ! grep -q "(sleep) $2" /proc/$1/stat; do usleep 10000; done`, pid, want)))
			}
			state("S")
			require.NoError(t, p.Signal(transport.SIGSTOP))
			state("T")
			require.NoError(t, p.Signal(transport.SIGCONT))
			state("S")
			require.NoError(t, p.Signal(transport.SIGKILL))
			code, _ := transport.ExitCode(p.Wait())
			assert.Equal(t, 137, code)
			assert.ErrorIs(t, p.Signal(transport.SIGTERM), os.ErrProcessDone)
		})
		for _, name := range []transport.Signal{"", "SIGTERM", "term", "15", "RTMIN", "NOPE"} {
			p, err := host.Start(soon(t), sh("read x"))
			require.NoError(t, err)
			if err := p.Signal(name); assert.ErrorContains(t, err, "unknown signal") {
				assert.NotErrorIs(t, err, os.ErrProcessDone)
			}
			assert.Error(t, p.Wait(), "the end of its input")
		}
	})
}
