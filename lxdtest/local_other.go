//go:build !unix

package lxdtest

import (
	"os"
	"os/exec"
)

// signalProcess can only kill here.
func signalProcess(p *os.Process, n int) {
	switch n {
	case 1, 2, 3, 9, 15:
		_ = p.Kill()
	}
}

func exitStatus(state *os.ProcessState) int { return state.ExitCode() }

func prepare(*exec.Cmd, *Process) {}
