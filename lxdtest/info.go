package lxdtest

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
)

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func (s *Server) getRoot(w http.ResponseWriter, _ *http.Request) { s.reply(w, []string{"/1.0"}) }

// getServer tells strangers no more than what they need to become known.
func (s *Server) getServer(w http.ResponseWriter, r *http.Request) {
	type untrusted struct {
		Extensions  []string `json:"api_extensions"`
		Status      string   `json:"api_status"`
		Version     string   `json:"api_version"`
		Auth        string   `json:"auth"`
		Public      bool     `json:"public"`
		AuthMethods []string `json:"auth_methods"`
	}
	u := untrusted{s.Version.Extensions, "stable", "1.0", "untrusted", false, []string{"tls"}}
	if _, trusted := s.identity(r); !trusted {
		s.reply(w, u)
		return
	}
	u.Auth = "trusted"
	addresses, print := []string{}, ""
	if s.Socket == "" {
		addresses = append(addresses, strings.TrimPrefix(s.URL, "https://"))
		if cert := s.Certificate(); cert != nil {
			print = fingerprint(cert)
		}
	}
	s.reply(w, struct {
		Config map[string]any `json:"config"`
		untrusted
		Environment map[string]any `json:"environment"`
	}{map[string]any{}, u, map[string]any{
		"addresses": addresses, "architectures": []string{"x86_64", "i686"}, "certificate": s.ServerCert,
		"certificate_fingerprint": print, "driver": "lxc", "driver_version": "5.0.2", "firewall": "nftables", "kernel": "Linux",
		"kernel_architecture": "x86_64", "kernel_features": map[string]string{}, "kernel_version": "6.1.0", "lxc_features": map[string]string{},
		"os_name": "lxdtest", "os_version": "1", "project": project(r), "server": s.Version.Server, "server_clustered": false,
		"server_event_mode": "full-mesh", "server_name": "lxdtest", "server_pid": 1, "server_version": s.Version.Release,
		"storage": "dir", "storage_version": "1", "storage_supported_drivers": []any{},
	}})
}

// imageFingerprint makes up one for an alias, always the same.
func imageFingerprint(alias string) string { return sha256Hex([]byte("lxdtest image " + alias)) }

func (s *Server) hasAlias(alias string) bool {
	return s.Images == nil || slices.Contains(s.Images, alias)
}

func (s *Server) hasImage(fingerprint string) bool {
	return slices.ContainsFunc(s.aliases(), func(a string) bool { return strings.HasPrefix(imageFingerprint(a), fingerprint) })
}

// aliases are those that can be listed: without a list in Images those that somebody has asked for, or one for show.
func (s *Server) aliases() []string {
	if s.Images != nil {
		return s.Images
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.asked) == 0 {
		return []string{"default"}
	}
	return slices.Clone(s.asked)
}

func aliasJSON(alias string) map[string]any {
	return map[string]any{"name": alias, "description": "", "target": imageFingerprint(alias), "type": "container"}
}

func imageJSON(alias string) map[string]any {
	epoch := time.Unix(0, 0).UTC()
	return map[string]any{
		"auto_update": false, "properties": map[string]string{"description": alias, "os": "lxdtest"}, "public": false, "expires_at": epoch,
		"profiles": []string{"default"}, "aliases": []map[string]string{{"name": alias, "description": ""}}, "architecture": "x86_64", "cached": false,
		"filename": alias + ".tar.gz", "fingerprint": imageFingerprint(alias), "size": 1, "type": "container", "created_at": epoch,
		"last_used_at": epoch, "uploaded_at": epoch,
	}
}

// list answers with addresses or, with recursion, whole things.
func list[T any](s *Server, w http.ResponseWriter, r *http.Request, names []string, base string, full func(string) T) {
	if r.URL.Query().Get("recursion") == "1" {
		things := []T{}
		for _, n := range names {
			things = append(things, full(n))
		}
		s.reply(w, things)
		return
	}
	urls := []string{}
	for _, n := range names {
		urls = append(urls, base+n)
	}
	s.reply(w, urls)
}

func (s *Server) getImages(w http.ResponseWriter, r *http.Request) {
	byPrint := map[string]string{}
	for _, a := range s.aliases() {
		byPrint[imageFingerprint(a)] = a
	}
	prints := slices.Sorted(maps.Keys(byPrint))
	list(s, w, r, prints, "/1.0/images/", func(p string) map[string]any { return imageJSON(byPrint[p]) })
}

func (s *Server) getImage(w http.ResponseWriter, r *http.Request) {
	for _, a := range s.aliases() {
		if strings.HasPrefix(imageFingerprint(a), r.PathValue("fingerprint")) {
			s.reply(w, imageJSON(a))
			return
		}
	}
	s.fail(w, 404, "Image not found")
}

func (s *Server) getAliases(w http.ResponseWriter, r *http.Request) {
	list(s, w, r, s.aliases(), "/1.0/images/aliases/", aliasJSON)
}

func (s *Server) getAlias(w http.ResponseWriter, r *http.Request) {
	if name := r.PathValue("name"); s.hasAlias(name) {
		s.mu.Lock()
		if s.Images == nil && !slices.Contains(s.asked, name) {
			s.asked = append(s.asked, name) // lxc goes on with its fingerprint
		}
		s.mu.Unlock()
		s.reply(w, aliasJSON(name))
		return
	}
	s.fail(w, 404, "Image alias not found")
}

func (s *Server) projects() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := map[string]bool{"default": true}
	for _, i := range s.instances {
		names[i.Project] = true
	}
	return slices.Sorted(maps.Keys(names))
}

func projectJSON(name string) map[string]any {
	return map[string]any{"name": name, "description": "", "used_by": []string{}, "config": map[string]string{
		"features.images": "true", "features.networks": "true", "features.profiles": "true", "features.storage.volumes": "true",
	}}
}

func (s *Server) getProjects(w http.ResponseWriter, r *http.Request) {
	list(s, w, r, s.projects(), "/1.0/projects/", projectJSON)
}

func (s *Server) getProject(w http.ResponseWriter, r *http.Request) {
	if name := r.PathValue("name"); slices.Contains(s.projects(), name) {
		s.reply(w, projectJSON(name))
		return
	}
	s.fail(w, 404, "Project not found")
}

func profileJSON(name string) map[string]any {
	return map[string]any{
		"config": map[string]string{}, "description": "Default LXD profile", "devices": map[string]any{"root": rootDevice}, "name": name, "used_by": []string{},
	}
}

func (s *Server) getProfiles(w http.ResponseWriter, r *http.Request) {
	list(s, w, r, []string{"default"}, "/1.0/profiles/", profileJSON)
}

func (s *Server) getProfile(w http.ResponseWriter, r *http.Request) {
	if r.PathValue("name") == "default" {
		s.reply(w, profileJSON("default"))
		return
	}
	s.fail(w, 404, "Profile not found")
}
