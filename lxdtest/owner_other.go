//go:build !unix

package lxdtest

import "io/fs"

// nonBlock is for FIFOs, which are not here.
const nonBlock = 0

// ownerOf is the owner as the instance sees it: who runs the test is root inside.
func ownerOf(fs.FileInfo) (uid, gid int) { return 0, 0 }
