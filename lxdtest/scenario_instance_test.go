package lxdtest_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/stretchr/testify/require"
)

// instanceScenarios are about instances that come and go.
var instanceScenarios = []scenario{
	{"states of an instance", func(w *wire) {
		// The instance of its own is called as the other one, with an x.
		own := "/1.0/instances/INSTANCEx"
		image := w.image
		result := func(b []byte) {
			s := w.session(b)
			_, b = w.get("GET", "/1.0/operations/"+s.id+"/wait", "", "")
			w.note("%v", strings.Contains(string(b), `"status":"Success"`))
		}
		action := func(a string) {
			// The answer is not noted: an operation that fails can have done so already.
			_, b := w.get("PUT", own+"/state", "", `{"action":"`+a+`","force":true}`)
			result(b)
			_, b = w.get("GET", own+"/state", "", "")
			w.note("%s", statusOf(b))
		}
		defer func() {
			w.get("PUT", own+"/state", "", `{"action":"stop","force":true}`)
			w.get("DELETE", own, "", "")
		}()
		w.do("GET", own, "", "")
		w.do("POST", "/1.0/instances", "", `{"name":"INSTANCEx","source":{"type":"nonsense"}}`)
		w.do("POST", "/1.0/instances", "", `{"name":"a_b","source":{"type":"image","alias":"`+image+`"}}`)
		w.do("POST", "/1.0/instances", "", `{"name":"x","source":{"type":"image","alias":"no-such-alias"}}`)
		result(w.do("POST", "/1.0/instances", "", `{"name":"`+w.instance+`x","config":{"user.a":"b"},"source":{"type":"image","alias":"`+image+`"}}`))
		w.do("POST", own+"/exec", "", `{"command":["true"]}`)
		w.do("GET", own+"/files?path=/no/such/file", "", "")
		action("start")
		action("start")
		w.do("POST", own+"/exec", "", `{"command":["true"]}`)
		w.do("DELETE", own, "", "")
		action("freeze")
		w.do("POST", own+"/exec", "", `{"command":["true"]}`)
		action("unfreeze")
		w.do("PUT", own+"/state", "", `{"action":"nonsense"}`)
		action("stop")
		action("stop")
		result(w.do("DELETE", own, "", ""))
		w.do("DELETE", own, "", "")
	}, []string{"404", "400", "Instance is not running", "Running", "Instance is running", "Frozen", "Instance is frozen", "Running", "Stopped"}},

	{"copies of an instance", func(w *wire) {
		model, copied := "/1.0/instances/INSTANCEm", "/1.0/instances/INSTANCEn"
		image := w.image
		wait := func(b []byte) {
			_, b = w.get("GET", "/1.0/operations/"+w.session(b).id+"/wait", "", "")
			var a struct{ Metadata struct{ Status, Err string } }
			_ = json.Unmarshal(b, &a)
			w.note("%s %s", a.Metadata.Status, a.Metadata.Err)
		}
		_, b := w.get("POST", "/1.0/instances", "", `{"name":"`+w.instance+`m","config":{"user.a":"1","user.b":"2"},"source":{"type":"image","alias":"`+image+`"}}`)
		wait(b)
		defer func() {
			w.get("DELETE", model, "", "")
			w.get("DELETE", copied, "", "")
		}()
		until(w.t, func() bool { // the real server's helper now and then does not start at once
			res, _ := w.get("POST", model+"/files?path=/root/kept", octets+"X-LXD-mode: 0640", "content\n")
			return res.StatusCode == 200
		})
		w.do("POST", "/1.0/instances?target=m", "", `{"name":"INSTANCEn","source":{"type":"copy"}}`)
		w.do("POST", "/1.0/instances", "", `{"name":"INSTANCEn","source":{"type":"copy"}}`)
		w.do("POST", "/1.0/instances", "", `{"name":"INSTANCEn","source":{"type":"copy","source":"no-such-instance"}}`)
		post := func(more string) []byte {
			_, b := w.get("POST", "/1.0/instances", "", `{"name":"`+w.instance+`n",`+more+`"source":{"type":"copy","source":"`+w.instance+`m"}}`)
			var a struct {
				Metadata struct{ Resources map[string][]string }
			}
			_ = json.Unmarshal(b, &a)
			w.note("%v", strings.ReplaceAll(fmt.Sprint(a.Metadata.Resources), w.instance, "INSTANCE"))
			return b
		}
		wait(post("")) // no profiles are none here, and so no disk
		wait(post(`"profiles":["default"],"ephemeral":true,"config":{"user.b":"3","user.c":"4"},`))
		_, b = w.get("GET", copied, "", "")
		var a struct {
			Metadata struct {
				Config    map[string]string
				Ephemeral bool
				Status    string
			}
		}
		require.NoError(w.t, json.Unmarshal(b, &a))
		w.note("%q %q %q %v %s", a.Metadata.Config["user.a"], a.Metadata.Config["user.b"], a.Metadata.Config["user.c"], a.Metadata.Ephemeral, a.Metadata.Status)
		w.do("PATCH", copied, "", `{"config":{"user.a":"","user.c":"5"}}`)
		_, b = w.get("GET", copied, "", "")
		a.Metadata.Config = nil
		require.NoError(w.t, json.Unmarshal(b, &a))
		_, has := a.Metadata.Config["user.a"]
		w.note("%v %q %q", has, a.Metadata.Config["user.b"], a.Metadata.Config["user.c"])
		until(w.t, func() bool { // as above
			var res *http.Response
			res, b = w.get("GET", copied+"/files?path=/root/kept", "", "")
			return res.StatusCode != 500
		})
		w.note("%s", b)
	}, []string{"clustered", "400", "404", "no-such-instance", "Failure", "No root device", "Success", `"1" "3" "4" true Stopped`, `false "3" "5"`, "content"}},

	{"an exec in an instance that is stopped meanwhile", func(w *wire) {
		own := ownInstance(w, "y", "")
		_, b := w.get("POST", own+"/exec", "", ws(`["sh","-c","echo ready; exec sleep 20"]`))
		s := w.session(b).all()
		s.expect("1", "ready\n")
		w.settle("PUT", own+"/state", `{"action":"stop","force":true}`)
		s.finish()
	}, []string{`"return":137`, `1: BINARY, TEXT "", END "ready\n"`}},

	{"a signal in an instance that is frozen", func(w *wire) {
		own := ownInstance(w, "f", `"environment.ONE":"1","environment.TWO":"2","environment.LANG":"3"`)
		_, b := w.get("POST", own+"/exec", "", ws(`["sh","-c","echo $ONE $TWO $LANG; exec sleep 20"]`, `,"environment":{"TWO":"of the request"}`))
		s := w.session(b).all()
		s.expect("1", "\n")
		w.settle("PUT", own+"/state", `{"action":"freeze"}`)
		w.do("GET", own+"/files?path=/no/such/file", "", "")
		s.text("control", `{"command":"signal","signal":15}`)
		s.result("?timeout=1")
		w.settle("PUT", own+"/state", `{"action":"unfreeze"}`)
		s.finish()
	}, []string{"404", `"status":"Running"`, `"return":143`, `1: BINARY, TEXT "", END "1 of the request 3\n"`}},

	{"an exec in an instance that is restarted meanwhile", func(w *wire) {
		own := ownInstance(w, "r", "")
		_, b := w.get("POST", own+"/exec", "", ws(`["sh","-c","echo ready; exec sleep 20"]`))
		s := w.session(b).all()
		s.expect("1", "ready\n")
		w.settle("PUT", own+"/state", `{"action":"restart","force":true}`)
		s.finish()
	}, []string{`"return":137`, `1: BINARY, TEXT "", END "ready\n"`}},

	{"files of instances that do not run", func(w *wire) {
		own := ownInstance(w, "o", "")
		for _, action := range []string{"freeze", "unfreeze", "stop"} {
			w.settle("PUT", own+"/state", `{"action":"`+action+`","force":true}`)
			if action == "unfreeze" {
				continue
			}
			file := own + "/files?path=/tmp/" + action
			w.do("POST", file, octets+"X-LXD-mode: 0640\nX-LXD-uid: 5", action)
			w.do("GET", file, "", "")
			w.do("POST", own+"/files?path=/tmp/dir-"+action, "X-LXD-type: directory", "")
			w.do("POST", own+"/files?path=/tmp/out-"+action, "X-LXD-type: symlink\n"+octets, "../../../../../../../../../../tmp")
			w.do("GET", own+"/files?path=/tmp/out-"+action+"/"+action, "", "")
			w.do("DELETE", file, "", "")
			w.do("GET", file, "", "")
		}
		w.settle("PUT", own+"/state", `{"action":"start"}`)
	}, []string{"X-Lxd-Mode: 0640", "freeze", "200", "freeze", "200", "404", "X-Lxd-Mode: 0640", "stop", "200", "stop", "200", "404"}},

	{"an open SFTP session keeps an instance from being stopped", func(w *wire) {
		own := ownInstance(w, "s", "")
		x := w.of(w.instance + "s").sftp()
		x.send(1, uint32(3))
		x.receive()
		_, b := w.get("PUT", own+"/state", "", `{"action":"stop","force":true}`)
		s := w.session(b)
		_, b = w.get("GET", "/1.0/operations/"+s.id+"/wait?timeout=1", "", "")
		w.note("%v", strings.Contains(string(b), `"status":"Running"`))
		x.c.Close()
		_, b = w.get("GET", "/1.0/operations/"+s.id+"/wait", "", "")
		w.note("%v", strings.Contains(string(b), `"status":"Success"`))
	}, []string{"true", "true"}},
}

// ownInstance makes and starts an instance for one conversation. It is called as the other one, with a suffix.
func ownInstance(w *wire, suffix, config string) string {
	own := "/1.0/instances/INSTANCE" + suffix
	w.settle("POST", "/1.0/instances", `{"name":"`+w.instance+suffix+`","config":{`+config+`},"source":{"type":"image","alias":"`+w.image+`"}}`)
	w.t.Cleanup(func() {
		w.settle("PUT", own+"/state", `{"action":"stop","force":true}`)
		w.settle("DELETE", own, "")
	})
	w.settle("PUT", own+"/state", `{"action":"start"}`)
	return own
}

// settle makes a request that is answered with an operation, and waits for its end.
func (w *wire) settle(method, path, body string) {
	_, b := w.get(method, path, "", body)
	w.get("GET", "/1.0/operations/"+w.session(b).id+"/wait", "", "")
}
