package lxdtest_test

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
)

// An attempt is one of several that a conversation may take: its failures are not yet the test's.
type attempt struct {
	testing.TB

	mu       sync.Mutex
	failures []string
	cleanups []func()
}

func (a *attempt) Errorf(format string, args ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.failures = append(a.failures, fmt.Sprintf(format, args...))
}

func (a *attempt) FailNow() { runtime.Goexit() }

func (a *attempt) Cleanup(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cleanups = append(a.cleanups, f)
}

// run runs the conversation to its end, its clean-up included, and returns how it has failed.
func (a *attempt) run(f func()) (failure string) {
	for _, part := range []func(){f, a.clean} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			part()
		}()
		<-done
	}
	return strings.Join(a.failures, "\n")
}

func (a *attempt) clean() {
	for _, f := range slices.Backward(a.cleanups) {
		f()
	}
}
