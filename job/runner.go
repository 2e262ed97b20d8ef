package job

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/builder"
	"github.com/lxdtransport/transport/provisioner"
)

// Runner runs jobs. It may run several at once, if what its fields hold can be used so; it modifies none of them.
type Runner struct {
	// Builder makes the host and releases it.
	Builder builder.Builder

	// Spec is what the host is to be. Its OS is the job's, if that has one, and its label "run" is ID, unless it has one.
	Spec builder.Spec

	// Dial connects a transport to the host. The Runner closes it.
	Dial func(ctx context.Context, h *builder.Host) (transport.Transport, error)

	// Provisioner prepares the host for the job's environment. nil: a job that has repositories or packages fails.
	Provisioner provisioner.Provisioner
	// NewProvisioner makes a Provisioner that writes what it does to the job's log; it wins over Provisioner. It gets a writer of its own for
	// each run, which is not to be used after Prepare.
	NewProvisioner func(log io.Writer) provisioner.Provisioner

	// Log gets the job's log, one Write at a time. nil: it is thrown away.
	Log io.Writer
	// LogOptions say how the log is written. To their Secrets the Runner adds the job's.
	LogOptions LogOptions

	// Events is called for every change of the job's state, from the goroutine that called Run. nil: nobody is told.
	Events func(Event)
	// Logger gets the same events. nil: silent.
	Logger *slog.Logger

	// Secret gives a secret of the job in the clear. value is what the file has, in Cyclid encrypted with the organization's key and in
	// base64; [RSASecrets] decrypts it. nil: the file has them in the clear.
	Secret func(name, value string) (string, error)

	// Context is variables for the job besides its own, such as "organization". The job's own win.
	Context map[string]string

	// Files is what the action upload copies from. nil: there is nothing.
	Files fs.FS
	// Artifacts is the directory that the action artifact copies to. nil: there is none.
	Artifacts *os.Root
	// MaxArtifact is the most bytes of one artifact. 0: 4 GiB.
	MaxArtifact int64

	// Workspace is the directory on the host that the job works in, an absolute path. It is created if it is missing. "": a
	// new one below /tmp, which is removed at the end.
	Workspace string

	// ID is the job's, for its context and the events. "": a random one for each run.
	ID string

	// Keep leaves the host to the caller: it is not released, and Result.Host says which it is.
	Keep bool

	// ReleaseTimeout bounds the release, which goes on when ctx has ended. 0: 2 minutes.
	ReleaseTimeout time.Duration
}

const defaultReleaseTimeout = 2 * time.Minute

// Result is what became of a job.
type Result struct {
	ID        string
	Succeeded bool
	Host      *builder.Host // nil if there never was one
	Stages    []StageResult // in the order in which they ran
	Context   map[string]string
	Duration  time.Duration

	// ReleaseErr is why the host may still be there. The verdict does not depend on it.
	ReleaseErr error
}

// StageResult is what became of a stage.
type StageResult struct {
	Stage    string
	Skipped  bool // because of its only_if or not_if; it counts as succeeded
	Err      error
	Duration time.Duration
}

// StageError says that a stage failed.
type StageError struct {
	Stage  string
	Step   int    // from 1; 0: its condition failed it
	Action string // of the step
	Err    error
}

func (e *StageError) Error() string {
	if e.Step == 0 {
		return fmt.Sprintf("stage %s: %v", e.Stage, e.Err)
	}
	return fmt.Sprintf("stage %s, step %d (%s): %v", e.Stage, e.Step, e.Action, e.Err)
}

func (e *StageError) Unwrap() error { return e.Err }

// FailedError says that a job ran to its end and failed, because stages did.
type FailedError struct{ Stages []*StageError }

func (e *FailedError) Error() string {
	return "job: failed: " + e.Stages[0].Error()
}

// Unwrap returns the stages' errors.
func (e *FailedError) Unwrap() []error {
	errs := make([]error, len(e.Stages))
	for i, s := range e.Stages {
		errs[i] = s
	}
	return errs
}

// run is one run of a job.
type run struct {
	*Runner
	job    *Job
	ctx    context.Context
	id     string
	random string
	at     *builder.Host
	host   transport.Transport
	vars   map[string]string
	masks  []string
	hiding *dictionary
	logs   *Log
	own    *Stream

	workspace     string // as the transport's methods take it
	workspaceSeen string // as commands see it, which differs on package local
	root          bool   // commands run as root
}

