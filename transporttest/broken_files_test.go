//go:build unix

package transporttest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lxdtransport/transport"
)

// failedUploads are the cases in which an upload fails and the directory has to be as it was.
var failedUploads = []string{
	"upload/source-error", "upload/source-error-io.ErrUnexpectedEOF", "upload/new-file-source-error", "upload/ctx-ends-before",
	"upload/ctx-ends-during", "upload/ctx-ends-with-blocked-source", "upload/onto-what-is-no-file",
}

func brokenUploads() []broken {
	return []broken{
		{"writes into the file itself", []string{
			"upload/atomic", "upload/temp-is-private", "upload/source-error", "upload/source-error-io.ErrUnexpectedEOF",
			"upload/ctx-ends-before", "upload/ctx-ends-during", "upload/ctx-ends-with-blocked-source",
			"files/streams-are-not-closed", "close/leaves-no-temporary-file",
		}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				f, err := os.OpenFile(filepath.Join(w.dir, dst), os.O_WRONLY|os.O_TRUNC|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
				if info, statErr := os.Stat(filepath.Join(w.dir, dst)); err != nil || statErr != nil || !info.Mode().IsRegular() || src == nil {
					if err == nil {
						f.Close()
					}
					if src == nil || !bytes.HasSuffix([]byte(dst), []byte("/f")) || opts == nil || opts.Mode != 0o644 || opts.MkdirAll {
						return w.host.Upload(ctx, dst, src, opts)
					}
					f, err = os.Create(filepath.Join(w.dir, dst))
					if err != nil {
						return err
					}
				}
				defer f.Close()
				copied := io.TeeReader(src, f)
				return w.host.Upload(ctx, dst, reader(copied.Read), opts)
			}
		}},
		{"leaves its temporary file", append(failedUploads, "files/misuse-is-an-error", "close/leaves-no-temporary-file"), func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				err := w.host.Upload(ctx, dst, src, opts)
				if err != nil && !strings.ContainsRune(dst, 0) && strings.Contains(dst, "tmp/transporttest-") && src != nil {
					_ = os.WriteFile(filepath.Join(w.dir, filepath.Dir(dst), ".left.tmp"), nil, 0o600)
				}
				return err
			}
		}},
		{"ignores Mode", []string{"upload/mode"}, func(w *wrapper) {
			uploading(w, func(_ *string, _ *io.Reader, opts *transport.UploadOptions) {
				if opts.Mode.IsRegular() {
					opts.Mode = 0
				}
			})
		}},
		{"gives every file one mode", []string{"upload/mode-by-default"}, func(w *wrapper) {
			uploading(w, func(_ *string, _ *io.Reader, opts *transport.UploadOptions) {
				if opts.Mode == 0 {
					opts.Mode = 0o644
				}
			})
		}},
		{"ignores Owner", []string{"upload/owner", "upload/mkdirall-owner"}, func(w *wrapper) {
			uploading(w, func(_ *string, _ *io.Reader, opts *transport.UploadOptions) {
				if opts.Owner != nil && opts.Owner.UID != 1<<32-1 {
					opts.Owner = nil
				}
			})
		}},
		{"ignores ModTime", []string{"upload/time"}, func(w *wrapper) {
			uploading(w, func(_ *string, _ *io.Reader, opts *transport.UploadOptions) { opts.ModTime = time.Time{} })
		}},
		{"makes no directories", []string{"upload/mkdirall", "upload/mkdirall-owner", "upload/options-are-not-modified", "files/many-at-once", "close/ends-transfers"}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				if opts != nil && opts.MkdirAll {
					return &fs.PathError{Op: "upload", Path: dst, Err: errors.ErrUnsupported}
				}
				return w.host.Upload(ctx, dst, src, opts)
			}
		}},
		{"always makes directories", []string{"upload/without-mkdirall", "files/errors-are-PathErrors", "files/errors-told-apart"}, func(w *wrapper) {
			uploading(w, func(_ *string, _ *io.Reader, opts *transport.UploadOptions) { opts.MkdirAll = true })
		}},
		{"follows links", []string{"upload/replaces-a-link"}, func(w *wrapper) {
			uploading(w, func(dst *string, _ *io.Reader, _ *transport.UploadOptions) {
				if to, err := os.Readlink(filepath.Join(w.dir, *dst)); err == nil {
					*dst = filepath.Join(filepath.Dir(*dst), to)
				}
			})
		}},
		{"replaces a FIFO", []string{"upload/onto-what-is-no-file"}, func(w *wrapper) {
			uploading(w, func(dst *string, _ *io.Reader, _ *transport.UploadOptions) {
				name := filepath.Join(w.dir, *dst)
				if info, err := os.Lstat(name); err == nil && info.Mode().Type() == fs.ModeNamedPipe {
					_ = os.Remove(name)
				}
			})
		}},
		{"reads the source whole", []string{
			"upload/constant-memory", "upload/temp-is-private", "upload/ctx-ends-with-blocked-source", "close/ends-transfers",
			"files/no-progress-after-return", "close/leaves-no-temporary-file",
		}, func(w *wrapper) {
			uploading(w, func(_ *string, src *io.Reader, _ *transport.UploadOptions) {
				if *src == nil {
					return
				}
				var all bytes.Buffer
				rest := *src
				if _, err := io.Copy(&all, io.LimitReader(rest, 24<<20)); err != nil { // zeros have no end
					rest = reader(func([]byte) (int, error) { return 0, err })
				}
				*src = io.MultiReader(&all, rest)
			})
		}},
		{"cuts long files", []string{"upload/content", "upload/constant-memory"}, func(w *wrapper) {
			uploading(w, func(_ *string, src *io.Reader, _ *transport.UploadOptions) {
				if *src != nil {
					*src = io.LimitReader(*src, 5<<20-1)
				}
			})
		}},
		{"loses what comes with the end", []string{"upload/any-reader"}, func(w *wrapper) {
			uploading(w, func(_ *string, src *io.Reader, _ *transport.UploadOptions) {
				if in := *src; in != nil {
					*src = reader(func(p []byte) (int, error) {
						n, err := in.Read(p)
						if err == io.EOF {
							n = 0
						}
						return n, err
					})
				}
			})
		}},
		{"takes a Read of nothing for the end", []string{"upload/any-reader"}, func(w *wrapper) {
			uploading(w, func(_ *string, src *io.Reader, _ *transport.UploadOptions) {
				if in := *src; in != nil {
					*src = reader(func(p []byte) (int, error) {
						n, err := in.Read(p)
						if n == 0 && err == nil {
							err = io.EOF
						}
						return n, err
					})
				}
			})
		}},
		{"transfers one file at a time", []string{"files/source-that-downloads", "close/leaves-no-temporary-file"}, func(w *wrapper) {
			var one sync.Mutex
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				one.Lock()
				defer one.Unlock()
				return w.host.Upload(ctx, dst, src, opts)
			}
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				one.Lock()
				defer one.Unlock()
				return w.host.Download(ctx, src, dst, opts)
			}
		}},
		{"changes directories that are there", []string{"upload/mkdirall"}, func(w *wrapper) {
			existing(w, func(dir string, _ *transport.UploadOptions) { _ = os.Chmod(dir, 0o755) })
		}},
		{"gives directories away that are there", []string{"upload/mkdirall-owner"}, func(w *wrapper) {
			existing(w, func(dir string, opts *transport.UploadOptions) {
				if opts.Owner != nil {
					_ = os.Chown(dir, int(opts.Owner.UID), int(opts.Owner.GID))
				}
			})
		}},
		{"takes rights of the group and of others away", []string{"upload/mode-by-default"}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				err := w.host.Upload(ctx, dst, src, opts)
				name := filepath.Join(w.dir, dst)
				if info, statErr := os.Lstat(name); err == nil && statErr == nil && (opts == nil || opts.Mode == 0) {
					_ = os.Chmod(name, info.Mode()&^0o022)
				}
				return err
			}
		}},
		{"has a temporary name that is another file's", []string{"upload/leaves-other-files"}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				err := w.host.Upload(ctx, dst, src, opts)
				if err == nil {
					_ = os.Remove(filepath.Join(w.dir, dst) + ".tmp")
				}
				return err
			}
		}},
		{"closes sources", []string{"files/streams-are-not-closed"}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				if c, ok := src.(io.Closer); ok {
					defer c.Close()
				}
				return w.host.Upload(ctx, dst, src, opts)
			}
		}},
		{"tells progress after it has returned", []string{"files/no-progress-after-return"}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				err := w.host.Upload(ctx, dst, src, opts)
				if opts != nil && opts.Progress != nil && errors.Is(err, context.Cause(ctx)) && err != nil {
					time.AfterFunc(50*time.Millisecond, func() { opts.Progress(1) })
				}
				return err
			}
		}},
		{"changes names", []string{"upload/names"}, func(w *wrapper) {
			uploading(w, func(dst *string, _ *io.Reader, _ *transport.UploadOptions) {
				*dst = strings.ReplaceAll(*dst, "\n", "_")
			})
		}},
		{"tells the wrong progress", []string{"upload/progress"}, func(w *wrapper) {
			uploading(w, func(_ *string, _ *io.Reader, opts *transport.UploadOptions) {
				if told := opts.Progress; told != nil {
					opts.Progress = func(n int64) { told(n + 1) }
				}
			})
		}},
		{"takes an error of the source for its end", []string{
			"upload/source-error", "upload/new-file-source-error", "upload/source-error-io.ErrUnexpectedEOF", "files/errors-are-PathErrors",
			"upload/leaves-other-files", "files/streams-are-not-closed",
		}, func(w *wrapper) {
			uploading(w, func(_ *string, src *io.Reader, _ *transport.UploadOptions) {
				*src = endsWith(*src, func(error) bool { return true })
			})
		}},
		{"takes io.ErrUnexpectedEOF for the end", []string{"upload/source-error-io.ErrUnexpectedEOF"}, func(w *wrapper) {
			uploading(w, func(_ *string, src *io.Reader, _ *transport.UploadOptions) {
				*src = endsWith(*src, func(err error) bool { return err == io.ErrUnexpectedEOF })
			})
		}},
		{"ignores ctx in uploads", []string{"upload/ctx-ends-before", "upload/ctx-ends-during", "upload/ctx-ends-with-blocked-source", "files/no-progress-after-return"}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				if src != nil {
					src = io.LimitReader(src, 64<<20) // for zeros have no end
				}
				return w.host.Upload(context.WithoutCancel(ctx), dst, src, opts)
			}
		}},
		{"fills options in", []string{"upload/options-are-not-modified"}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				err := w.host.Upload(ctx, dst, src, opts)
				if opts != nil && opts.Mode == 0 && opts.Progress == nil {
					opts.Mode = 0o644
				}
				return err
			}
		}},
		{"leaves a goroutine when the source fails", []string{
			"upload/source-error", "upload/source-error-io.ErrUnexpectedEOF", "upload/new-file-source-error", "files/errors-are-PathErrors",
			"upload/leaves-other-files", "files/streams-are-not-closed", "files/no-progress-after-return",
		}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				err := w.host.Upload(ctx, dst, src, opts)
				if err != nil && strings.Contains(err.Error(), "reading the source") {
					go func() { <-w.unblock }()
				}
				return err
			}
		}},
		{"fails when uploads meet", []string{"files/many-at-once", "close/leaves-no-temporary-file"}, func(w *wrapper) {
			var running atomic.Int32
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				defer running.Add(-1)
				if running.Add(1) > 1 {
					return errors.New("busy")
				}
				return w.host.Upload(ctx, dst, src, opts)
			}
		}},
		{"returns bare errors", []string{"files/errors-are-PathErrors"}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				return errors.Unwrap(w.host.Upload(ctx, dst, src, opts))
			}
		}},
		{"takes a missing directory for a missing host", []string{"files/errors-told-apart"}, func(w *wrapper) {
			w.upload = func(ctx context.Context, dst string, src io.Reader, opts *transport.UploadOptions) error {
				err := w.host.Upload(ctx, dst, src, opts)
				if errors.Is(err, fs.ErrNotExist) {
					return &fs.PathError{Op: "upload", Path: dst, Err: errors.Join(fs.ErrNotExist, transport.ErrNoHost)}
				}
				return err
			}
		}},
		{"takes relative paths", []string{"files/bad-paths", "files/errors-are-PathErrors"}, func(w *wrapper) {
			uploading(w, func(dst *string, _ *io.Reader, _ *transport.UploadOptions) {
				if !strings.HasPrefix(*dst, "/") && *dst != "" {
					*dst = "/" + *dst
				}
			})
		}},
		{"takes no source for an empty one", []string{"files/misuse-is-an-error"}, func(w *wrapper) {
			uploading(w, func(_ *string, src *io.Reader, _ *transport.UploadOptions) {
				if *src == nil {
					*src = strings.NewReader("")
				}
			})
		}},
	}
}

