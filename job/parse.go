package job

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/lxdtransport/transport/provisioner"
)

// The bounds of a job file: it may come from somebody who is not to be trusted.
const (
	maxFile  = 1 << 20
	maxDepth = 32
	maxNodes = 100_000 // counted with every use of an alias

	// maxSecrets is of all of them together: what finds them in a log takes some 500 times as much memory.
	maxSecrets = 64 << 10
)

// SyntaxError is a mistake in a job file.
type SyntaxError struct {
	File         string // as in ParseOptions
	Line, Column int    // from 1
	Text         string
}

// Error is file:line:column: text.
func (e *SyntaxError) Error() string {
	if e.File == "" {
		return fmt.Sprintf("line %d, column %d: %s", e.Line, e.Column, e.Text)
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Text)
}

// ParseOptions are the options of [Parse]; nil means all defaults.
type ParseOptions struct {
	// File is the name of the file in errors.
	File string

	// Stages are stages that the sequence may name without the file's defining them. One of the file wins over
	// one of the same name here.
	Stages []*Stage
}

type position struct{ line, column int }

func at(n *yaml.Node) position { return position{n.Line, n.Column} }

// Parse reads a job file in YAML or JSON. A mistake is a *[SyntaxError] with its line and column; the error has all of them: what is
// not YAML, unknown keys and actions, missing ones, values of a wrong kind, conditions that cannot be evaluated, stages
// that are not there, sequences that would run in a circle.
func Parse(data []byte, opts *ParseOptions) (*Job, error) {
	if opts == nil {
		opts = &ParseOptions{}
	}
	p := &parser{file: opts.File}
	if len(data) > maxFile {
		return nil, fmt.Errorf("job: %w", &SyntaxError{File: opts.File, Line: 1, Column: 1, Text: fmt.Sprintf("the file has more than %d bytes", maxFile)})
	}
	root, err := document(data)
	if err != nil {
		if e, ok := errors.AsType[*SyntaxError](err); ok {
			e.File = opts.File
		}
		return nil, fmt.Errorf("job: %w", err)
	}
	j := p.job(root, opts.Stages)
	if len(p.errs) > 0 {
		slices.SortStableFunc(p.errs, func(a, b *SyntaxError) int {
			if a.Line != b.Line {
				return a.Line - b.Line
			}
			return a.Column - b.Column
		})
		errs := make([]error, len(p.errs))
		for i, e := range p.errs {
			errs[i] = e
		}
		return nil, fmt.Errorf("job: %w", errors.Join(errs...))
	}
	return j, nil
}

type parser struct {
	file  string
	errs  []*SyntaxError
	nodes int
}

const maxErrors = 20

func (p *parser) fail(pos position, format string, args ...any) {
	if len(p.errs) < maxErrors {
		p.errs = append(p.errs, &SyntaxError{File: p.file, Line: pos.line, Column: pos.column, Text: fmt.Sprintf(format, args...)})
	}
}

// follow resolves aliases, and bounds how much is made of a small file with many.
func (p *parser) follow(n *yaml.Node) *yaml.Node {
	for i := 0; n.Kind == yaml.AliasNode && i < maxDepth; i++ {
		n = n.Alias
	}
	if p.nodes++; p.nodes == maxNodes {
		p.fail(at(n), "the file has too many values, those behind aliases included")
	}
	return n
}

// mapping is a mapping whose keys were checked.
type mapping struct {
	p      *parser
	what   string
	pos    position
	keys   map[string]*yaml.Node
	fields map[string]*yaml.Node
}

// mapping reads a mapping; keys that are not among the known ones are errors. known nil: all.
func (p *parser) mapping(n *yaml.Node, what string, known ...string) (*mapping, bool) {
	n = p.follow(n)
	if n.Kind != yaml.MappingNode {
		p.fail(at(n), "%s has to be a mapping of keys to values", what)
		return nil, false
	}
	m := &mapping{p: p, what: what, pos: at(n), keys: map[string]*yaml.Node{}, fields: map[string]*yaml.Node{}}
	if p.nodes > maxNodes {
		return m, false
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := p.follow(n.Content[i]), n.Content[i+1]
		switch {
		case k.Kind != yaml.ScalarNode:
			p.fail(at(k), "a key of %s has to be a word", what)
			continue
		case m.keys[k.Value] != nil:
			p.fail(at(k), "the key %q of %s is there twice", k.Value, what)
			continue
		case known != nil && !slices.Contains(known, k.Value):
			p.fail(at(k), "unknown key %q of %s: known are %s", k.Value, what, strings.Join(known, ", "))
			continue
		}
		m.keys[k.Value] = k
		if v = p.follow(v); v.Kind != yaml.ScalarNode || v.Tag != "!!null" {
			m.fields[k.Value] = v
		}
	}
	return m, true
}

