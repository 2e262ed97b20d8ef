//go:build unix

package transporttest_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing/fstest"
	"time"

	"github.com/lxdtransport/transport"
)

// treeing changes the arguments of uploads of trees, with options that are never nil.
func treeing(w *wrapper, change func(dst *string, src *fs.FS, opts *transport.TreeOptions)) {
	w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
		mine := optionsOf(opts)
		if src != nil {
			change(&dst, &src, &mine)
		}
		return transport.UploadTree(ctx, w.host, dst, src, &mine)
	}
}

// untreeing changes the arguments of downloads of trees.
func untreeing(w *wrapper, change func(src *string, opts *transport.TreeOptions)) {
	w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
		mine := optionsOf(opts)
		change(&src, &mine)
		return transport.DownloadTree(ctx, w.host, src, dst, &mine)
	}
}

// afterTree does something in the host's directory after a successful upload, whose path on this machine it gets.
func afterTree(w *wrapper, do func(dir string, src fs.FS, stats *transport.TreeStats)) {
	w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
		stats, err := transport.UploadTree(ctx, w.host, dst, src, opts)
		if err == nil {
			do(filepath.Join(w.dir, dst), src, &stats)
		}
		return stats, err
	}
}

// afterDownload does something with what has arrived.
func afterDownload(w *wrapper, do func(dst *os.Root, stats *transport.TreeStats)) {
	w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
		stats, err := transport.DownloadTree(ctx, w.host, src, dst, opts)
		if err == nil {
			do(dst, &stats)
		}
		return stats, err
	}
}

func optionsOf(opts *transport.TreeOptions) transport.TreeOptions {
	if opts == nil {
		return transport.TreeOptions{}
	}
	return *opts
}

// leaving makes Match refuse some entries that are not reported.
func leaving(opts *transport.TreeOptions, some func(name string, d fs.DirEntry) bool) {
	match := opts.Match
	opts.Match = func(name string, d fs.DirEntry) bool { return (match == nil || match(name, d)) && !some(name, d) }
}

// both breaks the two directions alike.
func both(w *wrapper, change func(opts *transport.TreeOptions)) {
	treeing(w, func(_ *string, _ *fs.FS, opts *transport.TreeOptions) { change(opts) })
	untreeing(w, func(_ *string, opts *transport.TreeOptions) { change(opts) })
}

// otherErrors changes the errors of both directions.
func otherErrors(w *wrapper, change func(ctx context.Context, name string, err error) error) {
	w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
		stats, err := transport.UploadTree(ctx, w.host, dst, src, opts)
		return stats, change(ctx, dst, err)
	}
	w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
		stats, err := transport.DownloadTree(ctx, w.host, src, dst, opts)
		return stats, change(ctx, src, err)
	}
}

func here(dir, name string) bool {
	_, err := os.Lstat(filepath.Join(dir, name))
	return err == nil
}

// set changes a mode in an uploaded tree if that is there.
func set(dir, name string, mode fs.FileMode) {
	if info, err := os.Lstat(filepath.Join(dir, name)); err == nil {
		_ = os.Chmod(filepath.Join(dir, name), mode)
		_ = os.Chtimes(filepath.Join(dir, name), info.ModTime(), info.ModTime())
	}
}

func brokenTrees() []broken {
	return append(append(brokenTreeContents(), brokenTreeOptions()...), brokenTreeEnds()...)
}

