//go:build unix

package lxdtest

import (
	"os"
	"os/exec"
	"syscall"
)

// signals are the Linux numbers of those that other kernels number differently, too.
var signals = map[int]syscall.Signal{
	7: syscall.SIGBUS, 10: syscall.SIGUSR1, 12: syscall.SIGUSR2, 17: syscall.SIGCHLD, 18: syscall.SIGCONT,
	19: syscall.SIGSTOP, 20: syscall.SIGTSTP, 23: syscall.SIGURG, 31: syscall.SIGSYS,
}

// signalProcess passes on the wire's Linux number.
func signalProcess(p *os.Process, n int) {
	sig, ok := signals[n]
	if !ok {
		sig = syscall.Signal(n)
	}
	_ = p.Signal(sig)
}

func exitStatus(state *os.ProcessState) int {
	st, ok := state.Sys().(syscall.WaitStatus)
	if !ok || !st.Signaled() {
		return state.ExitCode()
	}
	for n, sig := range signals {
		if sig == st.Signal() {
			return 128 + n
		}
	}
	return 128 + int(st.Signal())
}

func prepare(cmd *exec.Cmd, p *Process) {
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if p.TTY && isTerminal(p.files[0]) {
		cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
	}
	if os.Geteuid() == 0 && (p.User != 0 || p.Group != 0) {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: p.User, Gid: p.Group}
	}
}
