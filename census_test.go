package transport_test

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// census is what this process holds.
type census struct {
	goroutines goleak.Option
	files      []string
}

func takeCensus() census { return census{goleak.IgnoreCurrent(), openFiles()} }

// openFiles lists the descriptors and what they are, "" where the system does not tell. The runtime's own come with the first use.
func openFiles() []string {
	entries, _ := os.ReadDir("/proc/self/fd")
	var open []string
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && to != "anon_inode:[eventpoll]" && to != "anon_inode:[eventfd]" {
			open = append(open, to)
		}
	}
	return open
}

// left waits until no goroutine and no descriptor is left of what was made since, and says what is left otherwise.
func (c census) left() error {
	if err := goleak.Find(c.goroutines); err != nil {
		return err
	}
	for end := time.Now().Add(5 * time.Second); ; <-time.After(10 * time.Millisecond) {
		more := slices.DeleteFunc(openFiles(), func(f string) bool { return slices.Contains(c.files, f) })
		if len(more) == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("descriptors are left open: %q", more)
		}
	}
}

// leavesNothing runs subtests, which may be parallel to each other, and fails if a goroutine or a descriptor of theirs is left. The test may
// not be parallel to others.
func leavesNothing(t *testing.T, subtests func(t *testing.T)) {
	t.Helper()
	before := takeCensus()
	t.Run("group", subtests)
	if err := before.left(); err != nil {
		t.Error(err)
	}
}
