//go:build !linux

package lxdtest

import (
	"errors"
	"os"
)

func openPTY(Size) (*terminal, error) { return nil, errors.ErrUnsupported }

func isTerminal(*os.File) bool { return false }
