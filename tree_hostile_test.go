package transport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

// The hostile host: whatever it sends, nothing beside the destination changes, nothing of a failed transfer is left in it, and the caller gets a
// sentence. This file has the tar way, tree_hostile_sftp_test.go the one over SFTP.

// A trick is what the host does, and what has to become of it.
type trick struct {
	name   string
	answer string // of the script; "": gnu. "-": none
	send   any    // what follows: []byte, or func(io.Writer) for what does not end
	says   string // on standard error
	status int
	opts   transport.TreeOptions

	fails   string            // what the error says; "": there is none
	is      error             // what the error is
	skipped map[string]string // what is left out, and a part of the reason
	adds    map[string]string // what is in the destination afterwards, besides what was there before, see looks
}

// places is a destination with something beside it that must not change.
type places struct {
	parent, dst string
	root        *os.Root
	before      map[string]string
}

func newPlaces(t testing.TB) *places {
	t.Helper()
	p := &places{parent: t.TempDir()}
	p.dst = filepath.Join(p.parent, "dst")
	for _, dir := range []string{"dst/old", "outside/dir"} {
		require.NoError(t, os.MkdirAll(filepath.Join(p.parent, dir), 0o755))
	}
	for name, content := range map[string]string{
		"dst/old/keep": "kept", "dst/plain": "old", "outside/secret": "secret", "outside/dir/x": "x", "sentinel": "here",
	} {
		require.NoError(t, os.WriteFile(filepath.Join(p.parent, name), []byte(content), 0o644))
	}
	// The caller's own link, which leads out.
	require.NoError(t, os.Symlink("../outside", filepath.Join(p.dst, "way-out")))
	p.before = looks(t, p.parent, true)
	root, err := os.OpenRoot(p.dst)
	require.NoError(t, err)
	t.Cleanup(func() { root.Close() })
	p.root = root
	return p
}

// looks says what everything below a directory looks like: "d755", "f644 content" or "l target"; exactly with times, too.
func looks(t testing.TB, dir string, exactly bool) map[string]string {
	t.Helper()
	all := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		info, err := d.Info()
		if err != nil {
			return err
		}
		mode := fmt.Sprintf("%o", info.Mode().Perm())
		if more := info.Mode() & (fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky); more != 0 {
			mode += fmt.Sprintf(" with %v", more)
		}
		look := ""
		switch {
		case info.IsDir():
			look = "d" + mode
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			look = "l " + target
		case info.Mode().IsRegular():
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			look = "f" + mode + " " + string(content)
		default:
			look = info.Mode().String()
		}
		if exactly && name != "dst" { // the directory for what comes is made there, and removed
			look += info.ModTime().Format(" 2006-01-02 15:04:05.999999999")
			for _, field := range []string{"Uid", "Gid", "Nlink"} { // not every system has them
				if v := reflect.Indirect(reflect.ValueOf(info.Sys())).FieldByName(field); v.IsValid() {
					look += fmt.Sprint(" ", v)
				}
			}
		}
		all[name] = look
		return nil
	}))
	return all
}

// check looks what has become of it all. adds is nil after a failure.
func (p *places) check(t testing.TB, adds map[string]string) {
	t.Helper()
	after := looks(t, p.parent, true)
	if adds == nil {
		assert.Equal(t, p.before, after, "the transfer failed, and something has changed")
		return
	}
	inside := func(name, _ string) bool { return strings.HasPrefix(name, "dst/") }
	before := maps.Clone(p.before)
	maps.DeleteFunc(before, inside)
	maps.DeleteFunc(after, inside)
	assert.Equal(t, before, after, "something beside the destination has changed")
	want := map[string]string{".": "d755", "old": "d755", "old/keep": "f644 kept", "plain": "f644 old", "way-out": "l ../outside"}
	maps.Copy(want, adds)
	assert.Equal(t, want, looks(t, p.dst, false))
}

// hostile is a host whose commands are a handler; those that are not a script for a tree end at once.
func hostile(t testing.TB, handler lxdtest.Handler) (*transport.LXD, *lxdtest.Server) {
	t.Helper()
	s := lxdtest.NewUnstartedServer()
	root := t.TempDir()
	require.NoError(t, os.MkdirAll(root+"/src", 0o755))
	require.NoError(t, os.WriteFile(root+"/src/real", []byte("by its own name"), 0o640))
	s.AddInstance(lxdtest.Instance{Name: "c1", Root: root})
	s.Handler = func(p *lxdtest.Process) int {
		if len(p.Args) < 5 || !strings.Contains(p.Args[2], "tar --version") {
			return 127
		}
		return handler(p)
	}
	s.Start()
	t.Cleanup(s.Close)
	return newLXD(t, connect(t, s), "c1", nil), s
}

func (k trick) handler(p *lxdtest.Process) int {
	answer := k.answer
	switch answer {
	case "":
		answer = "gnu\n"
	case "-":
		answer = ""
	}
	return lxdtest.HostileTar{Answer: answer, Send: k.send, Says: k.says, Status: k.status}.Handler(p)
}

