package lxd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lxdtransport/transport/builder"
	lxdbuilder "github.com/lxdtransport/transport/builder/lxd"
	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/lxdtest"
)

func TestMain(m *testing.M) {
	if owner := os.Getenv("TEST_BUILDER_CRASH"); owner != "" {
		crash()
	}
	goleak.VerifyTestMain(m)
}

// server is a connection whose requests a test may answer, or look at.
type server struct {
	lxd.InstanceServer
	mu    sync.Mutex
	hooks []hook
}

// hook answers a request, or returns nil for it to be sent.
type hook func(req *http.Request) *http.Response

func (s *server) on(h hook) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hooks = append(s.hooks, h)
}

func (s *server) DoHTTP(req *http.Request) (*http.Response, error) {
	s.mu.Lock()
	hooks := s.hooks
	s.mu.Unlock()
	for _, h := range hooks {
		if resp := h(req); resp != nil {
			resp.Request = req
			return resp, nil
		}
	}
	return s.InstanceServer.DoHTTP(req)
}

// answer is one of LXD's.
func answer(metadata any) *http.Response {
	b, _ := json.Marshal(map[string]any{"type": "sync", "status_code": 200, "metadata": metadata})
	return &http.Response{StatusCode: 200, Body: io.NopCloser(bytes.NewReader(b)), Header: http.Header{}}
}

func refusal(code int, text string) *http.Response {
	b, _ := json.Marshal(map[string]any{"type": "error", "error_code": code, "error": text})
	return &http.Response{StatusCode: code, Body: io.NopCloser(bytes.NewReader(b)), Header: http.Header{}}
}

// fake is a fake server whose instances are asked how far they have come: script says it for "init" and for "cloud-init".
func fake(t *testing.T, script func(what string) int) (*lxdtest.Server, *server) {
	t.Helper()
	s := lxdtest.NewUnstartedServer()
	s.Handler = func(p *lxdtest.Process) int {
		if script == nil || p.Args[0] != "/bin/sh" {
			return 0
		}
		for _, what := range p.Args[4:] {
			if code := script(what); code != 0 && what == "cloud-init" {
				return code + 1
			} else if code != 0 {
				return code
			}
		}
		return 0
	}
	s.Images = []string{"busybox", "debian/12"}
	s.Start()
	t.Cleanup(s.Close)
	conn, err := lxd.ConnectLXDUnix(s.Socket, nil)
	require.NoError(t, err)
	return s, &server{InstanceServer: conn}
}

func newBuilder(t *testing.T, s lxd.InstanceServer, opts *lxdbuilder.Options) *lxdbuilder.Builder {
	t.Helper()
	b, err := lxdbuilder.New(s, opts)
	require.NoError(t, err)
	return b
}

// names are those of the instances on a server.
func names(t *testing.T, s lxd.InstanceServer) []string {
	t.Helper()
	var names []string
	for _, i := range instances(t, s) {
		names = append(names, i.Name)
	}
	return names
}

func instances(t *testing.T, s lxd.InstanceServer) []api.Instance {
	t.Helper()
	resp, _, err := s.RawQuery("GET", "/1.0/instances?recursion=1&all-projects=true", nil, "")
	require.NoError(t, err)
	var all []api.Instance
	require.NoError(t, json.Unmarshal(resp.Metadata, &all))
	return all
}

func TestGetAndRelease(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	b := newBuilder(t, s, &lxdbuilder.Options{Config: map[string]string{"limits.cpu": "1", "limits.memory": "1GiB"}})
	spec := builder.Spec{
		OS: "debian_12", Config: map[string]string{"limits.cpu": "2"}, Labels: map[string]string{"run": "r1", "job": "7"}, TTL: time.Hour,
	}
	h, err := b.Get(t.Context(), spec)
	require.NoError(t, err)
	assert.Equal(t, "debian_12", h.OS)
	assert.Regexp(t, `^build-[a-z2-7]{13}$`, h.Name)
	all := instances(t, s)
	require.Len(t, all, 1)
	i := all[0]
	assert.True(t, i.Ephemeral)
	assert.Equal(t, api.Running, i.StatusCode)
	for k, v := range map[string]string{
		"limits.cpu": "2", "limits.memory": "1GiB", "user.transport.run": "r1", "user.transport.job": "7", "user.transport.os": "debian_12",
	} {
		assert.Equal(t, v, i.Config[k], k)
	}
	assert.NotEmpty(t, i.Config["user.transport.owner"])
	other, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
	require.NoError(t, err)
	for _, i := range instances(t, s) {
		assert.NotEmpty(t, i.Config["user.transport.run"], "every host is of a run")
	}
	require.NoError(t, b.Release(t.Context(), other))
	expiry, err := time.Parse(time.RFC3339, i.Config["user.transport.expiry"])
	require.NoError(t, err)
	assert.WithinDuration(t, time.Now().Add(time.Hour), expiry, time.Minute)

	require.NoError(t, b.Release(t.Context(), h))
	assert.Empty(t, instances(t, s))
	require.NoError(t, b.Release(t.Context(), h), "once more")
}

