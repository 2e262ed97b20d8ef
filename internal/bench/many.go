//go:build unix

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/lxdtransport/transport"
)

// manyRounds is enough for what is counted more than it is timed.
const manyRounds = 3

// many measures commands that run at the same time, over the unix socket.
func (b *bench) many(ctx context.Context) error {
	server, err := connect("unix")
	if err != nil {
		return err
	}
	host, err := transport.NewLXD(server, b.instance, nil) // for the gate only
	if err != nil {
		return err
	}
	defer host.Close()
	rows := [][]string{{"", "", "right", "s", "client CPU ms", "RSS KiB", "live KiB", "goroutines", "process MiB at most"}}
	for _, n := range b.counts {
		all := map[string]map[string][]float64{"ours": {}, "official": {}}
		right := map[string]int{}
		rounds := min(b.rounds, manyRounds)
		for round := range rounds {
			kinds := []string{"ours", "official"}
			for i := range kinds {
				kind := kinds[(i+round)%len(kinds)]
				r, err := b.oneMany(ctx, host, kind, n)
				if err != nil {
					return err
				}
				right[kind] += r.Right
				if r.Right < n {
					b.report.note("%d at once, round %d: the %s lost %d; the first: %s", n, round+1, kind, n-r.Right, r.FirstBad)
				}
				running := float64(max(1, r.Running))
				for name, v := range map[string]float64{
					"wall": r.Wall.Seconds(), "cpu": ms(r.CPU) / float64(n), "peak": float64(r.PeakKiB) / 1024,
					"rss": float64(r.Memory.RSS) / running, "live": float64(r.Memory.Live) / running, "goroutines": float64(r.Memory.Goroutines) / running,
				} {
					all[kind][name] = append(all[kind][name], v)
				}
			}
		}
		ours, official := medians(all["ours"]), medians(all["official"])
		names := []string{"wall", "cpu", "rss", "live", "goroutines", "peak"}
		row := func(name string, right string, cell func(string) string) {
			cells := []string{fmt.Sprintf("%d at once", n), name, right}
			for _, f := range names {
				cells = append(cells, cell(f))
			}
			rows = append(rows, cells)
		}
		row("ours, unix", fmt.Sprintf("%d/%d", right["ours"], n*rounds), func(f string) string { return number(ours[f]) })
		row("official client, unix", fmt.Sprintf("%d/%d", right["official"], n*rounds), func(f string) string { return number(official[f]) })
		row("ours / it", "", func(f string) string { return ratio(ours[f], official[f]) })
		if n == 1 {
			continue // no goal is about it
		}
		prefix := fmt.Sprintf("%d at once: ", n)
		b.report.atMost(prefix+"commands that were not right", float64(n*rounds-right["ours"]), 0)
		b.report.goal(prefix+"client CPU / official client's", ours["cpu"], official["cpu"], 0.3)
		b.report.goal(prefix+"RSS per command / official client's", ours["rss"], official["rss"], 0.35)
		b.report.goal(prefix+"live memory per command / official client's", ours["live"], official["live"], 0.35)
		b.report.atMost(prefix+"goroutines per command, the caller's included", ours["goroutines"], 6)
		b.report.atMost(prefix+"process, MiB at most", ours["peak"], maxProcess)
	}
	b.report.table("many at once; CPU, memory and goroutines per command\n"+
		"(all of them running: each has written a line and waits; RSS: what the kernel has given, garbage included; live: heap after collection, and stacks)", rows)
	return nil
}

// oneMany runs one contestant with n commands in a fresh process.
func (b *bench) oneMany(ctx context.Context, host *transport.LXD, kind string, n int) (result, error) {
	g, err := closeGate(ctx, host)
	if err != nil {
		return result{}, fmt.Errorf("gate: %w", err)
	}
	defer g.remove()
	children, dismiss, err := b.hire(ctx, fmt.Sprint("many-", n), spec{Kind: kind, Way: "unix"})
	if err != nil {
		return result{}, err
	}
	defer dismiss()
	if _, err := children[0].do(task{Do: "many", N: n}); err != nil { // all run
		return result{}, err
	}
	if err := g.open(n); err != nil {
		return result{}, fmt.Errorf("gate: %w", err)
	}
	return children[0].result()
}

// barrier is a FIFO in the instance from which each of the measured commands reads a line before it ends. A command in the instance
// holds it open, so that neither an early nor a late reader misses anything.
type barrier struct {
	lines *io.PipeWriter
	ended chan error
}

func closeGate(ctx context.Context, host *transport.LXD) (*barrier, error) {
	input, lines := io.Pipe()
	held, say := io.Pipe()
	g := &barrier{lines, make(chan error, 1)}
	go func() { // ends when the barrier is removed
		err := host.Exec(ctx, transport.Command{
			Args:  transport.Shell(`rm -f "$1" && mkfifo "$1" && exec 3<>"$1" && echo held && cat >&3`, gate),
			Stdin: input, Stdout: say,
		})
		input.CloseWithError(io.ErrClosedPipe)
		say.CloseWithError(errors.Join(err, io.ErrUnexpectedEOF))
		g.ended <- err
	}()
	if _, err := io.ReadFull(held, make([]byte, len("held\n"))); err != nil {
		g.remove()
		return nil, err
	}
	return g, nil
}

// open lets n commands pass.
func (g *barrier) open(n int) error {
	_, err := g.lines.Write(bytes.Repeat([]byte("\n"), n))
	return err
}

func (g *barrier) remove() {
	g.lines.Close()
	<-g.ended
}
