package transporttest

import (
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing/fstest"
	"time"

	"github.com/lxdtransport/transport"
)

// Whole directories, each way for itself. They go through transport.UploadTree and DownloadTree, so over the transport's own way if it has one.

var treeRows = slices.Concat(treeContentRows, treeOptionRows, treeErrorRows)

// oddNames are such as break scripts and archives.
func oddNames() forest {
	nodes := []node{directory("-rf", 0o755), directory("a b", 0o755)}
	for _, name := range []string{
		"-n", "--version", " ", "line\nbreak", "\n", `'"\`, `\n`, "$HOME", "*", "..x", "...", ".hidden", "ä€", "tab\t", "a:b", "@x",
		strings.Repeat("x", 255), strings.Repeat("ö", 127),
	} {
		nodes = append(nodes, file(name, 0o644, "1"+name), file("a b/"+name, 0o644, "2"+name))
	}
	return planted(append(nodes, directory("-rf/new\nline", 0o755), file("-rf/new\nline/ ", 0o644, "x"))...)
}

// deepNames has a path of nearly 4096 bytes: the host's directory comes on top of it.
func deepNames() forest {
	var nodes []node
	name := ""
	for i := range 15 {
		name += strings.Repeat(string(rune('a'+i)), 250)
		nodes = append(nodes, directory(name, 0o755))
		name += "/"
	}
	return planted(append(nodes, file(name+"f", 0o644, "deep"))...)
}

func manyModes() forest {
	return planted(
		file("0600", 0o600, "a"), file("0644", 0o644, "b"), file("0755", 0o755, "c"), file("0444", 0o444, "d"), file("0777", 0o777, "e"),
		directory("d0700", 0o700), file("d0700/f", 0o640, "f"), directory("d0777", 0o777), directory("d0755", 0o755),
		directory("d0555", 0o555), file("d0555/f", 0o400, "g"), directory("d0555/d", 0o500), file("d0555/d/f", 0o600, "h"),
	)
}

// noRights is what only root can read or write.
func noRights() forest {
	return planted(file("0000", 0, "secret"), directory("d0000", 0), file("d0000/f", 0, "more"), directory("d0000/d", 0o111))
}

func emptyThings() forest {
	return planted(directory("d", 0o755), directory("d/e", 0o755), directory("d/e/f", 0o755), file("d/empty", 0o644, ""), file("empty", 0o755, ""))
}

// prose is n letters, which unlike a pattern can be an argument of a command.
func prose(n int) string {
	p := pattern(n)
	for i, b := range p {
		p[i] = 'a' + b%26
	}
	return string(p)
}

// manyFiles are n directories with n files each.
func manyFiles(n int) forest {
	var nodes []node
	for i := range n {
		d := fmt.Sprintf("d%02d", i)
		nodes = append(nodes, directory(d, 0o755))
		for j := range n {
			nodes = append(nodes, file(fmt.Sprintf("%s/f%02d", d, j), 0o644, prose(i*j)))
		}
	}
	return planted(nodes...)
}

// sizes are such as meet the edges of blocks and frames.
func sizes() forest {
	var nodes []node
	for _, n := range []int{1, 511, 512, 513, 10239, 10240, 32<<10 - 1, 32 << 10, 64 << 10, 64<<10 + 1, 3<<20 + 1} {
		nodes = append(nodes, file(fmt.Sprintf("f%d", n), 0o644, prose(n)))
	}
	return planted(nodes...)
}

// sowing makes a case of an upload of a tree.
func sowing(tree func() forest) func(context.Context, transport.Transport) error {
	return withTrees(func(ctx context.Context, host transport.Transport, p place) error {
		f := tree()
		stats, err := upTree(ctx, host, p.far, f.source(), nil)
		if err != nil {
			return err
		}
		if stats != f.stats(0) {
			return fmt.Errorf("the statistics are %+v, not %+v", stats, f.stats(0))
		}
		return errors.Join(f.stands(ctx, host, p.far), removable(ctx, host, p.far))
	})
}

// reaping makes a case of a download of a tree that the host's commands have made.
func reaping(tree func() forest) func(context.Context, transport.Transport) error {
	return withTrees(func(ctx context.Context, host transport.Transport, p place) error {
		f := tree()
		if err := f.grow(ctx, host, p.far); err != nil {
			return err
		}
		stats, err := downTree(ctx, host, p.far, p.near, nil)
		if err != nil {
			return err
		}
		if stats != f.stats(0) {
			return fmt.Errorf("the statistics are %+v, not %+v", stats, f.stats(0))
		}
		return errors.Join(f.stood(p.near), removable(ctx, host, p.far))
	})
}

var treeContentRows = []row{
	{name: "tree/upload-names", why: "names hold blanks, quotes, line breaks and leading dashes, and have 255 bytes",
		run: sowing(oddNames)},
	{name: "tree/download-names", why: "what splits a list at blanks or lines loses files",
		run: reaping(oddNames)},
	{name: "tree/upload-deep", why: "paths have nearly 4096 bytes; archive formats have shorter ones",
		run: sowing(deepNames)},
	{name: "tree/download-deep", why: "who joins paths cannot go where the host can",
		run: reaping(deepNames)},
	{name: "tree/upload-modes", why: "scripts have to be executable, keys private, and a read-only directory is filled before it is one",
		run: sowing(manyModes)},
	{name: "tree/download-modes", why: "scripts have to be executable, keys private, and a read-only directory is filled before it is one",
		run: reaping(manyModes)},
	{name: "tree/upload-no-rights", why: "mode 0 is a mode, and not that none was given", needs: []Capability{Users},
		run: sowing(noRights)},
	{name: "tree/download-no-rights", why: "mode 0 is a mode, and not that none was given", needs: []Capability{Users},
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := noRights()
			if err := f.grow(ctx, host, p.far); err != nil {
				return err
			}
			if _, err := downTree(ctx, host, p.far, p.near, nil); err != nil {
				return err
			}
			if os.Geteuid() != 0 { // the modes are there, and hide what else is
				info, err := p.near.Lstat("d0000")
				if err == nil && info.Mode().Perm() != 0 {
					err = fmt.Errorf("the mode of d0000 is %v", info.Mode())
				}
				return err
			}
			return f.stood(p.near)
		})},
	{name: "tree/upload-empty", why: "builds expect their empty directories",
		run: sowing(emptyThings)},
	{name: "tree/download-empty", why: "builds expect their empty directories",
		run: reaping(emptyThings)},
	{name: "tree/upload-nothing", why: "a tree without entries is a directory, and no error",
		run: sowing(func() forest { return nil })},
	{name: "tree/download-nothing", why: "a tree without entries is no error",
		run: reaping(func() forest { return nil })},
	{name: "tree/upload-sizes", why: "every byte of every file, whatever the blocks are",
		run: sowing(sizes)},
	{name: "tree/round-trip", why: "what comes back is what was sent",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := append(manyFiles(20), sizes()...)
			f = append(f, planted(directory("links", 0o755), link("links/up", "../d00/f01"), link("links/here", "up"), link("links/dangling", "no/such"))...)
			opts := &transport.TreeOptions{Symlinks: transport.KeepSymlinks}
			if _, err := upTree(ctx, host, p.far, f.source(), opts); err != nil {
				return err
			}
			stats, err := downTree(ctx, host, p.far, p.near, opts)
			if err != nil {
				return err
			}
			if stats != f.stats(0) {
				return fmt.Errorf("the statistics are %+v, not %+v", stats, f.stats(0))
			}
			return f.stood(p.near)
		})},
	{name: "tree/upload-from-a-directory", why: "os.DirFS has links, hard links and names that io/fs does not know",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := planted(directory("d", 0o755), file("d/f", 0o755, "text"), file("d/hard", 0o755, "text"), file("g", 0o600, "more"), link("l", "d/f"))
			for _, n := range f {
				var err error
				switch name := filepath.Join(p.dir, n.name); {
				case n.mode.IsDir():
					err = os.Mkdir(name, 0o700)
				case n.isLink():
					err = os.Symlink(n.text, name)
				case n.name == "d/hard":
					err = os.Link(filepath.Join(p.dir, "d/f"), name)
				default:
					err = os.WriteFile(name, []byte(n.text), 0o600)
				}
				if err != nil {
					return err
				}
			}
			f[2].time = f[1].time // the same file
			for i := len(f) - 1; i >= 0; i-- {
				if n := f[i]; !n.isLink() {
					name := filepath.Join(p.dir, n.name)
					if err := errors.Join(os.Chmod(name, n.mode.Perm()), os.Chtimes(name, n.time, n.time)); err != nil {
						return err
					}
				}
			}
			if _, err := upTree(ctx, host, p.far, os.DirFS(p.dir), &transport.TreeOptions{Symlinks: transport.KeepSymlinks}); err != nil {
				return err
			}
			if err := f.stands(ctx, host, p.far); err != nil || runtime.GOOS != "linux" {
				return err // other systems have no such names
			}
			if err := errors.Join(p.near.RemoveAll("d"), p.near.Remove("l"), p.near.WriteFile("\xff\xfe", []byte("odd"), 0o600)); err != nil {
				return err
			}
			if _, err := upTree(ctx, host, p.far, os.DirFS(p.dir), nil); err != nil {
				return err
			}
			return prints(ctx, host, "odd", in(p.far, sh(`cat "$(printf '\377\376')"`)))
		})},
	{name: "tree/upload-from-embed", why: "an embed.FS has no times and no modes to write with, a zip.Reader no directories",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			src := fstest.MapFS{
				"d":      {Mode: fs.ModeDir | 0o555},
				"d/e/f":  {Data: []byte("inner"), Mode: 0o444}, // d/e is there because of it, without a time
				"script": {Data: []byte("text"), Mode: 0o444},
			}
			if _, err := upTree(ctx, host, p.far, src, nil); err != nil {
				return err
			}
			err := prints(ctx, host, "innertext", in(p.far, sh("cat d/e/f script")))
			for name, want := range map[string]string{"d": "dr-xr-xr-x", "d/e": "dr-xr-xr-x", "d/e/f": "-r--r--r--"} {
				got, _, modeErr := mode(ctx, host, p.far, name)
				err = errors.Join(err, modeErr, equal("mode of "+name, got, want))
			}
			var packed bytes.Buffer
			w := zip.NewWriter(&packed)
			for _, name := range []string{"z/e/f", "z/script"} {
				f, zipErr := w.CreateHeader(&zip.FileHeader{Name: name, Method: zip.Deflate, Modified: time.Unix(1e9, 0)})
				if zipErr == nil {
					_, zipErr = io.WriteString(f, name)
				}
				err = errors.Join(err, zipErr)
			}
			err = errors.Join(err, w.Close())
			r, zipErr := zip.NewReader(bytes.NewReader(packed.Bytes()), int64(packed.Len()))
			if err := errors.Join(err, zipErr); err != nil {
				return err
			}
			if _, err := upTree(ctx, host, p.far, r, nil); err != nil {
				return fmt.Errorf("a zip.Reader: %w", err)
			}
			err = prints(ctx, host, "z/e/fz/script", in(p.far, sh("cat z/e/f z/script")))
			return errors.Join(err, removable(ctx, host, p.far))
		})},
	{name: "tree/upload-makes-parents", why: "a fresh host has no directories",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := planted(file("f", 0o600, "x"))
			if _, err := upTree(ctx, host, p.far+"/a/b c/-d", f.source(), nil); err != nil {
				return err
			}
			if err := f.stands(ctx, host, p.far+"/a/b c/-d"); err != nil {
				return err
			}
			for _, name := range []string{".", "a", "a/b c", "a/b c/-d"} {
				got, _, err := mode(ctx, host, p.far, name)
				if err := errors.Join(err, equal("mode of "+name, got, "drwxr-xr-x")); err != nil {
					return err
				}
			}
			return nil
		})},
	{name: "tree/upload-into-existing", why: "a build runs again in the directory of the last one",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			old := planted(directory("d", 0o700), file("d/kept", 0o640, "kept"), file("d/old", 0o777, "a longer old content"), file("target", 0o600, "target"), link("d/link", "../target"))
			if err := old.grow(ctx, host, p.far); err != nil {
				return err
			}
			if err := run(ctx, host, in(p.far, sh("chmod 751 ."))); err != nil {
				return err
			}
			f := planted(file("first", 0o644, "1"), directory("d", 0o755), file("d/link", 0o600, "a file now"), file("d/new", 0o644, "new"), file("d/old", 0o644, "short"))
			if _, err := upTree(ctx, host, p.far, f.source(), nil); err != nil {
				return err
			}
			got, _, err := mode(ctx, host, p.far, ".")
			if err := errors.Join(err, equal("mode of the directory itself", got, "drwxr-x--x")); err != nil {
				return err
			}
			return append(f, old[1], old[3]).stands(ctx, host, p.far)
		})},
	{name: "tree/download-into-existing", why: "who can make a link must not choose what is overwritten here",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := planted(directory("d", 0o755), file("d/link", 0o600, "a file now"), file("d/new", 0o644, "new"), file("d/old", 0o644, "short"), directory("e", 0o755), file("e/f", 0o644, "f"))
			if err := f.grow(ctx, host, p.far); err != nil {
				return err
			}
			outside := planted(file("target", 0o644, "target"), directory("aside", 0o755), file("d/kept", 0o640, "kept"))
			err := errors.Join(p.near.Mkdir("d", 0o700), p.near.Mkdir("aside", 0o755), p.near.WriteFile("d/old", []byte("a longer old content"), 0o600),
				p.near.Symlink("../target", "d/link"), p.near.Symlink("aside", "e"))
			for _, n := range outside {
				if n.mode.IsRegular() {
					err = errors.Join(err, p.near.WriteFile(n.name, []byte(n.text), 0o600))
				}
				err = errors.Join(err, p.near.Chmod(n.name, n.mode.Perm()), p.near.Chtimes(n.name, n.time, n.time))
			}
			if err != nil {
				return err
			}
			if _, err := downTree(ctx, host, p.far, p.near, nil); err != nil {
				return err
			}
			return append(f, outside...).stood(p.near)
		})},
	{name: "tree/two-at-once", why: "a transport is safe for concurrent use, also for one destination",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := manyFiles(8)
			errs := make([]error, 4)
			each := func(do func(i int) error) error {
				var all sync.WaitGroup
				for i := range errs {
					all.Go(func() { errs[i] = do(i) })
				}
				all.Wait()
				return errors.Join(errs...)
			}
			far := func(i int) string { return fmt.Sprintf("%s-%d", p.far, i) }
			if err := each(func(i int) error { _, err := upTree(ctx, host, far(i), f.source(), nil); return err }); err != nil {
				return err
			}
			if err := f.stands(ctx, host, far(3)); err != nil {
				return err
			}
			if err := each(func(i int) error { _, err := downTree(ctx, host, far(i), p.near, nil); return err }); err != nil {
				return err
			}
			return f.stood(p.near)
		})},
	{name: "tree/download-what-is-no-file", why: "to open a FIFO waits for ever, and nobody wants setuid files from a stranger",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := planted(directory("d", 0o755), file("d/hard", 0o644, "linked"), file("d/suid", 0o755, "x"), file("last", 0o644, "z"), file("twice", 0o644, "linked"))
			if err := f.without("twice").grow(ctx, host, p.far); err != nil {
				return err
			}
			f[4].time = f[1].time
			if err := run(ctx, host, in(p.far, sh(`ln d/hard twice && mkfifo fifo d/fifo && chmod 6755 d/suid && chmod 1755 d && TZ=UTC0 touch -t "$1" d`, f[0].stamp()))); err != nil {
				return err
			}
			var left skips
			done := make(chan transport.TreeStats, 1)
			result, err := returns(ctx, background(func() error {
				stats, err := downTree(ctx, host, p.far, p.near, &transport.TreeOptions{Skipped: left.add})
				done <- stats
				return err
			}))
			if err := errors.Join(err, result); err != nil {
				return err
			}
			if err := left.are((<-done).Skipped, "fifo", "d/fifo"); err != nil {
				return err
			}
			return f.stood(p.near)
		})},
	{name: "tree/upload-without-special-bits", why: "setuid, setgid and sticky are not part of a tree",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := planted(directory("d", 0o755), file("d/f", 0o755, "x"))
			src := f.source()
			src["d"].Mode |= fs.ModeSticky
			src["d/f"].Mode |= fs.ModeSetuid | fs.ModeSetgid
			src["pipe"] = &fstest.MapFile{Mode: fs.ModeNamedPipe | 0o644}
			src["d/device"] = &fstest.MapFile{Mode: fs.ModeDevice | 0o644, ModTime: time.Unix(1, 0)}
			var left skips
			stats, err := upTree(ctx, host, p.far, src, &transport.TreeOptions{Skipped: left.add})
			if err != nil {
				return err
			}
			return errors.Join(left.are(stats.Skipped, "pipe", "d/device"), f.stands(ctx, host, p.far))
		})},
}
