package lxdtest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Types of SFTP packets, version 3 (draft-ietf-secsh-filexfer-02).
const (
	fxInit     = 1
	fxVersion  = 2
	fxOpen     = 3
	fxClose    = 4
	fxRead     = 5
	fxWrite    = 6
	fxLstat    = 7
	fxFstat    = 8
	fxSetstat  = 9
	fxFsetstat = 10
	fxOpendir  = 11
	fxReaddir  = 12
	fxRemove   = 13
	fxMkdir    = 14
	fxRmdir    = 15
	fxRealpath = 16
	fxStat     = 17
	fxRename   = 18
	fxReadlink = 19
	fxSymlink  = 20
	fxStatus   = 101
	fxHandle   = 102
	fxData     = 103
	fxName     = 104
	fxAttrs    = 105
	fxExtended = 200
	fxReply    = 201
)

// Status codes and flags.
const (
	fxOK          = 0
	fxEOF         = 1
	fxNoSuchFile  = 2
	fxDenied      = 3
	fxFailure     = 4
	fxUnsupported = 8

	attrSize  = 1
	attrOwner = 2
	attrMode  = 4
	attrTimes = 8

	openRead  = 1
	openWrite = 2
	openCreat = 8
	openTrunc = 16
	openExcl  = 32

	// maxPacket is what a client may send at once; the real server cuts longer packets' connections.
	maxPacket = 256 << 10
)

// An sftpSession is one connection after its upgrade. It answers one request after the other; the
// real one works on several at a time but answers in the same order.
type sftpSession struct {
	s       *Server
	i       *instance
	conn    net.Conn
	in      io.Reader
	out     gate
	into    gate
	cut     bool // a fault ends the connection
	handles map[string]*handle
	next    int
}

// A handle is an open file or directory.
type handle struct {
	f    *os.File
	name string
	list []*fileInfo // of a directory, read at its first READDIR
	read bool
}

// fault names the file as the instance does.
func (h *handle) fault(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return &fs.PathError{Op: p.Op, Path: h.name, Err: p.Err}
	}
	return err
}

// getSFTP upgrades the connection.
func (s *Server) getSFTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") != "sftp" {
		s.fail(w, 400, "Missing or invalid upgrade header")
		return
	}
	i, ok := s.instanceOf(w, r)
	if !ok {
		return
	}
	if i.Type == VM && (i.NoAgent || i.currentStatus() == Stopped) {
		s.fail(w, 500, s.Version.Texts.AgentDown)
		return
	}
	a := w.(*answer)
	switch a.gate.strike(OnResponse) {
	case Cut:
		a.cut = true
		return
	case Skip:
		if !a.wrote { // by the fault itself
			a.suppressed, a.wrote = true, true
		}
		return
	}
	c, rw, err := a.Hijack()
	if err != nil {
		s.fail(w, 500, err.Error())
		return
	}
	defer c.Close()
	_ = c.SetDeadline(time.Time{})
	if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: sftp\r\nConnection: Upgrade\r\n\r\n"); err != nil {
		return
	}
	p := a.gate.point
	p.answer, p.raw = nil, c
	session := &sftpSession{
		s: s, i: i, conn: c, in: rw.Reader, out: gate{s: s, point: p}, into: gate{s: s, point: p}, handles: map[string]*handle{},
	}
	i.mu.Lock()
	i.sftp++
	stops := i.stops
	i.mu.Unlock()
	over := make(chan struct{})
	s.spawn("SFTP session watcher of "+i.Name, func() {
		select {
		case <-stops:
		case <-s.closing:
		case <-over:
		}
		c.Close()
	})
	session.serve()
	close(over)
	for _, h := range session.handles {
		if h.f != nil {
			h.f.Close()
		}
	}
	i.mu.Lock()
	i.sftp--
	i.halted.Broadcast()
	i.mu.Unlock()
}

