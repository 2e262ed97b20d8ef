# Says by its status how far the host has come with its arguments: 75 is init not yet, 70 init failed, 76 cloud-init not yet, 71 cloud-init failed.
for what; do
	case $what in
	init)
		if [ -d /run/systemd/system ]; then
			init=systemd
		else
			init=$(readlink /proc/1/exe 2>/dev/null)
			init=${init##*/}
		fi
		case $init in
		systemd)
			case $(systemctl is-system-running 2>/dev/null) in
			running | degraded) continue ;;
			stopping) exit 70 ;;
			esac
			exit 75
			;;
		esac
		if [ -d /etc/runlevels/default ] && [ -x /sbin/openrc ]; then
			# OpenRC writes the run level down as it enters it, and has this directory until it has started everything.
			[ -e /run/openrc/softlevel ] || exit 75
			read -r level </run/openrc/softlevel
			[ "$level" = default ] && [ ! -e /run/openrc/rc.starting ] || exit 75
		fi
		;;
	cloud-init)
		command -v cloud-init >/dev/null 2>&1 || continue
		case $(cloud-init status 2>/dev/null) in
		*running*) exit 76 ;;
		*error*) exit 71 ;;
		esac
		;;
	esac
done
exit 0
