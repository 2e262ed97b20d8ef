package job

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/lxdtransport/transport"
)

// describe makes the workspace, given without its first slash, and says what the host is. The names are relative, for package
// local and the fake server have their own idea of /.
const describe = `case $2 in new) mkdir -p tmp && mkdir -m 700 "$1";; *) mkdir -p "$1";; esac && cd "$1" && pwd && id -u && { id -un 2>/dev/null || id -u; } || exit 1
cat /etc/os-release 2>/dev/null; exit 0`

// What a host may say of itself.
const (
	maxPath  = 4 << 10
	maxValue = 256
)

// enter makes the workspace and learns what the context has of the host.
func (r *run) enter(ctx context.Context) error {
	kind := "given"
	r.workspace = r.Workspace
	if r.workspace == "" {
		kind, r.workspace = "new", "/tmp/job-"+r.random
	}
	if !path.IsAbs(r.workspace) {
		return fmt.Errorf("%q is not an absolute path", r.workspace)
	}
	r.workspace = path.Clean(r.workspace)
	relative := strings.TrimPrefix(r.workspace, "/")
	if relative == "" {
		relative = "."
	}
	out, err := transport.Output(ctx, r.host, transport.Command{Args: transport.Shell(describe, "./"+relative, kind), Dir: "/"})
	if err != nil {
		return withStderr(err)
	}
	lines := strings.SplitN(cleaned(string(out)), "\n", 4)
	if len(lines) < 4 || !path.IsAbs(lines[0]) || len(lines[0]) > maxPath || len(lines[2]) > maxValue {
		return errors.New("the host does not say where it is")
	}
	r.workspaceSeen, r.root = path.Clean(lines[0]), lines[1] == "0"
	r.vars["workspace"], r.vars["username"] = r.workspaceSeen, lines[2]
	release := osRelease(lines[3])
	r.vars["distro"] = release["ID"]
	r.vars["release"] = release["VERSION_CODENAME"]
	if r.vars["release"] == "" {
		r.vars["release"] = release["VERSION_ID"]
	}
	return nil
}

// osRelease reads a host's /etc/os-release.
func osRelease(s string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(s) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && len(v) <= maxValue {
			m[k] = strings.Trim(v, `"'`)
		}
	}
	return m
}

// leave removes a workspace that was made for this run only.
func (r *run) leave(ctx context.Context) {
	if r.Workspace != "" || r.Keep {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	err := r.host.Exec(ctx, transport.Command{Args: []string{"rm", "-rf", "./" + strings.TrimPrefix(r.workspace, "/")}, Dir: "/"})
	if err != nil && r.ctx.Err() == nil {
		r.log("The workspace was not removed: %v\n", err)
	}
}

const cleanupTimeout = 30 * time.Second

// remote is a path of the job file as the transport's methods take it: relative ones are below the workspace.
func (r *run) remote(name string) string {
	if !path.IsAbs(name) {
		return path.Join(r.workspace, name)
	}
	name = path.Clean(name)
	if rest, ok := strings.CutPrefix(name, r.workspaceSeen); ok && (rest == "" || rest[0] == '/') {
		return path.Join(r.workspace, rest)
	}
	return name
}

// seen is a path below the workspace as commands see it.
func (r *run) seen(name string) string {
	return r.workspaceSeen + strings.TrimPrefix(name, r.workspace)
}

// private is the name of a file for the runner's own use.
func (r *run) private(what string) string { return path.Join(r.workspace, ".job-"+what+"-"+r.random) }

// remove removes a file of the runner's own, also when ctx has ended.
func (r *run) remove(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	err := r.host.Exec(ctx, transport.Command{Args: []string{"rm", "-f", "./" + path.Base(name)}, Dir: path.Dir(name)})
	if err != nil {
		return fmt.Errorf("removing %s: %w", name, err)
	}
	return nil
}

// output runs a command whose output goes to the log.
func (r *run) output(ctx context.Context, cmd transport.Command) error {
	stdout, stderr := r.logs.Stream(), r.logs.Stream()
	cmd.Stdout, cmd.Stderr = stdout, stderr
	err := r.host.Exec(ctx, cmd)
	return errors.Join(err, stdout.Close(), stderr.Close())
}

// receive makes arguments of its standard input, a line for each: first so many variables as $1 says, then the command. Their bytes are
// escaped for printf, so that any value arrives as it is. The x keeps the line feeds at a value's end.
const receive = `n=$1; shift
while IFS= read -r line; do v=$(printf '%bx' "$line") && set -- "$@" "${v%x}"; done
exec </dev/null
while [ "$n" -gt 0 ]; do export "$1"; shift; n=$((n-1)); done
exec "$@"`

// exec runs a step's command. Where a secret is in it, or sudo would throw its environment away, its arguments and
// environment travel over its standard input: of a request to LXD everyone can read these who may see the project.
func (r *run) exec(ctx context.Context, argv []string, env []variable, dir string, sudo bool) error {
	cmd := transport.Command{Args: argv, Dir: r.workspace}
	if dir != "" {
		cmd.Dir = r.remote(expand(dir, r.vars))
	}
	vars := make([]variable, len(env))
	for i, v := range env {
		vars[i] = variable{v.name, expand(v.value, r.vars)}
	}
	sudo = sudo && !r.root
	if !sudo && !r.secret(argv, vars) {
		cmd.Env = map[string]string{}
		for _, v := range vars {
			cmd.Env[v.name] = v.value
		}
	} else {
		var in bytes.Buffer
		for _, v := range vars {
			escapeLine(&in, v.name+"="+v.value)
		}
		for _, a := range argv {
			escapeLine(&in, a)
		}
		cmd.Args, cmd.Stdin = transport.Shell(receive, fmt.Sprint(len(vars))), &in
		if sudo {
			cmd.Args = append([]string{"sudo", "-n", "--"}, cmd.Args...)
		}
	}
	err := r.output(ctx, cmd)
	if errors.Is(err, fs.ErrNotExist) && dir != "" {
		return fmt.Errorf("the path %s: %w", dir, err)
	}
	return err
}

// secret reports whether a secret is in a command.
func (r *run) secret(argv []string, env []variable) bool {
	for _, m := range r.masks {
		for _, a := range argv {
			if strings.Contains(a, m) {
				return true
			}
		}
		for _, v := range env {
			if strings.Contains(v.value, m) {
				return true
			}
		}
	}
	return false
}

// escapeLine writes a value as printf's %b reads it, with all that is not a letter, a digit or a few more as an octal number.
func escapeLine(b *bytes.Buffer, s string) {
	for i := range len(s) {
		if c := s[i]; c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("_-./=:,@+ ", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(b, `\0%03o`, c)
		}
	}
	b.WriteByte('\n')
}

// withStderr adds to an error what the command said, as far as the error has it.
func withStderr(err error) error {
	if e, ok := errors.AsType[*transport.ExitError](err); ok && len(e.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(cleaned(string(e.Stderr))))
	}
	return err
}
