package transport

import (
	"context"
	"errors"
	"path"
	"strconv"
	"strings"
)

// busybox's tar makes symbolic links whose targets have ".." only when all else is there, so that the directories they are in get the time of
// now, and gives no link an owner. So these links do not come with its stream but behind it, with commands.

// lateLinks is what there is to do behind the stream: arguments of lateScript.
type lateLinks struct {
	args []string
	size int
	in   map[string]bool // the directories that are not left yet and have such links
}

// maxLate bounds the memory for it.
const maxLate = 16 << 20

// late reports whether busybox makes a link late.
func late(target string) bool {
	return strings.HasPrefix(target, "/") || strings.Contains(target, "..")
}

func (l *lateLinks) link(e entry) error {
	if l.in == nil {
		l.in = map[string]bool{}
	}
	l.in[path.Dir(e.name)] = true
	return l.add("l", "./"+e.name, e.target)
}

// leave takes a directory when all that is in it was taken.
func (l *lateLinks) leave(e entry) error {
	if !l.in[e.name] {
		return nil
	}
	delete(l.in, e.name)
	return l.add("d", "./"+e.name, octal(e.mode), strconv.FormatInt(max(0, e.modified.Unix()), 10))
}

func (l *lateLinks) add(args ...string) error {
	for _, a := range args {
		l.size += len(a) + 16
	}
	if l.size > maxLate {
		return errors.New("the tree has more symbolic links with \"..\" than can be kept in mind for the host's tar, which is that of busybox")
	}
	l.args = append(l.args, args...)
	return nil
}

// lateScript gets the owner, or nothing, and the tree's directory as $1 and $2.
const lateScript = `o=$1; cd "$2" || exit; shift 2
while [ $# -gt 0 ]; do
	case $1 in
	l)
		[ -w "${2%/*}" ] || chmod u+w "${2%/*}" || exit
		rm -f "$2" && ln -s -- "$3" "$2" || exit
		[ -z "$o" ] || chown -h "$o" "$2" || exit
		shift 3;;
	d)
		chmod "$3" "$2" && touch -d "@$4" "$2" || exit
		shift 4;;
	esac
done`

// lateBatch is how many bytes of arguments a command gets.
const lateBatch = 48 << 10

func (l *lateLinks) run(ctx context.Context, t Transport, dst, owner string) error {
	for len(l.args) > 0 {
		n, size := 0, 0
		for n < len(l.args) && size < lateBatch {
			fields := 3
			if l.args[n] == "d" {
				fields = 4
			}
			for _, a := range l.args[n : n+fields] {
				size += len(a)
			}
			n += fields
		}
		said := new(edges)
		err := t.Exec(ctx, Command{Args: Shell(lateScript, append([]string{owner, relative(dst)}, l.args[:n]...)...), Dir: "/", Stderr: said})
		if err != nil {
			return tarError(err, said.String())
		}
		l.args = l.args[n:]
	}
	return nil
}
