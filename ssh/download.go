package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/pkg/sftp"

	"github.com/lxdtransport/transport"
)

// Download reads a file over SFTP. See [transport.Transport]. Symbolic links are followed. A file of which the host does not tell the size, as
// those of /proc, is read to its end.
func (t *Transport) Download(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
	if opts == nil {
		opts = new(transport.DownloadOptions)
	}
	err := checkDownload(src, dst, opts)
	if err == nil {
		err = t.download(ctx, &download{src: src, dst: dst, opts: opts})
	}
	return goOn(fileError("download", src, err))
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

// download is one file on its way down.
type download struct {
	f        *files
	src      string
	dst      io.Writer
	opts     *transport.DownloadOptions
	received int64

	mu       sync.Mutex // guards detached
	detached bool       // the caller's functions must not be called again
}

func (t *Transport) download(ctx context.Context, d *download) error {
	ctx, end, err := t.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if d.f, err = t.files(ctx); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { // waited for, unless a Write does not return
		err := d.run(ctx)
		t.keep(d.f)
		done <- err
	}()
	select {
	case err = <-done:
		return err
	case <-ctx.Done():
	}
	grace := time.NewTimer(writeGrace)
	defer grace.Stop()
	select {
	case err = <-done:
		return err
	case <-grace.C:
		d.mu.Lock()
		d.detached = true
		d.mu.Unlock()
		return context.Cause(ctx)
	}
}

func (d *download) run(ctx context.Context) error {
	// The type comes first: the server would open a FIFO and wait for a writer for ever.
	info, err := do(ctx, d.f, func() (fs.FileInfo, error) { return d.f.client.Stat(d.src) })
	if err != nil {
		return err
	}
	if err := typeError(info.Mode()); err != nil {
		return err
	}
	file, err := do(ctx, d.f, func() (*sftp.File, error) { return d.f.client.Open(d.src) })
	if err != nil {
		return err
	}
	err = d.read(ctx, file)
	if err != nil {
		d.f.broken = true // much may be on its way
		return err
	}
	return act(ctx, d.f, file.Close)
}

func (d *download) read(ctx context.Context, file *sftp.File) error {
	info, err := do(ctx, d.f, file.Stat)
	if err != nil {
		return err
	}
	if err := typeError(info.Mode()); err != nil { // it was replaced meanwhile
		return err
	}
	size := info.Size()
	if size < 0 {
		return fmt.Errorf("the host says that it has %d bytes: %w", uint64(size), fs.ErrInvalid)
	}
	// The kernel's own file systems say 0, or a page, for what they make up when it is read.
	name := path.Clean(d.src)
	madeUp := strings.HasPrefix(name, "/proc/") || strings.HasPrefix(name, "/sys/")
	exact := size > 0 && !madeUp
	if d.opts.Offset > size && !madeUp {
		return fmt.Errorf("DownloadOptions.Offset is %d, but the file has %d bytes: %w", d.opts.Offset, size, fs.ErrInvalid)
	}
	if l := d.opts.Limit; exact && l > 0 && size-d.opts.Offset > l {
		return fmt.Errorf("%d bytes were to come: %w of %d", size-d.opts.Offset, transport.ErrLimit, l)
	}
	if d.opts.Stat != nil {
		owner := ownerOf(info)
		err := d.call(func() error { d.opts.Stat(fileInfo{info, path.Base(name), &owner}); return nil })
		if err != nil {
			return err
		}
	}
	if exact {
		return d.copy(ctx, file, size)
	}
	return d.copyToEnd(ctx, file)
}

// copy reads a file of which the size is known, two chunks at a time.
func (d *download) copy(ctx context.Context, file *sftp.File, size int64) error {
	var chunks [2]chunk
	next := d.opts.Offset
	ask := func(c *chunk) {
		c.n = int(min(size-next, chunkSize))
		if c.n == 0 {
			c.done = nil
			return
		}
		if c.buf == nil {
			c.buf = make([]byte, c.n)
		}
		done, at, part := make(chan error, 1), next, c.buf[:c.n]
		c.done = done
		next += int64(c.n)
		go func() { // ends with the session at the latest
			n, err := file.ReadAt(part, at)
			if n == len(part) {
				err = nil
			} else if err == nil || err == io.EOF {
				err = fmt.Errorf("the host said %d bytes, but there is an end after %d: %w", size, at+int64(n), io.ErrUnexpectedEOF)
			}
			done <- err
		}()
	}
	ask(&chunks[0])
	ask(&chunks[1])
	for i := 0; chunks[i%2].done != nil; i++ {
		c := &chunks[i%2]
		select {
		case err := <-c.done:
			if err != nil && d.f.s.conn.dead() {
				err = fmt.Errorf("the connection was lost: %w", d.f.s.conn.link.lost())
			}
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err := d.write(ctx, c.buf[:c.n]); err != nil {
			return err
		}
		ask(c)
	}
	return nil
}

// copyToEnd reads a file of which the size is not known. A part that fits into one packet is read by pkg/sftp until it is whole: a short one
// is not the end.
func (d *download) copyToEnd(ctx context.Context, file *sftp.File) error {
	buf := make([]byte, bufferSize)
	for at := d.opts.Offset; ; {
		n, err := do(ctx, d.f, func() (int, error) {
			n, err := file.ReadAt(buf, at)
			if err == io.EOF {
				err = nil
			}
			return n, err
		})
		if err != nil {
			return err
		}
		if n > 0 {
			if err := d.write(ctx, buf[:n]); err != nil {
				return err
			}
		}
		if at += int64(n); n < len(buf) || at > math.MaxInt64-bufferSize {
			return nil
		}
	}
}

func (d *download) write(ctx context.Context, p []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if l := d.opts.Limit; l > 0 && d.received+int64(len(p)) > l {
		return fmt.Errorf("more bytes came: %w of %d", transport.ErrLimit, l)
	}
	err := d.call(func() error {
		n, err := d.dst.Write(p)
		if err == nil && n < len(p) {
			err = io.ErrShortWrite
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("writing what was received: %w", err)
	}
	d.received += int64(len(p))
	if d.opts.Progress == nil {
		return nil
	}
	return d.call(func() error { d.opts.Progress(d.received); return nil })
}

// call calls one of the caller's functions unless the download was given up.
func (d *download) call(f func() error) error {
	d.mu.Lock()
	detached := d.detached
	d.mu.Unlock()
	if detached {
		return context.Canceled
	}
	return guarded(f)
}

// fileInfo has a *transport.User as its Sys, and the name that was asked for.
type fileInfo struct {
	fs.FileInfo
	name  string
	owner *transport.User
}

func (i fileInfo) Name() string { return i.name }
func (i fileInfo) Sys() any     { return i.owner }
