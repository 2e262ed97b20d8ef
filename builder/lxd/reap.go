package lxd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"time"

	"github.com/canonical/lxd/shared/api"

	"github.com/lxdtransport/transport/builder"
)

// unknownOwner names a process of which others cannot tell whether it lives.
func unknownOwner() string {
	name, _ := os.Hostname()
	return fmt.Sprintf("process %d on %s", os.Getpid(), cmp.Or(name, "an unknown host"))
}

// Reap removes the hosts, in every project that the connection may see, whose time has come, whoever has made them; and those whose owner
// has gone: a process of this machine that has ended, or whom Options.OwnerGone knows to have gone. It
// returns those that it has removed, also along with an error, which is of those that it could not remove. Call it when an orchestrator starts and
// from time to time. Several may run at once.
//
// An instance that LXD was told to make by a process that was killed then may not be there yet. Reap waits for instances in the
// making for half a minute at most, so that one of which the image is still being downloaded is left to the next call.
func (b *Builder) Reap(ctx context.Context) ([]builder.Host, error) {
	pending, err := b.inTheMaking(ctx)
	if err != nil {
		return nil, fmt.Errorf("builder/lxd: reap: %w", err)
	}
	removed, err := b.reap(ctx)
	if err != nil || len(pending) == 0 {
		return removed, err
	}
	limited, cancel := context.WithTimeout(ctx, makingTime)
	defer cancel()
	for _, id := range pending {
		_, _ = b.rest.wait(limited, id)
	}
	late, err := b.reap(ctx)
	return append(removed, late...), err
}

// makingTime is how long Reap waits for instances in the making.
const makingTime = 30 * time.Second

var ourName = regexp.MustCompile(`-[a-z2-7]{13}$`)

// inTheMaking are the operations that work on instances with names like ours.
func (b *Builder) inTheMaking(ctx context.Context) ([]string, error) {
	query := in("")
	query.Set("all-projects", "true")
	ops, err := b.underWay(ctx, query)
	if hasCode(err, http.StatusForbidden) {
		ops, err = b.underWay(ctx, in(b.place(builder.Spec{}).project))
	}
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, op := range ops {
		if slices.ContainsFunc(concerns(op), ourName.MatchString) {
			ids = append(ids, op.ID)
		}
	}
	return ids, nil
}

func (b *Builder) reap(ctx context.Context) ([]builder.Host, error) {
	instances, err := b.instances(ctx)
	if err != nil {
		return nil, fmt.Errorf("builder/lxd: reap: %w", err)
	}
	var removed []builder.Host
	var errs []error
	for _, i := range instances {
		why := b.overdue(&i)
		if why == "" {
			continue
		}
		h := builder.Host{Name: i.Name, Project: i.Project, OS: i.Config[osKey]}
		one, cancel := context.WithTimeout(ctx, releaseTime)
		err := b.removeIf(one, i.Project, i.Name, func(now *api.Instance) error {
			if b.overdue(now) == "" {
				return errSpared
			}
			return nil
		})
		cancel()
		switch {
		case err == nil:
			b.log.Debug("host was reaped", "host", h.Name, "why", why)
			removed = append(removed, h)
		case errors.Is(err, errSpared):
		case ctx.Err() != nil:
			return removed, fmt.Errorf("builder/lxd: reap: %w", errors.Join(append(errs, context.Cause(ctx))...))
		default:
			errs = append(errs, fmt.Errorf("%s (%s): %w", i.Name, why, err))
		}
	}
	if errs != nil {
		return removed, fmt.Errorf("builder/lxd: reap: %w", errors.Join(errs...))
	}
	return removed, nil
}

var errSpared = errors.New("the host has been given more time meanwhile")

// instances are all those that a builder has made, as far as the connection may see them.
func (b *Builder) instances(ctx context.Context) ([]api.Instance, error) {
	var all []api.Instance
	query := in("")
	query.Set("recursion", "1")
	query.Set("all-projects", "true")
	err := b.rest.get(ctx, "/1.0/instances", query, &all)
	if hasCode(err, http.StatusForbidden) {
		query = in(b.place(builder.Spec{}).project)
		query.Set("recursion", "1")
		err = b.rest.get(ctx, "/1.0/instances", query, &all)
	}
	if err != nil {
		return nil, err
	}
	ours := all[:0]
	for _, i := range all {
		if i.Config[ownerKey] != "" {
			ours = append(ours, i)
		}
	}
	return ours, nil
}

// overdue says why an instance is to be removed; "": it is not.
func (b *Builder) overdue(i *api.Instance) string {
	owner := i.Config[ownerKey]
	if owner == "" {
		return ""
	}
	if t, err := time.Parse(time.RFC3339, i.Config[expiryKey]); err == nil && time.Now().After(t) {
		return "its time has come"
	}
	gone := b.opts.OwnerGone
	if gone == nil {
		gone = processGone
	}
	if owner != b.owner && gone(owner) {
		return "its owner has gone"
	}
	return ""
}
