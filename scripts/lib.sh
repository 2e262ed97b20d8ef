# shellcheck shell=bash
# What scripts/lxd, scripts/cluster and scripts/incus have in common; sourced by them, after they have set
#
#   TOOL, STATE_VAR   name of the script and of its variable, for messages
#   STATE, MARKER     state directory, and the file in it that says whose it is
#   CONF              directory of the client's configuration and certificate
#   STATE_DIRS        directories to make below STATE
#   DAEMON, CLIENT    names of the programs
#   DAEMON_ENV        variables of the daemon (an array of NAME=value)
#   SUITE, MIRROR     Debian release of a tree, where it comes from (empty: debootstrap knows)
#   TREE_PACKAGES     what is installed in it (an array)
#   TREE_WANTED       1: a tree even where the package exists
#   CGROUP            v2: the daemon sees a cgroup2 hierarchy only; empty: what the machine has
#
# shellcheck disable=SC2034,SC2154 # variables that one side sets and the other reads

TREE=$STATE/tree LOGS=$STATE/log
POLICY=/usr/sbin/policy-rc.d POLICY_MARK='temporary, by transport scripts/lxd'
SAFE_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive PATH=$SAFE_PATH
umask 022

# ---- messages ----

START=${EPOCHREALTIME/[.,]/}
log() {
  local ms=$(((${EPOCHREALTIME/[.,]/} - START) / 1000))
  printf '[%3d.%d s] %s\n' $((ms / 1000)) $((ms % 1000 / 100)) "$*" >&2
}

die() {
  printf '%s: %s\n' "$TOOL" "$*" >&2
  exit 1
}

# die_log FILE MESSAGE: with the end of what was logged
die_log() {
  printf '%s: %s; the end of %s:\n' "$TOOL" "$2" "$1" >&2
  tail -n 15 -- "$1" 2>/dev/null | sed 's/^/  | /' >&2
  exit 1
}

# wait_for SECONDS CMD...: poll until CMD succeeds
wait_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1 </dev/null; do
    [[ $SECONDS -lt $end ]] || return 1
    sleep 0.1
  done
}

# ---- checks ----

need_root() { [[ $EUID = 0 ]] || die "must be run as root"; }
need_debian() {
  local ids=''
  # shellcheck source=/dev/null
  [[ ! -r /etc/os-release ]] || ids=$(. /etc/os-release && echo "${ID:-} ${ID_LIKE:-}")
  if [[ ! " $ids " =~ \ (debian|ubuntu)\  ]] || ! command -v apt-get >/dev/null; then
    die "needs Debian or Ubuntu (this is ${ids:-unknown})"
  fi
}

