package provisioner

import (
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
)

// maxFetch bounds what is fetched: keys and .repo files are small.
const maxFetch = 1 << 20

// fetch gets what is small from the web. What may be a hiccup is tried again, as often as a step is.
func (s *session) fetch(what, from string) ([]byte, error) {
	pause := firstPause
	for attempt := 1; ; attempt++ {
		b, again, err := s.fetchOnce(from)
		if err == nil {
			return b, nil
		}
		err = fmt.Errorf("fetching %s from %s: %w", what, redacted(from), err)
		if !again || s.ctx.Err() != nil || attempt >= s.p.opts.Attempts {
			return nil, err
		}
		if cause := s.pause(&pause); cause != nil {
			return nil, errors.Join(cause, err)
		}
	}
}

func (s *session) fetchOnce(from string) (b []byte, again bool, err error) {
	req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, from, nil)
	if err != nil {
		return nil, false, errors.New("that is no URL")
	}
	resp, err := s.p.opts.HTTPClient.Do(req)
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err // it repeats the URL
		}
		return nil, true, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode != http.StatusOK:
		return nil, resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests, errors.New(resp.Status)
	case req.URL.Scheme == "https" && resp.Request.URL.Scheme != "https":
		return nil, false, errors.New("it leads away from https")
	}
	b, err = io.ReadAll(io.LimitReader(resp.Body, maxFetch+1))
	if err != nil {
		return nil, true, err
	}
	if len(b) > maxFetch {
		return nil, false, fmt.Errorf("it is larger than %d bytes", maxFetch)
	}
	return b, false, nil
}

// key returns a repository's key; nil if it has none.
func (s *session) key(r Repository) ([]byte, error) {
	switch {
	case r.Key != "":
		return []byte(r.Key), nil
	case r.KeyURL != "":
		if err := checkWord(r.KeyURL); err != nil {
			return nil, fmt.Errorf("the key's URL: %w", err)
		}
		if !strings.HasPrefix(r.KeyURL, "https://") && !(s.p.opts.InsecureKeyURLs && strings.HasPrefix(r.KeyURL, "http://")) {
			return nil, errors.New("the key's URL does not begin with https://: whoever is on the way could put in another key")
		}
		return s.fetch("the key", r.KeyURL)
	case r.KeyID != "":
		return s.keyOf(r.KeyID)
	}
	return nil, nil
}

var validKeyID = regexp.MustCompile(`^([0-9A-F]{8}|[0-9A-F]{16}|[0-9A-F]{40})$`)

// keyOf fetches a key from the key server, and makes sure that it is the one that was asked for.
func (s *session) keyOf(id string) ([]byte, error) {
	id = strings.TrimPrefix(strings.ToUpper(strings.ReplaceAll(id, " ", "")), "0X")
	switch {
	case !validKeyID.MatchString(id):
		return nil, fmt.Errorf("the key's ID %q is not 40 or 16 hexadecimal digits", id)
	case len(id) == 8 && !s.p.opts.InsecureShortKeyIDs:
		return nil, fmt.Errorf("the key's ID %s has 8 digits, to which anybody can make a key that fits: use the whole fingerprint", id)
	}
	query := url.Values{"op": {"get"}, "options": {"mr"}, "search": {"0x" + id}}
	key, err := s.fetch("the key "+id, s.p.opts.KeyServer+"/pks/lookup?"+query.Encode())
	if err != nil {
		return nil, err
	}
	print, err := fingerprint(key)
	if err == nil && !strings.HasSuffix(print, id) {
		err = fmt.Errorf("the key server gave the key %s", print)
	}
	if err != nil {
		return nil, fmt.Errorf("the key %s: %w", id, err)
	}
	return key, nil
}

// armored reports whether a key is in OpenPGP's text form.
func armored(key []byte) bool {
	return bytes.HasPrefix(bytes.TrimSpace(key), []byte("-----BEGIN PGP PUBLIC KEY BLOCK-----"))
}

