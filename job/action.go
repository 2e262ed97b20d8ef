package job

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/lxdtransport/transport"
)

// action is what a step does. An error fails the step.
type action interface {
	run(ctx context.Context, r *run) error
}

// actionKind is how an action is read from its mapping.
type actionKind struct {
	keys  []string
	parse func(m *mapping) action
}

var actions = map[string]actionKind{
	"command":   {[]string{"cmd", "args", "env", "path", "sudo"}, parseCommand},
	"script":    {[]string{"script", "env", "path", "sudo"}, parseScript},
	"log":       {[]string{"message"}, parseLog},
	"cobertura": {[]string{"path"}, func(m *mapping) action { return coberturaAction{m.required("path")} }},
	"simplecov": {[]string{"path"}, func(m *mapping) action { return simplecovAction{m.required("path")} }},
	"upload":    {[]string{"from", "path", "exclude"}, parseUpload},
	"artifact":  {[]string{"path", "to"}, parseArtifact},
}

var actionNames = []string{"command", "script", "log", "cobertura", "simplecov", "upload", "artifact"}

// variable is an environment variable of a step.
type variable struct{ name, value string }

// commandAction runs a command.
type commandAction struct {
	cmd  string
	args []string // nil: cmd is a whole command line
	env  []variable
	path string
	sudo bool
}

func parseCommand(m *mapping) action {
	a := &commandAction{cmd: m.required("cmd"), args: m.texts("args"), env: m.environment("env"), path: m.text("path"), sudo: m.boolean("sudo")}
	if m.has("args") && a.args == nil {
		a.args = []string{}
	}
	if strings.TrimSpace(a.cmd) == "" && a.cmd != "" {
		m.p.fail(m.where("cmd"), `the "cmd" is blank`)
	}
	return a
}

func (a *commandAction) run(ctx context.Context, r *run) error {
	// What is logged is what the file says, without the variables' values.
	where := ""
	if a.path != "" {
		where = a.path + " : "
	}
	r.log("$ %s%s\n", where, strings.Join(append([]string{a.cmd}, a.args...), " "))
	texts := append([]string{a.cmd, a.path}, a.args...)
	for _, v := range a.env {
		texts = append(texts, v.value)
	}
	r.warnUnknown(texts...)
	var argv []string
	if a.args == nil {
		argv = commandLine(a.cmd, r.vars)
	} else {
		argv = append(argv, expand(a.cmd, r.vars))
		for _, s := range a.args {
			argv = append(argv, expand(s, r.vars))
		}
	}
	if len(argv) == 0 || argv[0] == "" {
		return errors.New("the command is empty")
	}
	return r.exec(ctx, argv, a.env, a.path, a.sudo)
}

// scriptAction runs a script, which is uploaded.
type scriptAction struct {
	script string
	env    []variable
	path   string
	sudo   bool
}

func parseScript(m *mapping) action {
	a := &scriptAction{env: m.environment("env"), path: m.text("path"), sudo: m.boolean("sudo")}
	if n := m.fields["script"]; n != nil && n.Kind != 0 && len(n.Content) > 0 {
		a.script = strings.Join(m.texts("script"), "\n")
	} else {
		a.script = m.required("script")
	}
	return a
}

func (a *scriptAction) run(ctx context.Context, r *run) (err error) {
	r.warnUnknown(a.script, a.path)
	script := expand(a.script, r.vars)
	if !strings.HasSuffix(script, "\n") {
		script += "\n"
	}
	name := r.private("script")
	if a.path == "" {
		r.log("$ (script)\n")
	} else {
		r.log("$ %s : (script)\n", a.path)
	}
	// Nobody else may read it: a script may contain secrets.
	if err := r.host.Upload(ctx, name, strings.NewReader(script), &transport.UploadOptions{Mode: 0o700}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.remove(ctx, name)) }()
	return r.exec(ctx, append(interpreter(script), r.seen(name)), a.env, a.path, a.sudo)
}

// interpreter is what the kernel would run the script with. It is run so, not as a program of its own, because then it does not
// matter whether the file system allows programs, and whether another process still holds the file open.
func interpreter(script string) []string {
	line, _, _ := strings.Cut(script, "\n")
	line, ok := strings.CutPrefix(line, "#!")
	name, arg, _ := strings.Cut(strings.TrimSpace(line), " ")
	switch arg = strings.TrimSpace(arg); {
	case !ok || name == "":
		return []string{"/bin/sh"}
	case arg == "":
		return []string{name}
	}
	return []string{name, arg}
}

