//go:build unix

package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// report prints tables as they come, and goals and notes at the end.
type report struct {
	goals, notes []string
}

func (r *report) table(title string, rows [][]string) {
	fmt.Printf("\n%s\n", title)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(w, "  "+strings.Join(row, "\t"))
	}
	w.Flush()
}

// goal says whether a / b is at most limit; or at least, if the limit is negative.
func (r *report) goal(what string, a, b, limit float64) {
	if a == 0 || b == 0 {
		return // not measured
	}
	if limit < 0 {
		r.add(what, a/b, "≥", -limit, a/b >= -limit)
		return
	}
	r.atMost(what, a/b, limit)
}

func (r *report) atMost(what string, got, limit float64) {
	r.add(what, got, "≤", limit, got <= limit)
}

func (r *report) add(what string, got float64, sign string, limit float64, met bool) {
	word := "missed"
	if met {
		word = "met"
	}
	r.goals = append(r.goals, fmt.Sprintf("goal: %s %s %.4g: measured %s %s", what, sign, limit, number(got), word))
}

func (r *report) note(format string, args ...any) {
	if s := fmt.Sprintf(format, args...); !slices.Contains(r.notes, s) {
		r.notes = append(r.notes, s)
	}
}

func (r *report) end() {
	fmt.Println()
	for _, g := range r.goals {
		fmt.Println(g)
	}
	for _, n := range r.notes {
		fmt.Println("note:", n)
	}
}

func medians(all map[string][]float64) map[string]float64 {
	m := make(map[string]float64, len(all))
	for name, values := range all {
		sorted := slices.Sorted(slices.Values(values))
		m[name] = (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
	}
	return m
}

// number has three digits or so.
func number(f float64) string {
	switch {
	case f >= 100 || f == 0:
		return fmt.Sprintf("%.0f", f)
	case f >= 10:
		return fmt.Sprintf("%.1f", f)
	case f < 0.095: // 1/50 has digits, too
		return fmt.Sprintf("%.3f", f)
	}
	return fmt.Sprintf("%.2f", f)
}

func ratio(a, b float64) string {
	if a == 0 || b == 0 {
		return ""
	}
	return number(a / b)
}
