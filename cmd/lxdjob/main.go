// Lxdjob runs a job file in a fresh LXD instance:
//
//	go run ./cmd/lxdjob [flags] JOBFILE
//
// It gets a host, prepares it, checks the sources out, runs the stages, shows the log, brings the artifacts back, and releases the host,
// whatever happens. docs/jobs.md says what a job file may have. On a terminal it shows what runs beneath the log.
//
// It uses the LXD server of this machine, or the one of -remote. Where there is none it says so and runs the job's commands on this
// machine, behind the fake server of package lxdtest: for trying a job out, not for one that is not trusted.
//
// The exit status is the verdict:
//
//	0        the job succeeded
//	1        the job failed: a stage did
//	2        the command line or the job file is wrong; nothing was run
//	3        there is no verdict: no host, or it could not be prepared, or the sources could not be had
//	128 + n  signal n ended it; the host was released
package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/lxdtransport/transport/builder"
	"github.com/lxdtransport/transport/job"
)

// The exit statuses besides that of success.
const (
	exitFailed    = 1
	exitUsage     = 2
	exitNoVerdict = 3
)

// settings are what the command line says.
type settings struct {
	file, remote, project, image, os, kind, dir, artifacts, key string
	keep, json, times, reap                                     bool
	timeout                                                     time.Duration
	profiles                                                    []string
	secrets                                                     map[string]string
	context                                                     map[string]string
}

func main() {
	ctx, cancel := context.WithCancelCause(context.Background())
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, endSignals...)
	ignorePipe()
	go func() {
		for s := range caught {
			fmt.Fprintf(os.Stderr, "lxdjob: %v: stopping, and releasing the host\n", s)
			cancel(ended{s})
		}
	}()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// ended is the cause of a context that a signal has ended.
type ended struct{ signal os.Signal }

func (e ended) Error() string { return "signal: " + e.signal.String() }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	s, err := parseFlags(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "lxdjob:", err)
		return exitUsage
	}
	code, err := s.run(ctx, stdout, stderr)
	if err != nil {
		fmt.Fprintln(stderr, "lxdjob:", err)
	}
	if e, ok := errors.AsType[ended](context.Cause(ctx)); ok && err != nil {
		if n, ok := e.signal.(syscall.Signal); ok {
			return 128 + int(n)
		}
	}
	return code
}

func parseFlags(args []string, stderr io.Writer) (*settings, error) {
	s := &settings{secrets: map[string]string{}, context: map[string]string{}}
	f := flag.NewFlagSet("lxdjob", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&s.remote, "remote", "", "LXD `server`: a remote of the lxc or incus client, unix:///path or https://host:port; none: this machine's")
	f.StringVar(&s.project, "project", "", "LXD project; none: the remote's")
	f.StringVar(&s.image, "image", "", "`alias` or fingerprint of the image; none: the one for the job's os")
	f.Func("profile", "`name` of a profile that the host has; may be repeated; none: default", func(name string) error {
		s.profiles = append(s.profiles, name)
		return nil
	})
	f.StringVar(&s.os, "os", "debian_12", "operating system of a job that names none")
	f.StringVar(&s.kind, "type", "container", "container or virtual-machine")
	f.StringVar(&s.dir, "dir", ".", "`directory` that the action upload copies from")
	f.StringVar(&s.artifacts, "artifacts", "artifacts", "`directory` that the action artifact copies to; it is created when it is needed")
	f.StringVar(&s.key, "secret-key", "", "`file` with the RSA key, in PEM, that the job's secrets are encrypted for; none: they are in the clear")
	f.Func("secret", "the secret `name` is the value of the environment variable of this name; may be repeated", func(name string) error {
		value, ok := os.LookupEnv(name)
		if !ok {
			return errors.New("there is no such environment variable")
		}
		s.secrets[name] = value
		return nil
	})
	f.Func("context", "`name=value` for the job's context; may be repeated", func(pair string) error {
		name, value, ok := strings.Cut(pair, "=")
		if !ok || name == "" {
			return errors.New("it has to be name=value")
		}
		s.context[name] = value
		return nil
	})
	f.BoolVar(&s.keep, "keep", false, "keep the host")
	f.BoolVar(&s.json, "json", false, "write events and log lines as JSON, one to a line")
	f.BoolVar(&s.times, "timestamps", false, "put the time in front of log lines")
	f.BoolVar(&s.reap, "reap", false, "remove what killed runs have left, and run no job")
	f.DurationVar(&s.timeout, "timeout", 0, "end the job after this time; 0: never")
	f.Usage = func() {
		fmt.Fprintln(stderr, "usage: lxdjob [flags] JOBFILE")
		f.PrintDefaults()
	}
	var files []string
	for {
		if err := f.Parse(args); err != nil {
			return nil, err
		}
		if f.NArg() == 0 {
			break
		}
		files, args = append(files, f.Arg(0)), f.Args()[1:]
	}
	switch {
	case s.reap && len(files) > 0:
		return nil, errors.New("-reap takes no job file")
	case !s.reap && len(files) != 1:
		f.Usage()
		return nil, errors.New("one job file is needed")
	case s.timeout < 0:
		return nil, errors.New("-timeout is negative")
	case !s.reap:
		s.file = files[0]
	}
	return s, nil
}

