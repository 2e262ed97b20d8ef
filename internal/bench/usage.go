//go:build unix

package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// cpuTime is time on CPUs, user's and system's.
type cpuTime = time.Duration

func ownCPU() (cpuTime, error)      { return rusage(syscall.RUSAGE_SELF) }
func childrenCPU() (cpuTime, error) { return rusage(syscall.RUSAGE_CHILDREN) }

func rusage(who int) (cpuTime, error) {
	var u syscall.Rusage
	err := syscall.Getrusage(who, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
}

// processCPU is for a process that has not ended; its clock ticks every 10 ms.
func processCPU(pid int) (cpuTime, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// What stands before the last parenthesis may have blanks in it; user and system time are fields 14 and 15 of all.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var ticks int
	for _, f := range fields[11:13] {
		n, err := strconv.Atoi(f)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

// statusKiB reads a line of /proc/self/status: VmRSS, or VmHWM, the most that it has been.
func statusKiB(name string) (int64, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			return strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		}
	}
	return 0, fmt.Errorf("/proc/self/status has no %s", name)
}

// memory is what this process holds at a moment.
type memory struct {
	RSS        int64 // KiB, as the kernel counts, with the garbage that Go has not collected
	Live       int64 // KiB, objects that survive a collection, and stacks
	Goroutines int
}

// measureMemory takes the RSS first, because it collects garbage then.
func measureMemory() (m memory, err error) {
	if m.RSS, err = statusKiB("VmRSS"); err != nil {
		return m, err
	}
	m.Goroutines = runtime.NumGoroutine()
	runtime.GC()
	runtime.GC() // what the first one has left in pools
	samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
	metrics.Read(samples)
	for _, s := range samples {
		m.Live += int64(s.Value.Uint64()) / 1024
	}
	return m, nil
}
