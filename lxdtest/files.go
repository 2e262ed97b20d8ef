package lxdtest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"strconv"
	"strings"
	"time"
)

// sftpText words an error as the daemon does, which is itself a client of an SFTP server.
func sftpText(err error) string { return fmt.Sprintf("sftp: %q (SSH_FX_FAILURE)", err.Error()) }

// failFile answers with what went wrong with a file.
func (s *Server) failFile(w http.ResponseWriter, i *instance, name string, err error) {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.fail(w, 404, fill(s.Version.Texts.FileNotFound, "{path}", name, "{name}", i.Name))
	case errors.Is(err, fs.ErrPermission):
		s.fail(w, 403, s.Version.Texts.Forbidden)
	default:
		s.fail(w, 500, sftpText(err))
	}
}

// fileOf finds the instance and the path that a request is about.
func (s *Server) fileOf(w http.ResponseWriter, r *http.Request) (i *instance, name string, ok bool) {
	if i, ok = s.instanceOf(w, r); !ok {
		return nil, "", false
	}
	name = r.FormValue("path")
	if name == "" {
		s.fail(w, 400, "Missing path argument")
		return nil, "", false
	}
	if i.Type == VM && (i.NoAgent || i.currentStatus() == Stopped) {
		s.fail(w, 500, s.Version.Texts.AgentDown)
		return nil, "", false
	}
	return i, path.Clean("/" + name), true
}

// getFile answers GET and HEAD.
func (s *Server) getFile(w http.ResponseWriter, r *http.Request) {
	i, name, ok := s.fileOf(w, r)
	if !ok {
		return
	}
	t := i.tree
	info, err := t.lstat(name)
	if err != nil {
		s.failFile(w, i, name, err)
		return
	}
	kind := "file"
	switch {
	case info.IsDir():
		kind = "directory"
	case info.mode&fs.ModeSymlink != 0:
		kind = "symlink"
	}
	prefix := s.Version.HeaderPrefix
	mode := info.mode.Perm()
	if kind == "symlink" {
		mode = 0o777
	}
	h := w.Header()
	h.Set(prefix+"uid", strconv.Itoa(info.uid))
	h.Set(prefix+"gid", strconv.Itoa(info.gid))
	h.Set(prefix+"mode", fmt.Sprintf("%04o", mode))
	h.Set(prefix+"modified", info.ModTime().UTC().Truncate(1e9).String())
	h.Set(prefix+"type", kind)
	if r.Method == "HEAD" {
		h.Set("Content-Type", "application/json")
		if s.Version.HeadLength && kind == "file" {
			h.Set("Content-Type", "application/octet-stream")
			h.Set("Content-Length", strconv.FormatInt(info.Size(), 10))
		}
		w.WriteHeader(200)
		return
	}
	a := w.(*answer)
	switch kind {
	case "directory":
		list, err := t.list(name)
		if err != nil {
			s.failFile(w, i, name, err)
			return
		}
		names := make([]string, len(list))
		for n, f := range list {
			names[n] = f.Name()
		}
		if a.gate.strike(OnList, func(p *Point) { p.Names = &names }) == Cut {
			a.cut = true
			return
		}
		s.reply(w, names)
		return
	case "symlink":
		target, err := t.readlink(name)
		if err != nil {
			s.failFile(w, i, name, err)
			return
		}
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(name), target)
		}
		s.serveFile(a, r, name, info, strings.NewReader(target), int64(len(target)))
	default:
		f, err := t.open(name, os.O_RDONLY, 0)
		if err != nil {
			s.failFile(w, i, name, err)
			return
		}
		defer f.Close()
		if info.mode&fs.ModeNamedPipe != 0 && !s.awaitWriter(r, name, f) {
			a.cut = true
			return
		}
		// The length is that of stat, which is 0 for a FIFO and for what the kernel makes up.
		s.serveFile(a, r, name, info, io.NewSectionReader(f, 0, info.Size()), info.Size())
	}
}

// awaitWriter waits until somebody has written to a FIFO, or has opened and closed it, as the real server waits when it opens it. It reports
// whether that was before the client had gone.
func (s *Server) awaitWriter(r *http.Request, name string, f *os.File) bool {
	over := make(chan struct{})
	defer close(over)
	s.spawn("watcher of the FIFO "+name, func() {
		select {
		case <-r.Context().Done():
		case <-s.closing:
		case <-over:
		}
		_ = f.SetReadDeadline(time.Unix(1, 0))
	})
	c, err := f.SyscallConn()
	if err == nil {
		asked := false
		err = c.Read(func(uintptr) bool {
			again := asked
			asked = true
			return again
		})
	}
	if errors.Is(err, os.ErrNoDeadline) { // a system that cannot wait for FIFOs
		select {
		case <-r.Context().Done():
		case <-s.closing:
		}
	}
	return err == nil
}

func (s *Server) serveFile(a *answer, r *http.Request, name string, info *fileInfo, f io.ReadSeeker, size int64) {
	h := a.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Disposition", "inline;filename="+path.Base(name))
	told := size
	if a.gate.strike(OnStat, func(p *Point) { p.Size = &told }) == Cut {
		a.cut = true
		return
	}
	if told != size {
		// A lie: the length is what was told, the body is what there is.
		h.Set("Content-Length", strconv.FormatInt(told, 10))
		a.WriteHeader(200)
		if _, err := io.Copy(a, f); err == nil && told > size {
			a.flush()
			a.cut = true
		}
		return
	}
	if s.Version.StaleLength {
		a.stale = strconv.FormatInt(size, 10)
	}
	http.ServeContent(a, r, "", info.ModTime(), f)
}

