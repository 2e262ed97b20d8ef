//go:build unix

package transporttest_test

import (
	"context"
	"errors"
	"io"
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
			w.close = func() error {
				go w.host.Close()
				for !errors.Is(w.host.Exec(context.Background(), transport.Command{Args: []string{"true"}}), transport.ErrClosed) {
				}
				return nil
			}
		}},
		{"does not cancel in Close", []string{"close/cancels-commands-and-waits", "close/ends-transfers"}, func(w *wrapper) {
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
