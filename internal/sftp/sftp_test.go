package sftp

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	pkgsftp "github.com/pkg/sftp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// real connects to github.com/pkg/sftp's server, which LXD uses.
func real(t *testing.T) *Client {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("the server takes Windows paths there")
	}
	ours, theirs := net.Pipe()
	s, err := pkgsftp.NewServer(theirs)
	require.NoError(t, err)
	done := make(chan struct{})
	go func() { defer close(done); s.Serve() }()
	c, err := New(t.Context(), ours)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close(); theirs.Close(); <-done })
	return c
}

// pieces is a Source.
type pieces struct {
	rest []byte
	size int
	out  int // handed out and not given back
	most int
}

func (p *pieces) Next(context.Context) ([]byte, error) {
	n := min(p.size, len(p.rest))
	b := p.rest[:n]
	p.rest = p.rest[n:]
	p.out++
	p.most = max(p.most, p.out)
	if len(p.rest) == 0 {
		return b, io.EOF
	}
	return b, nil
}

func (p *pieces) Free([]byte) { p.out-- }

func TestWriteAndRead(t *testing.T) {
	t.Parallel()
	c, ctx, dir := real(t), t.Context(), t.TempDir()
	for _, n := range []int{0, 1, 32 << 10, WriteSize, 3*WriteSize + 5, 9 << 20} {
		data := make([]byte, n)
		rand.Read(data)
		name := filepath.Join(dir, "f")
		f, err := c.Open(ctx, name, Write|Create|Excl, 0o600)
		require.NoError(t, err)
		src, told := &pieces{rest: data, size: WriteSize}, int64(-1)
		sent, err := f.WriteFrom(ctx, src, func(n int64) { told = n })
		require.NoError(t, err)
		assert.EqualValues(t, n, sent)
		if n > 0 {
			assert.EqualValues(t, n, told)
		}
		assert.LessOrEqual(t, src.most, WritesAhead)
		a, err := f.Stat(ctx)
		require.NoError(t, err)
		assert.EqualValues(t, n, a.Size)
		assert.EqualValues(t, TypeRegular, a.Mode&TypeMask)
		require.NoError(t, f.Close(ctx))
		got, err := os.ReadFile(name)
		require.NoError(t, err)
		assert.True(t, bytes.Equal(data, got))

		f, err = c.Open(ctx, name, Read, 0)
		require.NoError(t, err)
		for _, part := range [][2]int64{{0, int64(n)}, {0, 1 << 60}, {int64(n) / 3, int64(n)}, {int64(n), 1 << 60}, {int64(n) + 5, 1 << 60}} {
			var out bytes.Buffer
			sent, err := f.ReadTo(ctx, part[0], part[1], func(b []byte) error { out.Write(b); return nil })
			require.NoError(t, err)
			want := data[min(part[0], int64(n)):]
			assert.EqualValues(t, len(want), sent)
			assert.True(t, bytes.Equal(want, out.Bytes()))
		}
		require.NoError(t, f.Close(ctx))
		require.NoError(t, c.Remove(ctx, name))
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	c, ctx, dir := real(t), t.Context(), t.TempDir()
	_, err := c.Open(ctx, dir+"/no/such", Read, 0)
	assert.ErrorIs(t, err, fs.ErrNotExist)
	_, err = c.Lstat(ctx, dir+"/none")
	assert.ErrorIs(t, err, fs.ErrNotExist)
	require.NoError(t, c.Mkdir(ctx, dir+"/d", 0o755))
	assert.ErrorIs(t, c.Mkdir(ctx, dir+"/d", 0o755), fs.ErrExist)
	_, err = c.Open(ctx, dir+"/d", Write|Create, 0o600)
	assert.ErrorIs(t, err, syscall.EISDIR)
	_, err = c.Stat(ctx, dir+"/d/../d/x/"+string(bytes.Repeat([]byte("x"), 300)))
	assert.Error(t, err)
	require.NoError(t, c.Setstat(ctx, dir+"/d", Attrs{Has: HasMode, Mode: 0o700}))
	a, err := c.Stat(ctx, dir+"/d")
	require.NoError(t, err)
	assert.EqualValues(t, TypeDirectory|0o700, a.Mode)
	require.NoError(t, os.WriteFile(dir+"/a", []byte("a"), 0o600))
	require.NoError(t, os.WriteFile(dir+"/b", []byte("b"), 0o600))
	require.NoError(t, c.Rename(ctx, dir+"/a", dir+"/b"))
	got, _ := os.ReadFile(dir + "/b")
	assert.Equal(t, "a", string(got))
}

func TestStatusTexts(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]error{
		"open /x: is a directory":                             syscall.EISDIR,
		"write /x: no space left on device":                   syscall.ENOSPC,
		`sftp: "chown /x: invalid argument" (SSH_FX_FAILURE)`: nil,
		`sftp: "mkdir /x: file exists"`:                       fs.ErrExist,
		"something else":                                      nil,
	} {
		err := error(&StatusError{Code: 4, Text: text})
		if want == nil {
			assert.Nil(t, errors.Unwrap(err))
			assert.Contains(t, err.Error(), "SFTP status 4")
		} else {
			assert.ErrorIs(t, err, want)
		}
	}
}

