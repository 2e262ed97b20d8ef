package transport_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

// The hostile host over SFTP: it has no tar, and answers requests as it likes.

// Short names for what the peer is told.
type (
	sftpWorld = lxdtest.HostileSFTP
	sftpFile  = lxdtest.SFTPFile
)

// Packets of SFTP.
const (
	sftpOpen, sftpRead, sftpFstat, sftpOpendir = 3, 5, 8, 11
	sftpReaddir, sftpStat, sftpReadlink        = 12, 17, 19
	sftpHandle, sftpData, sftpName, sftpAttrs  = 102, 103, 104, 105
)

var (
	sftpPacket = lxdtest.SFTPPacket
	sftpString = lxdtest.SFTPString
	sftpCode   = lxdtest.SFTPStatus
	sftpNames  = lxdtest.SFTPNames
)

func regular(name string, size uint64) sftpFile {
	return sftpFile{Name: name, Mode: 0o100644, Size: size, Time: 1e9}
}
func ofMode(name string, mode uint32) sftpFile { return sftpFile{Name: name, Mode: mode, Time: 1e9} }
func folder(name string) sftpFile              { return ofMode(name, 0o040755) }
func symlink(name string) sftpFile             { return ofMode(name, 0o120777) }

// directoryThenLink has a directory d in /src, and then a link of that name, and a file in d.
func directoryThenLink(dir string, n int) []sftpFile {
	switch {
	case dir == "/src" && n == 0:
		return []sftpFile{folder("d")}
	case dir == "/src" && n == 1:
		return []sftpFile{symlink("d")}
	case dir == "/src/d" && n == 0:
		return []sftpFile{regular("x", 7)}
	}
	return nil
}

// listed has the same files in /src, and nothing below.
func listed(files ...sftpFile) func(string, int) []sftpFile {
	return func(dir string, n int) []sftpFile {
		if dir == "/src" && n == 0 {
			return files
		}
		return nil
	}
}

// hostileSFTP is a host without tar, with an SFTP server of its own.
func hostileSFTP(t testing.TB, w sftpWorld) *transport.LXD {
	t.Helper()
	host, s := hostile(t, func(*lxdtest.Process) int { return 127 })
	s.Inject(w.Faults()...)
	return host
}

// on makes an answer for one kind of request, about one thing unless that is "".
func onSFTP(kind byte, what string, answer func(id uint32) []byte) func(byte, uint32, string) ([]byte, bool) {
	return func(k byte, id uint32, w string) ([]byte, bool) {
		if k != kind || what != "" && what != w {
			return nil, true
		}
		b := answer(id)
		return b, b != nil
	}
}

const noProtocol = "the other side does not keep to the SFTP protocol"

