//lint:file-ignore ST1005 the errors are in the words of LXD, which begin with a capital

package lxdtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// An Instance is a container or a virtual machine to be added with [Server.AddInstance].
type Instance struct {
	Name      string
	Project   string // "": default
	Type      Type
	Status    Status
	Ephemeral bool // deleted when it is stopped
	Config    map[string]string

	// Handler is the instance's commands. nil: Server.Handler.
	Handler Handler

	// Root is the directory that stands for the instance's /. "": an empty temporary one
	// with a /root and a /tmp, deleted by Close. No file outside of it is touched.
	Root string

	// NoAgent is for a virtual machine whose agent does not run.
	NoAgent bool
}

// Type is a kind of instance.
type Type string

const (
	Container Type = "container" // the default
	VM        Type = "virtual-machine"
)

// Status is what an instance does.
type Status string

const (
	Running Status = "Running" // the default
	Stopped Status = "Stopped"
	Frozen  Status = "Frozen"
	Error   Status = "Error"
)

func (s Status) code() int {
	switch s {
	case Stopped:
		return codeStopped
	case Frozen:
		return codeFrozen
	case Error:
		return codeError
	}
	return codeRunning
}

// instance is an Instance on the server. The fields of Instance do not change, but for
// those that mu guards.
type instance struct {
	Instance
	s       *Server
	tree    *tree
	created time.Time
	model   *instance // what it is being copied from

	mu     sync.Mutex // guards Status, Config, image and used
	image  string
	used   time.Time
	stops  chan struct{} // closed and replaced whenever open SFTP sessions are ended
	sftp   int           // open sessions
	halted *sync.Cond    // sftp has become 0
}

// AddInstance adds an instance. It panics if there is one of that name already, or if the
// directory cannot be had.
func (s *Server) AddInstance(i Instance) {
	if s.isClosed() {
		panic("lxdtest: AddInstance: the server has been closed")
	}
	if _, err := s.add(i, ""); err != nil {
		panic("lxdtest: " + err.Error())
	}
}

func (s *Server) add(i Instance, image string) (*instance, error) {
	if i.Project == "" {
		i.Project = "default"
	}
	if i.Type == "" {
		i.Type = Container
	}
	if i.Status == "" {
		i.Status = Running
	}
	i.Config = maps.Clone(i.Config)
	if i.Config == nil {
		i.Config = map[string]string{}
	}
	key := i.Project + "/" + i.Name
	s.mu.Lock()
	_, exists := s.instances[key]
	s.mu.Unlock()
	if exists {
		return nil, fmt.Errorf("Instance %q already exists", i.Name)
	}
	fresh := i.Root == ""
	if fresh {
		dir, err := os.MkdirTemp(s.tempDir(), "root")
		if err != nil {
			return nil, err
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			return nil, err
		}
		i.Root = dir
	}
	t, err := openTree(i.Root)
	if err != nil {
		return nil, err
	}
	if fresh {
		for path, mode := range map[string]os.FileMode{"/root": 0o700, "/tmp": 0o777 | os.ModeSticky, "/etc": 0o755} {
			if err := t.mkdir(path, mode); err != nil {
				return nil, err
			}
		}
	}
	now := time.Now().UTC()
	n := &instance{Instance: i, s: s, tree: t, created: now, used: now, image: image, stops: make(chan struct{})}
	n.halted = sync.NewCond(&n.mu)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, exists := s.instances[key]; exists {
		t.close()
		return nil, fmt.Errorf("Instance %q already exists", i.Name)
	}
	s.instances[key] = n
	return n, nil
}

// SetStatus changes what an instance does, as an administrator would. What runs in an instance that
// is stopped is killed.
func (s *Server) SetStatus(project, name string, status Status) {
	if i := s.findInstance(project, name); i != nil {
		i.set(status)
	}
}

func (i *instance) set(status Status) {
	i.mu.Lock()
	i.Status = status
	i.mu.Unlock()
	i.s.mu.Lock()
	execs := slices.Clone(i.s.execs)
	i.s.mu.Unlock()
	for _, x := range execs {
		if x.instance != i {
			continue
		}
		switch p := x.running(); {
		case status == Stopped:
			x.stopped()
		case p == nil:
		case status == Frozen:
			p.freeze()
		case status == Running:
			p.thaw()
		}
	}
}

