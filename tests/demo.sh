# A guest under nacre's monitor, next to the machine that runs it: our kernel on
# real KVM with busybox for its init. Runs in the lab, or on a host with KVM.
set -euo pipefail
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree"/root/{bin,dev,proc}
cp /bin/busybox "$tree/root/bin/"
cat >"$tree/root/init" <<'INIT'
#!/bin/busybox sh
PATH=/bin
busybox mount -t proc proc /proc
busybox --install -s /bin
mount -t devtmpfs dev /dev
# An emergency message is the one kind that a quiet kernel prints.
say() { echo "<0>$*" >/dev/kmsg; }
say "guest kernel:  $(uname -r), $(grep -c ^processor /proc/cpuinfo) vCPU, up $(cut -d' ' -f1 /proc/uptime) s when init ran"
say "guest output:  hello from a micro-VM"
poweroff -f
INIT
chmod +x "$tree/root/init"
(cd "$tree/root" && find . | busybox cpio -o -H newc >"$tree/initrd.img" 2>/dev/null)

echo
echo "host kernel:   $(uname -r)"
begin=$(date +%s.%N)
boot --kernel /usr/local/share/nacre/vmlinux --initrd "$tree/initrd.img" --memory 256 \
  --cmdline "quiet loglevel=1 console=ttyS0 panic=-1 rdinit=/init" 2>"$tree/exits"
end=$(date +%s.%N)
awk -v b="$begin" -v e="$end" 'BEGIN { printf "from start to power-off: %.1f s on this machine\n", e - b }'
echo "VM exits to user space: $(sed -n 's/^boot: //p' "$tree/exits")"
