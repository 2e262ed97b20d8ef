//go:build unix

package transporttest_test

import (
	"context"
	"io"
	"io/fs"
	"os"

	"github.com/lxdtransport/transport"
)

// wrapper is a transport of which single methods can be replaced.
type wrapper struct {
	host    transport.Transport // what the methods are without their faults
	dir     string              // the host's root
	unblock chan struct{}       // closed after the case, for what hangs on purpose
	called  func(method string) // or nil
	atEnd   []func()            // after the case, too

	exec     func(ctx context.Context, cmd transport.Command) error
	start    func(ctx context.Context, cmd transport.Command) (transport.Process, error)
	upload   func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error
	download func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error
	close    func() error

	uploadTree   func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error)
	downloadTree func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error)
}

// replaced names the methods that are.
func (w *wrapper) replaced() []string {
	var names []string
	for name, is := range map[string]bool{
		"Exec": w.exec != nil, "Start": w.start != nil, "Upload": w.upload != nil, "Download": w.download != nil, "Close": w.close != nil,
		"UploadTree": w.uploadTree != nil, "DownloadTree": w.downloadTree != nil,
	} {
		if is {
			names = append(names, name)
		}
	}
	return names
}

func (w *wrapper) note(method string) {
	if w.called != nil {
		w.called(method)
	}
}

func (w *wrapper) Exec(ctx context.Context, cmd transport.Command) error {
	w.note("Exec")
	if w.exec != nil {
		return w.exec(ctx, cmd)
	}
	return w.host.Exec(ctx, cmd)
}

func (w *wrapper) Start(ctx context.Context, cmd transport.Command) (transport.Process, error) {
	w.note("Start")
	if w.start != nil {
		return w.start(ctx, cmd)
	}
	return transport.Start(ctx, w.host, cmd)
}

func (w *wrapper) Upload(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
	w.note("Upload")
	if w.upload != nil {
		return w.upload(ctx, dst, src, opts)
	}
	return w.host.Upload(ctx, dst, src, opts)
}

func (w *wrapper) Download(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
	w.note("Download")
	if w.download != nil {
		return w.download(ctx, src, dst, opts)
	}
	return w.host.Download(ctx, src, dst, opts)
}

// UploadTree takes the generic way over the transport without faults: those of single methods have cases of their own.
func (w *wrapper) UploadTree(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
	w.note("UploadTree")
	if w.uploadTree != nil {
		return w.uploadTree(ctx, dst, src, opts)
	}
	return transport.UploadTree(ctx, w.host, dst, src, opts)
}

func (w *wrapper) DownloadTree(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
	w.note("DownloadTree")
	if w.downloadTree != nil {
		return w.downloadTree(ctx, src, dst, opts)
	}
	return transport.DownloadTree(ctx, w.host, src, dst, opts)
}

func (w *wrapper) Close() error {
	w.note("Close")
	if w.close != nil {
		return w.close()
	}
	return w.host.Close()
}

// process is one of which single methods can be replaced.
type process struct {
	transport.Process
	wait   func() error
	signal func(transport.Signal) error
	resize func(transport.TerminalSize) error
}

func (p *process) Wait() error {
	if p.wait != nil {
		return p.wait()
	}
	return p.Process.Wait()
}

func (p *process) Signal(sig transport.Signal) error {
	if p.signal != nil {
		return p.signal(sig)
	}
	return p.Process.Signal(sig)
}

func (p *process) Resize(size transport.TerminalSize) error {
	if p.resize != nil {
		return p.resize(size)
	}
	return p.Process.Resize(size)
}

type writer func([]byte) (int, error)

func (f writer) Write(p []byte) (int, error) { return f(p) }

type reader func([]byte) (int, error)

func (f reader) Read(p []byte) (int, error) { return f(p) }

// changed runs commands that were changed before.
func changed(w *wrapper, change func(*transport.Command)) {
	w.exec = func(ctx context.Context, cmd transport.Command) error {
		change(&cmd)
		return w.host.Exec(ctx, cmd)
	}
}

// result changes what commands return.
func result(w *wrapper, change func(ctx context.Context, cmd transport.Command, err error) error) {
	w.exec = func(ctx context.Context, cmd transport.Command) error {
		return change(ctx, cmd, w.host.Exec(ctx, cmd))
	}
}

// started changes processes.
func started(w *wrapper, change func(cmd transport.Command, p *process)) {
	w.start = func(ctx context.Context, cmd transport.Command) (transport.Process, error) {
		p, err := transport.Start(ctx, w.host, cmd)
		if err != nil {
			return nil, err
		}
		changed := &process{Process: p}
		change(cmd, changed)
		return changed, nil
	}
}

// uploading changes the options and the source of uploads.
func uploading(w *wrapper, change func(dst *string, src *io.Reader, opts *transport.UploadOptions)) {
	w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
		var mine transport.UploadOptions
		if opts != nil {
			mine = *opts
		}
		change(&dst, &src, &mine)
		return w.host.Upload(ctx, dst, src, &mine)
	}
}

// downloading changes the options and the destination of downloads.
func downloading(w *wrapper, change func(src *string, dst *io.Writer, opts *transport.DownloadOptions)) {
	w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
		var mine transport.DownloadOptions
		if opts != nil {
			mine = *opts
		}
		change(&src, &dst, &mine)
		return w.host.Download(ctx, src, dst, &mine)
	}
}
