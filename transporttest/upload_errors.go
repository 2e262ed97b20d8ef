package transporttest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/lxdtransport/transport"
)

// Uploads that fail leave everything as it was.

var uploadErrorRows = []row{
	{name: "upload/source-error", why: "half a file must not be installed; the caller wants its own error back",
		run: func(ctx context.Context, host transport.Transport) error {
			return untouched(ctx, host, func(dir string) error {
				broken := errors.New("broken source")
				return is(host.Upload(ctx, dir+"/old", half(broken), nil), broken)
			})
		}},
	{name: "upload/source-error-io.ErrUnexpectedEOF", why: "a truncated archive says io.ErrUnexpectedEOF, which copying code takes for an end",
		run: func(ctx context.Context, host transport.Transport) error {
			return untouched(ctx, host, func(dir string) error {
				return is(host.Upload(ctx, dir+"/old", half(io.ErrUnexpectedEOF), nil), io.ErrUnexpectedEOF)
			})
		}},
	{name: "upload/new-file-source-error", why: "a file that was not there must not be there",
		run: func(ctx context.Context, host transport.Transport) error {
			return untouched(ctx, host, func(dir string) error {
				broken := errors.New("broken source")
				return is(host.Upload(ctx, dir+"/new", half(broken), nil), broken)
			})
		}},
	{name: "upload/ctx-ends-before", why: "a context that has ended uploads nothing",
		run: func(ctx context.Context, host transport.Transport) error {
			return untouched(ctx, host, func(dir string) error {
				mine := errors.New("not today")
				ended, cancel := context.WithCancelCause(ctx)
				cancel(mine)
				return is(host.Upload(ended, dir+"/old", strings.NewReader("new"), nil), mine)
			})
		}},
	{name: "upload/ctx-ends-during", why: "an upload without an end has to be stopped, and clean up",
		run: func(ctx context.Context, host transport.Transport) error {
			return untouched(ctx, host, func(dir string) error {
				mine := errors.New("enough")
				upCtx, cancel := context.WithCancelCause(ctx)
				defer cancel(nil)
				opts := &transport.UploadOptions{Progress: func(n int64) {
					if n > 1<<20 {
						cancel(mine)
					}
				}}
				result, err := returns(ctx, background(func() error { return host.Upload(upCtx, dir+"/old", zeros, opts) }))
				if err != nil {
					return err
				}
				return is(result, mine)
			})
		}},
	{name: "upload/ctx-ends-with-blocked-source", why: "a source that hangs must not hold the upload",
		run: func(ctx context.Context, host transport.Transport) error {
			return untouched(ctx, host, func(dir string) error {
				src := newBlocked()
				defer src.unblock()
				mine := errors.New("enough")
				upCtx, cancel := context.WithCancelCause(ctx)
				defer cancel(nil)
				done := background(func() error {
					return host.Upload(upCtx, dir+"/old", io.MultiReader(strings.NewReader("a part"), src), nil)
				})
				if _, err := within(ctx, src.entered, "a Read"); err != nil {
					return err
				}
				cancel(mine)
				result, err := returns(ctx, done)
				if err != nil {
					return err
				}
				return is(result, mine)
			})
		}},
	{name: "upload/without-mkdirall", why: "a typing error in a path must not make directories",
		run: func(ctx context.Context, host transport.Transport) error {
			return untouched(ctx, host, func(dir string) error {
				return is(host.Upload(ctx, dir+"/no/such/f", strings.NewReader("x"), nil), fs.ErrNotExist)
			})
		}},
	{name: "upload/onto-what-is-no-file", why: "a directory, a FIFO or a device is not replaced, nor written into",
		run: func(ctx context.Context, host transport.Transport) error {
			return untouched(ctx, host, func(dir string) error {
				for _, name := range []string{"/dir", "/dir/", "/fifo", "/old/f", "/old/a/f"} {
					opts := &transport.UploadOptions{MkdirAll: name == "/old/a/f"}
					done := background(func() error { return host.Upload(ctx, dir+name, strings.NewReader("x"), opts) })
					result, err := returns(ctx, done)
					if err != nil {
						return fmt.Errorf("%s: %w", name, err)
					}
					if result == nil {
						return fmt.Errorf("an Upload to %s returned nil", name)
					}
				}
				return nil
			})
		}},
	{name: "upload/options-are-not-modified", why: "callers use options again",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			opts, before := transport.UploadOptions{MkdirAll: true}, transport.UploadOptions{MkdirAll: true}
			if err := up(ctx, host, dir+"/f", "x", &opts); err != nil {
				return err
			}
			if fmt.Sprintf("%+v", opts) != fmt.Sprintf("%+v", before) {
				return fmt.Errorf("they are %+v now", opts)
			}
			down, downBefore := transport.DownloadOptions{Limit: 10}, transport.DownloadOptions{Limit: 10}
			if err := host.Download(ctx, dir+"/f", io.Discard, &down); err != nil {
				return err
			}
			if fmt.Sprintf("%+v", down) != fmt.Sprintf("%+v", downBefore) {
				return fmt.Errorf("they are %+v now", down)
			}
			return nil
		}},
}

// half delivers more than any buffer holds and then an error.
func half(err error) io.Reader {
	return io.MultiReader(io.LimitReader(zeros, 2<<20), failing(err))
}

// untouched runs something that fails, and checks that the directory is as it was.
func untouched(ctx context.Context, host transport.Transport, f func(dir string) error) error {
	dir, err := scratch(ctx, host)
	if err != nil {
		return err
	}
	if err := run(ctx, host, in(dir, sh("printf 'old content' >old; chmod 640 old; mkdir dir; mkfifo fifo"))); err != nil {
		return err
	}
	if err := f(dir); err != nil {
		return err
	}
	if err := holds(ctx, host, dir, "dir", "fifo", "old"); err != nil {
		return err
	}
	if err := holds(ctx, host, dir+"/dir"); err != nil {
		return err
	}
	got, _, err := mode(ctx, host, dir, "old")
	if err := errors.Join(err, equal("mode of the old file", got, "-rw-r-----")); err != nil {
		return err
	}
	return prints(ctx, host, "old content", in(dir, transport.Command{Args: []string{"cat", "old"}}))
}
