package transporttest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/lxdtransport/transport"
)

// Transfers of trees that fail, and that end early.

var treeErrorRows = []row{
	{name: "tree/source-missing", why: "a typing error is no empty tree, and no missing host",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			_, err := transport.DownloadTree(ctx, host, p.far+"/culprit", p.near, nil)
			if err := errors.Join(accuses(err, "culprit", fs.ErrNotExist), isNot(err, transport.ErrNoHost, transport.ErrNotRunning, fs.ErrPermission)); err != nil {
				return fmt.Errorf("download: %w", err)
			}
			_, err = transport.UploadTree(ctx, host, p.far, os.DirFS(p.dir+"/culprit"), nil)
			if err := accuses(err, "", fs.ErrNotExist); err != nil {
				return fmt.Errorf("upload: %w", err)
			}
			return entriesHere(p.near, 0)
		})},
	{name: "tree/source-is-a-file", why: "a file is no tree; who is told that it does not exist looks in the wrong place",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			if err := up(ctx, host, p.far, "a file", nil); err != nil {
				return err
			}
			_, err := transport.DownloadTree(ctx, host, p.far, p.near, nil)
			if err := errors.Join(accuses(err, p.far), isNot(err, fs.ErrNotExist)); err != nil {
				return fmt.Errorf("download: %w", err)
			}
			if err := entriesHere(p.near, 0); err != nil {
				return err
			}
			if err := p.near.WriteFile("culprit", []byte("x"), 0o600); err != nil {
				return err
			}
			_, err = transport.UploadTree(ctx, host, p.far+"-up", os.DirFS(p.dir+"/culprit"), nil)
			if err := errors.Join(accuses(err, ""), isNot(err, fs.ErrNotExist)); err != nil {
				return fmt.Errorf("upload: %w", err)
			}
			return nil
		})},
	misread("tree/upload-read-error", "half a tree must not pass for a whole one; the caller wants its own error back", 100000, errBroken,
		func(fs.File, []byte) (int, error) { return 0, errBroken }),
	misread("tree/upload-read-error-io.ErrUnexpectedEOF", "a truncated archive says io.ErrUnexpectedEOF, which copying code takes for an end", 100000, io.ErrUnexpectedEOF,
		func(fs.File, []byte) (int, error) { return 0, io.ErrUnexpectedEOF }),
	misread("tree/upload-shrinks", "a file that becomes shorter while it is read would be filled up with zeros, or arrive short", 250000, nil,
		func(fs.File, []byte) (int, error) { return 0, io.EOF }),
	misread("tree/upload-grows", "a file that becomes longer while it is read would arrive in part", culpritSize, nil,
		func(_ fs.File, p []byte) (int, error) { return zeros(p) }),
	{name: "tree/upload-onto-what-is-no-directory", why: "a directory of the tree does not replace a file of the host, and is not silently lost",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			old := planted(file("culprit", 0o640, "old content"), file("culprit-2", 0o640, "more"))
			if err := old.grow(ctx, host, p.far); err != nil {
				return err
			}
			for _, c := range []struct {
				dst string
				f   forest
			}{
				{p.far + "/culprit", planted(file("f", 0o644, "x"))},
				{p.far + "/culprit/below", nil},
			} {
				_, err := transport.UploadTree(ctx, host, c.dst, c.f.source(), nil)
				if err := accuses(err, "culprit"); err != nil {
					return fmt.Errorf("an upload to %s: %w", c.dst, err)
				}
			}
			if err := old.stands(ctx, host, p.far); err != nil {
				return err
			}
			for _, f := range []forest{planted(directory("culprit", 0o755)), planted(directory("culprit-2", 0o755), file("culprit-2/f", 0o644, "x"))} {
				// A tar that replaces the file has done no harm, one that loses the directory has.
				if _, err := transport.UploadTree(ctx, host, p.far, f.source(), nil); err != nil {
					if err := accuses(err, "culprit"); err != nil {
						return fmt.Errorf("an upload of %d entries: %w", len(f), err)
					}
				} else if err := run(ctx, host, in(p.far, sh(`test -d "$1"`, f[0].name))); err != nil {
					return fmt.Errorf("an upload of %d entries is incomplete, and there was no error: %w", len(f), err)
				}
			}
			return nil
		})},
	{name: "tree/upload-onto-a-directory", why: "a file of the tree does not replace a directory with all that is in it",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			old := planted(directory("culprit", 0o755), file("culprit/kept", 0o644, "kept"))
			if err := old.grow(ctx, host, p.far); err != nil {
				return err
			}
			_, err := transport.UploadTree(ctx, host, p.far, planted(file("culprit", 0o644, "x")).source(), nil)
			return errors.Join(accuses(err, "culprit"), old.stands(ctx, host, p.far))
		})},
	{name: "tree/download-onto-other-kinds", why: "what is here stays, and nothing of the tree arrives",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := planted(file("a", 0o644, "new"), directory("culprit", 0o755), file("culprit/f", 0o644, "x"), file("z", 0o644, "z"))
			if err := f.grow(ctx, host, p.far); err != nil {
				return err
			}
			for what, make := range map[string]func() error{
				"file":      func() error { return p.near.WriteFile("culprit", []byte("old"), 0o600) },
				"directory": func() error { return errors.Join(p.near.Mkdir("z", 0o700), p.near.WriteFile("z/old", nil, 0o600)) },
			} {
				if err := errors.Join(p.near.WriteFile("a", []byte("old"), 0o600), make()); err != nil {
					return err
				}
				name := map[string]string{"file": "culprit", "directory": "z"}[what]
				_, err := transport.DownloadTree(ctx, host, p.far, p.near, nil)
				if err := accuses(err, name); err != nil {
					return fmt.Errorf("where a %s is: %w", what, err)
				}
				text, err := p.near.ReadFile("a")
				entries := map[string]int{"file": 2, "directory": 3}[what]
				if err := errors.Join(err, equal("the old file", string(text), "old"), entriesHere(p.near, entries), empty(p.near)); err != nil {
					return err
				}
			}
			return nil
		})},
	{name: "tree/download-error-leaves-all-as-it-was", why: "half a tree must not be taken for a result",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := append(manyFiles(10), planted(file("d09/zz-culprit", 0o644, strings.Repeat("x", 5000)))...)
			if err := f.grow(ctx, host, p.far); err != nil {
				return err
			}
			before := planted(directory("d00", 0o755), file("d00/f01", 0o640, "old"))
			err := errors.Join(p.near.Mkdir("d00", 0o755), p.near.WriteFile("d00/f01", []byte("old"), 0o640))
			for _, n := range []node{before[1], before[0]} {
				err = errors.Join(err, p.near.Chtimes(n.name, n.time, n.time))
			}
			if err != nil {
				return err
			}
			stats, err := transport.DownloadTree(ctx, host, p.far, p.near, &transport.TreeOptions{MaxFileBytes: 4999})
			if err := accuses(err, "d09/zz-culprit", transport.ErrLimit); err != nil {
				return err
			}
			if stats.Files >= 101 {
				return fmt.Errorf("the statistics are %+v", stats)
			}
			return before.stood(p.near)
		})},
	{name: "tree/ctx-ends-before", why: "a context that has ended transfers nothing",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			if err := planted(file("f", 0o644, "x")).grow(ctx, host, p.far); err != nil {
				return err
			}
			mine := errors.New("not today")
			ended, cancel := context.WithCancelCause(ctx)
			cancel(mine)
			_, upErr := transport.UploadTree(ended, host, p.far+"-up", planted(file("f", 0o644, "x")).source(), nil)
			_, downErr := transport.DownloadTree(ended, host, p.far, p.near, nil)
			if err := errors.Join(is(upErr, mine), is(downErr, mine), entriesHere(p.near, 0)); err != nil {
				return err
			}
			return run(ctx, host, in("/", sh(`! [ -e "$1" ]`, strings.TrimPrefix(p.far, "/")+"-up")))
		})},
	{name: "tree/upload-ctx-ends-during", why: "a cancelled upload leaves no process and no temporary name in the host",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			var q quiet
			opts := q.options()
			return ends(ctx, opts, func(ctx context.Context) error {
				_, err := transport.UploadTree(ctx, host, p.far, endless(), opts)
				return err
			}, q.stays, func() error { return deserted(ctx, host, p.far) }, func() error { return tidy(ctx, host, p.far) })
		})},
	{name: "tree/download-ctx-ends-during", why: "a cancelled download leaves no process in the host, and nothing here",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			if err := planted(file("a", 0o644, "x")).grow(ctx, host, p.far); err != nil {
				return err
			}
			if err := run(ctx, host, in(p.far, sh("head -c 33554432 /dev/zero >zeros"))); err != nil {
				return err
			}
			var q quiet
			opts := q.options()
			return ends(ctx, opts, func(ctx context.Context) error {
				_, err := transport.DownloadTree(ctx, host, p.far, p.near, opts)
				return err
			}, q.stays, func() error { return deserted(ctx, host, p.far) }, func() error { return entriesHere(p.near, 0) })
		})},
	{name: "tree/upload-ctx-ends-with-blocked-source", why: "a file system that hangs must not hold the upload",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			src := newBlocked()
			defer src.unblock()
			var q quiet
			mine := errors.New("enough")
			upCtx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			hangs := oddFile{planted(file("a", 0o644, "x"), file("hangs", 0o644, "some text"), file("z", 0o644, "x")).source(), "hangs",
				func(_ fs.File, p []byte) (int, error) { return src.Read(p) }}
			done := background(func() error {
				_, err := transport.UploadTree(upCtx, host, p.far, hangs, q.options())
				return err
			})
			if _, err := within(ctx, src.entered, "a Read"); err != nil {
				return err
			}
			cancel(mine)
			result, err := returns(ctx, done)
			if err == nil {
				err = is(result, mine)
			}
			if err != nil {
				return err
			}
			before := q.calls.Load()
			src.unblock()
			if err := q.stays(); err != nil || q.calls.Load() != before {
				return errors.Join(errors.New("the caller's functions were called after the return"), err)
			}
			return deserted(ctx, host, p.far)
		})},
	{name: "tree/errors-are-PathErrors", why: "misuse is an error with a sentence, not a panic",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := planted(file("f", 0o644, "x"))
			if err := f.grow(ctx, host, p.far); err != nil {
				return err
			}
			bad := map[string]*transport.TreeOptions{
				"a negative limit": {MaxEntries: -1}, "no policy": {Symlinks: 99}, "no owner": {Owner: &transport.User{UID: 1<<32 - 1}},
			}
			check := func(what, name string, err error) error {
				if e, ok := errors.AsType[*fs.PathError](err); !ok || e.Path != name || e.Op == "" {
					return fmt.Errorf("%s: want an *fs.PathError with the path %q, got %T: %w", what, name, err, orNil(err))
				}
				return nil
			}
			up := func(dst string, src fs.FS, opts *transport.TreeOptions) error {
				_, err := transport.UploadTree(ctx, host, dst, src, opts)
				return err
			}
			down := func(src string, dst *os.Root, opts *transport.TreeOptions) error {
				_, err := transport.DownloadTree(ctx, host, src, dst, opts)
				return err
			}
			var errs []error
			for what, opts := range bad {
				errs = append(errs, check("an upload with "+what, p.far, up(p.far, f.source(), opts)), check("a download with "+what, p.far, down(p.far, p.near, opts)))
			}
			for _, name := range []string{"", "relative", "../x", "/a\x00b"} {
				errs = append(errs, check("an upload", name, up(name, f.source(), nil)), check("a download", name, down(name, p.near, nil)))
			}
			errs = append(errs, check("a nil source", p.far, up(p.far, nil, nil)), check("a nil destination", p.far, down(p.far, nil, nil)))
			return errors.Join(append(errs, entriesHere(p.near, 0))...)
		})},
	{name: "tree/after-Close", why: "after Close nothing runs, and the error says why",
		run: func(ctx context.Context, host transport.Transport) (err error) {
			near, _, done, err := here()
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			if err := host.Close(); err != nil {
				return err
			}
			_, upErr := transport.UploadTree(ctx, host, "/tmp/transporttest-closed", planted(file("f", 0o644, "x")).source(), nil)
			_, downErr := transport.DownloadTree(ctx, host, "/tmp", near, nil)
			return errors.Join(is(upErr, transport.ErrClosed), is(downErr, transport.ErrClosed), entriesHere(near, 0))
		}},
}

