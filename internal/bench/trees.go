//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lxdtransport/transport"
)

// small measures many small files, up and down.
func (b *bench) small(ctx context.Context) error {
	dir := filepath.Join(b.dir, "small")
	defer os.RemoveAll(dir)
	if err := makeSmall(dir); err != nil {
		return err
	}
	return b.trees(ctx, dir, treeGoals{push: 1. / 50, pull: 1. / 40, scp: 1. / 8, rsync: 1.1, bare: 1.5})
}

// source measures the source of Go's standard library and tools, up and down.
func (b *bench) source(ctx context.Context) error {
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env GOROOT: %w", err)
	}
	dir, err := filepath.EvalSymlinks(filepath.Join(string(bytes.TrimSpace(root)), "src"))
	if err != nil {
		return err
	}
	return b.trees(ctx, dir, treeGoals{push: 1. / 40, pull: 1. / 40, bare: 1.5})
}

// makeSmall makes 5,000 files of 1 to 8 KiB in 200 directories, the same ones each time.
func makeSmall(dir string) error {
	content := make([]byte, 8<<10)
	for i := range content {
		content[i] = byte(' ' + i*7%90)
	}
	for d := range 200 {
		sub := filepath.Join(dir, fmt.Sprintf("group-%d", d/20), fmt.Sprintf("dir-%d", d))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return err
		}
		for f := range 25 {
			n := 1<<10 + (d*25+f)*1237%(7<<10)
			if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file-%d.txt", f)), content[:n], 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// treeGoals are what our time may be of others'; 0: no goal.
type treeGoals struct{ push, pull, scp, rsync, bare float64 }

// A treeContestant copies trees. source is a directory, of this machine or in the instance; the copy gets its name, in a directory that exists.
type treeContestant interface {
	uploadTree(source, dir string) error
	downloadTree(source, dir string) error
}

// site is where trees are: on this machine or in the instance. It makes, examines and removes them; none of that is timed.
type site interface {
	mkdir(dir string) error
	content(dir string) (content, error)
	remove(dir string) error
}

// content is what is in a tree.
type content struct {
	Files, Dirs int
	Bytes       int64
	Sum         string // of names and contents
}

// trees measures copies of the directory local.
func (b *bench) trees(ctx context.Context, local string, goals treeGoals) error {
	server, err := connect("unix")
	if err != nil {
		return err
	}
	host, err := transport.NewLXD(server, b.instance, nil)
	if err != nil {
		return err
	}
	defer host.Close()
	dir := b.dir
	if b.ram {
		if dir, err = os.MkdirTemp("/dev/shm", "transport-bench-"); err != nil {
			return err
		}
		defer onMachine{}.remove(dir)
		if err := host.Exec(ctx, transport.Command{Args: transport.Shell("umount /root 2>/dev/null; exec mount -t tmpfs none /root")}); err != nil {
			return fmt.Errorf("tmpfs in the instance: %w", err)
		}
	}
	machine, instance := site(onMachine{}), site(inInstance{ctx, host})
	want, err := machine.content(local)
	if err != nil {
		return err
	}
	remote := "/root/bench-source/" + filepath.Base(local)
	defer func() {
		if err := instance.remove(path.Dir(remote)); err != nil {
			b.report.note("the tree in the instance goes with the instance only: %v", err)
		}
	}()
	if _, err := transport.UploadTree(ctx, host, remote, os.DirFS(local), nil); err != nil {
		return err
	}
	if got, err := instance.content(remote); err != nil {
		return err
	} else if got != want {
		return fmt.Errorf("what was uploaded is %+v and not %+v", got, want)
	}
	specs := []spec{
		{Kind: "ours", Way: "unix"}, {Kind: "ours", Way: "https"}, {Kind: "lxc", Tool: "tar"}, {Kind: "ssh", Tool: "tar", Way: gcm},
		{Kind: "ssh", Tool: "rsync", Way: gcm}, {Kind: "ssh", Tool: "scp", Way: gcm}, {Kind: "bare", Pid: b.enterable(ctx)},
		// The slow ones are last, so that the others' first rounds are close together.
		{Kind: "lxc", Tool: "file"}, {Kind: "official", Way: "unix"},
	}
	for _, way := range []string{"up", "down"} {
		t := &treeRun{bench: b, way: way, want: want, specs: specs, machine: machine, instance: instance, local: local, remote: remote, dir: dir}
		if err := t.run(ctx); err != nil {
			return err
		}
		t.judge(goals)
	}
	return nil
}

// treeRun is one tree in one direction.
type treeRun struct {
	*bench
	way               string
	want              content
	specs             []spec
	machine, instance site
	local, remote     string
	dir               string // for copies on this machine

	number     int // of the next destination
	wall, cpu  map[string]float64
	peak       map[string]float64
	impatience map[string]bool // it would have taken longer
}

// slow reports whether a contestant's one round has to do for all.
func slow(s spec) bool { return s.Kind == "official" || s.Kind == "lxc" && s.Tool == "file" }

func (t *treeRun) run(ctx context.Context) error {
	children, dismiss, err := t.hire(ctx, filepath.Base(t.local)+"-"+t.way, t.specs...)
	if err != nil {
		return err
	}
	defer dismiss()
	walls, cpus := map[string][]float64{}, map[string][]float64{}
	t.peak, t.impatience = map[string]float64{}, map[string]bool{}
	err = t.rotate(children, func(c *child) error {
		name := c.spec.String()
		if slow(c.spec) && len(walls[name]) > 0 {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		r, err := t.once(c, len(walls[name]) == 0)
		if err != nil {
			return err
		}
		walls[name] = append(walls[name], r.Wall.Seconds())
		cpus[name] = append(cpus[name], r.CPU.Seconds())
		t.peak[name] = float64(r.PeakKiB) / 1024
		return nil
	})
	if err != nil {
		return err
	}
	t.wall, t.cpu = medians(walls), medians(cpus)
	rows := [][]string{{"", "s", "ours, unix / it", "client CPU s", "ours, unix / it", "process MiB at most"}}
	for _, c := range children {
		name := c.spec.String()
		wall, size, mark := number(t.wall[name]), "", ""
		if c.spec.Kind == "ours" || c.spec.Kind == "official" {
			size = number(t.peak[name])
		}
		if t.impatience[name] {
			wall, size, mark = "> "+wall, "", "< "
		}
		rows = append(rows, []string{
			name, wall, mark + ratio(t.wall["ours, unix"], t.wall[name]), number(t.cpu[name]), ratio(t.cpu["ours, unix"], t.cpu[name]), size,
		})
	}
	t.report.table(fmt.Sprintf("tree %s %s: %d files in %d directories, %s MiB (client CPU of tar | tar: both sides')", filepath.Base(t.local), t.way, t.want.Files, t.want.Dirs, number(float64(t.want.Bytes)/(1<<20))), rows)
	return nil
}

// once gives a contestant one turn.
func (t *treeRun) once(c *child, verify bool) (r result, err error) {
	source, to, dir := t.local, t.machine, filepath.Join(t.dir, fmt.Sprintf("tree-%d", t.number))
	switch {
	case !c.spec.inInstance():
	case t.way == "up":
		to, dir = t.instance, fmt.Sprintf("/root/bench-tree-%d", t.number)
	case t.way == "down":
		source = t.remote
	}
	t.number++
	if err := to.mkdir(dir); err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, to.remove(dir)) }()
	var late atomic.Bool
	if slow(c.spec) {
		timer := time.AfterFunc(t.patience, func() {
			late.Store(true)
			c.kill()
		})
		defer timer.Stop()
	}
	r, err = c.do(task{Do: "tree-" + t.way, Dir: source, Dest: dir})
	if err != nil && late.Load() {
		name := c.spec.String()
		t.impatience[name] = true
		t.report.note("tree %s %s: %s was stopped after %v (-patience): its time is that at least", filepath.Base(t.local), t.way, name, t.patience)
		return result{Wall: t.patience}, nil
	}
	if err != nil || !verify {
		return r, err
	}
	got, err := to.content(filepath.Join(dir, filepath.Base(source)))
	if err == nil && got != t.want {
		err = fmt.Errorf("%v: the copy is %+v and not %+v", c.spec, got, t.want)
	}
	return r, err
}

func (t *treeRun) judge(g treeGoals) {
	goal := func(peer string, limit float64) {
		if t.impatience[peer] && t.wall["ours, unix"]/t.wall[peer] > limit {
			return // nobody knows: its time is more than that
		}
		if limit > 0 {
			t.report.goal(fmt.Sprintf("tree %s %s: time / that of %s", filepath.Base(t.local), t.way, peer), t.wall["ours, unix"], t.wall[peer], limit)
		}
	}
	if t.way == "up" {
		goal("lxc file push -r, pull -r", g.push)
	} else {
		goal("lxc file push -r, pull -r", g.pull)
	}
	goal("scp -r, aes128-gcm", g.scp)
	goal("rsync -a over ssh, aes128-gcm", g.rsync)
	goal("tar | tar, nsenter", g.bare)
	goal("tar | tar, this machine only", g.bare)
	for _, ours := range []string{"ours, unix", "ours, https"} {
		t.report.atMost(fmt.Sprintf("tree %s %s: %s, process MiB at most", filepath.Base(t.local), t.way, ours), t.peak[ours], maxProcess)
	}
}

// enterable is the process ID of the instance's init, if this process may enter its namespaces; otherwise 0.
func (b *bench) enterable(ctx context.Context) int {
	pid, err := b.firstProcess()
	if err == nil {
		err = command(0, nil, "nsenter", enter(pid, "true")...)
	}
	if err != nil {
		b.report.note("the bare limit is tar to tar on this machine, because the instance cannot be entered: %v", err)
		return 0
	}
	return pid
}

// firstProcess finds the instance's first process. What LXD calls its ID may be one in namespaces that LXD has to itself, so it is looked for: its parent
// is LXC's monitor, which tells what it is.
func (b *bench) firstProcess() (int, error) {
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		line, err := os.ReadFile(name)
		said := strings.Trim(string(line), "\x00 ")
		if err != nil || !strings.HasPrefix(said, "[lxc monitor]") || !strings.HasSuffix(said, " "+b.instance) {
			continue
		}
		monitor := filepath.Dir(name)
		children, err := os.ReadFile(filepath.Join(monitor, "task", filepath.Base(monitor), "children"))
		if err != nil {
			return 0, err
		}
		if fields := strings.Fields(string(children)); len(fields) > 0 {
			return strconv.Atoi(fields[0])
		}
	}
	return 0, errors.New("no process is LXC's monitor of it")
}

