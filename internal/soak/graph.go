//go:build linux

package main

import (
	"bytes"
	"fmt"
	"strings"
)

// graph draws three panels, one above the other, over the number of commands.
func graph(samples []sample) []byte {
	const width, height, left, right, top, gap = 640, 110, 60, 90, 34, 46
	type line struct {
		name, colour string
		of           func(sample) float64
	}
	panels := []struct {
		unit  string
		lines []line
	}{
		{"MiB", []line{
			{"RSS", "#0a5ea8", func(s sample) float64 { return float64(s.RSS) / 1024 }},
			{"live", "#c2570c", func(s sample) float64 { return float64(s.Live) / 1024 }},
		}},
		{"goroutines", []line{{"", "#0a5ea8", func(s sample) float64 { return float64(s.Goroutines) }}}},
		{"descriptors", []line{{"", "#0a5ea8", func(s sample) float64 { return float64(s.FDs) }}}},
	}
	last := samples[len(samples)-1]
	total := top + len(panels)*(height+gap)
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12" fill="#333">`+"\n", left+width+right, total)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#fff"/><text x="%d" y="18">%d commands in one process on a real LXD, %.0f s: what it holds between them</text>`+"\n", left, last.Commands, last.Time.Seconds())
	for i, p := range panels {
		y0 := top + i*(height+gap)
		most := 1.0
		for _, l := range p.lines {
			for _, s := range samples {
				most = max(most, l.of(s))
			}
		}
		most *= 1.1
		fmt.Fprintf(&b, `<path d="M%d %dv%dh%d" fill="none" stroke="#999"/>`, left, y0, height, width)
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%.0f</text><text x="%d" y="%d" text-anchor="end">0</text><text x="%d" y="%d">%s</text>`,
			left-6, y0+12, most, left-6, y0+height, left+8, y0+12, p.unit)
		fmt.Fprintf(&b, `<text x="%d" y="%d">0</text><text x="%d" y="%d" text-anchor="end">%d commands</text>`+"\n", left, y0+height+16, left+width, y0+height+16, last.Commands)
		for _, l := range p.lines {
			var points strings.Builder
			var y float64
			for _, s := range samples {
				y = float64(y0+height) - l.of(s)/most*height
				fmt.Fprintf(&points, "%.0f,%.1f ", float64(left)+float64(s.Commands)/float64(last.Commands)*width, y)
			}
			fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" stroke-width="1.5" points="%s"/><text x="%d" y="%.0f" fill="%s">%s %.0f</text>`+"\n",
				l.colour, strings.TrimSpace(points.String()), left+width+6, y+4, l.colour, l.name, l.of(last))
		}
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}
