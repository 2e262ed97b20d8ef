package job

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/lxdtransport/transport"
)

// gitURL is where a repository is.
type gitURL struct {
	url  *url.URL // without a password
	dir  string   // that git clones it into
	user string   // for a token
	pass string
}

// parseGitURL refuses what git would take for an option, a local path or a program to run, and tokens that would cross a network
// for all to read.
func parseGitURL(s string, token bool) (*gitURL, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("the url cannot be read")
	}
	if !slices.Contains([]string{"git", "http", "https", "ssh", "file"}, u.Scheme) {
		return nil, fmt.Errorf("the url has to begin with https://, http://, git://, ssh:// or file://")
	}
	if u.Host == "" && u.Scheme != "file" || strings.HasPrefix(u.Host, "-") || strings.HasPrefix(u.User.Username(), "-") {
		return nil, errors.New("the url names no host")
	}
	local := slices.Contains([]string{"localhost", "127.0.0.1", "::1"}, u.Hostname())
	pass, hasPass := u.User.Password()
	if (token || hasPass) && u.Scheme != "https" && !(u.Scheme == "http" && local) {
		return nil, errors.New("a token or password needs a url with https://")
	}
	dir := strings.TrimSuffix(path.Base(strings.TrimRight(u.Path, "/")), ".git")
	if dir == "" || dir == "." || dir == ".." || dir == "/" || strings.HasPrefix(dir, "-") || strings.ContainsAny(dir, "\x00\n") {
		return nil, errors.New("the url ends with no name for a directory")
	}
	g := &gitURL{url: u, dir: dir, user: u.User.Username(), pass: pass}
	if hasPass {
		u.User = url.User(g.user)
	}
	return g, nil
}

// helper answers git's question for a user and password with what is on the command's standard input: so they are in no
// command line, no environment and no file of the host.
const helper = `!f() { test "$1" = get && cat <&3; }; f`

// withInput runs its arguments with the standard input at descriptor 3.
const withInput = `exec 3<&0 </dev/null; exec "$@"`

// checkout clones the sources into the workspace.
func (r *run) checkout(ctx context.Context) error {
	for _, s := range r.job.Sources {
		raw, branch, token := expand(s.URL, r.vars), expand(s.Branch, r.vars), expand(s.Token, r.vars)
		r.warnUnknown(s.URL, s.Branch, s.Token)
		g, err := parseGitURL(raw, token != "")
		if err != nil {
			return fmt.Errorf("source %s: %w", s.URL, err)
		}
		args := []string{"git"}
		if token != "" {
			g.pass = token
			if g.user == "" {
				g.user = "x-access-token" // any will do for GitHub, GitLab and Gitea, but for the empty one
			}
		}
		cmd := transport.Command{Dir: r.workspace, Env: map[string]string{"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}}
		if g.pass != "" {
			if strings.ContainsAny(g.user+g.pass, "\n\x00") {
				return fmt.Errorf("source %s: its user or token contains a line break", s.URL)
			}
			origin := &url.URL{Scheme: g.url.Scheme, Host: g.url.Host}
			args = append(args, "-c", "credential.helper=", "-c", "credential."+origin.String()+".helper="+helper)
			cmd.Stdin = strings.NewReader("username=" + g.user + "\npassword=" + g.pass + "\n")
		}
		args = append(args, "clone", "--quiet")
		if branch != "" {
			args = append(args, "--branch="+branch)
		}
		r.log("$ git clone %s\n", s.URL)
		cmd.Args = transport.Shell(withInput, append(args, "--", g.url.String(), g.dir)...)
		if err := r.output(ctx, cmd); err != nil {
			return fmt.Errorf("source %s: git clone: %w", s.URL, err)
		}
	}
	return nil
}
