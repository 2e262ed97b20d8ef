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
	Check func(host transport.Transport, patience, soon time.Duration) error
}

// Rows are all cases.
func Rows() []Row {
	var all []Row
	for _, r := range rows() {
		all = append(all, Row{r.name, r.why, r.needs, func(host transport.Transport, patience, soon time.Duration) error {
			return check(r, host, limits{patience, soon})
		}})
	}
	return all
}