func (s *Server) findInstance(project, name string) *instance {
	if project == "" {
		project = "default"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.instances[project+"/"+name]
}

// instanceOf finds the instance that a request is about, or answers that there is none.
func (s *Server) instanceOf(w http.ResponseWriter, r *http.Request) (*instance, bool) {
	name, p := r.PathValue("name"), project(r)
	if strings.Contains(name, "/") {
		s.fail(w, 400, "Invalid instance name")
		return nil, false
	}
	i := s.findInstance(p, name)
	if i != nil {
		return i, true
	}
	if !s.hasProject(p) {
		s.fail(w, 404, s.Version.Texts.ProjectNotFound)
		return nil, false
	}
	s.fail(w, 404, fill(s.Version.Texts.InstanceNotFound, "{name}", name, "{project}", p))
	return nil, false
}

// hasProject reports whether there is an instance in it; default always exists.
func (s *Server) hasProject(p string) bool {
	if p == "default" {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range s.instances {
		if i.Project == p {
			return true
		}
	}
	return false
}

func (i *instance) currentStatus() Status {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.Status
}

func (i *instance) handler() Handler {
	if i.Handler != nil {
		return i.Handler
	}
	return i.s.Handler
}

func (i *instance) url() string { return "/1.0/instances/" + i.Name }

// environment is what LXD makes of the environment in a request.
func (i *instance) environment(req execRequest) map[string]string {
	env := maps.Clone(req.Environment)
	if env == nil {
		env = map[string]string{}
	}
	preset := func(k, v string) {
		if _, ok := env[k]; !ok {
			env[k] = v
		}
	}
	i.mu.Lock()
	for k, v := range i.Config {
		if name, ok := strings.CutPrefix(k, "environment."); ok {
			preset(name, v)
		}
	}
	i.mu.Unlock()
	path := defaultPath
	if info, err := i.tree.stat("/snap/bin"); err == nil && info.IsDir() {
		path += ":/snap/bin"
	}
	preset("PATH", path)
	preset("LANG", "C.UTF-8")
	if req.User == 0 {
		preset("HOME", "/root")
		preset("USER", "root")
	}
	return env
}

// instanceJSON is an instance on the wire.
type instanceJSON struct {
	Architecture    string            `json:"architecture"`
	Config          map[string]string `json:"config"`
	Devices         map[string]any    `json:"devices"`
	Ephemeral       bool              `json:"ephemeral"`
	Profiles        []string          `json:"profiles"`
	Stateful        bool              `json:"stateful"`
	Description     string            `json:"description"`
	CreatedAt       time.Time         `json:"created_at"`
	ExpandedConfig  map[string]string `json:"expanded_config"`
	ExpandedDevices map[string]any    `json:"expanded_devices"`
	Name            string            `json:"name"`
	Status          string            `json:"status"`
	StatusCode      int               `json:"status_code"`
	LastUsedAt      time.Time         `json:"last_used_at"`
	Location        string            `json:"location"`
	Type            string            `json:"type"`
	Project         string            `json:"project"`
}

type fullJSON struct {
	instanceJSON
	Backups   []any     `json:"backups"`
	State     stateJSON `json:"state"`
	Snapshots []any     `json:"snapshots"`
}

type stateJSON struct {
	Status     string         `json:"status"`
	StatusCode int            `json:"status_code"`
	Disk       map[string]any `json:"disk"`
	Memory     map[string]int `json:"memory"`
	Network    map[string]any `json:"network"`
	PID        int            `json:"pid"`
	Processes  int            `json:"processes"`
	CPU        map[string]int `json:"cpu"`
}

func (i *instance) render() instanceJSON {
	i.mu.Lock()
	defer i.mu.Unlock()
	config := maps.Clone(i.Config)
	if i.image != "" {
		config["volatile.base_image"] = i.image
	}
	config["volatile.last_state.power"] = "STOPPED"
	if i.Status != Stopped {
		config["volatile.last_state.power"] = "RUNNING"
	}
	return instanceJSON{
		Architecture: "x86_64", Config: config, Devices: map[string]any{}, Ephemeral: i.Ephemeral, Profiles: []string{"default"},
		CreatedAt: i.created, ExpandedConfig: config, ExpandedDevices: map[string]any{"root": rootDevice}, Name: i.Name,
		Status: string(i.Status), StatusCode: i.Status.code(), LastUsedAt: i.used, Location: "none", Type: string(i.Type), Project: i.Project,
	}
}

var rootDevice = map[string]string{"path": "/", "pool": "default", "type": "disk"}

func (i *instance) state() stateJSON {
	status := i.currentStatus()
	st := stateJSON{
		Status: string(status), StatusCode: status.code(), Disk: map[string]any{},
		Memory: map[string]int{"usage": 0, "usage_peak": 0, "swap_usage": 0, "swap_usage_peak": 0}, CPU: map[string]int{"usage": 0},
	}
	if status != Stopped {
		st.PID, st.Processes, st.Network = 1000, 1, map[string]any{}
	}
	return st
}

// kinds are the types that an address stands for: /1.0/containers lists only containers.
func kinds(r *http.Request) []Type {
	switch {
	case strings.HasPrefix(r.URL.Path, "/1.0/containers"):
		return []Type{Container}
	case strings.HasPrefix(r.URL.Path, "/1.0/virtual-machines"):
		return []Type{VM}
	}
	return []Type{Container, VM}
}

func (s *Server) getInstances(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	all := q.Get("all-projects") == "true" || q.Get("all-projects") == "1"
	s.mu.Lock()
	list := slices.Collect(maps.Values(s.instances))
	s.mu.Unlock()
	slices.SortFunc(list, func(a, b *instance) int { return strings.Compare(a.Project+"/"+a.Name, b.Project+"/"+b.Name) })
	base := "/1.0/instances/"
	if c, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/1.0/"), "/"); c != "" {
		base = "/1.0/" + c + "/"
	}
	urls, plain, full := []string{}, []instanceJSON{}, []fullJSON{}
	for _, i := range list {
		if !all && i.Project != project(r) || !slices.Contains(kinds(r), i.Type) {
			continue
		}
		if t := q.Get("instance-type"); t != "" && t != string(i.Type) {
			continue
		}
		j := i.render()
		if !matches(j, q.Get("filter")) {
			continue
		}
		url := base + i.Name
		if i.Project != "default" {
			url += "?project=" + i.Project
		}
		urls, plain = append(urls, url), append(plain, j)
		full = append(full, fullJSON{instanceJSON: j, State: i.state()})
	}
	switch q.Get("recursion") {
	case "1":
		s.reply(w, plain)
	case "2":
		s.reply(w, full)
	default:
		s.reply(w, urls)
	}
}

var clause = regexp.MustCompile(`^\s*([\w.]+)\s+(eq|ne)\s+"?([^"]*?)"?\s*$`)

// matches understands filters of the form "name eq a and config.user.x ne b".
func matches(j instanceJSON, filter string) bool {
	if filter == "" {
		return true
	}
	for part := range strings.SplitSeq(filter, " and ") {
		m := clause.FindStringSubmatch(part)
		if m == nil {
			return false
		}
		value := ""
		switch key := m[1]; {
		case key == "name":
			value = j.Name
		case key == "status":
			value = j.Status
		case key == "type":
			value = j.Type
		case key == "project":
			value = j.Project
		case key == "description":
			value = j.Description
		case key == "ephemeral":
			value = fmt.Sprint(j.Ephemeral)
		case strings.HasPrefix(key, "config."):
			value = j.Config[strings.TrimPrefix(key, "config.")]
		}
		if strings.EqualFold(value, m[3]) != (m[2] == "eq") {
			return false
		}
	}
	return true
}

func (s *Server) getInstance(w http.ResponseWriter, r *http.Request) {
	i, ok := s.instanceOf(w, r)
	if !ok {
		return
	}
	w.Header().Set("ETag", i.etag())
	if r.URL.Query().Get("recursion") == "1" {
		s.reply(w, fullJSON{instanceJSON: i.render(), State: i.state()})
		return
	}
	s.reply(w, i.render())
}

// etag changes with what PUT can change.
func (i *instance) etag() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	b, _ := json.Marshal([]any{i.Config, i.Ephemeral})
	return sha256Hex(b)
}

