package transport_test

import (
	"io"
	"io/fs"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/lxdtest"
)

// endlessDir is a file system of one directory with that many files of a few bytes, none of which is anywhere.
type endlessDir int

func (d endlessDir) Open(name string) (fs.File, error) {
	if name == "." {
		return &endlessFile{dir: d, name: name}, nil
	}
	return &endlessFile{name: name, content: strings.NewReader(name)}, nil
}

// endlessFile is the directory, and every file in it.
type endlessFile struct {
	dir     endlessDir // how many are still to be listed
	name    string
	content *strings.Reader // nil: the directory
}

func (f *endlessFile) Stat() (fs.FileInfo, error) { return f.Info() }
func (f *endlessFile) Read(p []byte) (int, error) { return f.content.Read(p) }
func (f *endlessFile) Close() error               { return nil }
func (f *endlessFile) Name() string               { return path.Base(f.name) }
func (f *endlessFile) IsDir() bool                { return f.content == nil }
func (f *endlessFile) Type() fs.FileMode          { return f.Mode().Type() }
func (f *endlessFile) Info() (fs.FileInfo, error) { return f, nil }
func (f *endlessFile) Size() int64                { return int64(len(f.name)) }
func (f *endlessFile) ModTime() time.Time         { return time.Unix(1e9, 0) }
func (f *endlessFile) Sys() any                   { return nil }
func (f *endlessFile) Mode() fs.FileMode {
	if f.IsDir() {
		return fs.ModeDir | 0o755
	}
	return 0o644
}

func (f *endlessFile) ReadDir(n int) (entries []fs.DirEntry, err error) {
	for range min(n, int(f.dir)) {
		f.dir--
		name := "file " + strconv.Itoa(int(f.dir))
		entries = append(entries, &endlessFile{name: name, content: strings.NewReader(name)})
	}
	if len(entries) == 0 {
		err = io.EOF
	}
	return entries, err
}

// TestMemoryOfALargeTree: heap, goroutines and open files do not depend on how many files are sent. Not parallel: it looks at the whole process. With
// TRANSPORT_SLOW_TESTS=1 there are ten million.
func TestMemoryOfALargeTree(t *testing.T) {
	overTar, _ := hostile(t, func(p *lxdtest.Process) int {
		io.WriteString(p.Stdout, "gnu\n")
		io.Copy(io.Discard, p.Stdin)
		return 0
	})
	overSFTP := hostileSFTP(t, sftpWorld{Raw: func(kind byte, id uint32, _ string) ([]byte, bool) {
		if kind == sftpStat { // of the destination
			return sftpPacket(sftpAttrs, id, folder("").Attrs()), true
		}
		return nil, true
	}})
	for _, c := range []struct {
		name string
		host *transport.LXD
		of   int
	}{{"tar", overTar, tenMillion(50_000)}, {"SFTP", overSFTP, 20_000}} {
		t.Run(c.name, func(t *testing.T) {
			type use struct {
				heap              uint64
				goroutines, files int
			}
			var most [2]use
			for i, count := range []int{1000, c.of} {
				look := func(s transport.TreeStats) {
					if s.Files%(count/5) != 0 {
						return
					}
					runtime.GC()
					var m runtime.MemStats
					runtime.ReadMemStats(&m)
					open, _ := os.ReadDir("/proc/self/fd") // other systems have none
					u := &most[i]
					u.heap, u.goroutines, u.files = max(u.heap, m.HeapAlloc), max(u.goroutines, runtime.NumGoroutine()), max(u.files, len(open))
				}
				stats, err := transport.UploadTree(enduring(t), c.host, "/dst", endlessDir(count), &transport.TreeOptions{Progress: look})
				require.NoError(t, err)
				assert.Equal(t, count, stats.Files)
			}
			t.Logf("1000: %+v, %d: %+v", most[0], c.of, most[1])
			assert.Less(t, int64(most[1].heap)-int64(most[0].heap), int64(16<<20))
			assert.LessOrEqual(t, most[1].goroutines, most[0].goroutines+4)
			assert.LessOrEqual(t, most[1].files, most[0].files+4)
		})
	}
}
