package lxd

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"slices"
	"time"

	"github.com/canonical/lxd/shared/api"

	"github.com/lxdtransport/transport/builder"
)

// sendGrace is how long after the end of ctx the answer to the request that makes an instance is still waited for. Without it nobody knows
// whether there will be an instance.
const sendGrace = 5 * time.Second

// create makes an instance, which is stopped then.
func (b *Builder) create(ctx context.Context, p place, req *api.InstancesPost) error {
	query := in(p.project)
	if p.target != "" {
		query.Set("target", p.target)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	send, end := after(ctx, sendGrace)
	defer end()
	id, err := b.rest.do(send, http.MethodPost, "/1.0/instances", query, req, nil)
	if err != nil {
		return fmt.Errorf("making the instance: %w", err)
	}
	if id == "" {
		return nil
	}
	_, err = b.rest.wait(ctx, id)
	switch {
	case err == nil, errors.Is(err, errForgotten): // the start will tell
		return nil
	case ctx.Err() != nil:
		// The download of an image can be cancelled, other things not.
		send, end := context.WithTimeout(context.WithoutCancel(ctx), sendGrace)
		defer end()
		_, _ = b.rest.do(send, http.MethodDelete, "/1.0/operations/"+url.PathEscape(id), nil, nil, nil)
	}
	return fmt.Errorf("making the instance: %w", err)
}

// after is a context that ends some time after ctx has ended.
func after(ctx context.Context, d time.Duration) (context.Context, func()) {
	late, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(d, func() { cancel(context.Cause(ctx)) })
		context.AfterFunc(late, func() { timer.Stop() })
	})
	return late, func() {
		stop()
		cancel(nil)
	}
}

// start starts an instance.
func (b *Builder) start(ctx context.Context, h *builder.Host) error {
	err := b.rest.run(ctx, http.MethodPut, instancePath(h.Name)+"/state", in(h.Project), api.InstanceStatePut{Action: "start", Timeout: -1})
	if err != nil && !errors.Is(err, errForgotten) {
		return fmt.Errorf("starting the instance: %w", err)
	}
	return nil
}

func (b *Builder) startAndWait(ctx context.Context, h *builder.Host) error {
	if err := b.start(ctx, h); err != nil {
		return err
	}
	return b.ready(ctx, h)
}

// abandon removes what a Get that failed has made, also if it is still in the making.
func (b *Builder) abandon(ctx context.Context, h *builder.Host) error {
	if err := b.settle(ctx, h.Project, h.Name); err != nil {
		return err
	}
	return b.removeIf(ctx, h.Project, h.Name, nil)
}

// remove removes an instance that a builder has made.
func (b *Builder) remove(ctx context.Context, project, name string) error {
	return b.removeIf(ctx, project, name, func(i *api.Instance) error {
		if i.Config[ownerKey] == "" {
			return fmt.Errorf("the instance has no label %s: no builder has made it", ownerKey)
		}
		return nil
	})
}

// removeIf removes an instance unless check minds, and comes back when there is none of that name and none is in the making.
func (b *Builder) removeIf(ctx context.Context, project, name string, check func(*api.Instance) error) error {
	var pause backoff
	var last error
	for {
		gone, err := b.tryRemove(ctx, project, name, check)
		switch {
		case gone:
			return nil
		case ctx.Err() != nil && last != nil:
			return fmt.Errorf("%w; before that: %w", context.Cause(ctx), last)
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case hasCode(err, http.StatusForbidden), errors.As(err, new(*refusal)):
			return err
		}
		if err != nil {
			last = err
		}
		pause.wait(ctx)
		_ = b.settle(ctx, project, name)
	}
}

// refusal is an error of a check.
type refusal struct{ error }

func (r *refusal) Unwrap() error { return r.error }

func (b *Builder) tryRemove(ctx context.Context, project, name string, check func(*api.Instance) error) (gone bool, err error) {
	var i api.Instance
	if err := b.rest.get(ctx, instancePath(name), in(project), &i); err != nil {
		return notFound(err), err
	}
	if check != nil {
		if err := check(&i); err != nil {
			return false, &refusal{err}
		}
	}
	if i.StatusCode != api.Stopped {
		err := b.rest.run(ctx, http.MethodPut, instancePath(name)+"/state", in(project), api.InstanceStatePut{Action: "stop", Force: true, Timeout: 30})
		if notFound(err) {
			return true, nil
		}
		if err != nil && ctx.Err() != nil {
			return false, err
		}
		// An ephemeral one deletes itself now, or has done so.
	}
	err = b.rest.run(ctx, http.MethodDelete, instancePath(name), in(project), nil)
	return err == nil || notFound(err), err
}

// settle waits until no operation of the instance is under way.
func (b *Builder) settle(ctx context.Context, project, name string) error {
	ops, err := b.underWay(ctx, in(project))
	if err != nil {
		return err
	}
	for _, op := range ops {
		if !slices.Contains(concerns(op), name) {
			continue
		}
		if _, err := b.rest.wait(ctx, op.ID); err != nil && ctx.Err() != nil {
			return err
		}
	}
	return nil
}

// underWay are the operations that have not ended; those of commands are not among them.
func (b *Builder) underWay(ctx context.Context, query url.Values) ([]api.Operation, error) {
	var all map[string][]api.Operation
	query.Set("recursion", "1")
	if err := b.rest.get(ctx, "/1.0/operations", query, &all); err != nil {
		return nil, err
	}
	var some []api.Operation
	for _, ops := range all {
		for _, op := range ops {
			if !op.StatusCode.IsFinal() && op.Class == "task" && op.Description != "Executing command" {
				some = append(some, op)
			}
		}
	}
	return some, nil
}

// concerns returns the names of the instances that an operation works on.
func concerns(op api.Operation) []string {
	urls := append(slices.Clone(op.Resources["instances"]), op.Resources["containers"]...)
	if u, ok := op.Metadata["entity_url"].(string); ok {
		urls = append(urls, u)
	}
	var names []string
	for _, u := range urls {
		if parsed, err := url.Parse(u); err == nil {
			names = append(names, path.Base(parsed.Path))
		}
	}
	return names
}
