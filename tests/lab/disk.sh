# shellcheck shell=bash
# Builds the lab's disk. Sourced by `lab`, which sets $here and $cache.
#
# What is built lies in $cache/<hash of the recipe>/:
#
#   disk.img    the lab's root file system, ext4, sparse
#   vmlinuz     Debian's kernel
#   initrd.img  busybox and the few modules that reach the disk
#   machine/    QEMU, mke2fs, mkfs.erofs and their libraries, of the lab's
#               Debian release whatever the host's is, and its backports
#
# QEMU 10.2 or newer: before, its VMRUN changes the word of pending interrupts with a plain
# read and write (target/i386/tcg/system, helper_vmrun), so that an interrupt that comes at
# that moment is lost. That is most likely why the whole lab stood still, once in some ten
# hours: with the timer's interrupt nothing else comes. It was not seen in the act.
#
# Nothing needs a loop mount, a block device or a fixed mirror: the mirror is
# the one in the host's apt configuration, or debootstrap's own default.

: "${here:?}" "${cache:?}"
readonly SUITE=trixie                    # the lab
readonly MACHINE_SUITE=trixie-backports  # QEMU, what it needs comes from either
readonly OLDEST_QEMU=10.2                # see above
readonly CONTAINERD_SUITE=forky          # containerd 2; its package needs only libc
readonly DISK_SIZE=8G

# Files whose content decides what the disk holds.
recipe_files() {
  printf '%s\n' disk.sh packages.lab packages.machine initramfs-init images guest/opt/lab/mkimage
}

recipe_hash() {
  (cd "$here" && recipe_files | xargs sha256sum | sha256sum | cut -c1-16)
}

package_list() {
  sed 's/#.*//' "$here/packages.$1" | xargs
}

# The URI of the Debian archive this host's apt uses, empty when it has none.
host_mirror() {
  command -v apt-get >/dev/null || return 0
  apt-get indextargets --format "\$(ORIGIN) \$(LABEL) \$(REPO_URI)" 'Created-By: Packages' |
    awk '$1 == "Debian" && $2 == "Debian" { print $3; exit }'
}

# step WHAT COMMAND...: runs a long command with its output in the build's log,
# saying every 15 seconds that it still runs.
step() {
  local what=$1 begin=$SECONDS
  shift
  say "$what"
  set -m # a process group of its own, so that an interrupt ends all of it
  (set -e; "$@") >>"$build/build.log" 2>&1 </dev/null &
  step_pid=$!
  set +m
  while kill -0 "$step_pid" 2>/dev/null; do
    sleep 0.5
    if ((SECONDS - begin >= 15)); then
      begin=$SECONDS
      say "  ... $what"
    fi
  done
  if ! wait "$step_pid"; then
    tail -n 30 "$build/build.log" >&2
    die "failed: $what"
  fi
  step_pid=
}

abandon_build() {
  if [[ ${step_pid-} ]]; then
    kill -TERM -- "-$step_pid" 2>/dev/null || true
    wait "$step_pid" || true
  fi
  [[ -z ${build-} ]] || rm -rf --one-file-system "$build"
}

in_root() {
  chroot "$build/root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    DEBIAN_FRONTEND=noninteractive INITRD=No ${http_proxy:+"http_proxy=$http_proxy"} "$@"
}

bootstrap() {
  local mirror
  mirror=$(host_mirror)
  debootstrap --variant=minbase "$SUITE" "$build/root" ${mirror:+"$mirror"}
  [[ ! -e /etc/hosts ]] || cp /etc/hosts "$build/root/etc/hosts"
  # A throw-away tree: no documentation, no fsync, and an initramfs of our own.
  printf 'force-unsafe-io\npath-exclude=/usr/share/%s/*\n' doc >"$build/root/etc/dpkg/dpkg.cfg.d/lab"
  printf 'path-exclude=/usr/share/%s/*\n' man info locale >>"$build/root/etc/dpkg/dpkg.cfg.d/lab"
  mkdir -p "$build/root/etc/initramfs-tools"
  echo update_initramfs=no >"$build/root/etc/initramfs-tools/update-initramfs.conf"
}

