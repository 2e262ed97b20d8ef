package transporttest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lxdtransport/transport"
)

// The errors of files.

var fileRows = []row{
	{name: "files/errors-are-PathErrors", why: "programs that handle local files handle these",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			broken := errors.New("broken")
			if err := up(ctx, host, dir+"/f", "x", nil); err != nil {
				return err
			}
			bad := writerFunc(func([]byte) (int, error) { return 0, broken })
			for _, c := range []struct {
				name string
				err  error
			}{
				{dir + "/no/f", host.Upload(ctx, dir+"/no/f", strings.NewReader("x"), nil)},
				{dir + "/up", host.Upload(ctx, dir+"/up", failing(broken), nil)},
				{dir, host.Upload(ctx, dir, strings.NewReader("x"), nil)},
				{"relative", host.Upload(ctx, "relative", strings.NewReader("x"), nil)},
				{dir + "/none", host.Download(ctx, dir+"/none", io.Discard, nil)},
				{dir, host.Download(ctx, dir, io.Discard, nil)},
				{dir + "/f", host.Download(ctx, dir+"/f", bad, nil)},
				{"relative", host.Download(ctx, "relative", io.Discard, nil)},
			} {
				p, ok := errors.AsType[*fs.PathError](c.err)
				if !ok || p.Path != c.name || p.Op == "" {
					return fmt.Errorf("want an *fs.PathError with the path %q, got %T: %w", c.name, c.err, orNil(c.err))
				}
			}
			return nil
		}},
	{name: "files/errors-told-apart", why: "no such file is not no such host; who mixes them up builds hosts for a typing error",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			others := []error{transport.ErrNoHost, transport.ErrNotRunning, transport.ErrUnauthorized, transport.ErrClosed, transport.ErrLimit, fs.ErrPermission}
			for _, err := range []error{
				host.Download(ctx, dir+"/none", io.Discard, nil),
				host.Download(ctx, dir+"/no/such", io.Discard, nil),
				host.Upload(ctx, dir+"/no/such", strings.NewReader("x"), nil),
			} {
				if err := errors.Join(is(err, fs.ErrNotExist), isNot(err, others...)); err != nil {
					return err
				}
			}
			err = host.Download(ctx, dir, io.Discard, nil)
			if err == nil {
				return errors.New("a directory was downloaded")
			}
			return isNot(err, append(others, fs.ErrNotExist)...)
		}},
	{name: "files/bad-paths", why: "a relative path has no meaning in a host, and a NUL cuts names",
		run: func(ctx context.Context, host transport.Transport) error {
			for _, name := range []string{"", "relative", "./x", "../x", "/a\x00b"} {
				if host.Upload(ctx, name, strings.NewReader("x"), nil) == nil {
					return fmt.Errorf("an Upload to %q returned nil", name)
				}
				if host.Download(ctx, name, io.Discard, nil) == nil {
					return fmt.Errorf("a Download of %q returned nil", name)
				}
			}
			return nil
		}},
	{name: "files/misuse-is-an-error", why: "misuse is an error with a sentence, not a panic",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			if err := up(ctx, host, dir+"/f", "x", nil); err != nil {
				return err
			}
			for what, err := range map[string]error{
				"a nil source":          host.Upload(ctx, dir+"/g", nil, nil),
				"a nil destination":     host.Download(ctx, dir+"/f", nil, nil),
				"a directory's mode":    host.Upload(ctx, dir+"/g", strings.NewReader("x"), &transport.UploadOptions{Mode: fs.ModeDir | 0o755}),
				"an owner that is none": host.Upload(ctx, dir+"/g", strings.NewReader("x"), &transport.UploadOptions{Owner: &transport.User{UID: 1<<32 - 1}}),
			} {
				if err == nil {
					return fmt.Errorf("%s: want an error", what)
				}
			}
			return holds(ctx, host, dir, "f")
		}},
	{name: "files/source-that-downloads", why: "a file is copied in the host, or to another name, by what is there: one method must not hold up another",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			text := string(pattern(1 << 20))
			if err := up(ctx, host, dir+"/from", text, nil); err != nil {
				return err
			}
			r, w := io.Pipe()
			var down <-chan error
			src := readerFunc(func(p []byte) (int, error) {
				if down == nil { // now, while the upload runs
					down = background(func() error {
						err := host.Download(ctx, dir+"/from", w, nil)
						w.CloseWithError(err) // nil: the end
						return err
					})
				}
				return r.Read(p)
			})
			result, err := returns(ctx, background(func() error { return host.Upload(ctx, dir+"/to", src, nil) }))
			if err != nil {
				r.CloseWithError(err)
				w.CloseWithError(err)
				return err
			}
			if err := errors.Join(result, <-down); err != nil {
				return err
			}
			return prints(ctx, host, text, in(dir, transport.Command{Args: []string{"cat", "to"}}))
		}},
	{name: "files/streams-are-not-closed", why: "the caller's files are the caller's: a download may be one part of what goes into one",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			broken := errors.New("broken")
			bad := &handle{Reader: failing(broken), Writer: writerFunc(func([]byte) (int, error) { return 0, broken })}
			src, dst := &handle{Reader: strings.NewReader("x")}, &handle{Writer: io.Discard}
			staysOpen(ctx, map[string]*handle{"a source": src, "a destination": dst, "a stream that fails": bad})
			return errors.Join(
				host.Upload(ctx, dir+"/f", src, nil),
				host.Download(ctx, dir+"/f", dst, nil),
				is(host.Upload(ctx, dir+"/f", bad, nil), broken),
				is(host.Download(ctx, dir+"/f", bad, nil), broken),
			)
		}},
	{name: "files/no-progress-after-return", why: "what it writes to is closed, or used for the next file",
		run: noLateProgress},
	{name: "files/many-at-once", why: "a transport is safe for concurrent use, also for one destination",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			results := make(chan error)
			const n = 10
			for i := range n {
				go func() {
					text := strings.Repeat(fmt.Sprint(i), 100000)
					err := up(ctx, host, fmt.Sprintf("%s/a/b/%d", dir, i), text, &transport.UploadOptions{MkdirAll: true})
					err = errors.Join(err, up(ctx, host, dir+"/a/same", text, nil))
					var got strings.Builder
					err = errors.Join(err, host.Download(ctx, fmt.Sprintf("%s/a/b/%d", dir, i), &got, nil))
					results <- errors.Join(err, equal("the file", got.String(), text))
				}()
			}
			for range n {
				err = errors.Join(err, <-results)
			}
			if err != nil {
				return err
			}
			return holds(ctx, host, dir+"/a", "b", "same")
		}},
}

