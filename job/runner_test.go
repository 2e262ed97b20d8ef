package job

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/builder"
	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/internal/sshd"
	"github.com/lxdtransport/transport/local"
	"github.com/lxdtransport/transport/lxdtest"
	"github.com/lxdtransport/transport/provisioner"
	"github.com/lxdtransport/transport/ssh"
)

// hosts is a Builder that hands out one host and counts.
type hosts struct {
	mu            sync.Mutex // guards the rest
	got, released int
	spec          builder.Spec
	get, release  error
}

func (h *hosts) Get(_ context.Context, spec builder.Spec) (*builder.Host, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.get != nil {
		return nil, h.get
	}
	h.got++
	h.spec = spec
	return &builder.Host{Name: "h1", OS: spec.OS, Address: "192.0.2.1"}, nil
}

func (h *hosts) Release(ctx context.Context, _ *builder.Host) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.released++
	return errors.Join(ctx.Err(), h.release)
}

type dial func(context.Context, *builder.Host) (transport.Transport, error)

func localDial(t testing.TB, dir string) dial {
	return func(context.Context, *builder.Host) (transport.Transport, error) { return local.New(dir, nil) }
}

// places are where the same jobs have to run in the same way.
func places(t *testing.T) map[string]func(t *testing.T) dial {
	return map[string]func(t *testing.T) dial{
		"local":              func(t *testing.T) dial { return localDial(t, "/") },
		"local in a folder":  func(t *testing.T) dial { return localDial(t, t.TempDir()) },
		"fake LXD":           fakeDial,
		"SSH":                sshDial,
		"real LXD, unix":     func(t *testing.T) dial { return realDial(t, reallxd.Unix) },
		"real LXD, over TLS": func(t *testing.T) dial { return realDial(t, reallxd.HTTPS) },
	}
}

func fakeDial(t *testing.T) dial {
	s := lxdtest.NewUnstartedServer()
	s.Handler = lxdtest.LocalCommands("")
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	s.Start()
	t.Cleanup(s.Close)
	server, err := lxd.ConnectLXDUnix(s.Socket, nil)
	require.NoError(t, err)
	t.Cleanup(server.Disconnect)
	return func(context.Context, *builder.Host) (transport.Transport, error) {
		return transport.NewLXD(server, "c1", nil)
	}
}

func sshDial(t *testing.T) dial {
	s := sshd.Start(t)
	return func(ctx context.Context, _ *builder.Host) (transport.Transport, error) {
		return ssh.Dial(ctx, s.Address, &ssh.Options{KeyFiles: []string{s.File("client")}, KnownHosts: []string{s.File("known")}})
	}
}

func realDial(t *testing.T, connect func(testing.TB) lxd.InstanceServer) dial {
	name := reallxd.Instance(t)
	server := connect(t)
	t.Cleanup(server.Disconnect)
	return func(context.Context, *builder.Host) (transport.Transport, error) {
		return transport.NewLXD(server, name, nil)
	}
}

// outcome is all that can be seen of a run.
type outcome struct {
	*Result
	err    error
	log    string
	events []Event
	hosts  *hosts
}

// stages is the stages that ran; a skipped one in parentheses, a failed one with an exclamation mark.
func (o outcome) stages() string {
	var all []string
	for _, s := range o.Stages {
		switch {
		case s.Skipped:
			all = append(all, "("+s.Stage+")")
		case s.Err != nil:
			all = append(all, s.Stage+"!")
		default:
			all = append(all, s.Stage)
		}
	}
	return strings.Join(all, " ")
}

func (o outcome) kinds() string {
	var all []string
	for _, e := range o.events {
		k := string(e.Kind)
		if e.Done {
			k += "."
		}
		all = append(all, k)
	}
	return strings.Join(all, " ")
}

func runJob(t testing.TB, ctx context.Context, j *Job, r Runner) outcome {
	t.Helper()
	o := outcome{hosts: &hosts{}}
	if r.Builder == nil {
		r.Builder = o.hosts
	}
	if r.Dial == nil {
		r.Dial = localDial(t, t.TempDir())
	}
	var log bytes.Buffer
	r.Log = &log
	r.Events = func(e Event) { o.events = append(o.events, e) }
	o.Result, o.err = r.Run(ctx, j)
	o.log = log.String()
	require.NotNil(t, o.Result)
	require.Equal(t, o.err == nil, o.Succeeded)
	require.Equal(t, o.hosts.got, o.hosts.released, "hosts released")
	if len(o.events) > 0 {
		last := o.events[len(o.events)-1]
		require.Equal(t, o.Succeeded, last.Kind == Succeeded)
		require.Equal(t, !o.Succeeded, last.Kind == Failed)
	}
	return o
}