func TestReleaseWhateverItDoes(t *testing.T) {
	t.Parallel()
	f, s := fake(t, nil)
	b := newBuilder(t, s, nil)
	for _, status := range []lxdtest.Status{lxdtest.Running, lxdtest.Stopped, lxdtest.Frozen} {
		h, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
		require.NoError(t, err)
		f.SetStatus("", h.Name, status)
		require.NoError(t, b.Release(t.Context(), h), status)
		require.Empty(t, names(t, s))
	}
	f.AddInstance(lxdtest.Instance{Name: "precious"})
	require.ErrorContains(t, b.Release(t.Context(), &builder.Host{Name: "precious"}), "no builder has made it")
	require.Equal(t, []string{"precious"}, names(t, s))
	require.Error(t, b.Release(t.Context(), nil))
}

func TestReleaseTriesAgain(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	b := newBuilder(t, s, nil)
	h, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
	require.NoError(t, err)
	refusals := 3
	s.on(func(req *http.Request) *http.Response {
		if req.Method == "GET" || refusals == 0 {
			return nil
		}
		refusals--
		return refusal(500, "Instance is busy running a \"start\" operation")
	})
	require.NoError(t, b.Release(t.Context(), h))
	require.Empty(t, names(t, s))
	require.Zero(t, refusals)
}

func TestImages(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	var sources []api.InstanceSource
	var mu sync.Mutex
	s.on(func(req *http.Request) *http.Response {
		if req.Method != "POST" || req.URL.Path != "/1.0/instances" {
			return nil
		}
		body, _ := req.GetBody()
		var post api.InstancesPost
		_ = json.NewDecoder(body).Decode(&post)
		mu.Lock()
		sources = append(sources, post.Source)
		mu.Unlock()
		if post.Source.Server != "" {
			return refusal(404, "The requested image couldn't be found")
		}
		return nil
	})
	get := func(opts *lxdbuilder.Options, spec builder.Spec) error {
		sources = nil
		b := newBuilder(t, s, opts)
		h, err := b.Get(t.Context(), spec)
		if err == nil {
			require.NoError(t, b.Release(t.Context(), h))
		}
		return err
	}
	one := &lxdbuilder.Options{ImageServers: []lxdbuilder.ImageServer{}}

	require.NoError(t, get(nil, builder.Spec{Image: "busybox"}))
	busybox := sources[0].Fingerprint
	require.Len(t, busybox, 64)
	require.NoError(t, get(nil, builder.Spec{Image: busybox[:12]}))
	require.Equal(t, busybox, sources[0].Fingerprint)
	require.NoError(t, get(nil, builder.Spec{OS: "debian_12"}))
	require.NotEqual(t, busybox, sources[0].Fingerprint)
	require.NoError(t, get(nil, builder.Spec{OS: "debian_12", Image: "busybox"}), "the image wins")
	require.Equal(t, busybox, sources[0].Fingerprint)
	require.NoError(t, get(&lxdbuilder.Options{Images: map[string]string{"debian_12": "busybox"}}, builder.Spec{OS: "debian_12"}))
	require.Equal(t, busybox, sources[0].Fingerprint)

	require.ErrorContains(t, get(nil, builder.Spec{OS: "ubuntu_24.04"}), "couldn't be found")
	require.Len(t, sources, 2)
	require.Equal(t, api.InstanceSource{
		Type: "image", Mode: "pull", Protocol: "simplestreams", Server: "https://cloud-images.ubuntu.com/releases", Alias: "24.04",
	}, sources[0])
	require.Equal(t, "ubuntu/24.04", sources[1].Alias)
	require.Error(t, get(nil, builder.Spec{OS: "fedora_42"}))
	require.Len(t, sources, 1)
	require.Error(t, get(nil, builder.Spec{Image: "images:alpine/3.20"}))
	require.Equal(t, "alpine/3.20", sources[0].Alias)

	require.Error(t, get(nil, builder.Spec{OS: "ubuntu_14_04"}), "as Cyclid's documentation writes it")
	require.Equal(t, []string{"14.04", "ubuntu/14.04"}, []string{sources[0].Alias, sources[1].Alias})
	require.NoError(t, get(one, builder.Spec{OS: "debian_bookworm"}), "it is debian/12")
	require.NoError(t, get(&lxdbuilder.Options{Images: map[string]string{"ubuntu_24.04": "busybox"}}, builder.Spec{OS: "ubuntu_24_04"}))
	require.Equal(t, busybox, sources[0].Fingerprint)

	require.ErrorContains(t, get(one, builder.Spec{OS: "fedora_42"}), "fedora/42")
	require.ErrorContains(t, get(one, builder.Spec{Image: "nonsense"}), `"nonsense"`)
	require.ErrorContains(t, get(one, builder.Spec{Image: "abcdef"}), `"abcdef"`)
	require.ErrorContains(t, get(one, builder.Spec{}), "neither")
	require.ErrorContains(t, get(one, builder.Spec{OS: "../x"}), "not of the form")
	require.Empty(t, names(t, s))
}