func (x *sftpSession) serve() {
	r := bufio.NewReaderSize(x.in, 64<<10)
	for {
		var head [4]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return
		}
		size := binary.BigEndian.Uint32(head[:])
		if size == 0 || size > maxPacket+1024 {
			return
		}
		body := make([]byte, size)
		if _, err := io.ReadFull(r, body); err != nil {
			return
		}
		var heard []byte
		if err := x.into.pass(OnReceive, body, func(b []byte) error { heard = append(heard, b...); return nil }); err != nil {
			return
		}
		if len(heard) == 0 {
			continue // swallowed
		}
		answer, ok := x.handle(heard[0], &packet{b: heard[1:]})
		if !ok && x.s.Version.SFTPShared {
			x.i.mu.Lock()
			x.i.endSessions()
			x.i.mu.Unlock()
		}
		if !ok || x.cut {
			return
		}
		framed := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(answer)), uint32(len(answer)))
		framed = append(framed, answer...)
		err := x.out.pass(OnSend, framed, func(b []byte) error {
			_, err := x.conn.Write(b)
			return err
		})
		if err != nil {
			return
		}
	}
}

// A packet is read from the front.
type packet struct {
	b   []byte
	bad bool
}

func (p *packet) take(n uint64) []byte {
	if uint64(len(p.b)) < n {
		p.bad = true
		return make([]byte, min(n, 8))
	}
	b := p.b[:n]
	p.b = p.b[n:]
	return b
}

func (p *packet) u32() uint32  { return binary.BigEndian.Uint32(p.take(4)) }
func (p *packet) u64() uint64  { return binary.BigEndian.Uint64(p.take(8)) }
func (p *packet) str() string  { return string(p.take(uint64(p.u32()))) }
func (p *packet) path() string { return path.Join("/", p.str()) }

// attrs are those of a file that a client sends.
type attrs struct {
	flags        uint32
	size         uint64
	uid, gid     uint32
	mode         uint32
	atime, mtime uint32
}

func (p *packet) attrs() (a attrs) {
	a.flags = p.u32()
	if a.flags&attrSize != 0 {
		a.size = p.u64()
	}
	if a.flags&attrOwner != 0 {
		a.uid, a.gid = p.u32(), p.u32()
	}
	if a.flags&attrMode != 0 {
		a.mode = p.u32()
	}
	if a.flags&attrTimes != 0 {
		a.atime, a.mtime = p.u32(), p.u32()
	}
	return a
}

func putStr(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

func reply(kind byte, id uint32) []byte { return binary.BigEndian.AppendUint32([]byte{kind}, id) }

func (x *sftpSession) status(id uint32, err error) []byte {
	code, text := uint32(fxOK), ""
	if err != nil {
		code, text = fxFailure, err.Error()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			code = fxNoSuchFile
		case errors.Is(err, fs.ErrPermission):
			code = fxDenied
		case errors.Is(err, io.EOF):
			code = fxEOF
		case errors.Is(err, errUnsupported):
			code = fxUnsupported
		}
	}
	b := binary.BigEndian.AppendUint32(reply(fxStatus, id), code)
	return putStr(putStr(b, text), "")
}

var (
	errUnsupported = errors.New("operation unsupported")
	errBadHandle   = syscall.EBADF
)

// handle answers one packet; not ok is the end of the connection.
func (x *sftpSession) handle(kind byte, p *packet) (answer []byte, ok bool) {
	if kind == fxInit {
		b := binary.BigEndian.AppendUint32([]byte{fxVersion}, 3)
		for _, e := range [][2]string{{"hardlink@openssh.com", "1"}, {"posix-rename@openssh.com", "1"}, {"statvfs@openssh.com", "2"}} {
			b = putStr(putStr(b, e[0]), e[1])
		}
		return b, true
	}
	id := p.u32()
	answer = x.carryOut(kind, id, p)
	if p.bad || answer == nil {
		return nil, false
	}
	return answer, true
}

