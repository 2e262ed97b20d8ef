package transporttest

import (
	"context"
	"io"
	"strconv"
	"testing"

	"github.com/lxdtransport/transport"
)

// Benchmark measures a transport with what [Run] works with: one short command after the other, and 16 MiB in each direction, as a stream and as a file. It
// needs cat, head, mkdir, rm, sh and true in the host.
func Benchmark(b *testing.B, new func(b *testing.B) transport.Transport) {
	b.Helper()
	const size = 16 << 20
	for _, c := range []struct {
		name  string
		bytes int64
		run   func(ctx context.Context, host transport.Transport, dir string) error
	}{
		{"exec-true", 0, func(ctx context.Context, host transport.Transport, _ string) error {
			return host.Exec(ctx, transport.Command{Args: []string{"true"}})
		}},
		{"stdout", size, func(ctx context.Context, host transport.Transport, _ string) error {
			return host.Exec(ctx, transport.Command{Args: []string{"head", "-c", strconv.Itoa(size), "/dev/zero"}, Stdout: io.Discard})
		}},
		{"stdin", size, func(ctx context.Context, host transport.Transport, _ string) error {
			return host.Exec(ctx, transport.Command{Args: transport.Shell("exec cat >/dev/null"), Stdin: io.LimitReader(zeros, size)})
		}},
		{"upload", size, func(ctx context.Context, host transport.Transport, dir string) error {
			return host.Upload(ctx, dir+"/up", io.LimitReader(zeros, size), nil)
		}},
		{"download", size, func(ctx context.Context, host transport.Transport, dir string) error {
			return host.Download(ctx, dir+"/down", writerFunc(func(p []byte) (int, error) { return len(p), nil }), nil)
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			host := new(b)
			w := &bench{limits: limits{patience, soon}, hosts: []transport.Transport{host}}
			ctx := context.WithValue(b.Context(), benchKey{}, w)
			dir, err := scratch(ctx, host)
			if err == nil {
				err = host.Upload(ctx, dir+"/down", io.LimitReader(zeros, size), nil)
			}
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(c.bytes)
			b.ReportAllocs()
			for b.Loop() {
				if err := c.run(ctx, host, dir); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			if err := w.finish(); err != nil {
				b.Error(err)
			}
		})
	}
}
