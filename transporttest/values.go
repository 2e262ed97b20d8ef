package transporttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/lxdtransport/transport"
)

// Arguments, environment, directory, user.

var valueRows = []row{
	{name: "exec/argv-as-is", why: "a shell between, or quoting, is the oldest way to run something else",
		run: func(ctx context.Context, host transport.Transport) error {
			args := []string{"", " ", "a b", `"'\`, "$HOME `id` $(id)", "-n", "--", "*", "~", "ä€", "line\nbreak", "tab\t", "a=b", ";", "%s"}
			for _, a := range args {
				if err := prints(ctx, host, "<"+a+">", transport.Command{Args: []string{"printf", "<%s>", a}}); err != nil {
					return err
				}
			}
			return prints(ctx, host, strings.Join(args, "|")+"|", transport.Command{Args: append([]string{"printf", "%s|"}, args...)})
		}},
	{name: "exec/not-UTF-8", why: "Linux has bytes, JSON has none: what cannot be passed on is refused, not changed",
		run: func(ctx context.Context, host transport.Transport) error {
			const odd = "a\xff\xfe\xc3z"
			inArgs := transport.Command{Args: []string{"printf", "%s", odd}}
			inEnv := sh(`printf %s "$TT_ODD"`)
			inEnv.Env = map[string]string{"TT_ODD": odd}
			for what, cmd := range map[string]transport.Command{"argument": inArgs, "environment": inEnv} {
				var out bytes.Buffer
				cmd.Stdout = &out
				err := host.Exec(ctx, cmd)
				if err == nil {
					err = equal("output", out.String(), odd)
				} else {
					err = is(err, transport.ErrNotStarted)
				}
				if err != nil {
					return fmt.Errorf("%s: %w", what, err)
				}
			}
			return nil
		}},
	{name: "exec/env", why: "values with line breaks, quotes and '=' arrive as they are, besides what the host gives",
		run: func(ctx context.Context, host transport.Transport) error {
			for name, value := range map[string]string{
				"TT_A": "b c", "TT_QUOTE": `"'$\`, "TT_EMPTY": "", "TT_LINES": "1\n2", "TT_EQ": "a=b", "HOME": "/elsewhere", "tt_lower": "ä",
			} {
				cmd := sh(`eval "printf '%s|%s' \"\${$1-unset}\" \"\${PATH:+path}\""`, name)
				cmd.Env = map[string]string{name: value}
				if err := prints(ctx, host, value+"|path", cmd); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
			}
			cmd := sh(`printf '%s|' "${HOME-none}" "${LANG-none}" "${LC_ALL-none}" "${PATH-none}" "${USER-none}" "${SHELL-none}"`)
			hosts, err := output(ctx, host, cmd)
			if err != nil {
				return err
			}
			cmd.Env = map[string]string{"TT_A": "b"}
			return prints(ctx, host, hosts, cmd)
		}},
	{name: "exec/dir", why: "uploaded files are found by name",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			if err := run(ctx, host, in(dir, sh(`mkdir "a b"; echo here >"a b/file"`))); err != nil {
				return err
			}
			if err := prints(ctx, host, "here\n", in(dir+"/a b", transport.Command{Args: []string{"cat", "file"}})); err != nil {
				return err
			}
			pwd, err := output(ctx, host, in(dir+"/a b", transport.Command{Args: []string{"pwd"}}))
			if err == nil && !strings.HasSuffix(pwd, dir+"/a b\n") {
				err = fmt.Errorf("pwd is %q in %q", pwd, dir+"/a b")
			}
			return err
		}},
	{name: "exec/dir-missing", why: "LXD runs a command whose directory does not exist in /, and rm runs there, too",
		run: func(ctx context.Context, host transport.Transport) error {
			dir, err := scratch(ctx, host)
			if err != nil {
				return err
			}
			if err := run(ctx, host, in(dir, sh("echo >file"))); err != nil {
				return err
			}
			for _, missing := range []string{dir + "/missing", dir + "/file"} {
				out := newScreen()
				cmd := in(missing, sh("echo ran"))
				cmd.Stdout = out
				err := host.Exec(ctx, cmd)
				if err := errors.Join(is(err, transport.ErrNotStarted), equal("output", out.String(), "")); err != nil {
					return err
				}
				if !strings.Contains(err.Error(), missing) {
					return fmt.Errorf("the error does not name %s: %w", missing, err)
				}
			}
			return nil
		}},
	{name: "exec/user", why: "builds run as somebody who cannot damage the host", needs: []Capability{Users},
		run: func(ctx context.Context, host transport.Transport) error {
			cmd := sh("id -u; id -g")
			if err := prints(ctx, host, "0\n0\n", cmd); err != nil {
				return err
			}
			cmd.User = &transport.User{UID: 1234, GID: 5678}
			if err := prints(ctx, host, "1234\n5678\n", cmd); err != nil {
				return err
			}
			if *cmd.User != (transport.User{UID: 1234, GID: 5678}) {
				return errors.New("the Command.User was modified")
			}
			return nil
		}},
	{name: "exec/bad-input-is-named-not-shown", why: "what cannot be passed on is refused before anything runs, without its secret",
		run: badInput},
	{name: "exec/secrets-not-in-errors", why: "errors are logged; arguments, environment and input hold tokens",
		run: secrets},
}

