package provisioner

import (
	"errors"
	"fmt"
	"strings"

	"github.com/lxdtransport/transport"
)

// dnf is dnf, microdnf or yum, which take the same arguments.
type dnf struct {
	*session
	name string
}

var dnfEnv = map[string]string{"LC_ALL": "C"}

// dnfHopeless is what they say when another attempt would not help.
var dnfHopeless = []string{
	"No match for argument", "Unable to find a match", "No package ", "GPG check FAILED", "is not signed", "Public key for ", "superuser privileges",
	"nothing provides", "No space left on device", "Problem: conflicting requests", "a password is required",
}

func (s *session) newDNF() (manager, error) {
	out, err := transport.Output(s.ctx, s.t, transport.Command{
		Args: transport.Shell(`for p; do if command -v "$p" >/dev/null 2>&1; then echo "$p"; exit; fi; done; exit 1`, "dnf", "microdnf", "yum"),
	})
	if code, exited := transport.ExitCode(err); exited && code != 0 {
		return nil, fmt.Errorf("the host (%s) has neither dnf nor microdnf nor yum", s.os.id)
	} else if err != nil {
		return nil, fmt.Errorf("looking for the package manager: %w", err)
	}
	return &dnf{s, strings.TrimSpace(string(out))}, nil
}

func (d *dnf) check(name string) error {
	if strings.TrimPrefix(name, "@") != strings.TrimSpace(strings.TrimPrefix(name, "@")) {
		return errors.New("the name of a group begins or ends with a space")
	}
	return nil
}

func (d *dnf) addRepository(r Repository) error {
	l, err := locate(r.URL)
	if err != nil {
		return err
	}
	key, err := d.key(r)
	if err != nil {
		return err
	}
	name := label(r)
	keyFile := "/etc/pki/rpm-gpg/RPM-GPG-KEY-" + name
	if key != nil {
		if err := d.put(keyFile, 0o644, string(key)); err != nil {
			return err
		}
		if _, err := d.run(d.root(dnfEnv, "rpm", "--import", keyFile)); err != nil {
			return fmt.Errorf("rpm --import: %w", err)
		}
	}
	switch {
	case strings.HasSuffix(l.path, ".rpm"):
		if l.secret() {
			return errors.New("a password in the URL of a package would be seen on the command line")
		}
		return d.retry(d.name+" install", dnfHopeless, nil, d.root(dnfEnv, d.name, "-y", "install", l.plain))
	case strings.HasSuffix(l.path, ".repo"):
		file, err := d.fetch("the .repo file", r.URL)
		if err != nil {
			return err
		}
		return d.put("/etc/yum.repos.d/"+name+".repo", 0o644, string(file))
	}
	if r.Distribution != "" || len(r.Components) > 0 {
		return errors.New("a dnf or yum repository has no distribution and no components")
	}
	mode := uint32(0o644)
	repo := "[" + name + "]\nname=" + l.plain + "\nbaseurl=" + l.plain + "\nenabled=1\n"
	if key != nil {
		repo += "gpgcheck=1\ngpgkey=file://" + keyFile + "\n"
	}
	if l.secret() {
		mode = 0o600
		repo += "username=" + l.user + "\npassword=" + l.password + "\n"
	}
	return d.put("/etc/yum.repos.d/"+name+".repo", mode, repo)
}

func (d *dnf) install(packages []string) error {
	if len(packages) == 0 {
		return nil
	}
	clean := func() error { // what a mirror that was changing has given
		_, err := d.run(d.root(dnfEnv, d.name, "clean", "all"))
		return err
	}
	args := []string{d.name, "-y"}
	if d.name == "yum" { // would be content with one of them
		args = append(args, "--setopt=skip_missing_names_on_install=0")
	}
	return d.retry(d.name+" install", dnfHopeless, clean, d.root(dnfEnv, append(append(args, "install"), packages...)...))
}
