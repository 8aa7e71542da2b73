# The programs of `make e2e`, in the lab or on a host like it; arguments select tests.
# One that fails does not keep the others from running.
set -uo pipefail
failed=()

run_tests() {
  echo "== $1"
  "$@" || failed+=("$1")
}

may_annotations_ask_for_devices() {
  sed -i "s/^device_annotations = .*/device_annotations = $1/" /etc/nacre/nacre.toml
}

# The lab's devices come first: the monitor's own tests leave them with vfio-pci.
if [[ ${LAB_DEVICES-} ]]; then
  may_annotations_ask_for_devices true
  run_tests nacre-devices --test-threads=1 "$@"
  may_annotations_ask_for_devices false
fi
for program in nacre-vmm-tests nacre-e2e nacre-pods; do
  run_tests "$program" --test-threads=1 "$@"
done
((!${#failed[@]})) || { echo "failed: ${failed[*]}" >&2; exit 1; }
