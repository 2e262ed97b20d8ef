//go:build unix

package main

import (
	"context"
	"time"
)

// perRound is how many commands a contestant runs when it has its turn.
const perRound = 10

// execs measures `true`, one after another.
func (b *bench) execs(ctx context.Context) error {
	children, dismiss, err := b.hire(ctx, "exec",
		spec{Kind: "ours", Way: "unix"}, spec{Kind: "official", Way: "unix"}, spec{Kind: "lxc"},
		spec{Kind: "ours", Way: "https"}, spec{Kind: "official", Way: "https"}, spec{Kind: "ssh"})
	if err != nil {
		return err
	}
	defer dismiss()
	walls, cpus := map[string][]float64{}, map[string][]float64{}
	err = b.rotate(children, func(c *child) error {
		r, err := c.do(task{Do: "exec", N: perRound})
		for _, d := range r.Each {
			walls[c.spec.String()] = append(walls[c.spec.String()], ms(d))
		}
		cpus[c.spec.String()] = append(cpus[c.spec.String()], ms(r.CPU)/perRound)
		return err
	})
	if err != nil {
		return err
	}
	wall, cpu := medians(walls), medians(cpus)
	rows := [][]string{{"", "ms", "ours (same way) / it", "client CPU ms", "ours / it"}}
	for _, c := range children {
		name, same := c.spec.String(), "ours, unix"
		if c.spec.Way == "https" {
			same = "ours, https"
		}
		rows = append(rows, []string{name, number(wall[name]), ratio(wall[same], wall[name]), number(cpu[name]), ratio(cpu[same], cpu[name])})
	}
	b.report.table("true, one after another", rows)
	b.report.goal("true, unix: time / official client's", wall["ours, unix"], wall["official client, unix"], 0.8)
	b.report.goal("true, unix: time / lxc exec's", wall["ours, unix"], wall["lxc exec"], 0.4)
	b.report.goal("true, https: time / official client's", wall["ours, https"], wall["official client, https"], 0.35)
	return nil
}

// rotate gives every child its turn in each round, another one first each time.
func (b *bench) rotate(children []*child, turn func(*child) error) error {
	for round := range b.rounds {
		for i := range children {
			if err := turn(children[(i+round)%len(children)]); err != nil {
				return err
			}
		}
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
