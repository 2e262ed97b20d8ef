package lxdtest_test

import (
	"slices"
	"strings"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/lxdtest"
)

// A scenario is a conversation with a server. The differential test has it with the fake and the real
// one and compares the transcripts; TestTraces compares the fake's with what is expected of it.
type scenario struct {
	name string
	do   func(w *wire)
	want []string // lines, or parts of them, that the transcript has in this order
}

// hurry shortens what the conversation waits for.
func (c scenario) hurry(v *lxdtest.Version) {
	switch {
	case strings.Contains(strings.Join(c.want, ""), "Timed out"):
		v.ConnectWindow = 2500 * time.Millisecond
	case c.name == "pings":
		v.PingInterval = lxdtest.LXD50.PingInterval
	case c.slow():
		v.StallTimeout = 2 * time.Second
	case c.name == "an operation vanishes":
		v.OperationLifetime = 1500 * time.Millisecond
	}
}

// slow reports whether it takes minutes with the real server.
func (c scenario) slow() bool { return c.name == "a client that takes nothing for two minutes" }

// alone reports whether nothing may run beside it. All SFTP sessions share one process on the real server, which nonsense ends. What keeps the
// processors busy for long has others miss the 5 s that the real server gives them.
func (c scenario) alone() bool {
	return strings.HasPrefix(c.name, "SFTP") || c.name == "stdin: one frame of 64 MiB"
}

const octets = "Content-Type: application/octet-stream\n"

// linger keeps the output of a command in a terminal alive: the real server loses, now and then, what is
// written right before the end.
const linger = "; sleep 0.2"

// ws is the body of an exec with sockets of a command that is no shell script.
func ws(command string, more ...string) string {
	return `{"command":` + command + `,"wait-for-websocket":true` + strings.Join(more, "") + `}`
}

// waitFor is a script that waits until something is given, or for the end of the fake's instance.
func waitFor(name string) string {
	return "until test -e ../tmp/" + name + " || ! test -d ../tmp; do sleep 0.05; done"
}

func (w *wire) give(name string) {
	w.get("POST", "/1.0/instances/INSTANCE/files?path=/tmp/"+name, octets, "")
}

// scenarios are all of them.
var scenarios = slices.Concat(execScenarios, socketScenarios, terminalScenarios, requestScenarios, fileScenarios, sftpScenarios, instanceScenarios)

// statusOf is the status in an instance's state.
func statusOf(b []byte) string {
	_, rest, _ := strings.Cut(string(b), `"metadata":{"status":"`)
	status, _, _ := strings.Cut(rest, `"`)
	return status
}

// until polls.
func until(t require.TestingT, f func() bool) {
	deadline := time.Now().Add(patience)
	for !f() {
		if time.Now().After(deadline) {
			require.Fail(t, "time-out")
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}
