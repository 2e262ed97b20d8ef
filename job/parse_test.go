package job

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/provisioner"
)

func parseFile(t testing.TB, name string) *Job {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	require.NoError(t, err)
	j, err := Parse(data, &ParseOptions{File: name})
	require.NoError(t, err)
	return j
}

func parse(t testing.TB, file string) *Job {
	t.Helper()
	j, err := Parse([]byte(file), nil)
	require.NoError(t, err)
	return j
}

func names(j *Job) (all []string) {
	for _, e := range j.Sequence {
		all = append(all, e.Stage.Name)
	}
	return all
}

func TestParseTheSameFileInYAMLAndJSON(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"ruby.json", "ruby.yml"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			j := parseFile(t, name)
			require.Equal(t, "Ruby project", j.Name)
			require.Equal(t, "1.0.0", j.Version)
			require.Equal(t, provisioner.Environment{
				OS:           "ubuntu_24_04",
				Repositories: []provisioner.Repository{{URL: "ppa:brightbox/ruby-ng"}, {URL: "https://deb.example.org", Distribution: "stable", Components: []string{"main", "non-free"}, KeyID: "5C808C2B65558117"}},
				Packages:     []string{"ruby", "build-essential", "git"},
			}, j.Environment)
			require.Equal(t, []Source{{Type: "git", URL: "https://git.example.org/project/ruby.git", Branch: "next", Token: "%{git_token}"}}, j.Sources)
			require.Equal(t, map[string]string{"git_token": "c2VjcmV0"}, j.Secrets)
			require.Equal(t, []string{"install", "lint", "spec", "build", "failure", "success"}, names(j))
			require.Equal(t, 4, j.listed)
			require.Equal(t, "%{simplecov_coverage} < 85%", j.Sequence[2].FailIf.String())
			require.Equal(t, "success", j.Sequence[3].OnSuccess)
			install := j.Stages[0].Steps[0].act.(*commandAction)
			require.True(t, install.sudo)
			require.Equal(t, []variable{{"GEM_HOME", "/var/lib/gems"}, {"LANG", "C.UTF-8"}}, install.env)
			require.Equal(t, "echo one\necho 'two'", j.Stages[1].Steps[1].act.(*scriptAction).script)
		})
	}
}

