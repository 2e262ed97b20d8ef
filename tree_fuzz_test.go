package transport

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lxdtransport/transport/lxdtest"
)

// fuzzLimits are what a fuzzed host may have this process write.
var fuzzLimits = TreeOptions{MaxBytes: 1 << 20, MaxEntries: 300, MaxDepth: 300, Symlinks: KeepSymlinks}

// intoRoot runs take with a sink for a directory beside which nothing may change, and looks at what has come.
func intoRoot(t *testing.T, take func(tr *tree, s *sink) error) {
	t.Helper()
	parent := t.TempDir()
	dst := filepath.Join(parent, "dst")
	if err := os.Mkdir(dst, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(parent, "sentinel"), []byte("here"), 0o600); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dst)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	opts := fuzzLimits
	longest := 0
	opts.Skipped = func(name string, why error) { longest = max(longest, len(why.Error())) }
	tr, err := newTree(&opts)
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSink(tr, root)
	if err != nil {
		t.Fatal(err)
	}
	failed := take(tr, s)
	if failed == nil {
		failed = s.commit()
	}
	if err := s.close(); err != nil {
		t.Errorf("cleaning up: %v", err)
	}
	if failed != nil && failed.Error() == "" {
		t.Error("an error without a sentence")
	}
	if longest > 16<<10 {
		t.Errorf("a reason of %d bytes", longest)
	}
	if tr.stats.Bytes > opts.MaxBytes || tr.stats.Files+tr.stats.Dirs+tr.stats.Symlinks > 300*300 {
		t.Errorf("the limits do not hold: %+v", tr.stats)
	}
	names, err := os.ReadDir(parent)
	if err != nil || len(names) != 2 {
		t.Errorf("beside the destination: %v %v", names, err)
	}
	if b, err := os.ReadFile(filepath.Join(parent, "sentinel")); string(b) != "here" || err != nil {
		t.Errorf("the sentinel: %q %v", b, err)
	}
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // a directory that cannot be read, or a name that io/fs does not know
		}
		if name == "." {
			return nil
		}
		if strings.HasPrefix(name, s.stage) {
			t.Errorf("left: %s", name)
		}
		if failed != nil {
			// No error comes from the second half of commit, for nothing was here before.
			t.Errorf("%s is there after a failure: %v", name, failed)
		}
		info, err := root.Lstat(name)
		if err != nil {
			return nil
		}
		switch m := info.Mode(); {
		case m&^(fs.ModePerm|fs.ModeDir|fs.ModeSymlink) != 0:
			t.Errorf("%s: %v", name, m)
		case m&fs.ModeSymlink != 0:
			if _, err := root.Stat(name); err != nil && strings.Contains(err.Error(), "escapes") {
				target, _ := root.Readlink(name)
				t.Errorf("%s leads out: %q", name, target)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// FuzzReadTar feeds the tar way whatever a host may send.
func FuzzReadTar(f *testing.F) {
	for _, seed := range [][]byte{
		lxdtest.RawWhole(lxdtest.RawFile("./a", "content"), lxdtest.RawDir("./d/"), lxdtest.RawFile("d/x", "y"), lxdtest.RawLink("l", "d/x"), lxdtest.RawHard("h", "a")),
		lxdtest.RawWhole(lxdtest.RawFile("../x", "x"), lxdtest.RawFile("/x", "x"), lxdtest.RawFile("a/../../x", "x"), lxdtest.RawFile("", "")),
		lxdtest.RawWhole(lxdtest.RawLink("a", "."), lxdtest.RawLink("b", "a/.."), lxdtest.RawFile("b/x", "1"), lxdtest.RawLink("d/e/up", "../.."), lxdtest.RawLink("d/e/out", "../../..")),
		lxdtest.RawWhole(lxdtest.RawDir("d"), lxdtest.RawLink("d", "/"), lxdtest.RawFile("d/x", ""), lxdtest.RawFile("d", "")),
		lxdtest.RawWhole(lxdtest.RawLong('L', strings.Repeat("n/", 200)), lxdtest.RawFile("x", "1"), lxdtest.RawLong('K', "../.."), lxdtest.RawLink("k", "x")),
		lxdtest.RawWhole(lxdtest.RawPAX('x', "path", "p/q", "size", "3", "mtime", "1.5"), lxdtest.RawFile("x", "abc"), lxdtest.RawPAX('g', "path", "g"), lxdtest.RawFile("y", "")),
		lxdtest.RawWhole(lxdtest.RawHeader{Name: "b", Magic: lxdtest.RawGNU, Size: lxdtest.RawBase256(1<<63 - 1)}, "short"),
		lxdtest.RawWhole(lxdtest.RawPAX('x', "size", "9223372036854775807"), lxdtest.RawFile("a", "abc")),
		lxdtest.RawWhole(lxdtest.RawSparse("s", 1<<50, false, 0, 0, 1<<50, 0), lxdtest.RawFile("a", "1")),
		lxdtest.RawWhole(lxdtest.RawPAX('x', "GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.name", "../s", "GNU.sparse.realsize", "99"), lxdtest.RawFile("a", "0\n"+strings.Repeat("\x00", 510))),
		lxdtest.RawWhole(lxdtest.RawHeader{Name: "m", Mode: "0006777\x00"}, lxdtest.RawHeader{Name: "md", Kind: '5', Mode: "0001000\x00"}, lxdtest.RawFile("md/x", "y")),
		lxdtest.RawWhole(lxdtest.RawOf('3', "c"), lxdtest.RawOf('6', "f"), lxdtest.RawOf('X', "x"), lxdtest.RawSized('7', "seven", "7"), lxdtest.RawSized('D', "dd", "dd")),
		lxdtest.RawTar(lxdtest.RawFile("a", "1"), make([]byte, 512), lxdtest.RawFile("b", "2"), lxdtest.RawEnd()),
		lxdtest.RawTar(lxdtest.RawFile("a", "1"), lxdtest.RawEnd(), lxdtest.RawFile("b", "2")),
		lxdtest.RawFile("a", strings.Repeat("x", 600))[:700],
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		if len(stream) > 1<<20 {
			return
		}
		intoRoot(t, func(tr *tree, s *sink) error {
			return tr.readTar(bytes.NewReader(stream), s, func(name string) error {
				return s.file(entry{name: name, size: 3, mode: 0o600}, strings.NewReader("abc"))
			})
		})
	})
}

// FuzzListing feeds the way over single files whatever a host may list.
func FuzzListing(f *testing.F) {
	for _, seed := range []string{
		"f./a\x00\x00d./d\x00drwxr-xr-x\x00f./d/x\x00\x00l./l\x00d/x\x00o./fifo\x00\x00",
		"f../x\x00\x00f/x\x00\x00f\x00\x00\x00\x00",
		"d./d\x00drwsrwsrwt\x00l./d\x00/\x00f./d/x\x00\x00d./d\x00d---------\x00",
		"l./a\x00.\x00l./b\x00a/..\x00f./b/x\x00\x00",
		"d./" + strings.Repeat("n/", 100) + "n\x00\x00f./gone\x00\x00f./more\x00\x00",
		"f./half",
		"f" + strings.Repeat("x", 9000) + "\x00\x00",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, list []byte) {
		intoRoot(t, func(tr *tree, s *sink) error {
			return tr.readList(t.Context(), fuzzHost{}, "/src", bytes.NewReader(list), s)
		})
	})
}

