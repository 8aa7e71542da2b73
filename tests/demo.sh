# A container under nacre, next to the machine that runs it. Runs in the lab, or
# from the tree's root on a host with containerd where nacre is installed.
set -euo pipefail
image=docker.io/library/busybox:latest
if ! ctr image ls -q | grep -qx "$image"; then
  images=/opt/lab/images
  if [[ ! -e $images/busybox.tar ]]; then
    images=$(mktemp -d)
    trap 'rm -rf "$images"' EXIT
    tests/lab/images tests/lab/guest/opt/lab/mkimage "$images" busybox
  fi
  ctr image import "$images/busybox.tar" >/dev/null
fi

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
