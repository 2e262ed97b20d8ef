//go:build !windows

package transport

import (
	"errors"
	"io/fs"
	"os"
)

// renameNew is a rename that replaces nothing: the error is [fs.ErrExist] then.
func renameNew(from, to string) error {
	err := os.Link(from, to)
	if err == nil {
		return os.Remove(from)
	}
	if errors.Is(err, fs.ErrExist) {
		return err
	}
	// A file system without hard links. Whoever is next finds an empty file for a moment, which is an error, and not another's.
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Rename(from, to))
}