// simple is a file whose stages are called by what they do: those that begin with bad fail.
func simple(sequence string) string {
	var b strings.Builder
	b.WriteString("name: x\nstages:\n")
	for _, n := range []string{"a", "b", "c", "bad", "bad2", "yes", "no"} {
		cmd := "true"
		if strings.HasPrefix(n, "bad") {
			cmd = "false"
		}
		fmt.Fprintf(&b, "- {name: %s, steps: [{action: command, cmd: %s}]}\n", n, cmd)
	}
	return b.String() + "sequence:\n" + sequence
}

func TestSequences(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, sequence, want string
		succeeds             bool
	}{
		{"in order", "- stage: a\n- stage: b\n- stage: c", "a b c", true},
		{"a failure without a handler ends the job", "- stage: a\n- stage: bad\n- stage: c", "a bad!", false},
		{"handlers that the sequence does not list", "- {stage: a, on_failure: no}\n- {stage: b, on_success: yes, on_failure: no}", "a b yes", true},
		{"a failure handler", "- {stage: bad, on_failure: no}\n- {stage: b, on_success: yes, on_failure: no}", "bad! no", false},
		{"nothing follows a handler", "- {stage: a, on_success: yes}\n- {stage: bad, on_failure: no}", "a yes", true},
		{"on_success jumps over", "- {stage: a, on_success: c}\n- stage: bad\n- stage: c", "a c", true},
		{"a handler that is listed goes on from there", "- {stage: bad, on_failure: b}\n- stage: a\n- stage: b\n- stage: c", "bad! b c", false},
		{"a handler that fails", "- {stage: bad, on_failure: bad2}", "bad! bad2!", false},
		{"a failure that is handled and then succeeds is still one", "- {stage: bad, on_failure: a}\n- stage: a\n- {stage: b, on_success: yes}", "bad! a b yes", false},
		{"only_if", "- {stage: bad, only_if: 1 > 2}\n- {stage: a, only_if: 2 > 1}", "(bad) a", true},
		{"not_if", "- {stage: bad, not_if: 2 > 1}\n- {stage: a, not_if: 1 > 2}", "(bad) a", true},
		{"both", "- {stage: bad, only_if: 2 > 1, not_if: 2 > 1}\n- {stage: a, only_if: 2 > 1, not_if: 1 > 2}", "(bad) a", true},
		{"a skipped stage has succeeded", "- {stage: bad, only_if: 1 > 2, on_success: yes, on_failure: no}\n- stage: b", "(bad) yes", true},
		{"fail_if", "- {stage: a, fail_if: 2 > 1, on_failure: no}\n- stage: b", "a! no", false},
		{"fail_if does not hold", "- {stage: a, fail_if: 1 > 2, on_failure: no}\n- stage: b", "a b", true},
		{"fail_if of a skipped stage", "- {stage: a, only_if: 1 > 2, fail_if: 2 > 1}\n- stage: b", "(a) b", true},
		{"context", "- {stage: a, only_if: \"'%{job_name}' == 'X'\"}\n- {stage: b, only_if: \"'%{job_name}' === 'X'\"}", "a (b)", true},
		{"a condition that cannot be evaluated", "- {stage: a, only_if: '%{job_name} > 1', on_failure: no}\n- stage: b", "a! no", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			o := runJob(t, t.Context(), parse(t, simple(row.sequence)), Runner{})
			require.Equal(t, row.want, o.stages(), o.log)
			require.Equal(t, row.succeeds, o.Succeeded, "%v", o.err)
			var failed *FailedError
			require.Equal(t, !row.succeeds, errors.As(o.err, &failed))
			require.Equal(t, 1, o.hosts.released)
		})
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	o := runJob(t, t.Context(), parse(t, simple("- stage: a\n- {stage: bad, on_failure: no}")), Runner{ID: "42", Logger: slog.New(slog.NewJSONHandler(&out, nil))})
	require.Equal(t, "waiting started stage step step. stage. stage step step. stage. failing stage step step. stage. failed", o.kinds())
	for _, e := range o.events {
		require.Equal(t, "x", e.Job)
		require.Equal(t, "42", e.ID)
		require.False(t, e.Time.IsZero())
		if e.Kind == StepRuns {
			require.Equal(t, []any{1, 1, "command"}, []any{e.Step, e.Steps, e.Action})
		}
	}
	require.Equal(t, "bad", o.events[10].Stage)
	code, exited := transport.ExitCode(o.events[10].Err)
	require.Equal(t, []any{1, true}, []any{code, exited})
	require.Equal(t, len(o.events), strings.Count(out.String(), "\n"))
	require.Contains(t, out.String(), `"level":"WARN","msg":"failing","job":"x","id":"42","host":"h1","stage":"bad"`)
	code, exited = transport.ExitCode(o.err)
	require.Equal(t, []any{1, true}, []any{code, exited})
	require.ErrorContains(t, o.err, "stage bad, step 1 (command): ")
}

