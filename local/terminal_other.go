//go:build !linux

package local

import (
	"errors"
	"fmt"
	"os"

	"github.com/lxdtransport/transport"
)

var errNoTerminals = fmt.Errorf("there are none on this system: %w", errors.ErrUnsupported)

func openTerminal(transport.TerminalSize) (master, slave *os.File, err error) {
	return nil, nil, errNoTerminals
}

func resizeTerminal(*os.File, transport.TerminalSize) error { return errNoTerminals }

func isTerminalEnd(error) bool { return false }
