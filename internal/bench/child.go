//go:build unix

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// child is a worker as its parent sees it.
type child struct {
	spec spec
	cmd  *exec.Cmd
	in   io.WriteCloser
	enc  *json.Encoder
	dec  *json.Decoder
}

// hire starts a worker for each contestant of a part.
func (b *bench) hire(ctx context.Context, part string, specs ...spec) (children []*child, dismiss func(), err error) {
	dismiss = func() {
		for _, c := range children {
			c.dismiss()
		}
	}
	for _, s := range specs {
		if b.profile != "" && (s.Kind == "ours" || s.Kind == "official") {
			s.Profile = filepath.Join(b.profile, part+"-"+s.Kind+"-"+s.Way)
		}
		switch s.Instance = b.instance; {
		case s.Kind == "lxc" && !haveLXC():
			b.report.note("no rows of lxc: there is no such command")
			continue
		case s.Kind == "ssh":
			if s.SSH = b.ssh; b.ssh == nil {
				continue
			}
			if _, err := exec.LookPath(s.Tool); s.Tool != "" && err != nil {
				b.report.note("no rows of %v: %v", s, err)
				continue
			}
		}
		c, err := b.start(ctx, s)
		if err != nil {
			dismiss()
			return nil, nil, fmt.Errorf("%v: %w", s, err)
		}
		children = append(children, c)
	}
	return children, dismiss, nil
}

func (b *bench) start(ctx context.Context, s spec) (*child, error) {
	c := &child{spec: s, cmd: exec.CommandContext(ctx, b.exe, workerArg)}
	// Its own commands are in its group and end with it.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.cmd.Cancel = c.kill
	c.cmd.Env = append(os.Environ(), "TMPDIR="+b.dir)
	c.cmd.Stderr = os.Stderr
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	c.enc, c.dec = json.NewEncoder(c.in), json.NewDecoder(out)
	if _, err := c.do(task{Spec: &s}); err != nil {
		c.dismiss()
		return nil, err
	}
	return c, nil
}

// do has the worker do something.
func (c *child) do(t task) (result, error) {
	if err := c.enc.Encode(t); err != nil {
		return result{}, err
	}
	return c.result()
}

func (c *child) result() (result, error) {
	var r result
	err := c.dec.Decode(&r)
	if err == nil && r.Error != "" {
		err = errors.New(r.Error)
	}
	if err != nil {
		err = fmt.Errorf("%v: %w", c.spec, err)
	}
	return r, err
}

// kill ends the worker and its commands, whatever they do.
func (c *child) kill() error { return syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL) }

// dismiss has the worker end.
func (c *child) dismiss() {
	c.in.Close()
	c.cmd.Wait()
}
