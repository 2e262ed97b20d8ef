package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"sync"
	"time"

	"github.com/lxdtransport/transport"
)

// Download reads a file below the directory. See [transport.Transport]. Symbolic links are followed as long as they stay below the
// directory. A file of which the system does not tell the size, as those of /proc, is read to its end.
func (t *Transport) Download(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
	if opts == nil {
		opts = new(transport.DownloadOptions)
	}
	err := checkDownload(src, dst, opts)
	if err == nil {
		err = t.download(ctx, src, dst, opts)
	}
	return fileError("download", src, err)
}

func checkDownload(src string, dst io.Writer, opts *transport.DownloadOptions) error {
	if err := checkPath(src); err != nil {
		return err
	}
	switch {
	case dst == nil:
		return errors.New("the destination (dst) is nil")
	case opts.Offset < 0:
		return fmt.Errorf("DownloadOptions.Offset is negative: %d", opts.Offset)
	case opts.Limit < 0:
		return fmt.Errorf("DownloadOptions.Limit is negative: %d", opts.Limit)
	}
	return nil
}

func (t *Transport) download(ctx context.Context, name string, dst io.Writer, opts *transport.DownloadOptions) error {
	ctx, end, err := t.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	d := &download{ctx: ctx, dst: dst, opts: opts}
	done := make(chan error, 1)
	go func() { done <- d.run(t, name) }() // waited for, unless a Write does not return
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	grace := time.NewTimer(writeGrace)
	defer grace.Stop()
	select {
	case err := <-done:
		return err
	case <-grace.C:
		// It closes the file when the Write returns, and calls nothing of the caller's any more.
		d.mu.Lock()
		d.abandoned = true
		d.mu.Unlock()
		return context.Cause(ctx)
	}
}

// download is one file on its way.
type download struct {
	ctx      context.Context
	dst      io.Writer
	opts     *transport.DownloadOptions
	received int64

	mu        sync.Mutex // guards abandoned
	abandoned bool
}

func (d *download) run(t *Transport, name string) error {
	// The type comes first: to open a FIFO would wait for a writer, to open a device may do anything.
	info, err := t.root.Stat(relative(name))
	if err != nil {
		return bare(err)
	}
	if err := typeError(info.Mode()); err != nil {
		return err
	}
	file, err := t.root.OpenFile(relative(name), readFlags, 0)
	if err != nil {
		return bare(err)
	}
	defer file.Close()
	if info, err = file.Stat(); err != nil {
		return bare(err)
	}
	if err := typeError(info.Mode()); err != nil { // it was replaced meanwhile
		return err
	}
	left := int64(math.MaxInt64)
	if size := info.Size(); size > 0 {
		left = size - d.opts.Offset
		if left < 0 {
			return fmt.Errorf("DownloadOptions.Offset is %d, but the file has %d bytes: %w", d.opts.Offset, size, fs.ErrInvalid)
		}
		if l := d.opts.Limit; l > 0 && left > l {
			return fmt.Errorf("%d bytes were to come: %w of %d", left, transport.ErrLimit, l)
		}
	} else if d.opts.Offset > 0 && !d.madeUp(file) {
		return fmt.Errorf("DownloadOptions.Offset is %d, but the file is empty: %w", d.opts.Offset, fs.ErrInvalid)
	}
	if _, err := file.Seek(d.opts.Offset, io.SeekStart); err != nil {
		return bare(err)
	}
	if d.opts.Stat != nil {
		d.opts.Stat(fileInfo{info, path.Base(path.Clean(name))})
	}
	return d.copy(file, left, info.Size() > 0)
}

// madeUp reports whether a file that says that it is empty is not.
func (d *download) madeUp(file io.ReaderAt) bool {
	n, _ := file.ReadAt(make([]byte, 1), 0)
	return n == 1
}

func (d *download) copy(file io.Reader, left int64, exact bool) error {
	buf := make([]byte, 4*bufferSize)
	for left > 0 {
		n, err := file.Read(buf[:min(left, int64(len(buf)))])
		if n > 0 {
			if err := d.write(buf[:n]); err != nil {
				return err
			}
			left -= int64(n)
		}
		switch {
		case err == io.EOF && exact:
			return fmt.Errorf("the file has become shorter, %d bytes are missing: %w", left, io.ErrUnexpectedEOF)
		case err == io.EOF:
			return nil
		case err != nil:
			return bare(err)
		}
	}
	return nil
}

func (d *download) write(p []byte) error {
	if d.ctx.Err() != nil {
		return context.Cause(d.ctx)
	}
	if l := d.opts.Limit; l > 0 && d.received+int64(len(p)) > l {
		return fmt.Errorf("more bytes came: %w of %d", transport.ErrLimit, l)
	}
	n, err := d.dst.Write(p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("writing what was received: %w", err)
	}
	d.received += int64(n)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.opts.Progress != nil && !d.abandoned {
		d.opts.Progress(d.received)
	}
	return nil
}

// fileInfo has a *transport.User as its Sys, and the name that was asked for.
type fileInfo struct {
	fs.FileInfo
	name string
}

func (i fileInfo) Name() string { return i.name }

func (i fileInfo) Sys() any {
	if u := ownerOf(i.FileInfo); u != nil {
		return u
	}
	return new(transport.User)
}
