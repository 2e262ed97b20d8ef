//go:build unix

package reallxd

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
)

// Daemon is an LXD that a test has for itself, to do to it what it likes.
type Daemon struct {
	script    string
	env       []string
	variables map[string]string
}

// freePort finds one that nobody gets by chance while the daemon is down: below those that the kernel hands out.
func freePort(t testing.TB) int {
	t.Helper()
	for port := 21000 + os.Getpid()%5000; port < 30000; port++ {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}

// StartDaemon starts one through scripts/lxd, whose path it is given. It is taken down after the test.
func StartDaemon(t testing.TB, script string) *Daemon {
	t.Helper()
	Need(t)
	port := freePort(t)
	state := fmt.Sprintf("/var/tmp/transport-chaos-%d", os.Getpid())
	d := &Daemon{script: script, env: append(os.Environ(), "TRANSPORT_LXD_STATE="+state, "TRANSPORT_LXD_PORT="+strconv.Itoa(port))}
	t.Cleanup(func() {
		d.signal(t, syscall.SIGCONT)
		d.run(t, "down")
	})
	d.Up(t)
	d.variables = map[string]string{}
	for _, m := range regexp.MustCompile(`\b(TRANSPORT_LXD_\w+)=(\S+)`).FindAllStringSubmatch(d.run(t, "env"), -1) {
		d.variables[m[1]] = m[2]
	}
	return d
}

func (d *Daemon) run(t testing.TB, verb string) string {
	t.Helper()
	cmd := exec.Command(d.script, verb)
	var said strings.Builder
	cmd.Env, cmd.Stderr = d.env, &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("scripts/lxd %s: %v\n%s", verb, err, &said)
	}
	return string(out)
}

// Up starts it, again after it was killed.
func (d *Daemon) Up(t testing.TB) { t.Helper(); d.run(t, "up") }

// pid is its process, or 0.
func (d *Daemon) pid(t testing.TB) int {
	t.Helper()
	// "scripts/lxd status" asks it, which may be stopped. It is the one of ours whose arguments are these.
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range found {
		args, err := os.ReadFile(f)
		logfile := filepath.Dir(filepath.Dir(d.variables["TRANSPORT_LXD_SOCKET"])) + "/log/lxd.log"
		if err == nil && string(args) == strings.Join([]string{"lxd", "--group", "root", "--logfile", logfile, ""}, "\x00") {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			return pid
		}
	}
	return 0
}

func (d *Daemon) signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if pid := d.pid(t); pid > 0 {
		if err := syscall.Kill(pid, sig); err != nil {
			t.Error(err)
		}
	} else if sig != syscall.SIGCONT {
		t.Error("the daemon does not run")
	}
}

// Kill kills it. Its instances go on.
func (d *Daemon) Kill(t testing.TB) { t.Helper(); d.signal(t, syscall.SIGKILL) }

// Stop has it do nothing until Continue.
func (d *Daemon) Stop(t testing.TB) { t.Helper(); d.signal(t, syscall.SIGSTOP) }

// Continue ends what Stop began.
func (d *Daemon) Continue(t testing.TB) { t.Helper(); d.signal(t, syscall.SIGCONT) }

// LimitFiles lets it have no more than so many descriptors besides those that it has. The returned function takes the limit off.
func (d *Daemon) LimitFiles(t testing.TB, more int) (lift func()) {
	t.Helper()
	pid := strconv.Itoa(d.pid(t))
	prlimit := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("prlimit", append([]string{"--pid", pid}, args...)...).CombinedOutput()
		if err != nil {
			t.Errorf("prlimit: %v\n%s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	open, err := os.ReadDir("/proc/" + pid + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	before := prlimit("--nofile", "--noheadings", "--raw", "--output=SOFT")
	prlimit(fmt.Sprintf("--nofile=%d:", len(open)+more))
	return func() { prlimit("--nofile=" + before + ":") }
}

// Terminate asks it to end, which it does when what it is doing has ended. Its instances go on.
func (d *Daemon) Terminate(t testing.TB) { t.Helper(); d.signal(t, syscall.SIGTERM) }

// Ended waits until it has ended.
func (d *Daemon) Ended(t testing.TB) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); d.pid(t) > 0; <-time.After(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the daemon does not end")
		}
	}
}

// Variable is one of those that scripts/lxd env prints for it.
func (d *Daemon) Variable(name string) string { return d.variables[name] }

// Servers returns the ways to it, new connections each time.
func (d *Daemon) Servers(t testing.TB) []Server {
	t.Helper()
	file := func(variable string) string {
		b, err := os.ReadFile(d.variables[variable])
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	unix, err := lxd.ConnectLXDUnix(d.variables["TRANSPORT_LXD_SOCKET"], nil)
	if err != nil {
		t.Fatal(err)
	}
	https, err := lxd.ConnectLXD(d.variables["TRANSPORT_LXD_ADDR"], &lxd.ConnectionArgs{
		TLSClientCert: file("TRANSPORT_LXD_CERT"),
		TLSClientKey:  file("TRANSPORT_LXD_KEY"),
		TLSServerCert: file("TRANSPORT_LXD_SERVER_CERT"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return []Server{{"unix", unix}, {"https", https}}
}
