package provisioner

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/lxdtransport/transport"
)

// apk is the package manager of Alpine.
type apk struct{ *session }

// apkHopeless is what apk says when another attempt would not help.
var apkHopeless = []string{"(no such package)", "UNTRUSTED signature", "unable to select packages", "No space left on device", "a password is required"}

const apkRepositories = "/etc/apk/repositories"

func (a *apk) check(name string) error {
	switch {
	case strings.HasPrefix(name, "!"):
		return errors.New("apk would remove it for the '!' at its beginning")
	case strings.HasPrefix(name, "@"):
		return errors.New("apk has no groups")
	}
	return nil
}

func (a *apk) addRepository(r Repository) error {
	l, err := locate(r.URL)
	if err != nil {
		return err
	}
	for _, word := range append(slices.Clone(r.Components), strings.TrimSuffix(r.Distribution, "/")) {
		if word != "" && checkWord(word) != nil {
			return fmt.Errorf("the distribution or component %q: %w", word, checkWord(word))
		}
	}
	if r.KeyID != "" {
		return errors.New("apk's keys are not OpenPGP's: there is no KeyID")
	}
	if r.Key+r.KeyURL != "" {
		name := path.Base(r.KeyURL)
		if !strings.HasSuffix(name, ".pub") || strings.ContainsAny(name, "?&") {
			return errors.New("apk knows keys by the names of their files, which end with .pub: the key's URL has to end so")
		}
		key, err := a.key(r)
		if err != nil {
			return err
		}
		if err := a.put("/etc/apk/keys/"+name, 0o644, string(key)); err != nil {
			return err
		}
	}
	base := strings.TrimSuffix(r.URL, "/")
	if r.Distribution != "" {
		base += "/" + strings.Trim(r.Distribution, "/")
	}
	lines := []string{base}
	if len(r.Components) > 0 {
		lines = nil
		for _, c := range r.Components {
			lines = append(lines, base+"/"+c)
		}
	}
	return a.addLines(lines, l.secret())
}

// maxRepositories bounds the file that is changed.
const maxRepositories = 1 << 20

func (a *apk) addLines(lines []string, secret bool) error {
	var old bytes.Buffer
	mode := fs.FileMode(0o644)
	err := a.t.Download(a.ctx, apkRepositories, &old, &transport.DownloadOptions{Limit: maxRepositories, Stat: func(i fs.FileInfo) { mode = i.Mode().Perm() }})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text := old.String()
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	for _, line := range lines {
		if !slices.Contains(strings.Split(text, "\n"), line) {
			text += line + "\n"
		}
	}
	if secret {
		mode = 0o600
	}
	return a.put(apkRepositories, uint32(mode), text)
}

func (a *apk) install(packages []string) error {
	update := func() error {
		return a.retry("apk update", apkHopeless, nil, a.root(nil, "apk", "update"))
	}
	if err := update(); err != nil || len(packages) == 0 {
		return err
	}
	return a.retry("apk add", apkHopeless, update, a.root(nil, append([]string{"apk", "add"}, packages...)...))
}