func (s *Server) getState(w http.ResponseWriter, r *http.Request) {
	if i, ok := s.instanceOf(w, r); ok {
		s.reply(w, i.state())
	}
}

// getNothing is for lists that are always empty.
func (s *Server) getNothing(w http.ResponseWriter, r *http.Request) {
	if _, ok := s.instanceOf(w, r); ok {
		s.reply(w, []string{})
	}
}

// background starts an operation that is done by f, which is told who has asked for it.
func (s *Server) background(w http.ResponseWriter, r *http.Request, description string, i *instance, both bool, f func(by *requestorJSON) error) {
	op := s.newOperation(r, "task", description, i, both, nil)
	state := op.render(false)
	op.born()
	s.spawn("operation "+op.id+" ("+description+")", func() {
		if err := f(op.by); err != nil {
			op.finish(codeFailure, err.Error())
			return
		}
		op.finish(codeSuccess, "")
	})
	s.accept(w, op, state)
}

// read decodes the body of a request or answers that it cannot.
func (s *Server) read(w http.ResponseWriter, r *http.Request, v any) bool {
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = json.Unmarshal(body, v)
	}
	if err != nil {
		s.fail(w, 400, err.Error())
	}
	return err == nil
}

var validName = regexp.MustCompile(`^[A-Za-z0-9-]+$`)

