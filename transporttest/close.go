package transporttest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/lxdtransport/transport"
)

var closeRows = []row{
	{name: "close/ErrClosed-everywhere", why: "after Close nothing runs, and the error says why",
		run: func(ctx context.Context, host transport.Transport) error {
			if err := host.Close(); err != nil {
				return err
			}
			for what, err := range map[string]error{
				"Exec":     host.Exec(ctx, sh("exit 0")),
				"Upload":   host.Upload(ctx, "/tmp/f", strings.NewReader("x"), nil),
				"Download": host.Download(ctx, "/tmp/f", io.Discard, nil),
			} {
				if err := is(err, transport.ErrClosed, net.ErrClosed); err != nil {
					return fmt.Errorf("%s: %w", what, err)
				}
			}
			if err := is(host.Exec(ctx, sh("exit 0")), transport.ErrNotStarted); err != nil {
				return err
			}
			if _, ok := host.(transport.Starter); ok {
				_, err := transport.Start(ctx, host, sh("exit 0"))
				return is(err, transport.ErrClosed, transport.ErrNotStarted)
			}
			return nil
		}},
	{name: "close/twice", why: "two defers close it twice",
		run: func(_ context.Context, host transport.Transport) error {
			return errors.Join(host.Close(), host.Close(), host.Close())
		}},
	{name: "close/cancels-commands-and-waits", why: "who closes a transport destroys the host next",
		run: func(ctx context.Context, host transport.Transport) error {
			// Its last words take a while, and have to be waited for.
			out := newScreen()
			cmd := sh("trap 'sleep 0.3; echo bye; exit 7' TERM; " + idle)
			cmd.Stdout = out
			running := execute(ctx, host, cmd)
			if err := out.shows(ctx, "up"); err != nil {
				return err
			}
			closed, late := returns(ctx, background(host.Close))
			if err := errors.Join(late, closed); err != nil {
				return err
			}
			if err := equal("output when Close has returned", out.String(), "up\nbye\n"); err != nil {
				return err
			}
			result, err := returns(ctx, running)
			if err != nil {
				return err
			}
			return errors.Join(is(result, transport.ErrClosed), status(result, 7))
		}},
	{name: "close/cancels-started-commands", why: "what runs in the background runs on for nobody", needs: []Capability{Start},
		run: func(ctx context.Context, host transport.Transport) error {
			out := newScreen()
			cmd := sh("trap 'sleep 0.3; echo bye; exit 7' TERM; " + idle)
			cmd.Stdout = out
			p, err := transport.Start(ctx, host, cmd)
			if err != nil {
				return err
			}
			if err := out.shows(ctx, "up\n"); err != nil {
				return err
			}
			closed, late := returns(ctx, background(host.Close))
			if err := errors.Join(late, closed); err != nil {
				return err
			}
			if err := equal("output when Close has returned", out.String(), "up\nbye\n"); err != nil {
				return err
			}
			result, err := returns(ctx, background(p.Wait))
			if err != nil {
				return err
			}
			return errors.Join(is(result, transport.ErrClosed), status(result, 7))
		}},
	{name: "close/ends-transfers", why: "a transfer that hangs must not hold Close",
		run: func(ctx context.Context, host transport.Transport) error {
			// Not below scratch, which nobody could remove any more.
			name := "/tmp/transporttest-" + strings.ToLower(rand.Text())
			src := newBlocked()
			defer src.unblock()
			up := background(func() error {
				return host.Upload(ctx, name, io.MultiReader(strings.NewReader("a part"), src), &transport.UploadOptions{MkdirAll: true})
			})
			if _, err := within(ctx, src.entered, "a Read"); err != nil {
				return err
			}
			closed, late := returns(ctx, background(host.Close))
			if err := errors.Join(late, closed); err != nil {
				return err
			}
			result, err := returns(ctx, up)
			if err != nil {
				return err
			}
			return is(result, transport.ErrClosed)
		}},
	{name: "close/leaves-no-temporary-file", why: "who stops a hundred times must not fill the disk", needs: []Capability{SameHost},
		run: func(ctx context.Context, host transport.Transport) error {
			return untouched(ctx, benchOf(ctx).hosts[1], func(dir string) error {
				src := newBlocked()
				defer src.unblock()
				var ups []<-chan error
				for _, name := range []string{"/old", "/new"} {
					begun := newBlocked()
					begun.unblock()
					ups = append(ups, background(func() error {
						return host.Upload(ctx, dir+name, io.MultiReader(strings.NewReader("a part"), begun, only(src)), nil)
					}))
					if _, err := within(ctx, begun.entered, "a Read"); err != nil {
						return err
					}
				}
				closed, late := returns(ctx, background(host.Close))
				if err := errors.Join(late, closed); err != nil {
					return err
				}
				for _, up := range ups {
					result, err := returns(ctx, up)
					if err := errors.Join(err, is(result, transport.ErrClosed)); err != nil {
						return err
					}
				}
				return nil
			})
		}},
}