// TestTheSameJobEverywhere runs one file over every kind of host.
func TestTheSameJobEverywhere(t *testing.T) {
	t.Parallel()
	j := parseFile(t, "everything.yml")
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dial := place(t)
			dir := t.TempDir()
			artifacts, err := os.OpenRoot(dir)
			require.NoError(t, err)
			defer artifacts.Close()
			o := runJob(t, t.Context(), j, Runner{
				Dial: dial, Artifacts: artifacts, ID: "7", Context: map[string]string{"organization": "admins", "hostile": `"; touch /tmp/broken; $(id) '`},
				Files: fstest.MapFS{
					"project/main.txt":      {Data: []byte("main"), Mode: 0o644},
					"project/sub/data.txt":  {Data: []byte("data"), Mode: 0o600},
					"project/.git/config":   {Data: []byte("x"), Mode: 0o600},
					"project/sub/skip.o":    {Data: []byte("x"), Mode: 0o600},
					"reports/cobertura.xml": {Data: []byte(`<?xml version="1.0" encoding="ISO-8859-1"?><!DOCTYPE coverage SYSTEM "http://x"><coverage line-rate="0.9" branch-rate="0.75001"/>`)},
					"reports/coverage.json": {Data: []byte(`{"metrics": {"covered_percent": 86.9795918367347}}`)},
				},
			})
			require.NoError(t, o.err, o.log)
			require.Equal(t, "command script files coverage (skipped) done", o.stages(), o.log)
			for _, want := range []string{
				"$ %{workspace} : pwd\n" + o.Context["workspace"] + "\n",
				"words with spaces|\n",
				"hostile: \"; touch /tmp/broken; $(id) '\n",
				"in a line: <\"; touch /tmp/broken; $(id) '>\n",
				"substituted\n",
				"GREETING is hello admins, two\n",
				"to stderr\n",
				"script of 7 in sub\n",
				"no interpreter needed: 1\n",
				"awk says hello\n",
				"data in sub/data.txt\n",
				"Cobertura coverage line rate is 90%, branch rate is 75%\n",
				"SimpleCov coverage is 86.98%\n",
				"coverage 90% 75% 86.98%\n",
				`There is no variable "nowhere": nothing is put in its place` + "\nnowhere is <>\n",
				"Skipping stage skipped: only_if %{cobertura_line_rate} < 85%\n",
			} {
				require.Contains(t, o.log, want)
			}
			require.NotContains(t, o.log, "\x1b")
			got := map[string]string{}
			require.NoError(t, fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
				if err == nil && !d.IsDir() {
					data, err := os.ReadFile(filepath.Join(dir, name))
					got[name] = string(data)
					return err
				}
				return err
			}))
			require.Equal(t, map[string]string{"out/main.txt": "mainresult", "tree/project/main.txt": "mainresult", "tree/project/sub/data.txt": "data"}, got)
			require.NotContains(t, o.Context["workspace"], "%{")
		})
	}
}

func TestTheWorkspaceIsRemoved(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := parse(t, "name: x\nstages: [{name: a, steps: [{action: script, script: 'echo x >file; exit 3'}]}]\nsequence: [stage: a]")
	o := runJob(t, t.Context(), j, Runner{Dial: localDial(t, dir)})
	require.Error(t, o.err)
	left, err := os.ReadDir(filepath.Join(dir, "tmp"))
	require.NoError(t, err)
	require.Empty(t, left)
	o = runJob(t, t.Context(), j, Runner{Dial: localDial(t, dir), Workspace: "/home/build"})
	require.Error(t, o.err)
	left, err = os.ReadDir(filepath.Join(dir, "home/build"))
	require.NoError(t, err)
	require.Len(t, left, 1, "the file, but no script")
}