var sftpTricks = []struct {
	trick
	lxdtest.HostileSFTP
}{
	{trick{name: "nothing bad", adds: map[string]string{"a": "f644 content"}}, sftpWorld{}},
	// Names.
	{trick{
		name:    "names that lead out",
		skipped: map[string]string{"..": `".."`, ".": `"."`, "": "empty", "../x": "slash", "/x": "slash", "a/b": "slash", "nul\x00": "NUL", "d/..": `".."`, "d/": `""`, "d/../../x": "slash"},
		adds:    map[string]string{"d": "d755", "ok": "f644 content"},
	}, sftpWorld{List: func(dir string, n int) []sftpFile {
		switch {
		case dir == "/src" && n == 0:
			return []sftpFile{
				regular("..", 7), folder("."), regular("", 7), regular("../x", 7), regular("/x", 7), regular("a/b", 7), regular("nul\x00", 7), folder("d"), regular("ok", 7), folder(".."),
			}
		case dir == "/src/d" && n == 0:
			return []sftpFile{folder(".."), regular("", 0), regular("../../x", 7)}
		}
		return nil
	}}},
	{trick{name: "a name of 5000 bytes", skipped: map[string]string{strings.Repeat("a", 5000): "more than a path can"}}, sftpWorld{List: listed(regular(strings.Repeat("a", 5000), 7))}},
	{trick{name: "an element of 300 bytes", fails: "file name too long"}, sftpWorld{List: listed(regular(strings.Repeat("a", 300), 7))}},
	{trick{name: "case collisions", adds: map[string]string{"a": "f644 content", "A": "f644 content"}}, sftpWorld{List: listed(regular("a", 7), regular("A", 7))}},
	{trick{name: "duplicates", skipped: map[string]string{"a": "twice", "d": "twice", "d/x": "which it is in, is a file", "e/x": "twice", "e": "twice"}, adds: map[string]string{"a": "f644 content", "d": "f644 content", "e": "d755", "e/x": "f644 content"}}, sftpWorld{List: func(dir string, n int) []sftpFile {
		switch {
		case dir == "/src" && n == 0:
			return []sftpFile{regular("a", 7), regular("a", 7), folder("a"), folder("d"), regular("d", 7), folder("d"), folder("e"), folder("e")}
		case dir == "/src/d" || dir == "/src/e":
			return [][]sftpFile{{regular("x", 7)}, {regular("x", 7)}, nil, nil}[min(n, 3)]
		}
		return nil
	}}},
	// Links.
	{trick{name: "links, left out", skipped: map[string]string{"l": "SkipSymlinks"}}, sftpWorld{List: listed(symlink("l"))}},
	{trick{name: "links, rejected", opts: linksRejected, fails: "RejectSymlinks"}, sftpWorld{List: listed(symlink("l"))}},
	{trick{
		name: "links, kept", opts: linksKept,
		skipped: map[string]string{"1": "may lead out", "2": "may lead out", "3": "may lead out", "4": "may lead out", "5": "may lead out", "6": "may lead out"}, adds: map[string]string{"ok": "l old/keep"},
	}, sftpWorld{
		List: listed(symlink("1"), symlink("2"), symlink("3"), symlink("4"), symlink("5"), symlink("6"), symlink("ok")),
		Link: func(name string) string {
			return map[string]string{"1": "/outside", "2": "..", "3": "a/../..", "4": "nul\x00", "5": "", "6": strings.Repeat("x/", 3000), "ok": "old/keep"}[path.Base(name)]
		},
	}},
	{trick{name: "links that are written through", opts: linksKept, skipped: map[string]string{"l": "twice", "l/x": "is a symbolic link"}, adds: map[string]string{"l": "l old"}}, sftpWorld{
		List: func(dir string, n int) []sftpFile {
			switch {
			case dir == "/src" && n == 0:
				return []sftpFile{symlink("l"), folder("l")}
			case dir == "/src/l" && n == 0:
				return []sftpFile{regular("x", 7)}
			}
			return nil
		}, Link: func(string) string { return "old" },
	}},
	{trick{name: "a directory that is replaced by a link out", opts: linksKept, skipped: map[string]string{"d": "may lead out"}, adds: map[string]string{"d": "d755", "d/x": "f644 content"}}, sftpWorld{
		List: directoryThenLink, Link: func(string) string { return "../outside" },
	}},
	{trick{name: "a directory that is replaced by a link", opts: linksKept, skipped: map[string]string{"d": "twice", "d/x": "is a symbolic link"}, adds: map[string]string{"d": "l old"}}, sftpWorld{
		List: directoryThenLink, Link: func(string) string { return "old" },
	}},
	{trick{name: "a link with two targets", opts: linksKept, fails: noProtocol}, sftpWorld{
		List: listed(symlink("l")), Raw: onSFTP(sftpReadlink, "", func(id uint32) []byte { return sftpNames(id, regular("a", 1), regular("b", 1)) }),
	}},
	// Kinds and modes.
	{trick{name: "devices and the like", skipped: map[string]string{
		"char": "it is a device", "block": "it is a device", "fifo": "it is a FIFO", "socket": "it is a socket", "none": "unknown type", "all": "unknown type", "no-mode": "unknown type",
	}}, sftpWorld{List: listed(
		ofMode("char", 0o020666), ofMode("block", 0o060666), ofMode("fifo", 0o010666), ofMode("socket", 0o140777), ofMode("none", 0o644), ofMode("all", math.MaxUint32), sftpFile{Name: "no-mode", Has: 1},
	)}},
	{trick{name: "modes", adds: map[string]string{"f": "f755 content", "d": "d777", "n": "f0 content"}}, sftpWorld{List: listed(
		sftpFile{Name: "f", Mode: 0o106755, Size: 7}, ofMode("d", 0o041777), sftpFile{Name: "n", Mode: 0o100000, Size: 7, Time: math.MaxUint32},
	)}},
	{trick{name: "files without a size", skipped: map[string]string{"a": "does not say how many bytes"}}, sftpWorld{List: listed(sftpFile{Name: "a", Mode: 0o100644, Has: 4})}},
	{trick{name: "extended attributes that lie", fails: noProtocol}, sftpWorld{List: listed(sftpFile{Name: "a", Mode: 0o100644, Has: 0x80000004, More: []byte{0xff, 0xff, 0xff, 0xff}})}},
	// Sizes.
	{trick{name: "less than the host says", fails: "the host said 1000 bytes, 7 came", is: nil}, sftpWorld{List: listed(regular("a", 1000))}},
	{trick{name: "more than the host says", fails: "the host said 3 bytes and sent more"}, sftpWorld{List: listed(regular("a", 3))}},
	{trick{name: "petabytes", fails: "7 came"}, sftpWorld{List: listed(regular("a", 1<<60))}},
	{trick{name: "the largest size", fails: "7 came"}, sftpWorld{List: listed(regular("a", math.MaxInt64-1))}},
	{trick{name: "a negative size", skipped: map[string]string{"a": "does not say how many bytes", "b": "does not say"}}, sftpWorld{List: listed(regular("a", math.MaxUint64), regular("b", math.MaxInt64))}},
	{trick{name: "sizes and MaxFileBytes", opts: transport.TreeOptions{MaxFileBytes: 10}, fails: "MaxFileBytes", is: transport.ErrLimit}, sftpWorld{List: listed(regular("a", 11))}},
	{trick{name: "sizes and MaxBytes", opts: transport.TreeOptions{MaxBytes: 20}, fails: "MaxBytes", is: transport.ErrLimit}, sftpWorld{List: listed(regular("a", 7), regular("b", 7), regular("c", 7))}},
	{trick{name: "a file without end", fails: "the host said 3000 bytes and sent more"}, sftpWorld{List: listed(regular("a", 3000)), Raw: func(kind byte, id uint32, what string) ([]byte, bool) {
		if kind != sftpRead {
			return nil, true
		}
		return sftpPacket(sftpData, id, sftpString("x")), true // one byte at a time, for ever
	}}},
	// Listings.
	{trick{name: "a listing without end", opts: transport.TreeOptions{MaxEntries: 2000}, fails: "MaxEntries", is: transport.ErrLimit}, sftpWorld{List: func(_ string, n int) []sftpFile {
		return []sftpFile{regular("../x", 7), ofMode("fifo", 0o010666)}
	}}},
	{trick{name: "directories without end", opts: transport.TreeOptions{MaxEntries: 300}, fails: "MaxEntries", is: transport.ErrLimit}, sftpWorld{List: func(_ string, n int) []sftpFile {
		if n == 0 {
			return []sftpFile{folder("a"), folder("b")}
		}
		return nil
	}}},
	{trick{name: "a directory in itself without end", opts: transport.TreeOptions{MaxDepth: 150}, fails: "MaxDepth", is: transport.ErrLimit}, sftpWorld{List: func(_ string, n int) []sftpFile {
		if n == 0 {
			return []sftpFile{folder("a")}
		}
		return nil
	}}},
	{trick{name: "a listing of nothing", fails: noProtocol}, sftpWorld{List: func(string, int) []sftpFile { return []sftpFile{} }}},
	{trick{name: "a listing of more than comes", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpReaddir, "", func(id uint32) []byte {
		return sftpPacket(sftpName, id, []byte{0xff, 0xff, 0xff, 0xff}, make([]byte, 1000))
	})}},
	{trick{name: "a listing that breaks off", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpReaddir, "", func(id uint32) []byte {
		return sftpPacket(sftpName, id, []byte{0, 0, 0, 1, 0, 0, 0, 90}, make([]byte, 20))
	})}},
	{trick{name: "a directory that is none", fails: "not a directory"}, sftpWorld{Raw: onSFTP(sftpOpendir, "", func(id uint32) []byte { return sftpCode(id, 4, "open /src: not a directory") })}},
	{trick{name: "no such directory", is: fs.ErrNotExist}, sftpWorld{Raw: onSFTP(sftpOpendir, "", func(id uint32) []byte { return sftpCode(id, 2, "no such file") })}},
	// Packets.
	{trick{name: "a handle of 10 KiB", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpOpendir, "", func(id uint32) []byte { return sftpPacket(sftpHandle, id, sftpString(strings.Repeat("h", 10<<10))) })}},
	{trick{name: "a handle of 10 KiB for a file", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpOpen, "", func(id uint32) []byte { return sftpPacket(sftpHandle, id, sftpString(strings.Repeat("h", 10<<10))) })}},
	{trick{name: "a wrong id", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpReaddir, "", func(id uint32) []byte { return sftpCode(id+1000, 1, "") })}},
	{trick{name: "a huge packet", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpReaddir, "", func(id uint32) []byte { return []byte{0xff, 0xff, 0xff, 0xff, sftpName, 0, 0, 0, 0} })}},
	{trick{name: "a huge status", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpOpendir, "", func(id uint32) []byte { return sftpCode(id, 4, strings.Repeat("x", 250<<10)) })}},
	{trick{name: "a status with a terminal's commands", fails: "31m"}, sftpWorld{Raw: onSFTP(sftpOpendir, "", func(id uint32) []byte { return sftpCode(id, 4, "\x1b[31mno\x00\n") })}},
	{trick{name: "more data than was asked for", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpRead, "", func(id uint32) []byte { return sftpPacket(sftpData, id, sftpString(strings.Repeat("x", 200<<10))) })}},
	{trick{name: "no data", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpRead, "", func(id uint32) []byte { return sftpPacket(sftpData, id, sftpString("")) })}},
	{trick{name: "a negative length of data", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpRead, "", func(id uint32) []byte { return sftpPacket(sftpData, id, []byte{0xff, 0xff, 0xff, 0xff}, []byte("x")) })}},
	{trick{name: "an answer of another type", fails: noProtocol}, sftpWorld{Raw: onSFTP(sftpRead, "", func(id uint32) []byte { return sftpNames(id, regular("a", 1)) })}},
	{trick{name: "success where there is none", fails: "SFTP"}, sftpWorld{Raw: onSFTP(sftpOpendir, "", func(id uint32) []byte { return sftpCode(id, 0, "") })}},
	{trick{name: "garbage", fails: "SFTP"}, sftpWorld{Raw: onSFTP(sftpReaddir, "", func(id uint32) []byte { return []byte(strings.Repeat("garbage ", 100)) })}},
	{trick{name: "a flood of statuses", fails: "SFTP"}, sftpWorld{Raw: onSFTP(sftpReaddir, "", func(id uint32) []byte { return []byte(strings.Repeat(string(sftpCode(id, 4, "no")), 10000)) })}},
}

