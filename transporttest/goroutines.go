package transporttest

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"runtime/pprof"
	"strings"
	"time"
)

// Every case runs with a profiler label of its own, which the goroutines that it starts inherit. So cases that run at the same
// time can be told apart. What makes its transport has another one: it may start what ends after Close only, such as a server.

const labelKey = "transporttest"

func newLabel() (label string, run func(func())) {
	label = rand.Text()
	return label, func(f func()) {
		pprof.Do(context.Background(), pprof.Labels(labelKey, label), func(context.Context) { f() })
	}
}

// labelled returns the stacks of the goroutines that have a label, those with equal stacks together.
func labelled(label string) []string {
	var all bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&all, 1); err != nil {
		return []string{err.Error()}
	}
	var found []string
	_, blocks, _ := strings.Cut(all.String(), "\n") // after the total
	for _, block := range strings.Split(blocks, "\n\n") {
		if strings.Contains(block, label) {
			found = append(found, block)
		}
	}
	return found
}

// leftGoroutines gives the goroutines of a case time to end, and returns the stacks of those that do not.
func leftGoroutines(label string, most time.Duration) []string {
	deadline := time.Now().Add(min(most, 5*time.Second))
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		left := labelled(label)
		if left == nil || time.Now().After(deadline) {
			return left
		}
		time.Sleep(pause) // nothing tells when a goroutine has ended
	}
}

// noneLeft is an error if goroutines with a label do not end.
func noneLeft(label string, most time.Duration, what string) error {
	if left := leftGoroutines(label, most); left != nil {
		return fmt.Errorf("%s:\n%s", what, strings.Join(left, "\n\n"))
	}
	return nil
}

// countGoroutines is how many goroutines have a label.
func countGoroutines(label string) int {
	n := 0
	for _, block := range labelled(label) {
		var same int
		if _, err := fmt.Sscanf(strings.TrimSpace(block), "%d @", &same); err == nil {
			n += same
		}
	}
	return n
}
