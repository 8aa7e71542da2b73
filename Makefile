# nacre: the targets people and CI call. Each is thin; what it does lives beside
# what it is about (guest-kernel/, tests/lab/, config/).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PREFIX ?= /usr/local
# Everything is staged under target/ with the paths it is installed to.
STAGE := target/stage
TARGET := x86_64-unknown-linux-gnu
# Where crates are compiled, so that another clone has its dependencies at once; what comes
# of them is in target/.
export CARGO_BUILD_BUILD_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/nacre/build
IN_LAB := tests/lab/lab

# Debian packages a build or a test needs. `make setup` installs those missing.
PACKAGES := gcc libc6-dev make flex bison bc libelf-dev xz-utils cpio kmod \
  debootstrap debian-archive-keyring busybox-static acpica-tools fdisk gdisk erofs-utils

# A relative source of the kernel is of the caller's directory, whichever make reads it.
ifdef KERNEL_SRC
override KERNEL_SRC := $(abspath $(KERNEL_SRC))
export KERNEL_SRC
MAKEOVERRIDES := $(filter-out KERNEL_SRC=%,$(MAKEOVERRIDES))
endif

.PHONY: setup build build-shim build-agent test unit lint demo bench long soak lab e2e lab-containers lab-more lab-pods lab-devices lab-itself lab-disk driver-images install kernel stage stage-boot clean

setup:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "setup: installing" $$missing; \
	  sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	  $$sudo apt-get update -q >/dev/null && $$sudo env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -q --no-install-recommends $$missing >target-setup.log 2>&1 || { cat target-setup.log; exit 1; }; \
	  rm -f target-setup.log; \
	fi

kernel: setup
	@$(MAKE) --no-print-directory -C guest-kernel

# The agent is PID 1 of an initramfs that holds nothing else, so it is static.
# Side by side, as the last crates of each leave a processor idle; as many at a time as the
# caller wants who wants several.
build: setup
	@$(MAKE) --no-print-directory $(if $(findstring jobserver,$(MAKEFLAGS)),,-j2) build-shim build-agent

build-shim:
	@echo "build: shim, monitor, nacre"
	@cargo build --release --locked -p nacre-shim

build-agent:
	@echo "build: agent (static)"
	@RUSTFLAGS='-C target-feature=+crt-static' cargo build --profile agent --locked -p nacre-agent --target $(TARGET)

stage: build kernel
	@rm -rf $(STAGE) && mkdir -p $(STAGE)$(PREFIX)/{bin,share/nacre/drivers} $(STAGE)/etc/nacre target/initramfs
	@install -m 755 target/release/containerd-shim-nacre-v2 target/release/nacre $(STAGE)$(PREFIX)/bin/
	@install -m 644 "$$($(MAKE) -s --no-print-directory -C guest-kernel path)" $(STAGE)$(PREFIX)/share/nacre/vmlinux
	@$(MAKE) -s --no-print-directory -C guest-kernel nvme DIR=$(CURDIR)/target/nvme >/dev/null
	@guest-kernel/driver-image target/nvme $(STAGE)$(PREFIX)/share/nacre/drivers/nvme.erofs
	@install -m 755 target/$(TARGET)/agent/nacre-agent target/initramfs/init
	@cd target/initramfs && echo init | cpio -o -H newc --reproducible --owner 0:0 --quiet > ../stage$(PREFIX)/share/nacre/initrd.img
	@install -m 644 config/nacre.toml $(STAGE)/etc/nacre/nacre.toml

# The monitor without shim and agent, for tests and the demonstration. The packages are those of
# `unit`: of other ones dependencies would have other features, and be compiled again.
stage-boot: stage
	@cargo build --locked --workspace --exclude nacre-tests --example boot
	@install -m 755 -s target/debug/examples/boot $(STAGE)$(PREFIX)/bin/boot

install: stage
	@$(STAGE)$(PREFIX)/bin/nacre install --prefix $(PREFIX) --root $(or $(DESTDIR),/)

lint: setup
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

# Everything that needs no VM. cargo builds the agent, which has tests of its program,
# before it runs the first test.
unit: setup
	NACRE_TEST_AGENT=$(CURDIR)/target/debug/nacre-agent RUST_BACKTRACE=1 \
	  cargo test --locked --workspace --exclude nacre-tests
	cargo test --locked -p nacre-tests --lib --bins --test guest_kernel --test containerd