// carryOut is nil for packets of an unknown type.
func (x *sftpSession) carryOut(kind byte, id uint32, p *packet) []byte {
	t := x.i.tree
	switch kind {
	case fxOpen:
		return x.open(id, p)
	case fxClose:
		key := p.str()
		h, ok := x.handles[key]
		if !ok {
			return x.status(id, errBadHandle)
		}
		delete(x.handles, key)
		if h.f == nil {
			return x.status(id, nil)
		}
		return x.status(id, h.f.Close())
	case fxRead:
		h, offset, size := x.handles[p.str()], p.u64(), p.u32()
		if h == nil || h.f == nil {
			return x.status(id, errBadHandle)
		}
		data := make([]byte, min(size, uint32(x.s.Version.SFTPPacket)))
		n, err := h.f.ReadAt(data, int64(offset))
		if err != nil && (err != io.EOF || n == 0) {
			return x.status(id, h.fault(err))
		}
		return append(binary.BigEndian.AppendUint32(reply(fxData, id), uint32(n)), data[:n]...)
	case fxWrite:
		h, offset := x.handles[p.str()], p.u64()
		data := p.take(uint64(p.u32()))
		if p.bad {
			return nil
		}
		if h == nil || h.f == nil {
			return x.status(id, errBadHandle)
		}
		_, err := h.f.WriteAt(data, int64(offset))
		return x.status(id, h.fault(err))
	case fxStat:
		return x.attrs(id, t.stat, p.path())
	case fxLstat:
		return x.attrs(id, t.lstat, p.path())
	case fxFstat:
		h := x.handles[p.str()]
		if h == nil {
			return x.status(id, errBadHandle)
		}
		return x.attrs(id, x.fstat(h), h.name)
	case fxSetstat:
		name := p.path()
		return x.status(id, x.setstat(name, nil, p.attrs()))
	case fxFsetstat:
		h := x.handles[p.str()]
		a := p.attrs()
		if h == nil {
			return x.status(id, errBadHandle)
		}
		return x.status(id, x.setstat(h.name, h.f, a))
	case fxOpendir:
		name := p.path()
		info, err := t.stat(name)
		if err == nil && !info.IsDir() {
			err = &fs.PathError{Path: name, Err: syscall.ENOTDIR}
		}
		if err != nil {
			return x.status(id, err)
		}
		return x.newHandle(id, &handle{name: name})
	case fxReaddir:
		return x.readdir(id, x.handles[p.str()])
	case fxRemove, fxRmdir:
		return x.status(id, t.remove(p.path()))
	case fxMkdir:
		return x.status(id, t.mkdir(p.path(), 0o755))
	case fxRealpath:
		return x.oneName(id, p.path())
	case fxReadlink:
		target, err := t.readlink(p.path())
		if err != nil {
			return x.status(id, err)
		}
		return x.oneName(id, target)
	case fxSymlink:
		// OpenSSH and everybody after it send the target first.
		target, name := p.str(), p.path()
		return x.status(id, t.symlink(target, name))
	case fxRename:
		from, to := p.path(), p.path()
		return x.status(id, x.rename(from, to))
	case fxExtended:
		return x.extended(id, p)
	}
	return nil
}

func (x *sftpSession) extended(id uint32, p *packet) []byte {
	switch p.str() {
	case "posix-rename@openssh.com":
		from, to := p.path(), p.path()
		return x.status(id, x.rename(from, to))
	case "hardlink@openssh.com":
		from, to := p.path(), p.path()
		return x.status(id, x.i.tree.link(from, to))
	case "statvfs@openssh.com":
		if _, err := x.i.tree.stat(p.path()); err != nil {
			return x.status(id, err)
		}
		b := reply(fxReply, id)
		// Block and fragment size, blocks, free, available, inodes, free, available, file
		// system, flags, longest name.
		for _, n := range []uint64{4096, 4096, 1 << 20, 1 << 19, 1 << 19, 1 << 20, 1 << 19, 1 << 19, 0, 0, 255} {
			b = binary.BigEndian.AppendUint64(b, n)
		}
		return b
	}
	return x.status(id, errUnsupported)
}