// postFile writes a file, straight into its place.
func (s *Server) postFile(w http.ResponseWriter, r *http.Request) {
	// FormValue takes a form's body for itself: curl's default Content-Type makes empty files
	// here as on the real server.
	i, name, ok := s.fileOf(w, r)
	if !ok {
		return
	}
	prefix := s.Version.HeaderPrefix
	uid, gid, mode := 0, 0, int64(-1)
	for header, value := range map[string]*int{"uid": &uid, "gid": &gid} {
		if text := r.Header.Get(prefix + header); text != "" {
			n, err := strconv.Atoi(text)
			if err != nil && s.Version.StrictHeaders {
				s.fail(w, 400, "Invalid "+strings.ToUpper(header)+": "+err.Error())
				return
			}
			if err == nil {
				*value = n
			}
		}
	}
	if text := r.Header.Get(prefix + "mode"); text != "" {
		base := 0
		if s.Version.OctalMode {
			base = 8
		}
		n, err := strconv.ParseInt(text, base, 0)
		if err == nil && strings.Trim(text, "0123456789") == "" {
			mode = n & 0o777
		}
	}
	kind := r.Header.Get(prefix + "type")
	write := r.Header.Get(prefix + "write")
	if kind == "" {
		kind = "file"
	}
	if write == "" {
		write = "overwrite"
	}
	switch {
	case write != "overwrite" && write != "append":
		s.fail(w, 400, fill(s.Version.Texts.WriteMode, "{value}", write))
		return
	case kind != "file" && kind != "directory" && kind != "symlink":
		s.fail(w, 400, fill(s.Version.Texts.FileType, "{value}", kind))
		return
	}
	var err error
	t := i.tree
	_, missing := t.lstat(name)
	switch kind {
	case "directory":
		if missing == nil {
			break
		}
		if mode < 0 {
			mode = int64(s.Version.DirMode)
		}
		if err = t.mkdir(name, fs.FileMode(mode)); err == nil {
			err = t.chown(name, uid, gid)
		}
	case "symlink":
		var target []byte
		if target, err = io.ReadAll(r.Body); err != nil {
			break
		}
		if old, e := t.readlink(name); e == nil && old == string(target) {
			break
		}
		if err = t.symlink(string(target), name); err == nil {
			err = t.lchown(name, uid, gid)
		}
	default:
		err = s.writeFile(i, name, r, write == "append", uid, gid, mode)
	}
	if errors.Is(err, errCut) {
		w.(*answer).cut = true
		return
	}
	if err == nil && s.Version.ModifyPerm {
		err = modifyPerm(t, name, r.Header.Get(prefix+"modify-perm"), uid, gid, mode)
	}
	if err != nil {
		s.failFile(w, i, name, err)
		return
	}
	s.reply(w, empty)
}

// writeFile streams the body into the file. What has arrived when the client breaks off
// stays.
func (s *Server) writeFile(i *instance, name string, r *http.Request, appending bool, uid, gid int, mode int64) error {
	t := i.tree
	_, missing := t.stat(name)
	flag := os.O_RDWR | os.O_CREATE | os.O_TRUNC
	if appending {
		flag = os.O_RDWR
	}
	f, err := t.open(name, flag, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if appending {
		if _, err := f.Seek(0, io.SeekEnd); err != nil {
			return err
		}
	}
	if _, err := io.Copy(f, r.Body); err != nil {
		if errors.Is(err, errCut) || !s.Version.ModifyPerm {
			return err
		}
		// Newer servers take a body that breaks off for its end.
	}
	if missing == nil {
		return nil
	}
	if mode >= 0 {
		if err := t.chmod(name, fs.FileMode(mode)); err != nil {
			return err
		}
	}
	return t.chown(name, uid, gid)
}

// modifyPerm applies what the header lists to a file that existed.
func modifyPerm(t *tree, name, list string, uid, gid int, mode int64) error {
	for what := range strings.SplitSeq(list, ",") {
		var err error
		switch strings.TrimSpace(what) {
		case "uid":
			err = t.chown(name, uid, -1)
		case "gid":
			err = t.chown(name, -1, gid)
		case "mode":
			if mode >= 0 {
				err = t.chmod(name, fs.FileMode(mode))
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) deleteFile(w http.ResponseWriter, r *http.Request) {
	i, name, ok := s.fileOf(w, r)
	if !ok {
		return
	}
	remove := i.tree.remove
	if s.Version.ForceDelete && r.Header.Get(s.Version.HeaderPrefix+"force") != "" {
		remove = i.tree.removeAll
	}
	switch err := remove(name); {
	case err == nil:
		s.reply(w, empty)
	case s.Version.RemoveNamed && errors.Is(err, fs.ErrNotExist):
		s.fail(w, 404, "remove "+name+": file does not exist")
	case s.Version.RemoveNamed && !errors.Is(err, fs.ErrPermission):
		s.fail(w, 500, "remove "+name+": "+sftpText(err))
	default:
		s.failFile(w, i, name, err)
	}
}