func TestFailures(t *testing.T) {
	t.Parallel()
	step := func(s string) string {
		return "name: x\nstages: [{name: a, steps: [{" + s + "}]}]\nsequence: [{stage: a}]"
	}
	for _, row := range []struct {
		name, file, want string
		code             int
	}{
		{"status", step("action: command, cmd: sh, args: [-c, exit 7]"), "stage a, step 1 (command): ", 7},
		{"status of a line", step("action: command, cmd: 'true && exit 8'"), "stage a, step 1 (command): ", 8},
		{"status of a script", step("action: script, script: exit 9"), "stage a, step 1 (script): ", 9},
		{"no such command", step("action: command, cmd: no-such-command"), "stage a, step 1 (command): ", 127},
		{"no such interpreter", step(`action: script, script: "#!/no/such/shell\nx"`), "stage a, step 1 (script): ", 127},
		{"no such path", step("action: command, cmd: 'true', path: no/such"), "no/such", -1},
		{"empty command", step("action: command, cmd: '%{none}'"), "the command is empty", -1},
		{"no report", step("action: cobertura, path: none.xml"), "none.xml", -1},
		{"no simplecov report", step("action: simplecov, path: none.json"), "none.json", -1},
		{"no files", step("action: upload, from: a, path: b"), "Runner.Files is not set", -1},
		{"no artifacts", step("action: artifact, path: b"), "Runner.Artifacts is not set", -1},
		{"packages without a provisioner", "environment: {packages: [gcc]}\n" + step("action: log, message: x"), "Runner.Provisioner is not set", -1},
		{"source", "sources: [{type: git, url: 'file:///no/such/repository'}]\n" + step("action: log, message: x"), "source file:///no/such/repository: git clone: ", 128},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			o := runJob(t, t.Context(), parse(t, row.file), Runner{})
			require.ErrorContains(t, o.err, row.want)
			code, exited := transport.ExitCode(o.err)
			require.Equal(t, row.code, code, o.err)
			require.Equal(t, row.code >= 0, exited)
			require.Contains(t, o.log, "Job x failed: ")
			require.Equal(t, 1, o.hosts.released)
		})
	}
}

func TestPathsStayInside(t *testing.T) {
	t.Parallel()
	artifacts, err := os.OpenRoot(t.TempDir())
	require.NoError(t, err)
	defer artifacts.Close()
	for _, step := range []string{
		"action: upload, from: ../x, path: y", "action: upload, from: /etc/passwd, path: y", "action: upload, from: '%{up}/x', path: y",
		"action: artifact, path: y, to: ../x", "action: artifact, path: y, to: /etc/x", "action: artifact, path: y, to: '%{up}/x'",
	} {
		o := runJob(t, t.Context(), parse(t, "name: x\nstages: [{name: a, steps: [{"+step+"}]}]\nsequence: [{stage: a}]"),
			Runner{Files: fstest.MapFS{"x": {}}, Artifacts: artifacts, Context: map[string]string{"up": ".."}})
		require.ErrorContains(t, o.err, "is not a path inside of the directory", step)
	}
}

func TestReports(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ report, line, branch, err string }{
		{`<coverage line-rate="0.9" branch-rate="0.75">`, "90%", "75%", ""},
		{`<coverage line-rate="0.123456" branch-rate="1"/>`, "12.35%", "100%", ""},
		{`<a><b/><coverage branch-rate="0" line-rate="0"/></a>`, "0%", "0%", ""},
		{`<coverage line-rate="0.9"/>`, "", "", "no line-rate or no branch-rate"},
		{`<coverage line-rate="NaN" branch-rate="1"/>`, "", "", "no rate"},
		{`<coverage line-rate="x" branch-rate="1"/>`, "", "", `line-rate is "x", no number`},
		{`{"not": "xml"}`, "", "", "no <coverage> element"},
	} {
		line, branch, err := cobertura([]byte(row.report))
		if row.err != "" {
			require.ErrorContains(t, err, row.err)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, []string{row.line, row.branch}, []string{line, branch})
	}
}

