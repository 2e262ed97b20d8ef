package transport_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/lxdtransport/transport/lxdtest"
)

// The fault matrix: what happens × where it happens × to whom × on which server. Cells are made by loops; what has to come of one is
// said by a rule, not by a list. Cells that make no sense are left out, with the reason.

// harm is what happens.
type harm struct {
	name   string
	class  string // delayed, refused, page, dropped, garbage, stalled, died
	status int    // refused
	do     lxdtest.Action
}

// spot is where it happens.
type spot struct {
	route  lxdtest.Route // "wait+operation" for both, "instance" for the question that explains a refusal
	socket string
	name   string // asked, acted, middle, ping, first, mark, marked, receive, exit, final, in, out
	moment lxdtest.Moment
	once   bool // for requests that may be repeated
	nth    int  // of SFTP packets
}

func (p spot) String() string {
	parts := []string{string(p.route)}
	if p.socket != "" {
		parts = []string{"socket " + p.socket}
	}
	parts = append(parts, p.name)
	if p.nth > 0 {
		parts = append(parts, fmt.Sprint(p.nth))
	}
	if p.once {
		parts = append(parts, "once")
	}
	return strings.Join(parts, " ")
}

const (
	both       lxdtest.Route = "wait+operation"
	explaining lxdtest.Route = "instance"

	shortly = 60 * time.Millisecond
)

// endless writes the beginning of an answer and then goes on until the client has had enough.
func endless(begin, more string) lxdtest.Action {
	return func(p *lxdtest.Point) lxdtest.Verdict {
		p.WriteRaw([]byte(begin))
		rest := []byte(strings.Repeat(more, 64<<10/len(more)))
		for range 320 { // 20 MiB: more than any bound of ours
			select {
			case <-p.Done():
				return lxdtest.Cut
			default:
				p.WriteRaw(rest)
			}
		}
		return lxdtest.Cut
	}
}

func cutAfter(b ...byte) lxdtest.Action { return lxdtest.All(lxdtest.Raw(b), lxdtest.Drop) }

// harms are those that can happen at a spot.
func harms(p spot) []harm {
	list := []harm{
		{name: "delayed", class: "delayed", do: lxdtest.Delay(shortly)},
		{name: "dropped", class: "dropped", do: lxdtest.Drop},
		{name: "reset", class: "dropped", do: lxdtest.Reset},
		{name: "stalled", class: "stalled", do: lxdtest.Stall},
		{name: "died", class: "died", do: lxdtest.Die},
	}
	if p.route == lxdtest.RouteExec && p.moment != lxdtest.OnRequest && p.moment != lxdtest.OnResponse && p.moment != lxdtest.OnSend {
		return slices.DeleteFunc(list, func(h harm) bool { return h.class == "dropped" }) // a process has no connection
	}
	add := func(class, name string, do lxdtest.Action) {
		list = append(list, harm{name: name, class: class, do: do})
	}
	switch p.name {
	case "asked", "acted":
		if p.socket == "" && p.route != lxdtest.RouteSFTP || p.name == "asked" { // an upgrade is its own answer
			for _, status := range []int{403, 404, 500, 503} {
				list = append(list, harm{fmt.Sprint("refused ", status), "refused", status, lxdtest.Refuse(status, "no "+http.StatusText(status))})
			}
			add("page", "a proxy's page", lxdtest.Respond(502, "text/html", "<html>Bad Gateway"))
			add("page", "an empty answer", lxdtest.Respond(200, "application/json", ""))
			add("page", "JSON of another shape", lxdtest.Respond(200, "application/json", `{"type":"sync","metadata":[{"id":7}]}`))
			add("page", "not JSON", lxdtest.Respond(202, "application/json", "\xff\x00{"))
			add("page", "truncated JSON", lxdtest.Respond(202, "application/json", `{"type":"async","status":"Operation created","metadata":{"id":"x","meta`))
			add("page", "a redirect", func(p *lxdtest.Point) lxdtest.Verdict {
				p.Answer(307, http.Header{"Location": {"/1.0"}}, nil)
				return lxdtest.Skip
			})
		}
		add("dropped", "garbage", cutAfter([]byte("\x16\x03\x01\xff\x00 this is no HTTP\r\n\r\n")...))
		add("dropped", "endless header", endless("HTTP/1.1 200 OK\r\n", "X-Long: "+strings.Repeat("x", 4000)+"\r\n"))
		add("dropped", "endless body", endless("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{", strings.Repeat(" ", 4096)))
		add("dropped", "absurd length", lxdtest.All(lxdtest.Raw([]byte("HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775807\r\n\r\n{")), lxdtest.Drop))
	case "middle", "first", "ping", "mark", "marked", "receive":
		if p.socket == "" {
			add("dropped", "garbage", cutAfter([]byte("\r\n\r\n\x00\xff")...))
			break
		}
		add("garbage", "garbage frame", lxdtest.GarbageFrame)
		add("garbage", "oversized frame", cutAfter(0x82, 127, 0, 0, 1, 0, 0, 0, 0, 0))
		add("garbage", "negative length", cutAfter(0x82, 127, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff))
		add("garbage", "oversized ping", cutAfter(0x89, 126, 0xff, 0xff))
		add("garbage", "truncated frame", cutAfter(0x82))
		add("garbage", "text that is not empty", cutAfter(0x81, 1, 'x'))
		add("garbage", "close frame", cutAfter(0x88, 2, 3, 232))
		add("garbage", "masked frame", cutAfter(0x82, 0x81, 1, 2, 3, 4, 'x'))
		add("garbage", "continuation of nothing", cutAfter(0x80, 0))
	case "out":
		change := func(name string, f func([]byte) []byte) {
			add("garbage", name, func(p *lxdtest.Point) lxdtest.Verdict {
				p.WriteRaw(f(slices.Clone(p.Data)))
				return lxdtest.Cut
			})
		}
		change("truncated packet", func(b []byte) []byte { return b[:len(b)-1] })
		change("oversized packet", func(b []byte) []byte { b[0] = 0xff; return b })
		change("empty packet", func([]byte) []byte { return []byte{0, 0, 0, 0} })
		change("garbage packet", func(b []byte) []byte {
			for i := 4; i < len(b); i++ {
				b[i] ^= 0xa5
			}
			return b
		})
	}
	return list
}

