// A program that imports only the official client.
package main

import (
	"fmt"

	lxd "github.com/canonical/lxd/client"
)

func main() {
	server, err := lxd.ConnectLXDUnix("", nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(server.GetInstanceNames(""))
}
