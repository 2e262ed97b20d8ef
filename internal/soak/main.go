//go:build linux

// Soak runs commands of all kinds through one process for a long time and writes down what the process holds: memory, goroutines and
// descriptors, in rounds, between which nothing runs. It fails if a command has another result than the one right one, if any of that
// grows, or if something is left in the instance or at the daemon.
//
//	eval "$(scripts/lxd env)" && go run ./internal/soak -svg docs/soak.svg
//
// It leaves nothing behind.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/lxdtransport/transport"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

// soak is one run.
type soak struct {
	hosts   []*transport.LXD // over the socket and over HTTPS
	samples []sample
	started time.Time
}

func run(ctx context.Context) (err error) {
	total := flag.Int("n", 20000, "`commands`, transfers among them")
	round := flag.Int("round", 250, "commands between two measurements")
	atOnce := flag.Int("at-once", 8, "commands at the same time")
	csv := flag.String("csv", "", "`file` for the measurements")
	svg := flag.String("svg", "", "`file` for a graph of them")
	flag.Parse()
	if *total < 1 || *round < 1 || *atOnce < 1 || flag.NArg() > 0 {
		return fmt.Errorf("usage: soak [flags]; see -h")
	}
	instance, remove, err := createInstance()
	if err != nil {
		return err
	}
	defer func() {
		if e := remove(); e != nil && err == nil {
			err = e
		}
	}()
	s := &soak{started: time.Now()}
	for _, way := range []string{"unix", "https"} {
		server, err := connect(way)
		if err != nil {
			return err
		}
		host, err := transport.NewLXD(server, instance, nil)
		if err != nil {
			return err
		}
		defer host.Close()
		s.hosts = append(s.hosts, host)
	}
	for done := 0; done < *total; {
		n := min(*round, *total-done)
		if err := s.round(ctx, done, n, *atOnce); err != nil {
			return err
		}
		done += n
		if err := s.measure(ctx, done); err != nil {
			return err
		}
	}
	if err := s.left(ctx, instance); err != nil {
		return err
	}
	last := s.samples[len(s.samples)-1]
	fmt.Printf("%s, %d CPUs: %d commands in %v, %.0f a second\n", runtime.Version(), runtime.NumCPU(), last.Commands, last.Time.Round(time.Second), float64(last.Commands)/last.Time.Seconds())
	if *csv != "" {
		if err := os.WriteFile(*csv, table(s.samples), 0o644); err != nil {
			return err
		}
	}
	if *svg != "" {
		if err := os.WriteFile(*svg, graph(s.samples), 0o644); err != nil {
			return err
		}
	}
	return flat(s.samples)
}

// round runs the commands from first on, atOnce at a time, and waits for all.
func (s *soak) round(ctx context.Context, first, n, atOnce int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	done := make(chan error)
	for range atOnce {
		go func() { // ends with next
			for i := range next {
				c := kinds[i%len(kinds)]
				limit, stop := context.WithTimeout(ctx, 2*time.Minute)
				err := c.run(limit, s.hosts[i/len(kinds)%len(s.hosts)], i)
				stop()
				if err != nil {
					cancel(fmt.Errorf("command %d (%s): %w", i, c.name, err))
				}
			}
			done <- nil
		}()
	}
feeding:
	for i := first; i < first+n; i++ {
		select {
		case next <- i:
		case <-ctx.Done():
			break feeding
		}
	}
	close(next)
	for range atOnce {
		<-done
	}
	return context.Cause(ctx)
}
