package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"strings"
	"time"

	"github.com/lxdtransport/transport/internal/sftp"
)

// A tree down over SFTP. The listings of directories and the contents of small files are asked for ahead; everything is put into the sink
// in the order in which it was listed.

const (
	// fetchFile is the most bytes of a file that is fetched into memory.
	fetchFile = 128 << 10
	// fetchSize is what is asked for at once: what LXD's server gives. One that gives less is asked in another way.
	fetchSize = 32 << 10
	// listAhead is how many directories are opened before they are needed.
	listAhead = 8
	// maxKept bounds the memory for entries that were listed and not worked on yet, on all levels. Above its half no more are read
	// ahead, so that only a host that means ill comes to it.
	maxKept = 16 << 20
	// maxListing is what an answer that lists entries may have. One that was asked for and is not needed yet counts like what was kept.
	maxListing = 257 << 10
)

// sftpDownloader fetches a tree for a sink.
type sftpDownloader struct {
	ctx    context.Context
	s      *session
	sink   *sink
	src    string
	levels []*sftpLevel // from src to the directory that is worked on
	kept   int          // bytes of what is in levels
	jobs   []*sftpFetch // oldest first
	bytes  int          // that they are to bring
}

// sftpLevel is a directory that is being listed.
type sftpLevel struct {
	entry
	open    *sftp.Call   // not answered yet
	dir     *sftp.Dir    // nil: listed to its end
	reads   []*sftp.Call // of its entries, under way
	entries []sftp.Entry // to be worked on
	dirs    []*sftpLevel // in it: those among the entries that have been worked on
}

// sftpFetch is an entry on its way to the sink.
type sftpFetch struct {
	entry
	path  string
	open  *sftp.Call // of a small file: it is not open yet
	reads []*sftp.Call
	buf   []byte
	link  *sftp.Call // its answer is a link's target
}

func (tr *tree) downloadSFTP(ctx context.Context, ses *session, src string, s *sink) error {
	if src = strings.TrimRight(src, "/"); src == "" {
		src = "/."
	}
	d := &sftpDownloader{ctx: ctx, s: ses, sink: s, src: src}
	d.levels = []*sftpLevel{{open: ses.AskOpendir(src)}}
	for len(d.levels) > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := d.step(d.levels[len(d.levels)-1]); err != nil {
			return err
		}
	}
	return d.wait(0)
}

func (d *sftpDownloader) path(name string) string { return d.src + "/" + name }

// step does the next thing in a directory: first the entries that have been listed, then the directories among them, then the next entries.
func (d *sftpDownloader) step(l *sftpLevel) error {
	switch {
	case len(l.entries) > 0:
		e := l.entries[0]
		l.entries[0] = sftp.Entry{}
		if l.entries = l.entries[1:]; len(l.entries) == 0 {
			l.entries = nil // no memory for them, while what is below is worked on
		}
		d.kept -= size(e)
		return d.entry(l, e)
	case len(l.dirs) > 0:
		for _, next := range l.dirs[:min(len(l.dirs), listAhead)] {
			if next.open == nil {
				next.open = d.s.AskOpendir(d.path(next.name))
			}
		}
		next := l.dirs[0]
		l.dirs[0] = nil
		l.dirs = l.dirs[1:]
		d.kept -= len(next.name)
		d.levels = append(d.levels, next)
		return d.add(&sftpFetch{entry: next.entry})
	case l.open != nil || l.dir != nil:
		if err := d.list(l); err != nil {
			if l.name == "" {
				return err // it is about the tree itself
			}
			return fault("list", l.name, err)
		}
		return nil
	}
	d.levels = d.levels[:len(d.levels)-1]
	return nil
}

// size is about what an entry takes in memory.
func size(e sftp.Entry) int { return len(e.Name) + 64 }

// list reads the next entries of a directory: all, if they are not too many, so that the host need not keep it open while they are worked on.
func (d *sftpDownloader) list(l *sftpLevel) (err error) {
	if l.open != nil {
		if l.dir, err = l.open.Dir(d.ctx); err != nil {
			return err
		}
		l.open = nil
	}
	for l.dir != nil && (len(l.entries) == 0 || len(l.entries) < fewEntries && d.kept < maxKept/2) {
		for len(l.reads) == 0 || len(l.reads) < 2 && d.kept < maxKept/2 { // most have one answer, and then the end
			l.reads = append(l.reads, l.dir.AskRead())
			d.kept += maxListing
		}
		entries, err := l.reads[0].Entries(d.ctx)
		l.reads[0] = nil // which has the whole answer
		l.reads = l.reads[1:]
		d.kept -= maxListing
		if err == io.EOF {
			l.dir.AskClose()
			d.kept -= maxListing * len(l.reads)
			l.dir, l.reads = nil, nil
			return nil
		}
		if err != nil {
			return err
		}
		for _, e := range entries {
			d.kept += size(e)
		}
		if d.kept > maxKept {
			return errors.New("the directories on the way to it and it have too many entries, or too long names, to be kept in mind")
		}
		l.entries = append(l.entries, entries...)
	}
	return nil
}

