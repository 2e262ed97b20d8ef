package transport_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/internal/reallxd"
)

// onFiles runs a test over every way to the real server, and over one that has no SFTP endpoint.
func onFiles(t *testing.T, test func(t *testing.T, host *transport.LXD)) {
	t.Helper()
	onLXD(t, test)
	name := reallxd.Instance(t)
	t.Run("rest", func(t *testing.T) {
		t.Parallel()
		test(t, newLXD(t, offline(t, withoutSFTP(t)), name, leaving(t, reallxd.Unix(t), name)))
	})
}

// withoutSFTP returns a socket behind which is the real server, but for its SFTP endpoint.
func withoutSFTP(t *testing.T) string {
	t.Helper()
	socket := os.Getenv("TRANSPORT_LXD_SOCKET")
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: "unix.socket"}) },
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			},
			DisableKeepAlives: true,
		},
		FlushInterval: -1,
	}
	dir, err := os.MkdirTemp("", "t") // t.TempDir may be too long for a socket
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	require.NoError(t, err)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/sftp") {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, `{"type":"error","status":"","status_code":0,"operation":"","error_code":404,"error":"not found","metadata":null}`)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	return l.Addr().String()
}

// scratch makes a directory in the instance.
func scratch(t *testing.T, host *transport.LXD) string {
	t.Helper()
	out, err := transport.Output(soon(t), host, transport.Command{Args: transport.Shell("d=$(mktemp -d) && chmod 755 $d && printf %s $d")})
	require.NoError(t, err)
	return string(out)
}

func output(t *testing.T, host *transport.LXD, script string, args ...string) string {
	t.Helper()
	out, err := transport.Output(soon(t), host, transport.Command{Args: transport.Shell(script, args...)})
	require.NoError(t, err)
	return string(out)
}

// unchanged fails if something but the named files is in a directory.
func holdsOnly(t *testing.T, host *transport.LXD, dir string, names ...string) {
	t.Helper()
	assert.ElementsMatch(t, names, strings.Fields(output(t, host, `ls -A "$1"`, dir)), "no temporary file may be left")
}

func TestFileUpAndDown(t *testing.T) {
	onFiles(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		size := int64(sized(256<<20, 64<<20))
		in := newRandom(size)
		var sent, before int64
		require.NoError(t, host.Upload(soon(t), dir+"/big", in, &transport.UploadOptions{Progress: func(n int64) {
			assert.GreaterOrEqual(t, n, before)
			before, sent = n, n
		}}))
		assert.Equal(t, size, sent)
		holdsOnly(t, host, dir, "big")

		var received int64
		var info fs.FileInfo
		out := sha256.New()
		require.NoError(t, host.Download(soon(t), dir+"/big", out, &transport.DownloadOptions{
			Progress: func(n int64) { received = n },
			Stat:     func(i fs.FileInfo) { info = i },
		}))
		assert.Equal(t, in.sum.Sum(nil), out.Sum(nil))
		assert.EqualValues(t, size, received)
		if assert.NotNil(t, info) {
			assert.Equal(t, "big", info.Name())
			assert.EqualValues(t, size, info.Size())
			assert.EqualValues(t, 0o644, info.Mode())
			assert.WithinDuration(t, time.Now(), info.ModTime(), time.Minute)
			assert.Equal(t, &transport.User{}, info.Sys())
		}
		output(t, host, `rm -r "$1"`, dir)
	})
}

func TestFileSizes(t *testing.T) {
	onFiles(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		for _, n := range []int64{0, 1, 32<<10 - 1, 32 << 10, 250<<10 - 1, 250 << 10, 250<<10 + 1, 5 << 20} {
			name := fmt.Sprintf("%s/%d", dir, n)
			in := newRandom(n)
			require.NoError(t, host.Upload(soon(t), name, in, nil))
			out := sha256.New()
			require.NoError(t, host.Download(soon(t), name, out, nil))
			assert.Equal(t, in.sum.Sum(nil), out.Sum(nil), n)
		}
	})
}

