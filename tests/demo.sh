# A container under nacre, next to the machine that runs it. Runs in the lab, or
# on any host with containerd where nacre is installed.
set -euo pipefail
image=docker.io/library/busybox:latest
ctr image ls -q | grep -qx "$image" || ctr image import /opt/lab/images/busybox.tar >/dev/null

echo
echo "\$ ctr run --rm --runtime io.containerd.nacre.v2 $image demo sh -c '...'"
begin=$(date +%s.%N)
ctr run --rm --runtime io.containerd.nacre.v2 "$image" demo sh -c '
  echo "hello from a micro-VM: process $$ of $(hostname), $(id -un)"
  echo "guest kernel: $(uname -r)"
'
end=$(date +%s.%N)
echo "host kernel:  $(uname -r)"
awk -v b="$begin" -v e="$end" 'BEGIN { printf "from ctr run to its end: %.1f s on this machine\n", e - b }'
