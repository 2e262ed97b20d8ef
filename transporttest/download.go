package transporttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/lxdtransport/transport"
)

// digits makes a file with ten digits and returns its path.
func digits(ctx context.Context, host transport.Transport) (dir, name string, err error) {
	dir, err = scratch(ctx, host)
	if err != nil {
		return "", "", err
	}
	return dir, dir + "/file", run(ctx, host, in(dir, sh("printf 0123456789 >file; chmod 640 file")))
}

var downloadRows = []row{
	{name: "download/content", why: "every byte, once",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			for _, n := range []int{0, 1, 32<<10 - 1, 32 << 10, 32<<10 + 1, 5 << 20} {
				want := pattern(n)
				cmd := in(dir, sh("cat >f"))
				cmd.Stdin = bytes.NewReader(want)
				if err := run(ctx, host, cmd); err != nil {
					return err
				}
				var got bytes.Buffer
				if err := host.Download(ctx, dir+"/f", &got, nil); err != nil {
					return fmt.Errorf("%d bytes: %w", n, err)
				}
				if err := equal("the file", got.String(), string(want)); err != nil {
					return err
				}
			}
			return nil
		}},
	{name: "download/offset-and-limit", why: "a download that broke off goes on where it stopped",
		run: func(ctx context.Context, host transport.Transport) error {
			_, file, err := digits(ctx, host)
			if err != nil {
				return err
			}
			for _, c := range []struct {
				want string
				opts transport.DownloadOptions
			}{
				{"0123456789", transport.DownloadOptions{}},
				{"0123456789", transport.DownloadOptions{Limit: 10}},
				{"3456789", transport.DownloadOptions{Offset: 3}},
				{"789", transport.DownloadOptions{Offset: 7, Limit: 3}},
				{"", transport.DownloadOptions{Offset: 10}},
			} {
				var got bytes.Buffer
				if err := host.Download(ctx, file, &got, &c.opts); err != nil {
					return fmt.Errorf("%+v: %w", c.opts, err)
				}
				if err := equal(fmt.Sprintf("%+v", c.opts), got.String(), c.want); err != nil {
					return err
				}
			}
			for _, opts := range []transport.DownloadOptions{{Offset: 11}, {Offset: -1}, {Limit: -1}} {
				if host.Download(ctx, file, io.Discard, &opts) == nil {
					return fmt.Errorf("%+v of a file with 10 bytes is no error", opts)
				}
			}
			return nil
		}},
	{name: "download/limit-is-ErrLimit", why: "the host decides how large its files are, the caller how much it takes",
		run: func(ctx context.Context, host transport.Transport) error {
			_, file, err := digits(ctx, host)
			if err != nil {
				return err
			}
			for _, opts := range []transport.DownloadOptions{{Limit: 9}, {Offset: 5, Limit: 4}} {
				var got bytes.Buffer
				err := host.Download(ctx, file, &got, &opts)
				if err := is(err, transport.ErrLimit); err != nil {
					return err
				}
				if int64(got.Len()) > opts.Limit {
					return fmt.Errorf("%d bytes were written, the limit is %d", got.Len(), opts.Limit)
				}
			}
			return nil
		}},
	{name: "download/stat", why: "who unpacks or names what comes wants to know it before",
		run: func(ctx context.Context, host transport.Transport) error {
			_, file, err := digits(ctx, host)
			if err != nil {
				return err
			}
			var calls int
			var info fs.FileInfo
			var got bytes.Buffer
			var late bool
			opts := &transport.DownloadOptions{Stat: func(i fs.FileInfo) { calls++; info = i; late = got.Len() > 0 }}
			if err := host.Download(ctx, file, &got, opts); err != nil {
				return err
			}
			if calls != 1 || late {
				return fmt.Errorf("the Stat function was called %d times; after the first byte: %v", calls, late)
			}
			if _, ok := info.Sys().(*transport.User); !ok {
				return fmt.Errorf("the info's Sys is a %T, not a *transport.User", info.Sys())
			}
			if info.ModTime().IsZero() || info.IsDir() {
				return fmt.Errorf("the info's ModTime is %v, its IsDir %v", info.ModTime(), info.IsDir())
			}
			return equal("what Stat was told", fmt.Sprint(info.Name(), " ", info.Size(), " ", info.Mode()), "file 10 -rw-r-----")
		}},
	{name: "download/progress", why: "who shows a bar divides by the size",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			const size, offset = 3 << 20, 100
			if err := run(ctx, host, in(dir, sh(`head -c "$1" /dev/zero >f`, fmt.Sprint(size)))); err != nil {
				return err
			}
			last, bad := int64(0), error(nil)
			opts := &transport.DownloadOptions{Offset: offset, Progress: func(n int64) {
				if n < last {
					bad = fmt.Errorf("%d came after %d", n, last)
				}
				last = n
			}}
			if err := host.Download(ctx, dir+"/f", io.Discard, opts); err != nil {
				return err
			}
			if last != size-offset {
				return fmt.Errorf("the last was %d, not %d", last, size-offset)
			}
			return bad
		}},
	{name: "download/follows-links", why: "names in a host are often links",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, _, err := digits(ctx, host)
			if err != nil {
				return err
			}
			if err := run(ctx, host, in(dir, sh("ln -s file link; ln -s nowhere dangling; ln -s loop loop"))); err != nil {
				return err
			}
			var got bytes.Buffer
			if err := host.Download(ctx, dir+"/link", &got, nil); err != nil {
				return err
			}
			if host.Download(ctx, dir+"/loop", io.Discard, nil) == nil {
				return errors.New("a link that leads to itself was downloaded")
			}
			return errors.Join(
				equal("the file", got.String(), "0123456789"),
				is(host.Download(ctx, dir+"/dangling", io.Discard, nil), fs.ErrNotExist),
			)
		}},
	{name: "download/refuses-what-is-no-file", why: "to open a FIFO waits for ever, and a device has no end",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			if err := run(ctx, host, in(dir, sh("mkdir dir; mkfifo fifo; ln -s fifo link"))); err != nil {
				return err
			}
			for _, name := range []string{"/dir", "/fifo", "/link"} {
				var got bytes.Buffer
				done := background(func() error { return host.Download(ctx, dir+name, &got, nil) })
				result, err := returns(ctx, done)
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				if result == nil || got.Len() > 0 {
					return fmt.Errorf("the Download of %s returned %v and %d bytes", name, result, got.Len())
				}
			}
			return nil
		}},
	{name: "download/writer-error", why: "a full disk must not look like a whole file",
		run: func(ctx context.Context, host transport.Transport) error {
			_, file, err := digits(ctx, host)
			if err != nil {
				return err
			}
			full := errors.New("disk full")
			return errors.Join(
				is(host.Download(ctx, file, writerFunc(func([]byte) (int, error) { return 0, full }), nil), full),
				is(host.Download(ctx, file, writerFunc(func(p []byte) (int, error) { return len(p) - 1, nil }), nil), io.ErrShortWrite),
			)
		}},
	{name: "download/ctx", why: "a download of a file without an end has to be stopped",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			if err := run(ctx, host, in(dir, sh(`head -c 67108864 /dev/zero >f`))); err != nil {
				return err
			}
			mine := errors.New("enough")
			downCtx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			var n int64
			opts := &transport.DownloadOptions{Progress: func(now int64) {
				if n = now; n > 1<<20 {
					cancel(mine)
				}
			}}
			result, err := returns(ctx, background(func() error { return host.Download(downCtx, dir+"/f", io.Discard, opts) }))
			if err != nil {
				return err
			}
			return errors.Join(is(result, mine), is(host.Download(downCtx, dir+"/f", io.Discard, nil), mine))
		}},
	{name: "download/ctx-ends-with-blocked-writer", why: "every method returns soon after the end of its context",
		run: func(ctx context.Context, host transport.Transport) error {
			_, file, err := digits(ctx, host)
			if err != nil {
				return err
			}
			w := newBlocked()
			defer w.unblock()
			mine := errors.New("enough")
			downCtx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			done := background(func() error { return host.Download(downCtx, file, w, nil) })
			if _, err := within(ctx, w.entered, "a Write"); err != nil {
				return err
			}
			cancel(mine)
			result, err := returns(ctx, done)
			if err != nil {
				return err
			}
			return is(result, mine)
		}},
	{name: "download/constant-memory", why: "a file may be larger than memory: what is received has to be written",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			const size = 64 << 20
			if err := run(ctx, host, in(dir, sh(`head -c "$1" /dev/zero >f`, fmt.Sprint(size)))); err != nil {
				return err
			}
			largest, total := 0, 0
			w := writerFunc(func(p []byte) (int, error) {
				largest = max(largest, len(p))
				total += len(p)
				return len(p), nil
			})
			if err := host.Download(ctx, dir+"/f", w, nil); err != nil {
				return err
			}
			if largest > 16<<20 || total != size {
				return fmt.Errorf("%d bytes came, %d of them at once", total, largest)
			}
			return nil
		}},
}