func badInput(ctx context.Context, host transport.Transport) error {
	args := []string{"true"}
	const secret = "hunter2"
	for _, c := range []struct {
		cmd   transport.Command
		names string
	}{
		{transport.Command{}, "Args"},
		{transport.Command{Args: []string{"echo", secret + "\x00"}}, "Args[1]"},
		{transport.Command{Args: args, Env: map[string]string{"": secret}}, "Env"},
		{transport.Command{Args: args, Env: map[string]string{"A=B": secret}}, "A=B"},
		{transport.Command{Args: args, Env: map[string]string{"A\nB": secret}}, `A\nB`},
		{transport.Command{Args: args, Env: map[string]string{"PASSWORD": secret + "\x00"}}, "PASSWORD"},
		{transport.Command{Args: args, Dir: "relative"}, "relative"},
		{transport.Command{Args: args, User: &transport.User{UID: 1<<32 - 1}}, "User"},
		{transport.Command{Args: args, CancelSignal: "SIGTERM"}, "SIGTERM"},
		{transport.Command{Args: args, WaitDelay: -time.Second}, "WaitDelay"},
		{transport.Command{Args: args, TTY: &transport.TTY{Term: "a\nb"}}, "TTY"},
	} {
		err := host.Exec(ctx, c.cmd)
		if err := is(err, transport.ErrNotStarted); err != nil {
			return fmt.Errorf("%s: %w", c.names, err)
		}
		if text := err.Error(); !strings.Contains(text, c.names) {
			return fmt.Errorf("the error does not name %s: %w", c.names, err)
		} else if strings.Contains(text, secret) {
			return fmt.Errorf("the error for %s shows the value: %w", c.names, err)
		}
	}
	return nil
}

func secrets(ctx context.Context, host transport.Transport) error {
	const secret = "hunter2hunter2"
	env := map[string]string{"SECRET": secret}
	broken := errors.New("broken")
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	for what, c := range map[string]struct {
		ctx context.Context
		cmd transport.Command
	}{
		"a status":           {ctx, transport.Command{Args: transport.Shell("cat >&2; exit 1", secret), Env: env, Stdin: strings.NewReader(secret)}},
		"not found":          {ctx, transport.Command{Args: []string{"/nonexistent/" + secret}, Env: env}},
		"too long":           {ctx, transport.Command{Args: []string{"true", strings.Repeat(secret, 20000)}, Env: env}},
		"environment":        {ctx, transport.Command{Args: []string{"true", "\xff" + secret, "\x00"}, Env: env}},
		"cancelled":          {cancelled, transport.Command{Args: []string{"true", secret}, Env: env}},
		"no such directory":  {ctx, transport.Command{Args: []string{"true", secret}, Env: env, Dir: "/nonexistent"}},
		"Stdin that fails":   {ctx, transport.Command{Args: []string{"cat", "-", secret}, Env: env, Stdin: io.MultiReader(strings.NewReader(secret), failing(broken))}},
		"writers that fails": {ctx, transport.Command{Args: []string{"echo", secret}, Env: env, Stdout: writerFunc(func([]byte) (int, error) { return 0, broken })}},
	} {
		err := host.Exec(c.ctx, c.cmd)
		if err == nil {
			return fmt.Errorf("%s: want an error", what)
		}
		if text := fmt.Sprintf("%v %+v", err, err); strings.Contains(text, secret) {
			return fmt.Errorf("%s: the error shows a secret", what)
		}
	}
	return nil
}
