// Package provisioner prepares build hosts: it sets up package repositories and installs packages, over any
// [transport.Transport]. It knows nothing of where the host comes from.
package provisioner

import (
	"context"

	"github.com/lxdtransport/transport"
)

// Host is the host to prepare.
type Host struct {
	Name string // for errors and logs
	OS   string // such as "debian_12"; "": the host is asked
}

// Environment is what a host is to have.
type Environment struct {
	OS           string       // such as "debian_12"; "": what Host.OS says, or the host itself
	Repositories []Repository // added in this order, before any package is installed
	Packages     []string     // in the names of the host's distribution, a version with them as its package manager writes it
}

// Repository is a package repository to add to the host.
type Repository struct {
	// URL is where the repository is. A deb repository has a Distribution besides. The URL of a dnf or yum repository is that
	// of its directory, or of a file that ends with ".repo" or, to be installed, ".rpm". "ppa:owner/name" is one of
	// Launchpad's personal package archives, on Ubuntu.
	URL string

	// Distribution and Components are those of a deb repository, such as "bookworm" and "main". A Distribution that ends with a
	// slash is a path, and has no components.
	Distribution string
	Components   []string

	// KeyURL is where the key is that the repository is signed with; https only, unless the provisioner was told
	// otherwise. Key is the key itself, armoured or not: for apk in the PEM form. KeyID is the fingerprint of a key that is to be fetched
	// from a key server, as in Cyclid's key_id; it is the weakest of the three.
	KeyURL, Key, KeyID string
}

// Provisioner prepares build hosts. It is safe for concurrent use.
type Provisioner interface {
	// Prepare gives the host that t leads to what env asks for. The error names the step that failed, and contains
	// the end of what the package manager said. It may be called again after a failure.
	Prepare(ctx context.Context, t transport.Transport, h Host, env Environment) error
}
