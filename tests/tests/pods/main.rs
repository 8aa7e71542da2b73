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

mod devices;
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
mod security;
mod stats;
mod volumes;
mod wire;

/// What keeps a container running until it is stopped.
const SLEEP: &[&str] = &["sleep", "3600"];