func (m *mapping) has(key string) bool { return m.fields[key] != nil }

// where is the position of a key's value, or of the mapping.
func (m *mapping) where(key string) position {
	if n := m.fields[key]; n != nil {
		return at(n)
	}
	return m.pos
}

// text is a key's value, "" if it is not there.
func (m *mapping) text(key string) string {
	n := m.fields[key]
	if n == nil {
		return ""
	}
	return m.p.scalar(n, fmt.Sprintf("%q of %s", key, m.what))
}

// required is text that has to be there.
func (m *mapping) required(key string) string {
	s := m.text(key)
	if s == "" && (!m.has(key) || m.fields[key].Kind == yaml.ScalarNode) {
		m.p.fail(m.where(key), "%s needs %q", m.what, key)
	}
	return s
}

func (m *mapping) boolean(key string) bool {
	s := m.text(key)
	switch strings.ToLower(s) {
	case "true", "yes", "on":
		return true
	case "", "false", "no", "off":
		return false
	}
	m.p.fail(m.where(key), "%q of %s has to be true or false", key, m.what)
	return false
}

// list is the elements of a key's value.
func (m *mapping) list(key string) []*yaml.Node {
	n := m.fields[key]
	if n == nil {
		return nil
	}
	if n.Kind != yaml.SequenceNode {
		m.p.fail(at(n), "%q of %s has to be a list", key, m.what)
		return nil
	}
	if m.p.nodes > maxNodes {
		return nil
	}
	return n.Content
}

func (m *mapping) texts(key string) []string {
	var all []string
	for _, n := range m.list(key) {
		all = append(all, m.p.scalar(m.p.follow(n), fmt.Sprintf("an element of %q of %s", key, m.what)))
	}
	return all
}

// words is a list, or a text of several words.
func (m *mapping) words(key string) []string {
	if n := m.fields[key]; n != nil && n.Kind == yaml.ScalarNode {
		return strings.Fields(m.text(key))
	}
	return m.texts(key)
}

func (p *parser) scalar(n *yaml.Node, what string) string {
	if n.Kind != yaml.ScalarNode {
		p.fail(at(n), "%s has to be a text", what)
		return ""
	}
	if strings.IndexByte(n.Value, 0) >= 0 {
		p.fail(at(n), "%s contains a NUL byte", what)
		return ""
	}
	return n.Value
}

// environment is a mapping, or a list of mappings, of names to values.
func (m *mapping) environment(key string) []variable {
	n := m.fields[key]
	if n == nil {
		return nil
	}
	parts := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode {
		parts = n.Content
	}
	var all []variable
	for _, part := range parts {
		vars, ok := m.p.mapping(part, fmt.Sprintf("%q of %s", key, m.what))
		if !ok {
			continue
		}
		for name, k := range vars.keys {
			if !isVariable(name) {
				m.p.fail(at(k), "%q is not a name for a variable: it has to be of letters, digits and _", name)
			}
			all = append(all, variable{name, vars.text(name)})
		}
	}
	slices.SortStableFunc(all, func(a, b variable) int { return strings.Compare(a.name, b.name) })
	return all
}

// isVariable reports whether a shell could export it.
func isVariable(name string) bool {
	for i, r := range name {
		if !(r == '_' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || i > 0 && r >= '0' && r <= '9') {
			return false
		}
	}
	return name != ""
}

