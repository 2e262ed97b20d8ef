//go:build unix

package transporttest_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/lxdtransport/transport"
)

func brokenCloses() []broken {
	return []broken{
		{"does not say that it was closed", []string{"close/ErrClosed-everywhere", "close/cancels-commands-and-waits"}, func(w *wrapper) {
			result(w, func(_ context.Context, _ transport.Command, err error) error {
				if errors.Is(err, transport.ErrClosed) {
					return errors.New("bad file descriptor")
				}
				return err
			})
		}},
		{"fails when it is closed twice", []string{
			"close/twice", "close/ErrClosed-everywhere", "close/cancels-commands-and-waits", "close/ends-transfers",
			"close/cancels-started-commands", "close/leaves-no-temporary-file", "tree/after-Close",
		}, func(w *wrapper) {
			var closed atomic.Bool
			w.close = func() error {
				if closed.Swap(true) {
					return errors.New("already closed")
				}
				return w.host.Close()
			}
		}},
		{"does not wait in Close", []string{"close/cancels-commands-and-waits"}, func(w *wrapper) {
			var running atomic.Int32
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				running.Add(1)
				defer running.Add(-1)
				return w.host.Exec(ctx, cmd)
			}
			w.close = func() error {
				if running.Load() == 0 {
					return w.host.Close()
				}
				go w.host.Close()
				return nil
			}
		}},
		{"leaves a goroutine that was started with it", []string{"close/twice"}, func(w *wrapper) { // as in every other case
			go func() { <-w.unblock }()
		}},
		{"leaves its temporary file when it is closed", []string{"close/leaves-no-temporary-file"}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				err := w.host.Upload(ctx, dst, src, opts)
				if errors.Is(err, transport.ErrClosed) {
					_ = os.WriteFile(filepath.Join(w.dir, filepath.Dir(dst), ".left.tmp"), nil, 0o600)
				}
				return err
			}
		}},
		{"forgets what runs in the background", []string{"close/cancels-started-commands"}, func(w *wrapper) {
			var closed atomic.Bool
			w.start = func(ctx context.Context, cmd transport.Command) (transport.Process, error) {
				if closed.Load() {
					return transport.Start(ctx, w.host, cmd)
				}
				return w.another().Start(ctx, cmd)
			}
			w.close = func() error { closed.Store(true); return w.host.Close() }
		}},
		{"does not cancel in Close", []string{"close/cancels-commands-and-waits", "close/ends-transfers", "close/leaves-no-temporary-file"}, func(w *wrapper) {
			var running sync.WaitGroup
			w.exec = func(ctx context.Context, cmd transport.Command) error {
				running.Add(1)
				defer running.Done()
				return w.host.Exec(ctx, cmd)
			}
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				running.Add(1)
				defer running.Done()
				return w.host.Upload(ctx, dst, src, opts)
			}
			w.close = func() error { running.Wait(); return w.host.Close() }
		}},
	}
}
