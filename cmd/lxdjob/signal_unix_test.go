//go:build unix

package main

import (
	"bytes"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lxdtransport/transport/internal/reallxd"
)

// TestSignals ends runs by signals while a command runs: the status says so, the handler does not run, and no host is left.
func TestSignals(t *testing.T) {
	t.Parallel()
	file := write(t, strings.Replace(strings.Replace(ok, "echo 'it runs'", "echo 'it runs'; exec sleep 1000", 1), "{stage: a}", "{stage: a, on_failure: b}", 1))
	data, err := os.ReadFile(file)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(file, bytes.Replace(data, []byte("stages: ["), []byte("stages: [{name: b, steps: [{action: log, message: handled}]}, "), 1), 0o600))
	places := map[string]func(t *testing.T) string{
		"fake": func(t *testing.T) string {
			s := server(t)
			s.Start()
			return s.Socket
		},
		"LXD": func(t *testing.T) string {
			reallxd.Need(t)
			return os.Getenv("TRANSPORT_LXD_SOCKET")
		},
	}
	image := os.Getenv("TRANSPORT_LXD_IMAGE")
	if image == "" {
		image = "any"
	}
	for name, place := range places {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
			t.Run(name+" "+sig.String(), func(t *testing.T) {
				t.Parallel()
				socket := place(t)
				cmd := program(t, "-json", "-remote=unix://"+socket, "-image="+image, file)
				var stderr bytes.Buffer
				cmd.Stderr = &stderr
				stdout, err := cmd.StdoutPipe()
				require.NoError(t, err)
				require.NoError(t, cmd.Start())
				host, last, sent := "", "", 0
				decode(t, stdout, func(l line) {
					require.NotEqual(t, "handled", l.Line)
					if l.Host != "" {
						host, last = l.Host, l.Event
					}
					if l.Line == "it runs" {
						sent++
						require.NoError(t, cmd.Process.Signal(sig))
					}
				})
				require.Error(t, cmd.Wait())
				require.Equal(t, 1, sent)
				require.Equal(t, 128+int(sig), cmd.ProcessState.ExitCode(), stderr.String())
				require.Equal(t, "failed", last)
				require.Contains(t, stderr.String(), "stopping, and releasing the host")
				gone(t, socket, host)
			})
		}
	}
}

// TestNobodyReads closes the pipe that the log goes to. The host is released all the same.
func TestNobodyReads(t *testing.T) {
	t.Parallel()
	s := server(t)
	s.Start()
	cmd := program(t, "-remote=unix://"+s.Socket, "-image=any", write(t, strings.Replace(ok, "echo 'it runs'", "while echo 'it runs'; do :; done", 1)))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = stdout.Read(make([]byte, 1))
	require.NoError(t, err)
	require.NoError(t, stdout.Close())
	require.Error(t, cmd.Wait())
	require.NotEqual(t, 0, cmd.ProcessState.ExitCode())
	require.Empty(t, instances(t, s.Socket), stderr.String())
}