func TestNoHost(t *testing.T) {
	t.Parallel()
	full := errors.New("the pool is full")
	j := parse(t, simple("- stage: a"))
	o := runJob(t, t.Context(), j, Runner{Builder: &hosts{get: full}})
	require.ErrorIs(t, o.err, full)
	require.Nil(t, o.Host)
	require.Equal(t, "waiting failed", o.kinds())

	o = runJob(t, t.Context(), j, Runner{Dial: func(context.Context, *builder.Host) (transport.Transport, error) { return nil, full }})
	require.ErrorIs(t, o.err, full)
	require.Equal(t, "waiting started failed", o.kinds())
	require.Equal(t, 1, o.hosts.released)
}

func TestReleaseDoesNotDecide(t *testing.T) {
	t.Parallel()
	stuck := errors.New("stuck")
	o := runJob(t, t.Context(), parse(t, simple("- stage: a")), Runner{Builder: &hosts{release: stuck}})
	require.NoError(t, o.err)
	require.ErrorIs(t, o.ReleaseErr, stuck)
	require.Contains(t, o.log, "the host h1 was not released: stuck")
}

func TestKeep(t *testing.T) {
	t.Parallel()
	h := &hosts{}
	o := runJob(t, t.Context(), parse(t, simple("- stage: a")), Runner{Builder: h, Keep: true})
	require.NoError(t, o.err)
	require.Zero(t, h.released)
	require.Equal(t, "h1", o.Host.Name)
}

type prepared struct {
	host provisioner.Host
	env  provisioner.Environment
	err  error
}

func (p *prepared) Prepare(ctx context.Context, t transport.Transport, h provisioner.Host, env provisioner.Environment) error {
	p.host, p.env = h, env
	return errors.Join(p.err, t.Exec(ctx, transport.Command{Args: []string{"true"}}))
}

func TestPrepare(t *testing.T) {
	t.Parallel()
	j := parse(t, "environment: {os: debian_12, packages: [gcc, make]}\n"+simple("- stage: a"))
	p := &prepared{}
	labels := map[string]string{"team": "x"}
	o := runJob(t, t.Context(), j, Runner{Provisioner: p, ID: "42", Spec: builder.Spec{OS: "alpine", Image: "mine", Project: "ci", Labels: labels}})
	require.NoError(t, o.err)
	require.Equal(t, builder.Spec{OS: "debian_12", Image: "mine", Project: "ci", Labels: map[string]string{"team": "x", "run": "42"}}, o.hosts.spec)
	require.Len(t, labels, 1, "it is not modified")
	require.Equal(t, provisioner.Host{Name: "h1", OS: "debian_12"}, p.host)
	require.Equal(t, []string{"gcc", "make"}, p.env.Packages)
	require.Equal(t, "gcc make", o.Context["packages"])
	o = runJob(t, t.Context(), j, Runner{NewProvisioner: func(log io.Writer) provisioner.Provisioner {
		fmt.Fprint(log, "\x1b[1mReading package lists\x1b[0m\nDone")
		return p
	}})
	require.NoError(t, o.err)
	require.Contains(t, o.log, "Preparing the host\nReading package lists\nDone\n---")
	p.err = errors.New("the mirror is away")
	o = runJob(t, t.Context(), j, Runner{Provisioner: p})
	require.ErrorIs(t, o.err, p.err)
	require.Empty(t, o.Stages)
}

func TestCancel(t *testing.T) {
	t.Parallel()
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			j := parse(t, "name: x\nstages: [{name: a, steps: [{action: command, cmd: 'echo ready; exec sleep 1000'}]}, {name: b, steps: [{action: log, message: handled}]}]\nsequence: [{stage: a, on_failure: b}]")
			why := errors.New("not needed any more")
			dial := place(t)
			h := &hosts{}
			r := Runner{Builder: h, Dial: dial, Log: writer(func(p []byte) {
				if bytes.Contains(p, []byte("ready\n")) && !bytes.Contains(p, []byte("echo")) {
					cancel(why)
				}
			})}
			res, err := r.Run(ctx, j)
			require.ErrorIs(t, err, why)
			require.False(t, res.Succeeded)
			require.Len(t, res.Stages, 1, "no handler")
			require.NoError(t, res.ReleaseErr, "the release has its own context")
			require.Equal(t, 1, h.released)
		})
	}
}

type writer func([]byte)

