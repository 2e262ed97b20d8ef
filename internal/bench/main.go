//go:build unix

// Bench measures the LXD transport beside its peers, on a real LXD, in one run: the official Go client, the lxc command, and OpenSSH (with rsync and tar
// over it) over a sshd of its own on the loopback interface; for trees also tar to tar without a network. Jobs are measured beside lxc launch and lxc exec. All contestants take turns, round after round, and medians are reported, because
// machines are busy: the ratios mean something where the times do not.
//
// scripts/bench runs it. It finds LXD through the variables that `scripts/lxd env` prints, and leaves nothing behind.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// bench is one run.
type bench struct {
	rounds int
	mib    int // of a stream
	file   int // MiB
	counts []int

	ram      bool
	patience time.Duration // with the slow contestants of trees

	profile string // directory, "": none

	image    string // of jobs
	exe      string // this program, for workers
	dir      string // temporary
	instance string
	ssh      *sshServer // nil: not to be had
	report   report
}

var parts = []struct {
	name string
	run  func(*bench, context.Context) error
}{
	{"exec", (*bench).execs},
	{"many", (*bench).many},
	{"stdout", (*bench).stdout},
	{"stdin", (*bench).stdin},
	{"file", (*bench).files},
	{"small", (*bench).small},
	{"src", (*bench).source},
	{"jobs", (*bench).jobs},
	{"size", (*bench).sizes},
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == workerArg {
		if err := work(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "bench worker:", err)
			os.Exit(1)
		}
		return
	}
	// The workers are in process groups of their own: an interrupt comes here only, and everything is taken down in order.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	b := new(bench)
	var names []string
	for _, p := range parts {
		names = append(names, p.name)
	}
	only := flag.String("only", strings.Join(names, ","), "the `parts` to measure")
	flag.IntVar(&b.rounds, "rounds", 7, "rounds; the contestants take turns in each")
	flag.IntVar(&b.mib, "mib", 256, "`MiB` in a stream (the goals speak of 1024)")
	flag.IntVar(&b.file, "file", 256, "`MiB` in a file (the goals speak of 1024)")
	flag.StringVar(&b.profile, "profile", "", "`directory` for CPU and heap profiles of the two Go clients' last rounds; measures wrongly")
	flag.DurationVar(&b.patience, "patience", 90*time.Second, "stop lxc file -r and the official client's file calls after this `time` with a tree; they have one round only")
	flag.BoolVar(&b.ram, "ram", false, "trees go to tmpfs on both sides: an ext4 that has no journal makes files slowly for minutes where others were removed")
	flag.StringVar(&b.image, "image", os.Getenv("TRANSPORT_LXD_IMAGE"), "`alias` of the image that jobs run on")
	counts := flag.String("many", "1,200,1000", "how many commands at once")
	flag.Parse()
	wanted := strings.Split(*only, ",")
	for _, w := range wanted {
		if !slices.Contains(names, w) {
			return fmt.Errorf("-only: there is no part %q, only %s", w, strings.Join(names, ", "))
		}
	}
	for _, s := range strings.Split(*counts, ",") {
		var n int
		if _, err := fmt.Sscan(s, &n); err != nil || n < 1 {
			return fmt.Errorf("-many: %q is not a number of commands", s)
		}
		b.counts = append(b.counts, n)
	}
	if b.rounds < 1 || b.mib < 1 || b.file < 1 || flag.NArg() > 0 {
		return fmt.Errorf("usage: bench [flags]; see -h")
	}

	if b.exe, err = os.Executable(); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "transport-bench-"); err != nil {
		return err
	}
	defer onMachine{}.remove(b.dir)
	remove, err := b.createInstance(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if e := remove(); e != nil && err == nil {
			err = e
		}
	}()
	if b.ssh, err = startSSH(ctx, b.dir); err != nil {
		b.report.note("no ssh rows: %v", err)
	} else {
		defer b.ssh.stop()
	}
	started := time.Now()
	fmt.Printf("%s, %d CPUs, LXD %s; %d rounds, medians\n", runtime.Version(), runtime.NumCPU(), b.serverVersion(), b.rounds)
	for _, p := range parts {
		if !slices.Contains(wanted, p.name) {
			continue
		}
		if err := p.run(b, ctx); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	b.report.end()
	fmt.Printf("took %v\n", time.Since(started).Round(time.Second))
	return nil
}

// haveLXC reports whether the lxc command is to be had.
func haveLXC() bool {
	_, err := exec.LookPath("lxc")
	return err == nil
}