# Root in a container is an unprivileged user here: it has to walk to its root file system.
need_path() {
  local d=$STATE
  [[ $STATE =~ ^/[A-Za-z0-9/._+-]+$ ]] || die "unusual characters in the state directory: $STATE"
  # a unix socket's path holds 107 characters; the daemon puts the container's name in some
  [[ ${#STATE} -le 70 ]] || die "path of the state directory is too long: $STATE"
  while [[ $d != / ]]; do
    d=$(dirname "$d")
    if [[ -e $d && $((0$(stat -Lc %a "$d") & 1)) = 0 ]]; then
      die "$d is not o+x: containers under $STATE could not start (chmod o+x $d, or set $STATE_VAR)"
    fi
  done
}

# ---- state directory and lock ----

# Never adopt, or remove, a directory that something else lives in.
ours() { [[ -e $STATE/$MARKER ]]; }

need_ours() {
  [[ ! -e $STATE ]] || ours || [[ -d $STATE && -z $(ls -A "$STATE") ]] ||
    die "$STATE exists and was not made by this script"
}

# lock: one up or down at a time. The lock is on the directory itself, so that no lock
# file stays behind. Fails when a `down` that we waited for has removed it.
lock() {
  { exec 9<"$STATE"; } 2>/dev/null || return 1
  if ! flock -n 9; then
    log "waiting for another $TOOL, or for the apt-get that it left"
    flock -w 900 9 || die "$STATE is still locked after 15 minutes"
  fi
  [[ $STATE -ef /proc/self/fd/9 ]]
}

make_state() {
  need_ours
  while :; do
    mkdir -p "$STATE"
    if lock; then break; fi
  done
  chmod 711 "$STATE"
  touch "$STATE/$MARKER"
  mkdir -p "$LOGS" "$CONF" "${STATE_DIRS[@]}"
}

# ---- packages ----

installed() { dpkg-query "${@:2}" -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null | grep -q '^ii'; }
# The packages would start their own daemons; invoke-rc.d asks policy-rc.d first.
policy_on() {
  policy_off # left by a killed run
  [[ -e $POLICY ]] || install -m 755 <(printf '#!/bin/sh\n# %s\nexit 101\n' "$POLICY_MARK") "$POLICY"
}

policy_off() { if grep -qs "$POLICY_MARK" "$POLICY"; then rm -f "$POLICY"; fi; }
# with_dpkg_lock CMD...: by one script at a time, because of policy-rc.d (apt has locks of its own)
with_dpkg_lock() {
  local rc=0
  exec 8</var/lib/dpkg
  flock 8
  policy_on
  trap policy_off EXIT
  trap 'exit 130' INT TERM HUP # after the apt-get that runs, not under its hands
  "$@" || rc=$?
  policy_off
  trap - EXIT INT TERM HUP
  exec 8<&-
  return $rc
}

apt() { apt-get -o DPkg::Lock::Timeout=300 -qq "$@" >>"$LOGS/apt.log" 2>&1 </dev/null; }
apt_update() { apt update || { sleep 5 && apt update; }; }
apt_install() { apt -y --no-install-recommends install "$@"; }
apt_install_retry() { apt_install "$@" || { apt_update && apt_install "$@"; }; }
# packages NAME...: install those that are missing
packages() {
  local missing=() p
  for p in "$@"; do installed "$p" || missing+=("$p"); done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  log "apt-get install ${missing[*]}"
  with_dpkg_lock apt_install_retry "${missing[@]}" ||
    die_log "$LOGS/apt.log" "apt-get install ${missing[*]} failed"
}

# real_package: is LXD's package there, installed or to be had? Ubuntu's has nothing in it but the
# way to the snap ("1:0.10", "Transitional package - lxd -> snap (lxd)").
real_package() {
  local v
  if installed lxd; then
    v=$(dpkg-query -W -f '${Version}' lxd)
  else
    if [[ -z $(apt-cache policy debootstrap 2>/dev/null) ]]; then
      log "apt-get update"
      apt_update || die_log "$LOGS/apt.log" "apt-get update failed"
    fi
    v=$(apt-cache policy lxd 2>/dev/null | sed -n 's/^  Candidate: //p')
    ! apt-cache show "lxd=$v" 2>/dev/null | grep -Eiq '^(Depends|Pre-Depends|Description[^ ]*):.*(snap|transitional)' ||
      return 1
  fi
  [[ $v = [0-9]* ]] && dpkg --compare-versions "${v#*:}" ge 5
}

# choose_mode: host or tree, for as long as the state directory lives
choose_mode() {
  local mode=tree
  if [[ -s $STATE/mode ]]; then
    [[ $TREE_WANTED != 1 || $(<"$STATE/mode") = tree ]] ||
      die "the LXD in $STATE was made without a tree: $TOOL down first"
  else
    if [[ $TREE_WANTED != 1 ]] && real_package; then mode=host; fi
    [[ $mode = host || $TREE_WANTED = 1 ]] || log "no lxd package for this machine: a Debian tree instead"
    echo "$mode" >"$STATE/mode"
  fi
  read_mode
}

# read_mode: sets MODE and LXC (or what CLIENT is), the client of our daemon (never one that PATH may have, as /snap/bin/lxc)
read_mode() {
  MODE=host LXC=/usr/bin/$CLIENT
  [[ ! -s $STATE/mode ]] || MODE=$(<"$STATE/mode")
  [[ $MODE = host ]] || LXC=$STATE/bin/$CLIENT
}

# ---- the Debian tree ----

# private CMD...: in mount and pid namespaces of its own, which end with it (and with us, however
# we end): no mount and no process can stay behind.
private() {
  setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --propagation private "$@"
}

# shellcheck disable=SC2016
tree_mounts='r=$1; shift; mount -t proc proc "$r/proc"; mount -t sysfs sysfs "$r/sys"; mount --rbind /dev "$r/dev"; exec chroot "$r" "$@"'
in_new_tree() { private sh -ec "$tree_mounts" sh "$TREE.new" "$@" >>"$LOGS/tree.log" 2>&1 </dev/null; }

# shellcheck disable=SC2016 # apt's own variables
# apt_mirror: sets MIRROR, unless it is set, to that of this machine's own apt if it is a Debian; and its proxy
apt_mirror() {
  local p=''
  [[ -n $MIRROR ]] || MIRROR=$(apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    sed -n '\#^Debian Debian http#s/.* //p' | head -n 1) || true
  eval "$(apt-config shell p Acquire::http::Proxy 2>/dev/null)" || true
  if [[ -z ${http_proxy:-} && $p = http* ]]; then export http_proxy=$p; fi
}

make_tree() {
  [[ ! -d $TREE ]] || return 0
  packages debootstrap debian-archive-keyring
  log "debootstrap $SUITE (a minute or so)"
  rm -rf --one-file-system "$TREE.new"
  private debootstrap --variant=minbase --include=ca-certificates "$SUITE" "$TREE.new" ${MIRROR:+"$MIRROR"} \
    >"$LOGS/tree.log" 2>&1 </dev/null || die_log "$LOGS/tree.log" "debootstrap $SUITE failed"
  # Frozen snapshots of the mirrors are past their Valid-Until; debootstrap does not mind, apt would.
  printf 'Acquire::Check-Valid-Until "false";\n' >"$TREE.new/etc/apt/apt.conf.d/99snapshot"
  install -m 755 <(printf '#!/bin/sh\nexit 101\n') "$TREE.new$POLICY"
  cat /etc/resolv.conf >"$TREE.new/etc/resolv.conf" 2>/dev/null || true
  cat /etc/hosts >"$TREE.new/etc/hosts" 2>/dev/null || true
  log "apt-get install ${TREE_PACKAGES[0]} inside the tree"
  if ! in_new_tree apt-get update -qq || ! in_new_tree apt-get install -y -qq --no-install-recommends \
    "${TREE_PACKAGES[@]}"; then
    die_log "$LOGS/tree.log" "apt-get inside the tree failed"
  fi
  rm -rf "$TREE.new"/var/cache/apt/archives/*.deb "$TREE.new"/var/lib/apt/lists/*
  mkdir -p "$TREE.new$STATE" # the same path inside and outside
  mv "$TREE.new" "$TREE"
  log "tree made: $(du -sm "$TREE" | cut -f1) MB"
}

# The tree's client, run here (not inside) by the tree's own loader, so that it sees this machine's
# files, terminal and signals.
make_wrapper() {
  mkdir -p "$STATE/bin"
  cat >"$STATE/bin/$CLIENT.new" <<WRAPPER
#!/bin/sh
T=$TREE
for ld in "\$T"/lib64/ld-linux*.so.? "\$T"/lib/ld-linux*.so.?; do [ -e "\$ld" ] && break; done
for lib in "\$T"/usr/lib/*-linux-gnu*; do [ -d "\$lib" ] && break; done
# lxc runs itself for its aliases, as "lxc shell"
LXD_EXEC_PATH=$STATE/bin/$CLIENT exec "\$ld" --library-path "\$lib" "\$T/usr/bin/$CLIENT" "\$@"
WRAPPER
  chmod 755 "$STATE/bin/$CLIENT.new"
  mv "$STATE/bin/$CLIENT.new" "$STATE/bin/$CLIENT"
}

# ---- namespaces ----
# The daemon lives in its own mount and pid namespaces, whose first process ("holder") does nothing
# but wait. So the mounts that LXD makes are not seen outside, and killing this one process ends
# everything that LXD ever started (containers, monitors, helpers), whatever state it is in.
# In a tree, the tree becomes the real root by pivot_root: from a plain chroot the kernel does not
# let anyone create a user namespace.

# Runs a command outside of the cgroup of a login session, which may be ended with the session. And LXC
# makes its cgroups below that of process 1, which must not have processes of its own then.
cgroup_script() {
  cat <<'SCRIPT'
while read -r _ dir type _; do
  case $type in cgroup | cgroup2) { echo 0 >"$dir/cgroup.procs"; } 2>/dev/null || : ;; esac
done </proc/self/mounts
exec "$@"
SCRIPT
}

holder_script() {
  cat <<'SCRIPT'
set -eu
mode=$1 state=$2 cgroup=$3
read -r pid rest </proc/self/stat
set -- ${rest##*) }
echo "$pid ${20}" >"$state/holder.new"
mv "$state/holder.new" "$state/holder"
# LXD would load AppArmor profiles into the kernel, and a tree has no tools for it: look as if it were off.
aa=/sys/module/apparmor/parameters/enabled
if [ -e $aa ]; then
  echo N >"$state/apparmor"
  mount -n --bind "$state/apparmor" $aa
fi
R=
if [ "$mode" = tree ]; then
  R=$state/tree
  mount -n --bind "$R" "$R"
  mount -n --rbind /sys "$R/sys"
  if [ "$cgroup" = v2 ]; then
    umount -n -R "$R/sys/fs/cgroup"
    mount -n -t cgroup2 cgroup2 "$R/sys/fs/cgroup"
  fi
  mount -n --rbind /dev "$R/dev"
  mount -n -t tmpfs -o mode=755 tmpfs "$R/run"
  mount -n -t tmpfs -o mode=1777 tmpfs "$R/tmp"
  mount -n --bind "$state" "$R$state"
fi
mount -n -t proc proc "$R/proc"
# A range of user ids for containers, where root has none yet, without a change to the files of the machine.
for f in subuid subgid; do
  if [ -e "$R/etc/$f" ] && ! grep -q "^root:" "$R/etc/$f"; then
    { cat "$R/etc/$f"; echo root:1000000:1000000000; } >"$state/$f"
    mount -n --bind "$state/$f" "$R/etc/$f"
  fi
done
wait="touch $state/holder.ready; cd /; sleep infinity & wait"
if [ "$mode" = tree ]; then
  cd "$R"
  pivot_root . mnt
  exec chroot . /bin/bash -c "umount -n -l /mnt; $wait"
fi
exec /bin/bash -c "$wait"
SCRIPT
}

# stat_of PID: sets PARENT and STARTED; the time a process was started at tells it from a later one
# with the same number
stat_of() {
  local s
  { read -r s <"/proc/$1/stat"; } 2>/dev/null || return 1
  # shellcheck disable=SC2086 # words are wanted; what is before the last ")" may hold blanks
  set -- ${s##*) }
  PARENT=$2 STARTED=${20}
}

# holder: sets HOLDER; fails if it does not run
holder() {
  local pid started
  HOLDER=
  [[ -s $STATE/holder ]] || return 1
  read -r pid started <"$STATE/holder"
  stat_of "$pid" && [[ $STARTED = "$started" ]] || return 1
  HOLDER=$pid
}

no_holder() { ! holder; }
start_holder() {
  if holder && [[ -e $STATE/holder.ready ]]; then return 0; fi
  stop_holder
  rm -f "$STATE/holder.ready"
  cgroup_script >"$STATE/cgroup.sh"
  holder_script >"$STATE/holder.sh"
  setsid unshare --mount --pid --fork --kill-child --propagation slave \
    /bin/bash "$STATE/cgroup.sh" /bin/bash "$STATE/holder.sh" "$MODE" "$STATE" "${CGROUP:-}" >"$LOGS/holder.log" 2>&1 </dev/null 9<&- &
  disown
  if ! wait_for 15 test -e "$STATE/holder.ready" || ! holder; then
    die_log "$LOGS/holder.log" "cannot make the namespaces"
  fi
}

stop_holder() {
  if holder; then
    local outer=$PARENT
    kill -KILL "$HOLDER" 2>/dev/null || true
    # the kernel ends every process of the namespace before this one is gone
    wait_for 30 no_holder || die "process $HOLDER does not end"
    # unshare, its parent, ends with it (process 1 is the parent if unshare was killed before)
    [[ $outer -le 1 ]] || wait_for 5 test ! -e "/proc/$outer" || true
  fi
  rm -f "$STATE/holder" "$STATE/holder.ready"
}

# inside CMD...: in the namespaces of the daemon, with its environment
inside() {
  nsenter -t "$HOLDER" -m -p --root --wd -- env -i PATH="$SAFE_PATH" HOME="$STATE" LANG=C.UTF-8 \
    "${DAEMON_ENV[@]}" "$@"
}

# ---- the daemon ----

# daemon_pid LOGFILE: the child of our holder that is the daemon with this log (its helpers have its name too)
daemon_pid() {
  local d argv
  [[ -n $HOLDER ]] || return 1
  for d in /proc/[0-9]*; do
    if ! stat_of "${d#/proc/}" || [[ $PARENT != "$HOLDER" ]]; then continue; fi
    { mapfile -d '' -t argv <"$d/cmdline"; } 2>/dev/null || continue
    argv+=("") # a zombie has none
    if [[ ${argv[0]##*/} = "$DAEMON" && " ${argv[*]} " = *" --logfile $1 "* ]]; then
      echo "${d#/proc/}"
      return 0
    fi
  done
  return 1
}
no_daemon() { ! daemon_pid "$1" >/dev/null; }