// on plays the trick.
func (k trick) on(t *testing.T, ctx context.Context, host transport.Transport) error {
	t.Helper()
	p := newPlaces(t)
	skipped := map[string]string{}
	opts := k.opts
	opts.Skipped = func(name string, why error) { skipped[name] = why.Error() }
	stats, err := transport.DownloadTree(ctx, host, "/src", p.root, &opts)
	if k.fails == "" && k.is == nil {
		require.NoError(t, err)
		adds := k.adds
		if adds == nil {
			adds = map[string]string{}
		}
		p.check(t, adds)
	} else {
		require.Error(t, err)
		assert.ErrorContains(t, err, k.fails)
		if k.is != nil {
			assert.ErrorIs(t, err, k.is)
		}
		assert.ErrorAs(t, err, new(*fs.PathError))
		assert.Less(t, len(err.Error()), 8<<10, "the error is too long to be read")
		p.check(t, nil)
	}
	if k.skipped != nil || err == nil {
		assert.ElementsMatch(t, slices.Collect(maps.Keys(k.skipped)), slices.Collect(maps.Keys(skipped)), "%q", skipped)
		for name, why := range k.skipped {
			assert.Contains(t, skipped[name], why, "%q", name)
		}
	}
	assert.GreaterOrEqual(t, stats.Skipped, len(skipped))
	for name, why := range skipped {
		assert.Less(t, len(why), 2<<10, "%q", name)
	}
	return err
}

var (
	tarOf         = lxdtest.RawTar
	tarWhole      = lxdtest.RawWhole
	tarFile       = lxdtest.RawFile
	tarDir        = lxdtest.RawDir
	tarLink       = lxdtest.RawLink
	tarHard       = lxdtest.RawHard
	tarPax        = lxdtest.RawPAX
	tarOctal      = lxdtest.RawOctal
	tarLong       = lxdtest.RawLong
	linksKept     = transport.TreeOptions{Symlinks: transport.KeepSymlinks}
	linksRejected = transport.TreeOptions{Symlinks: transport.RejectSymlinks}
)

type tarHeader = lxdtest.RawHeader

// forever sends first, and then again and again what next makes, until nobody listens.
func forever(first []byte, next func(n int) []byte) func(io.Writer) {
	return func(w io.Writer) {
		_, err := w.Write(first)
		var batch []byte
		for n := 0; err == nil; {
			for batch = batch[:0]; len(batch) < 32<<10; n++ {
				batch = append(batch, next(n)...)
			}
			_, err = w.Write(batch)
		}
	}
}

func noughts(int) []byte { return make([]byte, 64<<10) }

