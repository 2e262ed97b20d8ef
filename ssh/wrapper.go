package ssh

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/lxdtransport/transport"
)

// How a command gets to the host as it is. The login shell is given loader, which is the same line for every shell there is: it reads lines of
// printable ASCII until an empty one, and runs what it has read, whole or not at all. That is a line of shell that sets everything up, reports
// its process number behind a random mark, and becomes the command.

// loader has no quote, backslash or exclamation mark within its quotes, which shells such as csh and fish read in their own ways.
const loader = `exec /bin/sh -c 'TRANSPORT_H=; while IFS= read -r TRANSPORT_L; do if [ -z "$TRANSPORT_L" ]; then eval "$TRANSPORT_H"; exit 125; fi; TRANSPORT_H=$TRANSPORT_H$TRANSPORT_L; done; exit 125'`

// lineSize is how long the lines are that loader reads. A terminal takes 4096 bytes at most; whose echo of them is thrown away with
// everything else before the mark.
const lineSize = 4000

// markPrefix begins the name of a variable in the environment of every command. reap.sh knows it, too.
const markPrefix = "TRANSPORT_COMMAND_"

// What the wrapper reports instead of a process number.
const (
	noDir   = "nodir"
	notADir = "notdir"
	noEntry = "noentry"
	noUser  = "nouser"
)

// header returns what loader reads: the setting up of a command.
func header(cmd transport.Command, mark string) (string, error) {
	var b strings.Builder
	b.WriteString("unset TRANSPORT_H TRANSPORT_L; ")
	// The mark is in two parts, so that an echo of this is not taken for it.
	report := func(what string) string {
		return "printf '%s%s %s\\n' " + mark[:8] + " " + mark[8:] + " " + what
	}
	if cmd.Dir != "" {
		assign(&b, "TRANSPORT_L", cmd.Dir)
		fmt.Fprintf(&b, `cd "$TRANSPORT_L" 2>/dev/null || { if [ -d "$TRANSPORT_L" ]; then %s; elif [ -e "$TRANSPORT_L" ]; then %s; else %s; fi; exit 125; }; unset OLDPWD; `,
			report(noEntry), report(notADir), report(noDir))
	}
	b.WriteString("set --")
	for i, arg := range cmd.Args {
		if plain(arg) {
			b.WriteString(" " + quote(arg))
			continue
		}
		b.WriteString("; ")
		assign(&b, "TRANSPORT_L", arg)
		b.WriteString(`set -- "$@" "$TRANSPORT_L"`)
		if i < len(cmd.Args)-1 {
			b.WriteString(`; set -- "$@"`)
		}
	}
	b.WriteString("; ")
	prefix, err := environment(&b, cmd, mark)
	if err != nil {
		return "", err
	}
	if u := cmd.User; u != nil {
		as := fmt.Sprintf("setpriv --reuid=%d --regid=%d --clear-groups", u.UID, u.GID)
		fmt.Fprintf(&b, `if [ "$(id -u):$(id -g)" != %d:%d ]; then %s true 2>/dev/null || { %s; exit 125; }; set -- %s -- "$@"; fi; `, u.UID, u.GID, as, report(noUser), as)
	}
	if cmd.TTY == nil {
		b.WriteString(report("err") + " >&2; ")
	}
	b.WriteString("unset TRANSPORT_L; " + report(`"$$"`) + " || exit 125; exec " + prefix + `"$@"`)

	line := b.String()
	b.Reset()
	for len(line) > 0 {
		n := min(len(line), lineSize)
		b.WriteString(line[:n] + "\n")
		line = line[n:]
	}
	b.WriteString("\n")
	return b.String(), nil
}

// environment exports the variables. Those that the shell has a use for itself, or cannot have, are set by env, which is what it returns.
func environment(b *strings.Builder, cmd transport.Command, mark string) (prefix string, err error) {
	exports, late := " "+markPrefix+mark+"=1", ""
	for _, name := range slices.Sorted(maps.Keys(cmd.Env)) {
		value := cmd.Env[name]
		switch {
		case !exportable(name):
			if !plain(value) {
				v := "TRANSPORT_V" + strconv.Itoa(len(prefix))
				assign(b, v, value)
				prefix += " " + quote(name+"=") + `"$` + v + `"`
			} else {
				prefix += " " + quote(name+"="+value)
			}
		case !plain(value):
			assign(b, "TRANSPORT_L", value)
			fmt.Fprintf(b, `export %s="$TRANSPORT_L" 2>/dev/null; `, name)
		case name == "PATH": // by which id and setpriv are found before
			late = "export PATH=" + quote(value) + "; "
		default:
			exports += " " + name + "=" + quote(value)
		}
	}
	// A shell may complain of a locale that the host does not have.
	b.WriteString("export" + exports + " 2>/dev/null; " + late)
	first := cmd.Args[0]
	if prefix == "" && !strings.HasPrefix(first, "-") {
		return "", nil
	}
	if strings.Contains(first, "=") {
		return "", errors.New("Command.Args[0] contains '=', and Command.Env has a name that needs env, which takes it for a variable")
	}
	return "env --" + prefix + " ", nil
}

// exportable reports whether a shell exports a variable as any other one.
func exportable(name string) bool {
	for i, c := range []byte(name) {
		if !(c == '_' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || i > 0 && '0' <= c && c <= '9') {
			return false
		}
	}
	for _, prefix := range []string{"BASH", "COMP", "HIST", "OPT", "EPOCH", "TRANSPORT_"} {
		if strings.HasPrefix(name, prefix) {
			return false
		}
	}
	switch name {
	case "_", "DIRSTACK", "EGID", "ERRNO", "EUID", "FUNCNAME", "GID", "GROUPS", "IFS", "LINENO", "OLDPWD", "PIPESTATUS", "POSIXLY_CORRECT", "PPID", "PS4", "PWD", "RANDOM",
		"REPLY", "SECONDS", "SHELLOPTS", "SHLVL", "SRANDOM", "UID":
		return false
	}
	return true
}

// plain reports whether a value is printable ASCII.
func plain(s string) bool {
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return true
}

// quote makes one word of printable ASCII.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// assign sets a variable to any value.
func assign(b *strings.Builder, name, value string) {
	if plain(value) {
		b.WriteString(name + "=" + quote(value) + "; ")
		return
	}
	var octal strings.Builder
	for _, c := range []byte(value) {
		if c < ' ' || c > '~' || c == '\\' {
			fmt.Fprintf(&octal, `\0%03o`, c)
		} else {
			octal.WriteByte(c)
		}
	}
	// The dot keeps line breaks at the end, which a substitution loses.
	b.WriteString(name + "=$(printf '%b.' " + quote(octal.String()) + "); " + name + "=${" + name + "%.}; ")
}
