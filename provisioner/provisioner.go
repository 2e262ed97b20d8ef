// Package provisioner prepares build hosts: it sets up package repositories and installs packages, over any
// [transport.Transport]. It knows nothing of where the host comes from.
//
//	err := provisioner.New(nil).Prepare(ctx, host, provisioner.Host{Name: "c1"}, provisioner.Environment{
//		Packages: []string{"build-essential", "git"},
//	})
//
// Files are written with Upload, and commands are lists of arguments: nothing is quoted into the text of a shell.
package provisioner

import (
	"context"

	"github.com/lxdtransport/transport"
)

// Host is the host to prepare.
type Host struct {
	Name string // for errors and logs
	OS   string // such as "debian_12"; counts where the host does not say what it is
}

// Environment is what a host is to have.
type Environment struct {
	OS           string       // such as "debian_12"; what the host says of itself wins
	Repositories []Repository // added in this order, before any package is installed
	Packages     []string     // names of the host's distribution, with a version as its package manager writes it; "@name": a group, of dnf and yum
}

// Repository is a package repository to add to the host, on top of those that it has.
//
// A user name and a password in the URL are kept out of command lines, and in files that only root can read.
type Repository struct {
	// URL is where the repository is, http or https.
	//
	// For dnf and yum it is the repository's directory; or a file whose name ends with .repo, which is fetched; or
	// with .rpm, a package that is installed. For apk it is what a line of /etc/apk/repositories says; with a Distribution and
	// Components there is a line for each component. On Ubuntu "ppa:owner/name" is one of Launchpad's personal package archives.
	URL string

	// Distribution and Components are those of a deb repository, such as "bookworm" and {"main"}. No Distribution is the code name
	// of the host's release. One that ends with a slash is a path, and has no components.
	Distribution string
	Components   []string

	// Key is the key that the repository's contents are signed with: an OpenPGP key for apt, dnf and yum, armoured or not; a PEM file
	// for apk, which knows keys by the names of their files, so that KeyURL has to be set as well, and is not fetched.
	Key string

	// KeyURL is where the key is; https, unless Options.InsecureKeyURLs is set. The key is fetched by the orchestrator, not by the host.
	KeyURL string

	// KeyID is the fingerprint, or its last 16 digits at least, of an OpenPGP key that is fetched from a key server: Cyclid's key_id.
	//
	// Without any of the three the repository is only of use if it is signed with a key that the host knows.
	KeyID string
}

// Provisioner prepares build hosts. It is safe for concurrent use.
type Provisioner interface {
	// Prepare gives the host that t leads to what env asks for. The error names the step that failed, and contains
	// the end of what the package manager said. It may be called again after a failure.
	Prepare(ctx context.Context, t transport.Transport, h Host, env Environment) error
}
