package transporttest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/lxdtransport/transport"
)

// What TreeOptions promise. Every case goes both ways.

// transfer is one of the two directions.
type transfer struct {
	name string
	run  func(opts *transport.TreeOptions) (transport.TreeStats, error)
	// holds checks what has arrived, which begins to be nothing.
	holds func(f forest) error
	again func() error // removes what has arrived
}

// bothWays makes a case of a function that is called for an upload and for a download of a tree.
func bothWays(f forest, check func(ctx context.Context, t transfer) error) func(context.Context, transport.Transport) error {
	return withTrees(func(ctx context.Context, host transport.Transport, p place) error {
		if err := f.grow(ctx, host, p.far); err != nil {
			return err
		}
		for _, t := range []transfer{
			{"upload", func(opts *transport.TreeOptions) (transport.TreeStats, error) {
				return transport.UploadTree(ctx, host, p.far+"-up", f.source(), opts)
			}, func(f forest) error { return f.stands(ctx, host, p.far+"-up") }, func() error {
				return run(ctx, host, in("/", sh(`rm -rf "$1"`, strings.TrimPrefix(p.far, "/")+"-up")))
			}},
			{"download", func(opts *transport.TreeOptions) (transport.TreeStats, error) {
				return transport.DownloadTree(ctx, host, p.far, p.near, opts)
			}, func(f forest) error { return f.stood(p.near) }, func() error { return empty(p.near) }},
		} {
			if err := check(ctx, t); err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
		}
		return nil
	})
}

// empty removes what is in a directory here.
func empty(root *os.Root) error {
	entries, err := fs.ReadDir(root.FS(), ".")
	for _, e := range entries {
		err = errors.Join(err, root.RemoveAll(e.Name()))
	}
	return err
}

// linked has links that stay inside and links that may not.
func linked() forest {
	return planted(
		directory("d", 0o755), file("d/f", 0o644, "x"), directory("d/e", 0o755),
		link("in", "d/f"), link("d/e/up", "../../d/f"), link("d/dangling", "no such\nthing"), link("d/e/-n", "./.././f"), link("d/e/minus", "-rf"), link("dir", "d"),
		link("absolute", "/etc/passwd"), link("out", ".."), link("d/e/far-out", "../../../x"), link("d/through", "e/../../../x"),
	)
}

var badLinks = []string{"absolute", "out", "d/e/far-out", "d/through"}

var (
	allLinks = append([]string{"in", "d/e/up", "d/dangling", "d/e/-n", "d/e/minus", "dir"}, badLinks...)
	family   = planted(
		directory("a", 0o755), file("a/one", 0o644, "1"), directory("a/b", 0o755), file("a/b/two", 0o644, "22"), directory("a/b/c", 0o755),
		file("three", 0o644, "333"), directory("z", 0o755), file("z/last", 0o644, "4444"),
	)
)