func brokenTreeContents() []broken {
	return []broken{
		{"changes line breaks in names of a tree", []string{"tree/upload-names"}, func(w *wrapper) {
			afterTree(w, func(dir string, _ fs.FS, _ *transport.TreeStats) {
				_ = os.Rename(filepath.Join(dir, "line\nbreak"), filepath.Join(dir, "line_break"))
			})
		}},
		{"changes line breaks in names that arrive", []string{"tree/download-names"}, func(w *wrapper) {
			afterDownload(w, func(dst *os.Root, _ *transport.TreeStats) { _ = dst.Rename("line\nbreak", "line_break") })
		}},
		{"cuts long paths", []string{"tree/upload-deep"}, func(w *wrapper) {
			treeing(w, func(_ *string, _ *fs.FS, opts *transport.TreeOptions) {
				leaving(opts, func(name string, _ fs.DirEntry) bool { return len(name) > 3500 })
			})
		}},
		{"cuts long paths that arrive", []string{"tree/download-deep"}, func(w *wrapper) {
			untreeing(w, func(_ *string, opts *transport.TreeOptions) {
				leaving(opts, func(name string, _ fs.DirEntry) bool { return len(name) > 3500 })
			})
		}},
		{"makes read-only directories of a tree writable", []string{"tree/upload-modes"}, func(w *wrapper) {
			afterTree(w, func(dir string, _ fs.FS, _ *transport.TreeStats) { set(dir, "d0555", 0o755) })
		}},
		{"makes scripts that arrive files", []string{"tree/download-modes"}, func(w *wrapper) {
			afterDownload(w, func(dst *os.Root, _ *transport.TreeStats) { _ = dst.Chmod("0755", 0o644) })
		}},
		{"takes mode 0 for none", []string{"tree/upload-no-rights"}, func(w *wrapper) {
			afterTree(w, func(dir string, _ fs.FS, _ *transport.TreeStats) { set(dir, "0000", 0o644) })
		}},
		{"takes mode 0 that arrives for none", []string{"tree/download-no-rights"}, func(w *wrapper) {
			afterDownload(w, func(dst *os.Root, _ *transport.TreeStats) { _ = dst.Chmod("d0000", 0o755) })
		}},
		{"loses empty directories", []string{"tree/upload-empty"}, func(w *wrapper) {
			afterTree(w, func(dir string, _ fs.FS, _ *transport.TreeStats) { _ = syscall.Rmdir(filepath.Join(dir, "d/e/f")) })
		}},
		{"loses empty directories that arrive", []string{"tree/download-empty"}, func(w *wrapper) {
			afterDownload(w, func(dst *os.Root, _ *transport.TreeStats) { _ = dst.Remove("d/e/f") })
		}},
		{"makes no directory for an empty tree", []string{"tree/upload-nothing"}, func(w *wrapper) {
			afterTree(w, func(dir string, src fs.FS, _ *transport.TreeStats) {
				if all, err := fs.ReadDir(src, "."); err == nil && len(all) == 0 {
					_ = os.Remove(dir)
				}
			})
		}},
		{"takes an empty tree for a missing one", []string{"tree/download-nothing"}, func(w *wrapper) {
			w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
				stats, err := transport.DownloadTree(ctx, w.host, src, dst, opts)
				if err == nil && stats == (transport.TreeStats{}) {
					err = &fs.PathError{Op: "download tree", Path: src, Err: fs.ErrNotExist}
				}
				return stats, err
			}
		}},
		{"cuts files of a tree", []string{"tree/upload-sizes"}, func(w *wrapper) {
			afterTree(w, func(dir string, _ fs.FS, _ *transport.TreeStats) {
				name := filepath.Join(dir, "f65537")
				if info, err := os.Stat(name); err == nil && !here(dir, "links") {
					_ = os.Truncate(name, 65536)
					_ = os.Chtimes(name, info.ModTime(), info.ModTime())
				}
			})
		}},
		{"loses the times of directories", []string{"tree/round-trip"}, func(w *wrapper) {
			afterDownload(w, func(dst *os.Root, stats *transport.TreeStats) {
				if stats.Symlinks == 3 {
					_ = dst.Chtimes("d07", time.Time{}, time.Now())
				}
			})
		}},
		{"cannot name what is not UTF-8", []string{"tree/upload-from-a-directory"}, func(w *wrapper) {
			treeing(w, func(_ *string, _ *fs.FS, opts *transport.TreeOptions) {
				leaving(opts, func(name string, _ fs.DirEntry) bool { return strings.Contains(name, "\xff") })
			})
		}},
		{"needs times", []string{"tree/upload-from-embed"}, func(w *wrapper) {
			w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
				if m, ok := src.(fstest.MapFS); ok && m["script"] != nil && m["script"].ModTime.IsZero() {
					return transport.TreeStats{}, &fs.PathError{Op: "upload tree", Path: dst, Err: fs.ErrInvalid}
				}
				return transport.UploadTree(ctx, w.host, dst, src, opts)
			}
		}},
		{"makes private parents", []string{"tree/upload-makes-parents"}, func(w *wrapper) {
			afterTree(w, func(dir string, _ fs.FS, _ *transport.TreeStats) {
				if strings.HasSuffix(dir, "/a/b c/-d") {
					_ = os.Chmod(filepath.Dir(dir), 0o700)
				}
			})
		}},
		{"empties the directory first", []string{"tree/upload-into-existing", "tree/upload-onto-a-directory", "tree/upload-onto-what-is-no-directory", "tree/owner"}, func(w *wrapper) {
			treeing(w, func(dst *string, _ *fs.FS, opts *transport.TreeOptions) {
				// Where the directory is empty nothing can be skipped, which is another case's.
				if !opts.SkipUnchanged && strings.HasPrefix(*dst, "/tmp/transporttest-") && !strings.ContainsRune(*dst, 0) {
					_ = os.RemoveAll(filepath.Join(w.dir, *dst))
				}
			})
		}},
		{"follows links here", []string{"tree/download-into-existing"}, func(w *wrapper) {
			w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
				if dst != nil {
					if target, err := dst.Readlink("d/link"); err == nil {
						_ = dst.WriteFile(path.Join("d", target), []byte("through"), 0o600)
					}
				}
				return transport.DownloadTree(ctx, w.host, src, dst, opts)
			}
		}},
		{"fails when trees meet", []string{"tree/two-at-once"}, func(w *wrapper) {
			var running atomic.Int32
			w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
				defer running.Add(-1)
				if running.Add(1) > 1 {
					return transport.TreeStats{}, errors.New("busy")
				}
				return transport.UploadTree(ctx, w.host, dst, src, opts)
			}
		}},
		{"leaves hard links out", []string{"tree/download-what-is-no-file"}, func(w *wrapper) {
			untreeing(w, func(_ *string, opts *transport.TreeOptions) {
				leaving(opts, func(name string, _ fs.DirEntry) bool { return name == "twice" })
			})
		}},
		{"takes the sticky bit along", []string{"tree/upload-without-special-bits"}, func(w *wrapper) {
			afterTree(w, func(dir string, src fs.FS, _ *transport.TreeStats) {
				if info, err := fs.Stat(src, "d"); err == nil && info.Mode()&fs.ModeSticky != 0 {
					set(dir, "d", 0o755|fs.ModeSticky)
				}
			})
		}},
	}
}

