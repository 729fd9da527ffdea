#!/bin/busybox sh
# The oracle's first process: brings up the host's files and /dev/kvm, runs the command, says how it ended.
# What goes wrong is the console's last line, which the host shows.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
exec >/dev/console 2>&1

give_up() {
    echo "oracle: $*"
    poweroff -f
    sleep 60
}

while read -r module; do
    insmod "/modules/$module.ko" || echo "oracle: the module $module did not load"
done </modules/order

share() { # tag, place, options
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=262144,$3" "$1" "$2" || give_up "no 9p: cannot mount $1"
}
share control /control rw
# The host's own files, not to be changed: writes stay in memory, and are lost.
share host /lower ro,cache=loose
mount -t tmpfs tmpfs /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work overlay /newroot || give_up "no overlay"
mount -t proc proc /newroot/proc
mount -t sysfs sysfs /newroot/sys
mount -o bind /dev /newroot/dev
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /newroot/dev/shm
mount -t devpts devpts /newroot/dev/pts
[ -f /control/output ] && share output "/newroot$(cat /control/output)" rw
ip link set lo up
[ -c /dev/kvm ] || give_up "this kernel has no KVM: there is no /dev/kvm"
[ "$(cat /sys/module/kvm_amd/parameters/npt 2>/dev/null)" = Y ] || give_up "kvm_amd runs without nested paging"

# Through pipes: a file that the command opens anew, by /dev/stderr, would be cut off and written over.
mkfifo /over/stdout /over/stderr
cat /over/stdout >/control/stdout &
cat /over/stderr >/control/stderr &
uname -r >/control/kernel
chroot /newroot /bin/sh -c "$(cat /control/command)" </dev/null >/over/stdout 2>/over/stderr
status=$?
# What it left running would keep the pipes open.
for process in /proc/[0-9]*; do
    case $(readlink "$process/root") in /newroot*) kill -9 "${process#/proc/}" ;; esac
done
wait
echo $status >/control/status
sync
poweroff -f
sleep 60