# run_daemon LOGFILE CMD...: start it, detached, with a log of its own beside for what it prints
run_daemon() {
  local f=$1
  shift
  inside /bin/bash "$STATE/cgroup.sh" setsid -f "$@" --logfile "$f" >>"${f%.log}.out" 2>&1 </dev/null 9<&-
}

# wait_daemon LOGFILE CMD...: until CMD succeeds, or the daemon has ended
wait_daemon() {
  local f=$1 begin=$SECONDS name
  shift
  name=$(basename "$f" .log)
  until "$@" >/dev/null 2>&1 </dev/null; do
    # setsid takes a moment to become the daemon
    if no_daemon "$f" && ((SECONDS > begin + 2)); then die_log "${f%.log}.out" "$name has ended"; fi
    ((SECONDS < begin + 60)) || die_log "$f" "$name does not answer"
    sleep 0.1
  done
}

# need_port ADDRESS PORT
port_free() { ! (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }
need_port() {
  [[ $2 =~ ^[0-9]+$ && $2 -gt 0 && $2 -lt 65536 ]] || die "not a port: $2"
  for _ in {1..50}; do # a daemon that was killed just now may not have let go of it
    if port_free "$1" "$2"; then return; fi
    sleep 0.1
  done
  die "port $2 on $1 is taken by something else (set ${STATE_VAR%_STATE}_PORT)"
}

# trusted_at URL: does the server there trust the client certificate?
trusted_at() {
  inside curl -sk --max-time 5 --cert "$CONF/client.crt" --key "$CONF/client.key" "$1/1.0" 2>/dev/null |
    grep -q '"auth":"trusted"'
}

# ---- what tests need in it ----

# make_image: a container image of about 1 MB in which busybox is everything. The same busybox makes
# the same image, byte for byte.
make_image() {
  local busybox=/bin/busybox d=$STATE/image.d r applet
  [[ ! -s $STATE/image.tar.gz ]] || return 0
  [[ $MODE = host ]] || busybox=$TREE/bin/busybox
  r=$d/rootfs
  rm -rf "$d"
  mkdir -p "$r"/{bin,dev,etc/init.d,home/test,mnt,proc,root,run,sbin,sys,tmp,usr/bin,usr/sbin,var/log}
  chmod 700 "$r/root"
  chmod 1777 "$r/tmp"
  chown 1000:1000 "$r/home/test"
  cp "$busybox" "$r/bin/busybox"
  for applet in $("$busybox" --list); do
    [[ -e $r/bin/$applet ]] || ln -s busybox "$r/bin/$applet"
  done
  ln -s ../bin/busybox "$r/sbin/init"
  cat >"$r/etc/passwd" <<'FILE'
root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
test:x:1000:1000:test:/home/test:/bin/sh
FILE
  printf '%s\n' root:x:0: nogroup:x:65534: test:x:1000: >"$r/etc/group"
  printf '127.0.0.1 localhost\n' >"$r/etc/hosts"
  printf '%s\n' '::sysinit:/bin/ifconfig lo 127.0.0.1 up' '::shutdown:/bin/true' >"$r/etc/inittab"
  printf '%s\n' "architecture: $(uname -m)" 'creation_date: 1700000000' 'properties:' \
    '  description: busybox' '  os: busybox' '  release: test' >"$d/metadata.yaml"
  tar -C "$d" --sort=name --mtime=@1700000000 --numeric-owner --format=gnu -c metadata.yaml rootfs |
    gzip -n >"$STATE/image.new"
  mv "$STATE/image.new" "$STATE/image.tar.gz"
  rm -rf "$d"
}

make_cert() {
  [[ ! -s $CONF/client.crt ]] || return 0
  inside openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -sha384 -nodes -days 3650 \
    -subj /CN=transport-test -keyout "$CONF/client.key" -out "$CONF/client.new" \
    >"$LOGS/openssl.log" 2>&1 || die_log "$LOGS/openssl.log" "cannot make a client certificate"
  mv "$CONF/client.new" "$CONF/client.crt"
}

# quiet CMD...: silent unless it fails (the client has much to say about networks)
quiet() { "$@" >"$LOGS/$CLIENT.log" 2>&1 </dev/null || die_log "$LOGS/$CLIENT.log" "failed: ${*/#$LXC/$CLIENT}"; }

# ---- the end ----

# remove_cgroups PATH...: of the containers with these names, which were not stopped by LXC itself. Another
# LXD may have the names too: one with a process in it is not ours, all of ours are gone.
remove_cgroups() {
  local dir type c left name
  while read -r _ dir type _; do
    case $type in cgroup | cgroup2) ;; *) continue ;; esac
    for name in "$@"; do
      name=${name##*/}
      for c in "$dir/lxc.monitor.$name" "$dir/lxc.payload.$name" \
        "$dir/lxc.monitor.$name"-[0-9]* "$dir/lxc.payload.$name"-[0-9]*; do
        if [[ -d $c ]]; then remove_cgroup "$c"; fi
      done
    done
    # where LXC parks itself while it removes a container's; everybody's, so only with the last container
    left=("$dir"/lxc.payload.*)
    if [[ ! -e ${left[0]} && -d $dir/lxc.pivot ]]; then remove_cgroup "$dir/lxc.pivot"; fi
  done </proc/self/mounts
}