// spots are all places.
func spots() (list []spot) {
	request := func(route lxdtest.Route, once ...bool) {
		for _, o := range once {
			list = append(list,
				spot{route: route, name: "asked", moment: lxdtest.OnRequest, once: o})
			if route != lxdtest.RouteSFTP { // of which the packets have spots of their own
				list = append(list,
					spot{route: route, name: "acted", moment: lxdtest.OnResponse, once: o},
					spot{route: route, name: "middle", moment: lxdtest.OnSend, once: o})
			}
		}
	}
	request(lxdtest.RouteExec, false)
	request(lxdtest.RouteWait, true, false)
	request(lxdtest.RouteOperation, true, false)
	request(both, true, false)
	request(explaining, false)
	request(lxdtest.RouteSFTP, false)
	list = append(list,
		spot{route: lxdtest.RouteExec, name: "start", moment: lxdtest.OnStart},
		spot{route: lxdtest.RouteExec, name: "exit", moment: lxdtest.OnExit},
		spot{route: lxdtest.RouteExec, name: "final", moment: lxdtest.OnFinal})
	for _, s := range []string{"0", "1", "2", "control"} {
		for _, m := range []struct {
			name   string
			moment lxdtest.Moment
		}{
			{"asked", lxdtest.OnRequest}, {"acted", lxdtest.OnResponse}, {"ping", lxdtest.OnPing}, {"first", lxdtest.OnSend}, {"middle", lxdtest.OnSend},
			{"mark", lxdtest.OnMark}, {"marked", lxdtest.OnMarked}, {"receive", lxdtest.OnReceive},
		} {
			list = append(list, spot{route: lxdtest.RouteWebsocket, socket: s, name: m.name, moment: m.moment})
		}
	}
	for n := 1; n <= 11; n++ {
		list = append(list,
			spot{route: lxdtest.RouteSFTP, name: "in", moment: lxdtest.OnReceive, nth: n},
			spot{route: lxdtest.RouteSFTP, name: "out", moment: lxdtest.OnSend, nth: n})
	}
	return list
}

// cell is one of the matrix.
type cell struct {
	spot spot
	harm harm
	work *workload
	on   *flavour
}

func (c cell) String() string {
	return fmt.Sprintf("%v/%s/%s/%s", c.spot, c.harm.name, c.work.name, c.on.name)
}