// hostile runs a peer that is given by what it answers to the n-th request.
func hostile(t *testing.T, answer func(n int, kind byte, id uint32) []byte) *Client {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		if _, _, err := readPacket(theirs); err != nil {
			return
		}
		theirs.Write([]byte{0, 0, 0, 5, typeVersion, 0, 0, 0, 3})
		for n := 0; ; n++ {
			kind, body, err := readPacket(theirs)
			if err != nil {
				return
			}
			if b := answer(n, kind, binary.BigEndian.Uint32(body)); b != nil {
				if _, err := theirs.Write(b); err != nil {
					return
				}
			}
		}
	}()
	c, err := New(t.Context(), ours)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close(); <-done })
	return c
}

func packet(kind byte, id uint32, body ...byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(5+len(body)))
	return append(binary.BigEndian.AppendUint32(append(b, kind), id), body...)
}

func TestHostileAnswers(t *testing.T) {
	t.Parallel()
	handle := []byte{0, 0, 0, 1, 'h'}
	data := func(claim uint32, n int) []byte {
		return append(binary.BigEndian.AppendUint32(nil, claim), make([]byte, n)...)
	}
	for name, second := range map[string]func(id uint32) []byte{
		"more data than asked":              func(id uint32) []byte { return packet(typeData, id, data(101, 101)...) },
		"negative length":                   func(id uint32) []byte { return packet(typeData, id, data(0xffffffff, 10)...) },
		"length beyond the packet":          func(id uint32) []byte { return packet(typeData, id, data(50, 10)...) },
		"length short of the packet":        func(id uint32) []byte { return packet(typeData, id, data(5, 10)...) },
		"no length":                         func(id uint32) []byte { return packet(typeData, id) },
		"no data":                           func(id uint32) []byte { return packet(typeData, id, data(0, 0)...) },
		"wrong id":                          func(id uint32) []byte { return packet(typeData, id+7, data(1, 1)...) },
		"wrong type":                        func(id uint32) []byte { return packet(typeHandle, id, handle...) },
		"success":                           func(id uint32) []byte { return packet(typeStatus, id, 0, 0, 0, 0) },
		"status without code":               func(id uint32) []byte { return packet(typeStatus, id) },
		"huge packet":                       func(uint32) []byte { return []byte{0xff, 0xff, 0xff, 0xff, typeData, 0, 0, 0, 0} },
		"packet without an id, and no more": func(uint32) []byte { return []byte{0, 0, 0, 1, typeData} },
		"empty packet, and no more":         func(uint32) []byte { return []byte{0, 0, 0, 0} },
		"tiny packet":                       func(uint32) []byte { return []byte{0, 0, 0, 1, typeData, 0, 0, 0, 0} },
		"zeros":                             func(uint32) []byte { return make([]byte, 64) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := hostile(t, func(n int, kind byte, id uint32) []byte {
				if n == 0 {
					return packet(typeHandle, id, handle...)
				}
				return second(id)
			})
			f, err := c.Open(t.Context(), "/x", Read, 0)
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			n, err := f.ReadTo(ctx, 0, 100, func([]byte) error { return nil })
			assert.Error(t, err)
			assert.NotErrorIs(t, err, context.DeadlineExceeded)
			assert.Zero(t, n)
		})
	}
}