remove_cgroup() {
  [[ -z $(find "$1" -name cgroup.procs -exec cat {} + 2>/dev/null) ]] || return 0
  find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || true
}

# LXC's lock files are named after the daemon's directory, outside of it.
remove_locks() {
  [[ -d /run/lxc/lock ]] || return 0
  rm -rf "/run/lxc/lock$STATE"
  (cd /run && rmdir -p --ignore-fail-on-non-empty "lxc/lock$(dirname "$STATE")") 2>/dev/null || true
}

unmount_all() {
  local m
  awk -v d="$STATE/" 'index($2, d) == 1 { print $2 }' /proc/self/mounts | sort -r |
    while read -r m; do umount -l "$m" || true; done
}

# wipe [NAME]: the rest of an end: everything in the state directory, but for NAME
wipe() {
  remove_locks
  unmount_all
  # left by an up that was killed
  if grep -qs "$POLICY_MARK" "$POLICY"; then with_dpkg_lock true; fi
  # the directory may not vanish under its lock half way: the marker goes last
  find "$STATE" -xdev -mindepth 1 -maxdepth 1 ! -name "$MARKER" ${1:+! -name "$1"} -exec rm -rf --one-file-system {} +
  [[ -n ${1:-} && -e $STATE/$1 ]] || rm -rf --one-file-system "$STATE"
}