func (p *parser) job(root *yaml.Node, predefined []*Stage) *Job {
	m, ok := p.mapping(root, "the job", "name", "version", "environment", "sources", "secrets", "stages", "sequence")
	if !ok {
		return nil
	}
	j := &Job{Name: m.required("name"), Version: m.text("version"), Secrets: map[string]string{}, secrets: map[string]position{}}
	if j.Version == "" {
		j.Version = defaultVersion
	}
	if n := m.fields["environment"]; n != nil {
		j.Environment = p.hostEnvironment(n)
	}
	for _, n := range m.list("sources") {
		j.addSource(p, n)
	}
	if n := m.fields["secrets"]; n != nil {
		if secrets, ok := p.mapping(n, "the secrets"); ok {
			size := 0
			for name := range secrets.keys {
				j.Secrets[name] = secrets.text(name)
				j.secrets[name] = secrets.where(name)
				size += len(j.Secrets[name])
			}
			if size > maxSecrets {
				p.fail(secrets.pos, "the secrets have more than %d bytes", maxSecrets)
			}
		}
	}
	for _, n := range m.list("stages") {
		if s := p.stage(n); s != nil {
			if other := j.stage(s.Name); other != nil && s.Name != "" {
				p.fail(s.pos, "the stage %q is already defined at line %d", s.Name, other.pos.line)
				continue
			}
			j.Stages = append(j.Stages, s)
		}
	}
	if len(m.list("sequence")) == 0 {
		p.fail(m.where("sequence"), `the job needs a "sequence" with at least one stage`)
	}
	p.sequence(j, m.list("sequence"), predefined)
	return j
}

const defaultVersion = "1.0.0"

func (p *parser) hostEnvironment(n *yaml.Node) (env provisioner.Environment) {
	m, ok := p.mapping(n, "the environment", "os", "repos", "packages", "groups")
	if !ok {
		return env
	}
	env.OS = m.text("os")
	env.Packages = m.texts("packages")
	for i, name := range env.Packages {
		if name == "" || strings.HasPrefix(name, "-") || strings.ContainsAny(name, " \t\n") {
			p.fail(at(p.follow(m.list("packages")[i])), "%q is not the name of a package", name)
		}
	}
	for i, name := range m.texts("groups") {
		if name == "" || strings.HasPrefix(name, "-") || strings.ContainsAny(name, "\t\n") {
			p.fail(at(p.follow(m.list("groups")[i])), "%q is not the name of a group", name)
		}
		env.Packages = append(env.Packages, "@"+strings.TrimPrefix(name, "@"))
	}
	for _, n := range m.list("repos") {
		r, ok := p.mapping(n, "a repository", "url", "distribution", "components", "key_id", "key_url", "key")
		if !ok {
			continue
		}
		env.Repositories = append(env.Repositories, provisioner.Repository{
			URL:          r.required("url"),
			Distribution: r.text("distribution"),
			Components:   r.words("components"),
			KeyID:        r.text("key_id"),
			KeyURL:       r.text("key_url"),
			Key:          r.text("key"),
		})
	}
	return env
}

// addSource adds a source, or what it has more than an earlier one with the same URL to that.
func (j *Job) addSource(p *parser, n *yaml.Node) {
	m, ok := p.mapping(n, "a source", "type", "url", "branch", "token")
	if !ok {
		return
	}
	s := Source{Type: m.required("type"), URL: m.required("url"), Branch: m.text("branch"), Token: m.text("token")}
	if s.Type != "" && s.Type != "git" {
		p.fail(m.where("type"), "unknown type of source %q: known is git", s.Type)
	}
	if !strings.Contains(s.URL, "%{") && s.URL != "" {
		if _, err := parseGitURL(s.URL, s.Token != ""); err != nil {
			p.fail(m.where("url"), "%v", err)
		}
	}
	for i, other := range j.Sources {
		if strings.TrimSuffix(other.URL, ".git") == strings.TrimSuffix(s.URL, ".git") {
			if s.Branch != "" {
				j.Sources[i].Branch = s.Branch
			}
			if s.Token != "" {
				j.Sources[i].Token = s.Token
			}
			return
		}
	}
	j.Sources = append(j.Sources, s)
}

