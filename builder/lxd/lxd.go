// Package lxd makes build hosts of LXD instances: containers and virtual machines that are deleted when they are released.
//
//	server, err := lxd.ConnectLXDUnix("", nil) // of github.com/canonical/lxd/client
//	…
//	hosts, err := lxdbuilder.New(server, nil)
//	…
//	host, err := hosts.Get(ctx, builder.Spec{OS: "debian_12"})
//	if err != nil {
//		return err
//	}
//	defer func() { err = errors.Join(err, hosts.Release(context.WithoutCancel(ctx), host)) }()
//
// Every instance carries labels: whose it is (owner), what run it is for (run: a random one, unless Spec.Labels says), and when it may be removed (expiry). [Builder.Reap] removes those whose time has come, and those whose
// process on this machine has ended without a release. [Pool] keeps hosts ready.
package lxd

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"strings"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"

	"github.com/lxdtransport/transport/builder"
)

// Options are the options of [New]; nil means all defaults.
type Options struct {
	// Project is the LXD project of specs that name none. "": the connection's (UseProject), or the default project.
	Project string

	// Target is the cluster member, or "@group", of specs that name none. "": as LXD likes. The connection's UseTarget does not
	// count.
	Target string

	// Prefix begins the names of the instances: letters, digits and hyphens, a letter first. The rest of a name is random. A
	// prefix that does not fit into the 63 characters of a name is cut. "": build.
	Prefix string

	// Profiles are those of specs that have nil; nil: LXD's, which is the profile default.
	Profiles []string

	// Config and Devices are given to every instance; what a spec says of the same key or device wins. Limits are
	// among them: {"limits.cpu": "2", "limits.memory": "4GiB"}.
	Config  map[string]string
	Devices map[string]map[string]string

	// Images says which image, in the terms of [builder.Spec].Image, an operating system is made from: {"debian_12": "my-debian"}. What is not
	// in it is looked for among the server's aliases under the usual spellings (debian_12, debian-12, debian/12, debian/bookworm, …), and then
	// on the ImageServers.
	Images map[string]string

	// ImageServers are the simplestreams servers that LXD is told to fetch images from. nil: the public ones for Ubuntu and for the
	// others. Empty but not nil: none.
	ImageServers []ImageServer

	// Ready is what a host has to have reached when Get returns it. 0: [CloudInit], that is everything.
	Ready Level

	// ReadyTimeout is how long that may take from the start of the instance. 0: 5 minutes.
	ReadyTimeout time.Duration

	// TTL is after how long [Builder.Reap], of this or another process, may remove a host whose spec says nothing of it. 0: 24 hours.
	TTL time.Duration

	// Owner is recorded on every host. "": this process, in a form from which another one on the same machine can tell whether
	// it still lives. Other texts need OwnerGone for Reap to remove a host before its time has come.
	Owner string

	// OwnerGone tells Reap whether the owner of a host has gone. It is asked about every owner but this builder's own. nil: owners are
	// processes of this machine, or not known to be gone.
	OwnerGone func(owner string) bool

	// Logger gets what happens to hosts at level Debug, and at level Warn what Get and a [Pool] could not clean up. nil: silent.
	Logger *slog.Logger
}

// ImageServer is a simplestreams server.
type ImageServer struct {
	URL string

	// Alias returns the alias that the server has for an operating system such as debian_12, or "" if it has none. nil:
	// what follows "ubuntu_" for Ubuntu's, and debian/12 otherwise.
	Alias func(os string) string
}

const (
	defaultReadyTimeout = 5 * time.Minute
	defaultTTL          = 24 * time.Hour

	// cleanupTime is how long a Get that has failed takes at most to remove what it has made.
	cleanupTime = time.Minute

	// releaseTime is how long Release tries again when LXD cannot remove an instance just now.
	releaseTime = time.Minute
)