// postInstance creates an instance from an image.
func (s *Server) postInstance(w http.ResponseWriter, r *http.Request) {
	var req struct {
		Name      string            `json:"name"`
		Type      Type              `json:"type"`
		Ephemeral bool              `json:"ephemeral"`
		Config    map[string]string `json:"config"`
		Profiles  []string          `json:"profiles"`
		Devices   map[string]any    `json:"devices"`
		Start     bool              `json:"start"`
		Source    struct {
			Type        string `json:"type"`
			Source      string `json:"source"`
			Alias       string `json:"alias"`
			Fingerprint string `json:"fingerprint"`
		} `json:"source"`
	}
	if !s.read(w, r, &req) {
		return
	}
	if req.Name == "" {
		req.Name = "fake-" + newSecret()[:8]
	}
	var model *instance
	if req.Source.Type == "copy" {
		model = s.findInstance(project(r), req.Source.Source)
	}
	switch {
	case r.URL.Query().Get("target") != "":
		s.fail(w, 400, "Target only allowed when clustered")
		return
	case req.Source.Type == "copy" && req.Source.Source == "":
		s.fail(w, 400, "Must specify a source instance")
		return
	case req.Source.Type == "copy" && model == nil:
		s.fail(w, 404, fmt.Sprintf("Failed to fetch instance %q in project %q: Instance not found", req.Source.Source, project(r)))
		return
	case req.Source.Type != "image" && req.Source.Type != "none" && req.Source.Type != "copy":
		s.fail(w, 400, "Unknown source type "+req.Source.Type)
		return
	case s.Version.EarlyDuplicate && s.findInstance(project(r), req.Name) != nil:
		s.fail(w, 500, fmt.Sprintf("Instance %q already exists", req.Name))
		return
	case req.Source.Type == "image" && req.Source.Alias != "" && !s.hasAlias(req.Source.Alias) && !s.Version.LateAlias:
		s.fail(w, 404, "Image alias not found")
		return
	case !validName.MatchString(req.Name):
		s.fail(w, 400, "Invalid instance name: Name can only contain alphanumeric and hyphen characters")
		return
	}
	image := req.Source.Fingerprint
	if req.Source.Alias != "" {
		image = imageFingerprint(req.Source.Alias)
	}
	wanted := Instance{Name: req.Name, Project: project(r), Type: req.Type, Status: Stopped, Ephemeral: req.Ephemeral, Config: req.Config}
	shell := &instance{Instance: wanted, s: s, model: model}
	s.background(w, r, "Creating instance", shell, true, func(by *requestorJSON) error {
		if model != nil {
			if !s.Version.CopyProfiles && len(req.Profiles) == 0 && len(req.Devices) == 0 {
				return errors.New("Failed creating instance record: Failed initialising instance: Failed getting root disk: No root device could be found")
			}
			return s.copyInstance(by, model, wanted)
		}
		unknown := image != "" && !s.hasImage(image)
		if alias := req.Source.Alias; alias != "" {
			unknown = !s.hasAlias(alias)
		}
		if unknown {
			return errors.New("Failed creating instance from image: Image not found")
		}
		i, err := s.add(wanted, image)
		if err != nil {
			return errors.New("Failed creating instance record: " + err.Error())
		}
		s.lifecycle(by, "instance-created", i, nil)
		if req.Start {
			i.set(Running)
			s.lifecycle(by, "instance-started", i, nil)
		}
		return nil
	})
}

// copyInstance makes an instance with the configuration and the files of another one. What is wanted wins.
func (s *Server) copyInstance(by *requestorJSON, model *instance, wanted Instance) error {
	model.mu.Lock()
	config, image := maps.Clone(model.Config), model.image
	model.mu.Unlock()
	maps.Copy(config, wanted.Config)
	wanted.Config, wanted.Handler, wanted.NoAgent = config, model.Handler, model.NoAgent
	i, err := s.add(wanted, image)
	if err != nil {
		return errors.New("Failed creating instance record: " + err.Error())
	}
	if err := os.CopyFS(i.Root, model.tree.root.FS()); err != nil {
		return errors.New("Failed creating instance from copy: " + err.Error())
	}
	s.lifecycle(by, "instance-created", i, nil)
	return nil
}