func TestWrongSpecs(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	b := newBuilder(t, s, nil)
	for want, spec := range map[string]builder.Spec{
		"Spec.Type":         {Image: "busybox", Type: "jail"},
		"Spec.TTL":          {Image: "busybox", TTL: -1},
		`the name "a b"`:    {Image: "busybox", Labels: map[string]string{"a b": "x"}},
		"the builder's own": {Image: "busybox", Labels: map[string]string{"owner": "x"}},
		"line break":        {Image: "busybox", Labels: map[string]string{"a": "x\ny"}},
		"use Spec.Labels":   {Image: "busybox", Config: map[string]string{"user.transport.owner": "x"}},
	} {
		_, err := b.Get(t.Context(), spec)
		assert.ErrorContains(t, err, want)
	}
	for want, opts := range map[string]lxdbuilder.Options{
		"Prefix": {Prefix: "a_b"}, "Ready": {Ready: 9}, "negative": {TTL: -1},
	} {
		_, err := lxdbuilder.New(s, &opts)
		assert.ErrorContains(t, err, want)
	}
	_, err := lxdbuilder.New(nil, nil)
	require.Error(t, err)
}

func TestLongPrefix(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	b := newBuilder(t, s, &lxdbuilder.Options{Prefix: strings.Repeat("abc-", 30)})
	h, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
	require.NoError(t, err)
	require.LessOrEqual(t, len(h.Name), 63)
	require.NotContains(t, h.Name, "--")
	require.NoError(t, b.Release(t.Context(), h))
}

func TestProjectAndTarget(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	var query string
	s.on(func(req *http.Request) *http.Response {
		if req.Method == "POST" && req.URL.Path == "/1.0/instances" {
			query = req.URL.RawQuery
			rest := req.URL.Query()
			rest.Del("target") // the fake is no cluster
			req.URL.RawQuery = rest.Encode()
		}
		return nil
	})
	b := newBuilder(t, s, &lxdbuilder.Options{Project: "p", Target: "m1"})
	h, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
	require.NoError(t, err)
	require.Equal(t, "project=p&target=m1", query)
	require.Equal(t, "p", h.Project)
	require.NoError(t, b.Release(t.Context(), h))
	h, err = b.Get(t.Context(), builder.Spec{Image: "busybox", Project: "q", Target: "@fast"})
	require.NoError(t, err)
	require.Equal(t, "project=q&target=%40fast", query)
	require.NoError(t, b.Release(t.Context(), h))
	require.Empty(t, names(t, s))
}

