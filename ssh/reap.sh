# Kills all processes that have one of the marks on its input, and all that descend from them. It says "killed MARK" of each, "left MARK" of
# each that did not die, and "done". It needs a shell and /proc, nothing else.
want=' '
while IFS= read -r m; do want="$want$m "; done
gone=' ' round=0 look=0 blank=' '
while [ $round -lt 50 ]; do
	round=$((round+1)) owners=' '
	if command -v grep >/dev/null 2>&1; then
		files=$(grep -ls TRANSPORT_COMMAND_ /proc/[0-9]*/environ 2>/dev/null)
		if [ $? -ge 126 ]; then files=$(echo /proc/[0-9]*/environ); fi
	else
		files=$(echo /proc/[0-9]*/environ)
	fi
	for f in $files; do
		pid=${f#/proc/}; pid=${pid%/environ}
		while IFS= read -r l || [ -n "$l" ]; do
			while :; do
				case $l in *TRANSPORT_COMMAND_*=*) ;; *) break;; esac
				l=${l#*TRANSPORT_COMMAND_} m=${l%%=*}
				case $want in *" $m "*) owners="$owners$pid:$m "; break 2;; esac
			done
		done 2>/dev/null <$f
	done
	if [ "$owners" = ' ' ]; then
		# A process that is about to become another program has no environment for a moment, and may have lost its parent: whoever has none is
		# looked at once more, and a few times where they come and go.
		new=' '
		for f in $(grep -Ls . /proc/[0-9]*/environ 2>/dev/null); do
			if [ -e "${f%environ}exe" ]; then new="$new$f "; fi
		done
		if [ "$new" = "$blank" ] || [ $look = 5 ]; then break; fi
		blank=$new look=$((look+1))
		sleep 0.05 2>/dev/null
		continue
	fi
	look=0 pairs=
	for f in /proc/[0-9]*/stat; do
		s=
		while IFS= read -r l || [ -n "$l" ]; do s="$s$l "; done 2>/dev/null <$f
		s=${s##*) } state=${s%% *} s=${s#* }
		case $state in Z|X|'') continue;; esac
		pid=${f#/proc/}
		pairs="$pairs ${pid%/stat}:${s%% *}"
	done
	again=1
	while [ $again = 1 ]; do
		again=0
		for p in $pairs; do
			case $owners in *" ${p%%:*}:"*) continue;; esac
			case $owners in *" ${p#*:}:"*)
				m=${owners#*" ${p#*:}:"} again=1
				owners="$owners${p%%:*}:${m%% *} ";;
			esac
		done
	done
	for o in $owners; do
		pid=${o%%:*}
		if [ "$pid" = 1 ] || [ "$pid" = $$ ]; then continue; fi
		case $gone in *" $o "*) ;; *) gone="$gone$o "; echo "killed ${o#*:}";; esac
		kill -9 "$pid" 2>/dev/null
	done
done
for o in $owners; do echo "left ${o#*:}"; done
echo done
