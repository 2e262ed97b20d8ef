//go:build !unix

package local

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/lxdtransport/transport"
)

func signalProcess(p *os.Process, sig transport.Signal) error {
	if sig == transport.SIGKILL {
		return p.Kill()
	}
	return fmt.Errorf("signal %q: this system can only kill: %w", string(sig), errors.ErrUnsupported)
}

func killGroup(*os.Process) {}

func exitStatus(state *os.ProcessState) (int, transport.Signal) { return state.ExitCode(), "" }

func processAttributes(cmd transport.Command) (*syscall.SysProcAttr, error) {
	if cmd.User != nil {
		return nil, fmt.Errorf("Command.User: this system has no numeric users: %w", errors.ErrUnsupported)
	}
	return nil, nil
}