// onMachine is this machine.
type onMachine struct{}

func (onMachine) mkdir(dir string) error { return os.Mkdir(dir, 0o755) }

// remove tries more than once: what a stopped contestant had started may write for a moment.
func (onMachine) remove(dir string) (err error) {
	for range 20 {
		if err = os.RemoveAll(dir); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func (onMachine) content(dir string) (c content, err error) {
	var lines []string
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			c.Dirs++
			return nil
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		n, err := io.Copy(h, f)
		c.Files++
		c.Bytes += n
		lines = append(lines, fmt.Sprintf("%x  .%s\n", h.Sum(nil), strings.TrimPrefix(name, dir)))
		return err
	})
	slices.Sort(lines)
	c.Sum = fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(lines, ""))))
	return c, err
}

// inInstance is the instance.
type inInstance struct {
	ctx  context.Context
	host *transport.LXD
}

func (i inInstance) mkdir(dir string) error {
	return i.host.Exec(i.ctx, transport.Command{Args: []string{"mkdir", dir}})
}

func (i inInstance) remove(dir string) error {
	if i.ctx.Err() != nil {
		return nil // it goes with the instance
	}
	return i.host.Exec(i.ctx, transport.Command{Args: []string{"rm", "-rf", dir}})
}

func (i inInstance) content(dir string) (c content, err error) {
	var out bytes.Buffer
	err = i.host.Exec(i.ctx, transport.Command{Stdout: &out, Args: transport.Shell(`cd "$1" && export LC_ALL=C &&
echo $(find . ! -type d | wc -l) $(find . -type d | wc -l) $(find . -type f -exec stat -c %s {} + | awk '{n += $1} END {printf "%.0f", n}') &&
find . -type f -exec sha256sum {} + | sort | sha256sum`, dir)})
	if err == nil {
		_, err = fmt.Sscan(out.String(), &c.Files, &c.Dirs, &c.Bytes, &c.Sum)
	}
	return c, err
}
