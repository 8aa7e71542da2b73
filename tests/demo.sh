# A container under nacre, next to the machine that runs it. Runs in the lab, or
# on any host with containerd where nacre is installed.
set -euo pipefail
image=docker.io/library/busybox:latest
echo
echo "host kernel:       $(uname -r)"
begin=$(date +%s.%N)
output=$(ctr run --rm --runtime io.containerd.nacre.v2 "$image" demo \
  sh -c 'echo "container kernel:  $(uname -r)"; echo "container output:  hello from a micro-VM, pid $$ of $(hostname)"')
end=$(date +%s.%N)
echo "$output"
awk -v b="$begin" -v e="$end" 'BEGIN { printf "from ctr run to its end: %.1f s on this machine\n", e - b }'
