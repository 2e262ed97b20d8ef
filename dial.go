package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	lxd "github.com/canonical/lxd/client"

	"github.com/lxdtransport/transport/internal/clientconfig"
)

// ErrNoServer: no LXD or Incus listens at a unix socket, or there is no such socket.
var ErrNoServer = errors.New("no server")

// DialLXD returns a transport into an instance of a server that it finds as the lxc command does:
//
//   - "" and "local" are the daemon of this machine: the socket that $LXD_SOCKET or $LXD_DIR names, and nothing else if one of them is set, or that of
//     the snap, or of the package; then, in the same way, Incus's ($INCUS_SOCKET, $INCUS_DIR, /run/incus, /var/lib/incus, and there the socket for
//     restricted users);
//   - a name is looked up among the remotes in the configuration of lxc ($LXD_CONF, ~/.config/lxc, that of the snap), then of incus ($INCUS_CONF,
//     ~/.config/incus), with the certificates, the project and the OIDC token that belong to it;
//   - https://host:port and unix:///path are used as they are.
//
// What opts has wins over what is stored. The server's certificate has to be the one that is stored for the remote, or that opts pins, on
// every connection; where none is stored, it has to come from the authority of the configuration (client.ca: PKI mode), or without that from one that
// the system trusts.
// Nothing is sent before that was checked.
//
// DialLXD asks the server who it is, and whether it trusts us; ctx bounds that only. The errors match [ErrUnauthorized] where it does not.
// They match [ErrNoServer] where this machine has no daemon. That the instance is missing shows at the first use.
func DialLXD(ctx context.Context, remote, instance string, opts *LXDOptions) (*LXD, error) {
	fail := func(err error) (*LXD, error) {
		return nil, fmt.Errorf("transport: LXD instance %q on remote %q: %w", instance, remote, err)
	}
	if err := checkInstance(instance); err != nil {
		return fail(err)
	}
	server, found, err := dial(ctx, remote, opts)
	if err != nil {
		return fail(err)
	}
	t, err := newLXD(server, instance, found)
	if err != nil {
		return fail(err)
	}
	return t, nil
}

// ConnectLXD returns a connection of the official client's to the server that [DialLXD] would find, for what is not the business of
// a transport, such as making instances. The server was found, its certificate is compared and it was asked whether it trusts us
// in the same way, with the same errors. The connection uses the project of opts, or that of the remote; [NewLXD] takes it, but knows the
// other members of a cluster only if it is told. Its own requests are not bound by ctx; Disconnect ends them.
func ConnectLXD(ctx context.Context, remote string, opts *LXDOptions) (lxd.InstanceServer, error) {
	server, found, err := dial(ctx, remote, opts)
	if err != nil {
		return nil, fmt.Errorf("transport: LXD on remote %q: %w", remote, err)
	}
	if found.Project != "" {
		server = server.UseProject(found.Project)
	}
	return server, nil
}

// DialInstance is [DialLXD] with a name as people give it to lxc: "instance", on the default remote of lxc's configuration, or
// "remote:instance".
func DialInstance(ctx context.Context, name string, opts *LXDOptions) (*LXD, error) {
	if remote, instance, ok := strings.Cut(name, ":"); ok {
		return DialLXD(ctx, remote, instance, opts)
	}
	r, err := clientconfig.Find("")
	if err != nil {
		return nil, fmt.Errorf("transport: LXD instance %q: %w", name, err)
	}
	return DialLXD(ctx, r.Name, name, opts)
}

// dial returns a connection to a server that trusts us, and the options with what was found out.
func dial(ctx context.Context, remote string, given *LXDOptions) (lxd.InstanceServer, *LXDOptions, error) {
	opts := new(LXDOptions)
	if given != nil {
		*opts = *given
	}
	if err := opts.check(); err != nil {
		return nil, nil, err
	}
	server, err := dialRemote(ctx, remote, opts)
	if err != nil {
		return nil, nil, err
	}
	return server, opts, nil
}

