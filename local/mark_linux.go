package local

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"strconv"
)

// newMark returns the name of an environment variable that no other command has.
func newMark() string { return "TRANSPORT_COMMAND_" + rand.Text() }

// killMarked kills every process that has the mark in its environment. It looks until it finds none, for one that forks
// may be one ahead.
func killMarked(mark string) {
	for range 10 {
		found := false
		names, _ := filepath.Glob("/proc/[0-9]*")
		for _, name := range names {
			pid, err := strconv.Atoi(filepath.Base(name))
			if err == nil && killIfMarked(pid, mark) {
				found = true
			}
		}
		if !found {
			return
		}
	}
}

// killIfMarked takes hold of the process before it looks at its environment, so that a process that gets its number cannot be
// killed in its place.
func killIfMarked(pid int, mark string) bool {
	p, err := os.FindProcess(pid)
	if err != nil {
		return false
	}
	defer func() { _ = p.Release() }()
	env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil || !bytes.Contains(env, []byte(mark+"=")) {
		return false
	}
	return p.Kill() == nil
}
