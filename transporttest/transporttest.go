// Package transporttest tests implementations of [transport.Transport]. It holds every promise of that
// interface as a case with a name, so that transports do not drift apart:
//
//	func TestConformance(t *testing.T) {
//		transporttest.Run(t, func(t *testing.T) transport.Transport {
//			host, err := mine.Dial(…)
//			if err != nil {
//				t.Fatal(err)
//			}
//			return host
//		}, transporttest.Start, transporttest.Signals)
//	}
//
// The host has to be a POSIX system with /bin/sh and cat, chmod, find, head, id, kill, ln, ls, mkdir, mkfifo, printf, pwd, readlink, rm,
// sleep, test, touch, tr, wc, and for [TTY] stty, in the PATH that a command gets: those of busybox will do. Every case makes a directory of its own
// below /tmp of the host, which is made if it is missing, and removes it. A command that runs with Dir /tmp/x has to find the file that
// was uploaded to /tmp/x/f as f; absolute paths in arguments may mean something else.
//
// A case that fails says what was promised and what happened. Cases wait for what has to happen and not
// for time to pass; the few that show that something does not happen give it half a second.
package transporttest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lxdtransport/transport"
)

// Capability is something that not every transport or host has. What is declared is tested; what is not is skipped
// by name, and never found out by trying.
type Capability string

const (
	// Start: the transport is a [transport.Starter].
	Start Capability = "Start"

	// Signals: Process.Signal and Command.CancelSignal deliver any POSIX signal, to the command alone. Without it
	// CancelSignal TERM and KILL have to work all the same.
	Signals Capability = "Signals"

	// TTY: Command.TTY gives a terminal; with [Start] also Process.Resize.
	TTY Capability = "TTY"

	// WholeTTY: what a command writes to its terminal just before it exits always arrives. LXD 5.0 loses some of it now and
	// then, and says nothing, so that nobody can know.
	WholeTTY Capability = "WholeTTY"

	// WholeStderr: stderr always arrives whole, even much of it that is written just before the command ends. Where a member of
	// a cluster passes a command on to another one, LXD before 5.0.5 loses the end of it now and then, and when it is very busy that of stdout,
	// too; the error says so then. Without this, a case that comes to nothing for such an error, [transport.ErrOutputLost], is skipped.
	WholeStderr Capability = "WholeStderr"

	// Users: commands run as root unless Command.User says otherwise, and files can be given to anyone.
	Users Capability = "Users"

	// Children: when ctx ends, the processes that the command has started end with it.
	Children Capability = "Children"

	// Strays: when ctx ends, what the command left behind is found even if it has moved to a session of its own. The host
	// needs setsid.
	Strays Capability = "Strays"

	// EarlyStatus: the command's status is known while something that it left behind holds its output open. LXD before
	// 5.0.3 keeps it back until the last holder has ended.
	EarlyStatus Capability = "EarlyStatus"

	// SameHost: all transports that new returns lead to one host, so that one of them sees what another has left when it was
	// closed.
	SameHost Capability = "SameHost"
)

// row is one promise.
type row struct {
	name  string
	why   string // whose bug it is elsewhere, or what breaks without it
	needs []Capability
	run   func(context.Context, transport.Transport) error
}

// patience is how long a case may take: much longer than any does, on a busy machine.
const patience = 2 * time.Minute

// soon is "a few seconds" of the contract, with room for a busy machine.
const soon = 20 * time.Second

// Run tests a transport. new is called for every case and returns a transport to the same or another host, which the case closes. caps
// are what it is capable of besides the promises that all transports keep. The cases are parallel subtests; what new has to give back belongs
// into t.Cleanup. Besides what its name says, every case fails if its transport leaves a goroutine behind when
// it has been closed, or new one when all is done that it gave to t.Cleanup.
func Run(t *testing.T, new func(t *testing.T) transport.Transport, caps ...Capability) {
	t.Helper()
	for _, r := range rows() {
		t.Run(r.name, func(t *testing.T) {
			if missing := r.missing(caps); missing != nil {
				t.Skipf("needs the capabilities %v, which were not declared", missing)
			}
			if runtime.GOOS == "windows" && strings.HasPrefix(r.name, "tree/") {
				t.Skip("needs a POSIX system here, too, for the names and modes of its trees")
			}
			t.Parallel()
			label, inLabel := newLabel()
			t.Cleanup(func() { // comes after what new gives to it
				if err := noneLeft(label, soon, leftByNew); err != nil && !t.Failed() {
					t.Error(err)
				}
			})
			var hosts []transport.Transport
			inLabel(func() { // here, for new may call t.Fatal
				for range r.hosts() {
					hosts = append(hosts, new(t))
				}
			})
			err := check(r, hosts, limits{patience, soon})
			if excused(err, caps) {
				t.Skipf("the host does not have the capability %s: %v", WholeStderr, err)
			}
			if err != nil {
				t.Errorf("%v\n(%s)", err, r.why)
			}
		})
	}
}