func brokenTreeOptions() []broken {
	return []broken{
		{"asks Match about files only", []string{"tree/match"}, func(w *wrapper) {
			both(w, func(opts *transport.TreeOptions) {
				if match := opts.Match; match != nil {
					opts.Match = func(name string, d fs.DirEntry) bool { return d.IsDir() || match(name, d) }
				}
			})
		}},
		{"ignores Match", []string{"tree/match"}, func(w *wrapper) {
			both(w, func(opts *transport.TreeOptions) { opts.Match = nil })
		}},
		{"keeps no links", []string{"tree/links-kept", "tree/round-trip", "tree/upload-from-a-directory", "tree/owner"}, func(w *wrapper) {
			treeing(w, func(_ *string, _ *fs.FS, opts *transport.TreeOptions) {
				if opts.Symlinks == transport.KeepSymlinks {
					opts.Symlinks = transport.SkipSymlinks
				}
			})
		}},
		{"keeps links that nobody wants", []string{"tree/links-skipped"}, func(w *wrapper) {
			both(w, func(opts *transport.TreeOptions) {
				if opts.Symlinks == transport.SkipSymlinks {
					opts.Symlinks = transport.KeepSymlinks
				}
			})
		}},
		{"leaves out silently", []string{"tree/links-kept", "tree/links-skipped", "tree/download-what-is-no-file", "tree/upload-without-special-bits"}, func(w *wrapper) {
			both(w, func(opts *transport.TreeOptions) {
				if !opts.SkipUnchanged { // another case's
					opts.Skipped = nil
				}
			})
		}},
		{"leaves links out that are to be an error", []string{"tree/links-rejected"}, func(w *wrapper) {
			both(w, func(opts *transport.TreeOptions) {
				if opts.Symlinks == transport.RejectSymlinks {
					opts.Symlinks = transport.SkipSymlinks
				}
			})
		}},
		{"takes a limit that is met for one that is passed", []string{"tree/limits"}, func(w *wrapper) {
			both(w, func(opts *transport.TreeOptions) {
				if opts.MaxEntries == 8 {
					opts.MaxEntries--
				}
			})
		}},
		{"ignores MaxBytes", []string{"tree/limit-MaxBytes"}, func(w *wrapper) {
			both(w, func(opts *transport.TreeOptions) { opts.MaxBytes = min(0, opts.MaxBytes) })
		}},
		{"ignores MaxFileBytes", []string{"tree/limit-MaxFileBytes", "tree/download-error-leaves-all-as-it-was"}, func(w *wrapper) {
			both(w, func(opts *transport.TreeOptions) { opts.MaxFileBytes = min(0, opts.MaxFileBytes) })
		}},
		{"ignores MaxEntries", []string{"tree/limit-MaxEntries"}, func(w *wrapper) {
			both(w, func(opts *transport.TreeOptions) { opts.MaxEntries = min(0, opts.MaxEntries) })
		}},
		{"ignores MaxDepth", []string{"tree/limit-MaxDepth"}, func(w *wrapper) {
			both(w, func(opts *transport.TreeOptions) { opts.MaxDepth = min(0, opts.MaxDepth) })
		}},
		{"tells the progress of a tree at its end only", []string{"tree/progress", "tree/upload-ctx-ends-during"}, func(w *wrapper) {
			w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
				mine := optionsOf(opts)
				mine.Progress = nil
				stats, err := transport.UploadTree(ctx, w.host, dst, src, &mine)
				if opts != nil && opts.Progress != nil {
					opts.Progress(stats)
				}
				return stats, err
			}
		}},
		{"fills the options of a tree in", []string{"tree/options-are-not-modified"}, func(w *wrapper) {
			w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
				stats, err := transport.DownloadTree(ctx, w.host, src, dst, opts)
				if opts != nil && opts.MaxEntries == 1000 {
					opts.MaxDepth = 4096
				}
				return stats, err
			}
		}},
		{"sends what is unchanged", []string{"tree/skip-unchanged"}, func(w *wrapper) {
			treeing(w, func(_ *string, _ *fs.FS, opts *transport.TreeOptions) { opts.SkipUnchanged = false })
		}},
		{"takes what exists for unchanged", []string{"tree/skip-unchanged"}, func(w *wrapper) {
			treeing(w, func(dst *string, _ *fs.FS, opts *transport.TreeOptions) {
				if to := filepath.Join(w.dir, *dst); opts.SkipUnchanged {
					leaving(opts, func(name string, d fs.DirEntry) bool { return d.Type().IsRegular() && here(to, name) })
				}
			})
		}},
		{"ignores the Owner of a tree", []string{"tree/owner"}, func(w *wrapper) {
			treeing(w, func(_ *string, _ *fs.FS, opts *transport.TreeOptions) {
				if opts.Owner != nil && opts.Owner.UID != 1<<32-1 {
					opts.Owner = nil
				}
			})
		}},
	}
}