func TestUploadAttributes(t *testing.T) {
	onFiles(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		stat := func(name string) string {
			return strings.TrimSpace(output(t, host, `stat -c '%a %u %g %Y' "$1"`, dir+"/"+name))
		}
		up := func(name string, o *transport.UploadOptions) {
			t.Helper()
			require.NoError(t, host.Upload(soon(t), dir+"/"+name, strings.NewReader("x"), o))
		}
		when := time.Unix(1234567890, 0)
		up("new", nil)
		assert.Equal(t, "644 0 0", strings.Join(strings.Fields(stat("new"))[:3], " "))
		up("all", &transport.UploadOptions{Mode: 0o750, Owner: &transport.User{UID: 1000, GID: 65534}, ModTime: when})
		assert.Equal(t, "750 1000 65534 1234567890", stat("all"))
		up("all", &transport.UploadOptions{ModTime: when.Add(time.Second)})
		assert.Equal(t, "750 1000 65534 1234567891", stat("all"), "a replaced file keeps mode and owner")
		up("all", &transport.UploadOptions{Mode: 0o600, Owner: &transport.User{}, ModTime: when})
		assert.Equal(t, "600 0 0 1234567890", stat("all"))
		for bit, want := range map[fs.FileMode]string{fs.ModeSticky: "1755", fs.ModeSetuid: "4755", fs.ModeSetgid: "2755"} {
			err := host.Upload(soon(t), dir+"/special", strings.NewReader("x"), &transport.UploadOptions{Mode: 0o755 | bit, ModTime: when})
			if err == nil {
				assert.Equal(t, want+" 0 0 1234567890", stat("special"))
			} else { // over SFTP on LXD 5.0
				assert.ErrorIs(t, err, errors.ErrUnsupported)
			}
		}

		up("a/b/c/file", &transport.UploadOptions{MkdirAll: true, Owner: &transport.User{UID: 7, GID: 8}, Mode: 0o600, ModTime: when})
		assert.Equal(t, "600 7 8 1234567890", stat("a/b/c/file"))
		assert.Equal(t, "755 7 8", strings.Join(strings.Fields(stat("a/b"))[:3], " "))

		// A link is replaced, what it leads to is left alone.
		output(t, host, `echo old >"$1/target"; ln -s target "$1/link"`, dir)
		up("link", nil)
		assert.Equal(t, "old\nx", output(t, host, `cd "$1"; [ ! -h link ]; cat target link`, dir))
	})
}