// logAction writes a message.
type logAction struct{ message string }

func parseLog(m *mapping) action { return logAction{m.required("message")} }

func (a logAction) run(_ context.Context, r *run) error {
	r.warnUnknown(a.message)
	r.log("%s\n", strings.TrimSuffix(expand(a.message, r.vars), "\n"))
	return nil
}

// maxReport bounds a report, which comes from the host.
const maxReport = 64 << 20

// report fetches one.
func (r *run) report(ctx context.Context, name string) ([]byte, error) {
	r.warnUnknown(name)
	var b buffer
	err := r.host.Download(ctx, r.remote(expand(name, r.vars)), &b, &transport.DownloadOptions{Limit: maxReport})
	return b, err
}

// percentage writes a rate as Cyclid's documentation does: to two decimal places, without zeros.
func percentage(rate float64) (string, error) {
	if math.IsNaN(rate) || math.IsInf(rate, 0) {
		return "", fmt.Errorf("%v is no rate", rate)
	}
	return strconv.FormatFloat(math.Round(rate*100)/100, 'f', -1, 64) + "%", nil
}

// coberturaAction reads the rates of a Cobertura report into the context.
type coberturaAction struct{ path string }

func (a coberturaAction) run(ctx context.Context, r *run) error {
	data, err := r.report(ctx, a.path)
	if err != nil {
		return err
	}
	line, branch, err := cobertura(data)
	if err != nil {
		return fmt.Errorf("the Cobertura report %s: %w", a.path, err)
	}
	r.log("Cobertura coverage line rate is %s, branch rate is %s\n", line, branch)
	r.vars["cobertura_line_rate"], r.vars["cobertura_branch_rate"] = line, branch
	return nil
}

func cobertura(data []byte) (line, branch string, err error) {
	dec := xml.NewDecoder(strings.NewReader(string(data)))
	// The rates are ASCII in all encodings that such reports are written in.
	dec.CharsetReader = func(_ string, in io.Reader) (io.Reader, error) { return in, nil }
	dec.Strict = false
	for {
		t, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return "", "", errors.New("it has no <coverage> element")
		}
		if err != nil {
			return "", "", err
		}
		e, ok := t.(xml.StartElement)
		if !ok || e.Name.Local != "coverage" {
			continue
		}
		rates := map[string]string{}
		for _, a := range e.Attr {
			if a.Name.Local != "line-rate" && a.Name.Local != "branch-rate" {
				continue
			}
			f, err := strconv.ParseFloat(a.Value, 64)
			if err != nil {
				return "", "", fmt.Errorf("%s is %.40q, no number", a.Name.Local, a.Value)
			}
			if rates[a.Name.Local], err = percentage(f * 100); err != nil {
				return "", "", err
			}
		}
		if rates["line-rate"] == "" || rates["branch-rate"] == "" {
			return "", "", errors.New("its <coverage> element has no line-rate or no branch-rate")
		}
		return rates["line-rate"], rates["branch-rate"], nil
	}
}

// simplecovAction reads the coverage of a SimpleCov report into the context.
type simplecovAction struct{ path string }

func (a simplecovAction) run(ctx context.Context, r *run) error {
	data, err := r.report(ctx, a.path)
	if err != nil {
		return err
	}
	var report struct {
		Metrics *struct {
			CoveredPercent *float64 `json:"covered_percent"`
		} `json:"metrics"`
	}
	if err := json.Unmarshal(data, &report); err != nil {
		return fmt.Errorf("the SimpleCov report %s: %w", a.path, err)
	}
	if report.Metrics == nil || report.Metrics.CoveredPercent == nil {
		return fmt.Errorf("the SimpleCov report %s has no metrics with covered_percent", a.path)
	}
	covered, err := percentage(*report.Metrics.CoveredPercent)
	if err != nil {
		return err
	}
	r.log("SimpleCov coverage is %s\n", covered)
	r.vars["simplecov_coverage"] = covered
	return nil
}

// uploadAction copies a file or a directory to the host.
type uploadAction struct {
	from, path string
	exclude    []string
}

func parseUpload(m *mapping) action {
	a := &uploadAction{from: m.required("from"), path: m.required("path"), exclude: m.words("exclude")}
	for _, pattern := range a.exclude {
		if _, err := path.Match(pattern, ""); err != nil {
			m.p.fail(m.where("exclude"), "%q is no pattern", pattern)
		}
	}
	return a
}