func (x *sftpSession) rename(from, to string) error {
	if err := x.i.tree.rename(from, to); err != nil {
		return err
	}
	for _, h := range x.handles {
		if h.name == from {
			h.name = to
		}
	}
	return nil
}

func (x *sftpSession) newHandle(id uint32, h *handle) []byte {
	x.next++
	key := strconv.Itoa(x.next)
	x.handles[key] = h
	return putStr(reply(fxHandle, id), key)
}

func (x *sftpSession) open(id uint32, p *packet) []byte {
	name, flags, a := p.path(), p.u32(), p.attrs()
	var flag int
	switch {
	case flags&(openRead|openWrite) == openRead|openWrite:
		flag = os.O_RDWR
	case flags&openWrite != 0:
		flag = os.O_WRONLY
	case flags&openRead != 0:
		flag = os.O_RDONLY
	default:
		return x.status(id, syscall.EINVAL)
	}
	// Append is left out: a client sends the offsets.
	if flags&openCreat != 0 {
		flag |= os.O_CREATE
	}
	if flags&openTrunc != 0 {
		flag |= os.O_TRUNC
	}
	if flags&openExcl != 0 {
		flag |= os.O_EXCL
	}
	mode := fs.FileMode(0o644)
	if a.flags&attrMode != 0 && x.s.Version.SFTPOpenMode {
		mode = fs.FileMode(a.mode).Perm()
	}
	info, err := x.i.tree.stat(name)
	if err == nil && info.mode&fs.ModeNamedPipe != 0 {
		Stall(&x.out.point)
		return nil
	}
	if err == nil && info.IsDir() && flag == os.O_RDONLY {
		// The kernel lets a directory be opened; only reading it as a file fails.
		return x.newHandle(id, &handle{name: name})
	}
	f, err := x.i.tree.open(name, flag, mode)
	if err != nil {
		return x.status(id, err)
	}
	return x.newHandle(id, &handle{f: f, name: name})
}

// fstat looks at the open file, also when its name is gone.
func (x *sftpSession) fstat(h *handle) func(string) (*fileInfo, error) {
	return func(name string) (*fileInfo, error) {
		if h.f == nil {
			return x.i.tree.stat(name)
		}
		disk, err := h.f.Stat()
		if err != nil {
			return nil, err
		}
		if named, err := x.i.tree.stat(name); err == nil && os.SameFile(named.FileInfo, disk) {
			return named, nil
		}
		return &fileInfo{FileInfo: disk, mode: disk.Mode()}, nil
	}
}

func (x *sftpSession) attrs(id uint32, stat func(string) (*fileInfo, error), name string) []byte {
	info, err := stat(name)
	if err != nil {
		return x.status(id, err)
	}
	return x.putAttrs(reply(fxAttrs, id), info)
}

func (x *sftpSession) putAttrs(b []byte, info *fileInfo) []byte {
	size := info.Size()
	x.cut = x.out.strike(OnStat, func(p *Point) { p.Size = &size }) == Cut || x.cut
	b = binary.BigEndian.AppendUint32(b, attrSize|attrOwner|attrMode|attrTimes)
	b = binary.BigEndian.AppendUint64(b, uint64(size))
	b = binary.BigEndian.AppendUint32(b, uint32(info.uid))
	b = binary.BigEndian.AppendUint32(b, uint32(info.gid))
	b = binary.BigEndian.AppendUint32(b, unixMode(info.mode))
	b = binary.BigEndian.AppendUint32(b, uint32(info.ModTime().Unix()))
	return binary.BigEndian.AppendUint32(b, uint32(info.ModTime().Unix()))
}

// unixMode is st_mode.
func unixMode(m fs.FileMode) uint32 {
	u := uint32(m.Perm())
	switch {
	case m&fs.ModeDir != 0:
		u |= 0o040000
	case m&fs.ModeSymlink != 0:
		u |= 0o120000
	case m&fs.ModeNamedPipe != 0:
		u |= 0o010000
	case m&fs.ModeSocket != 0:
		u |= 0o140000
	case m&fs.ModeCharDevice != 0:
		u |= 0o020000
	case m&fs.ModeDevice != 0:
		u |= 0o060000
	default:
		u |= 0o100000
	}
	for bit, flag := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			u |= flag
		}
	}
	return u
}