var errBroken = errors.New("broken source")

const culpritSize = 300000

// misread is a case of one file of a source in which, behind the first good bytes, something else happens.
func misread(name, why string, good int64, want error, read func(fs.File, []byte) (int, error)) row {
	return row{name: name, why: why, run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
		f := planted(file("a", 0o644, "x"), directory("d", 0o755), file("d/culprit", 0o644, strings.Repeat("y", culpritSize)), file("z", 0o644, "x"))
		src := oddFile{f.source(), "d/culprit", func(file fs.File, p []byte) (int, error) {
			if at, err := file.(io.Seeker).Seek(0, io.SeekCurrent); err != nil || at >= good {
				return read(file, p)
			}
			return file.Read(p[:min(len(p), 50000)])
		}}
		_, err := transport.UploadTree(ctx, host, p.far, src, nil)
		var targets []error
		if want != nil {
			targets = append(targets, want)
		}
		return errors.Join(accuses(err, "d/culprit", targets...), deserted(ctx, host, p.far), tidy(ctx, host, p.far))
	})}
}

// ends cancels a transfer while it runs, checks its error, and then other things.
func ends(ctx context.Context, opts *transport.TreeOptions, start func(context.Context) error, checks ...func() error) error {
	mine := errors.New("enough")
	its, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	told := opts.Progress
	opts.Progress = func(s transport.TreeStats) {
		told(s)
		if s.Bytes > 1<<20 {
			cancel(mine)
		}
	}
	result, err := returns(ctx, background(func() error { return start(its) }))
	if err != nil {
		return err
	}
	if err := is(result, mine); err != nil {
		return err
	}
	for _, check := range checks {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}