// existing does something to the directory of an upload with MkdirAll if it is there already.
func existing(w *wrapper, do func(dir string, opts *transport.UploadOptions)) {
	uploading(w, func(dst *string, _ *io.Reader, opts *transport.UploadOptions) {
		dir := filepath.Join(w.dir, filepath.Dir(*dst))
		if info, err := os.Stat(dir); opts.MkdirAll && err == nil && info.IsDir() {
			do(dir, opts)
		}
	})
}

// endsWith turns some errors of a reader into its end.
func endsWith(src io.Reader, some func(error) bool) io.Reader {
	if src == nil {
		return nil
	}
	return reader(func(p []byte) (int, error) {
		n, err := src.Read(p)
		if err != nil && some(err) {
			err = io.EOF
		}
		return n, err
	})
}

func brokenDownloads() []broken {
	return []broken{
		{"drops the last byte of long files", []string{"download/content", "download/constant-memory", "files/source-that-downloads"}, func(w *wrapper) {
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				if dst == nil {
					return w.host.Download(ctx, src, dst, opts)
				}
				total, held := 0, []byte(nil)
				return w.host.Download(ctx, src, writer(func(p []byte) (int, error) {
					if total += len(p); total <= 128<<10 {
						return dst.Write(p)
					}
					_, err := dst.Write(append(held, p[:len(p)-1]...))
					held = []byte{p[len(p)-1]}
					return len(p), err
				}), opts)
			}
		}},
		{"ignores Offset", []string{"download/offset-and-limit", "download/progress"}, func(w *wrapper) {
			downloading(w, func(_ *string, _ *io.Writer, opts *transport.DownloadOptions) { opts.Offset = 0 })
		}},
		{"ignores Limit", []string{"download/offset-and-limit", "download/limit-is-ErrLimit"}, func(w *wrapper) {
			downloading(w, func(_ *string, _ *io.Writer, opts *transport.DownloadOptions) { opts.Limit = 0 })
		}},
		{"tells of the file too late", []string{"download/stat"}, func(w *wrapper) {
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				if opts == nil || opts.Stat == nil {
					return w.host.Download(ctx, src, dst, opts)
				}
				var info fs.FileInfo
				mine := *opts
				mine.Stat = func(i fs.FileInfo) { info = i }
				err := w.host.Download(ctx, src, dst, &mine)
				opts.Stat(info)
				return err
			}
		}},
		{"tells no progress", []string{"download/progress"}, func(w *wrapper) {
			downloading(w, func(_ *string, _ *io.Writer, opts *transport.DownloadOptions) {
				if opts.Offset > 0 {
					opts.Progress = nil
				}
			})
		}},
		{"does not follow links", []string{"download/follows-links"}, func(w *wrapper) {
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				if info, err := os.Lstat(filepath.Join(w.dir, src)); err == nil && info.Mode().Type() == fs.ModeSymlink {
					return &fs.PathError{Op: "download", Path: src, Err: fs.ErrInvalid}
				}
				return w.host.Download(ctx, src, dst, opts)
			}
		}},
		{"opens a FIFO", []string{"download/refuses-what-is-no-file"}, func(w *wrapper) {
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				if info, err := os.Stat(filepath.Join(w.dir, src)); err == nil && info.Mode().Type() == fs.ModeNamedPipe {
					<-ctx.Done() // as an open would
				}
				return w.host.Download(ctx, src, dst, opts)
			}
		}},
		{"swallows the errors of the writer of a download", []string{"download/writer-error", "files/errors-are-PathErrors", "files/streams-are-not-closed"}, func(w *wrapper) {
			downloading(w, func(_ *string, dst *io.Writer, _ *transport.DownloadOptions) {
				if out := *dst; out != nil {
					*dst = writer(func(p []byte) (int, error) { _, _ = out.Write(p); return len(p), nil })
				}
			})
		}},
		{"ignores ctx in downloads", []string{"download/ctx", "download/ctx-ends-with-blocked-writer"}, func(w *wrapper) {
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				return w.host.Download(context.WithoutCancel(ctx), src, dst, opts)
			}
		}},
		{"closes destinations", []string{"files/streams-are-not-closed"}, func(w *wrapper) {
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				if c, ok := dst.(io.Closer); ok {
					defer c.Close()
				}
				return w.host.Download(ctx, src, dst, opts)
			}
		}},
		{"tells the progress of a download after it has returned", []string{"files/no-progress-after-return"}, func(w *wrapper) {
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				err := w.host.Download(ctx, src, dst, opts)
				if err == nil && opts != nil && opts.Progress != nil {
					time.AfterFunc(50*time.Millisecond, func() { opts.Progress(1) })
				}
				return err
			}
		}},
		{"waits for the writer of a download", []string{"download/ctx-ends-with-blocked-writer"}, func(w *wrapper) {
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				if dst == nil {
					return w.host.Download(ctx, src, dst, opts)
				}
				var writing atomic.Int32
				err := w.host.Download(ctx, src, writer(func(p []byte) (int, error) {
					writing.Add(1)
					defer writing.Add(-1)
					return dst.Write(p)
				}), opts)
				for writing.Load() > 0 {
					time.Sleep(time.Millisecond)
				}
				return err
			}
		}},
		{"collects a download", []string{"download/constant-memory", "download/ctx-ends-with-blocked-writer"}, func(w *wrapper) {
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				if dst == nil || opts != nil {
					return w.host.Download(ctx, src, dst, opts)
				}
				var all bytes.Buffer
				err := w.host.Download(ctx, src, &all, opts)
				if err == nil && all.Len() > 0 {
					n, writeErr := dst.Write(all.Bytes())
					if writeErr == nil && n < all.Len() {
						writeErr = io.ErrShortWrite
					}
					if writeErr != nil {
						err = &fs.PathError{Op: "download", Path: src, Err: writeErr}
					}
				}
				return err
			}
		}},
		{"takes a missing file for a missing host", []string{"files/errors-told-apart"}, func(w *wrapper) {
			w.download = func(ctx context.Context, src string, dst io.Writer, opts *transport.DownloadOptions) error {
				err := w.host.Download(ctx, src, dst, opts)
				if errors.Is(err, fs.ErrNotExist) {
					return &fs.PathError{Op: "download", Path: src, Err: fmt.Errorf("%w: %w", transport.ErrNoHost, fs.ErrNotExist)}
				}
				return err
			}
		}},
	}
}