var tarTricks = []trick{
	// Names.
	{
		name: "names that lead out",
		send: tarWhole(
			tarFile("../pwned", "x"), tarFile("./../pwned", "x"), tarFile("a/../../pwned", "x"), tarFile("/pwned", "x"), tarFile(".//pwned", "x"), tarFile("a//b", "x"),
			tarFile("a/./b", "x"), tarFile("..", "x"), tarDir("../"), tarDir("/"), tarDir("old/../.."), tarFile("", "x"), tarFile("way-out/../../pwned", "x"),
			tarLink("../l", "x"), tarHard("../h", "real"), tarFile("./ok", "fine"),
		),
		skipped: map[string]string{
			"../pwned": `an element ".."`, "a/../../pwned": `an element ".."`, "/pwned": "its name is absolute", "a//b": `an element ""`,
			"a/./b": `an element "."`, "..": `an element ".."`, "old/../..": `an element ".."`, "": "its name is empty",
			"way-out/../../pwned": `an element ".."`, "../l": `an element ".."`, "../h": `an element ".."`,
		},
		adds: map[string]string{"ok": "f644 fine"},
	},
	{
		name: "the same names in extended headers",
		send: tarWhole(
			tarPax('x', "path", "../pwned"), tarFile("innocent", "x"), tarLong('L', "/pwned"), tarFile("innocent", "x"), tarPax('x', "path", ""), tarFile("a", "kept its name"),
			tarHeader{Name: "pwned", Prefix: "..", Kind: '0'}, tarHeader{Name: "pwned", Prefix: "/", Kind: '0'},
			tarPax('x', "path", "b"), tarLong('L', "../c"), tarFile("innocent", "x"),
		),
		skipped: map[string]string{"../pwned": `".."`, "/pwned": "absolute", "//pwned": "absolute", "../c": `".."`},
		adds:    map[string]string{"a": "f644 kept its name"},
	},
	{
		name: "a NUL in the name", send: tarWhole(tarFile("ok\x00/../../pwned", "1"), tarLong('L', "long\x00/../../pwned"), tarFile("x", "2")),
		adds: map[string]string{"ok": "f644 1", "long": "f644 2"},
	},
	{name: "a NUL in an extended header", send: tarWhole(tarPax('x', "path", "a\x00b"), tarFile("x", "")), fails: "the host's tar stream is broken"},
	{name: "a name of 5000 bytes", send: tarWhole(tarLong('L', strings.Repeat("a/", 2500)+"b"), tarFile("x", "")), skipped: map[string]string{
		strings.Repeat("a/", 2500) + "b": "its name has 5001 bytes: more than a path can",
	}},
	{name: "an element of 300 bytes", send: tarWhole(tarLong('L', "d/"+strings.Repeat("a", 300)), tarFile("x", "")), fails: "file name too long"},
	{name: "a name of a megabyte and more", send: tarWhole(tarLong('L', strings.Repeat("a", 2<<20)), tarFile("x", "")), fails: "the host's tar"},
	{name: "an extended header of a gigabyte", send: func(w io.Writer) {
		forever(tarOf(tarDir("./"), tarHeader{Name: "x", Kind: 'x', Size: tarOctal(1 << 30)}), noughts)(w)
	}, fails: "the host's tar"},
	{name: "a record that lies about its length", send: tarWhole(lxdtest.RawSized('x', "x", "999999999999 path=a\n"), tarFile("x", "")), fails: "the host's tar stream is broken"},
	{name: "a record without an end", send: tarWhole(lxdtest.RawSized('x', "x", "9 path=abcdef"), tarFile("x", "")), fails: "the host's tar stream is broken"},
	{
		name: "a global header", send: tarWhole(tarPax('g', "path", "../pwned", "size", "99"), tarFile("a", "1")),
		skipped: map[string]string{"../pwned": `an entry of an unknown type 'g'`}, adds: map[string]string{"a": "f644 1"},
	},
	{name: "case collisions", send: tarWhole(tarFile("a", "1"), tarFile("A", "2"), tarDir("D"), tarFile("d", "3")), adds: map[string]string{"a": "f644 1", "A": "f644 2", "D": "d755", "d": "f644 3"}},
	{name: "the tree itself is a file", send: tarWhole(tarHeader{Name: "./", Kind: '0', Size: tarOctal(3)}, "abc", tarFile("a", "1")), skipped: map[string]string{"": "its name is empty"}, adds: map[string]string{"a": "f644 1"}},

	// Links.
	{
		name: "links, left out, and written through",
		send: tarWhole(tarLink("a", "/outside"), tarFile("a/x", "1"), tarLink("b", ".."), tarFile("b/x", "2"), tarLink("way-out", "../outside"), tarFile("way-out/x", "3")),
		skipped: map[string]string{
			"a": "it is a symbolic link (TreeOptions.Symlinks is SkipSymlinks)", "b": "it is a symbolic link", "way-out": "it is a symbolic link",
		},
		adds: map[string]string{"a": "d755", "a/x": "f644 1", "b": "d755", "b/x": "f644 2", "way-out": "d755", "way-out/x": "f644 3"},
	},
	{name: "links, rejected", opts: linksRejected, send: tarWhole(tarFile("b", ""), tarLink("a", "b")), fails: "it is a symbolic link (TreeOptions.Symlinks is RejectSymlinks)", is: fs.ErrInvalid},
	{
		name: "links, kept, that lead out", opts: linksKept,
		send: tarWhole(
			tarLink("abs", "/outside"), tarLink("up", ".."), tarLink("up2", "../dst"), tarDir("d"), tarLink("d/up", "../.."), tarLink("d/ok", "../old"), tarLink("empty", ""),
			tarLink("later", "d/.."), tarLink("later2", "x/../../../outside"), tarLink("deep/er/ok", "../../old/keep"), tarLink("deep/er/up", "./../..//./../outside"),
			tarLong('K', strings.Repeat("a/", 3000)), tarLink("long", "x"), tarPax('x', "linkpath", "/outside"), tarLink("pax", "old"),
		),
		skipped: map[string]string{
			"abs": "which may lead out of the tree", "up": "may lead out", "up2": "may lead out", "d/up": "may lead out", "empty": "may lead out", "later": "may lead out",
			"later2": "may lead out", "deep/er/up": "may lead out", "long": "may lead out", "pax": "may lead out",
		},
		adds: map[string]string{"d": "d755", "d/ok": "l ../old", "deep": "d755", "deep/er": "d755", "deep/er/ok": "l ../../old/keep"},
	},
	{
		name: "links, kept, and written through", opts: linksKept,
		send: tarWhole(
			tarLink("here", "."), tarFile("here/x", "1"), tarLink("there", "old"), tarFile("there/x", "2"), tarDir("there/d"), tarLink("there/l", "x"),
			tarLink("a", "b"), tarLink("b", "a"), tarFile("a/x", "3"), tarLink("way-out", "old"),
		),
		skipped: map[string]string{
			"here/x": `"here", which it is in, is a symbolic link`, "there/x": "is a symbolic link", "there/d": "is a symbolic link", "there/l": "is a symbolic link",
			"a/x": "is a symbolic link",
		},
		adds: map[string]string{"here": "l .", "there": "l old", "a": "l b", "b": "l a", "way-out": "l old"},
	},
	{
		name: "links, kept, that lead out together", opts: linksKept,
		send: tarWhole(
			tarLink("a", "."), tarLink("b", "a/.."), tarLink("c", "a/a/a/.."), tarDir("d/e"), tarLink("d/e/up", "../.."), tarLink("f", "d/e/up/.."), tarLink("g", "way-out/secret"),
			tarLink("way-out", "."), tarLink("d/way", "../a"),
		),
		skipped: map[string]string{"b": "may lead out", "c": "may lead out", "f": "may lead out"},
		adds: map[string]string{
			"a": "l .", "d": "d755", "d/e": "d755", "d/e/up": "l ../..", "g": "l way-out/secret", "way-out": "l .", "d/way": "l ../a",
		},
	},
	{
		name: "a directory becomes a link, and a link a directory", opts: linksKept,
		send: tarWhole(
			tarDir("d"), tarFile("d/1", "1"), tarLink("d", "old"), tarFile("d/2", "2"), tarLink("d", "/outside"), tarDir("d"), tarFile("d/3", "3"),
			tarLink("l", "old"), tarDir("l"), tarFile("l/pwned", "x"), tarLink("l", "../outside"), tarFile("l/pwned", "x"),
		),
		skipped: map[string]string{"d": "", "l": "", "l/pwned": "is a symbolic link"},
		adds:    map[string]string{"d": "d755", "d/1": "f644 1", "d/2": "f644 2", "d/3": "f644 3", "l": "l old"},
	},
	{
		name: "hard links", send: tarWhole(
			tarHard("real", "/etc/passwd"), tarFile("real", "written through"), tarHard("real", "../outside/secret"), tarHard("d/../../x", "real"), tarHard("/abs", "real"),
			tarHard("", "real"), tarHard("nul\x00", "real"),
		),
		fails: `file does not exist`, is: fs.ErrNotExist, // "nul" is not in the host
	},
	{
		name: "hard links to what is not theirs", send: tarWhole(tarHard("real", "/etc/passwd"), tarFile("real", "written through"), tarHard("real", "../outside/secret"), tarHard("/abs", "real"), tarHard("", "real")),
		skipped: map[string]string{"real": "the host sends it twice", "/abs": "absolute", "": "empty"},
		adds:    map[string]string{"real": "f640 by its own name"},
	},

	// Twice.
	{
		name: "duplicates", opts: linksKept,
		send: tarWhole(
			tarFile("f", "1"), tarFile("f", "2"), tarFile("./f", "3"), tarDir("f"), tarFile("f/x", "4"), tarLink("f", "old"),
			tarDir("d"), tarDir("d"), tarFile("d", "5"), tarLink("d", "old"), tarFile("d/x", "6"), tarFile("e/x", "7"), tarDir("e"), tarFile("e", "8"),
		),
		skipped: map[string]string{
			"f": "the host sends it twice", "f/x": `"f", which it is in, is `, "d": "the host sends it twice", "e": "the host sends it twice",
		},
		adds: map[string]string{"f": "f644 1", "d": "d755", "d/x": "f644 6", "e": "d755", "e/x": "f644 7"},
	},
	{name: "a file where a directory is", send: tarWhole(tarFile("a", "1"), tarFile("old", "2")), fails: "the tree has a file here, where a directory is", is: syscall.EISDIR},
	{name: "a directory where a file is", send: tarWhole(tarFile("a", "1"), tarDir("plain")), fails: "the tree has a directory here, where", is: syscall.ENOTDIR},
	{name: "a file where a link out is", send: tarWhole(tarFile("way-out", "1")), adds: map[string]string{"way-out": "f644 1"}},

	// Kinds and modes.
	{
		name: "devices and the like", send: tarWhole(
			lxdtest.RawOf('3', "char"), lxdtest.RawOf('4', "block"), lxdtest.RawOf('6', "fifo"), lxdtest.RawOf('s', "socket"), lxdtest.RawSized('D', "dump", "x"),
			lxdtest.RawSized('M', "multi", "x"), lxdtest.RawSized('V', "volume", "x"), lxdtest.RawOf(0xff, "ff"), lxdtest.RawOf('X', "solaris"), lxdtest.RawOf('A', "vendor"),
			lxdtest.RawSized('7', "contiguous", "is a file"), tarHeader{Name: "old", Kind: 1, Magic: lxdtest.RawV7}, tarHeader{Name: "old-dir/", Patch: func(b []byte) { b[156] = 0 }},
		),
		skipped: map[string]string{
			"char": "it is a device", "block": "it is a device", "fifo": "it is a FIFO", "socket": "an entry of an unknown type 's'", "dump": "unknown type", "multi": "unknown type",
			"volume": "unknown type", "ff": `unknown type 'ÿ'`, "solaris": "unknown type", "vendor": "unknown type", "old": "unknown type",
		},
		adds: map[string]string{"contiguous": "f644 is a file", "old-dir": "d644"},
	},
	{
		name: "modes", send: tarWhole(
			tarHeader{Name: "suid", Mode: "0006755\x00"}, tarHeader{Name: "sticky", Kind: '5', Mode: "0001777\x00"}, tarHeader{Name: "sgid", Kind: '5', Mode: "0002770\x00"},
			tarHeader{Name: "all", Mode: "7777777\x00"}, tarHeader{Name: "device", Mode: "0060644\x00"},
			tarHeader{Name: "negative", Mode: "\xff\xff\xff\xff\xff\xff\xff\xff"}, tarHeader{Name: "large", Magic: lxdtest.RawGNU, Mode: "\x80\x00\xff\xff\xff\xff\xff\xff"},
		),
		adds: map[string]string{
			"suid": "f755 ", "sticky": "d777", "sgid": "d770", "all": "f777 ", "device": "f644 ", "negative": "f777 ", "large": "f777 ",
		},
	},
	{
		name: "times", send: tarWhole(
			tarHeader{Name: "late", Time: "77777777777\x00"}, tarHeader{Name: "negative", Time: lxdtest.RawBase256(-1 << 62)}, tarHeader{Name: "large", Time: lxdtest.RawBase256(math.MaxInt64)},
			tarHeader{Name: "dir", Kind: '5', Time: lxdtest.RawBase256(math.MinInt64)}, tarPax('x', "mtime", "9223372036854775807.999999999"), tarFile("pax", ""),
			tarPax('x', "mtime", "-9223372036854775808"), tarFile("pax2", ""),
		),
		adds: map[string]string{"late": "f644 ", "negative": "f644 ", "large": "f644 ", "dir": "d644", "pax": "f644 ", "pax2": "f644 "},
	},

	// Sizes.
	{name: "less than the header says", send: tarOf(tarDir("./"), tarHeader{Name: "a", Size: tarOctal(1000)}, "short"), fails: "came", is: io.ErrUnexpectedEOF},
	{name: "more than the header says", send: tarWhole(tarHeader{Name: "a", Size: tarOctal(3)}, strings.Repeat("more than said", 100), tarFile("b", "")), fails: "the host's tar stream is broken behind \"a\""},
	{name: "petabytes", send: tarOf(tarDir("./"), tarHeader{Name: "a", Magic: lxdtest.RawGNU, Size: lxdtest.RawBase256(1 << 60)}, "short"), fails: "came", is: io.ErrUnexpectedEOF},
	{name: "the largest size", send: tarOf(tarDir("./"), tarHeader{Name: "a", Magic: lxdtest.RawGNU, Size: lxdtest.RawBase256(math.MaxInt64)}, "short"), fails: "came", is: io.ErrUnexpectedEOF},
	{name: "the largest size in an extended header", send: tarOf(tarDir("./"), tarPax('x', "size", "9223372036854775807"), tarHeader{Name: "a"}, "short"), fails: "came", is: io.ErrUnexpectedEOF},
	{name: "a negative size", send: tarWhole(tarHeader{Name: "a", Magic: lxdtest.RawGNU, Size: lxdtest.RawBase256(-1)}, tarFile("b", "")), fails: "the host's tar stream is broken"},
	{name: "a negative size in an extended header", send: tarWhole(tarPax('x', "size", "-5"), tarFile("b", "")), fails: "the host's tar stream is broken"},
	{name: "a size of more than 64 bits", send: tarWhole(tarHeader{Name: "a", Magic: lxdtest.RawGNU, Size: "\x81" + strings.Repeat("\xff", 11)}), fails: "the host's tar stream is broken"},
	{name: "a directory with a size", send: tarWhole(tarHeader{Name: "d", Kind: '5', Size: tarOctal(1 << 32)}, tarFile("d/a", "1")), adds: map[string]string{"d": "d644", "d/a": "f644 1"}},
	{name: "a link with a size", opts: linksKept, send: tarWhole(tarHeader{Name: "l", Kind: '2', Link: "old", Size: tarOctal(1 << 32)}, tarFile("a", "1")), adds: map[string]string{"l": "l old", "a": "f644 1"}},
	{name: "sizes and MaxFileBytes", opts: transport.TreeOptions{MaxFileBytes: 10}, send: tarWhole(tarFile("a", "0123456789"), tarFile("b", "0123456789+")), fails: "TreeOptions.MaxFileBytes", is: transport.ErrLimit},
	{name: "sizes and MaxBytes", opts: transport.TreeOptions{MaxBytes: 15}, send: tarWhole(tarFile("a", "0123456789"), tarFile("b", "0123456789")), fails: "TreeOptions.MaxBytes", is: transport.ErrLimit},
	{name: "a limit, and a status that hides it", opts: transport.TreeOptions{MaxBytes: 15}, status: 2, says: "tar: something else", send: tarWhole(tarFile("a", "0123456789"), tarFile("b", strings.Repeat("x", 300<<10))), fails: "TreeOptions.MaxBytes", is: transport.ErrLimit},
	{name: "too many", opts: transport.TreeOptions{MaxEntries: 3}, send: tarWhole(tarFile("a", ""), tarFile("../b", ""), tarDir("c"), tarFile("d", "")), fails: "TreeOptions.MaxEntries", is: transport.ErrLimit},
	{name: "too deep", opts: transport.TreeOptions{MaxDepth: 3}, send: tarWhole(tarFile("a/b/c", ""), tarFile("a/b/c2/d", "")), fails: "TreeOptions.MaxDepth", is: transport.ErrLimit},

	// Sparse maps.
	{
		name: "sparse maps", send: tarWhole(
			lxdtest.RawSparse("gnu", 1<<60, false), lxdtest.RawSparse("gnu2", 1<<50, false, 0, 0, 1<<50, 0),
			tarPax('x', "GNU.sparse.map", "0,0", "GNU.sparse.size", "1125899906842624", "GNU.sparse.numblocks", "1"), tarFile("pax01", ""),
			tarPax('x', "GNU.sparse.major", "0", "GNU.sparse.minor", "1", "GNU.sparse.numblocks", "0", "GNU.sparse.name", "../x", "GNU.sparse.size", "1125899906842624"), tarFile("pax01b", ""),
			tarPax('x', "GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.name", "pax10", "GNU.sparse.realsize", "1125899906842624"), lxdtest.RawSized('0', "x", "0\n"+strings.Repeat("\x00", 510)),
			tarPax('x', "GNU.sparse.major", "2", "GNU.sparse.minor", "0"), tarFile("pax20", "x"), tarFile("a", "1"),
		),
		skipped: map[string]string{
			"gnu": "sparse map, which was not asked for", "gnu2": "sparse map", "pax01": "sparse map", "../x": "", "pax10": "sparse map", "pax20": "sparse map",
		},
		adds: map[string]string{"a": "f644 1"},
	},
	{name: "a sparse map that lies", send: tarWhole(lxdtest.RawSparse("gnu", 10, false, 5, 100)), fails: "the host's tar stream is broken"},
	{name: "a sparse map of negative numbers", send: tarWhole(lxdtest.RawSparse("gnu", -10, false, -5, -100)), fails: "the host's tar stream is broken"},
	{name: "a sparse map without end", send: forever(tarOf(tarDir("./"), lxdtest.RawSparse("gnu", 1<<60, true)), func(int) []byte {
		b := make([]byte, 512)
		b[504] = 1
		return b
	}), fails: "the host's tar"},

	// Streams.
	{name: "the end in the middle of a header", send: tarWhole(tarFile("a", "1"))[:1800], fails: "breaks off", is: io.ErrUnexpectedEOF},
	{name: "no more than an answer", send: []byte{}, fails: "breaks off", is: io.ErrUnexpectedEOF},
	{name: "garbage", send: bytes.Repeat([]byte("garbage "), 1000), fails: "the host's tar stream is broken behind the beginning"},
	{name: "one zero block in the middle", send: tarOf(tarFile("a", "1"), make([]byte, 512), tarFile("b", "2"), lxdtest.RawEnd()), fails: "the host's tar stream is broken behind \"a\""},
	{name: "an end in the middle", send: tarOf(tarFile("a", "1"), lxdtest.RawEnd(), tarFile("b", "2"), lxdtest.RawEnd()), fails: "there is something behind the end of the host's tar stream"},
	{name: "zeros without end", send: forever(tarWhole(tarFile("a", "1")), noughts), fails: "goes on sending behind the end of its tar stream"},
	{name: "a second answer", answer: "gnu\ngnu\n", send: tarWhole(tarFile("a", "1")), fails: "the host's tar stream is broken"},
	{name: "a bad checksum", send: tarOf(tarFile("a", "1")[:511], []byte{1}, lxdtest.RawEnd()), fails: "the host's tar stream is broken"},

	// Streams without end, and limits.
	{name: "files without end", opts: transport.TreeOptions{MaxEntries: 500}, send: forever(nil, func(n int) []byte { return tarFile(fmt.Sprint(n), "x") }), fails: "MaxEntries", is: transport.ErrLimit},
	{name: "the same file without end", opts: transport.TreeOptions{MaxEntries: 5000}, send: forever(nil, func(n int) []byte { return tarFile("a", "x") }), fails: "MaxEntries", is: transport.ErrLimit},
	{name: "the tree itself without end", opts: transport.TreeOptions{MaxEntries: 5000}, send: forever(nil, func(n int) []byte { return tarDir("./") }), fails: "MaxEntries", is: transport.ErrLimit},
	{name: "global headers without end", opts: transport.TreeOptions{MaxEntries: 500}, send: forever(nil, func(n int) []byte { return tarPax('g', "a", "b") }), fails: "MaxEntries", is: transport.ErrLimit},
	{name: "extended headers without end", send: forever(nil, func(n int) []byte { return tarPax('x', "a", "b") }), fails: "the host sends more than"},
	{name: "long names without end", send: forever(nil, func(n int) []byte { return tarLong('L', "a") }), fails: "the host sends more than"},
	{name: "bytes without end", opts: transport.TreeOptions{MaxBytes: 1 << 20}, send: forever(nil, func(n int) []byte { return tarFile(fmt.Sprint(n), strings.Repeat("x", 100<<10)) }), fails: "MaxBytes", is: transport.ErrLimit},
	{name: "a file without end", opts: transport.TreeOptions{MaxBytes: 1 << 20}, send: forever(tarHeader{Name: "a", Magic: lxdtest.RawGNU, Size: lxdtest.RawBase256(1 << 60)}.Raw(), noughts), fails: "MaxBytes", is: transport.ErrLimit},
	{name: "a file without end that is left out", opts: transport.TreeOptions{MaxBytes: 1 << 20}, send: forever(tarHeader{Name: "../a", Magic: lxdtest.RawGNU, Size: lxdtest.RawBase256(1 << 60)}.Raw(), noughts), fails: "MaxBytes", is: transport.ErrLimit},
	{name: "something unknown without end", opts: transport.TreeOptions{MaxBytes: 1 << 20}, send: forever(tarHeader{Name: "a", Kind: 'D', Magic: lxdtest.RawGNU, Size: lxdtest.RawBase256(1 << 60)}.Raw(), noughts), fails: "MaxBytes", is: transport.ErrLimit},
	{name: "duplicates without end", opts: transport.TreeOptions{MaxBytes: 1 << 20}, send: forever(nil, func(n int) []byte { return tarFile("a", strings.Repeat("x", 100<<10)) }), fails: "MaxBytes", is: transport.ErrLimit},
	{name: "directories without end", opts: transport.TreeOptions{MaxEntries: 1500}, send: forever(nil, func(n int) []byte { return tarOf(tarLong('L', strings.Repeat("d/", n+1)), tarDir("x")) }), fails: "MaxEntries", is: transport.ErrLimit},

	// Answers.
	{name: "an answer that is an error", answer: "cd: /src: \x1b[2JPermission denied\nfailed\n", fails: "Permission denied", is: fs.ErrPermission},
	{name: "an answer that is too long", answer: strings.Repeat("Permission denied ", 400) + "\nfailed\n", fails: "Permission denied", is: fs.ErrPermission},
	{name: "absent, and yet a tree", answer: "absent\n", send: tarWhole(tarFile("a", "1")), is: fs.ErrNotExist},
	{name: "a file, and yet a tree", answer: "file\n", send: tarWhole(tarFile("a", "1")), fails: "it is not a directory", is: syscall.ENOTDIR},
	{name: "garbage for an answer", answer: "-", send: bytes.Repeat([]byte{0xff, 0, '\n'}, 10000), fails: "something else than the answer that was expected"},
	{name: "lines without end for an answer", answer: "-", send: forever(nil, func(int) []byte { return []byte("\n") }), fails: "something else than the answer that was expected"},
	{name: "an answer without a line break", answer: "-", send: forever(nil, func(int) []byte { return []byte("gnu ") }), fails: "something else than the answer that was expected"},
	{name: "a status that contradicts", status: 2, send: tarWhole(tarFile("a", "1")), fails: "the host's tar failed and did not say why"},
	{name: "a status and a reason", status: 2, says: "tar: a: Cannot open: Permission denied\n", send: tarWhole(tarFile("a", "1")), fails: "the host's tar ended with status 2: the host says: tar: a: Cannot open", is: fs.ErrPermission},
	{name: "a status after an answer", status: 9, answer: "absent\n", is: fs.ErrNotExist},
	{name: "standard error without end", send: func(w io.Writer) { w.Write(tarWhole(tarFile("a", "1"))) }, says: strings.Repeat("tar: \x1b[31mwarning \x00\xff\n", 1<<20), adds: map[string]string{"a": "f644 1"}},
	{name: "standard error without end, and a status", status: 2, says: strings.Repeat("tar: \x1b[31mwarning \x00\xff\n", 1<<20), send: tarWhole(tarFile("a", "1")), fails: "the host's tar ended with status 2"},
	{
		name: "sockets that tar has left out", says: "tar: ./run/s: socket ignored\ntar: ../../x: socket ignored\nx: socket ignored\n", send: tarWhole(tarFile("a", "1")),
		skipped: map[string]string{"run/s": "it is a socket", "../../x": "it is a socket", "x": "it is a socket"}, adds: map[string]string{"a": "f644 1"},
	},
}

