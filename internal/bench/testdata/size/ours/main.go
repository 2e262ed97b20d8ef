// A program that embeds the transport.
package main

import (
	"context"
	"fmt"

	lxd "github.com/canonical/lxd/client"
	"github.com/lxdtransport/transport"
)

func main() {
	server, err := lxd.ConnectLXDUnix("", nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	host, err := transport.NewLXD(server, "c1", nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer host.Close()
	fmt.Println(host.Exec(context.Background(), transport.Command{Args: []string{"echo", "hello, world"}}))
}