// noLateProgress counts the calls of Progress during transfers that end in all ways, and after them.
func noLateProgress(ctx context.Context, host transport.Transport) error {
	dir, err := scratch(ctx, host)
	if err != nil {
		return err
	}
	const size = 1 << 20
	mine := errors.New("enough")
	hangs := newBlocked()
	defer hangs.unblock()
	late := readerFunc(func(p []byte) (int, error) { // brings something when nobody waits for it any more
		hangs.wait()
		return len(p), nil
	})
	type calls struct {
		what            string
		sofar, returned atomic.Int64
	}
	var all []*calls
	for _, c := range []struct {
		what string
		want error
		run  func(ctx context.Context, progress func(int64)) error
	}{
		{"an upload", nil, func(ctx context.Context, progress func(int64)) error {
			return host.Upload(ctx, dir+"/f", io.LimitReader(zeros, size), &transport.UploadOptions{Progress: progress})
		}},
		{"an upload whose source failed", mine, func(ctx context.Context, progress func(int64)) error {
			return host.Upload(ctx, dir+"/f", half(mine), &transport.UploadOptions{Progress: progress})
		}},
		{"an upload that was stopped", mine, func(ctx context.Context, progress func(int64)) error {
			ctx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			go func() {
				<-hangs.entered
				cancel(mine)
			}()
			return host.Upload(ctx, dir+"/f", io.MultiReader(io.LimitReader(zeros, 1000), late), &transport.UploadOptions{Progress: progress})
		}},
		{"a download", nil, func(ctx context.Context, progress func(int64)) error {
			return host.Download(ctx, dir+"/f", io.Discard, &transport.DownloadOptions{Progress: progress})
		}},
		{"a download that was stopped", mine, func(ctx context.Context, progress func(int64)) error {
			ctx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			w := writerFunc(func(p []byte) (int, error) { cancel(mine); return len(p), nil })
			return host.Download(ctx, dir+"/f", w, &transport.DownloadOptions{Progress: progress})
		}},
	} {
		n := &calls{what: c.what}
		all = append(all, n)
		result, err := returns(ctx, background(func() error {
			defer func() { n.returned.Store(n.sofar.Load()) }()
			return c.run(ctx, func(int64) { n.sofar.Add(1) })
		}))
		if err == nil && !errors.Is(result, c.want) {
			err = result
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.what, orNil(err))
		}
	}
	hangs.unblock()
	time.Sleep(window)
	for _, n := range all {
		if extra := n.sofar.Load() - n.returned.Load(); extra > 0 {
			return fmt.Errorf("%s has returned, and Progress was called %d times after that", n.what, extra)
		}
	}
	return nil
}