// TestLevels holds every level back and expects to be told which one it was.
func TestLevels(t *testing.T) {
	t.Parallel()
	netless := map[string]any{"status": "Running", "status_code": 103, "network": map[string]any{
		"lo":   map[string]any{"addresses": []any{map[string]string{"family": "inet", "address": "127.0.0.1", "scope": "local"}}},
		"eth0": map[string]any{"addresses": []any{map[string]string{"family": "inet6", "address": "fe80::1", "scope": "link"}}},
	}}
	isState := func(req *http.Request) bool { return req.Method == "GET" && strings.HasSuffix(req.URL.Path, "/state") }
	isInstance := func(req *http.Request) bool {
		return req.Method == "GET" && strings.HasPrefix(req.URL.Path, "/1.0/instances/build-") && strings.Count(req.URL.Path, "/") == 3
	}
	withNIC := func(req *http.Request) *http.Response {
		if isInstance(req) {
			return answer(map[string]any{"config": map[string]string{"user.transport.owner": "x"}, "status": "Running", "status_code": 103, "ephemeral": true,
				"expanded_devices": map[string]any{"eth0": map[string]string{"type": "nic"}}})
		}
		return nil
	}
	for _, c := range []struct {
		level  lxdbuilder.Level
		says   string
		script func(what string) int
		hook   hook
	}{
		{lxdbuilder.Running, "Freezing", nil, func(req *http.Request) *http.Response {
			if isInstance(req) {
				return answer(map[string]any{"status": "Freezing", "status_code": 109})
			}
			return nil
		}},
		{lxdbuilder.Exec, "agent", nil, func(req *http.Request) *http.Response {
			if strings.HasSuffix(req.URL.Path, "/exec") {
				return refusal(500, "LXD VM agent isn't currently running")
			}
			return nil
		}},
		{lxdbuilder.Init, "init has not finished", func(what string) int {
			if what == "init" {
				return 75
			}
			return 0
		}, nil},
		{lxdbuilder.Network, "IPv4", nil, func(req *http.Request) *http.Response {
			if isState(req) {
				return answer(netless)
			}
			return withNIC(req)
		}},
		{lxdbuilder.CloudInit, "cloud-init has not finished", func(what string) int {
			if what == "cloud-init" {
				return 75
			}
			return 0
		}, nil},
	} {
		t.Run(c.level.String(), func(t *testing.T) {
			t.Parallel()
			_, s := fake(t, c.script)
			held := true
			var mu sync.Mutex
			if c.hook != nil {
				s.on(func(req *http.Request) *http.Response {
					mu.Lock()
					defer mu.Unlock()
					if !held || req.Method == "DELETE" || req.Method == "PUT" && strings.Contains(req.URL.Path, "state") && strings.Contains(bodyOf(req), "stop") {
						held = held && req.Method == "GET"
						return nil
					}
					return c.hook(req)
				})
			}
			b := newBuilder(t, s, &lxdbuilder.Options{ReadyTimeout: 500 * time.Millisecond})
			_, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
			var not *lxdbuilder.NotReadyError
			require.ErrorAs(t, err, &not)
			require.Equal(t, c.level, not.Level)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.ErrorContains(t, err, c.says)
			require.ErrorContains(t, err, c.level.String())
			require.Empty(t, names(t, s))

			b = newBuilder(t, s, &lxdbuilder.Options{ReadyTimeout: time.Minute})
			if c.script == nil {
				h, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
				require.NoError(t, err)
				require.NoError(t, b.Release(t.Context(), h))
			}
			if c.level > lxdbuilder.Running { // does not wait for what nobody wants
				b = newBuilder(t, s, &lxdbuilder.Options{Ready: c.level - 1, ReadyTimeout: time.Minute})
				h, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
				require.NoError(t, err)
				require.NoError(t, b.Release(t.Context(), h))
			}
		})
	}
}

func bodyOf(req *http.Request) string {
	if req.GetBody == nil {
		return ""
	}
	body, err := req.GetBody()
	if err != nil {
		return ""
	}
	b, _ := io.ReadAll(body)
	return string(b)
}

