# The test programs of one lab: e2e.sh containers|more|pods|devices|all [FILTER...]. `all` is
# a host's, which has none of the lab's devices. One program that fails does not keep the
# others from running.
set -uo pipefail
lab=$1
shift
failed=()

# Of the tests of containers, those that need the lab's devices, and some that make a lab of
# their own: two run at a time, and smaller ones keep both processors busy to the end.
readonly DEVICES='^devices::'
readonly MORE='^(boot|limits|load|network|volumes)::'

run_tests() {
  echo "== $1"
  "$@" || failed+=("$1")
}

# run_those_of GREP_OPTION PATTERN FILTER...
run_those_of() {
  local names option=$1 pattern=$2
  shift 2
  names=$(nacre-e2e --list "$@" | sed -n 's/: test$//p' | grep "$option" "$pattern")
  # shellcheck disable=SC2086 # names of tests have no spaces
  [[ ! $names ]] || run_tests nacre-e2e --test-threads=1 --exact $names
}

may_annotations_ask_for_devices() {
  sed -i "s/^device_annotations = .*/device_annotations = $1/" /etc/nacre/nacre.toml
}

case $lab in
  containers) run_those_of -vE "$DEVICES|$MORE" "$@" ;;
  more) run_those_of -E "$MORE" "$@" ;;
  pods) run_tests nacre-pods --test-threads=1 "$@" ;;
  devices)
    export LAB_DEVICES=1
    # The lab's devices come first: the monitor's own tests leave them with vfio-pci.
    may_annotations_ask_for_devices true
    run_tests nacre-devices --test-threads=1 "$@"
    may_annotations_ask_for_devices false
    run_tests nacre-vmm-tests --test-threads=1 "$@"
    run_those_of -E "$DEVICES" "$@"
    ;;
  all)
    for program in nacre-vmm-tests nacre-e2e nacre-pods; do
      run_tests "$program" --test-threads=1 "$@"
    done
    ;;
esac
awk '/^cpu / { for (i = 2; i <= 9; i++) all += $i; printf "the processors were idle %d %% of the time\n", 100 * ($5 + $6) / all }' /proc/stat
((!${#failed[@]})) || { echo "failed: ${failed[*]}" >&2; exit 1; }
