package lxdtest_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/stretchr/testify/require"
)

// fileScenarios are about files over HTTP.
var fileScenarios = []scenario{
	{"a file", func(w *wire) {
		file := "/1.0/instances/INSTANCE/files?path=/tmp/file"
		w.do("POST", file, octets+"X-LXD-mode: 0640\nX-LXD-uid: 5\nX-LXD-gid: 6", "hello")
		w.do("GET", file, "", "")
		w.do("HEAD", file, "", "")
		w.do("GET", file, "Range: bytes=1-2", "")
		w.do("GET", file, "Range: bytes=9-", "")
		w.do("POST", file, octets+"X-LXD-mode: 0600\nX-LXD-uid: 7", "shorter")
		w.do("GET", file, "", "")
		w.do("POST", file, octets+"X-LXD-write: append", " and longer")
		w.do("GET", file, "", "")
		w.do("GET", "/1.0/instances/INSTANCE/files?path=tmp/../tmp//file", "", "")
		w.do("DELETE", file, "", "")
		w.do("GET", file, "", "")
		w.do("HEAD", file, "", "")
		w.do("DELETE", file, "", "")
	}, []string{"X-Lxd-Mode: 0640", "X-Lxd-Uid: 5", "hello", "206", "el", "416", "X-Lxd-Mode: 0640", "shorter", "shorter and longer", "404", "Not Found", "404", "404"}},

	{"modes of a new file", func(w *wire) {
		for n, mode := range []string{"", "0644", "644", "4755", "07777", "888", "0", "nonsense", "0x1ff"} {
			file := fmt.Sprintf("/1.0/instances/INSTANCE/files?path=/tmp/mode%d", n)
			header := octets
			if mode != "" {
				header += "X-LXD-mode: " + mode
			}
			w.do("POST", file, header, "x")
			w.do("HEAD", file, "", "")
		}
	}, []string{"X-Lxd-Mode: 0644", "X-Lxd-Mode: 0644", "X-Lxd-Mode: 0204", "X-Lxd-Mode: 0223"}},

	{"a form is no file", func(w *wire) {
		w.do("POST", "/1.0/instances/INSTANCE/files?path=/tmp/form", "Content-Type: application/x-www-form-urlencoded", "hello")
		w.do("GET", "/1.0/instances/INSTANCE/files?path=/tmp/form", "", "")
	}, []string{"200", "Content-Length: 0"}},

	{"directories", func(w *wire) {
		dir := "/1.0/instances/INSTANCE/files?path=/tmp/dir"
		w.do("POST", dir, "X-LXD-type: directory", "")
		w.do("GET", dir, "", "")
		w.do("HEAD", dir, "", "")
		w.do("POST", dir, "X-LXD-type: directory\nX-LXD-mode: 0700", "")
		w.do("POST", dir+"/deep/er", "X-LXD-type: directory", "")
		w.do("POST", dir+"/one", octets, "1")
		w.do("POST", dir+"/one", "X-LXD-type: directory", "")
		w.do("GET", dir, "", "")
		w.do("POST", dir, octets, "not a file")
		w.do("POST", dir+"/no/file", octets, "x")
		w.do("POST", dir+"/append", octets+"X-LXD-write: append", "x")
		w.do("POST", dir+"/one/below", octets, "x")
		w.do("DELETE", dir, "", "")
		w.do("DELETE", dir+"/one", "", "")
		w.do("DELETE", dir, "", "")
	}, []string{"200", "X-Lxd-Mode: 0750", "404", `["one"]`, "500", "is a directory", "404", "404", "500", "directory not empty", "200", "200"}},

	{"symbolic links", func(w *wire) {
		base := "/1.0/instances/INSTANCE/files?path=/tmp/"
		link := "X-LXD-type: symlink\n" + octets
		w.do("POST", base+"link", link, "target")
		w.do("GET", base+"link", "", "")
		w.do("HEAD", base+"link", "", "")
		w.do("POST", base+"link", link, "target")
		w.do("POST", base+"link", link, "other")
		w.do("POST", base+"link", octets, "through a dangling link")
		w.do("GET", base+"target", "", "")
		w.do("POST", base+"out", link, "../../../../../../../../tmp")
		w.do("GET", base+"out/target", "", "")
		w.do("DELETE", base+"link", "", "")
		w.do("GET", base+"target", "", "")
	}, []string{"X-Lxd-Mode: 0777", "X-Lxd-Type: symlink", "/tmp/target", "200", "500", "file exists", "through a dangling link", "through a dangling link"}},

	{"file requests that are refused", func(w *wire) {
		base := "/1.0/instances/INSTANCE/files"
		for _, m := range []string{"GET", "POST", "DELETE"} {
			w.do(m, base, "", "")
		}
		w.do("PUT", base+"?path=/tmp/x", "", "")
		w.do("POST", base+"?path=/tmp/x", "X-LXD-type: nonsense", "")
		w.do("POST", base+"?path=/tmp/x", "X-LXD-write: nonsense", "")
		w.do("POST", base+"?path=/tmp/uid", octets+"X-LXD-uid: nonsense", "x")
		w.do("GET", base+"?path=/tmp/uid", "", "")
		w.do("GET", base+"?path=/etc&project=nobody", "", "")
		w.do("GET", "/1.0/instances/nobody/files?path=/etc", "", "")
	}, []string{"Missing path argument", "501", "Bad file type: nonsense", "Bad file write mode: nonsense", "X-Lxd-Uid: 0", "404", "404"}},

	{"an owner that does not exist", func(w *wire) {
		if os.Geteuid() != 0 {
			return // what the fake cannot do is noted beside the file
		}
		w.do("POST", "/1.0/instances/INSTANCE/files?path=/tmp/foreign", octets+"X-LXD-uid: 4294967294", "content")
		w.do("GET", "/1.0/instances/INSTANCE/files?path=/tmp/foreign", "", "")
	}, nil},

	{"owners that are no numbers of users", func(w *wire) {
		for n, uid := range []string{"-1", "99999999999999999999", "1e3", "0x10", "+5"} {
			file := fmt.Sprintf("/1.0/instances/INSTANCE/files?path=/tmp/owner%d", n)
			w.do("POST", file, octets+"X-LXD-uid: "+uid, "content")
			w.do("GET", file, "", "")
		}
	}, []string{"200", "200"}},

	{"names with signs in them", func(w *wire) {
		for _, name := range []string{"a b", "a+b%20c", "ü", `q"uote`, "semi;colon", "new\nline", "tab\t", "[x]", "ends."} {
			file := "/1.0/instances/INSTANCE/files?path=" + url.QueryEscape("/tmp/"+name)
			w.do("POST", file, octets, "x")
			w.do("GET", file, "", "")
			w.do("DELETE", file, "", "")
		}
	}, []string{"filename=a b", "200"}},

	{"a directory of many", func(w *wire) {
		many := "/1.0/instances/INSTANCE/files?path=/tmp/many"
		w.get("POST", many, "X-LXD-type: directory", "")
		for _, name := range []string{"b", "a", ".hidden", "c d"} {
			w.get("POST", many+url.QueryEscape("/"+name), octets, "x")
		}
		w.get("POST", many+"/dir", "X-LXD-type: directory", "")
		w.get("POST", many+"/link", "X-LXD-type: symlink\n"+octets, "nowhere")
		_, b := w.get("GET", many, "", "")
		var a struct{ Metadata []string }
		require.NoError(w.t, json.Unmarshal(b, &a))
		slices.Sort(a.Metadata) // they are in no certain order
		w.note("%q", a.Metadata)
		w.do("DELETE", many, "", "")
	}, []string{`[".hidden" "a" "b" "c d" "dir" "link"]`, "500"}},

	{"links on the way", func(w *wire) {
		base, link := "/1.0/instances/INSTANCE/files?path=/tmp/", "X-LXD-type: symlink\n"+octets
		w.get("POST", base+"real", "X-LXD-type: directory", "")
		w.do("POST", base+"by", link, "real")
		w.do("POST", base+"by/file", octets, "content")
		w.do("GET", base+"real/file", "", "")
		w.do("GET", base+"by", "", "")
		w.do("POST", base+"loop", link, "loop")
		w.do("GET", base+"loop", "", "")
		w.do("GET", base+"loop/file", "", "")
		w.do("POST", base+"loop", octets, "x")
		w.do("DELETE", base+"loop", "", "")
		w.do("DELETE", base+"by", "", "")
		w.do("GET", base+"real/file", "", "")
	}, []string{"200", "200", "content", "symlink", "content"}},

	{"a FIFO", func(w *wire) {
		own := ownInstance(w, "p", "")
		fifo := own + "/files?path=/tmp/fifo"
		run := func(script string) *session {
			_, b := w.get("POST", own+"/exec", "", ws(`["sh","-c","`+script+`"]`))
			return w.session(b).all()
		}
		run("mkfifo ../tmp/fifo").result()
		w.do("HEAD", fifo, "", "")
		answered := make(chan []byte)
		go func() { answered <- w.do("GET", fifo, "", "") }()
		// It waits for somebody who writes, and holds nobody else up.
		w.get("GET", own+"/files?path=/tmp", "", "")
		select {
		case <-answered:
		case <-time.After(time.Second):
			w.note("no answer yet")
		}
		s := run("exec 3<>../tmp/fifo")
		<-answered
		s.result()
	}, []string{`"return":0`, "X-Lxd-Type: file", "no answer yet", "200", "Content-Length: 0", "X-Lxd-Type: file", `"return":0`}},

	{"files that the kernel makes up", func(w *wire) {
		if runtime.GOOS != "linux" {
			return // the fake's instance has this machine's root
		}
		own := ownInstance(w, "k", "")
		for _, name := range []string{"/proc/version", "/proc/uptime", "/proc/no-such-file"} {
			res, b := w.get("GET", own+"/files?path="+name, "", "")
			w.note("%s: %d, %d of %q bytes", name, res.StatusCode, len(b), res.Header.Get("Content-Length"))
		}
	}, []string{`version: 200, 0 of "0" bytes`, `uptime: 200, 0 of "0" bytes`, `404`}},

	{"an upload that breaks off", func(w *wire) {
		c, err := w.dial(w.t.Context())
		require.NoError(w.t, err)
		fmt.Fprintf(c, "POST /1.0/instances/%s/files?path=/tmp/half HTTP/1.1\r\nHost: lxd\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\n%s",
			w.instance, strings.Repeat("x", 300))
		c.Close()
		until(w.t, func() bool {
			_, b := w.get("GET", "/1.0/instances/INSTANCE/files?path=/tmp/half", "", "")
			return len(b) == 300
		})
	}, nil},
}
