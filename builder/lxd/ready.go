package lxd

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/canonical/lxd/shared/api"

	"github.com/lxdtransport/transport/builder"
)

// Level is how far a host has come. Each level includes those before it.
type Level int

const (
	// Running: LXD says that the instance runs.
	Running Level = iota + 1

	// Exec: commands can be executed. A virtual machine's agent answers.
	Exec

	// Init: the init system has finished starting: systemd says running or degraded, OpenRC has entered its run level. Other
	// init systems say nothing, and are not waited for.
	Init

	// Network: a network interface has an address that is valid beyond its link. It is an IPv4 address, or after some seconds
	// without one an IPv6 address. Not waited for where the instance has no network interface.
	Network

	// CloudInit: cloud-init has done its work, where the image has it.
	CloudInit
)

func (l Level) String() string {
	names := []string{"made", "running", "exec", "init", "network", "cloud-init"}
	if l < 0 || int(l) >= len(names) {
		return fmt.Sprintf("Level(%d)", int(l))
	}
	return names[l]
}

// NotReadyError says that a host was made and started, but did not become ready.
type NotReadyError struct {
	Host  string
	Level Level // the first one that was not reached
	Err   error // why: the end of a context or of Options.ReadyTimeout, which matches context.DeadlineExceeded, and what was seen last
}

func (e *NotReadyError) Error() string {
	return fmt.Sprintf("%s did not reach the level %q: %v", e.Host, e.Level, e.Err)
}

func (e *NotReadyError) Unwrap() error { return e.Err }

// errTimeout is the end of Options.ReadyTimeout.
type errTimeout struct{ after time.Duration }

func (e errTimeout) Error() string        { return fmt.Sprintf("it took longer than %v", e.after) }
func (e errTimeout) Is(target error) bool { return target == context.DeadlineExceeded }

// errYet is what a level's check returns as long as there is nothing wrong.
type errYet string

func (e errYet) Error() string { return string(e) }

func yet(format string, args ...any) error { return errYet(fmt.Sprintf(format, args...)) }

// ready waits for the levels, one after the other.
func (b *Builder) ready(ctx context.Context, h *builder.Host) error {
	limited, cancel := context.WithTimeoutCause(ctx, b.opts.ReadyTimeout, errTimeout{b.opts.ReadyTimeout})
	defer cancel()
	w := &waiter{b: b, h: h}
	checks := []func(context.Context) error{w.running, w.exec, w.init, w.network, w.cloudInit}
	for level := Running; level <= b.opts.Ready; level++ {
		var pause backoff
		for {
			err := checks[level-1](limited)
			if err == nil {
				break
			}
			if limited.Err() != nil {
				if _, seen := errors.AsType[errYet](err); seen {
					w.last = err
				}
				why := context.Cause(limited)
				if w.last != nil {
					why = fmt.Errorf("%w: %w", why, w.last)
				}
				return &NotReadyError{h.Name, level, why}
			}
			if _, seen := errors.AsType[errYet](err); !seen {
				return &NotReadyError{h.Name, level, err}
			}
			w.last = err
			pause.wait(limited)
		}
		w.last = nil
	}
	return nil
}

// waiter is a host that is waited for.
type waiter struct {
	b    *Builder
	h    *builder.Host
	last error // of a check

	asked  bool // status is of now, and nobody has looked at it yet
	status int  // of the script

	only6 time.Time // since when there is an address, but no IPv4 one
}

// instance asks for the instance, not for its state: for that LXD starts a process that counts the network's bytes.
func (w *waiter) instance(ctx context.Context) (*api.Instance, error) {
	var i api.Instance
	err := w.b.rest.get(ctx, instancePath(w.h.Name), in(w.h.Project), &i)
	return &i, ended(err, i.StatusCode, i.Status)
}

// ended is the error of an instance that does not run any more.
func ended(err error, code api.StatusCode, status string) error {
	switch {
	case notFound(err):
		return errors.New("the instance has ended, and is gone")
	case err == nil && (code == api.Stopped || code == api.Error):
		return fmt.Errorf("the instance is in the state %s", quoted(status))
	}
	return err
}

func (w *waiter) running(ctx context.Context) error {
	i, err := w.instance(ctx)
	if err == nil && i.StatusCode != api.Running && i.StatusCode != api.Ready {
		err = yet("the instance is in the state %s", quoted(i.Status))
	}
	return err
}

// exec runs a command. That it is missing says that others can be executed. If the levels behind this one are wanted, it is
// the script that knows about them: each command takes LXD some 20 ms.
func (w *waiter) exec(ctx context.Context) error {
	if w.b.opts.Ready > Exec {
		return w.askAll(ctx)
	}
	_, err := w.run(ctx, "true")
	return err
}

