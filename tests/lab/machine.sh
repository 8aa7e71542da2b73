# shellcheck shell=bash
# Boots the lab. Sourced by `lab`, which sets $here and $cache.
#
# The machine has three disks: the root (a throw-away overlay of disk.img), the
# lab's own files and the command (guest.img), and the caller's tree
# (payload.img). What the command says comes back through virtio-serial ports,
# each written to a file here: stdout, stderr, out.tar, and last status, one line:
#
#   exit CODE STDOUT-BYTES STDERR-BYTES OUT-BYTES
#
# whose counts tell when the other files are complete. One more, alive, gets a line every
# few seconds: a machine that sends none for as long as a boot may take stands still.

: "${here:?}" "${cache:?}"

readonly LOADER=usr/lib64/ld-linux-x86-64.so.2
readonly LIBRARIES=usr/lib/x86_64-linux-gnu
readonly TCG_WARNING="TCG doesn't support requested feature"

# Runs a program of the unpacked Debian tree with that tree's own libraries.
machine_run() {
  local tree=$1 program=$2
  shift 2
  "$tree/$LOADER" --library-path "$tree/$LIBRARIES" "$tree/$program" "$@"
}

parse_options() {
  out='' timeout=2400 patience=120 smp=1 mem=6144 count=0 devices=0 extra=()
  while (($#)) && [[ $1 == -* ]]; do
    case $1 in
      --count) count=1; shift; continue ;;
      --devices) devices=1; shift; continue ;;
      --out | --timeout | --patience | --smp | --mem | --qemu) (($# >= 2)) || usage_error "$1 needs a value" ;;
      *) usage_error "unknown option $1" ;;
    esac
    case $1 in
      --out) out=$2 ;;
      --timeout) timeout=$2 ;;
      --patience) patience=$2 ;;
      --smp) smp=$2 ;;
      --mem) mem=$2 ;;
      --qemu) extra+=("$2") ;;
    esac
    shift 2
  done
  (($#)) || usage_error "DIR is missing"
  payload=$1
  [[ -d $payload ]] || usage_error "$payload is not a directory"
  shift
  [[ ${1-} != -- ]] || shift
  command=("$@")
}

pack() {
  machine_run "${disk:?}/machine" usr/bin/mkfs.erofs --quiet --all-root "$1" "$2"
}

prepare_machine() {
  work=$(mktemp -d)
  cp -r "$here/guest" "$work/guest"
  mkdir -p "$work/guest/opt/lab/run"
  if ((${#command[@]})); then
    printf '%s\0' "${command[@]}" >"$work/guest/opt/lab/run/command"
  else
    stty size >"$work/guest/opt/lab/run/terminal"
  fi
  pack "$work/guest.img" "$work/guest"
  pack "$work/payload.img" "$payload"
}

begin_log() {
  mkdir -p "$cache/logs"
  serial_log=$cache/logs/$(date +%Y%m%d-%H%M%S)-$$.log
  : >"$serial_log"
  forget_old_logs
}

# All but the last ten, and those of labs that run: a log's name ends with its
# lab's pid.
forget_old_logs() {
  local logs=("$cache"/logs/*.log) log pid
  ((${#logs[@]} > 10)) || return 0
  for log in "${logs[@]:0:${#logs[@]}-10}"; do
    pid=${log##*-}
    kill -0 "${pid%.log}" 2>/dev/null || rm -f -- "$log"
  done
}

# Sets $qemu to the machine's command line without its console and ports. It is
# run as it is, not through a function, so that $! is QEMU's own pid.
#
# With more than one processor the machine has one more than asked for, and the kernel
# leaves the first one alone. QEMU (up to 11.1 at least) tells the first processor at each
# XRSTOR of any other to clear its IGNNE flag (target/i386/tcg, cpu_clear_ignne),
# with a plain read and write of a word that holds the flags of SVM too: a VMRUN
# or VM exit there at that moment loses the flag for nested paging or for held
# interrupts, and the guest, or the lab itself, is corrupted. Where no guest runs
# the word never changes.
#
# SMAP costs a fifth of the time: each access to a user's memory ends two blocks of
# translated code, and what is between them is translated for each of its states.
# Mitigations cost a fourteenth: each return is a jump through a thunk with them.
#
# A page of a guest's memory that comes in costs faults in two page tables and a VM
# exit, all of them slow here: 2 MiB at a time make a pod's start nearly twice as fast.
# Under --count it is 4 KiB, as on most hosts.
describe_machine() {
  local tree=$disk/machine processors=$((smp + 1)) special=' isolcpus=0 LARGE_PAGES=1'
  local append="console=ttyS0 loglevel=6 panic=-1 tsc=reliable unknown_nmi_panic mitigations=off"
  local accel=tcg,thread=multi,tb-size=2048
  qemu=("$tree/$LOADER" --library-path "$tree/$LIBRARIES" "$tree/usr/bin/qemu-system-x86_64"
    -L "$tree/usr/share/qemu" -L "$tree/usr/share/seabios" -nodefaults -no-user-config -display none -no-reboot
    -M "q35,kernel-irqchip=split" -cpu "EPYC,+svm,+npt,-smap,-smep,phys-bits=48" -m "$mem" -nic none)
  if ((smp == 1)); then
    accel=tcg,thread=single,tb-size=2048
    processors=1 special=' LARGE_PAGES=1'
  fi
  if ((count)); then
    accel=tcg,thread=single,tb-size=2048
    processors=1 special=
    qemu+=(-icount "shift=0,sleep=off")
  fi
  if ((devices)); then
    # The kernel lies where devices with 32 address bits reach: a test has one try.
    append+=" intel_iommu=on iommu=pt nokaslr"
    add_devices
  fi
  qemu+=(-accel "$accel" -smp "$processors" -kernel "$disk/vmlinuz" -initrd "$disk/initrd.img" -append "$append$special"
    -drive "if=virtio,format=raw,snapshot=on,file=$disk/disk.img"
    -drive "if=virtio,format=raw,readonly=on,file=$work/guest.img"
    -drive "if=virtio,format=raw,readonly=on,file=$work/payload.img"
    -device virtio-rng-pci "${extra[@]}")
}

# What can be passed to pods, behind an IOMMU. tests/tests/devices/main.rs says what is
# where.
add_devices() {
  qemu+=(-device "intel-iommu,intremap=on,caching-mode=on,aw-bits=48"
    -device pcie-root-port,id=port1,chassis=1,addr=0x10
    -device pcie-root-port,id=port2,chassis=2,addr=0x11
    -device x3130-upstream,id=switch,bus=port2
    -device xio3130-downstream,id=port3,chassis=3,bus=switch)
  add_nvme alone bus=port1
  add_nvme switched bus=port3
  add_nvme first addr=0x12.0,multifunction=on
  add_nvme second addr=0x12.1
  make_rom
  qemu+=(-device edu,dma_mask=0xffffffff,addr=0x13 -device "pci-testdev,membar=4G,romfile=$work/rom.bin,addr=0x14"
    -device virtio-net-pci,addr=0x15 -device VGA,addr=0x16
    # The pages that nobody writes to are not there.
    -object memory-backend-ram,id=large,size=128G,share=on,reserve=off -device ivshmem-plain,memdev=large,addr=0x17
    -device pcie-root-port,id=port4,chassis=4,addr=0x18
    -device qemu-xhci,bus=port4,addr=0.0,multifunction=on -device qemu-xhci,bus=port4,addr=0.1)
  add_virtual_functions
}

# An NVMe controller that may have two virtual functions, and a disk that all three share.
add_virtual_functions() {
  truncate -s 64M "$work/nvme-shared.img"
  qemu+=(-device pcie-root-port,id=port5,chassis=5,addr=0x19 -device nvme-subsys,id=subsystem,nqn=shared
    -device "nvme,id=shared,serial=shared,subsys=subsystem,bus=port5,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2"
    -drive "if=none,id=shared-disk,format=raw,cache=unsafe,file=$work/nvme-shared.img"
    -device nvme-ns,drive=shared-disk,bus=shared)
}

# An expansion ROM of 2 KiB that the kernel takes for one: a signature, where its data structure is,
# and in that what it is for, its length in units of 512 bytes, and that it is the last image
# (PCI Firmware 3.3, 5.1).
make_rom() {
  {
    printf '\x55\xaa\x04\xcb'
    head -c 20 /dev/zero
    printf '\x1c\0\0\0PCIR\x36\x1b\x05\0\0\0\x18\0\0\0\0\0\x04\0\0\0\0\x80\0\0'
  } >"$work/rom.bin"
  truncate -s 2048 "$work/rom.bin"
}

# add_nvme NAME PLACE: a disk of 64 MiB, empty at each boot.
add_nvme() {
  truncate -s 64M "$work/nvme-$1.img"
  qemu+=(-drive "if=none,id=$1,format=raw,cache=unsafe,file=$work/nvme-$1.img" -device "nvme,drive=$1,serial=$1,$2")
}

add_port() {
  qemu+=(-chardev "file,id=$1,path=$work/$2" -device "virtserialport,chardev=$1,name=lab.$1")
}

# Boots a machine with `start_$1`, and another one with more patience when it is not
# up in time, unless $deadline has come first, or when its kernel panics before. Some
# machines of QEMU 10.0 did one or the other while their kernel started, before anything of
# ours ran in them. In one that was looked at, the first processor's local APIC (`info lapic
# 0`) had the timer's vector in service for good, though no handler ran, so that nothing of
# its priority or below reached that processor again. Of newer ones none was seen yet in a
# few dozen boots. Each log is kept.
boot() {
  local try why
  for try in 1 2 3; do
    begin_log
    "start_$1"
    if await_containerd $((SECONDS + patience * try)); then
      panicked_early || return 0
      why="the machine's kernel panicked before it was up"
    else
      ((SECONDS < deadline)) || return 0
      why="the machine is not up after $((patience * try)) s"
    fi
    stop_machine
    say "$why; its console's log is $serial_log"
  done
  tail -n 60 "$serial_log" >&2
  die "the machine did not come up three times"
}

is_up() {
  grep -q '^lab: .* containerd is ready' "$serial_log"
}

panicked_early() {
  ! is_up && grep -q 'Kernel panic' "$serial_log"
}

# Waits until the lab is up or has ended; fails when it does neither in time.
await_containerd() {
  until is_up || ! kill -0 "$qemu_pid" 2>/dev/null; do
    ((SECONDS < $1 && SECONDS < deadline)) || return 1
    sleep 0.2
  done
}

lab_shell() {
  [[ -t 0 && -t 1 ]] || die "lab shell needs a terminal"
  command=() deadline=$((1 << 62))
  lab_disk
  prepare_machine
  describe_machine
  boot on_terminal
  local code=0
  wait "$qemu_pid" || code=$?
  qemu_pid=
  exit "$code"
}

start_on_terminal() {
  say "Ctrl-A X leaves the lab; its console is kept in $serial_log"
  "${qemu[@]}" -chardev "stdio,id=serial,mux=on,signal=off,logfile=$serial_log" \
    -serial chardev:serial -mon chardev=serial <&0 2> >(grep -v "$TCG_WARNING" >&2) &
  qemu_pid=$!
}

lab_run() {
  ((${#command[@]})) || usage_error "COMMAND is missing"
  [[ -z $out ]] || mkdir -p "$out"
  local lacks
  if [[ ${LAB-} == host || ${LAB-} == auto ]]; then
    lacks=$(host_lacks)
    [[ $lacks ]] || run_on_host
    [[ $LAB == auto ]] || die "LAB=host: $lacks"
    say "not on this host: $lacks"
  fi
  deadline=$((SECONDS + timeout))
  lab_disk
  prepare_machine
  describe_machine
  qemu+=(-device virtio-serial-pci)
  add_port stdout stdout
  add_port stderr stderr
  add_port status status
  [[ -z $out ]] || add_port out out.tar
  # Where idle time passes at once there is no "every few seconds".
  ((count)) || add_port alive alive
  mkfifo "$work/monitor.in" "$work/monitor.out"
  qemu+=(-chardev "pipe,id=monitor,path=$work/monitor" -mon chardev=monitor)
  boot in_background
  # That it is up is a sign of life, too.
  [[ ! -e $work/alive ]] || touch "$work/alive"
  await_status
  stop_machine
  case $status in
    timeout) lab_failed 124 "stopped after $timeout seconds" ;;
    still) lab_failed 125 "the machine stood still for $patience seconds" ;;
    lost) lab_failed 125 "the lab ended without a result" ;;
  esac
  [[ -z $out ]] || tar -x -C "$out" --no-same-owner -f "$work/out.tar"
  exit "$status"
}

start_in_background() {
  : | tee "$work/stdout" "$work/stderr" "$work/status" "$work/out.tar"
  "${qemu[@]}" -chardev "file,id=serial,path=$serial_log" -serial chardev:serial \
    </dev/null >"$work/qemu.log" 2>&1 &
  qemu_pid=$!
  tail -q -c +1 -s 0.1 -f --pid="$qemu_pid" "$work/stdout" &
  follower_pids=($!)
  tail -q -c +1 -s 0.1 -f --pid="$qemu_pid" "$work/stderr" >&2 &
  follower_pids+=($!)
}

# Sets $status to the command's exit code, to `timeout`, to `lost` when the machine
# ended by itself, or to `still` when nothing runs in it any more.
await_status() {
  local code counts
  until read -r _ code counts <"$work/status" &&
    [[ $(stat -c %s "$work/stdout" "$work/stderr" "$work/out.tar" | xargs) == "$counts" ]]; do
    status=lost
    kill -0 "$qemu_pid" 2>/dev/null || return 0
    status=timeout
    ((SECONDS < deadline)) || return 0
    if stands_still; then
      status=still
      examine_machine
      return 0
    fi
    sleep 0.2
  done
  status=$code
}

stands_still() {
  local now
  printf -v now '%(%s)T' -1
  [[ -e $work/alive ]] && ((now - $(stat -c %Y "$work/alive") > patience))
}

# Has QEMU write what the processor and its interrupts are at to the file `state`, and the
# kernel where it is to its console, as it does upon an NMI that nobody asked for.
examine_machine() {
  printf '%s\n' 'info status' 'info registers' 'info lapic' 'info pic' nmi >"$work/monitor.in"
  timeout 5 cat "$work/monitor.out" >"$work/state" || true
}

# Ends the machine, and lets the followers finish what it wrote.
stop_machine() {
  kill "$qemu_pid" 2>/dev/null || true
  wait "$qemu_pid" || true
  qemu_pid=
  [[ -z ${follower_pids-} ]] || wait "${follower_pids[@]}" || true
  follower_pids=()
}

lab_failed() {
  {
    grep -v "$TCG_WARNING" "$work/qemu.log" || true
    tail -n 60 "$serial_log"
    # Without what the monitor echoes of the questions.
    [[ ! -e $work/state ]] || sed 's/.*\x1b\[K//; s/\r//g' "$work/state" | tee -a "$serial_log"
    echo "lab: $2; the console's log is $serial_log"
  } >&2
  exit "$1"
}

# Prints the first thing this host lacks to run containers under nacre.
host_lacks() {
  if ! grep -qwE 'svm|vmx' /proc/cpuinfo; then
    echo "this processor shows neither svm nor vmx"
  elif [[ ! -w /dev/kvm ]]; then
    echo "/dev/kvm is not there for this user"
  elif ! ctr version >/dev/null 2>&1; then
    echo "containerd does not answer"
  elif ! command -v containerd-shim-nacre-v2 >/dev/null; then
    echo "nacre is not installed (make install)"
  fi
}

run_on_host() {
  [[ -z $out ]] || out=$(realpath "$out")
  local programs
  programs=$(realpath "$payload")/usr/local/bin
  exec timeout "$timeout" "$here/guest/opt/lab/with-environment" "LAB_OUT=$out" \
    "PATH=$programs:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/lab" "${command[@]}" </dev/null
}

cleanup() {
  local pid
  abandon_build
  for pid in ${qemu_pid-} ${follower_pids[@]+"${follower_pids[@]}"}; do
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  [[ -z ${work-} ]] || rm -rf "$work"
}
