package lxd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/canonical/lxd/shared/api"

	"github.com/lxdtransport/transport/builder"
)

// PoolOptions are the options of [Builder.NewPool]; nil means all defaults.
type PoolOptions struct {
	// Size is how many hosts are kept ready. 0: one.
	Size int

	// Prepare does to a host, which is ready, what all hosts of the pool need: packages, say. It is done once, to a
	// template, of which the others are copies. It is called from a goroutine of the pool, never twice at a time. nil: nothing.
	Prepare func(ctx context.Context, h *builder.Host) error
}

// Pool keeps hosts of one kind ready. It is a [builder.Builder], safe for concurrent use.
//
// Where there is something to prepare, or the storage makes copies that share their blocks (btrfs, zfs, ceph and lvm with thin pools), the
// hosts are copies of a template, a stopped instance that was started once and prepared; elsewhere each is made
// from the image. A host is given to one caller and never used again.
type Pool struct {
	b    *Builder
	spec builder.Spec
	opts PoolOptions

	running context.Context // ends with Close
	stop    context.CancelFunc
	wg      sync.WaitGroup
	wake    chan struct{} // has room for one: something has changed

	labelling sync.Mutex // held while the labels of a warm host are changed; before mu

	mu       sync.Mutex // guards what follows
	closed   bool
	warm     []*builder.Host
	making   int
	template *builder.Host
	plain    bool // there is to be no template
	failures backoff
	lastErr  error
}

var _ builder.Builder = (*Pool)(nil)

const (
	// poolMaking is how many hosts a pool makes at the same time.
	poolMaking = 4

	// poolRetry is the longest pause before a pool tries again to make a host.
	poolRetry = time.Minute

	// closeTime bounds the removal of a pool's hosts.
	closeTime = 2 * time.Minute
)

// NewPool returns a pool of hosts, and begins to fill it in the background. Spec's Labels and TTL count for hosts until they are given away. The
// caller has to call Close.
func (b *Builder) NewPool(spec builder.Spec, opts *PoolOptions) (*Pool, error) {
	if opts == nil {
		opts = new(PoolOptions)
	}
	p := &Pool{b: b, spec: copySpec(spec), opts: *opts, wake: make(chan struct{}, 1)}
	p.opts.Size = cmp.Or(p.opts.Size, 1)
	if p.opts.Size < 0 {
		return nil, fmt.Errorf("builder/lxd: PoolOptions.Size is negative: %d", p.opts.Size)
	}
	if _, err := b.request(spec); err != nil {
		return nil, fmt.Errorf("builder/lxd: a pool's spec: %w", err)
	}
	p.running, p.stop = context.WithCancel(context.Background())
	p.wg.Go(p.run)
	return p, nil
}

func copySpec(s builder.Spec) builder.Spec {
	if s.Profiles != nil {
		s.Profiles = append([]string{}, s.Profiles...)
	}
	s.Config, s.Labels, s.Devices = maps.Clone(s.Config), maps.Clone(s.Labels), mergeDevices(s.Devices, nil)
	return s
}

// Warm returns how many hosts are ready, and the error of the last attempt to make one, which is nil after one that worked.
func (p *Pool) Warm() (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.warm), p.lastErr
}

// Get returns a host that is ready, if spec is the pool's (its Labels and TTL may be others) and there is one that still runs. Otherwise it is
// [Builder.Get], which makes one without the pool's Prepare where the spec is not the pool's. For the pool's own spec Prepare has
// been done in any case.
func (p *Pool) Get(ctx context.Context, spec builder.Spec) (*builder.Host, error) {
	if !p.fits(spec) {
		return p.b.Get(ctx, spec)
	}
	labels, err := p.b.labels(spec)
	if err != nil {
		return nil, fmt.Errorf("builder/lxd: getting a host: %w", err)
	}
	for ctx.Err() == nil {
		h := p.take()
		if h == nil {
			return p.cold(ctx, spec)
		}
		if err = p.give(ctx, h, labels); err == nil {
			return h, nil
		}
		p.b.log.Debug("a warm host was of no use", "host", h.Name, "error", err)
		p.discard(ctx, h)
	}
	return nil, fmt.Errorf("builder/lxd: getting a host: %w", context.Cause(ctx))
}

func (p *Pool) fits(spec builder.Spec) bool {
	norm := func(s builder.Spec) builder.Spec {
		s = copySpec(s)
		s.Labels, s.TTL = nil, 0
		s.Type = cmp.Or(s.Type, string(api.InstanceTypeContainer))
		if len(s.Config) == 0 {
			s.Config = nil
		}
		at := p.b.place(s)
		s.Project, s.Target = at.project, at.target
		return s
	}
	return reflect.DeepEqual(norm(p.spec), norm(spec))
}

