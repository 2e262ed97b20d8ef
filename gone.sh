# Says "gone" if no process can be the command with the mark on its input. The host gives what it executes no parent: of those that have none, and a
# mark of another command of ours or none at all, the command may be one of the latter, if it has cleared its environment. It needs a shell
# and /proc, nothing else.
IFS= read -r mark
parent_of() {
	s=
	while IFS= read -r l || [ -n "$l" ]; do s="$s$l "; done 2>/dev/null <"/proc/$1/stat"
	s=${s##*) } s=${s#* }
	parent=${s%% *}
}
parent_of $$
[ "$parent" = 0 ] || exit 0 # not to be told from other processes
for f in /proc/[0-9]*; do
	pid=${f#/proc/}
	if [ "$pid" = 1 ] || [ "$pid" = $$ ]; then continue; fi
	parent_of "$pid"
	[ "$parent" = 0 ] || continue
	whose=nobody
	while IFS= read -r l || [ -n "$l" ]; do
		case $l in
		*"TRANSPORT_COMMAND_$mark="*) exit 0;;
		*TRANSPORT_COMMAND_*=*) whose=another;;
		esac
	done 2>/dev/null <"$f/environ"
	if [ $whose = nobody ] && [ -e "$f/stat" ]; then exit 0; fi
done
echo gone