func (p *parser) stage(n *yaml.Node) *Stage {
	m, ok := p.mapping(n, "a stage", "name", "version", "steps")
	if !ok {
		return nil
	}
	s := &Stage{Name: m.required("name"), Version: m.text("version"), pos: m.pos}
	if s.Version == "" {
		s.Version = defaultVersion
	}
	if len(m.list("steps")) == 0 {
		p.fail(m.where("steps"), `the stage %q needs "steps", at least one`, s.Name)
	}
	for _, n := range m.list("steps") {
		if step := p.step(n); step != nil {
			s.Steps = append(s.Steps, step)
		}
	}
	return s
}

func (p *parser) step(n *yaml.Node) *Step {
	any, ok := p.mapping(n, "a step")
	if !ok {
		return nil
	}
	name := any.required("action")
	kind, ok := actions[name]
	if !ok {
		if name != "" {
			p.fail(any.where("action"), "unknown action %q: known are %s", name, strings.Join(actionNames, ", "))
		}
		return nil
	}
	m, ok := p.mapping(n, fmt.Sprintf("the action %q", name), append([]string{"action"}, kind.keys...)...)
	if !ok {
		return nil
	}
	return &Step{Action: name, Line: m.pos.line, act: kind.parse(m)}
}

func (p *parser) sequence(j *Job, nodes []*yaml.Node, predefined []*Stage) {
	find := func(name, version string, pos position) *Stage {
		s := j.stage(name)
		for _, other := range predefined {
			if s == nil && other.Name == name && (version == "" || other.Version == version) {
				s = other
			}
		}
		switch {
		case name == "":
		case s == nil:
			p.fail(pos, "the stage %q is not defined", name)
		case version != "" && s.Version != version:
			p.fail(pos, "the stage %q has version %s, not %s", name, s.Version, version)
		}
		return s
	}
	for _, n := range nodes {
		m, ok := p.mapping(n, "an entry of the sequence", "stage", "version", "on_success", "on_failure", "only_if", "not_if", "fail_if")
		if !ok {
			continue
		}
		e := &Entry{
			OnSuccess: m.text("on_success"), OnFailure: m.text("on_failure"),
			OnlyIf: m.condition("only_if"), NotIf: m.condition("not_if"), FailIf: m.condition("fail_if"),
			pos: m.where("stage"), successPos: m.where("on_success"), failurePos: m.where("on_failure"),
		}
		name := m.required("stage")
		if e.Stage = find(name, m.text("version"), m.where("stage")); e.Stage == nil {
			continue
		}
		if i := j.index(name); i >= 0 {
			p.fail(e.pos, "the stage %q is already in the sequence, at line %d: it would run in a circle", name, j.Sequence[i].pos.line)
			continue
		}
		j.Sequence = append(j.Sequence, e)
	}
	j.listed = len(j.Sequence)
	for _, e := range j.Sequence[:j.listed] {
		for _, h := range []struct {
			name string
			pos  position
		}{{e.OnSuccess, e.successPos}, {e.OnFailure, e.failurePos}} {
			if h.name == "" || j.index(h.name) >= 0 {
				continue
			}
			if s := find(h.name, "", h.pos); s != nil {
				j.Sequence = append(j.Sequence, &Entry{Stage: s, pos: h.pos})
			}
		}
	}
	p.circles(j)
}

// circles refuses a sequence in which a stage could run again.
func (p *parser) circles(j *Job) {
	const (
		entered = 1
		left    = 2
	)
	state := make([]int, len(j.Sequence))
	var walk func(i int, way []string)
	walk = func(i int, way []string) {
		state[i] = entered
		e := j.Sequence[i]
		way = append(way, e.Stage.Name)
		for _, success := range []bool{true, false} {
			n := j.next(i, success)
			switch {
			case n < 0 || state[n] == left:
			case state[n] == entered:
				pos := e.pos
				if success && e.OnSuccess != "" {
					pos = e.successPos
				} else if !success {
					pos = e.failurePos
				}
				name := j.Sequence[n].Stage.Name
				p.fail(pos, "the sequence runs in a circle: %s", strings.Join(append(way[slices.Index(way, name):len(way):len(way)], name), " → "))
			default:
				walk(n, way)
			}
		}
		state[i] = left
	}
	for i := range j.Sequence {
		if state[i] == 0 {
			walk(i, nil)
		}
	}
}