// Builder makes build hosts of LXD instances. It is a [builder.Builder], safe for concurrent use, and has no goroutines of its own.
type Builder struct {
	rest  *rest
	opts  Options
	owner string
	log   *slog.Logger
}

var _ builder.Builder = (*Builder)(nil)

// New returns a builder that uses a connection that the caller already has. It sends nothing, and keeps its own copy of the options.
func New(server lxd.InstanceServer, opts *Options) (*Builder, error) {
	if opts == nil {
		opts = new(Options)
	}
	b := &Builder{opts: *opts, owner: opts.Owner, log: opts.Logger}
	o := &b.opts
	o.Config, o.Images = maps.Clone(o.Config), maps.Clone(o.Images)
	o.Devices = mergeDevices(o.Devices, nil)
	o.Prefix = cmp.Or(o.Prefix, "build")
	o.ReadyTimeout = cmp.Or(o.ReadyTimeout, defaultReadyTimeout)
	o.TTL = cmp.Or(o.TTL, defaultTTL)
	o.Ready = cmp.Or(o.Ready, CloudInit)
	if o.ImageServers == nil {
		o.ImageServers = publicServers
	}
	switch {
	case server == nil:
		return nil, errors.New("builder/lxd: the connection (server) is nil")
	case !validPrefix.MatchString(o.Prefix):
		return nil, fmt.Errorf("builder/lxd: Options.Prefix %q does not consist of letters, digits and hyphens, a letter first", o.Prefix)
	case o.Ready < Running || o.Ready > CloudInit:
		return nil, fmt.Errorf("builder/lxd: Options.Ready is %d, which is no level", int(o.Ready))
	case o.ReadyTimeout < 0 || o.TTL < 0:
		return nil, errors.New("builder/lxd: Options.ReadyTimeout or TTL is negative")
	}
	var err error
	if b.rest, err = newREST(server); err != nil {
		return nil, fmt.Errorf("builder/lxd: the connection: %w", err)
	}
	if b.owner == "" {
		b.owner = thisProcess()
	}
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	return b, nil
}

