//go:build unix

package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/canonical/lxd/shared/api"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/internal/reallxd"
)

// moments is how many runs are ended at a random moment, by each of the signals.
func moments(t *testing.T) int {
	if os.Getenv("LXDJOB_MOMENTS") == "" {
		return 3
	}
	n, err := strconv.Atoi(os.Getenv("LXDJOB_MOMENTS"))
	require.NoError(t, err, "LXDJOB_MOMENTS")
	return n
}

// TestEndedAtAnyMomentOnLXD ends runs by signals at random moments of their whole life: before there is a host, in each of the steps in which LXD makes one, while
// a command runs, and during the release. After SIGINT and SIGTERM no host is left; after SIGKILL none is left by lxdjob -reap. LXDJOB_MOMENTS=50 says how many
// moments. It is not parallel, and SIGKILL comes last, so that no -reap removes what others have left.
func TestEndedAtAnyMomentOnLXD(t *testing.T) {
	reallxd.Need(t)
	n := moments(t)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		e := &ender{sig: sig}
		begin := time.Now()
		cmd, out := e.start(t, e.job("whole"))
		require.NoError(t, cmd.Wait(), out.String())
		e.whole = time.Since(begin)
		t.Run(sig.String(), func(t *testing.T) {
			for i := range n {
				t.Run(strconv.Itoa(i), func(t *testing.T) {
					t.Parallel()
					e.one(t, e.job(strconv.Itoa(i)+"."))
				})
			}
		})
		e.none(t, e.job("")) // nor one that LXD was told to make at the last moment
	}
}

// ender ends runs.
type ender struct {
	sig   syscall.Signal
	whole time.Duration // how long a run takes that nobody ends, on a machine with nothing else to do
}

// job is the name of a job, which is a label of its host. All of a signal's begin with the one of "".
func (e *ender) job(of string) string {
	return fmt.Sprintf("ended-%d-%d-%s", os.Getpid(), int(e.sig), of)
}

func remote() string { return "-remote=unix://" + os.Getenv("TRANSPORT_LXD_SOCKET") }

func (e *ender) start(t *testing.T, name string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	file := write(t, strings.Replace(strings.Replace(ok, "name: ok", "name: "+name, 1), "echo 'it runs'", "sleep 0.2", 1))
	cmd := program(t, remote(), "-image="+os.Getenv("TRANSPORT_LXD_IMAGE"), file)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Start())
	return cmd, &out
}

// one ends a run, and looks for its host.
func (e *ender) one(t *testing.T, name string) {
	for {
		after := time.Duration(rand.Int64N(2 * int64(e.whole))) // others run beside it
		cmd, out := e.start(t, name)
		timer := time.AfterFunc(after, func() { _ = cmd.Process.Signal(e.sig) })
		err := cmd.Wait()
		if timer.Stop() || err == nil { // it was faster
			continue
		}
		t.Logf("%v after %v", e.sig, after)
		if e.sig == syscall.SIGKILL {
			require.Equal(t, -1, cmd.ProcessState.ExitCode())
			code, said, errs := result(t, program(t, remote(), "-reap"))
			require.Equal(t, 0, code, errs)
			t.Logf("reaped %q", strings.Fields(said))
		} else {
			// -1: before it could say that it wants to know of signals
			require.Contains(t, []int{-1, 128 + int(e.sig)}, cmd.ProcessState.ExitCode(), out.String())
		}
		e.none(t, name)
		return
	}
}

// none looks for the hosts of jobs whose names begin so.
func (e *ender) none(t *testing.T, job string) {
	t.Helper()
	s := reallxd.Unix(t)
	defer s.Disconnect()
	all, err := s.GetInstances(api.InstanceTypeAny)
	require.NoError(t, err)
	for _, i := range all {
		require.False(t, strings.HasPrefix(i.Config["user.transport.job"], job), "%s of the job %s is left, it is %s", i.Name, i.Config["user.transport.job"], i.Status)
	}
}