func TestHostileTar(t *testing.T) {
	t.Parallel()
	for _, k := range tarTricks {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			host, _ := hostile(t, k.handler)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			err := k.on(t, ctx, host)
			if err != nil {
				assert.NotContains(t, err.Error(), "\x1b", "what the host says reaches the terminal as it is")
				assert.NotContains(t, err.Error(), "\x00")
			}
		})
	}
}

// What does not end on its own ends with ctx.
func TestHostileTarAndContext(t *testing.T) {
	t.Parallel()
	wait := func(io.Writer) {}
	for _, k := range []trick{
		{name: "no answer", answer: "-"},
		{name: "half an answer", answer: "gn"},
		{name: "no stream"},
		{name: "half a stream", send: tarWhole(tarFile("a", "1"), tarFile("b", "2"))[:2000]},
		{name: "no end of the stream", send: tarWhole(tarFile("a", "1"))},
		{name: "files without end", send: forever(nil, func(n int) []byte { return tarFile("a", "x") })},
		{name: "bytes without end", send: forever(tarHeader{Name: "../a", Magic: lxdtest.RawGNU, Size: lxdtest.RawBase256(1 << 60)}.Raw(), noughts)},
	} {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancelCause(soon(t))
			enough := errors.New("enough")
			timer := time.AfterFunc(500*time.Millisecond, func() { cancel(enough) })
			defer timer.Stop()
			host, _ := hostile(t, func(p *lxdtest.Process) int {
				k.handler(p)
				wait(p.Stdout)
				<-p.Context().Done()
				return 0
			})
			p := newPlaces(t)
			start := time.Now()
			_, err := transport.DownloadTree(ctx, host, "/src", p.root, nil)
			assert.ErrorIs(t, err, enough)
			assert.Less(t, time.Since(start), 5*time.Second+patience/2)
			p.check(t, nil)
		})
	}
}

