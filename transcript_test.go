package transport_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	lxd "github.com/canonical/lxd/client"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
	"github.com/lxdtransport/transport/lxdtest"
)

var update = flag.Bool("update", false, "record testdata/transcripts anew, with the LXD that the environment names")

// recordings has a directory for every server and in it a file for every command.
const recordings = "testdata/transcripts"

// dialogue is a command, or what is done with files, whose transcript is kept.
type dialogue struct {
	name   string
	cmd    transport.Command
	files  func(ctx context.Context, host transport.Transport, stdout io.Writer) error // instead of cmd, in the directory exchanged
	on     string                                                                      // "": an instance that is running; stopped; nobody
	typed  bool                                                                        // Stdin is a pipe that then writes to
	then   func(p transport.Process, in io.Writer, cancel func()) error                // called when "ready" stands on stdout
	onlyOn string                                                                      // the fake needs this system for it
}

// A terminal lingers until its output has arrived, because LXD 5.0 may lose what is written just before the end.
var dialogues = []dialogue{
	{name: "true", cmd: transport.Command{Args: []string{"true"}}},
	{name: "outputs", cmd: sh(`echo out; echo err >&2`)},
	{name: "exit-3", cmd: sh(`echo out; exit 3`)},
	{name: "exit-126", cmd: sh(`exit 126`)},
	{name: "exit-127", cmd: sh(`exit 127`)},
	{name: "not-found", cmd: transport.Command{Args: []string{"/no/such/command"}}},
	{name: "not-executable", cmd: transport.Command{Args: []string{"/tmp"}}},
	{name: "cat", cmd: transport.Command{Args: []string{"cat"}, Stdin: strings.NewReader("one\ntwo\x00\xff")}},
	{name: "cat-nothing", cmd: transport.Command{Args: []string{"cat"}}},
	{name: "environment", cmd: transport.Command{Args: transport.Shell(`echo "$A $1"`, "a b"), Env: map[string]string{"A": "x y"}}},
	{name: "terminal", onlyOn: "linux", typed: true, then: func(_ transport.Process, in io.Writer, _ func()) error {
		_, err := io.WriteString(in, "go on\n")
		return err
	}, cmd: transport.Command{Args: transport.Shell(`stty -echo; stty size; echo ready; read line; exit 4`), TTY: &transport.TTY{Size: transport.TerminalSize{Cols: 100, Rows: 30}}}},
	{name: "term", cmd: sh(`echo ready; exec sleep 1000`), then: func(p transport.Process, _ io.Writer, _ func()) error {
		return p.Signal(transport.SIGTERM)
	}},
	{name: "kill", cmd: sh(`echo ready; exec sleep 1000`), then: func(p transport.Process, _ io.Writer, _ func()) error {
		return p.Signal(transport.SIGKILL)
	}},
	{name: "cancelled", cmd: patient(sh(`trap "" TERM; echo ready; exec sleep 1000`)), then: func(_ transport.Process, _ io.Writer, cancel func()) error {
		cancel()
		return nil
	}},
	{name: "upload", files: func(ctx context.Context, host transport.Transport, stdout io.Writer) error {
		name := exchanged + "/new directory/file"
		if err := host.Upload(ctx, name, strings.NewReader("first\n"), &transport.UploadOptions{MkdirAll: true, Mode: 0o600}); err != nil {
			return err
		}
		when := time.Unix(1_000_000_000, 0)
		if err := host.Upload(ctx, name, strings.NewReader("the second\x00\xff"), &transport.UploadOptions{ModTime: when}); err != nil {
			return err
		}
		return host.Download(ctx, name, stdout, nil)
	}},
	{name: "upload-that-fails", files: func(ctx context.Context, host transport.Transport, _ io.Writer) error {
		return host.Upload(ctx, exchanged+"/file", io.MultiReader(strings.NewReader("a part"), iotest.ErrReader(errOfSource)), nil)
	}},
	{name: "upload-to-nowhere", files: func(ctx context.Context, host transport.Transport, _ io.Writer) error {
		return host.Upload(ctx, exchanged+"/there/is/none", strings.NewReader("lost"), nil)
	}},
	{name: "download-nothing", files: func(ctx context.Context, host transport.Transport, stdout io.Writer) error {
		return host.Download(ctx, exchanged+"/none", stdout, nil)
	}},
	{name: "download-a-directory", files: func(ctx context.Context, host transport.Transport, stdout io.Writer) error {
		return host.Download(ctx, exchanged, stdout, nil)
	}},
	{name: "download-a-part", files: func(ctx context.Context, host transport.Transport, stdout io.Writer) error {
		if err := host.Upload(ctx, exchanged+"/part", strings.NewReader("0123456789abcdef"), nil); err != nil {
			return err
		}
		if err := host.Download(ctx, exchanged+"/part", stdout, &transport.DownloadOptions{Offset: 10}); err != nil {
			return err
		}
		return host.Download(ctx, exchanged+"/part", stdout, &transport.DownloadOptions{Limit: 15})
	}},
	{name: "files-of-nobody", on: "nobody", files: func(ctx context.Context, host transport.Transport, stdout io.Writer) error {
		return host.Download(ctx, exchanged+"/none", stdout, nil)
	}},
	{name: "no-such-instance", on: "nobody", cmd: transport.Command{Args: []string{"true"}}},
	{name: "stopped", on: "stopped", cmd: transport.Command{Args: []string{"true"}}},
}

