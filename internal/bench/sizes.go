//go:build unix

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// sizes compares a program that embeds the transport with one that imports the official client only.
func (b *bench) sizes(ctx context.Context) error {
	size := map[string]float64{}
	rows := [][]string{{"", "MiB", "ours / it"}}
	for _, name := range []string{"official", "ours"} {
		out := filepath.Join(b.dir, name)
		cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "github.com/lxdtransport/transport/internal/bench/testdata/size/"+name)
		if said, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go build (bench has to be run inside its module): %w: %s", err, said)
		}
		info, err := os.Stat(out)
		if err != nil {
			return err
		}
		size[name] = float64(info.Size()) / (1 << 20)
	}
	rows = append(rows, []string{"with NewLXD", number(size["ours"]), ""}, []string{"official client only", number(size["official"]), ratio(size["ours"], size["official"])})
	b.report.table("binary of a small program", rows)
	b.report.goal("binary size / one with the official client only", size["ours"], size["official"], 1.05)
	return nil
}
