package job_test

import (
	"context"
	"fmt"
	"os"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/builder"
	"github.com/lxdtransport/transport/job"
	"github.com/lxdtransport/transport/local"
)

// thisMachine is a builder whose only host is the machine that it runs on.
type thisMachine struct{}

func (thisMachine) Get(context.Context, builder.Spec) (*builder.Host, error) {
	return &builder.Host{Name: "here"}, nil
}
func (thisMachine) Release(context.Context, *builder.Host) error { return nil }

// A job on this machine. For one on LXD the builder is that of builder/lxd, Dial is transport.NewLXD, and NewProvisioner is
// provisioner.New: see cmd/lxdjob.
func Example() {
	j, err := job.Parse([]byte(`
name: greeting
stages:
- name: greet
  steps:
  - action: command
    cmd: echo "$GREETING"
    env: {GREETING: 'hello from %{job_name}'}
sequence:
- stage: greet
`), nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	r := job.Runner{
		Builder: thisMachine{},
		Dial: func(context.Context, *builder.Host) (transport.Transport, error) {
			return local.New("/", nil)
		},
		Log: os.Stdout,
	}
	res, err := r.Run(context.Background(), j)
	fmt.Println(res.Succeeded, err)
	// Output:
	// Obtaining a build host
	// The host is here
	// -------------------------------------------------------------------------------
	// Running stage greet v1.0.0
	// $ echo "$GREETING"
	// hello from greeting
	// ===============================================================================
	// Job greeting succeeded
	// true <nil>
}
