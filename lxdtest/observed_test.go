//go:build unix

package lxdtest_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestEveryObservedSectionIsCompared reads the table at the end of docs/protocol.md: it has a row for each section in which something is marked as
// observed on the server that the conversations are had with, it knows every conversation, and no others.
func TestEveryObservedSectionIsCompared(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../docs/protocol.md")
	require.NoError(t, err)
	text, table, ok := strings.Cut(string(b), "\n## 15.")
	require.True(t, ok)

	heading := regexp.MustCompile(`^##+ (\d+(?:\.\d+)?)\.? `)
	mark := regexp.MustCompile(`\bO:(502|all|lib)\b`)
	observed, section := map[string]bool{}, ""
	for line := range strings.SplitSeq(text, "\n") {
		if m := heading.FindStringSubmatch(line); m != nil {
			section = m[1]
		}
		// Section 0 says what the marks mean, 11 and 12 repeat the others.
		if mark.MatchString(line) && section != "0" {
			observed[section] = true
		}
	}
	require.Greater(t, len(observed), 25)

	conversations := map[string]bool{}
	for _, c := range scenarios {
		conversations[c.name] = true
	}
	for _, c := range ends {
		conversations[c.name] = true
	}
	require.GreaterOrEqual(t, len(conversations), 40)
	row, name := regexp.MustCompile(`(?m)^\| ([\d.]+) \| ([^|]+) \| ([^|]+) \|$`), regexp.MustCompile("`([^`]+)`")
	named, rows := map[string]bool{}, map[string]bool{}
	for _, m := range row.FindAllStringSubmatch(table, -1) {
		rows[m[1]] = true
		if strings.HasPrefix(m[3], "not compared") {
			continue
		}
		names := name.FindAllStringSubmatch(m[3], -1)
		require.NotEmpty(t, names, m[0])
		for _, n := range names {
			named[n[1]] = true
			if !conversations[n[1]] {
				t.Errorf("section %s, %s: there is no conversation %q", m[1], m[2], n[1])
			}
		}
	}
	for s := range observed {
		if !rows[s] {
			t.Errorf("section %s: no row says which conversations compare what was observed", s)
		}
	}
	for n := range conversations {
		if !named[n] {
			t.Errorf("no row names the conversation %q", n)
		}
	}
}