func dialRemote(ctx context.Context, remote string, opts *LXDOptions) (lxd.InstanceServer, error) {
	switch {
	case remote == "" || remote == "local":
		return dialLocal(ctx, opts)
	case strings.HasPrefix(remote, "unix:"):
		return dialUnix(ctx, remote, opts)
	case strings.HasPrefix(remote, "https://"):
		return dialHTTPS(ctx, &clientconfig.Remote{Addr: remote}, opts)
	case strings.Contains(remote, "://"):
		return nil, errors.New("the address has to begin with https:// or unix://")
	}
	r, err := clientconfig.Find(remote)
	if err != nil {
		return nil, err
	}
	if opts.Project == "" {
		opts.Project = r.Project
	}
	if strings.HasPrefix(r.Addr, "unix:") {
		return dialUnix(ctx, r.Addr, opts)
	}
	return dialHTTPS(ctx, r, opts)
}

// dialUnix dials unix:///path, or what else lxc writes for the local daemon.
func dialUnix(ctx context.Context, addr string, opts *LXDOptions) (lxd.InstanceServer, error) {
	path := strings.TrimPrefix(strings.TrimPrefix(addr, "unix:"), "//")
	if path == "" {
		return dialLocal(ctx, opts)
	}
	return dialSocket(ctx, path, opts)
}

// sockets are where the local daemon may listen. certain says that it is there or nowhere.
func sockets() (paths []string, certain bool) {
	for _, product := range []struct {
		socket, dir string // variables
		dirs, names []string
	}{
		{"LXD_SOCKET", "LXD_DIR", []string{"/var/snap/lxd/common/lxd", "/var/lib/lxd"}, []string{"unix.socket"}},
		{"INCUS_SOCKET", "INCUS_DIR", []string{"/run/incus", "/var/lib/incus"}, []string{"unix.socket", userSocket}},
	} {
		if path := os.Getenv(product.socket); path != "" {
			return []string{path}, true
		}
		if dir := os.Getenv(product.dir); dir != "" {
			paths, certain, product.dirs = nil, true, []string{dir}
		}
		for _, dir := range product.dirs {
			for _, name := range product.names {
				paths = append(paths, filepath.Join(dir, name))
			}
		}
		if certain {
			break
		}
	}
	return paths, certain
}

// userSocket is Incus's for users who may have one project only, which has their number in its name.
const userSocket = "unix.socket.user"

// dialLocal takes the first socket at which a daemon answers that lets us in.
func dialLocal(ctx context.Context, opts *LXDOptions) (lxd.InstanceServer, error) {
	paths, certain := sockets()
	var errs []error
	for _, path := range paths {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) && (!certain || errs != nil) {
			continue
		}
		server, err := dialSocket(ctx, path, opts)
		if err == nil || !errors.Is(err, ErrUnauthorized) && !errors.Is(err, ErrNoServer) {
			return server, err
		}
		errs = append(errs, err)
	}
	if errs == nil {
		return nil, noServer(fmt.Errorf("there is no LXD or Incus on this machine: none of %s exists, and neither LXD_SOCKET nor LXD_DIR names another place", strings.Join(paths, ", ")))
	}
	return nil, errors.Join(errs...)
}

func dialSocket(ctx context.Context, path string, opts *LXDOptions) (lxd.InstanceServer, error) {
	server, err := lxd.ConnectLXDUnixWithContext(context.WithoutCancel(ctx), path, &lxd.ConnectionArgs{SkipGetServer: true})
	if err != nil {
		return nil, err
	}
	server, err = greet(ctx, server, opts)
	if err == nil && opts.Project == "" && filepath.Base(path) == userSocket {
		opts.Project = "user-" + strconv.Itoa(os.Geteuid())
	}
	return server, err
}