// An upload gets nothing from the host but its answer, and has to end whatever that is.
func TestHostileUpload(t *testing.T) {
	t.Parallel()
	large := fstest.MapFS{"a": {Data: make([]byte, 8<<20)}, "b": {Data: []byte("b")}}
	for _, k := range []trick{
		{name: "reads nothing", fails: "the host's tar ended before the tree did, and says that all is well"},
		{name: "reads nothing and fails", status: 2, says: "tar: No space left on device\n", fails: "No space left on device", is: syscall.ENOSPC},
		{name: "fails in silence", status: 1, fails: "the host's tar failed and did not say why"},
		{name: "garbage for an answer", answer: "-", send: bytes.Repeat([]byte{0xff, 0, '\n'}, 10000), fails: "something else than the answer that was expected"},
		{name: "an answer without a line break", answer: "-", send: forever(nil, func(int) []byte { return []byte("gnu ") }), fails: "something else than the answer that was expected"},
		{name: "not root", answer: "notroot\n", fails: "do not run as root", is: fs.ErrPermission},
		{name: "an error", answer: "mkdir: \x1b[2J\x00Read-only file system\nfailed\n", fails: "Read-only file system", is: syscall.EROFS},
		{name: "output behind the answer", send: bytes.Repeat([]byte("noise"), 1<<20), fails: "the host's tar ended before the tree did"},
		{name: "a flood of errors", status: 2, says: strings.Repeat("tar: no\n", 1<<20), fails: "the host's tar ended with status 2"},
	} {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			host, _ := hostile(t, k.handler)
			_, err := transport.UploadTree(soon(t), host, "/src", large, nil)
			require.Error(t, err)
			assert.ErrorContains(t, err, k.fails)
			assert.ErrorAs(t, err, new(*fs.PathError))
			assert.NotContains(t, err.Error(), "\x1b")
			assert.NotContains(t, err.Error(), "\x00")
			assert.Less(t, len(err.Error()), 8<<10)
			if k.is != nil {
				assert.ErrorIs(t, err, k.is)
			}
		})
	}
	t.Run("output without end", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithTimeout(soon(t), 500*time.Millisecond)
		defer cancel()
		host, _ := hostile(t, trick{send: forever(nil, noughts)}.handler)
		_, err := transport.UploadTree(ctx, host, "/src", large, nil)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

// tenMillion is how many entries a host sends that goes on for long: fewer, unless there is time.
func tenMillion(fewer int) int {
	if os.Getenv("TRANSPORT_SLOW_TESTS") == "" {
		return fewer
	}
	return 10_000_000
}

// enduring is the context of what may take long.
func enduring(t testing.TB) context.Context {
	if os.Getenv("TRANSPORT_SLOW_TESTS") == "" {
		return soon(t)
	}
	return t.Context()
}

// Directories in one another without end are no more than a path can have.
func TestHostileNesting(t *testing.T) {
	t.Parallel()
	var stream []byte
	for n := range 3000 {
		stream = append(stream, tarOf(tarLong('L', strings.Repeat("d/", n+1)), tarDir("x"))...)
	}
	overTar, _ := hostile(t, trick{send: tarWhole(stream)}.handler)
	long := strings.Repeat("d", 100) // the fake server looks for every element of a path
	overSFTP := hostileSFTP(t, sftpWorld{List: func(_ string, n int) []sftpFile {
		if n > 0 {
			return nil
		}
		return []sftpFile{folder(long)}
	}})
	for _, c := range []struct {
		name string
		host *transport.LXD
		top  string
		dirs int
	}{{"tar", overTar, "d", 2048}, {"SFTP", overSFTP, long, 40}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newPlaces(t)
			var why error
			stats, err := transport.DownloadTree(soon(t), c.host, "/src", p.root, &transport.TreeOptions{Skipped: func(_ string, w error) { why = w }})
			require.NoError(t, err)
			assert.Equal(t, c.dirs, stats.Dirs)
			assert.ErrorContains(t, why, "more than a path can")
			require.NoError(t, p.root.RemoveAll(c.top))
			p.check(t, map[string]string{})
		})
	}
}