var treeOptionRows = []row{
	{name: "tree/match", why: "nobody uploads .git, nor walks through it",
		run: bothWays(family, func(_ context.Context, t transfer) error {
			var left skips
			asked := map[string]fs.FileMode{}
			stats, err := t.run(&transport.TreeOptions{Skipped: left.add, Match: func(name string, d fs.DirEntry) bool {
				asked[name] = d.Type()
				return name != "a/b" && name != "z/last"
			}})
			if err != nil {
				return err
			}
			for name, want := range map[string]fs.FileMode{"a": fs.ModeDir, "a/one": 0, "a/b": fs.ModeDir, "three": 0, "z": fs.ModeDir, "z/last": 0} {
				if got, ok := asked[name]; !ok || got != want {
					return fmt.Errorf("the function Match was to be asked for %s with the type %v (asked: %v, %v)", name, want, ok, got)
				}
			}
			if len(asked) != 6 {
				return fmt.Errorf("the function Match was asked for what is in a directory that it refused: %v", asked)
			}
			rest := family.without("a/b", "a/b/two", "a/b/c", "z/last")
			if stats != rest.stats(0) {
				return fmt.Errorf("the statistics are %+v, not %+v", stats, rest.stats(0))
			}
			return errors.Join(left.are(stats.Skipped), t.holds(rest))
		})},
	{name: "tree/links-kept", why: "a link that stays inside is part of the tree, one that leads out is a trap",
		run: bothWays(linked(), func(_ context.Context, t transfer) error {
			var left skips
			stats, err := t.run(&transport.TreeOptions{Symlinks: transport.KeepSymlinks, Skipped: left.add})
			if err != nil {
				return err
			}
			rest := linked().without(badLinks...)
			if stats != rest.stats(len(badLinks)) {
				return fmt.Errorf("the statistics are %+v, not %+v", stats, rest.stats(len(badLinks)))
			}
			return errors.Join(left.are(stats.Skipped, slices.Clone(badLinks)...), t.holds(rest))
		})},
	{name: "tree/links-skipped", why: "what is left out is never left out silently, and a link is not followed",
		run: bothWays(linked(), func(_ context.Context, t transfer) error {
			var left skips
			stats, err := t.run(&transport.TreeOptions{Skipped: left.add})
			if err != nil {
				return err
			}
			return errors.Join(left.are(stats.Skipped, slices.Clone(allLinks)...), t.holds(linked().without(allLinks...)))
		})},
	{name: "tree/links-rejected", why: "who allows no links wants to know of the first",
		run: bothWays(planted(directory("d", 0o755), link("d/culprit", "f")), func(_ context.Context, t transfer) error {
			_, err := t.run(&transport.TreeOptions{Symlinks: transport.RejectSymlinks})
			return accuses(err, "d/culprit")
		})},
	{name: "tree/limits", why: "the other side decides what comes, the caller how much",
		run: bothWays(family, func(_ context.Context, t transfer) error {
			// A tree that meets all of them is whole.
			if _, err := t.run(&transport.TreeOptions{MaxBytes: 10, MaxFileBytes: 4, MaxEntries: 8, MaxDepth: 3}); err != nil {
				return err
			}
			return errors.Join(t.holds(family), t.again())
		})},
	limited("tree/limit-MaxBytes", "", transport.TreeOptions{MaxBytes: 9}),
	limited("tree/limit-MaxFileBytes", "z/last", transport.TreeOptions{MaxFileBytes: 3}),
	limited("tree/limit-MaxEntries", "", transport.TreeOptions{MaxEntries: 7}),
	limited("tree/limit-MaxDepth", "a/b/", transport.TreeOptions{MaxDepth: 2}),
	{name: "tree/progress", why: "who shows it must not see it jump back, nor end elsewhere than the result",
		run: bothWays(append(manyFiles(8), sizes()[:8]...), func(_ context.Context, t transfer) error {
			var mu sync.Mutex
			var last transport.TreeStats
			var bad error
			calls := 0
			stats, err := t.run(&transport.TreeOptions{Progress: func(now transport.TreeStats) {
				if !mu.TryLock() {
					bad = errors.New("the function Progress was called at the same time as itself")
					return
				}
				defer mu.Unlock()
				calls++
				if now.Files < last.Files || now.Dirs < last.Dirs || now.Bytes < last.Bytes || now.Symlinks < last.Symlinks || now.Skipped < last.Skipped {
					bad = fmt.Errorf("%+v came after %+v", now, last)
				}
				last = now
			}})
			if err := errors.Join(err, bad); err != nil {
				return err
			}
			if last != stats {
				return fmt.Errorf("the last was %+v, the result %+v", last, stats)
			}
			if calls < stats.Files+stats.Dirs {
				return fmt.Errorf("it was called %d times for %d entries", calls, stats.Files+stats.Dirs)
			}
			return nil
		})},
	{name: "tree/options-are-not-modified", why: "callers use options again",
		run: bothWays(linked(), func(_ context.Context, t transfer) error {
			owner := transport.User{UID: 7, GID: 7}
			opts := transport.TreeOptions{MaxEntries: 1000}
			if t.name == "download" {
				opts.Owner = &owner // which has no meaning there
			}
			before := opts
			if _, err := t.run(&opts); err != nil {
				return err
			}
			if !reflect.DeepEqual(opts, before) || owner != (transport.User{UID: 7, GID: 7}) {
				return fmt.Errorf("they are %+v now", opts)
			}
			return nil
		})},
	{name: "tree/skip-unchanged", why: "who runs an interrupted upload again sends the rest, and all that has changed",
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			f := append(planted(file("new\nline", 0o644, "x"), file("content", 0o644, "1"), file("mode", 0o644, "2"), file("time", 0o644, "3"), file("size", 0o644, "4")),
				append(linked()[:3], manyFiles(5)...)...)
			opts := &transport.TreeOptions{Symlinks: transport.KeepSymlinks, SkipUnchanged: true}
			for range 2 { // the second has nothing to send but what cannot be listed, and that is not wrong either
				if _, err := upTree(ctx, host, p.far, f.source(), opts); err != nil {
					return err
				}
				if err := f.stands(ctx, host, p.far); err != nil {
					return err
				}
			}
			const change = `TZ=UTC0; export TZ; printf z >content; touch -t "$1" content; printf z >d/f; touch -t "$2" d/f
				chmod 755 mode; touch time; printf 44 >size; touch -t "$3" size; rm d00/f00; mv d02/f02 ..; ln -s ../../f02 d02/f02`
			if err := run(ctx, host, in(p.far, sh(change, f[1].stamp(), f[6].stamp(), f[4].stamp()))); err != nil {
				return err
			}
			unchanged := map[string]bool{}
			var bad error
			opts.Skipped = func(name string, why error) {
				unchanged[name] = true
				bad = errors.Join(bad, is(why, transport.ErrUnchanged))
			}
			stats, err := upTree(ctx, host, p.far, f.source(), opts)
			if err := errors.Join(err, bad); err != nil {
				return err
			}
			if stats.Skipped != len(unchanged) {
				return fmt.Errorf("%d files were counted as left out, %d reported", stats.Skipped, len(unchanged))
			}
			for _, n := range f {
				switch n.name {
				case "mode", "time", "size", "d00/f00", "d02/f02":
					if unchanged[n.name] {
						return fmt.Errorf("the file %s was left out, but it has changed", n.name)
					}
				case "new\nline":
				default:
					if n.mode.IsRegular() != unchanged[n.name] {
						return fmt.Errorf("%s was left out: %v", n.name, unchanged[n.name])
					}
				}
			}
			if err := prints(ctx, host, "zz2", in(p.far, sh("cat content d/f mode"))); err != nil {
				return fmt.Errorf("what is unchanged was to be left alone, and what has changed was not: %w", err)
			}
			opts.SkipUnchanged = false
			if _, err := upTree(ctx, host, p.far, f.source(), opts); err != nil {
				return err
			}
			return f.stands(ctx, host, p.far)
		})},
	{name: "tree/owner", why: "who builds has to own the sources", needs: []Capability{Users},
		run: withTrees(func(ctx context.Context, host transport.Transport, p place) error {
			if err := run(ctx, host, in("/", sh(`mkdir "$1"`, strings.TrimPrefix(p.far, "/")))); err != nil {
				return err
			}
			f := planted(directory("d", 0o755), file("d/f", 0o600, "x"), directory("d/empty", 0o700), link("d/link", "f"))
			dst := p.far + "/a/b"
			owner := &transport.User{UID: 1234, GID: 5678}
			if _, err := upTree(ctx, host, dst, f.source(), &transport.TreeOptions{Owner: owner, Symlinks: transport.KeepSymlinks}); err != nil {
				return err
			}
			if err := f.stands(ctx, host, dst); err != nil {
				return err
			}
			if _, err := upTree(ctx, host, dst, planted(file("new", 0o644, "x")).source(), nil); err != nil {
				return err
			}
			for name, want := range map[string]string{
				".": "0:0", "a": "1234:5678", "a/b": "1234:5678", "a/b/d": "1234:5678", "a/b/d/f": "1234:5678", "a/b/d/empty": "1234:5678",
				"a/b/d/link": "1234:5678", "a/b/new": "0:0",
			} {
				_, got, err := mode(ctx, host, p.far, name)
				if err := errors.Join(err, equal("owner of "+name, got, want)); err != nil {
					return err
				}
			}
			return nil
		})},
}

// limited is a case of a limit that is passed by one.
func limited(name, path string, opts transport.TreeOptions) row {
	return row{name: name, why: "a limit that is not kept is a full disk",
		run: bothWays(family, func(_ context.Context, t transfer) error {
			mine := opts
			stats, err := t.run(&mine)
			if err := is(err, transport.ErrLimit); err != nil {
				return err
			}
			if err := accuses(err, path); err != nil {
				return err
			}
			// The order of a download is the host's, so only one path can be known.
			if path == "" && !slices.ContainsFunc(family, func(n node) bool { return strings.Contains(err.Error(), n.name+":") }) {
				return fmt.Errorf("want an error that names an entry, got: %w", err)
			}
			if stats.Bytes > 9 || stats.Files+stats.Dirs > 7 {
				return fmt.Errorf("the statistics are %+v", stats)
			}
			if t.name == "download" {
				return t.holds(nil)
			}
			return nil
		})}
}
