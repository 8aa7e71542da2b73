//! End-to-end tests of Kubernetes pods: containerd's CRI, called as kubelet
//! calls it, and real guests. See `tests/lab`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod devices;
mod exec;
mod failures;
mod lifecycle;
mod logs;
mod network;
mod numbers;
mod pids;
mod resources;
mod security;
mod stats;
mod volumes;

/// What keeps a container running until it is stopped.
const SLEEP: &[&str] = &["sleep", "3600"];