// dearmor returns what is in the first block of OpenPGP's text form. Its checksum is not looked at: what counts is the fingerprint.
func dearmor(key []byte) ([]byte, error) {
	_, rest, _ := strings.Cut(strings.ReplaceAll(string(key), "\r\n", "\n"), "-----BEGIN PGP PUBLIC KEY BLOCK-----\n")
	body, _, ok := strings.Cut(rest, "\n-----END PGP PUBLIC KEY BLOCK-----")
	if !ok {
		return nil, errors.New("it has no end")
	}
	if _, after, ok := strings.Cut("\n"+body, "\n\n"); ok { // the headers
		body = after
	}
	var text strings.Builder
	for line := range strings.Lines(body) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "=") {
			break
		}
		text.WriteString(strings.TrimSpace(line))
	}
	return base64.StdEncoding.DecodeString(text.String())
}

// fingerprint returns that of the first key: of version 4, the only one that key servers have.
func fingerprint(key []byte) (string, error) {
	if armored(key) {
		var err error
		if key, err = dearmor(key); err != nil {
			return "", fmt.Errorf("that is no OpenPGP key: %w", err)
		}
	}
	body, ok := firstPacket(key)
	if !ok || len(body) == 0 || body[0] != 4 || len(body) > 0xffff {
		return "", errors.New("that is no OpenPGP key of version 4")
	}
	h := sha1.New() // as RFC 4880 wants it
	h.Write([]byte{0x99})
	_ = binary.Write(h, binary.BigEndian, uint16(len(body)))
	h.Write(body)
	return strings.ToUpper(hex.EncodeToString(h.Sum(nil))), nil
}

// firstPacket returns the body of the first packet, if that is a public key.
func firstPacket(b []byte) ([]byte, bool) {
	const publicKey = 6
	if len(b) < 2 || b[0]&0x80 == 0 {
		return nil, false
	}
	tag, kind := int(b[0]&0x3f), b[0]&3
	var size, head int
	switch {
	case b[0]&0x40 != 0: // the new form
		switch n := int(b[1]); {
		case n < 192:
			size, head = n, 2
		case n < 224 && len(b) > 2:
			size, head = (n-192)<<8+int(b[2])+192, 3
		case n == 255 && len(b) > 5:
			size, head = int(binary.BigEndian.Uint32(b[2:])), 6
		default:
			return nil, false
		}
	case kind == 0:
		tag, size, head = tag>>2, int(b[1]), 2
	case kind == 1 && len(b) > 2:
		tag, size, head = tag>>2, int(binary.BigEndian.Uint16(b[1:])), 3
	case kind == 2 && len(b) > 4:
		tag, size, head = tag>>2, int(binary.BigEndian.Uint32(b[1:])), 5
	default:
		return nil, false
	}
	if tag != publicKey || size < 0 || size > len(b)-head {
		return nil, false
	}
	return b[head : head+size], true
}

var validPPA = regexp.MustCompile(`^ppa:([a-z0-9][a-z0-9.+-]*)/([a-z0-9][a-z0-9.+-]*)$`)

// ppa turns one of Launchpad's personal package archives into a repository.
func (s *session) ppa(r Repository) (Repository, error) {
	m := validPPA.FindStringSubmatch(r.URL)
	if m == nil {
		return r, errors.New("that is not of the form ppa:owner/name")
	}
	if s.os.id != "ubuntu" {
		return r, fmt.Errorf("such archives are for Ubuntu; this is %s", s.os.id)
	}
	r.URL = "https://ppa.launchpadcontent.net/" + m[1] + "/" + m[2] + "/ubuntu"
	if r.Components == nil {
		r.Components = []string{"main"}
	}
	if r.Key+r.KeyURL+r.KeyID != "" {
		return r, nil
	}
	b, err := s.fetch("what Launchpad knows of it", "https://api.launchpad.net/1.0/~"+m[1]+"/+archive/ubuntu/"+m[2])
	if err != nil {
		return r, err
	}
	var archive struct {
		Key string `json:"signing_key_fingerprint"`
	}
	if err := json.Unmarshal(b, &archive); err != nil || archive.Key == "" {
		return r, errors.New("no key is named by Launchpad")
	}
	r.KeyID = archive.Key
	return r, nil
}
