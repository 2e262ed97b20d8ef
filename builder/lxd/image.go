package lxd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/canonical/lxd/shared/api"

	"github.com/lxdtransport/transport/builder"
)

// publicServers are those that lxc knows as ubuntu and images.
var publicServers = []ImageServer{ubuntuServer, imagesServer}

var (
	ubuntuServer = ImageServer{URL: "https://cloud-images.ubuntu.com/releases", Alias: func(os string) string {
		version, _ := strings.CutPrefix(os, "ubuntu_")
		if version == os {
			return ""
		}
		return version
	}}
	imagesServer = ImageServer{URL: "https://images.lxd.canonical.com", Alias: slashed}
)

// slashed makes debian/12 of debian_12.
func slashed(os string) string { return strings.Replace(os, "_", "/", 1) }

// codenames are the other names of releases that images are commonly known by.
var codenames = map[string]string{
	"debian_9": "stretch", "debian_10": "buster", "debian_11": "bullseye", "debian_12": "bookworm", "debian_13": "trixie", "debian_14": "forky",
	"ubuntu_16.04": "xenial", "ubuntu_18.04": "bionic", "ubuntu_20.04": "focal", "ubuntu_22.04": "jammy", "ubuntu_24.04": "noble",
}

// dotted writes the version of an operating system with dots, which Cyclid's documentation writes with underscores: ubuntu_14_04.
func dotted(os string) string {
	name, version, ok := strings.Cut(os, "_")
	if !ok {
		return os
	}
	return name + "_" + strings.ReplaceAll(version, "_", ".")
}

// spellings are the aliases under which the image of an operating system is looked for.
func spellings(os string) []string {
	all := []string{os}
	add := func(aliases ...string) {
		for _, a := range aliases {
			if !slices.Contains(all, a) {
				all = append(all, a)
			}
		}
	}
	os = dotted(os)
	name, version, ok := strings.Cut(os, "_")
	if !ok {
		return all
	}
	add(os, name+"/"+version, name+"-"+version, name+version)
	if code := codenames[os]; code != "" {
		add(name+"/"+code, name+"-"+code, code)
	}
	for numbered, code := range codenames {
		if number, ok := strings.CutPrefix(numbered, name+"_"); ok && code == version {
			add(code, numbered, name+"/"+number, name+"-"+number, name+number)
		}
	}
	return all
}

var validOS = regexp.MustCompile(`^[a-z][a-z0-9.-]*(_[A-Za-z0-9._-]+)?$`)

// imageOf is what Options.Images says of an operating system, "" if nothing.
func (b *Builder) imageOf(os string) string {
	if image, ok := b.opts.Images[os]; ok {
		return image
	}
	for other, image := range b.opts.Images {
		if dotted(other) == dotted(os) {
			return image
		}
	}
	return ""
}

// sources are the images that a host may be made from, in the order of trying.
func (b *Builder) sources(ctx context.Context, project string, spec builder.Spec) ([]api.InstanceSource, error) {
	image := spec.Image
	if image == "" {
		if spec.OS == "" {
			return nil, errors.New("neither Spec.Image nor Spec.OS is set")
		}
		image = b.imageOf(spec.OS)
	}
	if image == "" {
		return b.sourcesOf(ctx, project, spec)
	}
	for prefix, server := range map[string]ImageServer{"ubuntu:": ubuntuServer, "images:": imagesServer} {
		if alias, ok := strings.CutPrefix(image, prefix); ok {
			return []api.InstanceSource{server.source(alias)}, nil
		}
	}
	found, err := b.alias(ctx, project, image, spec.Type)
	if err == nil && found == nil && fingerprint.MatchString(image) {
		found, err = b.fingerprint(ctx, project, image)
	}
	if err == nil && found == nil {
		err = fmt.Errorf("the server has no image with the alias or fingerprint %q", image)
	}
	if err != nil {
		return nil, err
	}
	return []api.InstanceSource{*found}, nil
}

func (b *Builder) sourcesOf(ctx context.Context, project string, spec builder.Spec) ([]api.InstanceSource, error) {
	if !validOS.MatchString(spec.OS) {
		return nil, fmt.Errorf("Spec.OS %q is not of the form name_version, such as debian_12", spec.OS)
	}
	for _, alias := range spellings(spec.OS) {
		found, err := b.alias(ctx, project, alias, spec.Type)
		if err != nil || found != nil {
			return slices.DeleteFunc([]api.InstanceSource{deref(found)}, func(s api.InstanceSource) bool { return s.Type == "" }), err
		}
	}
	var sources []api.InstanceSource
	for _, server := range b.opts.ImageServers {
		if alias := server.alias(dotted(spec.OS)); alias != "" {
			sources = append(sources, server.source(alias))
		}
	}
	if sources == nil {
		return nil, fmt.Errorf("the server has no image with one of the aliases %s, and there is no image server to ask for %s",
			strings.Join(spellings(spec.OS), ", "), spec.OS)
	}
	return sources, nil
}

func deref(s *api.InstanceSource) api.InstanceSource {
	if s == nil {
		return api.InstanceSource{}
	}
	return *s
}

func (s ImageServer) alias(os string) string {
	if s.Alias == nil {
		if strings.Contains(s.URL, "cloud-images.ubuntu.com") {
			return ubuntuServer.Alias(os)
		}
		return slashed(os)
	}
	return s.Alias(os)
}

func (s ImageServer) source(alias string) api.InstanceSource {
	return api.InstanceSource{Type: "image", Mode: "pull", Protocol: "simplestreams", Server: s.URL, Alias: alias}
}

// alias finds an image of the server by an alias; nil if there is none of that type.
func (b *Builder) alias(ctx context.Context, project, alias, kind string) (*api.InstanceSource, error) {
	var a api.ImageAliasesEntry
	err := b.rest.get(ctx, "/1.0/images/aliases/"+url.PathEscape(alias), in(project), &a)
	switch {
	case notFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("looking for the image %q: %w", alias, err)
	case a.Type != "" && a.Type != cmp.Or(kind, string(api.InstanceTypeContainer)):
		return nil, nil
	}
	return &api.InstanceSource{Type: "image", Fingerprint: a.Target}, nil
}

var fingerprint = regexp.MustCompile(`^[0-9a-f]{4,64}$`)

// fingerprint finds an image of the server by the beginning of its fingerprint; nil if there is none.
func (b *Builder) fingerprint(ctx context.Context, project, print string) (*api.InstanceSource, error) {
	var i api.Image
	err := b.rest.get(ctx, "/1.0/images/"+print, in(project), &i)
	switch {
	case notFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("looking for the image %s: %w", print, err)
	}
	return &api.InstanceSource{Type: "image", Fingerprint: i.Fingerprint}, nil
}
