package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/job"
	"github.com/lxdtransport/transport/lxdtest"
)

// asProgram makes this test binary the program itself.
const asProgram = "LXDJOB_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// program is the program with these arguments, run at the top of the repository, on a machine without LXD.
func program(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), exe, args...)
	cmd.Dir = "../.."
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "LXD_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, asProgram+"=1", "LXD_DIR="+t.TempDir(), "SECRET_FROM_ENV=hunter2")
	return cmd
}

// result runs a program to its end.
func result(t testing.TB, cmd *exec.Cmd) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err != nil {
		require.IsType(t, &exec.ExitError{}, err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func write(t testing.TB, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "job.yml")
	require.NoError(t, os.WriteFile(name, []byte(content), 0o600))
	return name
}

const ok = "name: ok\nstages: [{name: a, steps: [{action: command, cmd: echo 'it runs'}]}]\nsequence: [{stage: a}]\n"

func TestWithoutServer(t *testing.T) {
	t.Parallel()
	code, stdout, stderr := result(t, program(t, write(t, ok)))
	require.Equal(t, 0, code, stderr)
	require.Equal(t, 1, strings.Count(stderr, "\n"))
	require.Contains(t, stderr, "no LXD server on this machine: running on a fake one")
	require.Contains(t, stdout, "\nit runs\n")
	require.NotContains(t, stdout, "\x1b")
	require.NotContains(t, stdout, "\r")
}

func TestTheExampleOfAFailure(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	code, stdout, stderr := result(t, program(t, "-artifacts", dir, "examples/jobs/failure.json", "--timestamps"))
	require.Equal(t, exitFailed, code, stderr)
	require.Contains(t, stderr, "lxdjob: job: failed: stage test, step 2 (command): ")
	require.Contains(t, stdout, "keeping the report")
	require.NotContains(t, stdout, "this is never seen")
	require.Regexp(t, `(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z one test of 2 failed$`, stdout)
	report, err := os.ReadFile(filepath.Join(dir, "failure/report.txt"))
	require.NoError(t, err)
	require.Equal(t, "one test of 2 failed\n", string(report))
}

func TestTheExampleInC(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"cc", "make"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("needs " + tool)
		}
	}
	dir := t.TempDir()
	code, stdout, stderr := result(t, program(t, "-artifacts", dir, "examples/jobs/c.yml"))
	require.Equal(t, 0, code, "%s%s", stdout, stderr)
	out, err := exec.Command(filepath.Join(dir, "greet"), "artifact").Output()
	require.NoError(t, err)
	require.Equal(t, "hello, artifact\n", string(out))
}