func dialHTTPS(ctx context.Context, r *clientconfig.Remote, opts *LXDOptions) (lxd.InstanceServer, error) {
	u, err := url.Parse(r.Addr)
	if err != nil || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" {
		return nil, fmt.Errorf("%q is not an address of the form https://host:port", r.Addr)
	}
	if u.Port() == "" {
		u.Host += ":8443" // as lxc has it
	}
	args := &lxd.ConnectionArgs{TLSClientCert: r.ClientCert, TLSClientKey: r.ClientKey, TLSCA: r.CA, SkipGetServer: true}
	if opts.TLSServerCert == "" && opts.ServerFingerprint == "" {
		opts.TLSServerCert = r.ServerCert
	}
	want, err := opts.pin()
	if err != nil {
		return nil, err
	}
	// Our own comparison is stricter than that of a chain and a name, and does not need them.
	args.InsecureSkipVerify = want != ""
	if r.Auth == "oidc" && opts.TLSClientCert == "" {
		if len(r.Tokens) == 0 {
			return nil, fmt.Errorf("remote %q of %s wants a person to log in, and has no token of that yet: `lxc list %s:` makes one", r.Name, r.File, r.Name)
		}
		args.AuthType = r.Auth
		// The field's type is of a package that this module does not know.
		tokens := reflect.ValueOf(args).Elem().FieldByName("OIDCTokens")
		tokens.Set(reflect.New(tokens.Type().Elem()))
		if err := json.Unmarshal(r.Tokens, tokens.Interface()); err != nil {
			return nil, fmt.Errorf("the token of remote %q in %s is not understood: %w", r.Name, r.TokensFile, err)
		}
	}
	server, err := lxd.ConnectLXDWithContext(context.WithoutCancel(ctx), "https://"+u.Host, args)
	if err != nil {
		return nil, err
	}
	// The client renews tokens by requests of its own: the pin is for these, too.
	client, err := server.GetHTTPClient()
	if err != nil {
		return nil, err
	}
	own, ok := client.Transport.(*http.Transport)
	if !ok {
		return nil, fmt.Errorf("the client's HTTP transport is a %T", client.Transport)
	}
	if own.TLSClientConfig, err = opts.tlsConfig(own.TLSClientConfig); err != nil {
		return nil, err
	}
	own.DialTLSContext = nil // it would try once more, with another name
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return greet(ctx, server, opts)
}

// serverInfo is what we need of GET /1.0.
type serverInfo struct {
	Auth        string `json:"auth"`
	Environment struct {
		Server        string `json:"server"`
		ServerVersion string `json:"server_version"`
		Clustered     bool   `json:"server_clustered"`
	} `json:"environment"`
	Extensions []string `json:"api_extensions"`
}

// product names the server as people know it.
func (i *serverInfo) product() string {
	switch i.Environment.Server {
	case "": // it does not tell everybody
		return "the server"
	case "lxd":
		return "LXD " + i.Environment.ServerVersion
	case "incus":
		return "Incus " + i.Environment.ServerVersion
	}
	return quoted(i.Environment.Server + " " + i.Environment.ServerVersion)
}

// greet asks the server who it is, and whether it trusts us. Of a cluster it notes the members.
func greet(ctx context.Context, server lxd.InstanceServer, opts *LXDOptions) (lxd.InstanceServer, error) {
	r, err := newRESTClient(server, opts)
	if err != nil {
		return nil, err
	}
	defer r.http.CloseIdleConnections()
	ctx, cancel := within(ctx, connectTimeout)
	defer cancel()
	var info serverInfo
	if err := r.call(ctx, http.MethodGet, "/1.0", nil, nil, &info); err != nil {
		return nil, refusal(err, "the server at "+r.where()+" does not let us in")
	}
	if info.Auth != "trusted" {
		return nil, fmt.Errorf("%s at %s does not trust us: %w (`lxc config trust add` there, `lxc remote add` with a token here, or Enroll)", info.product(), r.where(), ErrUnauthorized)
	}
	opts.product = info.product()
	if info.Environment.Clustered && strings.HasPrefix(r.base, "https:") {
		opts.ClusterAddresses = append(slices.Clip(opts.ClusterAddresses), r.clusterAddresses(ctx)...)
	}
	return server, nil
}

// clusterAddresses asks a cluster for its members. Restricted identities may not know: then there are none but the one that answers.
func (r *restClient) clusterAddresses(ctx context.Context) []string {
	var members []struct {
		URL string `json:"url"`
	}
	if r.call(ctx, http.MethodGet, "/1.0/cluster/members", url.Values{"recursion": {"1"}}, nil, &members) != nil {
		return nil
	}
	var hosts []string
	for _, m := range members {
		if u, err := url.Parse(m.URL); err == nil && u.Scheme == "https" && u.Port() != "" {
			hosts = append(hosts, u.Host)
		}
	}
	return hosts
}