func TestAddress(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	asked := 0
	s.on(func(req *http.Request) *http.Response {
		if req.Method != "GET" || !strings.HasSuffix(req.URL.Path, "/state") {
			return nil
		}
		asked++
		addresses := []any{map[string]string{"family": "inet6", "address": "2001:db8::2", "scope": "global"}}
		if asked > 4 {
			addresses = append(addresses, map[string]string{"family": "inet", "address": "192.0.2.7", "scope": "global"})
		}
		return answer(map[string]any{"status": "Running", "status_code": 103, "network": map[string]any{
			"docker0": map[string]any{"addresses": []any{map[string]string{"family": "inet", "address": "172.17.0.1", "scope": "global"}}},
			"eth0":    map[string]any{"addresses": addresses},
		}})
	})
	b := newBuilder(t, s, nil)
	h, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
	require.NoError(t, err)
	require.Equal(t, "192.0.2.7", h.Address)
	require.NoError(t, b.Release(t.Context(), h))
}

func TestEndsWhileStarting(t *testing.T) {
	t.Parallel()
	f, s := fake(t, func(what string) int { return 75 })
	b := newBuilder(t, s, nil)
	stopped := false
	s.on(func(req *http.Request) *http.Response {
		if strings.HasSuffix(req.URL.Path, "/exec") && !stopped {
			stopped = true
			f.SetStatus("", strings.Split(req.URL.Path, "/")[3], lxdtest.Stopped)
		}
		return nil
	})
	_, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
	require.ErrorContains(t, err, "Stopped")
	require.Empty(t, names(t, s))
}

func TestFailedScripts(t *testing.T) {
	t.Parallel()
	_, s := fake(t, func(what string) int { return map[string]int{"cloud-init": 70}[what] })
	_, err := newBuilder(t, s, nil).Get(t.Context(), builder.Spec{Image: "busybox"})
	require.ErrorContains(t, err, "cloud-init says that it has failed")
	require.Empty(t, names(t, s))
}

// TestCancelled cancels Get at every one of its requests in turn, before it is sent and when it was answered.
func TestCancelled(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"before", "after"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			_, conn := fake(t, nil)
			done := false
			for n := 0; !done; n++ {
				require.Less(t, n, 100)
				s := &cancelling{server: &server{InstanceServer: conn.InstanceServer}, at: n, after: when == "after"}
				ctx, cancel := context.WithCancelCause(t.Context())
				s.cancel = func() { cancel(errStop) }
				b := newBuilder(t, s, nil)
				h, err := b.Get(ctx, builder.Spec{Image: "busybox"})
				if err == nil {
					done = true
					require.NoError(t, b.Release(t.Context(), h))
				} else {
					require.ErrorIs(t, err, errStop)
				}
				require.Empty(t, names(t, conn), "cancelled at request %d", n)
				cancel(nil)
			}
		})
	}
}

var errStop = errors.New("stop")

// cancelling cancels at a request.
type cancelling struct {
	*server
	at     int
	after  bool
	cancel func()

	mu sync.Mutex
	n  int
}

func (c *cancelling) DoHTTP(req *http.Request) (*http.Response, error) {
	c.mu.Lock()
	mine := c.n == c.at
	c.n++
	c.mu.Unlock()
	if mine && !c.after {
		c.cancel()
	}
	resp, err := c.server.DoHTTP(req)
	if mine && c.after {
		c.cancel()
	}
	return resp, err
}

func TestAnswerIsLost(t *testing.T) {
	t.Parallel()
	_, conn := fake(t, nil)
	s := &losing{InstanceServer: conn.InstanceServer}
	_, err := newBuilder(t, s, nil).Get(t.Context(), builder.Spec{Image: "busybox"})
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.Empty(t, names(t, conn))
}

// losing loses the answer to the request that makes an instance.
type losing struct{ lxd.InstanceServer }

func (l *losing) DoHTTP(req *http.Request) (*http.Response, error) {
	resp, err := l.InstanceServer.DoHTTP(req)
	if err == nil && req.Method == "POST" && req.URL.Path == "/1.0/instances" {
		resp.Body.Close()
		return nil, io.ErrUnexpectedEOF
	}
	return resp, err
}

