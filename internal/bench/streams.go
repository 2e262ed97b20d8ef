//go:build unix

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// gcm is the cipher of ssh that is the fastest on machines that have AES in hardware.
const gcm = "aes128-gcm@openssh.com"

// maxProcess is how many MiB our process may have, whatever it does.
const maxProcess = 64

// stdout and stdin measure one command with much output, or input.
func (b *bench) stdout(ctx context.Context) error {
	wall, cpu, err := b.volumes(ctx, "stdout", b.mib)
	b.report.goal("stdout: throughput / official client's, at least", wall["official client, unix"], wall["ours, unix"], -1)
	b.report.goal("stdout: client CPU / official client's", cpu["ours, unix"], cpu["official client, unix"], 1)
	b.report.goal("stdout: throughput / lxc exec's, at least", wall["lxc exec"], wall["ours, unix"], -2.3)
	return err
}

func (b *bench) stdin(ctx context.Context) error {
	wall, cpu, err := b.volumes(ctx, "stdin", b.mib)
	b.report.goal("stdin: time / official client's", wall["ours, unix"], wall["official client, unix"], 0.75)
	b.report.goal("stdin: client CPU / official client's", cpu["ours, unix"], cpu["official client, unix"], 0.5)
	return err
}

// files measures one file, up and down.
func (b *bench) files(ctx context.Context) error {
	f, err := os.Create(filepath.Join(b.dir, "file"))
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	piece := make([]byte, 1<<20)
	for i := range piece {
		piece[i] = byte(i * 7)
	}
	for range b.file {
		if _, err := f.Write(piece); err != nil {
			return err
		}
	}
	if err := f.Close(); err != nil {
		return err
	}
	for _, way := range []string{"up", "down"} {
		wall, _, err := b.volumes(ctx, way, b.file)
		if err != nil {
			return err
		}
		b.report.goal("file "+way+": time / official client's", wall["ours, unix"], wall["official client, unix"], 0.35)
		b.report.goal("file "+way+": time / scp's (aes128-gcm)", wall["ours, unix"], wall["ssh, aes128-gcm"], 0.6)
	}
	return nil
}

// volumes measures the task do of mib MiB.
func (b *bench) volumes(ctx context.Context, do string, mib int) (wall, cpu map[string]float64, err error) {
	specs := []spec{{Kind: "ours", Way: "unix"}, {Kind: "official", Way: "unix"}, {Kind: "lxc"}, {Kind: "ssh", Way: gcm}, {Kind: "ssh"}}
	title := "%s of %d MiB"
	if do == "up" || do == "down" {
		specs = append(specs[:2:2], specs[3], spec{Kind: "ssh", Tool: "sftp", Way: gcm})
		title = "one file %s, %d MiB (ssh: scp; sftp: the command)"
	}
	children, dismiss, err := b.hire(ctx, do, specs...)
	if err != nil {
		return nil, nil, err
	}
	defer dismiss()
	walls, cpus, peak := map[string][]float64{}, map[string][]float64{}, map[string]float64{}
	err = b.rotate(children, func(c *child) error {
		r, err := c.do(task{Do: do, Bytes: int64(mib) << 20, Dir: b.dir})
		name := c.spec.String()
		walls[name] = append(walls[name], r.Wall.Seconds())
		cpus[name] = append(cpus[name], r.CPU.Seconds()*1024/float64(mib))
		peak[name] = float64(r.PeakKiB) / 1024
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	wall, cpu = medians(walls), medians(cpus)
	rows := [][]string{{"", "MiB/s", "our time / its", "client CPU s/GiB", "ours / it", "process MiB at most"}}
	for _, c := range children {
		name := c.spec.String()
		size := number(peak[name])
		if c.spec.Kind == "lxc" || c.spec.Kind == "ssh" {
			size = "" // it is not the worker's
		}
		rows = append(rows, []string{name, number(float64(mib) / wall[name]), ratio(wall["ours, unix"], wall[name]), number(cpu[name]), ratio(cpu["ours, unix"], cpu[name]), size})
	}
	b.report.table(fmt.Sprintf(title, do, mib), rows)
	b.report.atMost(fmt.Sprintf(title, do, mib)+": our process, MiB at most", peak["ours, unix"], maxProcess)
	return wall, cpu, nil
}