func (s *settings) run(ctx context.Context, stdout, stderr io.Writer) (int, error) {
	if s.reap {
		return s.removeLeft(ctx, stdout)
	}
	data, err := os.ReadFile(s.file)
	if err != nil {
		return exitUsage, err
	}
	j, err := job.Parse(data, &job.ParseOptions{File: s.file})
	if err != nil {
		return exitUsage, err
	}
	secret, err := s.secret()
	if err != nil {
		return exitUsage, err
	}
	for name, value := range s.secrets {
		j.Secrets[name] = value
	}
	dir, err := os.OpenRoot(s.dir)
	if err != nil {
		return exitUsage, err
	}
	defer dir.Close()
	artifacts, done, err := s.openArtifacts(j)
	if err != nil {
		return exitUsage, err
	}
	defer done()

	if s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("it took longer than %v", s.timeout))
		defer cancel()
	}
	p, err := s.find(ctx, stderr)
	if err != nil {
		return exitNoVerdict, err
	}
	defer p.close()
	screen := newScreen(stdout, j, s.json)
	defer screen.close()
	id := strings.ToLower(rand.Text()[:12])
	r := job.Runner{
		ID:             id,
		Builder:        p.builder,
		Dial:           p.dial,
		NewProvisioner: p.provisioner,
		Spec:           builder.Spec{OS: s.os, Image: s.image, Type: s.kind, Labels: map[string]string{"job": label(j.Name), "run": id}},
		Log:            screen,
		LogOptions:     job.LogOptions{Timestamps: s.times},
		Events:         screen.event,
		Secret:         secret,
		Context:        s.context,
		Files:          dir.FS(),
		Artifacts:      artifacts,
		Keep:           s.keep,
	}
	res, err := r.Run(ctx, j)
	screen.close()
	if res.ReleaseErr != nil {
		fmt.Fprintln(stderr, "lxdjob:", res.ReleaseErr)
	}
	if s.keep && res.Host != nil {
		fmt.Fprintf(stderr, "lxdjob: the host %s is kept\n", res.Host.Name)
	}
	var failed *job.FailedError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &failed) && ctx.Err() == nil:
		return exitFailed, err
	}
	return exitNoVerdict, err
}

// secret is how the job's secrets are read.
func (s *settings) secret() (func(name, value string) (string, error), error) {
	clear := func(_, value string) (string, error) { return value, nil }
	decrypt := clear
	if s.key != "" {
		data, err := os.ReadFile(s.key)
		if err != nil {
			return nil, err
		}
		key, err := rsaKey(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.key, err)
		}
		decrypt = job.RSASecrets(key)
	}
	return func(name, value string) (string, error) {
		if given, ok := s.secrets[name]; ok {
			return given, nil
		}
		return decrypt(name, value)
	}, nil
}

func rsaKey(data []byte) (*rsa.PrivateKey, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("it is not PEM")
	}
	if key, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return key, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("it is no private key")
	}
	if key, ok := key.(*rsa.PrivateKey); ok {
		return key, nil
	}
	return nil, errors.New("it is no RSA key")
}

// openArtifacts opens the directory for artifacts, if the job has any.
func (s *settings) openArtifacts(j *job.Job) (*os.Root, func(), error) {
	for _, stage := range j.Stages {
		for _, step := range stage.Steps {
			if step.Action != "artifact" {
				continue
			}
			if err := os.MkdirAll(s.artifacts, 0o755); err != nil {
				return nil, nil, err
			}
			root, err := os.OpenRoot(s.artifacts)
			if err != nil {
				return nil, nil, err
			}
			return root, func() { root.Close() }, nil
		}
	}
	return nil, func() {}, nil
}

// removeLeft removes the hosts of runs that were killed.
func (s *settings) removeLeft(ctx context.Context, stdout io.Writer) (int, error) {
	p, err := s.connect(ctx)
	if err != nil {
		return exitNoVerdict, err
	}
	defer p.close()
	removed, err := p.builder.Reap(ctx)
	for _, h := range removed {
		fmt.Fprintln(stdout, h.Name)
	}
	if err != nil {
		return exitNoVerdict, err
	}
	return 0, nil
}

// label is a text as a label may have it.
func label(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	return s[:min(len(s), 200)]
}
