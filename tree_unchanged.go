package transport

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// What the host has of a tree already, if TreeOptions.SkipUnchanged asks for it. What is not known is sent.

// ErrUnchanged is the reason that TreeOptions.Skipped gets for a file that the host has already.
var ErrUnchanged = errors.New("the host has it already")

// maxKnown bounds the memory for what the host has: files, of which a hash is kept.
const maxKnown = 1 << 18

// known is what files the host has.
type known struct {
	lines int
	files map[[16]byte]struct{}
}

// knownKey is made of all that has to agree.
func knownKey(name string, size int64, perm uint64, sec int64) [16]byte {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %o %d %s", size, perm, sec, name))
	return [16]byte(sum[:])
}

func (k *known) unchanged(e entry) bool {
	if k == nil {
		return false
	}
	_, ok := k.files[knownKey(e.name, e.size, uint64(e.mode.Perm()), max(0, e.modified.Unix()))]
	return ok
}

// listKnown lists the regular files below $1 that belong to $2, UID:GID, or, if that is empty, to who runs it: mode, size, time and path. A path with
// a line break could be taken for several lines. Not every find and stat can do this: then there is less in the list.
const listKnown = `LC_ALL=C; export LC_ALL
cd "$1" 2>/dev/null || exit 0
case $2 in
"") set -- -user "$(id -u)";;
*) set -- -user "${2%:*}" -group "${2#*:}";;
esac
if stat -c %s . >/dev/null 2>&1; then o=-c f='%a %s %Y %n'; else o=-f f='%Mp%Lp %z %m %N'; fi
find . -type f ! -path '*
*' "$@" -exec stat "$o" "$f" {} + 2>/dev/null
exit 0`

// learn asks the host's commands what it has.
func (tr *tree) learn(ctx context.Context, t Transport, dst, owner string) error {
	tr.known = &known{files: map[[16]byte]struct{}{}}
	err := t.Exec(ctx, Command{Args: Shell(listKnown, relative(dst), owner), Dir: "/", Stdout: &knownLines{known: tr.known}})
	if _, exited := ExitCode(err); exited || noShell(err) || errors.Is(err, errKnownEnough) {
		return nil
	}
	return err
}

var errKnownEnough = errors.New("enough is known")

// knownLines takes the list.
type knownLines struct {
	*known
	line []byte // that has begun
}

func (k *knownLines) Write(p []byte) (int, error) {
	for rest := p; ; {
		line, more, whole := bytes.Cut(rest, []byte{'\n'})
		if len(k.line)+len(line) > maxTreePath+64 {
			return 0, errKnownEnough
		}
		k.line = append(k.line, line...)
		if !whole {
			return len(p), nil
		}
		if k.lines++; k.lines > maxKnown {
			return 0, errKnownEnough
		}
		k.add(string(k.line))
		k.line, rest = k.line[:0], more
	}
}

func (k *known) add(line string) {
	fields := strings.SplitN(line, " ", 4)
	if len(fields) < 4 {
		return
	}
	perm, err := strconv.ParseUint(fields[0], 8, 16)
	size, err2 := strconv.ParseInt(fields[1], 10, 64)
	sec, err3 := strconv.ParseInt(fields[2], 10, 64)
	if errors.Join(err, err2, err3) == nil {
		k.files[knownKey(strings.TrimPrefix(fields[3], "./"), size, perm, sec)] = struct{}{}
	}
}
