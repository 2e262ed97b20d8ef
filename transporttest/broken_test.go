//go:build unix

package transporttest_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/local"
	"github.com/lxdtransport/transport/transporttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// broken is a transport with one fault, and the cases that it must fail: these and no others.
type broken struct {
	name  string
	trips []string
	wrap  func(w *wrapper) // replaces methods of a transport that keeps all promises
}

// exact asks for a proof that takes minutes of processor time: that a broken transport fails no other cases than its own.
// It is the part of the other cases that are run, chosen at random: 1 is all of them.
var exact, _ = strconv.ParseFloat(os.Getenv("TRANSPORTTEST_EXACT"), 64)

// TestEveryBrokenTransportIsCaughtByName runs over every broken transport the cases that it must fail, and with
// TRANSPORTTEST_EXACT=1 all that use one of the methods that are broken.
func TestEveryBrokenTransportIsCaughtByName(t *testing.T) {
	needRoot(t)
	t.Parallel()
	var uses map[string]map[string]bool
	patience, soon := 8*time.Second, 3*time.Second
	if exact > 0 {
		patience, soon = 40*time.Second, 10*time.Second
		uses = methodsOfCases(t)
	}
	// Many cases wait for what does not come: more run at the same time than there are processors.
	places := make(chan struct{}, 24)
	type outcome struct{ failed, texts []string }
	var outcomes []chan outcome
	for _, b := range brokenTransports() {
		c := make(chan outcome, 1)
		outcomes = append(outcomes, c)
		go func() { // waited for below
			model := &wrapper{unblock: make(chan struct{})}
			close(model.unblock)
			b.wrap(model)
			var mu sync.Mutex
			var o outcome
			var all sync.WaitGroup
			for _, r := range transporttest.Rows() {
				// What uses no method that is replaced is as good as local.
				if !slices.Contains(b.trips, r.Name) && (!slices.ContainsFunc(model.replaced(), func(m string) bool { return uses[r.Name][m] }) || rand.Float64() >= exact) {
					continue
				}
				places <- struct{}{}
				all.Go(func() {
					defer func() { <-places }()
					w, done := newHost(t)
					defer done()
					if err := r.Check(w.made(b.wrap), patience, soon); err != nil {
						mu.Lock()
						defer mu.Unlock()
						o.failed = append(o.failed, r.Name)
						o.texts = append(o.texts, fmt.Sprintf("%s: %.300v", r.Name, err))
					}
				})
			}
			all.Wait()
			c <- o
		}()
	}
	for i, b := range brokenTransports() {
		o := <-outcomes[i]
		t.Run(b.name, func(t *testing.T) {
			slices.Sort(o.texts)
			t.Log(strings.Join(o.texts, "\n"))
			assert.ElementsMatch(t, b.trips, o.failed)
		})
	}
}

// methodsOfCases runs every case over a transport that keeps all promises and notes which methods it calls. Cases with trees call the
// others only to make a tree and to look at it: what is wrong with these is seen in their own cases. And descriptors are counted for the whole
// process, in which there are none but broken transports here.
func methodsOfCases(t *testing.T) map[string]map[string]bool {
	all := map[string]map[string]bool{}
	var mu sync.Mutex
	var cases sync.WaitGroup
	places := make(chan struct{}, 4)
	for _, r := range transporttest.Rows() {
		uses := map[string]bool{}
		all[r.Name] = uses
		if r.Name == "exec/leaves-no-descriptor" {
			continue
		}
		places <- struct{}{}
		cases.Go(func() {
			defer func() { <-places }()
			w, done := newHost(t)
			defer done()
			note := func(method string) {
				mu.Lock()
				defer mu.Unlock()
				if !strings.HasPrefix(r.Name, "tree/") || strings.HasSuffix(method, "Tree") || r.Name == "tree/after-Close" {
					uses[method] = true
				}
			}
			assert.NoError(t, r.Check(w.made(func(w *wrapper) { w.called = note }), time.Minute, 20*time.Second), r.Name)
		})
	}
	cases.Wait()
	return all
}

// TestEveryCaseCanFail keeps cases out of the suite that nothing fails.
func TestEveryCaseCanFail(t *testing.T) {
	t.Parallel()
	tripped := map[string]bool{}
	for _, b := range brokenTransports() {
		for _, name := range b.trips {
			tripped[name] = true
		}
	}
	for _, r := range transporttest.Rows() {
		assert.True(t, tripped[r.Name], "no broken transport trips %s", r.Name)
		delete(tripped, r.Name)
	}
	assert.Empty(t, tripped, "these cases do not exist")
}

// TestExcused: only what the host may do is, and only where it is said that it may.
func TestExcused(t *testing.T) {
	t.Parallel()
	lost := fmt.Errorf("download: %w", transport.ErrOutputLost)
	for _, c := range []struct {
		err  error
		caps []transporttest.Capability
		want bool
	}{
		{nil, nil, false},
		{errors.New("the file is short"), nil, false},
		{lost, nil, true},
		{lost, []transporttest.Capability{transporttest.TTY, transporttest.WholeStderr}, false},
	} {
		assert.Equal(t, c.want, transporttest.Excused(c.err, c.caps), "%v, %v", c.err, c.caps)
	}
}

func TestRowsAreNamed(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, r := range transporttest.Rows() {
		assert.False(t, seen[r.Name], "%s is there twice", r.Name)
		seen[r.Name] = true
		assert.Regexp(t, `^(exec|start|signal|resize|tty|upload|download|files|tree|close)/\S+$`, r.Name)
		assert.NotEmpty(t, r.Why, r.Name)
	}
	assert.GreaterOrEqual(t, len(seen), 45)
}

func newHost(t *testing.T) (w *wrapper, done func()) {
	dir, err := os.MkdirTemp("", "broken")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	// With variables that could be lost.
	host, err := local.New(dir, &local.Options{Env: append([]string{"HOME=/home", "LANG=C.UTF-8"}, os.Environ()...)})
	require.NoError(t, err)
	w = &wrapper{host: host, dir: dir, unblock: make(chan struct{})}
	return w, func() {
		close(w.unblock)
		for _, f := range w.atEnd {
			f()
		}
		assert.NoError(t, host.Close())
		killIn(dir)
		assert.NoError(t, os.RemoveAll(dir))
	}
}

// made returns a function that makes the transport broken and returns it, and from then on whole ones on the same host.
func (w *wrapper) made(wrap func(*wrapper)) func() transport.Transport {
	first := true
	return func() transport.Transport {
		if first {
			first = false
			wrap(w)
			return w
		}
		return w.another()
	}
}

// another returns a transport without faults to the same host, which ends with the case.
func (w *wrapper) another() *local.Transport {
	host, err := local.New(w.dir, nil)
	if err != nil {
		panic(err) // it is the second time
	}
	w.atEnd = append(w.atEnd, func() { _ = host.Close() })
	return host
}

// killIn kills what broken transports have left behind: all that runs in a directory.
func killIn(dir string) {
	names, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, name := range names {
		if cwd, err := os.Readlink(name); err == nil && strings.HasPrefix(cwd, dir) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// needRoot skips where not all capabilities are there: an expected failure that cannot happen is none.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for the cases with users")
	}
	if _, err := os.Stat("/proc/self/environ"); err != nil {
		t.Skip("needs Linux, for terminals and strays")
	}
}
