package transport

import (
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

// A tree up over SFTP: for hosts without tar or shell, and for instances that do not run. Nothing waits for an answer that does not have to.

const (
	// treeFiles is how many files are under way at once.
	treeFiles = 96
	// treeBytes bounds what is held in memory of them.
	treeBytes = 8 << 20
	// smallFile is the most bytes of a file that is sent in one piece.
	smallFile = sftp.WriteSize
)

// sftpUploader is an [uploader] that sends requests ahead of their answers. Everything is waited for in the order in which it was sent, which is that of the
// answers of LXD's server.
type sftpUploader struct {
	ctx   context.Context
	tree  *tree
	s     *session
	dst   string
	owner *User
	dirs  []*sftpDir // from dst to where the walk is
	jobs  []*sftpJob // oldest first
	bytes int        // in jobs
	err   error      // of one of them
	known int        // bytes of what is known of dirs
}

// sftpDir is a directory that is filled.
type sftpDir struct {
	entry
	fresh bool     // it was made just now: there is nothing in it that has to be replaced
	jobs  int      // of entries in it that are not done; a directory is when its mode is set
	left  bool     // there will not be more
	up    *sftpDir // nil: dst itself

	known     map[string]sftp.Attrs // what was in it
	knownSize int                   // bytes of that
}

// sftpJob is an entry whose requests have been sent, in part at least.
type sftpJob struct {
	entry
	path   string
	dir    *sftpDir // that it is in
	sent   []*sftp.Call
	remove *sftp.Call // of what was in the way, or nothing
	data   []byte     // of a file that is being opened
	open   *sftp.Call // the answer is a file; nil: all has been sent
	link   *sftp.Call // the answer has to be the entry's target
}

// uploadSFTP uploads a tree. It returns errNoSFTP before it has called any of the caller's functions.
func (tr *tree) uploadSFTP(ctx context.Context, s *session, dst string, src fs.FS) error {
	if dst = strings.TrimRight(dst, "/"); dst == "" {
		dst = "/"
	}
	fresh, err := s.mkdirAll(ctx, dst, tr.opts.Owner)
	if err != nil {
		return err
	}
	u := &sftpUploader{ctx: ctx, tree: tr, s: s, dst: strings.TrimRight(dst, "/"), owner: tr.opts.Owner, dirs: []*sftpDir{{fresh: fresh}}}
	if err := u.learn(u.last()); err != nil {
		return err
	}
	walked := make(chan error, 1)
	go func() { // waited for, unless a Read of src's does not return
		err := guarded(func() error {
			if err := tr.walk(ctx, src, u); err != nil {
				return err
			}
			return u.flush()
		})
		if errors.Is(err, errCut) {
			err = u.err
		}
		walked <- err
	}()
	select {
	case err := <-walked:
		return err
	case <-ctx.Done():
		return tr.join(walked)
	}
}

func (u *sftpUploader) path(name string) string { return u.dst + "/" + name }

// last is the directory where the walk is.
func (u *sftpUploader) last() *sftpDir { return u.dirs[len(u.dirs)-1] }

// attributes gives an entry that has arrived its owner, mode and time. The owner goes alone, and first: servers before pkg/sftp 1.13.6 take the
// attributes of a request in another order than they are sent in.
func (u *sftpUploader) attributes(path string, e entry) (calls []*sftp.Call) {
	if u.owner != nil {
		calls = append(calls, u.s.AskSetstat(path, sftp.Attrs{Has: sftp.HasOwner, UID: u.owner.UID, GID: u.owner.GID}))
	}
	return append(calls, u.s.AskSetstat(path, sftp.Attrs{
		Has: sftp.HasMode | sftp.HasTimes, Mode: uint32(e.mode.Perm()), ATime: uint32(time.Now().Unix()), MTime: uploadTime(e),
	}))
}

// uploadTime is an entry's time as SFTP has it.
func uploadTime(e entry) uint32 {
	return uint32(min(max(0, e.modified.Unix()), math.MaxUint32)) // file systems that know no times have the year 1
}

// enter makes a directory. In one that is new, nothing can be in its way, and what is in it can be sent at once.
func (u *sftpUploader) enter(e entry) error {
	d := &sftpDir{entry: e, fresh: true, up: u.last()}
	path := u.path(e.name)
	if !d.up.fresh {
		err := u.s.Mkdir(u.ctx, path, 0o755)
		if errors.Is(err, fs.ErrExist) {
			have, statErr := u.s.Lstat(u.ctx, path)
			switch {
			case statErr != nil:
				return statErr
			case have.Mode&sftp.TypeMask == sftp.TypeDirectory:
				d.fresh, err = false, nil
			case have.Mode&sftp.TypeMask == sftp.TypeLink:
				if err := u.s.Remove(u.ctx, path); err != nil {
					return err
				}
				err = u.s.Mkdir(u.ctx, path, 0o755)
			default:
				err = fmt.Errorf("the tree has a directory here: %w", err)
			}
		}
		if err != nil {
			return err
		}
	}
	j := &sftpJob{entry: e, path: path, dir: d.up}
	if d.up.fresh {
		j.sent = append(j.sent, u.s.AskMkdir(path, 0o755))
	}
	if d.fresh && e.mode&0o055 != 0o055 {
		// Nobody shall see meanwhile what nobody may see in the end.
		j.sent = append(j.sent, u.s.AskSetstat(path, sftp.Attrs{Has: sftp.HasMode, Mode: 0o700}))
	}
	if err := u.learn(d); err != nil {
		return err
	}
	u.dirs = append(u.dirs, d)
	d.up.jobs++ // until d is done
	return u.add(j)
}

// leave has the directory get its mode and time when everything in it is done.
func (u *sftpUploader) leave(entry) error {
	d := u.last()
	u.dirs = u.dirs[:len(u.dirs)-1]
	d.left = true
	u.forget(d)
	u.finish(d)
	return u.wait(treeFiles)
}

// finish sets a directory's mode and time if nothing in it is under way.
func (u *sftpUploader) finish(d *sftpDir) {
	if d.left && d.jobs == 0 {
		path := u.path(d.name)
		u.jobs = append(u.jobs, &sftpJob{entry: d.entry, path: path, dir: d.up, sent: u.attributes(path, d.entry)})
	}
}

// link makes a symbolic link, and looks whether it has become the one that was meant: servers do not agree about which of the two names comes
// first, and some change relative targets. It belongs to whom the server runs as; SFTP cannot give links to others.
func (u *sftpUploader) link(e entry) error {
	j := &sftpJob{entry: e, path: u.path(e.name), dir: u.last()}
	u.clear(j)
	j.sent = append(j.sent, u.s.AskSymlink(e.target, j.path))
	j.link = u.s.AskReadlink(j.path)
	return u.add(j)
}

// clear removes what is in the way of an entry. A file that is there must not be written through, for it may be a link.
func (u *sftpUploader) clear(j *sftpJob) {
	if !j.dir.fresh {
		j.remove = u.s.AskRemove(j.path)
	}
}

// blocked explains why an entry cannot be made where something is.
func (u *sftpUploader) blocked(j *sftpJob, err error) error {
	if j.remove != nil && errors.Is(err, fs.ErrExist) {
		if why := j.remove.Err(u.ctx); why != nil {
			return fmt.Errorf("what is in its place cannot be removed: %w", why)
		}
	}
	return err
}

func (u *sftpUploader) file(e entry, content io.Reader) error {
	if e.size > smallFile {
		return u.large(e, content)
	}
	j := &sftpJob{entry: e, path: u.path(e.name), dir: u.last(), data: make([]byte, e.size)}
	if _, err := io.ReadFull(content, j.data); err != nil {
		return err
	}
	var one [1]byte
	if _, err := content.Read(one[:]); err != io.EOF {
		return err
	}
	u.clear(j)
	j.open = u.s.AskOpen(j.path, sftp.Write|sftp.Create|sftp.Excl, u.firstMode(e))
	return u.add(j)
}

// firstMode is the mode of a file whose content is still to come.
func (u *sftpUploader) firstMode(e entry) uint32 { return uint32(e.mode.Perm())&0o644 | 0o200 }

// hide gives a file that not everybody may read its mode before it has content. Servers before pkg/sftp 1.13.6 make every file with 0644.
func (u *sftpUploader) hide(e entry, f *sftp.File) []*sftp.Call {
	if e.mode&0o044 == 0o044 {
		return nil
	}
	return []*sftp.Call{f.AskSetstat(sftp.Attrs{Has: sftp.HasMode, Mode: 0o600})}
}

// large sends a file in pieces.
func (u *sftpUploader) large(e entry, content io.Reader) error {
	j := &sftpJob{entry: e, path: u.path(e.name), dir: u.last()}
	u.clear(j)
	f, err := u.s.Open(u.ctx, j.path, sftp.Write|sftp.Create|sftp.Excl, u.firstMode(e))
	if err != nil {
		return u.blocked(j, err)
	}
	j.sent = u.hide(e, f)
	sent, err := f.WriteFrom(u.ctx, &contentSource{r: content}, func(int64) {})
	if err == nil && sent != e.size {
		err = io.ErrShortWrite
	}
	if err != nil {
		f.AskClose()
		u.s.AskRemove(j.path) // a part of it is of no use
		return err
	}
	j.sent = append(append(j.sent, f.AskClose()), u.attributes(j.path, e)...)
	return u.add(j)
}

// add takes note of an entry whose requests have been sent.
func (u *sftpUploader) add(j *sftpJob) error {
	j.dir.jobs++
	u.jobs = append(u.jobs, j)
	u.bytes += len(j.data)
	return u.wait(treeFiles)
}

// flush waits for everything.
func (u *sftpUploader) flush() error { return u.wait(0) }

// wait waits until no more than so many entries are under way. The older half of them are those that have been sent as a whole.
func (u *sftpUploader) wait(most int) error {
	for i := 0; i < len(u.jobs) && u.err == nil; i++ {
		// The next line sends the content of the files that have been opened first.
		if len(u.jobs)-i <= most/2 && u.bytes <= treeBytes/2 {
			break
		}
		if err := u.write(u.jobs[i]); err != nil {
			return u.fail(u.jobs[i], err)
		}
	}
	for len(u.jobs) > most || u.bytes > treeBytes {
		j := u.jobs[0]
		if err := u.confirm(j); err != nil {
			return u.fail(j, err)
		}
		u.jobs[0] = nil
		u.jobs = u.jobs[1:]
		if j.dir.jobs--; j.dir.jobs == 0 {
			u.finish(j.dir)
		}
	}
	return nil
}

// fail keeps the error of an entry, which need not be the one that the walk has come to.
func (u *sftpUploader) fail(j *sftpJob, err error) error {
	if u.err == nil {
		u.err = fault("upload", j.name, err)
	}
	return errCut
}

// write waits for a file to be open, and sends its content, its end and its attributes. The server brings them into this order: it closes
// a file after all writes, and goes by the path behind that.
func (u *sftpUploader) write(j *sftpJob) error {
	if j.open == nil {
		return nil
	}
	f, err := j.open.File(u.ctx)
	if err != nil {
		return u.blocked(j, err)
	}
	j.open = nil
	j.sent = append(j.sent, u.hide(j.entry, f)...)
	if len(j.data) > 0 {
		j.sent = append(j.sent, f.AskWrite(0, j.data))
	}
	j.sent = append(append(j.sent, f.AskClose()), u.attributes(j.path, j.entry)...)
	return nil
}

// confirm waits for all that was asked for an entry.
func (u *sftpUploader) confirm(j *sftpJob) error {
	if err := u.write(j); err != nil {
		return err
	}
	for _, call := range j.sent {
		if err := call.Err(u.ctx); err != nil {
			return u.blocked(j, err)
		}
	}
	u.bytes -= len(j.data)
	j.data = nil
	if j.link == nil {
		return nil
	}
	target, err := j.link.Target(u.ctx)
	if err == nil && target != j.target {
		err = fmt.Errorf("the server made it a symbolic link to %.256q instead of %.256q: %w", target, j.target, errors.ErrUnsupported)
	}
	return err
}

// contentSource is an [sftp.Source] of a file's content.
type contentSource struct {
	r    io.Reader
	free [][]byte
}

func (c *contentSource) Next(context.Context) ([]byte, error) {
	var buf []byte
	if n := len(c.free); n > 0 {
		buf, c.free = c.free[n-1], c.free[:n-1]
	} else {
		buf = make([]byte, sftp.WriteSize)
	}
	for n := 0; ; {
		m, err := c.r.Read(buf[n:])
		if n += m; err != nil || n == len(buf) {
			return buf[:n], err
		}
	}
}

func (c *contentSource) Free(b []byte) { c.free = append(c.free, b[:cap(b)]) }

// learn asks the SFTP server what is in a directory that is not new.
func (u *sftpUploader) learn(d *sftpDir) error {
	if !u.tree.opts.SkipUnchanged || d.fresh {
		return nil
	}
	dir, err := u.s.Opendir(u.ctx, u.path(d.name))
	if errors.Is(err, fs.ErrPermission) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.AskClose()
	d.known = map[string]sftp.Attrs{}
	for u.known < maxKnownSFTP {
		entries, err := dir.AskRead().Entries(u.ctx)
		for _, e := range entries {
			d.known[e.Name] = e.Attrs
			d.knownSize += size(e)
			u.known += size(e)
		}
		if err != nil {
			if u.ctx.Err() != nil || u.s.Err() != nil {
				return err
			}
			break // its end
		}
	}
	return nil
}

// maxKnownSFTP bounds the memory for the listings of the directories on the way to where the walk is.
const maxKnownSFTP = 16 << 20

// forget ends the memory for a directory.
func (u *sftpUploader) forget(d *sftpDir) {
	u.known -= d.knownSize
	d.known, d.knownSize = nil, 0
}

// unchanged reports whether the host has a file already.
func (u *sftpUploader) unchanged(e entry) bool {
	have, ok := u.last().known[e.Name()]
	if !ok || have.Has&(sftp.HasSize|sftp.HasMode|sftp.HasTimes|sftp.HasOwner) != sftp.HasSize|sftp.HasMode|sftp.HasTimes|sftp.HasOwner {
		return false
	}
	owner := User{GID: have.GID}
	if u.owner != nil {
		owner = *u.owner
	}
	return have.UID == owner.UID && have.GID == owner.GID && have.Mode == sftp.TypeRegular|uint32(e.mode.Perm()) &&
		have.Size == uint64(e.size) && have.MTime == uploadTime(e)
}
