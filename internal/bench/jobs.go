//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	lxd "github.com/canonical/lxd/client"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/builder"
	lxdbuilder "github.com/lxdtransport/transport/builder/lxd"
	"github.com/lxdtransport/transport/job"
)

// jobFile is a job whose first command says that it runs. Its own text, which the log has first, says it in another way.
const jobFile = `
name: bench
stages: [{name: first, steps: [{action: command, cmd: echo, args: ['%{word}']}]}]
sequence: [{stage: first}]
`

const runsWord = "running-now"

// starter starts something on a new host, and returns how long it took until the first of its output came.
type starter struct {
	name  string
	start func(context.Context) (time.Duration, error)
}

// jobs measures the time from the start of a job to its first command's output: with a host that is made for it, with one of a pool, and in the way of a shell
// script.
func (b *bench) jobs(ctx context.Context) (err error) {
	server, err := connect("unix")
	if err != nil {
		return err
	}
	defer server.Disconnect()
	ours := func(ready lxdbuilder.Level) (*lxdbuilder.Builder, error) {
		return lxdbuilder.New(server, &lxdbuilder.Options{Prefix: "bench", Ready: ready})
	}
	hosts, err := ours(0)
	if err != nil {
		return err
	}
	execOnly, err := ours(lxdbuilder.Exec)
	if err != nil {
		return err
	}
	spec := builder.Spec{Image: b.image}
	pool, err := hosts.NewPool(spec, &lxdbuilder.PoolOptions{Size: 1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	starters := []starter{
		{"job, cold", func(ctx context.Context) (time.Duration, error) { return startJob(ctx, server, hosts, spec) }},
		{"job, cold, no waiting for init and network", func(ctx context.Context) (time.Duration, error) { return startJob(ctx, server, execOnly, spec) }},
		{"job, warm pool", func(ctx context.Context) (time.Duration, error) {
			d, err := startJob(ctx, server, pool, spec)
			return d, errors.Join(err, full(ctx, pool)) // it is not to fill up while others are measured
		}},
	}
	if haveLXC() {
		starters = append(starters, starter{"lxc launch + lxc exec", b.startLXC})
	} else {
		b.report.note("no row of lxc: there is no such command")
	}
	if err := full(ctx, pool); err != nil {
		return err
	}
	all := map[string][]float64{}
	for round := range b.rounds {
		for i := range starters {
			s := starters[(i+round)%len(starters)]
			d, err := s.start(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			all[s.name] = append(all[s.name], ms(d))
		}
	}
	wall := medians(all)
	cold, script := wall["job, cold"], wall["lxc launch + lxc exec"]
	rows := [][]string{{"", "ms", "it / cold", "it / lxc"}}
	for _, s := range starters {
		rows = append(rows, []string{s.name, number(wall[s.name]), ratio(wall[s.name], cold), ratio(wall[s.name], script)})
	}
	b.report.table("job start to the first command's output, image "+b.image, rows)
	return nil
}

// full waits until a pool has a host.
func full(ctx context.Context, p *lxdbuilder.Pool) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		n, err := p.Warm()
		if err != nil || n > 0 {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// startJob runs a job to its end.
func startJob(ctx context.Context, server lxd.InstanceServer, hosts builder.Builder, spec builder.Spec) (time.Duration, error) {
	j, err := job.Parse([]byte(jobFile), nil)
	if err != nil {
		return 0, err
	}
	first := &firstOutput{start: time.Now()}
	r := job.Runner{
		Builder: hosts, Spec: spec, Log: first, Context: map[string]string{"word": runsWord},
		Dial: func(_ context.Context, h *builder.Host) (transport.Transport, error) {
			return transport.NewLXD(server, h.Name, nil)
		},
	}
	res, err := r.Run(ctx, j)
	return first.result(errors.Join(err, res.ReleaseErr))
}

// startLXC does the same with the lxc command. What removes the instance is not measured.
func (b *bench) startLXC(ctx context.Context) (took time.Duration, err error) {
	name := "bench-" + strings.ToLower(rand.Text()[:10])
	lxc := func(ctx context.Context, out io.Writer, args ...string) error {
		cmd := exec.CommandContext(ctx, "lxc", args...)
		cmd.Stdout = out
		return finish(cmd)
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if e := lxc(clean, nil, "delete", "--force", name); err == nil {
			err = e
		}
	}()
	first := &firstOutput{start: time.Now()}
	if err := lxc(ctx, nil, "launch", "--ephemeral", "--quiet", b.image, name); err != nil {
		return 0, err
	}
	return first.result(lxc(ctx, first, "exec", "-T", name, "--", "echo", runsWord))
}

// firstOutput notices when the word is written.
type firstOutput struct {
	start time.Time
	took  time.Duration
}

func (f *firstOutput) Write(p []byte) (int, error) {
	if f.took == 0 && bytes.Contains(p, []byte(runsWord)) {
		f.took = time.Since(f.start)
	}
	return len(p), nil
}

func (f *firstOutput) result(err error) (time.Duration, error) {
	if err == nil && f.took == 0 {
		err = errors.New("the command has said nothing")
	}
	return f.took, err
}
