package transport

import (
	"context"
	"net"
)

// NoReaping keeps a transport from running its second command after one that was cancelled, where a test looks at the first.
func NoReaping(t *LXD) {
	t.reaper.run = func(context.Context, []string) (map[string]*reaped, error) { return nil, nil }
}

// WrapSockets has a test look at what goes over the sockets.
func WrapSockets(t *LXD, wrap func(net.Conn) net.Conn) {
	for _, dial := range []*func(context.Context, string, string) (net.Conn, error){&t.rest.dialer.NetDialContext, &t.rest.dialer.NetDialTLSContext} {
		if inner := *dial; inner != nil {
			*dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				conn, err := inner(ctx, network, addr)
				if err != nil {
					return nil, err
				}
				return wrap(conn), nil
			}
		}
	}
}

// Gone asks an instance whether a command has ended, by its mark, which is in its environment.
func Gone(ctx context.Context, t *LXD, mark string) bool { return t.gone(ctx, mark) }

// MarkPrefix begins the variables in which the marks are.
const MarkPrefix = markPrefix