func TestReap(t *testing.T) {
	t.Parallel()
	f, s := fake(t, nil)
	label := func(owner, expiry string) map[string]string {
		return map[string]string{"user.transport.owner": owner, "user.transport.expiry": expiry}
	}
	late, early := time.Now().Add(time.Hour).UTC().Format(time.RFC3339), time.Now().Add(-time.Second).UTC().Format(time.RFC3339)
	f.AddInstance(lxdtest.Instance{Name: "foreign"})
	f.AddInstance(lxdtest.Instance{Name: "expired", Config: label("somebody", early), Status: lxdtest.Stopped})
	f.AddInstance(lxdtest.Instance{Name: "expired-elsewhere", Project: "p", Config: label("somebody", early)})
	f.AddInstance(lxdtest.Instance{Name: "gone", Config: label("ci-1", late)})
	f.AddInstance(lxdtest.Instance{Name: "alive", Config: label("ci-2", late)})
	f.AddInstance(lxdtest.Instance{Name: "nonsense", Config: label("ci-2", "soon")})
	b := newBuilder(t, s, &lxdbuilder.Options{OwnerGone: func(owner string) bool { return owner == "ci-1" }})
	own, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
	require.NoError(t, err)
	hosts, err := b.Reap(t.Context())
	require.NoError(t, err)
	var removed []string
	for _, h := range hosts {
		removed = append(removed, h.Project+"/"+h.Name)
	}
	require.ElementsMatch(t, []string{"default/expired", "p/expired-elsewhere", "default/gone"}, removed)
	require.ElementsMatch(t, []string{"foreign", "alive", "nonsense", own.Name}, names(t, s))
	hosts, err = b.Reap(t.Context())
	require.NoError(t, err)
	require.Empty(t, hosts)
}

func TestReapForbidden(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	s.on(func(req *http.Request) *http.Response {
		if req.URL.Query().Get("all-projects") != "" {
			return refusal(403, "Forbidden")
		}
		return nil
	})
	b := newBuilder(t, s, &lxdbuilder.Options{TTL: time.Nanosecond})
	_, err := b.Get(t.Context(), builder.Spec{Image: "busybox"})
	require.NoError(t, err)
	hosts, err := b.Reap(t.Context())
	require.NoError(t, err)
	require.Len(t, hosts, 1)
	require.Empty(t, names(t, s))
}

// crash gets a host on the server that the environment names, says so, and waits to be killed.
func crash() {
	s, err := lxd.ConnectLXDUnix(os.Getenv("TEST_BUILDER_CRASH"), nil)
	if err != nil {
		panic(err)
	}
	b, err := lxdbuilder.New(s, &lxdbuilder.Options{Prefix: os.Getenv("TEST_BUILDER_PREFIX"), Ready: lxdbuilder.Exec})
	if err != nil {
		panic(err)
	}
	h, err := b.Get(context.Background(), builder.Spec{Image: os.Getenv("TEST_BUILDER_IMAGE")})
	if err != nil {
		panic(err)
	}
	_, _ = os.Stdout.WriteString(h.Name + "\n")
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(1)
}

// crashed runs crash in a process that is killed, when it has a host or before, and returns the host's name if it had one.
func crashed(t *testing.T, socket, image, prefix string, early time.Duration) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "TEST_BUILDER_CRASH="+socket, "TEST_BUILDER_IMAGE="+image, "TEST_BUILDER_PREFIX="+prefix)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	defer in.Close()
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	if early > 0 {
		kill := time.AfterFunc(early, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
	}
	line := make([]byte, 100)
	n, _ := out.Read(line)
	_ = cmd.Process.Kill()
	require.Error(t, cmd.Wait())
	return strings.TrimSpace(string(line[:n]))
}

func TestReapAfterCrash(t *testing.T) {
	t.Parallel()
	f, s := fake(t, nil)
	name := crashed(t, f.Socket, "busybox", "crash", 0)
	require.Equal(t, []string{name}, names(t, s))
	hosts, err := newBuilder(t, s, nil).Reap(t.Context())
	require.NoError(t, err)
	require.Len(t, hosts, 1)
	require.Empty(t, names(t, s))
}

