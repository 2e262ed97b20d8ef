package main

import (
	"os"
	"syscall"
)

const hangUp = syscall.SIGINT // there is no hang-up; Ctrl-C does not get here in raw mode

// sizes never tells anything: Windows has no signal for it.
func sizes() (changed <-chan os.Signal, stop func()) { return nil, func() {} }
