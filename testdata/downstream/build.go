// Package downstream is an orchestrator, as small as one can be: it builds on whatever transport it is given.
package downstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/lxdtransport/transport"
)

// Outcome is what became of a build.
type Outcome string

const (
	Passed Outcome = "passed"
	Failed Outcome = "failed" // the build's own fault
	Retry  Outcome = "retry"  // nothing has run
	Broken Outcome = "broken" // nobody knows: the log is not whole, or the status is missing
)

// Build sends a source, runs a script beside it and returns what it says and the file that it makes.
func Build(ctx context.Context, host transport.Transport, source io.Reader, script string) (o Outcome, log, artifact string, err error) {
	if err := host.Upload(ctx, "/src/in", source, &transport.UploadOptions{MkdirAll: true}); err != nil {
		return Retry, "", "", err
	}
	var out bytes.Buffer
	err = host.Exec(ctx, transport.Command{Args: transport.Shell(script), Dir: "/src", Stdout: &out, Stderr: &out})
	if o := judge(err); o != Passed {
		return o, out.String(), "", err
	}
	var file bytes.Buffer
	if err := host.Download(ctx, "/src/out", &file, &transport.DownloadOptions{Limit: 1 << 20}); err != nil {
		return Failed, out.String(), "", fmt.Errorf("no artifact: %w", err)
	}
	return Passed, out.String(), file.String(), nil
}

func judge(err error) Outcome {
	code, exited := transport.ExitCode(err)
	switch {
	case errors.Is(err, transport.ErrOutputLost):
		return Broken
	case exited && code == 0:
		return Passed
	case exited:
		return Failed
	case errors.Is(err, transport.ErrNotStarted):
		return Retry
	}
	return Broken
}
