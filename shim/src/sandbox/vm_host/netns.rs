//! The namespaces that a container's specification asks for: the network's is the machine's,
//! and the host's own are nobody's.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::{SandboxError, io_error, open};
use crate::oci::{self, kubernetes};

/// The machine's network namespace.
pub(super) struct NetNs {
    pub(super) file: File,
    pub(super) path: Option<PathBuf>,
}

impl NetNs {
    /// A descriptor of its own for work elsewhere.
    pub(super) fn another(&self) -> Result<File, SandboxError> {
        self.file
            .try_clone()
            .map_err(io_error("duplicate a descriptor"))
    }
}

/// CRI leaves out of the sandbox's spec which namespaces are to be the host's.
pub(super) fn refuse_host_namespaces(spec: &Spec, sandbox_id: &str) -> Result<(), SandboxError> {
    if !kubernetes::is_sandbox(spec) {
        return Ok(());
    }
    let has = |kind| {
        let mut own = oci::namespaces(spec).iter();
        own.any(|namespace| namespace.typ() == kind)
    };
    let what = if !has(LinuxNamespaceType::Network) {
        "the host's network (hostNetwork: true)"
    } else if !has(LinuxNamespaceType::Pid) {
        "the host's processes (hostPID: true)"
    } else if !has(LinuxNamespaceType::Ipc) {
        "the host's IPC (hostIPC: true)"
    } else {
        return Ok(());
    };
    Err(SandboxError::HostNamespace {
        sandbox_id: sandbox_id.to_owned(),
        what,
    })
}

pub(super) fn open_netns(spec: &Spec, container_id: &str) -> Result<NetNs, SandboxError> {
    let network = oci::namespaces(spec)
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
        .ok_or_else(|| SandboxError::HostNetwork {
            container_id: container_id.to_owned(),
        })?;
    match network.path() {
        Some(path) => Ok(NetNs {
            file: open(path, false)?,
            path: Some(path.clone()),
        }),
        None => Ok(NetNs {
            file: new_netns().map_err(io_error("make a network namespace"))?,
            path: None,
        }),
    }
}

/// A network namespace that lives as long as something refers to it. A thread
/// makes it, since the caller must stay where it is.
fn new_netns() -> io::Result<File> {
    let thread = std::thread::Builder::new().spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        File::open("/proc/thread-self/ns/net")
    })?;
    let died = |_| io::Error::other("the thread that makes the namespace died");
    thread.join().map_err(died)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::pod::sandbox_spec;
    use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
    use nacre_protocol::cri::{NamespaceMode, PodSandboxConfig};
    use serde_json::json;

    fn spec(value: serde_json::Value) -> Spec {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn host_network_is_refused_by_name() {
        let spec = spec(json!({"ociVersion": "1.0.2", "linux": {"namespaces": [{"type": "pid"}]}}));
        let error = open_netns(&spec, "web").err().unwrap();
        assert!(matches!(error, SandboxError::HostNetwork { .. }));
        assert!(error.to_string().contains("container web"), "{error}");
    }

    #[test]
    fn named_namespace_is_opened() {
        let namespace = json!([{"type": "network", "path": "/proc/self/ns/net"}]);
        let with_path = spec(json!({"ociVersion": "1.0.2", "linux": {"namespaces": namespace}}));
        let netns = open_netns(&with_path, "c").unwrap();
        assert_eq!(netns.path, Some(PathBuf::from("/proc/self/ns/net")));
    }

    #[test]
    fn pods_in_the_host_s_namespaces_are_refused_by_name() {
        let pod = |kinds: &[&str]| {
            let namespaces: Vec<_> = kinds.iter().map(|kind| json!({"type": kind})).collect();
            spec(json!({
                "ociVersion": "1.0.2",
                "annotations": {"io.kubernetes.cri.container-type": "sandbox"},
                "linux": {"namespaces": namespaces},
            }))
        };
        let refusal = |kinds: &[&str]| {
            let refused = refuse_host_namespaces(&pod(kinds), "web");
            refused.err().map(|error| error.to_string())
        };
        assert_eq!(refusal(&["network", "pid", "ipc"]), None);
        assert_eq!(refusal(&["network", "pid", "ipc", "user"]), None);
        for (has, word) in [
            (&["pid", "ipc"][..], "hostNetwork"),
            (&["network", "ipc"], "hostPID"),
            (&["network", "pid"], "hostIPC"),
        ] {
            assert!(refusal(has).unwrap().contains(word), "{word}");
        }
        let alone = spec(json!({"ociVersion": "1.0.2"}));
        assert!(refuse_host_namespaces(&alone, "web").is_ok());
    }

    #[test]
    fn sandboxes_in_the_host_s_namespaces_are_refused_by_name() {
        let request = CreateSandboxRequest::default();
        let mut config = PodSandboxConfig::default();
        let refused = |config: &PodSandboxConfig| {
            refuse_host_namespaces(&sandbox_spec(&request, config, "k8s.io"), "web")
                .err()
                .map(|error| error.to_string())
        };
        assert_eq!(refused(&config), None);
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        let options = security.namespace_options.mut_or_insert_default();
        options.ipc = NamespaceMode::NODE.into();
        assert!(
            refused(&config)
                .unwrap()
                .contains("pod web asks for the host's IPC")
        );
    }
}