func TestHostileHandlesAndAttributes(t *testing.T) {
	t.Parallel()
	for _, body := range [][]byte{{}, {0, 0, 0, 9, 'h'}, append([]byte{0, 0, 1, 1}, make([]byte, 257)...)} {
		c := hostile(t, func(_ int, _ byte, id uint32) []byte { return packet(typeHandle, id, body...) })
		_, err := c.Open(t.Context(), "/x", Read, 0)
		assert.ErrorIs(t, err, ErrProtocol)
	}
	for _, body := range [][]byte{{}, {0, 0, 0, 1}, {0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, {0x80, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff}} {
		c := hostile(t, func(_ int, _ byte, id uint32) []byte { return packet(typeAttrs, id, body...) })
		_, err := c.Stat(t.Context(), "/x")
		assert.ErrorIs(t, err, ErrProtocol)
	}
}

func TestDirectories(t *testing.T) {
	t.Parallel()
	c, ctx, dir := real(t), t.Context(), t.TempDir()
	want := make(map[string]bool)
	for i := range 300 {
		name := "f" + string(bytes.Repeat([]byte("x"), i%200)) + string(rune('a'+i/200))
		want[name] = true
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), make([]byte, i), 0o600))
	}
	require.NoError(t, c.AskSymlink("f nowhere/..", dir+"/link").Err(ctx))
	want["link"] = true
	target, err := c.AskReadlink(dir + "/link").Target(ctx)
	require.NoError(t, err)
	assert.Equal(t, "f nowhere/..", target)
	target, err = os.Readlink(dir + "/link")
	require.NoError(t, err)
	assert.Equal(t, "f nowhere/..", target)

	d, err := c.Opendir(ctx, dir)
	require.NoError(t, err)
	got := make(map[string]bool)
	for {
		entries, err := d.AskRead().Entries(ctx)
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		for _, e := range entries {
			got[e.Name] = true
			if e.Name == "link" {
				assert.EqualValues(t, TypeLink, e.Mode&TypeMask)
			} else {
				assert.EqualValues(t, TypeRegular|0o600, e.Mode)
			}
		}
	}
	require.NoError(t, d.AskClose().Err(ctx))
	assert.Equal(t, want, got)
	_, err = c.Opendir(ctx, dir+"/none")
	assert.ErrorIs(t, err, fs.ErrNotExist)
	_, err = c.Opendir(ctx, dir+"/link")
	assert.Error(t, err)
	_, err = c.AskReadlink(dir).Target(ctx)
	assert.Error(t, err)
}

func TestHostileListings(t *testing.T) {
	t.Parallel()
	one := []byte{0, 0, 0, 1, 'a', 0, 0, 0, 0, 0, 0, 0, 0}
	count := func(n uint32, entries ...byte) []byte {
		return append(binary.BigEndian.AppendUint32(nil, n), entries...)
	}
	for name, body := range map[string][]byte{
		"no count":         {},
		"no entries":       count(0),
		"fewer than said":  count(2, one...),
		"billions":         count(0xffffffff, one...),
		"a long name":      count(1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0),
		"many attributes":  count(1, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff),
		"no attributes":    count(1, 0, 0, 0, 4, 'a', 'b', 'c', 'd', 0, 0, 0, 0),
		"breaks off early": count(1, 0, 0, 0, 1),
	} {
		c := hostile(t, func(n int, _ byte, id uint32) []byte {
			if n == 0 {
				return packet(typeHandle, id, 0, 0, 0, 1, 'h')
			}
			return packet(typeName, id, body...)
		})
		d, err := c.Opendir(t.Context(), "/x")
		require.NoError(t, err)
		_, err = d.AskRead().Entries(t.Context())
		assert.ErrorIs(t, err, ErrProtocol, name)
	}
	for _, body := range [][]byte{{}, count(0), count(2, one...), count(1, 0, 0, 0, 9, 'a')} {
		c := hostile(t, func(_ int, _ byte, id uint32) []byte { return packet(typeName, id, body...) })
		_, err := c.AskReadlink("/x").Target(t.Context())
		assert.ErrorIs(t, err, ErrProtocol)
	}
	// Nothing but data and listings may be long.
	c := hostile(t, func(_ int, _ byte, id uint32) []byte { return packet(typeStatus, id, make([]byte, maxAnswer+1)...) })
	assert.ErrorIs(t, c.Remove(t.Context(), "/x"), ErrProtocol)
}

// A server that does not read keeps nobody waiting longer than he wants.
func TestServerThatDoesNotRead(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	go func() {
		readPacket(theirs)
		theirs.Write([]byte{0, 0, 0, 5, typeVersion, 0, 0, 0, 3})
	}()
	c, err := New(t.Context(), ours)
	require.NoError(t, err)
	defer theirs.Close()
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		assert.ErrorIs(t, c.Remove(ctx, "/x"), context.DeadlineExceeded)
		cancel()
	}
	assert.NoError(t, c.Err())
	c.Close()
	assert.Error(t, c.Err())
}