// fuzzHost has a file of every name.
type fuzzHost struct{}

func (fuzzHost) Exec(context.Context, Command) error { return errors.ErrUnsupported }
func (fuzzHost) Upload(context.Context, string, io.Reader, *UploadOptions) error {
	return errors.ErrUnsupported
}
func (fuzzHost) Close() error { return nil }

func (fuzzHost) Download(_ context.Context, src string, dst io.Writer, opts *DownloadOptions) error {
	content := "content"
	info := entry{name: src, size: int64(len(content)), mode: 0o777 | fs.ModeSetuid, modified: time.Unix(1e9, 0)}
	switch {
	case strings.HasSuffix(src, "gone"):
		return fs.ErrNotExist
	case strings.HasSuffix(src, "more"):
		info.size--
	case strings.HasSuffix(src, "less"):
		info.size++
	}
	opts.Stat(info)
	_, err := io.WriteString(dst, content)
	return err
}

// FuzzGreeting feeds the reader of the script's answer, in pieces of any size: they must make no difference.
func FuzzGreeting(f *testing.F) {
	for _, seed := range []string{
		"gnu\nstream", "none\n", "mkdir: no\nfailed\n", "gn", "\n\n\ngnu\n\n", "list\n", strings.Repeat("x", 9000), strings.Repeat("x\n", 4090) + "gnu\nstream", "gnu",
	} {
		f.Add([]byte(seed), uint16(3))
	}
	f.Fuzz(func(t *testing.T, said []byte, size uint16) {
		listen := func(piece int) (next string, answered bool, answer, err error) {
			var out bytes.Buffer
			a := newGreeting()
			w := &firstLines{next: &out, greeting: a}
			for rest := said; len(rest) > 0 && err == nil; {
				part := rest[:min(piece, len(rest))]
				var n int
				n, err = w.Write(part)
				if n > len(part) || err == nil && n < len(part) {
					t.Fatalf("%d of %d bytes, %v", n, len(part), err)
				}
				rest = rest[len(part):]
			}
			if len(w.lines) > maxGreeting+piece {
				t.Fatalf("%d bytes are kept", len(w.lines))
			}
			select {
			case <-a.said:
				answered, answer = true, a.err
			default:
			}
			return out.String(), answered, answer, err
		}
		next, answered, answer, err := listen(len(said) + 1)
		next2, answered2, answer2, err2 := listen(int(size) + 1)
		if next != next2 || answered != answered2 || (answer == nil) != (answer2 == nil) || (err == nil) != (err2 == nil) {
			t.Fatalf("in one piece: %q %v %v %v\nin pieces of %d: %q %v %v %v", next, answered, answer, err, int(size)+1, next2, answered2, answer2, err2)
		}
		if answer != nil && (answer.Error() == "" || len(answer.Error()) > 4<<10 || strings.ContainsAny(answer.Error(), "\x00\x1b\n")) {
			t.Fatalf("%q", answer)
		}
		if !strings.HasSuffix(string(said), next) {
			t.Fatalf("%q is not the end of %q", next, said)
		}
	})
}
