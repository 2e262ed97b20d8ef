// Package job runs jobs that are written as those of Cyclid, a CI system: a file in YAML or JSON that names an environment, sources,
// stages of steps, and the sequence of the stages.
//
// [Parse] reads the file and finds its mistakes; a [Runner] gets a host from a builder, connects a transport, has a provisioner prepare
// it, checks the sources out and runs the sequence. The three know nothing of each other.
package job

import (
	"github.com/lxdtransport/transport/provisioner"
)

// Job is a job file that was read by [Parse] and found to be right. It is not modified by running it.
type Job struct {
	Name        string
	Version     string // "1.0.0" if the file has none
	Environment provisioner.Environment
	Sources     []Source
	Secrets     map[string]string // as in the file: see Runner.Secrets
	Stages      []*Stage          // in the order of the file
	Sequence    []*Entry          // handlers that the file's sequence does not list are at its end

	listed  int // the entries of Sequence that the file lists
	secrets map[string]position
}

// Source is what is checked out before the first stage. The strings may contain context variables.
type Source struct {
	Type   string // "git"
	URL    string
	Branch string // a branch or tag; "": the remote's default
	Token  string // never in the command line or the environment
}

// Stage is a list of steps, which run until one fails.
type Stage struct {
	Name    string
	Version string // "1.0.0" if the file has none
	Steps   []*Step

	pos position
}

// Step is one action. It is made by [Parse] only.
type Step struct {
	Action string // "command", "script" …
	Line   int    // of the file

	act action
}

// Entry says which stage runs, on what conditions, and what follows.
type Entry struct {
	Stage     *Stage
	OnSuccess string // "": the next entry of the sequence
	OnFailure string // "": the job ends

	OnlyIf *Condition // nil: the stage runs; otherwise only if it holds
	NotIf  *Condition // nil: the stage runs; otherwise only if it does not hold
	FailIf *Condition // nil: the steps decide; otherwise a stage whose steps succeeded fails if it holds

	pos, successPos, failurePos position
}

// next is the index of the entry that follows the one at i, or -1.
func (j *Job) next(i int, success bool) int {
	e := j.Sequence[i]
	name := e.OnFailure
	if success {
		name = e.OnSuccess
		if name == "" && i+1 < j.listed {
			return i + 1
		}
	}
	return j.index(name)
}

func (j *Job) index(name string) int {
	for i, e := range j.Sequence {
		if e.Stage.Name == name {
			return i
		}
	}
	return -1
}

func (j *Job) stage(name string) *Stage {
	for _, s := range j.Stages {
		if s.Name == name {
			return s
		}
	}
	return nil
}
