package job

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/builder"
)

// predefined is stages that a server has, as Cyclid's do, for jobs that do not define them.
const predefined = `
name: library
stages:
- {name: predefined, steps: [{action: log, message: 'predefined of %{job_name}'}]}
- {name: build, version: 1.5.0, steps: [{action: log, message: built}]}
- {name: success, steps: [{action: log, message: 'Job %{organization}/%{job_name} (job #%{job_id}) completed successfully.'}]}
- {name: failure, steps: [{action: log, message: 'Job %{organization}/%{job_name} (job #%{job_id}) failed.'}]}
sequence: [{stage: predefined}]
`

// cyclid parses one of the files that are shaped as those of Cyclid's documentation and example projects: "name.yml" or "name.json".
func cyclid(t testing.TB, name string) (*Job, error) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "cyclid", name))
	require.NoError(t, err)
	return Parse(data, &ParseOptions{File: name, Stages: parse(t, predefined).Stages})
}

// cyclidRuns is what becomes of the jobs: with a context, the stages that ran (as outcome.stages writes them), and parts of the log in their order. A job succeeds
// if no stage failed.
var cyclidRuns = []struct {
	file, name string
	context    map[string]string
	stages     string
	log        []string
	where      string // the only place; "": everywhere
}{
	{file: "minimal", name: "a stage that the job does not define", stages: "predefined", log: []string{"Running stage predefined v1.0.0\n", "\npredefined of Minimal\n"}},

	{file: "representative", name: "sources, secrets and handlers", stages: "prepare build success", where: "local", log: []string{
		"$ git clone file://%{repository}\n", "$ %{workspace}/project : cat file\nnext", "\n<***>\n", "Running stage build v1.5.0\n", "Job admins/Representative (job #7) completed successfully.\n",
	}},

	{file: "sequence", name: "all succeed", stages: "prepare test build success", log: []string{"At the beginning\n", "We got to the end\n", "\nadmins/Sequence succeeded\n", "Job Sequence succeeded\n"}},
	{file: "sequence", name: "the first fails", context: map[string]string{"breaks": "prepare"}, stages: "prepare! failure", log: []string{"\nadmins/Sequence failed\n", "Job Sequence failed: "}},
	{file: "sequence", name: "the second fails in its middle", context: map[string]string{"breaks": "test"}, stages: "prepare test! failure", log: []string{"\nAt the beginning\n", "Stage test failed: ", "stage test, step 2 (command): "}},
	{file: "sequence", name: "the last fails", context: map[string]string{"breaks": "build"}, stages: "prepare test build! failure", log: []string{"\nadmins/Sequence failed\n"}},

	{file: "unhandled", name: "all succeed: a listed handler is not run", stages: "prepare build report", log: []string{"nothing follows this\n"}},
	{file: "unhandled", name: "without on_failure the job ends", context: map[string]string{"breaks": "prepare"}, stages: "prepare!"},
	{file: "unhandled", name: "a handler that is listed is the end of the list", context: map[string]string{"breaks": "build"}, stages: "prepare build! cleanup"},

	{file: "modifiers", name: "nothing is skipped", context: map[string]string{"github_branch": "master", "coverage": "90%", "warnings": "0"}, stages: "prepare test numbers build success"},
	{file: "modifiers", name: "=== minds upper case", context: map[string]string{"github_branch": "Master", "coverage": "90%", "warnings": "0"}, stages: "prepare test numbers (build) success", log: []string{"Skipping stage build: only_if %{github_branch} === 'master'\n"}},
	{file: "modifiers", name: "!= minds upper case, and fail_if comes after the steps", context: map[string]string{"github_event": "TAG", "coverage": "1%"}, stages: "prepare test! failure", log: []string{"Stage test failed: fail_if %{coverage} < 85.5%\n"}},
	{file: "modifiers", name: "a skipped stage has succeeded, whatever its fail_if", context: map[string]string{"github_event": "tag", "coverage": "1%"}, stages: "prepare (test) numbers (build) success"},
	{file: "modifiers", name: "as much as it may be", context: map[string]string{"github_branch": "master", "coverage": "85.5%", "warnings": "9"}, stages: "prepare test numbers build success"},
	{file: "modifiers", name: "one too many", context: map[string]string{"coverage": "85.50%", "warnings": "10"}, stages: "prepare test numbers! failure"},
	{file: "modifiers", name: "no number", context: map[string]string{"coverage": "85.5%", "warnings": "many"}, stages: "prepare test numbers! failure", log: []string{`"many" is not a number`}},

	{file: "coverage", name: "enough", context: map[string]string{"least": "85"}, stages: "spec tests enough", log: []string{"SimpleCov coverage is 86.98%\n", "Cobertura coverage line rate is 90%, branch rate is 75%\n", "\n86.98%, 90%, 75%\n"}},
	{file: "coverage", name: "too little", context: map[string]string{"least": "87"}, stages: "spec! little", log: []string{"\nonly 86.98%\n"}},

	{file: "context", name: "variables", stages: "all", log: []string{
		"\njob 7 is Context 1.0.0 of admins\n", "\nit has debian_12 with git make from http://deb.example.org/debian\n", "\nthe password is ***, the host is h1 at 192.0.2.1\n",
	}},

	{file: "actions", name: "each as documented", stages: "commands scripts files", log: []string{
		"\n[install]\n[--path]\n[vendor/bundle admins]\n", "\n</var/lib/gems admins>\n", "\nhello from a simple script\nI am of admins\n", "\nHello from a script in vendor\n", "\n$ artifact %{workspace}/Project/result.txt: 5 bytes\n",
	}},

	{file: "environments", name: "repositories, packages and groups", stages: "only", log: []string{"Preparing the host\n", "\nready\n"}},
}

