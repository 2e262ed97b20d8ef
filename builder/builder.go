// Package builder acquires and releases build hosts. It knows nothing of how commands run on them: that is the business of a
// transport, which is given what [Host] says. The package in the folder lxd makes hosts of LXD instances.
//
//	host, err := hosts.Get(ctx, builder.Spec{OS: "debian_12"})
//	if err != nil {
//		return err
//	}
//	defer func() { err = errors.Join(err, hosts.Release(context.WithoutCancel(ctx), host)) }()
package builder

import (
	"context"
	"time"
)

// Spec is what a build host is to be. The zero value of a field leaves the matter to the builder. A builder refuses what it
// does not understand or cannot give.
type Spec struct {
	// OS is an operating system and its version as Cyclid's job files write them, such as "debian_12", "ubuntu_24.04" or
	// "ubuntu_24_04", or its code name, as in "debian_bookworm".
	OS string

	// Image is the image that the host is made from, in the builder's own terms: for LXD an alias, a fingerprint or the
	// beginning of one. It wins over OS, which then is only recorded.
	Image string

	// Type is "container" or "virtual-machine"; "" is "container".
	Type string

	// Profiles are the builder's named sets of configuration that the host gets, in this order. nil is the builder's default;
	// an empty slice that is not nil is none.
	Profiles []string

	// Config and Devices are configuration in the builder's own terms, such as "limits.memory" of LXD.
	Config  map[string]string
	Devices map[string]map[string]string

	// Project is the namespace that the host is made in, and Target the member of a cluster, or the group of members
	// ("@name"), that is to run it.
	Project, Target string

	// Labels are recorded on the host, for people and for other programs. Names consist of letters, digits,
	// '.', '_' and '-'. The label "run" says what the host is for.
	Labels map[string]string

	// TTL is how long the host is needed at most. After that it may be removed even though nobody has released it. 0
	// is the builder's default.
	TTL time.Duration
}

// Host is a build host.
type Host struct {
	Name    string // unique within the project
	Project string // "": the builder's default
	OS      string // as in Spec.OS, as far as it is known
	Address string // an IP address, as far as the builder has found one out
}

// Builder makes build hosts. It is safe for concurrent use.
type Builder interface {
	// Get makes a host and returns it when it is ready to run commands. When ctx ends first, nothing is left of
	// the host, as far as the other side can still be reached; if not, the error says so.
	Get(ctx context.Context, spec Spec) (*Host, error)

	// Release removes a host, whatever it is doing. It is no error if the host does not exist any more, so that it
	// may be called more than once. It works until ctx ends: give it one that does not end with the job.
	Release(ctx context.Context, h *Host) error
}
