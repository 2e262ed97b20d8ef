package ssh_test

import (
	"context"
	"log"
	"os"
	"time"

	"github.com/lxdtransport/transport"
	"github.com/lxdtransport/transport/ssh"
)

// A build on a host whose key is in ~/.ssh/known_hosts, with a deploy key that is encrypted.
func ExampleDial() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	host, err := ssh.Dial(ctx, "build@build1.example.com:2222", &ssh.Options{
		KeyFiles:   []string{"/etc/ci/deploy_key"},
		Passphrase: func(string) ([]byte, error) { return []byte(os.Getenv("DEPLOY_KEY_PASSPHRASE")), nil },
		Liveness:   20 * time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer host.Close()
	err = host.Exec(ctx, transport.Command{Args: []string{"make", "test"}, Dir: "/src", Stdout: os.Stdout, Stderr: os.Stderr})
	if code, exited := transport.ExitCode(err); exited {
		log.Printf("make exited with status %d", code)
	} else {
		log.Fatal(err)
	}
}