// putInstance changes the configuration: all of it, or with PATCH the keys that are given.
func (s *Server) putInstance(w http.ResponseWriter, r *http.Request) {
	i, ok := s.instanceOf(w, r)
	if !ok {
		return
	}
	var req struct {
		Config    map[string]string `json:"config"`
		Ephemeral bool              `json:"ephemeral"`
	}
	if tag := r.Header.Get("If-Match"); tag != "" && tag != i.etag() {
		s.fail(w, 412, "Precondition failed")
		return
	}
	if !s.read(w, r, &req) {
		return
	}
	change := func(by *requestorJSON) error {
		i.mu.Lock()
		if r.Method == "PUT" {
			i.Config = map[string]string{}
			i.Ephemeral = req.Ephemeral
		}
		for k, v := range req.Config {
			if strings.HasPrefix(k, "volatile.") {
				continue
			}
			if v == "" {
				delete(i.Config, k)
			} else {
				i.Config[k] = v
			}
		}
		i.mu.Unlock()
		s.lifecycle(by, "instance-updated", i, nil)
		return nil
	}
	if r.Method == "PATCH" {
		_ = change(s.requestorOf(r))
		s.reply(w, empty)
		return
	}
	s.background(w, r, "Updating instance", i, true, change)
}

// putState starts, stops, restarts, freezes or unfreezes.
func (s *Server) putState(w http.ResponseWriter, r *http.Request) {
	i, ok := s.instanceOf(w, r)
	if !ok {
		return
	}
	var req struct {
		Action  string `json:"action"`
		Force   bool   `json:"force"`
		Timeout int    `json:"timeout"`
	}
	if !s.read(w, r, &req) {
		return
	}
	type step struct {
		description, event string
		f                  func() error
	}
	steps := map[string]step{
		"start": {"Starting instance", "instance-started", func() error {
			if i.currentStatus() != Stopped {
				return errors.New("The instance is already running")
			}
			i.set(Running)
			return nil
		}},
		"stop": {"Stopping instance", "instance-stopped", func() error { return i.stop(req.Force) }},
		"restart": {"Restarting instance", "instance-restarted", func() error {
			if err := i.stop(req.Force); err != nil {
				return err
			}
			i.set(Running)
			return nil
		}},
		"freeze": {"Freezing instance", "instance-paused", func() error {
			if i.currentStatus() != Running {
				return errors.New("The instance is not running")
			}
			i.set(Frozen)
			return nil
		}},
		"unfreeze": {"Unfreezing instance", "instance-resumed", func() error {
			i.set(Running)
			return nil
		}},
	}
	st, ok := steps[req.Action]
	if !ok {
		s.fail(w, 400, "Unknown action: '"+req.Action+"'")
		return
	}
	s.background(w, r, st.description, i, false, func(by *requestorJSON) error {
		if err := st.f(); err != nil {
			return err
		}
		s.lifecycle(by, st.event, i, nil)
		if req.Action == "stop" && i.Ephemeral {
			s.remove(i)
			s.lifecycle(by, "instance-deleted", i, nil)
		}
		return nil
	})
}

// stop waits for SFTP sessions as the release does: with force newer ones end them.
func (i *instance) stop(force bool) error {
	if i.currentStatus() == Stopped {
		return errors.New("The instance is already stopped")
	}
	i.mu.Lock()
	if force && !i.s.Version.SFTPBlocksStops {
		i.endSessions()
	}
	for i.sftp > 0 && !i.s.isClosed() {
		i.halted.Wait()
	}
	i.mu.Unlock()
	i.set(Stopped)
	return nil
}

// endSessions ends the SFTP sessions. mu is held.
func (i *instance) endSessions() {
	close(i.stops)
	i.stops = make(chan struct{})
}

func (s *Server) deleteInstance(w http.ResponseWriter, r *http.Request) {
	i, ok := s.instanceOf(w, r)
	if !ok {
		return
	}
	if i.currentStatus() != Stopped {
		s.fail(w, 400, "Instance is running")
		return
	}
	s.background(w, r, "Deleting instance", i, true, func(by *requestorJSON) error {
		s.remove(i)
		s.lifecycle(by, "instance-deleted", i, nil)
		return nil
	})
}

func (s *Server) remove(i *instance) {
	s.mu.Lock()
	delete(s.instances, i.Project+"/"+i.Name)
	dir := s.dir
	s.mu.Unlock()
	i.tree.close()
	// A directory that the caller has given stays.
	if dir != "" && strings.HasPrefix(i.Root, dir) {
		_ = os.RemoveAll(i.Root)
	}
}