func TestHostileSFTP(t *testing.T) {
	t.Parallel()
	for _, k := range sftpTricks {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			err := k.on(t, ctx, hostileSFTP(t, k.HostileSFTP))
			if err != nil {
				assert.NotContains(t, err.Error(), "\x1b", "what the host says reaches the terminal as it is")
				assert.NotContains(t, err.Error(), "\x00")
				assert.NotErrorIs(t, err, context.DeadlineExceeded)
			}
		})
	}
}

// What does not end on its own ends with ctx.
func TestHostileSFTPAndContext(t *testing.T) {
	t.Parallel()
	silent := func(uint32) []byte { return nil }
	for _, k := range []struct {
		name string
		lxdtest.HostileSFTP
	}{
		{"no answer to an opening of a directory", sftpWorld{Raw: onSFTP(sftpOpendir, "", silent)}},
		{"no answer to a reading of a directory", sftpWorld{Raw: onSFTP(sftpReaddir, "", silent)}},
		{"no answer to an opening", sftpWorld{Raw: onSFTP(sftpOpen, "", silent)}},
		{"no answer to a reading", sftpWorld{Raw: onSFTP(sftpRead, "", silent)}},
		{"no answer to anything", sftpWorld{Raw: func(byte, uint32, string) ([]byte, bool) { return nil, false }}},
		{"half a packet", sftpWorld{Raw: onSFTP(sftpReaddir, "", func(id uint32) []byte { return sftpNames(id, regular("abc", 7))[:20] })}},
		{"a listing without end", sftpWorld{List: func(string, int) []sftpFile { return []sftpFile{ofMode("fifo", 0o010666)} }}},
		{"a file without end", sftpWorld{List: listed(regular("a", math.MaxInt64-1)), Raw: onSFTP(sftpRead, "", func(id uint32) []byte { return sftpPacket(sftpData, id, sftpString("x")) })}},
	} {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancelCause(soon(t))
			enough := errors.New("enough")
			timer := time.AfterFunc(500*time.Millisecond, func() { cancel(enough) })
			defer timer.Stop()
			p := newPlaces(t)
			_, err := transport.DownloadTree(ctx, hostileSFTP(t, k.HostileSFTP), "/src", p.root, nil)
			assert.ErrorIs(t, err, enough)
			p.check(t, nil)
		})
	}
}