func TestPool(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	b := newBuilder(t, s, nil)
	spec := builder.Spec{Image: "busybox", Labels: map[string]string{"part": "pool"}}
	p, err := b.NewPool(spec, &lxdbuilder.PoolOptions{Size: 3})
	require.NoError(t, err)
	full := func() {
		t.Helper()
		require.Eventually(t, func() bool { n, err := p.Warm(); return n == 3 && err == nil }, time.Minute, 5*time.Millisecond)
	}
	full()
	warm := names(t, s)
	require.Len(t, warm, 3)
	spec.Labels = map[string]string{"run": "7"}
	h, err := p.Get(t.Context(), spec)
	require.NoError(t, err)
	require.Contains(t, warm, h.Name)
	full()
	for _, i := range instances(t, s) {
		if i.Name == h.Name {
			require.Equal(t, "7", i.Config["user.transport.run"])
			require.Empty(t, i.Config["user.transport.part"])
			require.Equal(t, "given", i.Config["user.transport.pool"])
		} else {
			require.Equal(t, "warm", i.Config["user.transport.pool"])
		}
	}
	other, err := p.Get(t.Context(), builder.Spec{OS: "debian_12"})
	require.NoError(t, err)
	require.NotContains(t, warm, other.Name)
	require.NoError(t, p.Release(t.Context(), other))
	require.NoError(t, p.Close())
	require.NoError(t, p.Close())
	require.Equal(t, []string{h.Name}, names(t, s), "what was given away is not the pool's any more")
	require.NoError(t, p.Release(t.Context(), h))
	_, err = p.Get(t.Context(), spec)
	require.ErrorContains(t, err, "closed")
	require.Empty(t, names(t, s))
}

func TestPoolTemplate(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	b := newBuilder(t, s, nil)
	prepared := 0
	p, err := b.NewPool(builder.Spec{Image: "busybox"}, &lxdbuilder.PoolOptions{Size: 2, Prepare: func(_ context.Context, h *builder.Host) error {
		prepared++
		return s.CreateInstanceFile(h.Name, "/root/prepared", lxd.InstanceFileArgs{Content: strings.NewReader("yes"), Mode: 0o600})
	}})
	require.NoError(t, err)
	defer p.Close()
	require.Eventually(t, func() bool { n, _ := p.Warm(); return n == 2 }, time.Minute, 5*time.Millisecond)
	require.Len(t, names(t, s), 3)
	hosts := make([]*builder.Host, 4)
	for i := range hosts { // two of them when the pool may be empty
		hosts[i], err = p.Get(t.Context(), builder.Spec{Image: "busybox"})
		require.NoError(t, err)
		content, _, err := s.GetInstanceFile(hosts[i].Name, "/root/prepared")
		require.NoError(t, err)
		content.Close()
	}
	require.Eventually(t, func() bool { n, _ := p.Warm(); return n == 2 }, time.Minute, 5*time.Millisecond)
	require.Equal(t, 1, prepared)
	require.NoError(t, p.Close())
	for _, h := range hosts {
		require.NoError(t, p.Release(t.Context(), h))
	}
	require.Empty(t, names(t, s))
}

func TestPoolHostDies(t *testing.T) {
	t.Parallel()
	f, s := fake(t, nil)
	b := newBuilder(t, s, nil)
	p, err := b.NewPool(builder.Spec{Image: "busybox"}, nil)
	require.NoError(t, err)
	defer p.Close()
	require.Eventually(t, func() bool { n, _ := p.Warm(); return n == 1 }, time.Minute, 5*time.Millisecond)
	dead := names(t, s)[0]
	f.SetStatus("", dead, lxdtest.Stopped)
	h, err := p.Get(t.Context(), builder.Spec{Image: "busybox"})
	require.NoError(t, err)
	require.NotEqual(t, dead, h.Name)
	require.NoError(t, p.Release(t.Context(), h))
	require.NoError(t, p.Close())
	require.Empty(t, names(t, s))
}

func TestPoolCannotBeFilled(t *testing.T) {
	t.Parallel()
	_, s := fake(t, nil)
	b := newBuilder(t, s, nil)
	p, err := b.NewPool(builder.Spec{Image: "no-such-image"}, nil)
	require.NoError(t, err)
	require.Eventually(t, func() bool { _, err := p.Warm(); return err != nil }, time.Minute, 5*time.Millisecond)
	require.NoError(t, p.Close())
	_, err = b.NewPool(builder.Spec{Type: "jail"}, nil)
	require.Error(t, err)
	_, err = b.NewPool(builder.Spec{}, &lxdbuilder.PoolOptions{Size: -1})
	require.Error(t, err)
}