func (w writer) Write(p []byte) (int, error) {
	w(p)
	return len(p), nil
}

// recorder keeps the commands that go through a transport.
type recorder struct {
	transport.Transport
	mu   sync.Mutex
	seen strings.Builder
}

func (r *recorder) Exec(ctx context.Context, cmd transport.Command) error {
	r.mu.Lock()
	fmt.Fprintln(&r.seen, cmd.Args, cmd.Env, cmd.Dir)
	r.mu.Unlock()
	return r.Transport.Exec(ctx, cmd)
}

func TestSecretsAreNowhere(t *testing.T) {
	t.Parallel()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	const secret = "s3cr\\0et%s \"'\n$x "
	//lint:ignore SA1019 what Cyclid does
	sealed, err := rsa.EncryptPKCS1v15(rand.Reader, &key.PublicKey, []byte(secret))
	require.NoError(t, err)
	j := parse(t, `
name: x
secrets: {password: "`+base64.StdEncoding.EncodeToString(sealed)+`"}
stages:
- name: a
  steps:
  - {action: command, cmd: printf, args: ['%s|', '%{password}', plain]}
  - {action: command, cmd: 'printf "%s" "%{password}" | base64'}
  - {action: command, cmd: 'printf %s "$PASSWORD" >file; cat file', env: {PASSWORD: '%{password}', OTHER: "a\nb"}}
  - {action: script, script: "cat <<'END'\n%{password}\nEND\n"}
  - {action: log, message: 'it is %{password}!'}
  - {action: artifact, path: file}
  - {action: command, cmd: '%{password}'}
sequence: [{stage: a}]
`)
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dial := place(t)
			dir := t.TempDir()
			artifacts, err := os.OpenRoot(dir)
			require.NoError(t, err)
			defer artifacts.Close()
			rec := &recorder{}
			var logged bytes.Buffer
			o := runJob(t, t.Context(), j, Runner{
				Artifacts: artifacts, Secret: RSASecrets(key), Logger: slog.New(slog.NewTextHandler(&logged, nil)),
				Dial: func(ctx context.Context, h *builder.Host) (transport.Transport, error) {
					inner, err := dial(ctx, h)
					rec.Transport = inner
					return rec, err
				},
			})
			require.ErrorContains(t, o.err, "step 7 (command)", o.log)
			got, err := os.ReadFile(filepath.Join(dir, "file"))
			require.NoError(t, err)
			require.Equal(t, secret, string(got), "it arrived as it is")
			require.Contains(t, o.log, "it is ***!\n")
			events, err := json.Marshal(o.events)
			require.NoError(t, err)
			for what, text := range map[string]string{"log": o.log, "commands": rec.seen.String(), "error": o.err.Error(), "events": string(events), "slog": logged.String(), "context": fmt.Sprint(o.Context)} {
				require.NotContains(t, text, "s3cr", what)
				require.NotContains(t, text, base64.StdEncoding.EncodeToString([]byte(secret))[:10], what)
			}
		})
	}
	wrong, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	o := runJob(t, t.Context(), j, Runner{Secret: RSASecrets(wrong)})
	require.ErrorContains(t, o.err, `the secret "password" at line 3: it cannot be decrypted`)
	require.Zero(t, o.hosts.got)
}

func git(t testing.TB, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"}, args...)...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}

func repository(t testing.TB) string {
	dir := filepath.Join(t.TempDir(), "project.git")
	require.NoError(t, os.Mkdir(dir, 0o755))
	git(t, dir, "init", "--quiet")
	for _, branch := range []string{"main", "next"} {
		git(t, dir, "checkout", "--quiet", "-B", branch)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), []byte(branch), 0o600))
		git(t, dir, "add", "file")
		git(t, dir, "commit", "--quiet", "-m", branch)
	}
	git(t, dir, "checkout", "--quiet", "main")
	git(t, dir, "update-server-info")
	return dir
}

func TestSources(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("needs git")
	}
	repo := repository(t)
	for branch, want := range map[string]string{"": "main", "next": "next", "%{branch}": "next"} {
		j := parse(t, "sources: [{type: git, url: 'file://%{repo}', branch: '"+branch+"'}]\nname: x\nstages: [{name: a, steps: [{action: command, cmd: cat file, path: '%{workspace}/project'}]}]\nsequence: [{stage: a}]")
		o := runJob(t, t.Context(), j, Runner{Context: map[string]string{"repo": repo, "branch": "next"}})
		require.NoError(t, o.err, o.log)
		require.Contains(t, o.log, ": cat file\n"+want+"\n")
	}
}