// exchanged is the directory of the instance in which files are made, anew for each dialogue.
const exchanged = "/tmp/transcript"

var errOfSource = errors.New("the source's own")

// patient makes a command be killed soon after its context has ended.
func patient(cmd transport.Command) transport.Command {
	cmd.WaitDelay = 10 * time.Millisecond
	return cmd
}

// realServer is one that runs and that recordings are made of.
type realServer struct {
	socket, image string
	server        lxd.InstanceServer
	instance      func() string // one that is running
}

// realServers are those that the environment names, by their products and versions.
func realServers(t *testing.T) map[string]realServer {
	all := map[string]realServer{}
	add := func(r realServer) {
		info, _, err := r.server.GetServer()
		require.NoError(t, err)
		all[info.Environment.Server+"-"+info.Environment.ServerVersion] = r
	}
	if reallxd.Available() {
		add(realServer{
			socket: os.Getenv("TRANSPORT_LXD_SOCKET"), image: os.Getenv("TRANSPORT_LXD_IMAGE"),
			server: reallxd.Unix(t), instance: func() string { return reallxd.Instance(t) },
		})
	}
	if socket := os.Getenv("TRANSPORT_INCUS_SOCKET"); socket != "" {
		ways, instance := reallxd.Incus(t)
		add(realServer{socket: socket, image: os.Getenv("TRANSPORT_INCUS_IMAGE"), server: ways[0], instance: func() string { return instance }})
	}
	return all
}

// TestTranscripts has the transport talk to recordings of real servers, compares what the fake says with them, and, where the environment
// names an LXD or an Incus of the same version, what that says today. With -update it records.
func TestTranscripts(t *testing.T) {
	real := realServers(t)
	if *update {
		require.NotEmpty(t, real, `-update records what running servers say, and neither TRANSPORT_LXD_SOCKET nor TRANSPORT_INCUS_SOCKET names one: scripts/lxd up; eval "$(scripts/lxd env)"; scripts/incus up; eval "$(scripts/incus env)"`)
		for name, r := range real {
			record(t, filepath.Join(recordings, name), dialogues, r.recorded)
		}
	}
	dirs, err := os.ReadDir(recordings)
	require.NoError(t, err)
	require.NotEmpty(t, dirs)
	for _, dir := range dirs {
		version := versionOf(dir.Name())
		require.NotNil(t, version, "%s: lxdtest has no such server", dir.Name())
		for _, d := range dialogues {
			want := readTranscript(t, filepath.Join(recordings, dir.Name(), d.name+".txt"))
			t.Run(dir.Name()+"/"+d.name, func(t *testing.T) {
				t.Run("replayed", func(t *testing.T) {
					t.Parallel()
					replay(t, d, want)
				})
				t.Run("fake", func(t *testing.T) {
					if runtime.GOOS == "windows" || d.onlyOn != "" && d.onlyOn != runtime.GOOS {
						t.Skip("the fake runs this machine's commands, and this one needs another")
					}
					t.Parallel()
					same(t, want, onFakeServer(t, d, *version))
				})
				if r, ok := real[dir.Name()]; ok && !*update {
					t.Run("real", func(t *testing.T) {
						t.Parallel()
						same(t, want, r.recorded(t, d))
					})
				}
			})
		}
	}
}

func versionOf(dir string) *lxdtest.Version {
	for _, v := range lxdtest.Versions() {
		if strings.ToLower(strings.ReplaceAll(v.Name, " ", "-")) == dir {
			return &v
		}
	}
	return nil
}

