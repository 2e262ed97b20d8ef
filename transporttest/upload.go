package transporttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync/atomic"
	"testing/iotest"
	"time"

	"github.com/lxdtransport/transport"
)

// up uploads a text.
func up(ctx context.Context, host transport.Transport, name, text string, opts *transport.UploadOptions) error {
	if err := host.Upload(ctx, name, strings.NewReader(text), opts); err != nil {
		return fmt.Errorf("uploading %s: %w", name, err)
	}
	return nil
}

// mode returns what ls says of a file: its mode, owner and group.
func mode(ctx context.Context, host transport.Transport, dir, name string) (mode, owner string, err error) {
	text, err := output(ctx, host, in(dir, transport.Command{Args: []string{"ls", "-dln", name}}))
	if err != nil {
		return "", "", err
	}
	f := strings.Fields(text)
	if len(f) < 4 {
		return "", "", fmt.Errorf("ls -dln printed %q", text)
	}
	return strings.TrimRight(f[0], ".+@"), f[2] + ":" + f[3], nil // some systems mark further attributes
}

// holds checks the names of all that is in a directory.
func holds(ctx context.Context, host transport.Transport, dir string, names ...string) error {
	got, err := output(ctx, host, in(dir, transport.Command{Args: []string{"ls", "-A"}}))
	if err != nil {
		return err
	}
	return equal("the directory's content", strings.Join(strings.Fields(got), " "), strings.Join(names, " "))
}