// TestSourceWithToken clones from a server that wants the token, and looks for it where it must not be.
func TestSourceWithToken(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("needs git")
	}
	const token = "t0ken/with=%25&odd'characters"
	repo := repository(t)
	files := http.StripPrefix("/group/project.git", http.FileServer(http.Dir(filepath.Join(repo, ".git"))))
	var user string
	var mu sync.Mutex // guards user
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		name, pass, _ := req.BasicAuth()
		if pass != token {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		mu.Lock()
		user = name
		mu.Unlock()
		files.ServeHTTP(w, req)
	}))
	defer web.Close()
	for _, row := range []struct{ url, token, user string }{
		{web.URL + "/group/project.git", "%{token}", "x-access-token"},
		{strings.Replace(web.URL, "//", "//me@", 1) + "/group/project.git", token, "me"},
	} {
		j := parse(t, "secrets: {token: \""+token+"\"}\nsources: [{type: git, url: '"+row.url+"', token: \""+row.token+"\", branch: next}]\nname: x\n"+
			"stages: [{name: a, steps: [{action: command, cmd: cat file .git/config, path: project}]}]\nsequence: [stage: a]")
		rec := &recorder{}
		dir := t.TempDir()
		o := runJob(t, t.Context(), j, Runner{Dial: func(context.Context, *builder.Host) (transport.Transport, error) {
			inner, err := local.New(dir, &local.Options{Env: []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "GIT_CONFIG_NOSYSTEM=1"}})
			rec.Transport = inner
			return rec, err
		}})
		require.NoError(t, o.err, o.log)
		require.Contains(t, o.log, ": cat file .git/config\nnext[core]")
		mu.Lock()
		require.Equal(t, row.user, user)
		mu.Unlock()
		require.NotContains(t, rec.seen.String(), "t0ken")
		require.NotContains(t, o.log, "t0ken")
		require.NotContains(t, o.log, mask, "git has written it down")

		j.Secrets["token"], j.Sources[0].Token = "wrong", "wrong"
		o = runJob(t, t.Context(), j, Runner{})
		code, _ := transport.ExitCode(o.err)
		require.Equal(t, 128, code, "it asks nobody")
	}
}

func TestGitURL(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		url   string
		token bool
		want  string // url and directory, or an error's text
	}{
		{"https://github.com/Liqwyd/Cyclid", true, "https://github.com/Liqwyd/Cyclid Cyclid"},
		{"https://user:pass@h/x/y.git/", false, "https://user@h/x/y.git/ y"},
		{"http://localhost:1/x", true, "http://localhost:1/x x"},
		{"git://h/x.git", false, "git://h/x.git x"},
		{"http://h/x", true, "needs a url with https://"},
		{"git://u:p@h/x", false, "needs a url with https://"},
		{"ssh://-oProxyCommand=x/y", false, "names no host"},
		{"ssh://-oProxyCommand=x@h/y", false, "names no host"},
		{"--upload-pack=x", false, "has to begin with"},
		{"ext::sh -c x", false, "has to begin with"},
		{"git@github.com:x/y", false, ""},
		{"https://h/..", false, "no name for a directory"},
		{"https://h/.git", false, "no name for a directory"},
		{"https://h/-x", false, "no name for a directory"},
		{"https://h", false, "no name for a directory"},
	} {
		g, err := parseGitURL(row.url, row.token)
		if err != nil {
			require.NotEqual(t, "https", strings.Split(row.want, ":")[0])
			require.ErrorContains(t, err, row.want, row.url)
			continue
		}
		require.Equal(t, row.want, g.url.String()+" "+g.dir)
	}
}

func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	good, bad := parse(t, simple("- stage: a\n- stage: b")), parse(t, simple("- stage: a\n- {stage: bad, on_failure: no}"))
	h := &hosts{}
	dial := localDial(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			j := good
			if i%3 == 0 {
				j = bad
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			res, err := (&Runner{Builder: h, Dial: dial}).Run(ctx, j)
			if (err == nil) != (i%3 != 0) || res.Succeeded != (err == nil) {
				t.Errorf("job %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	require.Equal(t, []int{20, 20}, []int{h.got, h.released})
}