// Memory does not depend on how much the host lists. Not parallel: it looks at the heap.
func TestHostileSFTPMemory(t *testing.T) {
	pad := func(files []sftpFile) []sftpFile { // up to what a packet may have
		size := 0
		for _, f := range files {
			size += len(f.Name) + 40
		}
		for n := 0; size < 240<<10; n++ {
			files = append(files, ofMode(fmt.Sprint(n, strings.Repeat("x", 200)), 0o010666))
			size += 250
		}
		return files
	}
	for _, c := range []struct {
		name    string
		few, of int
		list    func(most int) func(string, int) []sftpFile
	}{
		{"one directory", 2000, tenMillion(100_000), func(most int) func(string, int) []sftpFile {
			return func(dir string, n int) []sftpFile {
				var files []sftpFile
				for i := n * 1000; i < min(most, n*1000+1000); i++ {
					files = append(files, ofMode(fmt.Sprintf("fifo%d", i), 0o010666))
				}
				return files
			}
		}},
		{"directories in one another, each with many entries", 15, 50, func(most int) func(string, int) []sftpFile {
			return func(dir string, n int) []sftpFile {
				if strings.Count(dir, "/") > most {
					return nil
				}
				if n == 0 {
					return pad([]sftpFile{folder("d")})
				}
				if n < 6 {
					return pad(nil)
				}
				return nil
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var heaps [2]uint64
			for i, count := range []int{c.few, c.of} {
				var heap atomic.Uint64
				list := c.list(count)
				host := hostileSFTP(t, sftpWorld{List: list})
				p := newPlaces(t)
				seen := 0
				look := func() {
					if seen++; seen%(20*count) == 0 || seen == count-5 {
						runtime.GC()
						var m runtime.MemStats
						runtime.ReadMemStats(&m)
						heap.Store(max(heap.Load(), m.HeapAlloc))
					}
				}
				_, err := transport.DownloadTree(enduring(t), host, "/src", p.root, &transport.TreeOptions{Skipped: func(string, error) { look() }})
				require.NoError(t, err)
				heaps[i] = heap.Load()
				require.NotZero(t, heaps[i])
			}
			grown := int64(heaps[1]) - int64(heaps[0])
			t.Logf("%d KiB with %d, %d KiB with %d", heaps[0]>>10, c.few, heaps[1]>>10, c.of)
			assert.Less(t, grown, int64(16<<20)) // what the listing may keep in mind
		})
	}
}

// One file from a host that lies.
func TestHostileDownload(t *testing.T) {
	t.Parallel()
	size := func(n uint64, mode uint32) func(byte, uint32, string) ([]byte, bool) {
		return func(kind byte, id uint32, what string) ([]byte, bool) {
			if kind != sftpStat && kind != sftpFstat {
				return nil, true
			}
			return sftpPacket(sftpAttrs, id, sftpFile{Mode: mode, Size: n}.Attrs()), true
		}
	}
	for _, k := range []struct {
		name  string
		raw   func(byte, uint32, string) ([]byte, bool)
		opts  transport.DownloadOptions
		fails string
		is    error
	}{
		{name: "less than it said", raw: size(100, 0o100644), fails: "the host said 100 bytes, 7 came"},
		{name: "petabytes", raw: size(1<<60, 0o100644), fails: "7 came"},
		{name: "petabytes and a limit", raw: size(1<<60, 0o100644), opts: transport.DownloadOptions{Limit: 1 << 20}, is: transport.ErrLimit},
		{name: "a negative size", raw: size(math.MaxUint64, 0o100644), fails: "the host says that it has 18446744073709551615 bytes"},
		{name: "a directory", raw: size(5, 0o040755), fails: "it is a directory"},
		{name: "a FIFO", raw: size(5, 0o010644), fails: "it is a FIFO"},
		{name: "of no type", raw: size(5, 0), fails: "only regular files"},
		{name: "attributes that break off", raw: onSFTP(sftpStat, "", func(id uint32) []byte { return sftpPacket(sftpAttrs, id, []byte{0, 0, 0, 1}) }), fails: noProtocol},
		{name: "without end, and a limit", raw: func(kind byte, id uint32, what string) ([]byte, bool) {
			switch kind {
			case sftpStat, sftpFstat:
				return sftpPacket(sftpAttrs, id, regular("", 0).Attrs()), true // as those of /proc
			case sftpRead:
				return sftpPacket(sftpData, id, sftpString("xxxxxxxx")), true
			}
			return nil, true
		}, opts: transport.DownloadOptions{Limit: 4000}, is: transport.ErrLimit},
		{name: "too much at once", raw: onSFTP(sftpRead, "", func(id uint32) []byte { return sftpPacket(sftpData, id, sftpString(strings.Repeat("x", 100))) }), fails: noProtocol},
	} {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			var out strings.Builder
			err := hostileSFTP(t, sftpWorld{Raw: k.raw}).Download(ctx, "/src/real", &out, &k.opts)
			require.Error(t, err)
			assert.ErrorContains(t, err, k.fails)
			if k.is != nil {
				assert.ErrorIs(t, err, k.is)
			}
			assert.NotErrorIs(t, err, context.DeadlineExceeded)
			assert.LessOrEqual(t, out.Len(), 4000)
		})
	}
}