// Run runs a job. It returns
//
//   - nil when the job succeeded: no stage failed;
//   - a *[FailedError] when the job ran to its end, on_failure handlers included, and a stage had failed;
//   - what matches context.Cause(ctx) when ctx ended: then nothing more is run, no handler either;
//   - another error when there was no host, it could not be prepared, or the sources could not be had.
//
// The result is never nil. The host is released before Run returns, whatever happens, in a time of its own that does not end with ctx; what
// went wrong with that is Result.ReleaseErr.
func (r *Runner) Run(ctx context.Context, j *Job) (*Result, error) {
	begin := time.Now()
	n := &run{Runner: r, job: j, ctx: ctx, id: r.ID, random: strings.ToLower(rand.Text()[:12]), vars: map[string]string{}}
	if n.id == "" {
		n.id = n.random
	}
	res := &Result{ID: n.id}
	err := n.prepareContext()
	n.hiding = newDictionary(secretForms(n.masks))
	opts := r.LogOptions
	opts.Secrets = n.masks
	w := r.Log
	if w == nil {
		w = io.Discard
	}
	n.logs = NewLog(w, &opts)
	n.own = n.logs.Stream()
	if err == nil {
		n.event(Event{Kind: Waiting})
		err = n.all(res)
	}
	switch {
	case err == nil:
	case ctx.Err() != nil && !errors.Is(err, context.Cause(ctx)):
		err = fmt.Errorf("job: %w (%w)", context.Cause(ctx), err)
	}
	if err != nil {
		err = n.hideError(err)
		n.log("%s\n", strings.Repeat("=", 79))
		n.log("Job %s failed: %v\n", j.Name, err)
	} else {
		n.log("%s\n", strings.Repeat("=", 79))
		n.log("Job %s succeeded\n", j.Name)
	}
	if logErr := errors.Join(n.own.Close(), n.logs.Close()); logErr != nil && err == nil {
		err = fmt.Errorf("job: the log: %w", logErr)
	}
	res.Succeeded, res.Host, res.Duration, res.Context = err == nil, n.at, time.Since(begin), n.public()
	if err != nil {
		n.event(Event{Kind: Failed, Err: err, Duration: res.Duration})
		return res, err
	}
	n.event(Event{Kind: Succeeded, Duration: res.Duration})
	return res, nil
}

// prepareContext decrypts the secrets and fills the context with what is known before there is a host.
func (r *run) prepareContext() error {
	j := r.job
	r.masks = slices.Clone(r.LogOptions.Secrets)
	maps.Copy(r.vars, r.Context)
	maps.Copy(r.vars, map[string]string{
		"job_id": r.id, "job_name": j.Name, "job_version": j.Version,
		"os": j.Environment.OS, "packages": strings.Join(j.Environment.Packages, " "),
	})
	var repos []string
	for _, repo := range j.Environment.Repositories {
		repos = append(repos, repo.URL)
	}
	r.vars["repos"] = strings.Join(repos, " ")
	for _, name := range slices.Sorted(maps.Keys(j.Secrets)) {
		value := j.Secrets[name]
		if r.Secret != nil {
			var err error
			if value, err = r.Secret(name, value); err != nil {
				return fmt.Errorf("job: the secret %q at line %d: %w", name, j.secrets[name].line, err)
			}
		}
		r.vars[name] = value
		r.masks = append(r.masks, value)
	}
	for _, s := range j.Sources {
		if s.Token != "" {
			r.masks = append(r.masks, expand(s.Token, r.vars))
		}
	}
	r.masks = slices.DeleteFunc(r.masks, func(s string) bool { return s == "" })
	return nil
}

// public is the context without secrets.
func (r *run) public() map[string]string {
	vars := maps.Clone(r.vars)
	for name := range r.job.Secrets {
		delete(vars, name)
	}
	return vars
}

// all does everything that needs a host.
func (r *run) all(res *Result) (err error) {
	ctx := r.ctx
	if r.Builder == nil || r.Dial == nil {
		return errors.New("job: Runner.Builder or Runner.Dial is not set")
	}
	spec := r.Spec
	if r.job.Environment.OS != "" {
		spec.OS = r.job.Environment.OS
	}
	if spec.Labels["run"] == "" {
		spec.Labels = maps.Clone(spec.Labels)
		if spec.Labels == nil {
			spec.Labels = map[string]string{}
		}
		spec.Labels["run"] = r.id
	}
	r.log("Obtaining a build host\n")
	h, err := r.Builder.Get(ctx, spec)
	if err != nil {
		return fmt.Errorf("job: no build host: %w", err)
	}
	r.at = h
	defer func() {
		if r.Keep {
			r.log("The host %s is kept\n", h.Name)
			return
		}
		// The job's context may have ended; the host must not survive that.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cmp.Or(r.ReleaseTimeout, defaultReleaseTimeout))
		defer cancel()
		if err := r.Builder.Release(ctx, h); err != nil {
			res.ReleaseErr = fmt.Errorf("job: the host %s was not released: %w", h.Name, err)
			r.log("%v\n", res.ReleaseErr)
			if r.Logger != nil {
				r.Logger.LogAttrs(ctx, slog.LevelError, "host not released", slog.String("host", h.Name), slog.String("error", err.Error()))
			}
		}
	}()
	r.event(Event{Kind: Started})
	maps.Copy(r.vars, map[string]string{"name": h.Name, "host": cmp.Or(h.Address, h.Name)})
	if r.vars["os"] == "" {
		r.vars["os"] = h.OS
	}
	if r.host, err = r.Dial(ctx, h); err != nil {
		return fmt.Errorf("job: connecting to the host %s: %w", h.Name, err)
	}
	defer r.host.Close()
	r.log("The host is %s\n", h.Name)

	if err := r.enter(ctx); err != nil {
		return fmt.Errorf("job: the workspace on %s: %w", h.Name, err)
	}
	defer r.leave(ctx)
	env := r.job.Environment
	if len(env.Packages)+len(env.Repositories) > 0 {
		r.log("Preparing the host\n")
		if err := r.prepare(ctx, provisioner.Host{Name: h.Name, OS: cmp.Or(h.OS, spec.OS)}); err != nil {
			return fmt.Errorf("job: preparing the host %s: %w", h.Name, err)
		}
	}
	if len(r.job.Sources) > 0 {
		r.log("Checking out the sources\n")
		if err := r.checkout(ctx); err != nil {
			return fmt.Errorf("job: %w", err)
		}
	}
	return r.sequence(ctx, res)
}

