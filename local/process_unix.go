//go:build unix

package local

import (
	"fmt"
	"os"
	"syscall"

	"github.com/lxdtransport/transport"
)

// signals are those that all Unix systems have, by whatever numbers.
var signals = map[transport.Signal]syscall.Signal{
	"HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "QUIT": syscall.SIGQUIT, "ILL": syscall.SIGILL, "TRAP": syscall.SIGTRAP,
	"ABRT": syscall.SIGABRT, "BUS": syscall.SIGBUS, "FPE": syscall.SIGFPE, "KILL": syscall.SIGKILL, "USR1": syscall.SIGUSR1,
	"SEGV": syscall.SIGSEGV, "USR2": syscall.SIGUSR2, "PIPE": syscall.SIGPIPE, "ALRM": syscall.SIGALRM, "TERM": syscall.SIGTERM,
	"CHLD": syscall.SIGCHLD, "CONT": syscall.SIGCONT, "STOP": syscall.SIGSTOP, "TSTP": syscall.SIGTSTP, "TTIN": syscall.SIGTTIN,
	"TTOU": syscall.SIGTTOU, "URG": syscall.SIGURG, "XCPU": syscall.SIGXCPU, "XFSZ": syscall.SIGXFSZ, "VTALRM": syscall.SIGVTALRM,
	"PROF": syscall.SIGPROF, "WINCH": syscall.SIGWINCH, "IO": syscall.SIGIO, "SYS": syscall.SIGSYS,
}

func signalProcess(p *os.Process, sig transport.Signal) error {
	number, ok := signals[sig]
	if !ok {
		return fmt.Errorf("unknown signal %q: names are POSIX's without SIG, such as TERM", string(sig))
	}
	return p.Signal(number)
}

// killGroup kills what is left of the command's process group.
func killGroup(p *os.Process) { _ = syscall.Kill(-p.Pid, syscall.SIGKILL) }

func exitStatus(state *os.ProcessState) (int, transport.Signal) {
	status := state.Sys().(syscall.WaitStatus)
	if !status.Signaled() {
		return status.ExitStatus(), ""
	}
	for name, number := range signals {
		if number == status.Signal() {
			return 128 + int(number), name
		}
	}
	return 128 + int(status.Signal()), ""
}

// processAttributes puts the command into a process group of its own, or for a terminal into a session.
func processAttributes(cmd transport.Command) (*syscall.SysProcAttr, error) {
	sys := new(syscall.SysProcAttr)
	if cmd.TTY != nil {
		sys.Setsid, sys.Setctty = true, true
	} else {
		sys.Setpgid = true
	}
	if u := cmd.User; u != nil {
		// Only root may change groups, and has to: its own are not the user's.
		sys.Credential = &syscall.Credential{Uid: u.UID, Gid: u.GID, NoSetGroups: os.Geteuid() != 0}
	}
	return sys, nil
}
