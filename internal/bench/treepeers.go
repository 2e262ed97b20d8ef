//go:build unix

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	lxd "github.com/canonical/lxd/client"
	"github.com/lxdtransport/transport"
)

func (o *ours) uploadTree(source, dir string) error {
	_, err := transport.UploadTree(context.Background(), o.host, path.Join(dir, filepath.Base(source)), os.DirFS(source), nil)
	return err
}

func (o *ours) downloadTree(source, dir string) error {
	to := filepath.Join(dir, path.Base(source))
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(to)
	if err != nil {
		return err
	}
	defer root.Close()
	_, err = transport.DownloadTree(context.Background(), o.host, source, root, nil)
	return err
}

// filesAtOnce is how many calls of the official client run at the same time: more do not make it faster.
const filesAtOnce = 8

// crew runs functions, some at once.
type crew struct {
	slots chan bool
	all   sync.WaitGroup
	once  sync.Once
	err   error // the first
}

func newCrew() *crew { return &crew{slots: make(chan bool, filesAtOnce)} }

func (c *crew) run(f func() error) {
	c.slots <- true
	c.all.Go(func() {
		if err := f(); err != nil {
			c.once.Do(func() { c.err = err })
		}
		<-c.slots
	})
}

func (c *crew) wait() error {
	c.all.Wait()
	return c.err
}

func (o *official) uploadTree(source, dir string) error {
	files := newCrew()
	err := filepath.WalkDir(source, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		to := path.Join(dir, filepath.Base(source), strings.TrimPrefix(name, source))
		args := lxd.InstanceFileArgs{Mode: int(info.Mode().Perm()), Type: "directory"}
		if d.IsDir() {
			return o.server.CreateInstanceFile(o.instance, to, args)
		}
		files.run(func() error {
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			defer f.Close()
			args.Content, args.Type, args.WriteMode = f, "file", "overwrite"
			return o.server.CreateInstanceFile(o.instance, to, args)
		})
		return nil
	})
	return errors.Join(err, files.wait())
}

func (o *official) downloadTree(source, dir string) error {
	files := newCrew()
	return errors.Join(o.downloadDir(files, source, filepath.Join(dir, path.Base(source))), files.wait())
}

// downloadDir downloads a directory. Only a request tells what an entry is.
func (o *official) downloadDir(files *crew, source, to string) error {
	_, answer, err := o.server.GetInstanceFile(o.instance, source)
	if err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	var mu sync.Mutex
	var dirs []string
	here := newCrew()
	here.slots = files.slots
	for _, name := range answer.Entries {
		here.run(func() error {
			r, answer, err := o.server.GetInstanceFile(o.instance, path.Join(source, name))
			if err != nil {
				return err
			}
			if answer.Type == "directory" {
				mu.Lock()
				defer mu.Unlock()
				dirs = append(dirs, name)
				return nil
			}
			defer r.Close()
			f, err := os.OpenFile(filepath.Join(to, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, os.FileMode(answer.Mode).Perm())
			if err != nil {
				return err
			}
			_, err = io.Copy(f, r)
			return errors.Join(err, f.Close())
		})
	}
	if err := here.wait(); err != nil {
		return err
	}
	for _, name := range dirs {
		if err := o.downloadDir(files, path.Join(source, name), filepath.Join(to, name)); err != nil {
			return err
		}
	}
	return nil
}

// The scripts of a tar at the other side.
const (
	packTree   = `exec tar -c -f - -C "$1" "$2"`
	unpackTree = `exec tar -x -p -f - -C "$1"`
)

// piped runs two programs, the output of the first being the input of the second. Nothing of ours is between them.
func piped(from, to []string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	a, b := exec.Command(from[0], from[1:]...), exec.Command(to[0], to[1:]...)
	var saidA, saidB bytes.Buffer
	a.Stdout, a.Stderr, b.Stdin, b.Stderr = w, &saidA, r, &saidB
	if err := b.Start(); err != nil {
		return err
	}
	r.Close()
	errA := a.Run()
	w.Close()
	errB := b.Wait()
	if err := errors.Join(errA, errB); err != nil {
		return fmt.Errorf("%s | %s: %w: %s %s", from[0], to[0], err, bytes.TrimSpace(saidA.Bytes()), bytes.TrimSpace(saidB.Bytes()))
	}
	return nil
}

func packHere(source string) []string {
	return []string{"tar", "-c", "-f", "-", "-C", filepath.Dir(source), filepath.Base(source)}
}

func unpackHere(dir string) []string { return []string{"tar", "-x", "-p", "-f", "-", "-C", dir} }

func (l *lxcCommand) uploadTree(source, dir string) error {
	if l.tool == "tar" {
		return piped(packHere(source), l.exec("sh", "-c", unpackTree, "sh", dir))
	}
	return command(0, nil, "lxc", "file", "push", "-q", "-r", source, l.instance+dir+"/")
}

func (l *lxcCommand) downloadTree(source, dir string) error {
	if l.tool == "tar" {
		return piped(l.exec("sh", "-c", packTree, "sh", path.Dir(source), path.Base(source)), unpackHere(dir))
	}
	return command(0, nil, "lxc", "file", "pull", "-q", "-r", l.instance+source, dir+"/")
}

func (s *sshCommand) uploadTree(source, dir string) error {
	switch s.tool {
	case "rsync":
		return s.rsync(source, s.server.host()+":"+dir+"/")
	case "tar":
		return piped(packHere(source), s.ssh("-T", "sh", "-c", unpackTree, "sh", dir))
	}
	return s.scp("-r", source, s.server.host()+":"+dir+"/")
}

func (s *sshCommand) downloadTree(source, dir string) error {
	switch s.tool {
	case "rsync":
		return s.rsync(s.server.host()+":"+source, dir+"/")
	case "tar":
		return piped(s.ssh("-n", "sh", "-c", packTree, "sh", path.Dir(source), path.Base(source)), unpackHere(dir))
	}
	return s.scp("-r", s.server.host()+":"+source, dir+"/")
}

func (s *sshCommand) rsync(from, to string) error {
	return command(0, nil, "rsync", "-a", "-e", strings.Join(append([]string{"ssh"}, s.options()...), " "), from, to)
}

// bare is tar to tar, without any network: what the disk and the two tars take.
type bare struct{ pid int } // of the instance's init; 0: on this machine only

// enter makes arguments of nsenter.
func enter(pid int, args ...string) []string {
	return append([]string{"-t", strconv.Itoa(pid), "-m", "-p", "-U", "-S", "0", "-G", "0", "--"}, args...)
}

func (b *bare) there(args ...string) []string {
	if b.pid == 0 {
		return args
	}
	return append([]string{"nsenter"}, enter(b.pid, args...)...)
}

func (b *bare) uploadTree(source, dir string) error {
	return piped(packHere(source), b.there("sh", "-c", unpackTree, "sh", dir))
}

func (b *bare) downloadTree(source, dir string) error {
	return piped(b.there("sh", "-c", packTree, "sh", path.Dir(source), path.Base(source)), unpackHere(dir))
}

func (b *bare) run(args []string, stdin int64, out io.Writer) error {
	there := b.there(args...)
	return command(stdin, out, there[0], there[1:]...)
}
func (b *bare) upload(string, string) error   { return errNoFiles }
func (b *bare) download(string, string) error { return errNoFiles }
func (b *bare) remove(string) error           { return errNoFiles }
func (b *bare) usage() (cpuTime, error)       { return childrenCPU() }
func (b *bare) close()                        {}