install_packages() {
  local packages
  read -ra packages < <(package_list lab)
  in_root apt-get update
  in_root apt-get install -y --no-install-recommends -o Dpkg::Options::=--force-confold "${packages[@]}"
}

# containerd of the lab's own suite goes to /opt, that of the newer one to /usr.
# The newer suite's signature is checked, its expiry is not: it expires within
# days, and a mirror may well be a snapshot in time.
install_containerd() {
  local root=$build/root
  local newer=(-o Dir::Etc::SourceList=/tmp/newer.list -o Dir::Etc::SourceParts=/dev/null
    -o Dir::State::Lists=/tmp/newer.lists -o Acquire::Check-Valid-Until=false -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
  mkdir -p "$root/tmp/older" "$root/tmp/newer" "$root/tmp/newer.lists/partial"
  sed "s/\\b$SUITE\\b/$CONTAINERD_SUITE/" "$root/etc/apt/sources.list" >"$root/tmp/newer.list"
  in_root sh -ec 'cd /tmp/older; apt-get download containerd'
  in_root apt-get "${newer[@]}" update
  in_root sh -ec 'cd /tmp/newer; apt-get "$@" download containerd' sh "${newer[@]}"
  in_root sh -ec 'dpkg-deb -x /tmp/older/*.deb /opt/containerd-1.7; dpkg-deb -x /tmp/newer/*.deb /
    rm -r /tmp/older /tmp/newer*; containerd --version; /opt/containerd-1.7/usr/bin/containerd --version'
}

# The kernel's sample of a driver for mediated devices, a serial card, and what it needs that the lab's
# kernel was built without. Debian's source of the same version is compiled with the kernel's own
# headers and compiler, which are there only meanwhile.
make_modules() {
  local root=$build/root tree=$build/root/tmp/mdev kernel source version
  kernel=$(ls "$root/lib/modules")
  source=linux-source-$(cut -d. -f1,2 <<<"${kernel%%[+-]*}") # 6.12 of 6.12.57+deb13-cloud-amd64
  mkdir "$tree"
  in_root apt-get install -y --no-install-recommends make "linux-headers-$kernel"
  version=$(in_root dpkg-query -W -f "\${Version}" "linux-headers-$kernel")
  in_root sh -ec 'cd /tmp/mdev; apt-get download "$1"' sh "$source=$version"
  dpkg-deb --fsys-tarfile "$tree"/*.deb | tar -xO "./usr/src/$source.tar.xz" |
    tar -xJ -C "$tree" --strip-components=1 "$source/drivers/vfio/mdev" "$source/samples/vfio-mdev/mtty.c"
  mv "$tree"/drivers/vfio/mdev/*.[ch] "$tree/samples/vfio-mdev/mtty.c" "$tree/"
  printf '%s\n' 'obj-m := mdev.o mtty.o' 'mdev-y := mdev_core.o mdev_sysfs.o mdev_driver.o' >"$tree/Kbuild"
  in_root make -C "/lib/modules/$kernel/build" M=/tmp/mdev modules
  install -D -m 644 -t "$root/lib/modules/$kernel/extra" "$tree"/*.ko
  in_root apt-get purge -y --auto-remove make "linux-headers-$kernel"
  rm -r "$tree"
}

# QEMU and its libraries, resolved as if nothing were installed, and unpacked only. The
# suite's expiry is not checked, as above.
unpack_machine() {
  local packages deb
  read -ra packages < <(package_list machine)
  sed "s/\\b$SUITE\\b/$MACHINE_SUITE/" "$build/root/etc/apt/sources.list" >"$build/root/etc/apt/sources.list.d/machine.list"
  in_root apt-get -o Acquire::Check-Valid-Until=false update
  in_root sh -ec ': >/tmp/none; apt-get clean
    apt-get -o Dir::State::status=/tmp/none install -y --no-install-recommends --download-only "$@"; rm /tmp/none' \
    sh -t "$MACHINE_SUITE" "${packages[@]}"
  mkdir "$build/machine"
  for deb in "$build"/root/var/cache/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" |
      tar -x -C "$build/machine" --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale'
  done
  in_root apt-get clean
  check_qemu
}

check_qemu() {
  local version
  version=$(machine_run "$build/machine" usr/bin/qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p')
  echo "QEMU $version"
  printf '%s\n' "$OLDEST_QEMU" "$version" | sort --version-sort --check=quiet ||
    { echo "QEMU $OLDEST_QEMU is needed: does the mirror have $MACHINE_SUITE?" >&2; return 1; }
}

make_images() {
  cp "$here/images" "$here/guest/opt/lab/mkimage" "$build/root/tmp/"
  in_root /tmp/images /tmp/mkimage /opt/lab/images
  rm "$build/root/tmp/images" "$build/root/tmp/mkimage"
}

make_initramfs() {
  local root=$build/root tree=$build/initramfs kernel module name
  kernel=$(ls "$root/lib/modules")
  mkdir -p "$tree"/{bin,dev,proc,sys,root,modules}
  cp "$root/bin/busybox" "$tree/bin/"
  install -m 755 "$here/initramfs-init" "$tree/init"
  in_root depmod "$kernel"
  # `modprobe --show-depends` lists the files to insert, in order.
  for module in virtio_pci virtio_blk ext4 erofs; do
    in_root modprobe --set-version "$kernel" --show-depends "$module"
  done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$build/modules"
  while read -r module; do
    name=$(basename "$module" .xz)
    "$root/bin/busybox" unxz -c "$root$module" >"$tree/modules/$name"
    echo "$name" >>"$tree/modules/order"
  done <"$build/modules"
  cp "$root/boot/vmlinuz-$kernel" "$build/vmlinuz"
  (cd "$tree" && find . | "$root/bin/busybox" cpio -o -H newc | gzip -1) >"$build/initrd.img"
  rm -r "$tree" "$build/modules"
}

make_disk() {
  local root=$build/root
  rm -rf "${root:?}"/var/lib/apt/lists/* "$root"/boot/vmlinuz-* "$root/etc/resolv.conf" "$root/etc/hostname"
  printf '127.0.0.1 localhost lab\n::1 localhost\n' >"$root/etc/hosts"
  echo lab >"$root/etc/hostname"
  truncate -s "$DISK_SIZE" "$build/disk.img"
  machine_run "$build/machine" usr/sbin/mke2fs -q -F -t ext4 -m 0 -O ^has_journal,verity -E lazy_itable_init=1 -d "$root" "$build/disk.img"
  rm -rf --one-file-system "$root"
}

# Makes sure the disk exists and sets $disk to its directory.
lab_disk() {
  local lock
  disk=$cache/$(recipe_hash)
  mkdir -p "$cache"
  exec {lock}>"$cache/lock"
  until flock --nonblock "$lock"; do
    say "waiting for another build"
    sleep 5
  done
  [[ -e $disk/disk.img ]] || build_disk
  exec {lock}>&-
}

build_disk() {
  ((EUID == 0)) || die "building the disk needs root (chroot and device nodes); a container's root will do"
  command -v debootstrap >/dev/null || die "debootstrap is missing"
  say "building the lab's disk in $disk (once for this recipe)"
  build=$(mktemp -d "$cache/build.XXXXXX")
  chmod 755 "$build"
  step "Debian $SUITE's base" bootstrap
  step "the lab's packages" install_packages
  step "containerd" install_containerd
  step "modules" make_modules
  step "the machine (QEMU)" unpack_machine
  step "container images" make_images
  step "initramfs" make_initramfs
  step "disk image" make_disk
  mv "$build" "$disk"
  build=
  say "the disk is ready"
}
