package provisioner

import (
	"errors"
	"fmt"
	"strings"
)

// apt is the package manager of Debian and Ubuntu.
type apt struct {
	*session
	updated bool
}

var aptEnv = map[string]string{"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}

// aptHopeless is what apt says when another attempt would not help.
var aptHopeless = []string{
	"Unable to locate package", "has no installation candidate", "Couldn't find any package by", "was not found", "have unmet dependencies",
	"NO_PUBKEY", "Malformed", "Unable to parse", "Permission denied", "are you root?", "No space left on device", "a password is required",
}

func (a *apt) check(name string) error {
	switch {
	case strings.HasSuffix(name, "-"):
		return errors.New("apt would remove it for the hyphen at its end")
	case strings.HasPrefix(name, "@"):
		return errors.New("apt has no groups")
	}
	return nil
}

func (a *apt) get(step string, again func() error, args ...string) error {
	full := append([]string{
		"apt-get", "-q", "-y",
		"-o", "Acquire::Retries=3",
		"-o", "DPkg::Lock::Timeout=300", // of what a fresh host does by itself
		"-o", "Dpkg::Use-Pty=0",
		"-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold",
	}, args...)
	return a.retry(step, aptHopeless, again, a.root(aptEnv, full...))
}

// update reads the repositories. Without the error mode apt takes old lists for new ones when a mirror fails.
func (a *apt) update() error {
	a.updated = true
	return a.get("apt-get update", nil, "-o", "APT::Update::Error-Mode=any", "update")
}

func (a *apt) addRepository(r Repository) error {
	if strings.HasPrefix(r.URL, "ppa:") {
		var err error
		if r, err = a.ppa(r); err != nil {
			return err
		}
	}
	l, err := locate(r.URL)
	if err != nil {
		return err
	}
	suite := r.Distribution
	if suite == "" {
		if suite = a.os.codename; suite == "" {
			return errors.New("it has no Distribution, and the host does not tell the code name of its release")
		}
	}
	flat := strings.HasSuffix(suite, "/")
	switch {
	case !flat && len(r.Components) == 0:
		return errors.New("a deb repository needs a list of components, such as main")
	case flat && len(r.Components) > 0:
		return fmt.Errorf("the Distribution %s is a path, with which there are no components", suite)
	}
	for _, word := range append([]string{suite}, r.Components...) {
		if err := checkWord(word); err != nil {
			return fmt.Errorf("the distribution or component %q: %w", word, err)
		}
	}
	key, err := a.key(r)
	if err != nil {
		return err
	}
	if strings.HasPrefix(l.plain, "https:") {
		if err := a.certificates(); err != nil {
			return err
		}
	}
	name := label(r)
	source := "Types: deb\nURIs: " + l.plain + "\nSuites: " + suite + "\n"
	if !flat {
		source += "Components: " + strings.Join(r.Components, " ") + "\n"
	}
	if key != nil {
		file := "/etc/apt/keyrings/" + name + ".gpg"
		if armored(key) {
			file = "/etc/apt/keyrings/" + name + ".asc"
		}
		if err := a.put(file, 0o644, string(key)); err != nil {
			return err
		}
		source += "Signed-By: " + file + "\n"
	}
	if l.secret() {
		auth := "machine " + l.host + strings.TrimSuffix(l.path, "/") + " login " + l.user + " password " + l.password + "\n"
		if strings.HasPrefix(l.plain, "http:") {
			auth = strings.Replace(auth, "machine ", "machine http://", 1) // apt wants it said
		}
		if err := a.put("/etc/apt/auth.conf.d/"+name+".conf", 0o600, auth); err != nil {
			return err
		}
	}
	a.updated = false
	return a.put("/etc/apt/sources.list.d/"+name+".sources", 0o644, source)
}

// certificates makes sure that the host can check those of servers: minimal images cannot.
func (a *apt) certificates() error {
	ok, err := a.exists("/etc/ssl/certs/ca-certificates.crt")
	if ok || err != nil {
		return err
	}
	return a.install([]string{"ca-certificates"})
}

func (a *apt) install(packages []string) error {
	if !a.updated {
		if err := a.update(); err != nil {
			return err
		}
	}
	if len(packages) == 0 {
		return nil
	}
	// A mirror that has changed meanwhile has other files than the lists say.
	return a.get("apt-get install", a.update, append([]string{"install"}, packages...)...)
}