func TestUploadNames(t *testing.T) {
	onFiles(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		for _, name := range []string{"a b", "-n", "line\nbreak", `'"\`, "ä€", "*", strings.Repeat("x", 255)} {
			require.NoError(t, host.Upload(soon(t), path.Join(dir, name), strings.NewReader(name), nil), name)
			var got bytes.Buffer
			require.NoError(t, host.Download(soon(t), path.Join(dir, name), &got, nil), name)
			assert.Equal(t, name, got.String())
		}
	})
}

// A process that reads the old file goes on reading the old file.
func TestUploadOverAFileThatIsRead(t *testing.T) {
	onFiles(t, func(t *testing.T, host *transport.LXD) {
		file := scratch(t, host) + "/f"
		require.NoError(t, host.Upload(soon(t), file, strings.NewReader("old old old\n"), nil))
		goOn, w := io.Pipe()
		var once sync.Once
		up := make(chan struct{})
		var out bytes.Buffer
		p, err := transport.Start(soon(t), host, transport.Command{
			Args:  transport.Shell(`exec 3<"$1"; head -c 4 <&3; read x; cat <&3; cat "$1"`, file),
			Stdin: goOn,
			Stdout: writerFunc(func(p []byte) (int, error) {
				once.Do(func() { close(up) })
				return out.Write(p)
			}),
		})
		require.NoError(t, err)
		<-up
		require.NoError(t, host.Upload(soon(t), file, strings.NewReader("new\n"), nil))
		io.WriteString(w, "\n")
		w.Close()
		require.NoError(t, p.Wait())
		// head may have read more than it printed: what cat prints is the rest of the old file or nothing of it.
		assert.True(t, strings.HasPrefix(out.String(), "old "))
		assert.True(t, strings.HasSuffix(out.String(), "new\n"))
		assert.NotContains(t, strings.TrimSuffix(out.String(), "new\n"), "new")
	})
}

// Nobody ever sees a part of a file.
func TestUploadIsAtomic(t *testing.T) {
	onFiles(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		const size = 1 << 20
		require.NoError(t, host.Upload(soon(t), dir+"/f", bytes.NewReader(make([]byte, size)), nil))
		ctx, cancel := context.WithCancel(soon(t))
		defer cancel()
		seen := make(chan error, 1)
		go func() {
			seen <- host.Exec(ctx, transport.Command{Args: transport.Shell(`while :; do n=$(wc -c <"$1") || exit 1; [ $n = $2 ] || { echo "saw $n bytes" >&2; exit 1; }; done`, dir+"/f", fmt.Sprint(size))})
		}()
		for range 20 {
			require.NoError(t, host.Upload(soon(t), dir+"/f", bytes.NewReader(make([]byte, size)), nil))
		}
		cancel()
		err := <-seen
		code, _ := transport.ExitCode(err)
		assert.Equal(t, 143, code, "%v", err)
		holdsOnly(t, host, dir, "f")
	})
}

func TestUploadErrors(t *testing.T) {
	onFiles(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		output(t, host, `cd "$1"; mkdir dir full; echo old >file; mkfifo fifo; mount -t tmpfs -o size=1m none full; echo old >full/file`, dir)
		defer output(t, host, `umount "$1/full"`, dir)
		broken := errors.New("broken source")
		big := func() io.Reader { return io.LimitReader(zeros{}, 4<<20) }
		for _, c := range []struct {
			name string
			dst  string
			src  io.Reader
			opts *transport.UploadOptions
			is   error
			text string
		}{
			{"missing directory", dir + "/no/such/f", strings.NewReader("x"), nil, fs.ErrNotExist, ""},
			{"onto a directory", dir + "/dir", strings.NewReader("x"), nil, syscall.EISDIR, "is a directory"},
			{"name of a directory", dir + "/dir/", strings.NewReader("x"), nil, syscall.EISDIR, "has to end with the file's name"},
			{"file on the way", dir + "/file/f", strings.NewReader("x"), nil, nil, ""},
			{"file on the way of MkdirAll", dir + "/file/a/f", strings.NewReader("x"), &transport.UploadOptions{MkdirAll: true}, nil, ""},
			{"onto a FIFO", dir + "/fifo", strings.NewReader("x"), nil, fs.ErrInvalid, "regular file"},
			{"onto a device", "/dev/null", strings.NewReader("x"), nil, fs.ErrInvalid, "regular file"},
			{"full disk", dir + "/full/file", big(), nil, nil, ""},
			{"source that fails", dir + "/file", io.MultiReader(big(), errReader{broken}), nil, broken, "reading the source: broken source"},
			{"source that ends early", dir + "/file", io.MultiReader(big(), errReader{io.ErrUnexpectedEOF}), nil, io.ErrUnexpectedEOF, "reading the source"},
			{"source without progress", dir + "/file", errReader{nil}, nil, io.ErrNoProgress, "reading the source"},
			{"relative", "f", strings.NewReader("x"), nil, nil, `"f" is not absolute`},
			{"empty", "", strings.NewReader("x"), nil, nil, "the path is empty"},
			{"NUL", "/a\x00b", strings.NewReader("x"), nil, nil, "NUL byte"},
			{"no source", dir + "/file", nil, nil, nil, "src) is nil"},
			{"mode of a directory", dir + "/file", strings.NewReader("x"), &transport.UploadOptions{Mode: fs.ModeDir | 0o755}, nil, "not that of a regular file"},
			{"owner that is none", dir + "/file", strings.NewReader("x"), &transport.UploadOptions{Owner: &transport.User{UID: 1<<32 - 1}}, nil, "not a user"},
			{"owner outside the container", dir + "/file", strings.NewReader("x"), &transport.UploadOptions{Owner: &transport.User{UID: 1 << 31}}, nil, ""},
			{"time before time", dir + "/file", strings.NewReader("x"), &transport.UploadOptions{ModTime: time.Unix(-1, 0)}, nil, "1970"},
		} {
			err := host.Upload(soon(t), c.dst, c.src, c.opts)
			var p *fs.PathError
			if assert.ErrorAs(t, err, &p, c.name) {
				assert.Equal(t, "upload", p.Op)
				assert.Equal(t, c.dst, p.Path)
			}
			if c.is != nil {
				assert.ErrorIs(t, err, c.is, c.name)
			}
			assert.ErrorContains(t, err, c.text, c.name)
			assert.NotErrorIs(t, err, transport.ErrNoHost, c.name)
		}
		assert.Equal(t, "old\nold\n", output(t, host, `cd "$1"; cat file full/file; ls -A dir`, dir))
		holdsOnly(t, host, dir, "dir", "full", "file", "fifo")
		holdsOnly(t, host, dir+"/full", "file")
	})
}

func TestUploadErrorsOverSFTP(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		output(t, host, `cd "$1"; mkdir full ro; mount -t tmpfs -o size=1m none full; mount -t tmpfs -o ro none ro`, dir)
		defer output(t, host, `umount "$1/full" "$1/ro"`, dir)
		err := host.Upload(soon(t), dir+"/full/f", io.LimitReader(zeros{}, 4<<20), nil)
		assert.ErrorIs(t, err, syscall.ENOSPC)
		err = host.Upload(soon(t), dir+"/ro/f", strings.NewReader("x"), nil)
		assert.ErrorIs(t, err, syscall.EROFS)
		err = host.Upload(soon(t), "/sys/f", strings.NewReader("x"), nil)
		assert.ErrorIs(t, err, fs.ErrPermission)
		assert.NotErrorIs(t, err, transport.ErrUnauthorized)
		err = host.Upload(soon(t), "/no/such/f", strings.NewReader("x"), nil)
		assert.ErrorContains(t, err, "UploadOptions.MkdirAll")
	})
}

func TestUploadIsCancelled(t *testing.T) {
	onFiles(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		mine := errors.New("enough")
		ctx, cancel := context.WithCancelCause(soon(t))
		err := host.Upload(ctx, dir+"/f", zeros{}, &transport.UploadOptions{Progress: func(n int64) {
			if n > 10<<20 {
				cancel(mine)
			}
		}})
		assert.ErrorIs(t, err, mine)
		holdsOnly(t, host, dir)

		// A source that does not return cannot hold it.
		blocked, unblock := io.Pipe()
		defer unblock.Close()
		ctx, cancelBrief := context.WithTimeout(soon(t), 300*time.Millisecond)
		defer cancelBrief()
		err = host.Upload(ctx, dir+"/f", blocked, nil)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
		holdsOnly(t, host, dir)
	})
}

func TestDownloadErrors(t *testing.T) {
	onFiles(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		output(t, host, `cd "$1"; mkdir dir; printf 0123456789 >file; mkfifo fifo; ln -s nowhere dangling; ln -s file link; ln -s loop loop`, dir)
		full := errors.New("disk full")
		for _, c := range []struct {
			src  string
			dst  io.Writer
			opts *transport.DownloadOptions
			is   error
			text string
		}{
			{dir + "/none", io.Discard, nil, fs.ErrNotExist, ""},
			{dir + "/no/such", io.Discard, nil, fs.ErrNotExist, ""},
			{dir + "/dangling", io.Discard, nil, fs.ErrNotExist, ""},
			{dir + "/dir", io.Discard, nil, syscall.EISDIR, "is a directory"},
			{dir + "/fifo", io.Discard, nil, fs.ErrInvalid, "only regular files"},
			{"/dev/zero", io.Discard, nil, fs.ErrInvalid, "only regular files"},
			{dir + "/file", failingWriter{full}, nil, full, "writing what was received: disk full"},
			{dir + "/file", shortWriter{}, nil, io.ErrShortWrite, ""},
			{dir + "/file", io.Discard, &transport.DownloadOptions{Limit: 9}, transport.ErrLimit, ""},
			{dir + "/file", io.Discard, &transport.DownloadOptions{Offset: 11}, fs.ErrInvalid, "the file has 10 bytes"},
			{dir + "/file", io.Discard, &transport.DownloadOptions{Offset: -1}, nil, "Offset is negative"},
			{dir + "/file", io.Discard, &transport.DownloadOptions{Limit: -1}, nil, "Limit is negative"},
			{dir + "/file", nil, nil, nil, "dst) is nil"},
			{"file", io.Discard, nil, nil, "is not absolute"},
		} {
			err := host.Download(soon(t), c.src, c.dst, c.opts)
			var p *fs.PathError
			if assert.ErrorAs(t, err, &p) {
				assert.Equal(t, "download", p.Op)
				assert.Equal(t, c.src, p.Path)
			}
			if c.is != nil {
				assert.ErrorIs(t, err, c.is)
			}
			assert.ErrorContains(t, err, c.text)
		}
		for want, o := range map[string]*transport.DownloadOptions{"0123456789": {Limit: 10}, "789": {Offset: 7, Limit: 3}, "": {Offset: 10}} {
			var got bytes.Buffer
			require.NoError(t, host.Download(soon(t), dir+"/link", &got, o))
			assert.Equal(t, want, got.String())
		}
	})
}

func TestDownloadOfWhatTheKernelMakesUp(t *testing.T) {
	onLXD(t, func(t *testing.T, host *transport.LXD) {
		var got bytes.Buffer
		require.NoError(t, host.Download(soon(t), "/proc/version", &got, nil))
		assert.Contains(t, got.String(), "Linux")
		got.Reset()
		require.NoError(t, host.Download(soon(t), "/sys/kernel/mm/transparent_hugepage/enabled", &got, nil))
		assert.NotEmpty(t, got.String())
		err := host.Download(soon(t), "/proc/version", io.Discard, &transport.DownloadOptions{Limit: 5})
		assert.ErrorIs(t, err, transport.ErrLimit)
	})
}

func TestDownloadIsCancelled(t *testing.T) {
	onFiles(t, func(t *testing.T, host *transport.LXD) {
		dir := scratch(t, host)
		output(t, host, `truncate -s 10000000000 "$1/sparse"`, dir)
		ctx, cancel := context.WithCancel(soon(t))
		err := host.Download(ctx, dir+"/sparse", io.Discard, &transport.DownloadOptions{Progress: func(n int64) {
			if n > 10<<20 {
				cancel()
			}
		}})
		assert.ErrorIs(t, err, context.Canceled)
	})
}