// transcript is what was said, and what the caller got.
type transcript struct {
	verdict, stdout, stderr string
	events                  []event
}

func same(t *testing.T, want, got transcript) {
	t.Helper()
	assert.Equal(t, want.result(), got.result())
	assert.Equal(t, perConnection(want.events), perConnection(got.events), "expected is the recording")
}

// result is the header of a file.
func (r transcript) result() string {
	return fmt.Sprintf("verdict: %s\nstdout: %s\nstderr: %s", r.verdict, quote(r.stdout), quote(r.stderr))
}

// record writes a file for each dialogue into a directory of recordings. One that says the same as before stays as it is: the order of
// lines on different connections is chance.
func record(t *testing.T, dir string, dialogues []dialogue, on func(*testing.T, dialogue) transcript) {
	t.Helper()
	require.NoError(t, os.MkdirAll(dir, 0o755))
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	old := map[string]bool{}
	for _, f := range files {
		name := strings.TrimSuffix(f.Name(), ".txt")
		if !slices.ContainsFunc(dialogues, func(d dialogue) bool { return d.name == name }) {
			require.NoError(t, os.Remove(filepath.Join(dir, f.Name())))
		}
		old[name] = true
	}
	for _, d := range dialogues {
		tr, file := on(t, d), filepath.Join(dir, d.name+".txt")
		if old[d.name] {
			if before := readTranscript(t, file); before.result() == tr.result() && perConnection(before.events) == perConnection(tr.events) {
				continue
			}
		}
		var b bytes.Buffer
		fmt.Fprintf(&b, "# %s, recorded by: go test -run TestTranscripts . -update\n%s\n\n", filepath.Base(dir), tr.result())
		for _, e := range tr.events {
			fmt.Fprintln(&b, e)
		}
		require.NoError(t, os.WriteFile(file, b.Bytes(), 0o644))
	}
}

// TestRecordingAgain: what is recorded anew differs only where the server says something else.
func TestRecordingAgain(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the fake runs this machine's commands")
	}
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "lxd-5.0.2")
	on := func(t *testing.T, d dialogue) transcript { return onFakeServer(t, d, lxdtest.LXD50) }
	contents := func() map[string]string {
		all := map[string]string{}
		files, err := os.ReadDir(dir)
		require.NoError(t, err)
		for _, f := range files {
			b, err := os.ReadFile(filepath.Join(dir, f.Name()))
			require.NoError(t, err)
			all[f.Name()] = string(b)
		}
		return all
	}
	some := slices.DeleteFunc(slices.Clone(dialogues), func(d dialogue) bool {
		return !slices.Contains([]string{"outputs", "exit-127", "cat", "term", "stopped"}, d.name)
	})
	require.Len(t, some, 5)
	record(t, dir, some, on)
	first := contents()
	require.Len(t, first, 5)
	record(t, dir, some, on)
	assert.Equal(t, first, contents())

	// What is no dialogue any more goes, and what has become another is written.
	changed := some[1:]
	changed[0].cmd = sh("echo other")
	record(t, dir, changed, on)
	second := contents()
	assert.Len(t, second, 4)
	for name, text := range second {
		assert.Equal(t, name == changed[0].name+".txt", text != first[name], name)
	}
}

func readTranscript(t *testing.T, file string) transcript {
	b, err := os.ReadFile(file)
	require.NoError(t, err, "it is recorded with -update and a real LXD")
	var tr transcript
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSuffix(line, "\n")
		key, value, _ := strings.Cut(line, ":")
		switch key {
		case "verdict":
			tr.verdict = strings.TrimSpace(value)
		case "stdout", "stderr":
			text, err := strconv.Unquote(strings.TrimSpace(value))
			require.NoError(t, err, "%s: %s", file, line)
			if key == "stdout" {
				tr.stdout = text
			} else {
				tr.stderr = text
			}
		default:
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			e, err := parseEvent(line)
			require.NoError(t, err, "%s: %s", file, line)
			tr.events = append(tr.events, e)
		}
	}
	return tr
}

// recorded has a dialogue with the server.
func (r realServer) recorded(t *testing.T, d dialogue) transcript {
	t.Helper()
	instance := "nobody"
	switch d.on {
	case "":
		instance = r.instance()
	case "stopped":
		instance = reallxd.CreateFrom(t, r.server, r.image)
		defer reallxd.Delete(t, r.server, instance)
	}
	return recorded(t, d, r.socket, instance)
}

