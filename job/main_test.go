package job

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/lxdtransport/transport/internal/reallxd"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := reallxd.CleanUp(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}