func (x *sftpSession) setstat(name string, f *os.File, a attrs) error {
	t := x.i.tree
	if a.flags&attrSize != 0 {
		file := f
		if file == nil {
			var err error
			if file, err = t.open(name, os.O_WRONLY, 0); err != nil {
				return &fs.PathError{Op: "truncate", Path: name, Err: errnoOr(err, err)}
			}
			defer file.Close()
		}
		if err := file.Truncate(int64(a.size)); err != nil {
			return &fs.PathError{Op: "truncate", Path: name, Err: errnoOr(err, err)}
		}
	}
	if a.flags&attrMode != 0 {
		mode := fs.FileMode(a.mode).Perm()
		if x.s.Version.SFTPSetuid {
			for bit, flag := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
				if a.mode&flag != 0 {
					mode |= bit
				}
			}
		}
		if err := t.chmod(name, mode); err != nil {
			return err
		}
	}
	if a.flags&attrOwner != 0 {
		if err := t.chown(name, int(a.uid), int(a.gid)); err != nil {
			return err
		}
	}
	if a.flags&attrTimes != 0 {
		return t.chtimes(name, time.Unix(int64(a.atime), 0), time.Unix(int64(a.mtime), 0))
	}
	return nil
}

func (x *sftpSession) oneName(id uint32, name string) []byte {
	b := binary.BigEndian.AppendUint32(reply(fxName, id), 1)
	return binary.BigEndian.AppendUint32(putStr(putStr(b, name), name), 0)
}

// readdir answers with up to 128 entries.
func (x *sftpSession) readdir(id uint32, h *handle) []byte {
	if h == nil {
		return x.status(id, errBadHandle)
	}
	if !h.read {
		list, err := x.i.tree.list(h.name)
		if err != nil {
			return x.status(id, err)
		}
		h.list, h.read = x.tell(list), true
	}
	if len(h.list) == 0 {
		return x.status(id, io.EOF)
	}
	part := h.list[:min(len(h.list), 128)]
	h.list = h.list[len(part):]
	b := binary.BigEndian.AppendUint32(reply(fxName, id), uint32(len(part)))
	for _, info := range part {
		long := fmt.Sprintf("%s    1 %-8d %-8d %12d %s %s", info.mode, info.uid, info.gid, info.Size(),
			info.ModTime().Format("Jan _2 15:04"), info.Name())
		b = x.putAttrs(putStr(putStr(b, info.Name()), long), info)
	}
	return b
}

// tell lets faults put other names into a listing. Names that are not on the disk look like empty
// files.
func (x *sftpSession) tell(list []*fileInfo) []*fileInfo {
	names := make([]string, len(list))
	byName := map[string]*fileInfo{}
	for n, info := range list {
		names[n] = info.Name()
		byName[info.Name()] = info
	}
	before := strings.Join(names, "/")
	x.cut = x.out.strike(OnList, func(p *Point) { p.Names = &names }) == Cut || x.cut
	if strings.Join(names, "/") == before {
		return list
	}
	var told []*fileInfo
	for _, name := range names {
		info, ok := byName[name]
		if !ok {
			info = &fileInfo{FileInfo: invented{name}, mode: 0o644}
		}
		told = append(told, info)
	}
	return told
}

// invented is a file that only a fault knows of.
type invented struct{ name string }

func (i invented) Name() string       { return i.name }
func (i invented) Size() int64        { return 0 }
func (i invented) Mode() fs.FileMode  { return 0o644 }
func (i invented) ModTime() time.Time { return time.Unix(0, 0) }
func (i invented) IsDir() bool        { return false }
func (i invented) Sys() any           { return nil }