// A server that answers every read with one byte makes it slow, not large.
func TestOneByteAtATime(t *testing.T) {
	t.Parallel()
	asked, answered := 0, 0
	c := hostile(t, func(n int, kind byte, id uint32) []byte {
		if n == 0 {
			return packet(typeHandle, id, 0, 0, 0, 1, 'h')
		}
		answered++
		return packet(typeData, id, 0, 0, 0, 1, 'x')
	})
	f, err := c.Open(t.Context(), "/x", Read, 0)
	require.NoError(t, err)
	n, err := f.ReadTo(t.Context(), 0, 5000, func(b []byte) error { asked += len(b); return nil })
	require.NoError(t, err)
	assert.EqualValues(t, 5000, n)
	assert.Equal(t, 5000, asked)
}

func TestNoAnswer(t *testing.T) {
	t.Parallel()
	c := hostile(t, func(int, byte, uint32) []byte { return nil })
	ctx, cancel := context.WithCancelCause(t.Context())
	mine := errors.New("enough")
	cancel(mine)
	_, err := c.Open(ctx, "/x", Read, 0)
	assert.ErrorIs(t, err, mine)

	ours, theirs := net.Pipe()
	defer theirs.Close()
	_, err = New(ctx, ours)
	assert.ErrorIs(t, err, mine)
}

func TestConnectionEnds(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	go func() {
		readPacket(theirs)
		theirs.Write([]byte{0, 0, 0, 5, typeVersion, 0, 0, 0, 3})
		readPacket(theirs)
		theirs.Close()
	}()
	c, err := New(t.Context(), ours)
	require.NoError(t, err)
	defer c.Close()
	_, err = c.Stat(t.Context(), "/x")
	assert.ErrorIs(t, err, io.ErrUnexpectedEOF)
	_, err = c.Stat(t.Context(), "/x")
	assert.ErrorContains(t, err, "the SFTP connection has ended")
}

// conn is a connection whose other side has sent all that it will.
type conn struct {
	io.Reader
	io.Writer
}

func (conn) Close() error { return nil }

// FuzzAnswers feeds the client whatever the other side may send.
func FuzzAnswers(f *testing.F) {
	hello := []byte{0, 0, 0, 5, typeVersion, 0, 0, 0, 3}
	for _, kind := range []byte{typeStatus, typeHandle, typeData, typeAttrs, typeName} {
		f.Add(append(bytes.Clone(hello), packet(kind, 0, 0, 0, 0, 1, 'h')...))
	}
	f.Add(append(append(bytes.Clone(hello), packet(typeHandle, 0, 0, 0, 0, 1, 'h')...), packet(typeData, 1, 0, 0, 0, 1, 'x')...))
	listing := append(append(bytes.Clone(hello), packet(typeStatus, 0, 0, 0, 0, 4)...), packet(typeStatus, 1, 0, 0, 0, 2)...)
	listing = append(listing, packet(typeHandle, 2, 0, 0, 0, 1, 'h')...)
	f.Add(append(listing, packet(typeName, 3, 0, 0, 0, 1, 0, 0, 0, 1, 'a', 0, 0, 0, 1, 'b', 0, 0, 0, 4, 0, 0, 0o100, 0)...))
	f.Fuzz(func(t *testing.T, sent []byte) {
		c, err := New(t.Context(), conn{bytes.NewReader(sent), io.Discard})
		if err != nil {
			return
		}
		defer c.Close()
		ctx := t.Context()
		if f, err := c.Open(ctx, "/x", Read, 0); err == nil {
			n, _ := f.ReadTo(ctx, 0, 1<<20, func(b []byte) error { return nil })
			if n > int64(len(sent)) {
				t.Errorf("%d bytes out of %d", n, len(sent))
			}
			f.WriteFrom(ctx, &pieces{rest: make([]byte, 10), size: 10}, func(int64) {})
		}
		c.Lstat(ctx, "/x")
		if d, err := c.Opendir(ctx, "/x"); err == nil {
			if entries, err := d.AskRead().Entries(ctx); err == nil && (len(entries) == 0 || len(entries)*12 > len(sent)) {
				t.Errorf("%d entries out of %d bytes", len(entries), len(sent))
			}
		}
		c.AskReadlink("/x").Target(ctx)
	})
}
