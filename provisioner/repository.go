package provisioner

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"strings"
	"unicode"
)

func modeOf(mode uint32) fs.FileMode { return fs.FileMode(mode) }

// checkWord refuses what would not be one word of a configuration file.
func checkWord(s string) error {
	if s == "" {
		return errors.New("it is empty")
	}
	for _, r := range s {
		if unicode.IsSpace(r) || unicode.IsControl(r) || r == unicode.ReplacementChar || r == '\'' || r == '"' || r == '\\' || r == '#' {
			return fmt.Errorf("it contains %q", r)
		}
	}
	return nil
}

// location is where a repository is.
type location struct {
	plain    string // the URL without user and password
	host     string // with the port, if there is one
	path     string
	user     string
	password string
}

func (l *location) secret() bool { return l.user != "" || l.password != "" }

// locate takes a URL apart.
func locate(raw string) (*location, error) {
	if err := checkWord(raw); err != nil {
		return nil, fmt.Errorf("the URL: %w", err)
	}
	u, err := url.Parse(raw)
	if err != nil {
		return nil, errors.New("that is no URL") // err repeats it, with its password
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, errors.New("the URL does not begin with http:// or https:// and a host")
	}
	l := &location{host: u.Host, path: u.Path, user: u.User.Username()}
	l.password, _ = u.User.Password()
	for _, s := range []string{l.user, l.password} {
		if s != "" && checkWord(s) != nil {
			return nil, errors.New("the user name or the password in the URL contains white space, quotes, '\\' or '#'")
		}
	}
	u.User = nil
	l.plain = u.String()
	return l, nil
}

// redacted is a URL fit for logs and errors.
func redacted(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "(no URL)"
	}
	return u.Redacted()
}

// label names the files of a repository, the same each time.
func label(r Repository) string {
	sum := sha256.Sum256([]byte(strings.Join(append([]string{redacted(r.URL), r.Distribution}, r.Components...), "\n")))
	return "transport-" + hex.EncodeToString(sum[:6])
}