func (p *Pool) take() *builder.Host {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.warm) == 0 {
		return nil
	}
	h := p.warm[0]
	p.warm = p.warm[1:]
	p.nudge()
	return h
}

// give labels a warm host as the caller's.
func (p *Pool) give(ctx context.Context, h *builder.Host, labels map[string]string) error {
	if _, err := (&waiter{b: p.b, h: h}).instance(ctx); err != nil {
		return err
	}
	p.labelling.Lock() // renew may be about to write to it
	defer p.labelling.Unlock()
	config := map[string]string{poolKey: "given"}
	for name := range p.spec.Labels {
		config[labelPrefix+name] = ""
	}
	maps.Copy(config, labels)
	return p.b.relabel(ctx, h, config)
}

// relabel changes labels of a host; "" removes one.
func (b *Builder) relabel(ctx context.Context, h *builder.Host, labels map[string]string) error {
	body := struct {
		Config map[string]string `json:"config"`
	}{labels}
	return b.rest.run(ctx, http.MethodPatch, instancePath(h.Name), in(h.Project), body)
}

// cold makes a host for the caller when none is ready.
func (p *Pool) cold(ctx context.Context, spec builder.Spec) (*builder.Host, error) {
	p.mu.Lock()
	template, closed := p.template, p.closed
	p.mu.Unlock()
	switch {
	case closed:
		return nil, errors.New("builder/lxd: getting a host: the pool was closed")
	case template != nil || p.opts.Prepare == nil:
		return p.b.get(ctx, spec, origin{template, "given"})
	}
	h, err := p.b.Get(ctx, spec)
	if err != nil {
		return nil, err
	}
	if err := p.opts.Prepare(ctx, h); err != nil {
		p.discard(ctx, h)
		return nil, fmt.Errorf("builder/lxd: preparing %s: %w", h.Name, err)
	}
	return h, nil
}

// discard removes a host that nobody wants.
func (p *Pool) discard(ctx context.Context, h *builder.Host) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	if err := p.b.Release(ctx, h); err != nil {
		p.b.log.Warn("host may be left behind", "host", h.Name, "error", err)
	}
}

// Release removes a host. See [Builder.Release].
func (p *Pool) Release(ctx context.Context, h *builder.Host) error { return p.b.Release(ctx, h) }

// Close ends what the pool is making and removes its hosts, but not those that were given away. It may be called more than once.
func (p *Pool) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.stop()
	p.wg.Wait()
	p.mu.Lock()
	hosts := p.warm
	if p.template != nil {
		hosts = append(hosts, p.template)
	}
	p.warm, p.template = nil, nil
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	var errs []error
	for _, h := range hosts {
		errs = append(errs, p.b.Release(ctx, h))
	}
	return errors.Join(errs...)
}

func (p *Pool) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run keeps the pool full, and its hosts' expiry in the future.
func (p *Pool) run() {
	renew := time.NewTicker(max(cmp.Or(p.spec.TTL, p.b.opts.TTL)/3, time.Second))
	defer renew.Stop()
	for {
		if p.running.Err() == nil && p.needTemplate() {
			p.makeTemplate()
		}
		p.mu.Lock()
		ready := p.template != nil || p.plain
		for ready && p.lastErr == nil && !p.closed && p.making < poolMaking && p.making+len(p.warm) < p.opts.Size {
			p.making++
			p.wg.Go(p.make)
		}
		var retry <-chan time.Time
		if p.lastErr != nil && p.making == 0 {
			p.failures.next = min(max(p.failures.next*2, time.Second), poolRetry)
			retry = time.After(p.failures.next)
		}
		p.mu.Unlock()
		select {
		case <-p.running.Done():
			return
		case <-p.wake:
		case <-renew.C:
			p.renew()
		case <-retry:
			p.mu.Lock()
			p.lastErr = nil
			p.mu.Unlock()
		}
	}
}

func (p *Pool) needTemplate() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.template == nil && !p.plain && p.lastErr == nil
}

// makeTemplate makes what hosts are copied from, or finds out that there is to be nothing.
func (p *Pool) makeTemplate() {
	h, err := p.newTemplate()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lastErr = err
	p.template, p.plain = h, err == nil && h == nil
	if err != nil && p.running.Err() == nil {
		p.b.log.Warn("a pool has no template", "error", err)
	}
}

func (p *Pool) newTemplate() (*builder.Host, error) {
	ctx := p.running
	if p.opts.Prepare == nil {
		cheap, err := p.copiesAreCheap(ctx)
		if err != nil || !cheap {
			return nil, err
		}
	}
	h, err := p.b.get(ctx, p.spec, origin{pool: "template"})
	if err != nil {
		return nil, err
	}
	if p.opts.Prepare != nil {
		err = p.opts.Prepare(ctx, h)
	}
	if err == nil {
		err = p.park(ctx, h)
	}
	if err != nil {
		p.discard(ctx, h)
		return nil, fmt.Errorf("builder/lxd: preparing the template %s: %w", h.Name, err)
	}
	return h, nil
}

