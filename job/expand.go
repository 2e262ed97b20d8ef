package job

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// piece is literal text, or the name of a variable.
type piece struct {
	text     string
	variable bool
}

// pieces takes a text with variables, %{name}, apart. %%{ is a literal %{. Every other % is itself.
func pieces(s string) (all []piece) {
	literal := ""
	for {
		before, rest, ok := strings.Cut(s, "%{")
		if !ok {
			break
		}
		if strings.HasSuffix(before, "%") {
			literal += before[:len(before)-1] + "%{"
			s = rest
			continue
		}
		name, after, ok := strings.Cut(rest, "}")
		if !ok {
			break
		}
		if literal += before; literal != "" {
			all = append(all, piece{text: literal})
		}
		all = append(all, piece{name, true})
		literal, s = "", after
	}
	if literal += s; literal != "" {
		all = append(all, piece{text: literal})
	}
	return all
}

// expand puts the values of variables into a text. One that has no value is empty, as in Cyclid. Values
// are not expanded again.
func expand(s string, vars map[string]string) string {
	if !strings.Contains(s, "%{") {
		return s
	}
	var b strings.Builder
	for _, p := range pieces(s) {
		if p.variable {
			b.WriteString(vars[p.text])
		} else {
			b.WriteString(p.text)
		}
	}
	return b.String()
}

// unknown is the variables of a text that have no value.
func unknown(s string, vars map[string]string) []string {
	missing := map[string]bool{}
	for _, p := range pieces(s) {
		if _, ok := vars[p.text]; p.variable && !ok {
			missing[p.text] = true
		}
	}
	return slices.Sorted(maps.Keys(missing))
}

// commandLine turns a command line into argv. The variables' values never become a part of a shell's program: in a
// line that needs no shell each is a part of a word, otherwise they are the shell's parameters.
func commandLine(s string, vars map[string]string) []string {
	ps := pieces(s)
	if plain(ps) {
		return plainWords(ps, vars)
	}
	return shellWords(ps, vars)
}

// plain reports whether a shell would do nothing to the line but to split it into words.
func plain(ps []piece) bool {
	for i, p := range ps {
		if p.variable {
			continue
		}
		for _, r := range p.text {
			switch {
			case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r > 127, strings.ContainsRune(" \t\n_@%+:,./-", r):
			case r == '=' && (i > 0 || strings.ContainsAny(strings.TrimLeft(p.text[:strings.IndexByte(p.text, '=')], " \t\n"), " \t\n")):
				// An assignment can only be in front of the command.
			default:
				return false
			}
		}
		if strings.Contains(strings.TrimSpace(p.text), "\n") { // two commands
			return false
		}
	}
	return true
}

func plainWords(ps []piece, vars map[string]string) (words []string) {
	word, in := "", false
	end := func() {
		// Only a word without any literal character can be empty: Cyclid drops it.
		if in && word != "" {
			words = append(words, word)
		}
		word, in = "", false
	}
	for _, p := range ps {
		if p.variable {
			word, in = word+vars[p.text], true
			continue
		}
		for _, r := range p.text {
			if r == ' ' || r == '\t' || r == '\n' {
				end()
			} else {
				word, in = word+string(r), true
			}
		}
	}
	end()
	return words
}

// Where in a shell's program a variable is decides how its parameter is written.
const (
	bare   = iota // outside of quotes, or in a command substitution
	single        // in single quotes
	double        // in double quotes
)

// shellWords is the argv of a shell that runs the line, with the variables' values as its parameters. To that end it follows the
// quotes. A line that it takes for another one than the shell does gets a wrong text at a variable, never
// a command out of a value.
func shellWords(ps []piece, vars map[string]string) []string {
	var script strings.Builder
	var values []string
	stack := []int{bare}
	for _, p := range ps {
		top := stack[len(stack)-1]
		if p.variable {
			values = append(values, vars[p.text])
			n := "${" + strconv.Itoa(len(values)) + "}"
			switch top {
			case single:
				script.WriteString(`'"` + n + `"'`)
			case double:
				script.WriteString(n)
			default: // one word, none if it is empty
				script.WriteString("${" + strconv.Itoa(len(values)) + `:+"` + n + `"}`)
			}
			continue
		}
		script.WriteString(p.text)
		stack = quotes(p.text, stack)
	}
	return append([]string{"/bin/sh", "-c", script.String(), "sh"}, values...)
}

// quotes follows the quotes of a part of a shell's program.
func quotes(s string, stack []int) []int {
	for i := 0; i < len(s); i++ {
		top := stack[len(stack)-1]
		push, pop := -1, false
		switch c := s[i]; {
		case top == single:
			pop = c == '\''
		case c == '\\':
			i++
		case c == '"' && top == double:
			pop = true
		case c == '"':
			push = double
		case c == '\'' && top == bare:
			push = single
		case c == '$' && i+1 < len(s) && s[i+1] == '(', c == '(' && top == bare:
			if c == '$' {
				i++
			}
			push = bare
		case c == ')' && top == bare:
			pop = true
		}
		if push >= 0 {
			stack = append(stack, push)
		} else if pop && len(stack) > 1 {
			stack = stack[:len(stack)-1]
		}
	}
	return stack
}