# Builds the tests that $(1) selects and installs their program as $(2).
install-tests = cargo test --locked $(1) --no-run && \
  install -m 755 -s "$$(cargo test --locked $(1) --no-run --message-format=json 2>/dev/null | \
    sed -n 's/.*"test":true},"features".*"executable":"\([^"]*\)".*/\1/p')" $(STAGE)$(PREFIX)/bin/$(2)

# What carries data for the pods' tests.
install-wire = cargo build --release --locked -p nacre-wire && \
  install -m 755 target/release/nacre-wire $(STAGE)$(PREFIX)/bin/

# The tests that need KVM and containerd, in labs of their own, side by side, as one
# emulated machine leaves half of two processors idle: tests/e2e.sh says which are where.
# Their lines begin with the lab's name. E2E='name' runs the tests that match, LABS=pods
# those of one lab. LAB=host runs them on this host but for the lab's own and its devices',
# see tests/lab/README.md.
# LABS_AT_ONCE=5 is for machines with more processors.
LABS := itself containers pods devices more
LABS_AT_ONCE := 2

e2e: stage-boot driver-images
	@$(call install-tests,-p nacre-vmm --lib,nacre-vmm-tests)
	@$(call install-tests,-p nacre-tests --test devices,nacre-devices)
	@$(call install-tests,-p nacre-tests --test e2e,nacre-e2e)
	@$(call install-tests,-p nacre-tests --test pods,nacre-pods)
	@$(install-wire)
	@cp -r tests/lab tests/demo.sh $(STAGE)/tests/
ifeq ($(LAB),host)
	@$(IN_LAB) run $(STAGE) -- bash -c "$$(cat tests/e2e.sh)" e2e all $(E2E)
else
	@rm -rf target/e2e && mkdir target/e2e
	@code=0; $(MAKE) --no-print-directory -k -j$(LABS_AT_ONCE) $(LABS:%=lab-%) || code=$$?; \
	  grep -h '^test .* FAILED$$' target/e2e/* || true; \
	  awk '/^test result:/ {passed += $$4; failed += $$6} END {print passed + 0 " passed, " failed + 0 " failed"}' \
	    target/e2e/*; exit $$code
endif

# $(1), and its output with names.
told = $(1) 2>&1 | tee target/e2e/$@.log | sed -u 's/^/$(@:lab-%=%): /'

lab-devices: options := --devices
lab-containers lab-more lab-pods lab-devices:
	@$(call told,$(IN_LAB) run --timeout 4500 $(options) $(STAGE) -- bash -c "$$(cat tests/e2e.sh)" e2e $(@:lab-%=%) $(E2E))

lab-itself:
	@$(call told,cargo test --locked -p nacre-tests --test lab -- --test-threads=1 $(E2E))

# The tests' driver images, and one whose module is of another kernel; a module that hangs
# its guest.
DRIVERS := target/drivers
driver-images: stage
	@rm -rf $(DRIVERS) && cp -r tests/tests/devices/drivers $(DRIVERS)
	@cp -r target/nvme/modules $(DRIVERS)/nvme/
	@$(MAKE) -s -C "$$($(MAKE) -s --no-print-directory -C guest-kernel headers)" M=$(CURDIR)/$(DRIVERS)/module modules
	@mkdir $(DRIVERS)/edu/modules && cp $(DRIVERS)/module/edu.ko $(DRIVERS)/edu/modules/
	@echo 'edu.ko level=3' >$(DRIVERS)/edu/modules/modules.load
	@cp -r $(DRIVERS)/edu $(DRIVERS)/old && LC_ALL=C sed -i 's/vermagic=6/vermagic=5/' $(DRIVERS)/old/modules/edu.ko
	@mkdir -p $(STAGE)/tests/drivers && cp $(DRIVERS)/module/hang.ko $(STAGE)/tests/
	@for name in nvme edu old; do guest-kernel/driver-image $(DRIVERS)/$$name $(STAGE)/tests/drivers/$$name.erofs; done

# The lab's disk, on its way while others compile: it takes a processor at most, and waits for
# packages.
lab-disk: setup
	@$(IN_LAB) disk >/dev/null

# What is staged is compiled beside the unit tests, which wait more than they compute.
test:
	@$(MAKE) --no-print-directory -j2 lint lab-disk
	@$(MAKE) --no-print-directory -j3 unit stage
	@$(MAKE) --no-print-directory e2e

# On this host where it has all that takes, else in the lab.
demo: export LAB ?= auto
demo:
	@$(MAKE) --no-print-directory -j3 stage lab-disk
	@$(IN_LAB) run --timeout 600 $(STAGE) -- bash -c "$$(cat tests/demo.sh)"

# Counts and times in the lab, whose clock counts instructions here.
bench: stage
	@cargo build --release --locked -p nacre-tests --bin nacre-bench
	@install -m 755 target/release/nacre-bench $(STAGE)$(PREFIX)/bin/
	@$(IN_LAB) run --count --timeout 900 $(STAGE) -- nacre-bench

# The tests that take many minutes in the lab, so no part of `test`: gibibytes by network, many
# machines and pods at once, and what they take and cost beside runc.
long: stage
	@$(call install-tests,-p nacre-tests --test e2e,nacre-e2e)
	@$(call install-tests,-p nacre-tests --test pods,nacre-pods)
	@$(install-wire)
	@$(IN_LAB) run --timeout 5400 $(STAGE) -- bash -c 'code=0; for tests in nacre-e2e nacre-pods; do $$tests --test-threads=1 --ignored --nocapture || code=$$?; done; exit $$code'

# One pod after another, for so many seconds and at least so many pods, ended in
# every way a pod may end.
SOAK_SECONDS ?= 600
SOAK_PODS ?= 300
soak: stage
	@cargo build --release --locked -p nacre-tests --bin nacre-soak
	@install -m 755 target/release/nacre-soak $(STAGE)$(PREFIX)/bin/
	@$(IN_LAB) run --timeout $$(($(SOAK_SECONDS) + $(SOAK_PODS) * 15 + 300)) $(STAGE) -- nacre-soak $(SOAK_SECONDS) $(SOAK_PODS)

lab: stage
ifdef CMD
	@$(IN_LAB) run $(STAGE) -- bash -c "$$CMD"
else
	@$(IN_LAB) shell $(STAGE)
endif

clean:
	rm -rf target