//go:embed ready.sh
var readyScript string

// What the script says by its status; others are those of a host that it does not work on, which is not waited for.
const (
	initNotYet      = 75
	initFailed      = 70
	cloudInitNotYet = 76
	cloudInitFailed = 71
)

// ask runs the script.
func (w *waiter) ask(ctx context.Context, about ...string) error {
	status, err := w.run(ctx, append([]string{"/bin/sh", "-c", readyScript, "sh"}, about...)...)
	if err == nil {
		w.status = status
	}
	return err
}

func (w *waiter) askAll(ctx context.Context) error {
	about := []string{"init"}
	if w.b.opts.Ready >= CloudInit {
		about = append(about, "cloud-init")
	}
	err := w.ask(ctx, about...)
	w.asked = err == nil
	return err
}

func (w *waiter) init(ctx context.Context) error {
	if !w.asked {
		if err := w.askAll(ctx); err != nil {
			return err
		}
	}
	w.asked = false
	switch w.status {
	case initNotYet:
		return yet("init has not finished")
	case initFailed:
		return errors.New("init says that it has failed")
	}
	return nil
}

// cloudInit does not ask again if it had finished when init had.
func (w *waiter) cloudInit(ctx context.Context) error {
	if w.status == cloudInitNotYet {
		if err := w.ask(ctx, "cloud-init"); err != nil {
			return err
		}
	}
	switch w.status {
	case cloudInitNotYet:
		return yet("cloud-init has not finished")
	case cloudInitFailed:
		return errors.New("cloud-init says that it has failed")
	}
	return nil
}

// run runs a command in the host without any of its streams and returns its status.
func (w *waiter) run(ctx context.Context, args ...string) (int, error) {
	req := api.InstanceExecPost{Command: args}
	id, err := w.b.rest.do(ctx, http.MethodPost, instancePath(w.h.Name)+"/exec", in(w.h.Project), req, nil)
	if err != nil {
		return 0, w.notYet(ctx, err)
	}
	op, err := w.b.rest.wait(ctx, id)
	if op != nil {
		if code, ok := op.Metadata["return"].(float64); ok && code >= 0 {
			return int(code), nil
		}
	}
	if err == nil {
		err = errors.New("LXD tells no status of the command")
	}
	return 0, w.notYet(ctx, err)
}

// notYet decides whether a command that could not be executed is one that cannot be executed yet.
func (w *waiter) notYet(ctx context.Context, err error) error {
	if ctx.Err() != nil || hasCode(err, http.StatusForbidden) {
		return err
	}
	if _, ended := w.instance(ctx); ended != nil {
		return ended
	}
	return yet("a command could not be executed: %v", err)
}

// wait6 is how long an IPv4 address is waited for when there is an IPv6 one, which often comes first and without a use.
const wait6 = 3 * time.Second

func (w *waiter) network(ctx context.Context) error {
	s, err := w.b.rest.state(ctx, w.h)
	if err := ended(err, s.StatusCode, s.Status); err != nil {
		return err
	}
	four, six := addresses(s.Network)
	switch {
	case four != "":
		w.h.Address = four
		return nil
	case six != "" && w.only6.IsZero():
		w.only6 = time.Now()
	case six != "" && time.Since(w.only6) >= wait6:
		w.h.Address = six
		return nil
	}
	if six == "" {
		i, err := w.instance(ctx)
		if err != nil {
			return err
		}
		if !hasNIC(i.ExpandedDevices) {
			return nil
		}
	}
	return yet("no network interface has a global IPv4 address")
}

func hasNIC(devices map[string]map[string]string) bool {
	for _, d := range devices {
		if d["type"] == "nic" || d["type"] == "infiniband" {
			return true
		}
	}
	return false
}

// addresses returns the first global address of each family, by the names of the interfaces.
func addresses(network map[string]api.InstanceStateNetwork) (four, six string) {
	names := make([]string, 0, len(network))
	for name := range network {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		// Bridges that a build host makes for containers of its own are no way out.
		if name == "lo" || strings.HasPrefix(name, "docker") || strings.HasPrefix(name, "lxdbr") || strings.HasPrefix(name, "virbr") {
			continue
		}
		for _, a := range network[name].Addresses {
			if ip := net.ParseIP(a.Address); ip == nil || a.Scope != "global" {
				continue
			}
			if a.Family == "inet" && four == "" {
				four = a.Address
			} else if a.Family == "inet6" && six == "" {
				six = a.Address
			}
		}
	}
	return four, six
}