var uploadRows = []row{
	{name: "upload/content", why: "every byte of any source of any length, and commands see it",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			for _, n := range []int{0, 1, 4096, 32<<10 - 1, 32 << 10, 32<<10 + 1, 256<<10 + 1, 5 << 20} {
				want := pattern(n)
				if err := host.Upload(ctx, dir+"/f", only(bytes.NewReader(want)), nil); err != nil {
					return fmt.Errorf("%d bytes: %w", n, err)
				}
				if err := prints(ctx, host, string(want), in(dir, transport.Command{Args: []string{"cat", "f"}})); err != nil {
					return fmt.Errorf("%d bytes: %w", n, err)
				}
			}
			return holds(ctx, host, dir, "f")
		}},
	{name: "upload/any-reader", why: "a reader may bring its last bytes with the end, or nothing for once, and may know io.WriterTo",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			want := pattern(100001)
			for what, r := range map[string]io.Reader{
				"the last bytes with the end": iotest.DataErrReader(only(bytes.NewReader(want))),
				"all bytes with the end":      &whole{want},
				"an io.WriterTo":              bytes.NewReader(want),
				"Reads that bring naught":     stuttering(bytes.NewReader(want)),
			} {
				if err := host.Upload(ctx, dir+"/f", r, nil); err != nil {
					return fmt.Errorf("%s: %w", what, err)
				}
				if err := prints(ctx, host, string(want), in(dir, transport.Command{Args: []string{"cat", "f"}})); err != nil {
					return fmt.Errorf("%s: %w", what, err)
				}
			}
			return nil
		}},
	{name: "upload/names", why: "names hold blanks, quotes, line breaks and leading dashes",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			for _, name := range []string{"a b", "-n", "line\nbreak", `'"\`, "ä€", "*", "..x", strings.Repeat("x", 255)} {
				if err := up(ctx, host, dir+"/"+name, name, nil); err != nil {
					return err
				}
				if err := prints(ctx, host, name, in(dir, transport.Command{Args: []string{"cat", "./" + name}})); err != nil {
					return fmt.Errorf("%q: %w", name, err)
				}
			}
			return nil
		}},
	{name: "upload/atomic", why: "who reads the file while it is replaced must not get a part",
		run: uploadAtomic},
	{name: "upload/temp-is-private", why: "a secret must not lie open until its mode is set, and a rename is only atomic within a directory",
		run: uploadPrivate},
	{name: "upload/mode", why: "scripts have to be executable, keys private",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			for _, c := range []struct {
				mode fs.FileMode
				want string
			}{
				{0o600, "-rw-------"}, {0o755, "-rwxr-xr-x"}, {0o666, "-rw-rw-rw-"}, {0o777, "-rwxrwxrwx"}, {0o400, "-r--------"},
			} {
				if err := up(ctx, host, dir+"/f", "x", &transport.UploadOptions{Mode: c.mode}); err != nil {
					return err
				}
				got, _, err := mode(ctx, host, dir, "f")
				if err := errors.Join(err, equal("mode", got, c.want)); err != nil {
					return err
				}
			}
			return nil
		}},
	{name: "upload/mode-by-default", why: "a new file is 0644 whatever the umask is, one that is replaced keeps its mode",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			for _, step := range []struct{ script, want string }{
				{"true", "-rw-r--r--"}, {"chmod 751 f", "-rwxr-x--x"}, {"chmod 666 f", "-rw-rw-rw-"}, {"chmod 775 f", "-rwxrwxr-x"},
			} {
				if err := run(ctx, host, in(dir, sh(step.script))); err != nil {
					return err
				}
				if err := up(ctx, host, dir+"/f", "x", nil); err != nil {
					return err
				}
				got, _, err := mode(ctx, host, dir, "f")
				if err := errors.Join(err, equal("mode", got, step.want)); err != nil {
					return err
				}
			}
			return nil
		}},
	{name: "upload/owner", why: "who is to read a file has to own it, and a replaced one keeps its owner", needs: []Capability{Users},
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			for _, c := range []struct {
				owner *transport.User
				want  string
			}{
				{nil, "0:0"}, {&transport.User{UID: 1234, GID: 5678}, "1234:5678"}, {nil, "1234:5678"}, {&transport.User{}, "0:0"},
			} {
				if err := up(ctx, host, dir+"/f", "x", &transport.UploadOptions{Owner: c.owner}); err != nil {
					return err
				}
				_, got, err := mode(ctx, host, dir, "f")
				if err := errors.Join(err, equal("owner", got, c.want)); err != nil {
					return err
				}
			}
			return nil
		}},
	{name: "upload/time", why: "make compares times",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			stat := func() (t time.Time, err error) {
				err = host.Download(ctx, dir+"/f", io.Discard, &transport.DownloadOptions{Stat: func(i fs.FileInfo) { t = i.ModTime() }})
				return t, err
			}
			want := time.Unix(1234567890, 0)
			if err := up(ctx, host, dir+"/f", "x", &transport.UploadOptions{ModTime: want}); err != nil {
				return err
			}
			got, err := stat()
			if err != nil || !got.Equal(want) {
				return fmt.Errorf("the time is %v, not %v (%w)", got, want, err)
			}
			if err := up(ctx, host, dir+"/f", "x", nil); err != nil {
				return err
			}
			// The host's clock is not ours.
			if got, err = stat(); err != nil || got.Sub(want) < 24*time.Hour {
				return fmt.Errorf("without ModTime the time is %v, not that of the upload (%w)", got, err)
			}
			return nil
		}},
	{name: "upload/mkdirall", why: "a tree is uploaded file by file",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			for _, text := range []string{"new", "newer"} {
				if err := up(ctx, host, dir+"/a/b/c/f", text, &transport.UploadOptions{MkdirAll: true}); err != nil {
					return err
				}
				if err := prints(ctx, host, text, in(dir, transport.Command{Args: []string{"cat", "a/b/c/f"}})); err != nil {
					return err
				}
			}
			if err := run(ctx, host, in(dir, sh("mkdir kept; chmod 751 kept"))); err != nil {
				return err
			}
			for _, name := range []string{"/kept/f", "/kept/new/f"} {
				if err := up(ctx, host, dir+name, "x", &transport.UploadOptions{MkdirAll: true}); err != nil {
					return err
				}
			}
			for d, want := range map[string]string{
				"a": "drwxr-xr-x", "a/b": "drwxr-xr-x", "a/b/c": "drwxr-xr-x", "kept": "drwxr-x--x", "kept/new": "drwxr-xr-x",
			} {
				got, _, err := mode(ctx, host, dir, d)
				if err := errors.Join(err, equal("mode of "+d, got, want)); err != nil {
					return err
				}
			}
			return nil
		}},
	{name: "upload/mkdirall-owner", why: "the directories belong to whom the file belongs", needs: []Capability{Users},
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			if err := run(ctx, host, in(dir, sh("mkdir kept"))); err != nil {
				return err
			}
			opts := &transport.UploadOptions{MkdirAll: true, Owner: &transport.User{UID: 1234, GID: 5678}}
			for _, name := range []string{"/a/b/f", "/kept/f", "/kept/new/f"} {
				if err := up(ctx, host, dir+name, "x", opts); err != nil {
					return err
				}
			}
			for name, want := range map[string]string{
				"a": "1234:5678", "a/b": "1234:5678", "a/b/f": "1234:5678", "kept": "0:0", "kept/new": "1234:5678", "kept/f": "1234:5678",
			} {
				_, got, err := mode(ctx, host, dir, name)
				if err := errors.Join(err, equal("owner of "+name, got, want)); err != nil {
					return err
				}
			}
			return nil
		}},
	{name: "upload/leaves-other-files", why: "a temporary name that can be guessed belongs to somebody else already",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			const names = "#f# .#f .f .f.new .f.part .f.swp .f.temp .f.tmp .f~ .tmp .tmp-f .tmp.f .upload f.bak f.new f.old f.part f.temp f.tmp f.upload f~ tmp tmp-f tmp.f"
			if err := run(ctx, host, in(dir, sh(`for n; do printf mine >"$n"; done`, strings.Fields(names)...))); err != nil {
				return err
			}
			broken := errors.New("broken source")
			if err := is(host.Upload(ctx, dir+"/f", failing(broken), nil), broken); err != nil {
				return err
			}
			for range 2 {
				if err := up(ctx, host, dir+"/f", "x", nil); err != nil {
					return err
				}
			}
			return prints(ctx, host, "x"+strings.Repeat("mine", len(strings.Fields(names))),
				in(dir, transport.Command{Args: append([]string{"cat", "f"}, strings.Fields(names)...)}))
		}},
	{name: "upload/replaces-a-link", why: "who can make a link in the host must not choose what is overwritten",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			if err := run(ctx, host, in(dir, sh(`printf old >target; ln -s target link`))); err != nil {
				return err
			}
			if err := up(ctx, host, dir+"/link", "new", nil); err != nil {
				return err
			}
			return prints(ctx, host, "oldnew", in(dir, sh(`test ! -h link && cat target link`)))
		}},
	{name: "upload/constant-memory", why: "a source may be larger than memory: what is read has to be sent",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			const size, most = 64 << 20, 16 << 20
			var read, sent, ahead atomic.Int64
			src := readerFunc(func(p []byte) (int, error) {
				left := size - read.Load()
				if left == 0 {
					return 0, io.EOF
				}
				n := min(int64(len(p)), left)
				clear(p[:n])
				ahead.Store(max(ahead.Load(), read.Add(n)-sent.Load()))
				return int(n), nil
			})
			opts := &transport.UploadOptions{Progress: func(n int64) { sent.Store(n) }}
			if err := host.Upload(ctx, dir+"/f", src, opts); err != nil {
				return err
			}
			if n := ahead.Load(); n > most {
				return fmt.Errorf("%d bytes were read that had not been sent", n)
			}
			return prints(ctx, host, fmt.Sprint(size), in(dir, sh(`wc -c <f | tr -d ' \n'`)))
		}},
	{name: "upload/progress", why: "who shows a bar divides by the size",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			var busy atomic.Bool
			last, bad := int64(0), error(nil)
			opts := &transport.UploadOptions{Progress: func(n int64) {
				if !busy.CompareAndSwap(false, true) || n < last {
					bad = fmt.Errorf("%d came after %d, or at the same time", n, last)
				}
				last = n
				busy.Store(false)
			}}
			const size = 3<<20 + 1
			if err := host.Upload(ctx, dir+"/f", bytes.NewReader(pattern(size)), opts); err != nil {
				return err
			}
			if last != size {
				return fmt.Errorf("the last was %d, not %d", last, size)
			}
			return bad
		}},
}

// whole is a reader that brings everything at once, with the end.
type whole struct{ rest []byte }

func (w *whole) Read(p []byte) (n int, err error) {
	n = copy(p, w.rest)
	if w.rest = w.rest[n:]; len(w.rest) == 0 {
		err = io.EOF
	}
	return n, err
}

// uploadAtomic replaces a file again and again while a command in the host looks at it.
func uploadAtomic(ctx context.Context, host transport.Transport) error {
	dir, err := scratch(ctx, host)
	if err != nil {
		return err
	}
	const size = 1 << 20
	file := bytes.Repeat([]byte("x"), size)
	if err := host.Upload(ctx, dir+"/f", bytes.NewReader(file), nil); err != nil {
		return err
	}
	out := newScreen()
	cmd := in(dir, sh(`echo up; while [ ! -e stop ]; do n=$(wc -c <f) || exit 1; [ $n = $1 ] || { echo "saw $n bytes"; exit 1; }; done`, fmt.Sprint(size)))
	cmd.Stdout = out
	seen := execute(ctx, host, cmd)
	if err := out.shows(ctx, "up\n"); err != nil {
		return err
	}
	for range 5 {
		// Half of it is there for long enough to be seen: until another command has run.
		half := readerFunc(func([]byte) (int, error) {
			if err := host.Exec(ctx, in(dir, sh("wc -c <f; wc -c <f"))); err != nil {
				return 0, err
			}
			return 0, io.EOF
		})
		src := io.MultiReader(bytes.NewReader(file[:size/2]), bytes.NewReader(file[size/2:]), half)
		if err := host.Upload(ctx, dir+"/f", src, nil); err != nil {
			return err
		}
	}
	if err := run(ctx, host, in(dir, sh("echo >stop"))); err != nil {
		return err
	}
	result, err := returns(ctx, seen)
	if err != nil || result != nil {
		return fmt.Errorf("another process in the host did not always see the old or the new file: %s (%w)", brief(out.String()), errors.Join(err, result))
	}
	return nil
}

// uploadPrivate looks into the directory while the source is at its middle.
func uploadPrivate(ctx context.Context, host transport.Transport) error {
	dir, err := scratch(ctx, host)
	if err != nil {
		return err
	}
	var listing string
	var lsErr error
	middle := readerFunc(func([]byte) (int, error) {
		listing, lsErr = output(ctx, host, in(dir, transport.Command{Args: []string{"ls", "-lnA"}}))
		return 0, io.EOF
	})
	src := io.MultiReader(bytes.NewReader(pattern(1<<20)), middle)
	if err := host.Upload(ctx, dir+"/f", src, &transport.UploadOptions{Mode: 0o644}); err != nil {
		return err
	}
	if lsErr != nil {
		return lsErr
	}
	found := 0
	for _, line := range strings.Split(listing, "\n") {
		f := strings.Fields(line)
		if len(f) < 9 {
			continue
		}
		found++
		if !strings.HasPrefix(f[0], "-rw-------") || f[8] == "f" {
			return fmt.Errorf("while it is uploaded, the directory has %q", line)
		}
	}
	if found != 1 {
		return fmt.Errorf("while it is uploaded, the directory has %d files, not one temporary: %s", found, brief(listing))
	}
	return holds(ctx, host, dir, "f")
}