// cells are all that make sense. Versions and ways take turns, unless all are asked for.
func cells(all bool) (list []cell, left map[string]int) {
	left = map[string]int{}
	turn := 0
	for _, w := range workloads() {
		for _, p := range spots() {
			classes := map[string]bool{}
			for _, h := range harms(p) {
				if w.kind == aTree && classes[h.class] {
					left["a tree is a command with much to do: one harm of each class is enough"]++
					continue
				}
				classes[h.class] = true
				var why string
				for i, done := 0, false; i < len(flavours()) && (all || !done); i++ {
					c := cell{p, h, w, flavours()[(turn+i)%len(flavours())]}
					if why = c.senseless(); why == "" {
						list = append(list, c)
						done = true
					} else {
						left[why]++
					}
				}
				turn++
			}
		}
	}
	return list, left
}

// senseless says why a cell is left out, or "".
func (c cell) senseless() string {
	p, w := c.spot, c.work
	files := w.kind == aFile
	switch {
	case files && p.route != lxdtest.RouteSFTP && p.route != explaining:
		return "files go over SFTP, not through commands"
	case !files && p.route == lxdtest.RouteSFTP:
		return "commands and tar need no SFTP"
	case files && c.harm.status == 404:
		return "the other way of LXD before 4.24 needs commands that have the instance's root"
	case p.nth > w.packets:
		return "there are not so many packets"
	case p.route == lxdtest.RouteOperation && (w.code != 127 || c.on.version.Wait != lxdtest.WaitErrorBody):
		return "nobody asks for an operation that /wait has told of"
	case strings.HasPrefix(c.harm.name, "endless") && (w.name != "small" || p.name != "asked" || p.once):
		return "how much of an answer is read depends on nothing else"
	case (p.route == lxdtest.RouteWait || p.route == both || p.route == explaining) && (w.name == "stdin flood" || w.name == "tty" || w.name == "flood" || w.upload && w.kind == aTree):
		return "these requests are the same for all commands, but for their ends"
	case w.tty && (p.socket == "1" || p.socket == "2"):
		return "a terminal has one socket"
	case p.socket == "" && p.route != lxdtest.RouteWebsocket:
		return ""
	case p.name == "ping" && c.on.unix && !c.on.version.PingOnUnix:
		return "this version sends no pings over unix sockets"
	case (p.name == "first" || p.name == "middle") && len(c.sent()) == 0:
		return "nothing is sent there"
	case (p.name == "first" || p.name == "middle") && p.socket == "1" && w.kind == aTree && w.upload && p.name == "middle":
		return "the answer is one line"
	case (p.name == "mark" || p.name == "marked") && (p.socket == "control" || p.socket == "0" && !w.tty):
		return "these sockets have no mark"
	case p.name == "receive" && p.socket == "control" && !w.cancel:
		return "nobody says anything on control"
	case p.name == "receive" && p.socket == "0" && len(w.stdin) == 0 && !(w.kind == aTree && w.upload):
		return "there is no input"
	case p.name == "receive" && (p.socket == "1" || p.socket == "2"):
		return "nothing is ever said on stdout and stderr, which is tested elsewhere"
	}
	return ""
}

// sent is what the workload sends on the spot's socket.
func (c cell) sent() []byte {
	switch {
	case c.spot.socket == "1" || c.spot.socket == "0" && c.work.tty:
		return c.work.stdout
	case c.spot.socket == "2":
		return c.work.stderr
	}
	return nil
}

// verdicts is a set of what may come of a cell.
type verdicts uint

const (
	// undisturbed: as without a fault. The command's own status, every byte of output.
	undisturbed verdicts = 1 << iota
	// killed: another status than the command's own, and every byte of what it wrote.
	killed
	// notStarted: ErrNotStarted, and the server has not started it.
	notStarted
	// lost: ErrOutputLost; the status is told if the host has told it.
	lost
	// unknown: it is said that the status is not known.
	unknown
	// failed: a file or tree with an error, untouched or whole.
	failed
)