func TestCyclidJobs(t *testing.T) {
	t.Parallel()
	repo := ""
	if _, err := exec.LookPath("git"); err == nil {
		repo = repository(t)
	}
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dial := place(t)
			forms := []string{".yml", ".json"}
			if strings.HasPrefix(name, "real") { // they are the same jobs
				forms = forms[:1]
			}
			for _, row := range cyclidRuns {
				for _, ext := range forms {
					t.Run(row.file+ext+" "+row.name, func(t *testing.T) {
						if row.where != "" && row.where != name {
							t.Skip("it runs elsewhere")
						}
						if row.file == "representative" && repo == "" {
							t.Skip("needs git")
						}
						if _, err := exec.LookPath("sudo"); row.file == "actions" && os.Getuid() != 0 && err != nil {
							t.Skip("needs root or sudo")
						}
						runCyclid(t, row.file+ext, dial, row.context, repo, row.stages, row.log)
					})
				}
			}
		})
	}
}

func runCyclid(t *testing.T, file string, dial dial, context map[string]string, repo, stages string, log []string) {
	t.Helper()
	j, err := cyclid(t, file)
	require.NoError(t, err)
	artifacts, err := os.OpenRoot(t.TempDir())
	require.NoError(t, err)
	defer artifacts.Close()
	vars := map[string]string{"organization": "admins", "repository": filepath.Dir(repo) + "/project.git"}
	for k, v := range context {
		vars[k] = v
	}
	p := &prepared{}
	o := runJob(t, t.Context(), j, Runner{
		ID: "7", Dial: dial, Context: vars, Provisioner: p, Artifacts: artifacts,
		Files: fstest.MapFS{
			"project/main.txt":      {Data: []byte("main\n"), Mode: 0o644},
			"reports/coverage.xml":  {Data: []byte(`<?xml version="1.0"?><coverage line-rate="0.9" branch-rate="0.75"/>`), Mode: 0o644},
			"reports/coverage.json": {Data: []byte(`{"metrics": {"covered_percent": 86.9795918367347}}`), Mode: 0o644},
		},
	})
	require.Equal(t, stages, o.stages(), "%v\n%s", o.err, o.log)
	require.Equal(t, !strings.Contains(stages, "!"), o.Succeeded)
	rest := o.log
	for _, want := range log {
		_, after, found := strings.Cut(rest, want)
		require.True(t, found, "%q is not in the log, or not behind the one before:\n%s", want, o.log)
		if strings.HasSuffix(want, "\n") {
			after = "\n" + after
		}
		rest = after
	}
	require.Equal(t, builder.Spec{OS: j.Environment.OS, Labels: map[string]string{"run": "7"}}, o.hosts.spec)
	if len(j.Environment.Packages) > 0 {
		require.Equal(t, j.Environment, p.env)
	}
}