// excused reports whether a case has failed because the host loses output and says so, as it may.
func excused(err error, caps []Capability) bool {
	return errors.Is(err, transport.ErrOutputLost) && !slices.Contains(caps, WholeStderr)
}

const leftByNew = "goroutines are left that were started when the transport was made"

func rows() []row {
	var all []row
	for _, some := range [][]row{
		execRows, outputRows, inputRows, valueRows, cancelRows, leftRows, startRows, terminalRows,
		uploadRows, uploadErrorRows, downloadRows, fileRows, treeRows, closeRows,
	} {
		all = append(all, some...)
	}
	return all
}

func (r row) missing(caps []Capability) []Capability {
	var missing []Capability
needs:
	for _, need := range r.needs {
		for _, c := range caps {
			if c == need {
				continue needs
			}
		}
		missing = append(missing, need)
	}
	return missing
}

// hosts is how many transports a case needs.
func (r row) hosts() int {
	if slices.Contains(r.needs, SameHost) {
		return 2
	}
	return 1
}

// limits are the times of a case.
type limits struct {
	patience time.Duration // for the case
	soon     time.Duration // for one call that has to return
}

// bench is what a case works with besides its transport.
type bench struct {
	limits
	label   string                // of its goroutines
	hosts   []transport.Transport // its own, and one more if it needs SameHost
	scratch string                // the directory, once it was made, which the last of them removes
	atEnd   []func() error        // run after the transports were closed and their goroutines have ended
}

type benchKey struct{}

func benchOf(ctx context.Context) *bench { return ctx.Value(benchKey{}).(*bench) }

// check runs a case and closes its transports.
func check(r row, hosts []transport.Transport, l limits) error {
	label, inLabel := newLabel()
	b := &bench{limits: l, label: label, hosts: hosts}
	done := make(chan error, 1)
	go inLabel(func() { // waited for below, unless the transport holds it for ever
		ctx, cancel := context.WithTimeoutCause(context.Background(), l.patience, errPatience)
		defer cancel()
		err := r.run(context.WithValue(ctx, benchKey{}, b), hosts[0])
		if err == nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		done <- errors.Join(err, b.finish())
	})
	hard := time.NewTimer(l.patience + l.soon)
	defer hard.Stop()
	select {
	case err := <-done:
		if err != nil {
			return err
		}
	case <-hard.C:
		return fmt.Errorf("the case has not returned %v after its context had ended; its goroutines:\n%s", l.soon, strings.Join(labelled(label), "\n\n"))
	}
	if err := noneLeft(label, l.soon, "goroutines are left after Close"); err != nil {
		return err
	}
	for _, f := range b.atEnd {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

var errPatience = errors.New("the case took too long")

// finish removes the scratch directory and closes the transports.
func (b *bench) finish() error {
	ctx, cancel := context.WithTimeout(context.Background(), b.soon)
	defer cancel()
	var err error
	if b.scratch != "" {
		err = b.hosts[len(b.hosts)-1].Exec(ctx, transport.Command{Args: []string{"rm", "-rf", strings.TrimPrefix(b.scratch, "/")}, Dir: "/"})
		if errors.Is(err, transport.ErrClosed) {
			err = nil // by the case itself
		}
		if err != nil {
			err = fmt.Errorf("removing %s: %w", b.scratch, err)
		}
	}
	for _, host := range b.hosts {
		if closeErr := host.Close(); closeErr != nil {
			err = errors.Join(err, fmt.Errorf("closing the transport: %w", closeErr))
		}
	}
	return err
}