var validPrefix = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9-]*$`)

// maxName is the longest name of an instance: it is a host name. randomPart is enough not to meet another one ever.
const (
	maxName    = 63
	randomPart = 13
)

func newName(prefix string) string {
	prefix = strings.TrimRight(prefix[:min(len(prefix), maxName-1-randomPart)], "-")
	return prefix + "-" + random()
}

func random() string { return strings.ToLower(rand.Text()[:randomPart]) }

// Get makes an instance, starts it, and returns it when it has reached Options.Ready. Until then it is waited for Options.ReadyTimeout at most;
// after that the error is a [*NotReadyError], which tells how far it came. On every error, the end of ctx included, Get
// removes the instance again; that takes as long as LXD takes, a minute at most, and if it fails the error says so and the instance is left to
// [Builder.Reap].
func (b *Builder) Get(ctx context.Context, spec builder.Spec) (*builder.Host, error) {
	host, err := b.get(ctx, spec, origin{})
	if err != nil {
		return nil, err
	}
	return host, nil
}

// origin is what a host is made of besides its spec.
type origin struct {
	template *builder.Host // to copy; nil: none
	pool     string        // its part in a pool; "": none
}

// get makes a host from a spec, or as a copy of another one.
func (b *Builder) get(ctx context.Context, spec builder.Spec, from origin) (host *builder.Host, err error) {
	what := cmp.Or(spec.Image, spec.OS)
	fail := func(err error) error { return fmt.Errorf("builder/lxd: getting a host (%s): %w", what, err) }
	req, err := b.request(spec)
	if err != nil {
		return nil, fail(err)
	}
	place := b.place(spec)
	var sources []api.InstanceSource
	if from.pool != "" {
		req.Config[poolKey] = from.pool
	}
	if from.template != nil {
		sources = []api.InstanceSource{{Type: "copy", Source: from.template.Name, InstanceOnly: true}}
		if req.Profiles == nil { // LXD takes this for none when it copies
			req.Profiles = []string{"default"}
		}
	} else if sources, err = b.sources(ctx, place.project, spec); err != nil {
		return nil, fail(err)
	}
	host = &builder.Host{Name: req.Name, Project: place.project, OS: spec.OS}
	started := time.Now()
	for i, source := range sources {
		req.Source = source
		err = b.create(ctx, place, req)
		if err == nil || ctx.Err() != nil || i == len(sources)-1 {
			break
		}
		b.log.Debug("image was not to be had", "host", host.Name, "server", source.Server, "alias", source.Alias, "error", err)
	}
	if err == nil {
		err = b.startAndWait(ctx, host)
	}
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		b.log.Debug("host is ready", "host", host.Name, "after", time.Since(started))
		return host, nil
	}
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	if left := b.abandon(cleanup, host); left != nil {
		b.log.Warn("host may be left behind", "host", host.Name, "error", left)
		err = fmt.Errorf("%w (and the instance %s may be left: %w)", err, host.Name, left)
	}
	return nil, fail(err)
}

// place is where an instance is made.
type place struct{ project, target string }

func (b *Builder) place(spec builder.Spec) place {
	return place{cmp.Or(spec.Project, b.opts.Project, b.rest.project), cmp.Or(spec.Target, b.opts.Target)}
}

// request is what LXD is asked for, but for the source.
func (b *Builder) request(spec builder.Spec) (*api.InstancesPost, error) {
	switch {
	case spec.TTL < 0:
		return nil, fmt.Errorf("Spec.TTL is negative: %v", spec.TTL)
	case spec.Type != "" && spec.Type != string(api.InstanceTypeContainer) && spec.Type != string(api.InstanceTypeVM):
		return nil, fmt.Errorf("Spec.Type %q is neither container nor virtual-machine", spec.Type)
	}
	labels, err := b.labels(spec)
	if err != nil {
		return nil, err
	}
	req := &api.InstancesPost{Name: newName(b.opts.Prefix), Type: api.InstanceType(cmp.Or(spec.Type, string(api.InstanceTypeContainer)))}
	req.Ephemeral = true
	req.Profiles = b.opts.Profiles
	if spec.Profiles != nil {
		req.Profiles = spec.Profiles
	}
	req.Config = map[string]string{}
	for _, c := range []map[string]string{b.opts.Config, spec.Config, labels} {
		for k, v := range c {
			if strings.HasPrefix(k, labelPrefix) && labels[k] != v {
				return nil, fmt.Errorf("the configuration has the key %s, which is a label's: use Spec.Labels", k)
			}
			req.Config[k] = v
		}
	}
	req.Devices = mergeDevices(b.opts.Devices, spec.Devices)
	return req, nil
}

// mergeDevices returns a copy of both, of which b wins.
func mergeDevices(a, b map[string]map[string]string) map[string]map[string]string {
	merged := map[string]map[string]string{}
	for _, devices := range []map[string]map[string]string{a, b} {
		for name, d := range devices {
			merged[name] = maps.Clone(d)
		}
	}
	return merged
}

// Release stops an instance by force and deletes it. It is no error if the instance does not exist any more. Where LXD cannot do it
// just now, because another operation is under way, it is tried again for a minute, or until ctx ends. An instance that
// no [Builder] has made is refused.
func (b *Builder) Release(ctx context.Context, h *builder.Host) error {
	if h == nil || h.Name == "" {
		return errors.New("builder/lxd: releasing a host: there is none")
	}
	ctx, cancel := context.WithTimeout(ctx, releaseTime)
	defer cancel()
	if err := b.remove(ctx, h.Project, h.Name); err != nil {
		return fmt.Errorf("builder/lxd: releasing %s: %w", h.Name, err)
	}
	b.log.Debug("host was released", "host", h.Name)
	return nil
}
