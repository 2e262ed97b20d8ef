# Says by its status how far the host has come: 75 is not yet, 70 is failed.
case $1 in
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
		running | degraded) exit 0 ;;
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
	exit 0
	;;
cloud-init)
	command -v cloud-init >/dev/null 2>&1 || exit 0
	case $(cloud-init status 2>/dev/null) in
	*running*) exit 75 ;;
	*error*) exit 70 ;;
	esac
	exit 0
	;;
esac
