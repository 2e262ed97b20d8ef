//go:build unix

package transporttest

import (
	"time"

	"github.com/lxdtransport/transport"
)

// Row is a case as the suite's own tests see it.
type Row struct {
	Name  string
	Why   string
	Needs []Capability
	Check func(new func() transport.Transport, patience, soon time.Duration) error
}

// Rows are all cases.
func Rows() []Row {
	var all []Row
	for _, r := range rows() {
		all = append(all, Row{r.name, r.why, r.needs, func(new func() transport.Transport, patience, soon time.Duration) error {
			label, inLabel := newLabel()
			var hosts []transport.Transport
			inLabel(func() {
				for range r.hosts() {
					hosts = append(hosts, new())
				}
			})
			if err := check(r, hosts, limits{patience, soon}); err != nil {
				return err
			}
			return noneLeft(label, soon, leftByNew)
		}})
	}
	return all
}

// Excused is whether a case that failed so is skipped.
var Excused = excused
