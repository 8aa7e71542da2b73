# The programs of `make e2e`, in the lab or on a host like it; arguments select tests.
# One that fails does not keep the others from running. The devices of the lab come
# first, as the monitor's own tests leave them with vfio-pci.
set -uo pipefail
programs=(nacre-vmm-tests nacre-e2e nacre-pods)
[[ ! ${LAB_DEVICES-} ]] || programs=(nacre-devices "${programs[@]}")
failed=()
for program in "${programs[@]}"; do
  echo "== $program"
  "$program" --test-threads=1 "$@" || failed+=("$program")
done
((!${#failed[@]})) || { echo "failed: ${failed[*]}" >&2; exit 1; }
