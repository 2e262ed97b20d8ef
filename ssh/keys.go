package ssh

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	xssh "golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/crypto/ssh/knownhosts"
)

// What the two sides show each other: our keys, and the host's.

// readKeys reads the key files.
func (o *Options) readKeys() ([]xssh.Signer, error) {
	keys := slices.Clone(o.Signers)
	files, byDefault := o.KeyFiles, false
	if len(files) == 0 && o.Agent == "" && len(keys) == 0 {
		byDefault = true
		o.Agent = os.Getenv("SSH_AUTH_SOCK")
		if home, err := os.UserHomeDir(); err == nil {
			for _, name := range []string{"id_ed25519", "id_ecdsa", "id_rsa"} {
				files = append(files, filepath.Join(home, ".ssh", name))
			}
		}
	}
	for _, file := range files {
		key, err := o.readKey(file)
		_, encrypted := errors.AsType[*xssh.PassphraseMissingError](err)
		switch {
		case byDefault && (encrypted || errors.Is(err, fs.ErrNotExist)):
		case err != nil:
			return nil, fmt.Errorf("key file %s: %w", file, err)
		default:
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 && o.Agent == "" {
		return nil, errors.New("there is no key to log in with: set Options.KeyFiles, Agent or Signers, or SSH_AUTH_SOCK")
	}
	return keys, nil
}

func (o *Options) readKey(file string) (xssh.Signer, error) {
	text, err := os.ReadFile(file)
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		return nil, p.Err
	}
	key, err := xssh.ParsePrivateKey(text)
	if _, encrypted := errors.AsType[*xssh.PassphraseMissingError](err); !encrypted {
		return key, err
	}
	if o.Passphrase == nil {
		return nil, fmt.Errorf("it is encrypted, and there is no Options.Passphrase: %w", err)
	}
	passphrase, err := o.Passphrase(file)
	if err != nil {
		return nil, fmt.Errorf("its passphrase: %w", err)
	}
	return xssh.ParsePrivateKeyWithPassphrase(text, passphrase)
}

// clientConfig is what x/crypto needs for one connection.
type clientConfig struct {
	*xssh.ClientConfig
	keys       int   // that can be shown
	hostKeyErr error // why the host's key is not accepted
}

// clientConfig makes a configuration. done must be called after the login.
func (t *Transport) clientConfig() (_ *clientConfig, done func(), err error) {
	c := &clientConfig{ClientConfig: &xssh.ClientConfig{User: t.target.user}}
	check, algorithms, err := t.hostKeys()
	if err != nil {
		return nil, nil, err
	}
	c.HostKeyAlgorithms = algorithms
	c.HostKeyCallback = func(host string, remote net.Addr, key xssh.PublicKey) error {
		c.hostKeyErr = check(host, remote, key)
		return c.hostKeyErr
	}
	keys, done := t.keys, func() {}
	if t.opts.Agent != "" {
		conn, err := net.Dial("unix", t.opts.Agent)
		if err != nil {
			return nil, nil, fmt.Errorf("ssh-agent (Options.Agent, SSH_AUTH_SOCK): %w", err)
		}
		done = func() { conn.Close() }
		held, err := agent.NewClient(conn).Signers()
		if err != nil {
			done()
			return nil, nil, fmt.Errorf("ssh-agent %s: %w", t.opts.Agent, err)
		}
		keys = append(slices.Clone(keys), held...)
	}
	c.keys = len(keys)
	c.Auth = []xssh.AuthMethod{xssh.PublicKeys(keys...)}
	return c, done, nil
}

// hostKeys returns the check of the host's key, and the kinds of keys to ask the host for; nil: all.
func (t *Transport) hostKeys() (xssh.HostKeyCallback, []string, error) {
	o := &t.opts
	switch {
	case o.InsecureIgnoreHostKey:
		return xssh.InsecureIgnoreHostKey(), nil, nil
	case o.HostKeys != nil:
		return t.oneOf, algorithms(o.HostKeys), nil
	}
	files := o.KnownHosts
	if files == nil {
		files = defaultKnownHosts()
	}
	known, err := knownhosts.New(files...)
	if err != nil {
		return nil, nil, fmt.Errorf("known hosts (Options.KnownHosts): %w", err)
	}
	// A host has keys of several kinds, and shows one of a kind that we ask for: it has to be one that we know.
	var keys []xssh.PublicKey
	none, err := xssh.NewPublicKey(make(ed25519.PublicKey, ed25519.PublicKeySize))
	if err != nil {
		return nil, nil, err
	}
	if e, ok := errors.AsType[*knownhosts.KeyError](known(t.target.address, new(net.TCPAddr), none)); ok {
		for _, k := range e.Want {
			keys = append(keys, k.Key)
		}
	}
	return func(host string, _ net.Addr, key xssh.PublicKey) error {
		return explain(known(host, new(net.TCPAddr), key), host, key, files)
	}, algorithms(keys), nil
}

func defaultKnownHosts() (files []string) {
	candidates := []string{"/etc/ssh/ssh_known_hosts"}
	if home, err := os.UserHomeDir(); err == nil {
		candidates = append([]string{filepath.Join(home, ".ssh", "known_hosts")}, candidates...)
	}
	for _, name := range candidates {
		if _, err := os.Stat(name); err == nil {
			files = append(files, name)
		}
	}
	return files
}

// oneOf checks a key against HostKeys.
func (t *Transport) oneOf(_ string, _ net.Addr, key xssh.PublicKey) error {
	e := new(knownhosts.KeyError)
	for _, want := range t.opts.HostKeys {
		if string(want.Marshal()) == string(key.Marshal()) {
			return nil
		}
		e.Want = append(e.Want, knownhosts.KnownKey{Key: want})
	}
	return fmt.Errorf("the host's key %s %s is none of Options.HostKeys: somebody may sit between: %w", key.Type(), xssh.FingerprintSHA256(key), e)
}

// explain says what an error of knownhosts means, and what to try.
func explain(err error, host string, key xssh.PublicKey, files []string) error {
	e, ok := errors.AsType[*knownhosts.KeyError](err)
	switch {
	case !ok:
		return err
	case len(e.Want) == 0:
		return fmt.Errorf("the host's key %s %s is not known: if it is right, `ssh-keyscan` or a first `ssh` adds it to %s: %w",
			key.Type(), xssh.FingerprintSHA256(key), orNone(files), err)
	}
	want := e.Want[0]
	return fmt.Errorf("the host's key %s %s is not the one that %s:%d has for %s, %s: it has changed, or somebody sits between: %w",
		key.Type(), xssh.FingerprintSHA256(key), want.Filename, want.Line, knownhosts.Normalize(host), xssh.FingerprintSHA256(want.Key), err)
}

func orNone(files []string) string {
	if len(files) == 0 {
		return "~/.ssh/known_hosts"
	}
	return strings.Join(files, " or ")
}

// algorithms are the signatures that belong to some keys.
func algorithms(keys []xssh.PublicKey) (names []string) {
	for _, k := range keys {
		for _, name := range signatures(k.Type()) {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

func signatures(kind string) []string {
	if kind == xssh.KeyAlgoRSA {
		return []string{xssh.KeyAlgoRSASHA512, xssh.KeyAlgoRSASHA256}
	}
	return []string{kind}
}
