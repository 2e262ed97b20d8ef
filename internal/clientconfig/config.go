// Package clientconfig reads what the lxc and incus commands have stored on this machine: remotes, certificates, keys and tokens.
package clientconfig

import (
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"go.yaml.in/yaml/v2" // v3 keeps 200 KB of itself in every program that imports it, through its package variables
)

// Remote is a server as a client's configuration has it, with the files that belong to it.
type Remote struct {
	Name    string
	File    string // where it stands
	Addr    string // https://host:port, unix:///path or unix://
	Auth    string // tls, oidc
	Project string

	ClientCert, ClientKey string // PEM; "": none
	ServerCert            string // PEM, what the server's certificate was when the remote was added; "": none
	CA                    string // PEM, of servers in PKI mode, whose certificates are not stored
	Tokens                []byte // JSON, of OIDC
	TokensFile            string // where they stand
}

// config is config.yml.
type config struct {
	Default string           `yaml:"default-remote"`
	Remotes map[string]*stub `yaml:"remotes"`
}

type stub struct {
	Addr     string `yaml:"addr"`
	AuthType string `yaml:"auth_type"`
	Project  string `yaml:"project"`
	Protocol string `yaml:"protocol"`
	Public   bool   `yaml:"public"`
}

// ErrUnknown says that no configuration has the remote.
var ErrUnknown = errors.New("no such remote")

// Dirs are the directories in which the commands keep their configurations, in the order in which they count.
func Dirs() []string {
	if dir := os.Getenv("LXD_CONF"); dir != "" {
		return []string{dir}
	}
	var dirs []string
	home, err := os.UserHomeDir()
	if err == nil {
		dirs = append(dirs, filepath.Join(home, ".config", "lxc"), filepath.Join(home, "snap", "lxd", "common", "config"))
	}
	if dir := os.Getenv("INCUS_CONF"); dir != "" {
		return append(dirs, dir)
	}
	if err == nil {
		dirs = append(dirs, filepath.Join(home, ".config", "incus"))
	}
	return dirs
}

// Find looks a remote up. The name "" is that of the default remote.
func Find(name string) (*Remote, error) {
	var looked, known []string
	for _, dir := range Dirs() {
		file := filepath.Join(dir, "config.yml")
		looked = append(looked, file)
		c, err := read(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		want := name
		if want == "" {
			want = c.Default
		}
		if want == "" {
			continue
		}
		if s := c.Remotes[want]; s != nil {
			return s.remote(dir, file, want)
		}
		if name == "" && want == "local" {
			return &Remote{Name: want, File: file, Addr: "unix://"}, nil
		}
		if name == "" {
			return nil, fmt.Errorf("%s: the default remote %q is not among its remotes", file, want)
		}
		known = append(known, slices.Sorted(maps.Keys(c.Remotes))...)
	}
	if name == "" {
		return &Remote{Name: "local", Addr: "unix://"}, nil
	}
	err := fmt.Errorf("%w: %q is not in %s", ErrUnknown, name, strings.Join(looked, ", "))
	if known != nil {
		err = fmt.Errorf("%w, which have %s", err, strings.Join(known, ", "))
	}
	return nil, err
}

func read(file string) (*config, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	c := new(config)
	if err := yaml.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("%s: it is no configuration of lxc or incus: %w", file, err)
	}
	return c, nil
}

// remote reads the files that belong to a remote.
func (s *stub) remote(dir, file, name string) (*Remote, error) {
	switch {
	case s.Addr == "":
		return nil, fmt.Errorf("%s: remote %q has no address", file, name)
	case s.Protocol == "simplestreams" || s.Public:
		return nil, fmt.Errorf("%s: remote %q is a server of images, not one that has instances", file, name)
	case name != filepath.Base(name):
		return nil, fmt.Errorf("%s: remote %q has a name that is none of a file", file, name)
	}
	r := &Remote{Name: name, File: file, Addr: s.Addr, Auth: s.AuthType, Project: s.Project}
	if strings.HasPrefix(s.Addr, "unix:") {
		return r, nil
	}
	var err error
	load := func(to *string, parts ...string) {
		if err != nil {
			return
		}
		var b []byte
		b, err = os.ReadFile(filepath.Join(append([]string{dir}, parts...)...))
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		*to = string(b)
	}
	load(&r.ServerCert, "servercerts", name+".crt")
	if r.Auth != "oidc" { // as for lxc
		load(&r.CA, "client.ca")
	}
	var tokens string
	load(&tokens, "oidctokens", name+".json")
	r.Tokens, r.TokensFile = []byte(tokens), filepath.Join(dir, "oidctokens", name+".json")
	cert, key := filepath.Join(dir, "clientcerts", name+".crt"), filepath.Join(dir, "clientcerts", name+".key")
	if _, statErr := os.Stat(cert); statErr != nil {
		cert, key = filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")
	}
	if err == nil && r.Auth != "oidc" {
		r.ClientCert, r.ClientKey, err = Pair(cert, key)
	}
	if err != nil {
		return nil, fmt.Errorf("remote %q of %s: %w", name, file, err)
	}
	if r.ServerCert != "" {
		if block, _ := pem.Decode([]byte(r.ServerCert)); block == nil {
			return nil, fmt.Errorf("remote %q of %s: %s is not a certificate in PEM", name, file, filepath.Join(dir, "servercerts", name+".crt"))
		}
	}
	return r, nil
}

// Pair reads a certificate and its key, and checks that nobody else may read the key. Both are empty where there is no certificate.
func Pair(certFile, keyFile string) (cert, key string, err error) {
	c, err := os.ReadFile(certFile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", nil
	}
	if err != nil {
		return "", "", err
	}
	if key, err = Key(keyFile); err != nil {
		return "", "", err
	}
	if _, err := tls.X509KeyPair(c, []byte(key)); err != nil {
		return "", "", fmt.Errorf("%s and %s: %w", certFile, keyFile, err)
	}
	return string(c), key, nil
}

// Key reads a key, and checks that nobody else may read it.
func Key(file string) (string, error) {
	info, err := os.Stat(file)
	if err != nil {
		return "", err
	}
	if runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("the key %s can be read by others (mode %#o): chmod 600 it", file, info.Mode().Perm())
	}
	k, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	block, _ := pem.Decode(k)
	switch {
	case block == nil:
		return "", fmt.Errorf("%s is not a key in PEM", file)
	case block.Type == "ENCRYPTED PRIVATE KEY", strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED"):
		return "", fmt.Errorf("the key %s is encrypted, and there is nobody to ask for its password: decrypt it, or give another one (LXDOptions.TLSClientKey)", file)
	}
	return string(k), nil
}