// park stops an instance that is not to be deleted by that.
func (p *Pool) park(ctx context.Context, h *builder.Host) error {
	var i api.Instance
	path, query := instancePath(h.Name), in(h.Project)
	if err := p.b.rest.get(ctx, path, query, &i); err != nil {
		return err
	}
	put := i.Writable()
	put.Ephemeral = false
	if err := p.b.rest.run(ctx, http.MethodPut, path, query, put); err != nil {
		return err
	}
	// Asked first: an init system that stops by itself has written everything.
	stop := api.InstanceStatePut{Action: "stop", Timeout: 10}
	if err := p.b.rest.run(ctx, http.MethodPut, path+"/state", query, stop); err == nil || ctx.Err() != nil {
		return err
	}
	_ = p.b.rest.run(ctx, http.MethodPut, path+"/state", query, api.InstanceStatePut{Action: "stop", Force: true, Timeout: -1})
	s, err := p.b.rest.state(ctx, h)
	if err == nil && s.StatusCode != api.Stopped {
		err = fmt.Errorf("the template does not stop, its state is %s", quoted(s.Status))
	}
	return err
}

func (r *rest) state(ctx context.Context, h *builder.Host) (*api.InstanceState, error) {
	var s api.InstanceState
	return &s, r.get(ctx, instancePath(h.Name)+"/state", in(h.Project), &s)
}

// copiesAreCheap reports whether the storage that the hosts' root disks will be on makes copies that share their blocks.
func (p *Pool) copiesAreCheap(ctx context.Context) (bool, error) {
	req, err := p.b.request(p.spec)
	if err != nil {
		return false, err
	}
	devices := req.Devices
	at := p.b.place(p.spec)
	profiles := req.Profiles
	if profiles == nil {
		profiles = []string{"default"}
	}
	pool := rootPool(devices)
	for i := len(profiles) - 1; i >= 0 && pool == ""; i-- { // the last one wins
		var profile api.Profile
		err := p.b.rest.get(ctx, "/1.0/profiles/"+profiles[i], in(at.project), &profile)
		if err != nil {
			return false, fmt.Errorf("the profile %q: %w", profiles[i], err)
		}
		pool = rootPool(profile.Devices)
	}
	var storage api.StoragePool
	if pool == "" || p.b.rest.get(ctx, "/1.0/storage-pools/"+pool, nil, &storage) != nil {
		return false, ctx.Err() // it is a matter of speed only
	}
	switch storage.Driver {
	case "btrfs", "zfs", "ceph":
		return true, nil
	case "lvm":
		return storage.Config["lvm.use_thinpool"] != "false", nil
	}
	return false, nil
}

func rootPool(devices map[string]map[string]string) string {
	for _, d := range devices {
		if d["type"] == "disk" && d["path"] == "/" {
			return d["pool"]
		}
	}
	return ""
}

// make adds a host to the pool.
func (p *Pool) make() {
	p.mu.Lock()
	template := p.template
	p.mu.Unlock()
	h, err := p.b.get(p.running, p.spec, origin{template, "warm"})
	gone := false
	if err != nil && template != nil && p.running.Err() == nil {
		_, stateErr := p.b.rest.state(p.running, template)
		gone = notFound(stateErr) // somebody has removed it
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.making--
	if gone && p.template == template {
		p.template = nil
	}
	p.lastErr = err
	if err == nil {
		p.failures = backoff{}
		p.warm = append(p.warm, h) // Close waits for us, and removes it
	} else if p.running.Err() == nil {
		p.b.log.Warn("a pool could not make a host", "error", err)
	}
	p.nudge()
}

// renew moves the time at which the pool's hosts may be reaped.
func (p *Pool) renew() {
	p.mu.Lock()
	hosts := append([]*builder.Host{}, p.warm...)
	if p.template != nil {
		hosts = append(hosts, p.template)
	}
	p.mu.Unlock()
	for _, h := range hosts {
		if p.running.Err() != nil {
			return
		}
		if notFound(p.renewOne(h)) { // somebody has removed it
			p.mu.Lock()
			p.warm = slices.DeleteFunc(p.warm, func(w *builder.Host) bool { return w == h })
			if p.template == h {
				p.template = nil
			}
			p.mu.Unlock()
			p.nudge()
		}
	}
}

func (p *Pool) renewOne(h *builder.Host) error {
	p.labelling.Lock()
	defer p.labelling.Unlock()
	p.mu.Lock()
	ours := p.template == h || slices.Contains(p.warm, h)
	p.mu.Unlock()
	if !ours {
		return nil
	}
	return p.b.relabel(p.running, h, map[string]string{expiryKey: p.b.expiry(p.spec.TTL)})
}
