package lxd

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/lxdtransport/transport/builder"
)

// Labels are keys of the instance's configuration that LXD itself does not read.
const (
	labelPrefix = "user.transport."
	runKey      = labelPrefix + "run"
	ownerKey    = labelPrefix + "owner"
	expiryKey   = labelPrefix + "expiry" // RFC 3339, UTC
	poolKey     = labelPrefix + "pool"   // "template" or "warm"
	osKey       = labelPrefix + "os"
)

// reserved are the names of labels that are ours.
var reserved = map[string]bool{"owner": true, "expiry": true, "pool": true, "os": true}

var validLabel = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

const maxLabel = 4 << 10

// labels are the configuration keys by which a host is known.
func (b *Builder) labels(spec builder.Spec) (map[string]string, error) {
	labels := map[string]string{ownerKey: b.owner, runKey: random(), expiryKey: b.expiry(spec.TTL)}
	if spec.OS != "" {
		labels[osKey] = spec.OS
	}
	for name, value := range spec.Labels {
		switch {
		case !validLabel.MatchString(name):
			return nil, fmt.Errorf("Spec.Labels: the name %q does not consist of letters, digits, '.', '_' and '-'", name)
		case reserved[name]:
			return nil, fmt.Errorf("Spec.Labels: the name %q is the builder's own", name)
		case len(value) > maxLabel || strings.ContainsAny(value, "\x00\n\r"):
			return nil, fmt.Errorf("Spec.Labels: the value of %q is longer than %d bytes, or has a line break or NUL", name, maxLabel)
		case value == "":
			continue // as LXD has it
		}
		labels[labelPrefix+name] = value
	}
	return labels, nil
}

func (b *Builder) expiry(ttl time.Duration) string {
	return time.Now().Add(cmp.Or(ttl, b.opts.TTL)).UTC().Format(time.RFC3339)
}