func TestExamplesAreRight(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../../examples/jobs/*.[jy]*")
	require.NoError(t, err)
	require.Len(t, files, 3)
	for _, name := range files {
		data, err := os.ReadFile(name)
		require.NoError(t, err)
		_, err = job.Parse(data, &job.ParseOptions{File: name})
		require.NoError(t, err)
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	wrong := write(t, strings.Replace(ok, "cmd", "cmnd", 1))
	for _, row := range []struct {
		args []string
		want string
	}{
		{nil, "one job file is needed"},
		{[]string{"a", "b"}, "one job file is needed"},
		{[]string{"-no-such-flag", "a"}, "flag provided but not defined"},
		{[]string{"no-such-file"}, "no such file"},
		{[]string{wrong}, wrong + `:2:46: unknown key "cmnd" of the action "command"`},
		{[]string{"-secret", "NO_SUCH_VARIABLE", wrong}, "no such environment variable"},
		{[]string{"-context", "x", wrong}, "it has to be name=value"},
		{[]string{"-secret-key", wrong, write(t, ok)}, "it is not PEM"},
		{[]string{"-dir", "no-such-directory", write(t, ok)}, "no-such-directory"},
		{[]string{"-reap", "x"}, "takes no job file"},
	} {
		code, stdout, stderr := result(t, program(t, row.args...))
		require.Equal(t, exitUsage, code, "%v: %s", row.args, stderr)
		require.Contains(t, stderr, row.want)
		require.Empty(t, stdout)
	}
	code, _, stderr := result(t, program(t, "-h"))
	require.Equal(t, 0, code)
	require.Contains(t, stderr, "usage: lxdjob [flags] JOBFILE")
}

func TestNoVerdict(t *testing.T) {
	t.Parallel()
	s := server(t)
	s.Images = []string{"other"}
	s.Start()
	code, _, stderr := result(t, program(t, "-remote", "unix://"+s.Socket, "-image", "none", write(t, ok)))
	require.Equal(t, exitNoVerdict, code, stderr)
	require.Contains(t, stderr, "no build host")
	code, _, stderr = result(t, program(t, "-remote", "unix:///no/such/socket", write(t, ok)))
	require.Equal(t, exitNoVerdict, code, stderr)
	require.NotContains(t, stderr, "fake", "a remote that was asked for is not replaced")
	code, _, stderr = result(t, program(t, "-timeout", "1ms", write(t, ok)))
	require.Equal(t, exitNoVerdict, code, stderr)
	require.Contains(t, stderr, "it took longer than 1ms")
}

func TestSecretsFromTheEnvironment(t *testing.T) {
	t.Parallel()
	file := write(t, "name: x\nstages: [{name: a, steps: [{action: command, cmd: test, args: ['%{SECRET_FROM_ENV}', =, hunter2]}, {action: log, message: 'is %{SECRET_FROM_ENV} for %{who}'}]}]\nsequence: [{stage: a}]\n")
	code, stdout, stderr := result(t, program(t, file, "-secret", "SECRET_FROM_ENV", "-context", "who=me"))
	require.Equal(t, 0, code, stderr)
	require.Contains(t, stdout, "is *** for me\n")
}

// server is a fake one that is not started yet, and outlives a program that is killed.
func server(t testing.TB) *lxdtest.Server {
	s := lxdtest.NewUnstartedServer()
	s.Handler = lxdtest.LocalCommands("")
	t.Cleanup(s.Close)
	return s
}

func instances(t testing.TB, socket string) []string {
	t.Helper()
	s, err := lxd.ConnectLXDUnix(socket, nil)
	require.NoError(t, err)
	defer s.Disconnect()
	names, err := s.GetInstanceNames(api.InstanceTypeAny)
	require.NoError(t, err)
	return names
}

func TestKeepAndReap(t *testing.T) {
	t.Parallel()
	s := server(t)
	s.Start()
	remote := "-remote=unix://" + s.Socket
	code, _, stderr := result(t, program(t, remote, "-keep", write(t, ok)))
	require.Equal(t, 0, code, stderr)
	names := instances(t, s.Socket)
	require.Len(t, names, 1)
	require.Contains(t, stderr, "the host "+names[0]+" is kept")
	code, stdout, stderr := result(t, program(t, remote, "-reap"))
	require.Equal(t, 0, code, stderr)
	require.Equal(t, names[0]+"\n", stdout)
	require.Empty(t, instances(t, s.Socket))
}

func TestKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	s := server(t)
	s.Start()
	remote := "-remote=unix://" + s.Socket
	file := write(t, strings.Replace(ok, "echo 'it runs'", "sleep 1000", 1))
	for range 10 {
		cmd := program(t, remote, file)
		require.NoError(t, cmd.Start())
		timer := time.AfterFunc(time.Duration(rand.IntN(1500))*time.Millisecond, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
		code, _, stderr := result(t, program(t, remote, "-reap"))
		require.Equal(t, 0, code, stderr)
		require.Empty(t, instances(t, s.Socket))
	}
}

// line is an event or a line of the log.
type line struct {
	Event, Line, Host, Stage string
	Done                     bool
}

func decode(t testing.TB, r io.Reader, each func(line)) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		var l line
		require.NoError(t, json.Unmarshal(sc.Bytes(), &l), sc.Text())
		each(l)
	}
	require.NoError(t, sc.Err())
}

// gone waits for nothing: the program has released its host.
func gone(t testing.TB, socket, host string) {
	t.Helper()
	require.NotEmpty(t, host)
	require.NotContains(t, instances(t, socket), host)
}

func TestTwentyAtOnceOnLXD(t *testing.T) {
	t.Parallel()
	reallxd.Need(t)
	socket := os.Getenv("TRANSPORT_LXD_SOCKET")
	good := write(t, ok)
	bad := write(t, strings.Replace(ok, "echo 'it runs'", "exit 3", 1))
	var wg sync.WaitGroup
	codes, outs, errs := make([]int, 20), make([]bytes.Buffer, 20), make([]bytes.Buffer, 20)
	for i := range codes {
		wg.Go(func() {
			file := good
			if i%2 == 1 {
				file = bad
			}
			codes[i] = run(t.Context(), []string{"-json", "-remote=unix://" + socket, "-image=" + os.Getenv("TRANSPORT_LXD_IMAGE"), file}, &outs[i], &errs[i])
		})
	}
	wg.Wait()
	for i, code := range codes {
		require.Equal(t, i%2, code, errs[i].String())
		host, runs, last := "", false, ""
		decode(t, &outs[i], func(l line) {
			host, last, runs = l.Host, l.Event, runs || l.Line == "it runs"
		})
		require.Equal(t, i%2 == 0, runs)
		require.Equal(t, []string{"succeeded", "failed"}[i%2], last)
		gone(t, socket, host)
	}
}

func TestScreen(t *testing.T) {
	t.Parallel()
	j, err := job.Parse([]byte(ok), nil)
	require.NoError(t, err)
	var out bytes.Buffer
	s := newScreen(&out, j, false)
	s.stop, s.done = make(chan struct{}), make(chan struct{})
	close(s.done)
	s.width = func() int { return 30 }
	begin := time.Now()
	s.event(job.Event{Kind: job.Waiting, Time: begin})
	s.event(job.Event{Kind: job.Started, Host: "job-1", Time: begin})
	fmt.Fprint(s, "The host ")
	fmt.Fprint(s, "is job-1\nmo")
	fmt.Fprint(s, "re\n")
	s.event(job.Event{Kind: job.StageRuns, Stage: "a", Time: begin})
	s.event(job.Event{Kind: job.StepRuns, Stage: "a", Action: "command with a long name", Step: 1, Steps: 2, Time: begin})
	s.event(job.Event{Kind: job.StepRuns, Stage: "a", Done: true})
	s.event(job.Event{Kind: job.Succeeded, Duration: 12345 * time.Millisecond})
	s.close()
	s.close()
	const clear = "\r\x1b[K"
	require.Equal(t, "[waiting for a host] 0s"+clear+"[preparing job-1] 0s"+clear+"The host is job-1\n[preparing job-1] 0s"+clear+"more\n[preparing job-1] 0s"+
		clear+"[1/1 a] 0s"+clear+"[1/1 a · command with a long "+clear+"ok succeeded, 12.3s\n", out.String())
}
