//go:build !unix

package main

import (
	"os"
	"syscall"
)

// endSignals end a run in order.
var endSignals = []os.Signal{os.Interrupt, syscall.SIGTERM}

func ignorePipe() {}