// TestCyclidInYAMLAndJSON compares the two forms of every file, all but their positions.
func TestCyclidInYAMLAndJSON(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/cyclid/*.yml")
	require.NoError(t, err)
	tested := map[string]bool{"mistakes": true}
	for _, row := range cyclidRuns {
		tested[row.file] = true
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yml")
		require.True(t, tested[name], "%s has no row", name)
		if name == "mistakes" {
			continue
		}
		one, err := cyclid(t, name+".yml")
		require.NoError(t, err)
		other, err := cyclid(t, name+".json")
		require.NoError(t, err)
		require.Equal(t, withoutPositions(one), withoutPositions(other), name)
	}
	require.Len(t, tested, len(files))
}

// withoutPositions is all of a job but where it is in the file.
func withoutPositions(j *Job) (all []string) {
	add := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	add("%s %s %+v %v %v", j.Name, j.Version, j.Environment, j.Sources, j.Secrets)
	for _, s := range j.Stages {
		add("stage %s %s", s.Name, s.Version)
		for _, step := range s.Steps {
			add("%s %+v", step.Action, step.act)
		}
	}
	for _, e := range j.Sequence {
		add("%s %s %s %v %v %v", e.Stage.Name, e.OnSuccess, e.OnFailure, e.OnlyIf, e.NotIf, e.FailIf)
	}
	return all
}

func TestCyclidMistakes(t *testing.T) {
	t.Parallel()
	for file, want := range map[string][]string{
		"mistakes.yml": {
			`mistakes.yml:3:1: unknown key "enviroment" of the job`,
			`mistakes.yml:7:3: unknown key "stpes" of a stage`,
			`mistakes.yml:9:5: the action "command" needs "cmd"`,
			`mistakes.yml:10:5: unknown key "command" of the action "command"`,
			`mistakes.yml:11:13: unknown action "slack"`,
			`mistakes.yml:15:5: unknown key "shell" of the action "script"`,
			`mistakes.yml:18:3: unknown key "on_sucess" of an entry of the sequence`,
			`mistakes.yml:19:12: "only_if": unknown operator "="`,
			`mistakes.yml:20:10: the stage "two" is not defined`,
		},
		"mistakes.json": {
			`mistakes.json:3:3: unknown key "enviroment" of the job`,
			`mistakes.json:9:7: unknown key "stpes" of a stage`,
			`mistakes.json:11:9: the action "command" needs "cmd"`,
			`mistakes.json:13:11: unknown key "command" of the action "command"`,
			`mistakes.json:16:21: unknown action "slack"`,
			`mistakes.json:24:11: unknown key "shell" of the action "script"`,
			`mistakes.json:32:7: unknown key "on_sucess" of an entry of the sequence`,
			`mistakes.json:33:18: "only_if": unknown operator "="`,
			`mistakes.json:36:16: the stage "two" is not defined`,
		},
	} {
		_, err := cyclid(t, file)
		require.Error(t, err)
		lines := strings.Split(err.Error(), "\n")
		require.Len(t, lines, len(want), err.Error())
		for i, line := range lines {
			require.Contains(t, line, want[i])
		}
	}
}