func (v verdicts) String() string {
	var names []string
	for i, n := range []string{"undisturbed", "killed", "not started", "lost", "unknown", "failed"} {
		if v&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	return strings.Join(names, "|")
}

// rule says what has to come of a cell. For trees and files everything that is not undisturbed is failed; runCell sees to that.
func (c cell) rule() verdicts {
	p, h, w := c.spot, c.harm, c.work
	if p.route == lxdtest.RouteSFTP {
		switch {
		case h.class == "delayed":
			return undisturbed
		case !w.upload && p.nth == w.packets:
			return undisturbed | failed // CLOSE after the last byte: nobody waits for its answer
		}
		return failed
	}
	if p.route == explaining {
		if w.kind == aFile {
			return failed
		}
		return notStarted
	}
	if h.class == "delayed" {
		return undisturbed
	}
	if p.socket != "" {
		return c.socketRule()
	}
	switch {
	case p.name == "start" && h.class == "died", p.name == "exit" && h.class == "died", p.name == "final" && h.class == "died":
		return unknown
	case p.name == "start" || p.name == "exit": // stalled. The server says that the command runs; only ctx ends that
		return lost | unknown
	case p.name == "final":
		return unknown
	case p.route == lxdtest.RouteExec:
		return notStarted // whatever became of the request: nobody connects the sockets
	case h.class == "died":
		return unknown
	case p.route == lxdtest.RouteWait: // and the operation itself answers
		return undisturbed
	case h.status == 404 && p.once: // as below, if it was asked that often
		return unknown | undisturbed
	case h.status == 404: // LXD does not know the operation any more: it will not know it again
		return unknown
	case p.once && h.class == "stalled": // twice, for as long as Liveness
		return undisturbed | unknown
	case p.once:
		return undisturbed
	}
	return unknown
}

// socketRule is the rule for what happens to a socket.
func (c cell) socketRule() verdicts {
	p, h, w := c.spot, c.harm, c.work
	data := p.socket == "1" || p.socket == "2" || w.tty && p.socket == "0"
	switch p.name {
	case "asked":
		if h.class == "died" {
			return notStarted | unknown // who should tell that it did not start?
		}
		return notStarted
	case "acted": // if the server has the socket, the command may run
		return notStarted | lost | unknown
	}
	if h.class == "died" && p.name == "ping" { // the first ping comes before all sockets are there
		return notStarted | unknown
	}
	if h.class == "died" {
		return unknown
	}
	switch {
	case h.class == "stalled" && p.name == "ping": // no pings are no reason for anything
		return undisturbed
	case data && p.name == "marked" && h.class == "stalled": // the operation stays open
		return unknown
	case data && p.name == "marked": // the mark is enough
		return undisturbed
	case data && p.name == "ping": // the first one comes before all sockets are there
		return lost
	case data && p.name != "receive":
		return lost | unknown&c.stalled()
	case p.socket == "control" && h.class == "dropped": // LXD kills the command then; it may have been faster
		return killed | undisturbed
	case p.socket == "control" && h.class == "stalled": // a signal that does not arrive: KILL follows
		return killed | unknown // unless the server does not see the socket's end, either
	case p.socket == "control": // what nobody understands counts as its end
		return killed | undisturbed | lost | unknown
	case h.class == "stalled": // stdin: the command waits for it until ctx ends
		return undisturbed | killed | lost
	}
	return undisturbed // what comes on stdin's socket is of no interest, and its end is that of the input
}

func (c cell) stalled() verdicts {
	if c.harm.class == "stalled" {
		return ^verdicts(0)
	}
	return 0
}

// needsContext reports whether nothing but the end of ctx can end the cell: the server says that the command runs.
func (c cell) needsContext() bool {
	if c.work.cancel && (c.spot.socket == "1" || c.work.tty) && c.harm.class != "delayed" {
		return true // the output that ends it may not come
	}
	if c.harm.class != "stalled" {
		return false
	}
	p, w := c.spot, c.work
	switch {
	case p.nth > 0:
		return true // files have no other bound than ctx
	case p.name == "start" || p.name == "exit":
		return true
	case p.socket == "0" && p.name == "receive":
		return true
	case p.name == "first" || p.name == "middle":
		return p.socket != "" && (w.cancel || w.kind == aTree || len(c.sent()) > 32<<10)
	}
	return false
}

// cutsInput reports whether the command sees an early end of its input, and takes it for the whole: LXD tells nobody.
func (c cell) cutsInput() bool {
	return c.spot.socket == "0" && !c.work.tty && (c.spot.name == "ping" || c.spot.name == "receive") && c.harm.class != "delayed"
}
