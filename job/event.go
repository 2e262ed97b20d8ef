package job

import (
	"log/slog"
	"time"
)

// Kind is what an [Event] tells of.
type Kind string

// The kinds of events, in the order in which they come. Waiting, Started, Failing, Succeeded and Failed are the states of a job in Cyclid.
const (
	Waiting   Kind = "waiting"   // for a host
	Started   Kind = "started"   // there is a host, which is now prepared
	StageRuns Kind = "stage"     // a stage begins, and again, with Done, ends
	StepRuns  Kind = "step"      // a step begins, and again, with Done, ends
	Failing   Kind = "failing"   // a stage has failed; its handler runs, if there is one
	Succeeded Kind = "succeeded" // the job's end
	Failed    Kind = "failed"    // the job's end
)

// Event is a change of a job's state.
type Event struct {
	Kind Kind      `json:"event"`
	Time time.Time `json:"time"`
	Job  string    `json:"job"` // Job.Name
	ID   string    `json:"id"`  // Runner.ID
	Host string    `json:"host,omitempty"`

	// Stage and Step are what the event is about. Step counts from 1, and Steps is how many the stage has.
	Stage  string `json:"stage,omitempty"`
	Step   int    `json:"step,omitempty"`
	Steps  int    `json:"steps,omitempty"`
	Action string `json:"action,omitempty"` // of the step

	// Done says that the stage or step has ended. Skipped: it did not run, because of its only_if or not_if.
	Done    bool `json:"done,omitempty"`
	Skipped bool `json:"skipped,omitempty"`

	// Err is why what is Done, Failing or Failed did not succeed. It contains no secret.
	Err error `json:"-"`
	// Error is Err's text.
	Error string `json:"error,omitempty"`
	// Duration is how long what is Done, Succeeded or Failed took.
	Duration time.Duration `json:"duration_ns,omitempty"`
}

func (r *run) event(e Event) {
	e.Time, e.Job, e.ID = time.Now(), r.job.Name, r.id
	if r.at != nil {
		e.Host = r.at.Name
	}
	if e.Err != nil {
		e.Err = r.hideError(e.Err)
		e.Error = e.Err.Error()
	}
	if r.Events != nil {
		r.Events(e)
	}
	if r.Logger == nil {
		return
	}
	level := slog.LevelInfo
	attrs := []slog.Attr{slog.String("job", e.Job), slog.String("id", e.ID)}
	add := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	add("host", e.Host)
	add("stage", e.Stage)
	if e.Step > 0 {
		attrs = append(attrs, slog.Int("step", e.Step))
	}
	add("action", e.Action)
	if e.Done {
		attrs = append(attrs, slog.Bool("done", true))
	}
	if e.Skipped {
		attrs = append(attrs, slog.Bool("skipped", true))
	}
	if e.Error != "" {
		level = slog.LevelWarn
		add("error", e.Error)
	}
	if e.Duration > 0 {
		attrs = append(attrs, slog.Duration("duration", e.Duration))
	}
	r.Logger.LogAttrs(r.ctx, level, string(e.Kind), attrs...)
}

// hidden is an error whose text is without secrets.
type hidden struct {
	text string
	err  error
}

// hideError takes secrets out of an error's text.
func (r *run) hideError(err error) error { return hidden{r.hide(err.Error()), err} }

func (h hidden) Error() string { return h.text }
func (h hidden) Unwrap() error { return h.err }
