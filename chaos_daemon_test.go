//go:build unix

package transport_test

import (
	"bytes"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

// A daemon that is killed and started again, or stopped for a while, in the middle of what it does.

// underway is something that a daemon is in the middle of.
type underway struct {
	name   string
	mine   string
	result chan error
	check  func(t *testing.T)
}

// begin begins all kinds of work over all ways to the daemon, and returns when all are in the middle of it.
func begin(t *testing.T, d *reallxd.Daemon, instance string) []underway {
	t.Helper()
	var all []underway
	var ready sync.WaitGroup
	add := func(name, mine string, run func() error, check func(t *testing.T)) {
		u := underway{name, mine, make(chan error, 1), check}
		all = append(all, u)
		go func() { u.result <- run() }() // read by the test
	}
	for _, s := range d.Servers(t) {
		host := newLXD(t, s, instance, &transport.LXDOptions{Liveness: 3 * time.Second})
		ready.Add(len(work) + 1)
		for _, w := range work {
			mine := newToken()
			cmd, check := w.start(mine, ready.Done)
			cmd.WaitDelay = time.Second
			add(s.Name+" "+w.name, mine, func() error { return host.Exec(soon(t), cmd) }, check)
		}
		add(s.Name+" upload", "", func() error {
			return host.Upload(soon(t), "/root/upload-"+s.Name, &sender{at: 4 << 20, f: ready.Done}, nil)
		}, func(*testing.T) {})
	}
	ready.Wait()
	return all
}

// unknownEnds waits for all, whose results are not known.
func unknownEnds(t *testing.T, all []underway) (texts string) {
	t.Helper()
	end := time.NewTimer(bound)
	defer end.Stop()
	for _, u := range all {
		var err error
		select {
		case err = <-u.result:
		case <-end.C:
			require.Fail(t, "no verdict", u.name)
		}
		t.Logf("%s: %v", u.name, err)
		require.Error(t, err, u.name)
		_, exited := transport.ExitCode(err)
		assert.False(t, exited, "%s: %v", u.name, err)
		assert.NotErrorIs(t, err, transport.ErrNotStarted, u.name)
		if u.mine != "" {
			assert.ErrorIs(t, err, transport.ErrOutputLost, u.name)
			assert.ErrorContains(t, err, "may still run", u.name)
		}
		u.check(t)
		texts += err.Error() + "\n"
	}
	return texts
}

func TestDaemonOfItsOwn(t *testing.T) {
	reallxd.Need(t)
	leavesNothing(t, func(t *testing.T) {
		d := reallxd.StartDaemon(t, "scripts/lxd")
		server := d.Servers(t)[0].InstanceServer
		instance := reallxd.Create(t, server)
		reallxd.Start(t, server, instance)
		host := func() *transport.LXD {
			return newLXD(t, d.Servers(t)[0], instance, nil)
		}

		outOfFiles(t, d, instance)

		// Shorter than Liveness: nothing is to be seen of it.
		stdin, end := io.Pipe()
		ready := make(chan struct{})
		patient := newLXD(t, server, instance, &transport.LXDOptions{Liveness: 10 * time.Second})
		p, err := patient.Start(soon(t), transport.Command{Args: transport.Shell("echo up; cat; exit 6"), Stdin: stdin, Stdout: upThen(func() { close(ready) })})
		require.NoError(t, err)
		<-ready
		d.Stop(t)
		go func() { // ends with the command
			io.WriteString(end, strings.Repeat("x", 1<<20))
			end.Close()
		}()
		<-time.After(time.Second)
		d.Continue(t)
		code, _ := transport.ExitCode(p.Wait())
		assert.Equal(t, 6, code)

		// Longer.
		all := begin(t, d, instance)
		d.Stop(t)
		texts := unknownEnds(t, all)
		d.Continue(t)
		// It finds its clients gone, and ends what they ran.
		require.NoError(t, reallxd.Left(server, instance, patience))
		noneUntold(t, host(), texts)

		// Killed.
		all = begin(t, d, instance)
		d.Kill(t)
		texts += unknownEnds(t, all)
		require.ErrorIs(t, patient.Exec(soon(t), transport.Command{Args: []string{"true"}}), transport.ErrNotStarted)
		d.Up(t)
		require.NoError(t, host().Exec(soon(t), transport.Command{Args: []string{"true"}}), "with the daemon back")
		noneUntold(t, host(), texts)
		// What the killed daemon has started goes on with broken pipes, as the verdicts say it may.
		processes, err := reallxd.Processes(d.Servers(t)[0], instance)
		require.NoError(t, err)
		for _, p := range processes {
			pid, args, _ := strings.Cut(p, " ")
			t.Logf("went on: %s", args)
			host().Exec(soon(t), transport.Command{Args: []string{"kill", "-KILL", pid}})
		}

		// Killed and back before the transport has given up.
		long := newLXD(t, d.Servers(t)[1], instance, nil)
		var out bytes.Buffer
		ready = make(chan struct{})
		p, err = long.Start(soon(t), transport.Command{Args: transport.Shell("echo up; exec sleep 1000"), Stdout: io.MultiWriter(&out, upThen(func() { close(ready) }))})
		require.NoError(t, err)
		<-ready
		d.Kill(t)
		d.Up(t)
		err = p.Wait()
		t.Log(err)
		assert.ErrorIs(t, err, transport.ErrOutputLost)
		assert.ErrorContains(t, err, "may still run")
		assert.Equal(t, "up\n", out.String())
	})
}

// noneUntold fails if an upload has left a temporary file of which its error does not tell.
func noneUntold(t *testing.T, host *transport.LXD, texts string) {
	t.Helper()
	out, err := transport.Output(soon(t), host, sh("ls -A /root"))
	require.NoError(t, err)
	for _, name := range strings.Fields(string(out)) {
		assert.Contains(t, texts, name+" may be left")
	}
}
