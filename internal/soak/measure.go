//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"time"
)

// sample is what the process holds while nothing runs.
type sample struct {
	Commands   int
	Time       time.Duration // since the beginning
	RSS        int64         // KiB, as the kernel counts, with what Go has not given back
	Live       int64         // KiB, objects that survive a collection, and stacks
	Goroutines int
	FDs        int
}

// measure waits for the goroutines of the commands to be gone, which some are a moment after their command, and takes a sample.
func (s *soak) measure(ctx context.Context, commands int) error {
	m := sample{Commands: commands, Time: time.Since(s.started)}
	var err error
	if m.RSS, err = rss(); err != nil {
		return err
	}
	runtime.GC()
	runtime.GC() // what the first one has left in pools
	live := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
	metrics.Read(live)
	for _, l := range live {
		m.Live += int64(l.Value.Uint64()) / 1024
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	m.FDs, m.Goroutines = len(fds)-1, runtime.NumGoroutine()
	s.samples = append(s.samples, m)
	fmt.Printf("%6d commands  %6.1f s  %6d KiB RSS  %5d KiB live  %3d goroutines  %3d descriptors\n", m.Commands, m.Time.Seconds(), m.RSS, m.Live, m.Goroutines, m.FDs)
	return context.Cause(ctx)
}

func rss() (int64, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		}
	}
	return 0, errors.New("/proc/self/status has no VmRSS")
}

func table(samples []sample) []byte {
	var b bytes.Buffer
	b.WriteString("commands,seconds,rss_kib,live_kib,goroutines,descriptors\n")
	for _, s := range samples {
		fmt.Fprintf(&b, "%d,%.1f,%d,%d,%d,%d\n", s.Commands, s.Time.Seconds(), s.RSS, s.Live, s.Goroutines, s.FDs)
	}
	return b.Bytes()
}

// flat compares the second tenth of the run, when everything is warm, with the last. Idle connections come and go by the dozen, which
// is allowed for; a leak of one thing in a hundred commands is not.
func flat(samples []sample) error {
	if len(samples) < 20 {
		return nil
	}
	tenth := len(samples) / 10
	for _, c := range []struct {
		name  string
		of    func(sample) int64
		slack int64
	}{
		{"RSS (KiB)", func(s sample) int64 { return s.RSS }, 8 << 10},
		{"live memory (KiB)", func(s sample) int64 { return s.Live }, 1 << 10},
		{"goroutines", func(s sample) int64 { return int64(s.Goroutines) }, 40},
		{"descriptors", func(s sample) int64 { return int64(s.FDs) }, 20},
	} {
		before, after := median(samples[tenth:2*tenth], c.of), median(samples[len(samples)-tenth:], c.of)
		fmt.Printf("%s: %d at first, %d in the end\n", c.name, before, after)
		if after > before+c.slack {
			return fmt.Errorf("%s grew from %d to %d", c.name, before, after)
		}
	}
	return nil
}

func median(samples []sample, of func(sample) int64) int64 {
	s := slices.SortedFunc(slices.Values(samples), func(a, b sample) int { return cmp.Compare(of(a), of(b)) })
	return of(s[len(s)/2])
}