func brokenTreeEnds() []broken {
	return []broken{
		{"takes a missing tree for a missing host", []string{"tree/source-missing"}, func(w *wrapper) {
			otherErrors(w, func(_ context.Context, name string, err error) error {
				if errors.Is(err, fs.ErrNotExist) {
					return &fs.PathError{Op: "download tree", Path: name, Err: fmt.Errorf("%w: %w", transport.ErrNoHost, err)}
				}
				return err
			})
		}},
		{"takes a file for a missing tree", []string{"tree/source-is-a-file"}, func(w *wrapper) {
			w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
				if info, err := os.Stat(filepath.Join(w.dir, src)); err == nil && !info.IsDir() {
					return transport.TreeStats{}, &fs.PathError{Op: "download tree", Path: src, Err: fs.ErrNotExist}
				}
				return transport.DownloadTree(ctx, w.host, src, dst, opts)
			}
		}},
		{"takes an error of a file for its end", []string{"tree/upload-read-error", "tree/upload-read-error-io.ErrUnexpectedEOF"}, func(w *wrapper) {
			otherErrors(w, func(_ context.Context, _ string, err error) error {
				if err != nil && (strings.Contains(err.Error(), "broken source") || strings.HasSuffix(err.Error(), "unexpected EOF") && !strings.Contains(err.Error(), "shrunk")) {
					return nil
				}
				return err
			})
		}},
		{"fills up a file that has shrunk", []string{"tree/upload-shrinks"}, func(w *wrapper) {
			otherErrors(w, func(_ context.Context, _ string, err error) error {
				if err != nil && strings.Contains(err.Error(), "shrunk") {
					return nil
				}
				return err
			})
		}},
		{"cuts a file that has grown", []string{"tree/upload-grows"}, func(w *wrapper) {
			otherErrors(w, func(_ context.Context, _ string, err error) error {
				if err != nil && strings.Contains(err.Error(), "grown") {
					return nil
				}
				return err
			})
		}},
		{"says nothing of a directory that could not be made", []string{"tree/upload-onto-what-is-no-directory"}, func(w *wrapper) {
			w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
				if src != nil {
					if info, err := os.Lstat(filepath.Join(w.dir, path.Clean("/"+strings.ReplaceAll(dst, "\x00", "_")), "culprit")); err == nil && info.Mode().IsRegular() {
						return transport.TreeStats{}, nil
					}
				}
				return transport.UploadTree(ctx, w.host, dst, src, opts)
			}
		}},
		{"replaces a directory by a file", []string{"tree/upload-onto-a-directory"}, func(w *wrapper) {
			treeing(w, func(dst *string, src *fs.FS, _ *transport.TreeOptions) {
				if info, err := fs.Stat(*src, "culprit"); err == nil && info.Mode().IsRegular() {
					_ = os.RemoveAll(filepath.Join(w.dir, *dst, "culprit"))
				}
			})
		}},
		{"replaces what is here by other kinds", []string{"tree/download-onto-other-kinds"}, func(w *wrapper) {
			w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
				if dst != nil {
					if info, err := dst.Lstat("culprit"); err == nil && info.Mode().IsRegular() {
						_ = dst.Remove("culprit")
					}
				}
				return transport.DownloadTree(ctx, w.host, src, dst, opts)
			}
		}},
		{"leaves its directory here", []string{
			"tree/download-error-leaves-all-as-it-was", "tree/download-onto-other-kinds", "tree/download-ctx-ends-during", "tree/ctx-ends-before", "tree/errors-are-PathErrors",
			"tree/source-missing", "tree/source-is-a-file", "tree/after-Close", "tree/limit-MaxBytes", "tree/limit-MaxFileBytes", "tree/limit-MaxEntries", "tree/limit-MaxDepth",
		}, func(w *wrapper) {
			w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
				stats, err := transport.DownloadTree(ctx, w.host, src, dst, opts)
				if err != nil && dst != nil {
					_ = dst.Mkdir(".transport-left.tmp", 0o700)
				}
				return stats, err
			}
		}},
		{"begins although ctx has ended", []string{"tree/ctx-ends-before"}, func(w *wrapper) {
			w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
				if ctx.Err() != nil {
					_ = os.MkdirAll(filepath.Join(w.dir, dst), 0o755)
				}
				return transport.UploadTree(ctx, w.host, dst, src, opts)
			}
		}},
		{"ignores ctx with trees", []string{
			"tree/ctx-ends-before", "tree/upload-ctx-ends-during", "tree/download-ctx-ends-during", "tree/upload-ctx-ends-with-blocked-source",
		}, func(w *wrapper) {
			w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
				mine := optionsOf(opts)
				if mine.MaxBytes == 0 {
					mine.MaxBytes = 64 << 20 // for one has no end
				}
				return transport.UploadTree(context.WithoutCancel(ctx), w.host, dst, src, &mine)
			}
			w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
				return transport.DownloadTree(context.WithoutCancel(ctx), w.host, src, dst, opts)
			}
		}},
		{"leaves temporary files of a tree", []string{
			"tree/upload-ctx-ends-during", "tree/upload-read-error", "tree/upload-read-error-io.ErrUnexpectedEOF", "tree/upload-shrinks", "tree/upload-grows",
			"tree/upload-onto-a-directory",
		}, func(w *wrapper) {
			w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
				stats, err := transport.UploadTree(ctx, w.host, dst, src, opts)
				if err != nil && strings.HasSuffix(dst, "/tree") {
					_ = os.WriteFile(filepath.Join(w.dir, dst, ".transport-left.tmp"), nil, 0o600)
				}
				return stats, err
			}
		}},
		{"calls Progress after its return", []string{"tree/upload-ctx-ends-with-blocked-source", "tree/upload-ctx-ends-during"}, func(w *wrapper) {
			w.uploadTree = func(ctx context.Context, dst string, src fs.FS, opts *transport.TreeOptions) (transport.TreeStats, error) {
				stats, err := transport.UploadTree(ctx, w.host, dst, src, opts)
				if err != nil && ctx.Err() != nil && opts != nil && opts.Progress != nil {
					var once sync.Once
					time.AfterFunc(100*time.Millisecond, func() { once.Do(func() { opts.Progress(stats) }) })
				}
				return stats, err
			}
		}},
		{"leaves a process of a tree", []string{"tree/download-ctx-ends-during"}, func(w *wrapper) {
			w.downloadTree = func(ctx context.Context, src string, dst *os.Root, opts *transport.TreeOptions) (transport.TreeStats, error) {
				stats, err := transport.DownloadTree(ctx, w.host, src, dst, opts)
				if ctx.Err() != nil && stats.Bytes > 0 {
					_ = w.host.Exec(context.WithoutCancel(ctx), transport.Command{Args: transport.Shell("sleep 60 >/dev/null 2>&1 </dev/null &"), Dir: src})
				}
				return stats, err
			}
		}},
		{"returns bare errors of trees", []string{"tree/errors-are-PathErrors"}, func(w *wrapper) {
			otherErrors(w, func(_ context.Context, name string, err error) error {
				if !strings.HasPrefix(name, "/") {
					return errors.Unwrap(err)
				}
				return err
			})
		}},
		{"works with trees after Close", []string{"tree/after-Close"}, func(w *wrapper) {
			otherErrors(w, func(_ context.Context, _ string, err error) error {
				if errors.Is(err, transport.ErrClosed) {
					return nil
				}
				return err
			})
		}},
		{"names no entry", []string{
			"tree/links-rejected", "tree/limit-MaxBytes", "tree/limit-MaxFileBytes", "tree/limit-MaxEntries", "tree/limit-MaxDepth", "tree/upload-read-error",
			"tree/upload-read-error-io.ErrUnexpectedEOF", "tree/upload-shrinks", "tree/upload-grows", "tree/download-onto-other-kinds",
			"tree/download-error-leaves-all-as-it-was", "tree/upload-onto-what-is-no-directory", "tree/upload-onto-a-directory",
		}, func(w *wrapper) {
			otherErrors(w, func(_ context.Context, name string, err error) error {
				if err == nil {
					return nil
				}
				return &fs.PathError{Op: "tree", Path: name, Err: &nameless{err}}
			})
		}},
	}
}

// nameless is an error that does not tell what it is about.
type nameless struct{ error }

func (n *nameless) Error() string { return "it failed" }
func (n *nameless) Unwrap() error { return n.error }
