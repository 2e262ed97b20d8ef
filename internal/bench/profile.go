//go:build unix

package main

import (
	"errors"
	"os"
	"runtime/pprof"
)

// startProfile profiles the CPU until stop is called. A later profile replaces the one before.
func startProfile(prefix string) (stop func(), err error) {
	if prefix == "" {
		return func() {}, nil
	}
	f, err := os.Create(prefix + ".cpu.prof")
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, err
	}
	return func() {
		pprof.StopCPUProfile()
		f.Close()
	}, nil
}

// heapProfile writes what is on the heap now, and the goroutines.
func heapProfile(prefix string) error {
	if prefix == "" {
		return nil
	}
	write := func(name string) error {
		f, err := os.Create(prefix + "." + name + ".prof")
		if err != nil {
			return err
		}
		return errors.Join(pprof.Lookup(name).WriteTo(f, 0), f.Close())
	}
	return errors.Join(write("heap"), write("goroutine"))
}
