package lxdtest_test

import (
	"encoding/json"
	"time"

	"github.com/gorilla/websocket"
)

// requestScenarios are about requests, operations and events.
var requestScenarios = []scenario{
	{"without sockets", func(w *wire) {
		b := w.do("POST", "/1.0/instances/INSTANCE/exec", "", `{"command":["sh","-c","cat; echo out; exit 3"]}`)
		s := w.session(b)
		s.result()
		w.do("GET", "/1.0/operations/"+s.id, "", "")
		w.do("GET", "/1.0/operations/"+s.id+"/websocket?secret=x", "", "")
		w.do("DELETE", "/1.0/operations/"+s.id, "", "")
	}, []string{"202", `"class":"task"`, `"metadata":null`, `{"return":3}`, `{"return":3}`, "500", "Only websocket operations can be connected", "400", "Only running operations can be cancelled"}},

	{"recorded output", func(w *wire) {
		s := w.exec(`{"command":["sh","-c","echo out; echo err >&2"],"record-output":true}`)
		s.result()
		for _, n := range []string{"stdout", "stderr"} {
			url := "/1.0/instances/INSTANCE/logs/exec_" + s.id + "." + n
			w.do("GET", url, "", "")
			w.do("DELETE", url, "", "")
			res, _ := w.get("GET", url, "", "")
			w.note("deleted: %d", res.StatusCode)
		}
	}, []string{`"output":{"1":"/1.0/instances/INSTANCE/logs/exec_ID.stdout","2":"/1.0/instances/INSTANCE/logs/exec_ID.stderr"},"return":0`, "out", "{}", "500", "err", "{}"}},

	{"waiting with a time-out", func(w *wire) {
		s, end := w.waiting("wait")
		s.result("?timeout=0")
		s.result("?timeout=1")
		end()
		s.result("?timeout=nonsense")
		s.result("?timeout=-1&project=nonsense")
		w.do("GET", "/1.0/operations/nonsense/wait", "", "")
	}, []string{`"status":"Running"`, `"status":"Running"`, `500`, `strconv.Atoi: parsing \"nonsense\": invalid syntax`, `"status":"Success"`, "404", "Operation not found"}},

	{"an operation vanishes", func(w *wire) {
		s := w.shell("exit 0").all()
		s.finish()
		until(w.t, func() bool { status, _, _ := s.state(); return status == "" })
		s.result()
		w.do("GET", "/1.0/operations/"+s.id, "", "")
		s.dial("1")
		w.do("DELETE", "/1.0/operations/"+s.id, "", "")
	}, []string{"404", "Operation not found", "404", "dial 1: 404", "404"}},

	{"a running exec cannot be cancelled", func(w *wire) {
		s := w.shell("cat").all()
		w.do("DELETE", "/1.0/operations/"+s.id, "", "")
		s.text("0", "")
		s.finish()
		s, end := w.waiting("cancel")
		w.do("DELETE", "/1.0/operations/"+s.id, "", "")
		end()
		s.result()
	}, []string{"400", "This operation can't be cancelled", `"return":0`, "400", "This operation can't be cancelled", `"return":0`}},

	{"the answer to a request with sockets", func(w *wire) {
		s := w.session(w.do("POST", "/1.0/instances/INSTANCE/exec", "", ws(`["true"]`, `,"environment":{"A":"b","LANG":"C"},"record-output":true,"nonsense":1`)))
		w.note("%d secrets", len(s.fds))
		if len(s.fds) > 0 { // newer releases refuse it
			s.all().finish()
		}
		i := w.session(w.do("POST", "/1.0/instances/INSTANCE/exec", "", ws(`["true"]`, `,"interactive":true,"user":5,"group":6,"cwd":"/tmp"`)))
		w.note("%d secrets", len(i.fds))
		i.open("0", "control")
		i.mark("0")
		i.text("0", "")
		i.finish()
	}, []string{"202", "Location: /1.0/operations/ID", `"class":"websocket"`, `"HOME":"/root"`, "4 secrets", "2 secrets"}},

	{"requests that are refused", func(w *wire) {
		for _, body := range []string{"", "{", "[]", `{"command":"x"}`, `{"user":-1}`, `{"user":"root"}`, `{"environment":{"a":1}}`, `{"environment":[]}`, `{"interactive":"yes"}`, `{"width":"80"}`} {
			w.do("POST", "/1.0/instances/INSTANCE/exec", "", body)
		}
		for _, path := range []string{"/1.0/instances/nobody/exec", "/1.0/instances/INSTANCE/exec?project=nobody", "/1.0/instances/INSTANCE%2Fsnap/exec", "/1.0/instances/INSTANCE/snap/exec", "/1.0/instances/INSTANCE/nonsense", "/1.0/nonsense", "/2.0"} {
			w.do("POST", path, "", `{"command":["true"]}`)
		}
		w.do("GET", "/1.0/instances/INSTANCE/exec", "", "")
		w.do("PUT", "/1.0/instances/INSTANCE/exec", "", "")
	}, []string{"unexpected end of JSON input", "InstanceExecPost.command of type []string", "404", "Instance not found", "501", "not implemented"}},

	{"recorded output of a terminal", func(w *wire) {
		s := w.session(w.do("POST", "/1.0/instances/INSTANCE/exec", "", `{"command":["sh","-c","echo out; echo err >&2"],"record-output":true,"interactive":true}`))
		s.result()
		for _, n := range []string{"stdout", "stderr"} {
			w.do("GET", "/1.0/instances/INSTANCE/logs/exec_"+s.id+"."+n, "", "")
		}
	}, []string{"202", `"return":0`}},

	{"a terminal without sockets, and one whose output is to be recorded", func(w *wire) {
		w.session(w.do("POST", "/1.0/instances/INSTANCE/exec", "", `{"command":["sh","-c","exit 3"],"interactive":true}`)).result()
		s := w.session(w.do("POST", "/1.0/instances/INSTANCE/exec", "", ws(`["sh","-c","echo hi`+linger+`"]`, `,"interactive":true,"record-output":true`)))
		if len(s.fds) == 0 {
			return // newer releases refuse it
		}
		s.open("0", "control")
		s.mark("0")
		s.text("0", "")
		s.finish()
	}, []string{"202", `"return":3`, "202", `"return":0`, `"hi\r\n"`}},

	{"addresses of old", func(w *wire) {
		w.exec(ws(`["true"]`)).all().finish()
		res, _ := w.get("GET", "/1.0/containers/INSTANCE", "", "")
		w.note("%d", res.StatusCode)
		s := w.session(w.do("POST", "/1.0/containers/INSTANCE/exec", "", `{"command":["true"]}`))
		s.result()
	}, []string{"200", "202"}},

	{"pings", func(w *wire) {
		s := w.shell("cat").all()
		for _, n := range []string{"0", "1", "2", "control"} {
			k := s.sockets[n]
			k.until(w.t, "second ping", func() bool { return len(k.pings) > 1 })
			w.note("%s: pings %q", n, k.pings[:2])
		}
		first := s.sockets["1"]
		apart := first.at[1].Sub(first.at[0])
		w.note("ten seconds apart: %v", 9*time.Second < apart && apart < 15*time.Second)
		s.text("0", "")
		s.finish()
	}, []string{`0: pings ["keepalive" "keepalive"]`, `1: pings ["keepalive" "keepalive"]`, `2: pings ["keepalive" "keepalive"]`, `control: pings ["keepalive" "keepalive"]`, "apart: true"}},

	{"a client's ping", func(w *wire) {
		s := w.shell("cat").all()
		for _, n := range []string{"0", "1", "control"} {
			got := make(chan string, 1)
			s.sockets[n].conn.SetPongHandler(func(p string) error { got <- p; return nil })
			_ = s.sockets[n].conn.WriteControl(websocket.PingMessage, []byte("are you there"), time.Now().Add(patience))
			select {
			case p := <-got:
				w.note("%s: pong %q", n, p)
			case <-time.After(patience):
				w.note("%s: no pong", n)
			}
		}
		if w.socket != "" { // over TCP what is not read resets the connection
			got := make(chan string, 1)
			s.sockets["2"].conn.SetPongHandler(func(p string) error { got <- p; return nil })
			_ = s.sockets["2"].conn.WriteControl(websocket.PingMessage, []byte("are you there"), time.Now().Add(patience))
			defer func() { w.note("2: %d pongs", len(got)) }() // when the connection has ended
		}
		s.text("0", "")
		s.finish()
	}, []string{`0: pong "are you there"`, `1: pong "are you there"`, `control: pong "are you there"`}},

	{"events of an exec", func(w *wire) {
		stop := w.listen("operation,lifecycle", "exit 127")
		s := w.shell("exit 127").all()
		s.result()
		stop(s.id, 5)
	}, []string{`"action":"instance-exec"`, `"status":"Failure"`, `"return":127`, `"status":"Pending"`, `"status":"Running"`, `"status":"Running"`}},

	{"events of a success", func(w *wire) {
		stop := w.listen("operation,lifecycle", "echo a success")
		s := w.shell("echo a success").all()
		s.result()
		stop(s.id, 5)
	}, []string{`"action":"instance-exec"`, `"status":"Pending"`, `"status":"Running"`, `"return":0`, `"status":"Success"`}},

	{"events that do not exist", func(w *wire) {
		w.do("GET", "/1.0/events?type=nonsense", "", "")
		w.do("GET", "/1.0/events", "", "")
	}, []string{"500", `\"nonsense\" isn't a supported event type`, "400"}},
}

// waiting starts a command without sockets that runs until end is called.
func (w *wire) waiting(name string) (s *session, end func()) {
	b, _ := json.Marshal(map[string]any{"command": []string{"sh", "-c", waitFor(name)}})
	return w.exec(string(b)), func() { w.give(name) }
}
