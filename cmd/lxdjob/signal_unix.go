//go:build unix

package main

import (
	"os"
	"os/signal"
	"syscall"
)

// endSignals end a run in order.
var endSignals = []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP}

// ignorePipe makes a write to a pipe that nobody reads an error, not the end of this process, which would leave the host.
func ignorePipe() { signal.Ignore(syscall.SIGPIPE) }
