package ssh

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/lxdtransport/transport"
)

// What a cancelled command leaves behind on the host is found by the variable in its environment, and by descent from processes that have
// it. A script finds and kills it.

// newMark returns the part of a variable's name that follows markPrefix.
func newMark() string { return rand.Text() }

// reapScript is the one that the LXD transport runs. It needs nothing but a shell and /proc.
//
//go:embed reap.sh
var reapScript string

// killGroup ends what has cleared its environment, as far as it is still the command, or in its process group.
const killGroup = `
if [ -n "$1" ]; then kill -s KILL "$1" 2>/dev/null; kill -s KILL -- "-$1" 2>/dev/null; fi
exit 0
`

// reapTime bounds one run of the script.
const reapTime = 3 * time.Second

// sweep kills what the command has left behind, and the command itself. It reports whether the host has heard it.
func (e *execution) sweep() bool {
	if e.internal {
		return false
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), reapTime, fmt.Errorf("no answer within %v", reapTime))
	defer cancel()
	pid, _ := e.pid()
	out, err := e.t.own(ctx, transport.Command{Args: transport.Shell(reapScript+killGroup, pid), Stdin: strings.NewReader(e.mark + "\n")})
	killed, left, whole := parseReaped(out)
	if err == nil && !whole {
		err = errors.New("the script that looks for them was not heard to its end")
	}
	switch {
	case err != nil:
		e.swept = fmt.Sprintf("whether it has left processes behind was not confirmed: %v", err)
	case left > 0:
		e.swept = fmt.Sprintf("processes killed: %d, of which %d did not die", killed, left)
	default:
		e.swept = fmt.Sprintf("processes killed: %d", killed)
	}
	return err == nil
}

// parseReaped reads what the script says.
func parseReaped(out []byte) (killed, left int, whole bool) {
	for line := range bytes.Lines(out) {
		switch word, _, _ := strings.Cut(strings.TrimSpace(string(line)), " "); word {
		case "killed":
			killed++
		case "left":
			left++
		case "done":
			whole = true
		}
	}
	return killed, left, whole
}

// mostOwn bounds what is kept of the output of a command of our own: the host may be hostile.
const mostOwn = 1 << 20

// own runs a command of our own, within ctx, and returns its output.
func (t *Transport) own(ctx context.Context, cmd transport.Command) ([]byte, error) {
	out := &bounded{most: mostOwn}
	cmd.Stdout, cmd.WaitDelay = out, writeGrace
	e, err := t.launch(ctx, cmd, func() {}, true)
	if err == nil {
		err = e.run()
	}
	if exit, ok := errors.AsType[*transport.ExitError](err); ok && len(exit.Stderr) > 0 {
		err = fmt.Errorf("%w: %q", err, firstLine(exit.Stderr))
	}
	return out.Bytes(), err
}

// firstLine is the first line of what the host says, as far as it is short.
func firstLine(text []byte) []byte {
	line, _, _ := bytes.Cut(text, []byte("\n"))
	return line[:min(len(line), 200)]
}

// bounded keeps no more than the first bytes.
type bounded struct {
	bytes.Buffer
	most int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.Buffer.Write(p[:max(0, min(len(p), b.most-b.Len()))])
	return len(p), nil
}
