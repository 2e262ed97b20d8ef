//go:build unix

package main

import (
	"os"
	"os/signal"
	"syscall"
)

const hangUp = syscall.SIGHUP

// sizes tells when the terminal's size may have changed.
func sizes() (changed <-chan os.Signal, stop func()) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGWINCH)
	return c, func() { signal.Stop(c) }
}