func TestParseErrors(t *testing.T) {
	t.Parallel()
	const ok = "name: x\nstages: [{name: a, steps: [{action: log, message: m}]}]\nsequence: [{stage: a}]\n"
	parse(t, ok)
	for _, row := range []struct{ name, file, want string }{
		{"empty", "", "line 1, column 1: the file is empty"},
		{"no mapping", "- a", "line 1, column 1: the job has to be a mapping"},
		{"no name", "sequence: [{stage: a}]\nstages: [{name: a, steps: [{action: log, message: m}]}]", `needs "name"`},
		{"empty name", "name: ''\n" + ok[8:], `line 1, column 7: the job needs "name"`},
		{"no sequence", "name: x", `needs a "sequence"`},
		{"unknown key", ok + "stagse: []", `line 4, column 1: unknown key "stagse" of the job: known are name,`},
		{"key twice", ok + "name: y", `line 4, column 1: `},
		{"unknown action", strings.Replace(ok, "action: log", "action: slack", 1), `line 2, column 37: unknown action "slack": known are command, script,`},
		{"unknown key of an action", strings.Replace(ok, "message: m", "message: m, colour: red", 1), `line 2, column 54: unknown key "colour" of the action "log": known are action, message`},
		{"missing key of an action", strings.Replace(ok, ", message: m", "", 1), `line 2, column 28: the action "log" needs "message"`},
		{"list for text", strings.Replace(ok, "message: m", "message: [m]", 1), `line 2, column 51: "message" of the action "log" has to be a text`},
		{"text for list", strings.Replace(ok, "[{stage: a}]", "a", 1), `line 3, column 11: "sequence" of the job has to be a list`},
		{"sudo", strings.Replace(ok, "action: log, message: m", "action: command, cmd: m, sudo: maybe", 1), `"sudo" of the action "command" has to be true or false`},
		{"variable", strings.Replace(ok, "action: log, message: m", "action: command, cmd: m, env: {a-b: c}", 1), `"a-b" is not a name for a variable`},
		{"NUL", strings.Replace(ok, "message: m", `message: "a\0b"`, 1), `contains a NUL byte`},
		{"no steps", strings.Replace(ok, "[{action: log, message: m}]", "[]", 1), `line 2, column 27: the stage "a" needs "steps", at least one`},
		{"stage twice", strings.Replace(ok, "stages: [", "stages: [{name: a, steps: [{action: log, message: m}]}, ", 1), `the stage "a" is already defined at line 2`},
		{"no such stage", strings.Replace(ok, "{stage: a}", "{stage: b}", 1), `line 3, column 20: the stage "b" is not defined`},
		{"no such handler", strings.Replace(ok, "{stage: a}", "{stage: a, on_failure: b}", 1), `line 3, column 35: the stage "b" is not defined`},
		{"other version", strings.Replace(ok, "{stage: a}", "{stage: a, version: 2.0}", 1), `the stage "a" has version 1.0.0, not 2.0`},
		{"circle of one", strings.Replace(ok, "{stage: a}", "{stage: a, on_failure: a}", 1), `line 3, column 35: the sequence runs in a circle: a → a`},
		{"stage again", strings.Replace(ok, "{stage: a}", "{stage: a}, {stage: a}", 1), `line 3, column 32: the stage "a" is already in the sequence, at line 3: it would run in a circle`},
		{"condition", strings.Replace(ok, "{stage: a}", "{stage: a, only_if: 1 ~ 2}", 1), `line 3, column 32: "only_if": unknown operator "~"`},
		{"source type", ok + "sources: [{type: svn, url: 'https://h/x'}]", `unknown type of source "svn"`},
		{"source url", ok + "sources: [{type: git, url: 'ext::sh -c x'}]", `the url has to begin with https://`},
		{"source token in the clear", ok + "sources: [{type: git, url: 'http://h/x', token: t}]", `needs a url with https://`},
		{"package", ok + "environment: {packages: [-o]}", `line 4, column 26: "-o" is not the name of a package`},
		{"secrets", ok + "secrets: {a: '" + strings.Repeat("x", maxSecrets) + "', b: y}", `line 4, column 10: the secrets have more than 65536 bytes`},
		{"group", ok + "environment: {groups: [-o]}", `line 4, column 24: "-o" is not the name of a group`},
		{"pattern", strings.Replace(ok, "action: log, message: m", "action: upload, from: a, path: b, exclude: '['", 1), `"[" is no pattern`},
		{"YAML", "name: [", `line 1, column 1: did not find expected node content`},
		{"second document", ok + "---\nname: y", `second document`},
		{"JSON that does not end", `{"name": "x"`, `line 1, column 12: unexpected end of JSON`},
		{"JSON with a comma too many", "{\n  \"name\": \"x\",,\n}", `line 2, column 15: `},
		{"JSON with something behind it", `{"name": "x"} {`, `line 1, column 15: invalid character '{' after top-level value`},
		{"JSON with an unknown key", "{\n\t\"name\": \"x\",\n\t\"nmae\": 1}", `line 3, column 2: unknown key "nmae"`},
		{"depth", `{"name":` + strings.Repeat("[", 1000) + strings.Repeat("]", 1000) + "}", `too deeply nested`},
		{"alias in a circle", "name: &a [*a]\n", `has to be a text`},
		{"aliases", "name: x\nsequence: &a [&b {stage: [&c [1,1,1,1,1,1,1,1,1,1],*c,*c,*c]},*b,*b,*b,*b,*b]\n", "has to be a text"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			j, err := Parse([]byte(row.file), nil)
			require.ErrorContains(t, err, row.want)
			require.Nil(t, j)
			var syntax *SyntaxError
			require.ErrorAs(t, err, &syntax)
			require.Positive(t, syntax.Line)
			require.Positive(t, syntax.Column)
		})
	}
	_, err := Parse([]byte("nmae: x\nname: y\nstages: 1\n"), &ParseOptions{File: "ci.yml"})
	require.ErrorContains(t, err, "ci.yml:1:1: unknown key")
	require.ErrorContains(t, err, "ci.yml:3:9: ", "all mistakes at once")
}