func (a *uploadAction) run(ctx context.Context, r *run) error {
	if r.Files == nil {
		return errors.New("there are no files to upload from: Runner.Files is not set")
	}
	r.warnUnknown(a.from, a.path)
	from := path.Clean(expand(a.from, r.vars))
	to := r.remote(expand(a.path, r.vars))
	if !fs.ValidPath(from) {
		return fmt.Errorf("%q is not a path inside of the directory that files are uploaded from", from)
	}
	info, err := fs.Stat(r.Files, from)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		f, err := r.Files.Open(from)
		if err != nil {
			return err
		}
		defer f.Close()
		r.log("$ upload %s to %s\n", a.from, a.path)
		return r.host.Upload(ctx, to, f, &transport.UploadOptions{Mode: info.Mode().Perm(), MkdirAll: true})
	}
	files, err := fs.Sub(r.Files, from)
	if err != nil {
		return err
	}
	stats, err := transport.UploadTree(ctx, r.host, to, files, &transport.TreeOptions{
		Symlinks: transport.KeepSymlinks,
		Match: func(name string, _ fs.DirEntry) bool {
			return !slices.ContainsFunc(a.exclude, func(pattern string) bool {
				whole, _ := path.Match(pattern, name)
				base, _ := path.Match(pattern, path.Base(name))
				return whole || base
			})
		},
		Skipped: func(name string, why error) { r.log("left out: %s: %v\n", name, why) },
	})
	if err == nil {
		r.log("$ upload %s to %s: %d files, %d bytes\n", a.from, a.path, stats.Files, stats.Bytes)
	}
	return err
}

// artifactAction copies a file or a directory from the host.
type artifactAction struct{ path, to string }

func parseArtifact(m *mapping) action {
	return artifactAction{m.required("path"), m.text("to")}
}

func (a artifactAction) run(ctx context.Context, r *run) error {
	if r.Artifacts == nil {
		return errors.New("there is no place for artifacts: Runner.Artifacts is not set")
	}
	r.warnUnknown(a.path, a.to)
	from := r.remote(expand(a.path, r.vars))
	to := expand(a.to, r.vars)
	if to == "" || strings.HasSuffix(to, "/") {
		to += path.Base(from)
	}
	to = path.Clean(to)
	if !fs.ValidPath(to) {
		return fmt.Errorf("%q is not a path inside of the directory for artifacts", to)
	}
	limit := r.MaxArtifact
	if limit == 0 {
		limit = defaultMaxArtifact
	}
	if dir := path.Dir(to); dir != "." {
		if err := r.Artifacts.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	n, err := r.fetch(ctx, from, to, limit)
	switch {
	case err == nil:
		r.log("$ artifact %s: %d bytes\n", a.path, n)
		return nil
	case !errors.Is(err, syscall.EISDIR):
		return err
	}
	if err := r.Artifacts.MkdirAll(to, 0o755); err != nil {
		return err
	}
	dst, err := r.Artifacts.OpenRoot(to)
	if err != nil {
		return err
	}
	defer dst.Close()
	stats, err := transport.DownloadTree(ctx, r.host, from, dst, &transport.TreeOptions{
		Symlinks:   transport.KeepSymlinks,
		MaxBytes:   limit,
		MaxEntries: maxArtifactEntries,
		Skipped:    func(name string, why error) { r.log("left out: %s: %v\n", name, why) },
	})
	if err == nil {
		r.log("$ artifact %s: %d files, %d bytes\n", a.path, stats.Files, stats.Bytes)
	}
	return err
}

const (
	defaultMaxArtifact = 4 << 30
	maxArtifactEntries = 1_000_000
)

// fetch downloads a file beside its place and moves it there when it is whole.
func (r *run) fetch(ctx context.Context, from, to string, limit int64) (n int64, err error) {
	part := to + "." + r.random + ".part"
	f, err := r.Artifacts.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	mode := fs.FileMode(0o644)
	err = r.host.Download(ctx, from, f, &transport.DownloadOptions{
		Limit:    limit,
		Stat:     func(i fs.FileInfo) { mode = i.Mode().Perm()&0o755 | 0o600 },
		Progress: func(received int64) { n = received },
	})
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = r.Artifacts.Rename(part, to)
	}
	if err != nil {
		_ = r.Artifacts.Remove(part)
	}
	return n, err
}
