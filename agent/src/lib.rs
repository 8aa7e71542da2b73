//! The agent: PID 1 of the guest.
//!
//! ```text
//!   main.rs    which of three programs this is: PID 1, `serve`, the helper `init`
//!   boot.rs    PID 1 only: root, mounts, cgroups, vsock, power off
//!   serve.rs   the same server on an ordinary Linux, for the shim's tests
//!   service.rs agent.proto -> sandbox.rs, the operations -> container.rs
//!   engine/    makes processes in namespaces (see there why it is our own)
//!   cgroup/    limits, devices, statistics, freezer, events
//!   stdio.rs, streams.rs   pipes and terminals <-> vsock connections
//!   storage.rs, disk.rs, mount.rs, network.rs   what a pod brings along
//!   volumes/   directories its containers share
//!   devices.rs block devices of the host and PCI devices (pci.rs) as nodes, uevent.rs the
//!              kernel's word that they are there
//!   drivers/   driver images: modules, and what containers with their devices get
//!   forward.rs connections to the pod's loopback from the host
//!   cpus.rs    which of the guest's CPUs are online
//!   hugepages.rs  the pool of huge pages that containers may use
//!   pids.rs    the PID namespace that containers of a pod share
//!   reaper.rs  exit statuses
//! ```
//!
//! One thread runs everything on tokio's current-thread runtime; calls that
//! may block for long (mounts) go to its blocking pool. Processes are never
//! forked from here but by an executed helper.
//!
//! The agent believes the shim, its only client. Containers reach it through
//! their output, their file system and signals only.
#![warn(missing_docs)]

pub mod boot;
pub mod cgroup;
pub mod clock;
pub mod container;
pub mod cpus;
pub mod devices;
pub mod disk;
pub mod drivers;
pub mod engine;
pub mod error;
pub mod forward;
pub mod hugepages;
pub mod io;
pub mod log;
pub mod mount;
pub mod network;
pub mod pci;
pub mod pids;
pub mod reaper;
pub mod sandbox;
pub mod serve;
pub mod service;
pub mod shared;
pub mod stdio;
pub mod storage;
pub mod streams;
pub mod uevent;
pub mod volumes;
pub mod watch;