// real is a builder on a real server, whose hosts' names begin with a prefix of the test's own.
func real(t *testing.T) (*lxdbuilder.Builder, lxd.InstanceServer, string) {
	t.Helper()
	reallxd.Need(t)
	s := reallxd.Unix(t)
	prefix := "bt-" + strings.ToLower(t.Name()[len("TestReal"):])
	t.Cleanup(func() {
		for _, name := range names(t, s) {
			assert.False(t, strings.HasPrefix(name, prefix+"-"), "%s is left", name)
		}
	})
	return newBuilder(t, s, &lxdbuilder.Options{Prefix: prefix}), s, prefix
}

func realImage() string { return os.Getenv("TRANSPORT_LXD_IMAGE") }

func TestRealGetAndRelease(t *testing.T) {
	t.Parallel()
	b, s, _ := real(t)
	h, err := b.Get(t.Context(), builder.Spec{Image: realImage(), Config: map[string]string{"limits.memory": "200MiB"}, Labels: map[string]string{"run": "x"}})
	require.NoError(t, err)
	require.Contains(t, names(t, s), h.Name)
	require.NoError(t, b.Release(t.Context(), h))
	require.NotContains(t, names(t, s), h.Name)
	require.NoError(t, b.Release(t.Context(), h))

	_, err = b.Get(t.Context(), builder.Spec{Image: "no-such-image"})
	require.ErrorContains(t, err, "no-such-image")
	_, err = b.Get(t.Context(), builder.Spec{Image: realImage(), Profiles: []string{"no-such-profile"}})
	require.Error(t, err)
	_, err = b.Get(t.Context(), builder.Spec{Image: realImage(), Config: map[string]string{"nonsense": "x"}})
	require.Error(t, err)
}

// TestRealCancelled cancels at every request of a Get on a real server.
func TestRealCancelled(t *testing.T) {
	t.Parallel()
	_, s, prefix := real(t)
	for n := 0; ; n++ {
		require.Less(t, n, 100)
		c := &cancelling{server: &server{InstanceServer: s}, at: n / 2, after: n%2 == 1}
		ctx, cancel := context.WithCancelCause(t.Context())
		c.cancel = func() { cancel(errStop) }
		b := newBuilder(t, c, &lxdbuilder.Options{Prefix: prefix, Ready: lxdbuilder.Exec}) // the scripts are two commands more
		h, err := b.Get(ctx, builder.Spec{Image: realImage()})
		cancel(nil)
		if err == nil {
			require.NoError(t, b.Release(t.Context(), h))
			break
		}
		require.ErrorIs(t, err, errStop)
		for _, name := range names(t, s) {
			require.False(t, strings.HasPrefix(name, prefix+"-"), "cancelled at request %d", n)
		}
	}
}

// TestRealReapAfterCrash kills a process that makes a host, at several moments.
func TestRealReapAfterCrash(t *testing.T) {
	t.Parallel()
	b, s, prefix := real(t)
	for n := range 12 {
		crashed(t, os.Getenv("TRANSPORT_LXD_SOCKET"), realImage(), prefix, time.Duration(n)*40*time.Millisecond)
		_, err := b.Reap(t.Context())
		require.NoError(t, err)
		for _, name := range names(t, s) {
			require.False(t, strings.HasPrefix(name, prefix+"-"), "killed after %d ms, %s is left", n*40, name)
		}
	}
}

func TestRealPool(t *testing.T) {
	t.Parallel()
	b, s, _ := real(t)
	spec := builder.Spec{Image: realImage()}
	p, err := b.NewPool(spec, &lxdbuilder.PoolOptions{Size: 2, Prepare: func(_ context.Context, h *builder.Host) error {
		return s.CreateInstanceFile(h.Name, "/root/prepared", lxd.InstanceFileArgs{Content: strings.NewReader("yes"), Mode: 0o600})
	}})
	require.NoError(t, err)
	defer p.Close()
	require.Eventually(t, func() bool { n, _ := p.Warm(); return n == 2 }, 2*time.Minute, 20*time.Millisecond)
	h, err := p.Get(t.Context(), spec)
	require.NoError(t, err)
	content, _, err := s.GetInstanceFile(h.Name, "/root/prepared")
	require.NoError(t, err)
	content.Close()
	require.NoError(t, p.Release(t.Context(), h))
	require.NoError(t, p.Close())
}
