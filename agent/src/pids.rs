//! The PID namespace that the containers of a pod may share.

use std::path::{Path, PathBuf};

use nacre_protocol::guest::POD_PID_NAMESPACE;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use crate::container::Process;
use crate::engine::init::{Kind, Request};
use crate::engine::namespaces;
use crate::error::Result;
use crate::reaper::Reaper;
use crate::stdio::Connections;

/// Whether a container is to join it.
#[must_use]
pub fn shares(spec: &Spec) -> bool {
    namespaces(spec).iter().any(is_shared)
}

/// Has a container join that of process `pause`.
pub fn join(spec: &mut Spec, pause: i32) {
    let mut namespaces = namespaces(spec).to_vec();
    for namespace in namespaces
        .iter_mut()
        .filter(|namespace| is_shared(namespace))
    {
        namespace.set_path(Some(PathBuf::from(format!("/proc/{pause}/ns/pid"))));
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_namespaces(Some(namespaces));
    }
}

/// Makes it, with the process that keeps it.
///
/// # Errors
///
/// Those of making a process.
pub async fn pause(reaper: &Reaper) -> Result<Process> {
    let request = Request {
        cgroup: PathBuf::new(),
        window: None,
        kind: Kind::Pause,
    };
    let (process, _) = Process::launch(reaper, &request, Connections::default()).await?;
    Ok(process)
}

fn is_shared(namespace: &LinuxNamespace) -> bool {
    namespace.typ() == LinuxNamespaceType::Pid
        && namespace.path().as_deref() == Some(Path::new(POD_PID_NAMESPACE))
}
