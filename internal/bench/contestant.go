//go:build unix

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	lxd "github.com/canonical/lxd/client"
	"github.com/canonical/lxd/shared/api"
	"github.com/lxdtransport/transport"
)

// contestant does the same work as the others, in its own way.
type contestant interface {
	// run runs a command with stdin bytes of input, and hands its output to out.
	run(args []string, stdin int64, out io.Writer) error
	// upload copies a local file to the file remote; download the other way round.
	upload(local, remote string) error
	download(remote, local string) error
	remove(remote string) error
	// usage is the CPU time that the client's side has taken so far.
	usage() (cpuTime, error)
	close()
}

// spec names a contestant, for its worker.
type spec struct {
	Kind     string // ours, official, lxc, ssh, or bare: tar to tar without a network
	Tool     string // lxc: "" (exec), tar or file; ssh: "" (ssh and scp), sftp, scp, rsync or tar
	Pid      int    // of the instance's init, for bare; 0: bare is on this machine only
	Way      string // unix or https; the cipher of ssh, "" for its default
	Instance string
	SSH      *sshServer
	Profile  string // prefix of files for profiles of its CPU and memory
}

func (s spec) String() string {
	name := map[string]string{
		"ours": "ours", "official": "official client", "lxc": "lxc exec", "lxc tar": "tar through lxc exec", "lxc file": "lxc file push -r, pull -r",
		"ssh": "ssh", "ssh sftp": "sftp", "ssh scp": "scp -r", "ssh rsync": "rsync -a over ssh", "ssh tar": "tar over ssh", "bare": "tar | tar, nsenter",
	}[strings.TrimSpace(s.Kind+" "+s.Tool)]
	switch {
	case s.Kind == "bare" && s.Pid == 0:
		return "tar | tar, this machine only"
	case s.Way != "":
		return name + ", " + strings.TrimSuffix(s.Way, "@openssh.com")
	}
	return name
}

// inInstance reports whether the contestant's other side is the instance; otherwise it is this machine.
func (s spec) inInstance() bool { return s.Kind != "ssh" && (s.Kind != "bare" || s.Pid != 0) }

func (s spec) open() (contestant, error) {
	switch s.Kind {
	case "lxc":
		return &lxcCommand{instance: s.Instance, tool: s.Tool}, nil
	case "ssh":
		return openSSH(s.SSH, s.Way, s.Tool)
	case "bare":
		return &bare{s.Pid}, nil
	}
	server, err := connect(s.Way)
	if err != nil {
		return nil, err
	}
	if s.Kind == "official" {
		return &official{server: server, instance: s.Instance}, nil
	}
	host, err := transport.NewLXD(server, s.Instance, nil)
	if err != nil {
		return nil, err
	}
	return &ours{host}, nil
}

// zeros is an input of n bytes that costs nothing to make.
type zeros struct{ left int64 }

func (z *zeros) Read(p []byte) (int, error) {
	if z.left == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), z.left)
	z.left -= n
	return int(n), nil
}

// ours is the transport of this module.
type ours struct{ host *transport.LXD }

func (o *ours) run(args []string, stdin int64, out io.Writer) error {
	cmd := transport.Command{Args: args, Stdout: out}
	if stdin > 0 {
		cmd.Stdin = &zeros{stdin}
	}
	return o.host.Exec(context.Background(), cmd)
}

func (o *ours) upload(local, remote string) error {
	f, err := os.Open(local)
	if err != nil {
		return err
	}
	defer f.Close()
	return o.host.Upload(context.Background(), remote, f, nil)
}

func (o *ours) download(remote, local string) error {
	f, err := os.Create(local)
	if err != nil {
		return err
	}
	defer f.Close()
	return o.host.Download(context.Background(), remote, f, nil)
}

func (o *ours) remove(remote string) error { return o.run([]string{"rm", remote}, 0, nil) }
func (o *ours) usage() (cpuTime, error)    { return ownCPU() }
func (o *ours) close()                     { o.host.Close() }

// official is the official client, one connection for all commands.
type official struct {
	server   lxd.InstanceServer
	instance string
}

func (o *official) run(args []string, stdin int64, out io.Writer) error {
	if out == nil {
		out = io.Discard
	}
	done := make(chan bool)
	op, err := o.server.ExecInstance(o.instance, api.InstanceExecPost{Command: args, WaitForWS: true}, &lxd.InstanceExecArgs{
		Stdin:    io.NopCloser(&zeros{stdin}),
		Stdout:   writeCloser{out},
		Stderr:   writeCloser{io.Discard},
		DataDone: done,
	})
	if err != nil {
		return err
	}
	if err := op.Wait(); err != nil {
		return err
	}
	<-done
	if status, ok := op.Get().Metadata["return"].(float64); !ok || status != 0 {
		return fmt.Errorf("status %v", op.Get().Metadata["return"])
	}
	return nil
}

type writeCloser struct{ io.Writer }

func (writeCloser) Close() error { return nil }

func (o *official) upload(local, remote string) error {
	f, err := os.Open(local)
	if err != nil {
		return err
	}
	defer f.Close()
	return o.server.CreateInstanceFile(o.instance, remote, lxd.InstanceFileArgs{Content: f, Mode: 0o644, Type: "file", WriteMode: "overwrite"})
}

func (o *official) download(remote, local string) error {
	f, err := os.Create(local)
	if err != nil {
		return err
	}
	defer f.Close()
	r, _, err := o.server.GetInstanceFile(o.instance, remote)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(f, r)
	return err
}

func (o *official) remove(remote string) error {
	return o.server.DeleteInstanceFile(o.instance, remote)
}
func (o *official) usage() (cpuTime, error) { return ownCPU() }
func (o *official) close()                  {}