// entry asks whether an entry is taken, and sends for it.
func (d *sftpDownloader) entry(l *sftpLevel, listed sftp.Entry) error {
	name := listed.Name
	if l.name != "" {
		name = l.name + "/" + listed.Name
	}
	e := entry{name: name, mode: fs.FileMode(listed.Mode & 0o777)}
	if listed.Has&sftp.HasTimes != 0 {
		e.modified = time.Unix(int64(listed.MTime), 0)
	}
	kind := listed.Mode & sftp.TypeMask
	if listed.Has&sftp.HasMode == 0 {
		kind = 0
	}
	if strings.Contains(listed.Name, "/") {
		return d.sink.refuse(name, errors.New("its name has a slash"))
	}
	switch kind {
	case sftp.TypeRegular:
		if listed.Has&sftp.HasSize == 0 || listed.Size > math.MaxInt64-1 {
			return d.sink.refuse(name, errors.New("the host does not say how many bytes it has"))
		}
		e.size = int64(listed.Size)
	case sftp.TypeDirectory:
		e.mode |= fs.ModeDir
	case sftp.TypeLink:
		e.mode = fs.ModeSymlink
	default:
		return d.sink.refuse(name, fmt.Errorf("it is %s", kindOfSFTP(kind)))
	}
	if ok, err := d.sink.take(&e); err != nil || !ok {
		return err
	}
	f := &sftpFetch{entry: e, path: d.path(name)}
	switch kind {
	case sftp.TypeDirectory:
		l.dirs = append(l.dirs, &sftpLevel{entry: e})
		if d.kept += len(name); d.kept > maxKept {
			return errors.New("too many directories are in one another")
		}
		return nil
	case sftp.TypeLink:
		if d.sink.opts.Symlinks != KeepSymlinks {
			return d.sink.putLink(e)
		}
		f.link = d.s.AskReadlink(f.path)
	default:
		if err := d.sink.checkSize(name, e.size); err != nil {
			return err
		}
		if e.size > 0 && e.size <= fetchFile {
			f.open = d.s.AskOpen(f.path, sftp.Read, 0)
		}
	}
	return d.add(f)
}

func kindOfSFTP(kind uint32) string {
	switch kind {
	case sftp.TypeFIFO:
		return "a FIFO"
	case sftp.TypeSocket:
		return "a socket"
	case sftp.TypeChar, sftp.TypeBlock:
		return "a device"
	}
	return "of an unknown type"
}

// add puts an entry behind those that are under way.
func (d *sftpDownloader) add(f *sftpFetch) error {
	d.jobs = append(d.jobs, f)
	if f.open != nil {
		d.bytes += int(f.size)
	}
	return d.wait(treeFiles)
}

// wait waits until no more than so many entries are under way, and puts the others into the sink.
func (d *sftpDownloader) wait(most int) error {
	for i, f := range d.jobs {
		if len(d.jobs)-i <= most/2 && d.bytes <= treeBytes/2 {
			break
		}
		if err := d.read(f); err != nil {
			return fault("download", f.name, err)
		}
	}
	for len(d.jobs) > most || d.bytes > treeBytes {
		f := d.jobs[0]
		d.jobs[0] = nil
		d.jobs = d.jobs[1:]
		if err := d.put(f); err != nil {
			return err
		}
	}
	return nil
}

// read waits for a small file to be open, asks for its content, and for one byte more, which must not come.
func (d *sftpDownloader) read(f *sftpFetch) error {
	if f.open == nil {
		return nil
	}
	file, err := f.open.File(d.ctx)
	if err != nil {
		return err
	}
	f.open = nil
	f.buf = make([]byte, f.size+1)
	for at := 0; at < len(f.buf); at += fetchSize {
		f.reads = append(f.reads, file.AskRead(int64(at), f.buf[at:min(at+fetchSize, len(f.buf))]))
	}
	file.AskClose() // behind the reads
	return nil
}

// put hands an entry to the sink.
func (d *sftpDownloader) put(f *sftpFetch) error {
	switch {
	case f.mode.IsDir():
		return d.sink.putDir(f.entry)
	case f.link != nil:
		target, err := f.link.Target(d.ctx)
		if err != nil {
			return fault("download", f.name, err)
		}
		f.target = target
		return d.sink.putLink(f.entry)
	case f.size == 0:
		return d.sink.putFile(f.entry, bytes.NewReader(nil))
	case f.size > fetchFile:
		return d.stream(f)
	}
	d.bytes -= int(f.size)
	if err := d.read(f); err != nil {
		return fault("download", f.name, err)
	}
	got := 0
	for i, call := range f.reads {
		b, err := call.Data(d.ctx)
		if err != nil && err != io.EOF {
			return fault("download", f.name, err)
		}
		if got == i*fetchSize {
			got += len(b)
		}
	}
	if got < int(f.size) {
		// It is shorter, or the server gives less at once. That shows when it is read piece by piece.
		return d.stream(f)
	}
	return d.sink.putFile(f.entry, bytes.NewReader(f.buf[:got]))
}

// stream fetches a file without holding it in memory.
func (d *sftpDownloader) stream(f *sftpFetch) error {
	file, err := d.s.Open(d.ctx, f.path, sftp.Read, 0)
	if err != nil {
		return fault("download", f.name, err)
	}
	defer file.AskClose()
	return d.sink.putFile(f.entry, &sftpContent{ctx: d.ctx, r: file.Reader(0, f.size+1)})
}

// sftpContent is the content of an open file.
type sftpContent struct {
	ctx  context.Context
	r    *sftp.Reader
	rest []byte
}

func (c *sftpContent) Read(p []byte) (n int, err error) {
	if len(c.rest) == 0 {
		if c.rest, err = c.r.Next(c.ctx); err != nil {
			return 0, err
		}
	}
	n = copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}