func TestGroups(t *testing.T) {
	t.Parallel()
	j := parse(t, "environment: {packages: [gcc, '@web'], groups: [Development Tools, web]}\n"+stages("- stage: a", "a"))
	require.Equal(t, []string{"gcc", "@web", "@Development Tools", "@web"}, j.Environment.Packages)
}

// stages is a file with stages of these names that do nothing.
func stages(sequence string, names ...string) string {
	var b strings.Builder
	b.WriteString("name: x\nstages:\n")
	for _, n := range names {
		b.WriteString("- {name: " + n + ", steps: [{action: log, message: m}]}\n")
	}
	return b.String() + "sequence:\n" + sequence
}

func TestParseCircles(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ name, sequence, want string }{
		{"two", "- {stage: a, on_success: b}\n- {stage: b, on_failure: a}", "a → b → a"},
		{"back through the order", "- stage: a\n- {stage: b}\n- {stage: c, on_success: a}", "a → b → c → a"},
		{"behind the beginning", "- stage: a\n- {stage: b}\n- {stage: c, on_failure: b}", ": b → c → b"},
		{"a handler that is in the order", "- {stage: a, on_failure: c}\n- {stage: b, on_failure: c}\n- stage: c", ""},
		{"both ways to one", "- {stage: a, on_success: c, on_failure: c}\n- stage: b", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			_, err := Parse([]byte(stages(row.sequence, "a", "b", "c")), nil)
			if row.want == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, row.want)
			}
		})
	}
}

func TestPredefinedStages(t *testing.T) {
	t.Parallel()
	library := parse(t, stages("- stage: a", "a", "b"))
	j, err := Parse([]byte(stages("- stage: a\n  on_failure: b", "a")), &ParseOptions{Stages: library.Stages})
	require.NoError(t, err)
	require.NotSame(t, library.Stages[0], j.Sequence[0].Stage, "the file's own wins")
	require.Same(t, library.Stages[1], j.Sequence[1].Stage)
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"ruby.json", "ruby.yml"} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		require.NoError(f, err)
		f.Add(data)
	}
	f.Add([]byte("a: &a [*a, &b {<<: *b}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		j, err := Parse(data, nil)
		if err == nil {
			require.NotEmpty(t, j.Name)
			require.NotEmpty(t, j.Sequence)
			for i := range j.Sequence {
				for _, success := range []bool{true, false} {
					require.Less(t, j.next(i, success), len(j.Sequence))
				}
			}
		}
	})
}