// prepare has the host prepared.
func (r *run) prepare(ctx context.Context, h provisioner.Host) error {
	p := r.Provisioner
	if r.NewProvisioner != nil {
		out := r.logs.Stream()
		defer out.Close()
		p = r.NewProvisioner(out)
	}
	if p == nil {
		return errors.New("the job has packages or repositories, and Runner.Provisioner is not set")
	}
	return p.Prepare(ctx, r.host, h, r.job.Environment)
}

// sequence runs the stages.
func (r *run) sequence(ctx context.Context, res *Result) error {
	var failed []*StageError
	// The parser has refused circles; this bounds what somebody else has made.
	for at, n := 0, 0; at >= 0 && n <= len(r.job.Sequence); n++ {
		e := r.job.Sequence[at]
		r.log("%s\n", strings.Repeat("-", 79))
		begin := time.Now()
		r.event(Event{Kind: StageRuns, Stage: e.Stage.Name, Steps: len(e.Stage.Steps)})
		skipped, err := r.stage(ctx, e)
		took := time.Since(begin)
		res.Stages = append(res.Stages, StageResult{Stage: e.Stage.Name, Skipped: skipped, Err: errOf(err), Duration: took})
		r.event(Event{Kind: StageRuns, Stage: e.Stage.Name, Steps: len(e.Stage.Steps), Done: true, Skipped: skipped, Err: errOf(err), Duration: took})
		if err != nil {
			r.log("Stage %s failed: %v\n", e.Stage.Name, err.Err)
			if ctx.Err() != nil {
				return fmt.Errorf("job: %w", err)
			}
			failed = append(failed, err)
			r.event(Event{Kind: Failing, Stage: e.Stage.Name, Err: err})
		}
		at = r.job.next(at, err == nil)
	}
	if len(failed) > 0 {
		return &FailedError{failed}
	}
	return nil
}

// errOf keeps a nil *StageError from becoming an error.
func errOf(e *StageError) error {
	if e == nil {
		return nil
	}
	return e
}

func (r *run) stage(ctx context.Context, e *Entry) (skipped bool, failed *StageError) {
	s := e.Stage
	for _, c := range []struct {
		name string
		cond *Condition
		run  bool
	}{{"only_if", e.OnlyIf, true}, {"not_if", e.NotIf, false}} {
		if c.cond == nil {
			continue
		}
		holds, err := c.cond.Holds(r.vars)
		if err != nil {
			return false, &StageError{Stage: s.Name, Err: r.hideError(err)}
		}
		if holds != c.run {
			r.log("Skipping stage %s: %s %s\n", s.Name, c.name, c.cond)
			return true, nil
		}
	}
	r.log("Running stage %s v%s\n", s.Name, s.Version)
	for i, step := range s.Steps {
		begin := time.Now()
		ev := Event{Kind: StepRuns, Stage: s.Name, Step: i + 1, Steps: len(s.Steps), Action: step.Action}
		r.event(ev)
		err := step.act.run(ctx, r)
		if err == nil {
			err = context.Cause(ctx)
		}
		ev.Done, ev.Err, ev.Duration = true, err, time.Since(begin)
		r.event(ev)
		if err != nil {
			return false, &StageError{Stage: s.Name, Step: i + 1, Action: step.Action, Err: r.hideError(err)}
		}
	}
	if e.FailIf != nil {
		holds, err := e.FailIf.Holds(r.vars)
		if err == nil && holds {
			err = fmt.Errorf("fail_if %s", e.FailIf)
		}
		if err != nil {
			return false, &StageError{Stage: s.Name, Err: r.hideError(err)}
		}
	}
	return false, nil
}

// log writes a line of the runner's own.
func (r *run) log(format string, args ...any) { fmt.Fprintf(r.own, format, args...) }

// hide takes secrets out of an error's text.
func (r *run) hide(s string) string {
	var b buffer
	m := newMasker(&b, r.hiding)
	_, _ = m.Write([]byte(s))
	_ = m.Close()
	return string(b)
}

func (r *run) warnUnknown(texts ...string) {
	missing := map[string]bool{}
	for _, t := range texts {
		for _, name := range unknown(t, r.vars) {
			missing[name] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(missing)) {
		r.log("There is no variable %q: nothing is put in its place\n", name)
	}
}