// Memory does not depend on how much the host sends. Not parallel: it looks at the heap.
func TestHostileMemory(t *testing.T) {
	for _, c := range []struct {
		name    string
		few, of int
		entry   func(n int) []byte
	}{
		{"names", 1000, tenMillion(50_000), func(n int) []byte { return tarFile(fmt.Sprintf("../%d", n), "") }},
		{"duplicates", 1000, 20_000, func(n int) []byte { return tarFile(fmt.Sprintf("d/%d", n%10), "") }},
		{"directories", 300, 6000, func(n int) []byte { return tarDir(fmt.Sprint(n)) }},
		{"names in large headers", 10, 50, func(n int) []byte {
			return tarOf(tarPax('x', "path", strings.Repeat("d/", n+1), "comment", strings.Repeat("x", 1<<20-8192)), tarDir("x"))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var heaps [2]uint64
			for i, count := range []int{c.few, c.of} {
				var heap atomic.Uint64
				host, _ := hostile(t, trick{send: func(w io.Writer) {
					var batch []byte
					for n := range count {
						batch = append(batch, c.entry(n)...)
						if len(batch) > 64<<10 || n == count-1 {
							w.Write(batch)
							batch = batch[:0]
						}
					}
					w.Write(make([]byte, 1024))
				}}.handler)
				p := newPlaces(t)
				seen := 0
				look := func() {
					if seen++; seen == count-5 {
						runtime.GC()
						var m runtime.MemStats
						runtime.ReadMemStats(&m)
						heap.Store(m.HeapAlloc)
					}
				}
				_, err := transport.DownloadTree(enduring(t), host, "/src", p.root, &transport.TreeOptions{
					Skipped: func(string, error) { look() }, Match: func(string, fs.DirEntry) bool { look(); return true },
				})
				require.NoError(t, err)
				heaps[i] = heap.Load()
				require.NotZero(t, heaps[i])
			}
			grown := int64(heaps[1]) - int64(heaps[0])
			t.Logf("%d KiB with %d entries, %d KiB with %d", heaps[0]>>10, c.few, heaps[1]>>10, c.of)
			assert.Less(t, grown, int64(20<<20))
		})
	}
}