func TestConditions(t *testing.T) {
	t.Parallel()
	vars := map[string]string{"branch": "master", "odd": "x' == 'x", "rate": "84.9%", "n": "7", "word": "seven"}
	for _, row := range []struct {
		cond string
		want any // bool, or an error's text: of parsing or of evaluating
	}{
		{"'a' == 'A'", true},
		{"'a' === 'A'", false},
		{"'a' eq 'a'", true},
		{"'a' != 'A'", true},
		{"'a' ne 'a'", false},
		{"'this' != 'that'", true},
		{"'' == ''", true},
		{"'it''s' == 'it''s'", true},
		{"1 lt 2", true},
		{"2 < 10", true},
		{"99% > 80%", true},
		{"3.14 gt 2.71", true},
		{".5 <= 0.5", true},
		{"-1 ge 0", false},
		{"1 eq 1", true},
		{"8 eq 9", false},
		{"1.0 == 1", true},
		{"90% === 90.0%", true},
		{"1 != 2", true},
		{"'%{branch}' == 'MASTER'", true},
		{"'%{branch}' === 'MASTER'", false},
		{"%{branch} === 'master'", true}, // as in Cyclid's documentation
		{"'master' == %{branch}", true},
		{"%{branch} == %{branch}", true},
		{"'%{odd}' == 'x'", false},
		{"'%{odd}' == '%{odd}'", true},
		{"%{odd} == 'x'", false},
		{"%{rate} < 85%", true},
		{"%{rate} >= 84.9%", true},
		{"%{n} == 7", true},
		{"%{n}% == 7%", true},
		{"%{none} < 85%", true}, // nothing is 0
		{"'%{none}' == ''", true},
		{"%{word} < 8", `"seven" is not a number`},
		{"8 > %{word}", `"seven" is not a number`},
		{"%{word} == 8", false},
		{"'a' < 'b'", "compares numbers"},
		{"'a' == 1", "compares a text with a number"},
		{"a == b", `"a" is neither a number nor a variable nor a text in single quotes`},
		{"1 2", "unknown operator"},
		{"1 == 2 3", "something behind its end"},
		{"'a", "does not end"},
		{"1 ==", "neither a number"},
	} {
		t.Run(row.cond, func(t *testing.T) {
			t.Parallel()
			c, err := parseCondition(row.cond)
			var got bool
			if err == nil {
				got, err = c.Holds(vars)
			}
			if text, ok := row.want.(string); ok {
				require.ErrorContains(t, err, text)
				return
			}
			require.NoError(t, err)
			require.Equal(t, row.want, got)
		})
	}
}

func TestExpand(t *testing.T) {
	t.Parallel()
	vars := map[string]string{"a": "A", "b": "%{a}", "c d": "C"}
	for in, want := range map[string]string{
		"": "", "x": "x", "%{a}": "A", "x%{a}y%{a}": "xAyA", "%{b}": "%{a}", "%{c d}": "C", "%{none}": "",
		"100%": "100%", "%d %s": "%d %s", "${x%%.*}": "${x%%.*}", "%%{a}": "%{a}", "%{a": "%{a", "%{}": "", "%%%{a}": "%%{a}",
	} {
		require.Equal(t, want, expand(in, vars), in)
	}
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	vars := map[string]string{"a": "a b", "evil": `"; touch x; '$(id)`, "empty": "", "w": "/w"}
	sh := func(script string, args ...string) []string {
		return append([]string{"/bin/sh", "-c", script, "sh"}, args...)
	}
	for _, row := range []struct {
		line string
		want []string
	}{
		{"make test", []string{"make", "test"}},
		{"  make   -j4 CC=gcc ", []string{"make", "-j4", "CC=gcc"}},
		{"bundle install --path %{w}/vendor", []string{"bundle", "install", "--path", "/w/vendor"}},
		{"echo %{a} %{evil} %{empty} %{none}", []string{"echo", "a b", vars["evil"]}},
		{"CC=gcc make", sh("CC=gcc make")},
		{"echo 'At the beginning'", sh("echo 'At the beginning'")},
		{"make && make %{a}", sh(`make && make ${1:+"${1}"}`, "a b")},
		{`echo "x %{a}" 'y %{a}'`, sh(`echo "x ${1}" 'y '"${2}"''`, "a b", "a b")},
		{`echo "$(echo '%{a}' "%{a}")" %{a}`, sh(`echo "$(echo ''"${1}"'' "${2}")" ${3:+"${3}"}`, "a b", "a b", "a b")},
		{`echo \'%{a}`, sh(`echo \'${1:+"${1}"}`, "a b")},
		{"one\ntwo", sh("one\ntwo")},
	} {
		require.Equal(t, row.want, commandLine(row.line, vars), row.line)
	}
}
