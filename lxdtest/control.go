package lxdtest

import (
	"encoding/json"
	"strconv"
)

// A controlMessage is what a client says on the control socket.
type controlMessage struct {
	Command string            `json:"command"`
	Args    map[string]string `json:"args"`
	Signal  int               `json:"signal"`
}

// obey reads the control socket for as long as the process lives. What the server
// does not understand it drops without a word. When the client hangs up, the process is killed.
func (x *execution) obey(p *Process) {
	select {
	case <-x.control:
	case <-p.exited:
		return
	case <-x.gone:
		return
	}
	k := x.socket("control")
	if max := x.s.Version.ControlMax; max > 0 {
		k.ws.SetReadLimit(max)
	}
	for {
		_, data, err := k.ws.ReadMessage()
		if err != nil {
			x.kill(p)
			return
		}
		var heard []byte
		if err := k.in.pass(OnReceive, data, func(b []byte) error { heard = append(heard, b...); return nil }); err != nil {
			k.close()
			x.kill(p)
			return
		}
		var m controlMessage
		if json.Unmarshal(heard, &m) != nil {
			continue
		}
		switch m.Command {
		case "signal":
			p.deliver(m.Signal)
		case "window-resize":
			cols, err1 := strconv.Atoi(m.Args["width"])
			rows, err2 := strconv.Atoi(m.Args["height"])
			if err1 == nil && err2 == nil && p.TTY {
				p.setSize(Size{cols, rows})
			}
		}
	}
}
