package lxd

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// processPrefix begins the names of owners that are processes.
const processPrefix = "linux "

// machine is what the processes that can see each other have in common: the same boot of the same kernel, and the same process namespace.
func machine() string {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	namespace, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(boot)) + " " + namespace
}

// started returns when a process was started, in the kernel's terms, which tells it from a later one of the same number. "": not known.
func started(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// What is before the last ')' is the command's name, with anything in it.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return ""
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return "ended"
	}
	return fields[19]
}

// thisProcess is the owner that stands for this process.
func thisProcess() string {
	m, since := machine(), started(os.Getpid())
	if m == "" || since == "" {
		return unknownOwner()
	}
	return fmt.Sprintf("%s%s %d %s", processPrefix, m, os.Getpid(), since)
}

// processGone reports whether an owner is known to be a process that has ended.
func processGone(owner string) bool {
	m := machine()
	rest, ours := strings.CutPrefix(owner, processPrefix+m+" ")
	if m == "" || !ours {
		return false
	}
	number, since, _ := strings.Cut(rest, " ")
	pid, err := strconv.Atoi(number)
	if err != nil || pid <= 0 {
		return false
	}
	if syscall.Kill(pid, 0) == syscall.ESRCH {
		return true
	}
	now := started(pid)
	return now != "" && now != since
}
