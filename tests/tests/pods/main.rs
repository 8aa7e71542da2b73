//! End-to-end tests of Kubernetes pods: containerd's CRI, called as kubelet
//! calls it, and real guests. See `tests/lab`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

/// Each of these tests in both of containerd's modes.
macro_rules! in_both_modes {
    ($($test:ident),* $(,)?) => {
        /// The default, its `podsandbox` controller.
        mod podsandbox {
            $(
                #[test]
                fn $test() {
                    super::$test(&nacre_tests::pods::PodScene::new());
                }
            )*
        }

        /// `sandboxer = "shim"`.
        mod sandboxed {
            $(
                #[test]
                fn $test() {
                    super::$test(&nacre_tests::pods::PodScene::sandboxed());
                }
            )*
        }
    };
}

mod cgroup;
mod devices;
mod distribution;
mod exec;
mod failures;
mod install;
mod lifecycle;
mod logs;
mod manifests;
mod network;
mod numbers;
mod pids;
mod resources;
mod retries;
mod sandboxed;
mod security;
mod snapshotter;
mod stats;
mod traffic;
mod volumes;
mod wire;

/// What keeps a container running until it is stopped.
const SLEEP: &[&str] = &["sleep", "3600"];

/// Perl of the host, on a share of its /usr at /run/usr: busybox lacks what takes sockets
/// of more kinds.
const PERL: &str = "/run/usr/lib64/ld-linux-x86-64.so.2 \
    --library-path /run/usr/lib/x86_64-linux-gnu /run/usr/bin/perl \
    -I/run/usr/lib/x86_64-linux-gnu/perl-base";