func onFakeServer(t *testing.T, d dialogue, version lxdtest.Version) transcript {
	t.Helper()
	s := lxdtest.NewUnstartedServer()
	s.Version = version
	s.Handler = lxdtest.LocalCommands("")
	s.AddInstance(lxdtest.Instance{Name: "c1"})
	s.AddInstance(lxdtest.Instance{Name: "stopped", Status: lxdtest.Stopped})
	s.Start()
	t.Cleanup(s.Close)
	instance := d.on
	if instance == "" {
		instance = "c1"
	}
	return recorded(t, d, s.Socket, instance)
}

func recorded(t *testing.T, d dialogue, upstream, instance string) transcript {
	t.Helper()
	if d.files != nil && d.on == "" {
		host, err := transport.NewLXD(offline(t, upstream), instance, nil)
		require.NoError(t, err)
		again := transport.Shell(`rm -rf "$1" && mkdir -p "$1"`, exchanged[1:]) // relative: the fake's commands see this machine's root
		require.NoError(t, host.Exec(soon(t), transport.Command{Args: again, Dir: "/"}))
		require.NoError(t, host.Close())
	}
	r := newRecorder(t, upstream, instance)
	socket, stop := listen(t, r.serve)
	tr := d.run(t, socket, instance)
	stop()
	tr.events = r.events
	return tr
}

func replay(t *testing.T, d dialogue, want transcript) {
	p := newPlayer(t, soon(t), want.events)
	socket, stop := listen(t, p.serve)
	got := d.run(t, socket, "INSTANCE")
	stop()
	assert.Equal(t, want.result(), got.result())
	p.complete()
}

// run runs the command, or does what is to be done with files.
func (d dialogue) run(t *testing.T, socket, instance string) (tr transcript) {
	t.Helper()
	host, err := transport.NewLXD(offline(t, socket), instance, nil)
	require.NoError(t, err)
	transport.NoReaping(host)
	defer func() { assert.NoError(t, host.Close()) }()
	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	cmd, stdout, stderr := d.cmd, newPrompt(), new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if r, ok := cmd.Stdin.(*strings.Reader); ok {
		again := *r // every run reads it from its beginning
		cmd.Stdin = &again
	}
	in, typing := io.Pipe()
	defer typing.Close()
	if d.typed {
		cmd.Stdin = in
	}
	if d.files != nil {
		tr.verdict = "success"
		if err := d.files(ctx, host, stdout); err != nil {
			tr.verdict = verdictOf(err)
		}
		tr.stdout = stdout.buf.String()
		return tr
	}
	p, err := host.Start(ctx, cmd)
	if err == nil && d.then != nil {
		select {
		case <-stdout.ready:
			assert.NoError(t, d.then(p, typing, cancel))
		case <-ctx.Done():
			assert.Fail(t, "the command has not become ready", "%q", stdout.buf.String())
		}
	}
	if err == nil {
		err = p.Wait()
	}
	return transcript{verdict: verdictOf(err), stdout: stdout.buf.String(), stderr: stderr.String()}
}

// prompt is a buffer that says when "ready" stands in it.
type prompt struct {
	buf   bytes.Buffer
	ready chan struct{}
	once  sync.Once
}

func newPrompt() *prompt { return &prompt{ready: make(chan struct{})} }

func (p *prompt) Write(b []byte) (int, error) {
	defer func() {
		if bytes.Contains(p.buf.Bytes(), []byte("ready")) {
			p.once.Do(func() { close(p.ready) })
		}
	}()
	return p.buf.Write(b)
}

// verdictOf names what an error matches.
func verdictOf(err error) string {
	var all []string
	if code, exited := transport.ExitCode(err); exited {
		all = append(all, fmt.Sprintf("exit %d", code))
	}
	for _, known := range []error{transport.ErrNotStarted, transport.ErrOutputLost, transport.ErrNotRunning, transport.ErrNoHost, transport.ErrUnauthorized, context.Canceled,
		fs.ErrNotExist, fs.ErrPermission, syscall.EISDIR, transport.ErrLimit, errOfSource} {
		if errors.Is(err, known) {
			all = append(all, strings.TrimPrefix(known.Error(), "transport: "))
		}
	}
	if all == nil {
		return "other: " + err.Error()
	}
	return strings.Join(all, ", ")
}
