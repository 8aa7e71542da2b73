//! Translation of an OCI runtime spec from the host's view to the guest's.
//!
//! containerd writes `config.json` for a runtime that shares the host's kernel.
//! What names host objects is taken out or replaced here; what describes the
//! container itself (process, capabilities, seccomp, resources, device rules)
//! passes through, and the agent enforces it in the guest.
//!
//! | in the spec | in the guest's spec |
//! |---|---|
//! | root path | the place where the agent assembles the root file system |
//! | mounts | given by the caller, see [`crate::storage`] |
//! | network namespace | none: the VM is the pod's network |
//! | a pod's IPC and UTS namespaces | none: the VM's own are the pod's |
//! | a pod's PID namespace | the one the agent makes for it |
//! | paths of other namespaces | dropped; pid, ipc, uts and mount are new |
//! | hooks | `startContainer`, the others are the host's, see [`crate::hooks`] |
//! | cgroup path | `/<container id>` |
//! | AppArmor profile, SELinux labels | none, the guest loads no policies |
//! | devices but the kernel's own, rules for block devices | none, see [`crate::storage`] |
//! | processors and memory nodes | none, the machine runs on them |
//! | Intel RDT, network devices | none, they are the host's |

pub mod device_rules;
pub mod kubernetes;
pub mod pod;

use std::path::{Path, PathBuf};

use nacre_protocol::guest::{CONTAINERS_DIR, POD_PID_NAMESPACE};
use oci_spec::runtime::{
    Hooks, Linux, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Process, Root,
    RootBuilder, Spec,
};

use crate::storage::devices::keep_kernel_s;

/// Namespaces a container outside of Kubernetes' pods gets even where the spec asks
/// for the host's: in the guest "the host" is the agent, which no container may see
/// or signal.
const ALWAYS_NEW: [LinuxNamespaceType; 4] = [
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Uts,
];

/// A container's directory in the guest.
pub fn container_dir(container_id: &str) -> PathBuf {
    Path::new(CONTAINERS_DIR).join(container_id)
}

/// A container's root file system in the guest.
pub fn guest_rootfs(container_id: &str) -> PathBuf {
    container_dir(container_id).join("rootfs")
}

/// Translates `spec`; `mounts` are already the guest's.
pub fn guest_spec(spec: &Spec, container_id: &str, mounts: Vec<Mount>) -> Spec {
    let mut guest = spec.clone();
    guest
        .set_hooks(spec.hooks().as_ref().and_then(guest_hooks))
        .set_mounts(Some(mounts))
        .set_root(Some(root(spec.root().as_ref(), container_id)));
    if let Some(process) = guest.process_mut().as_mut() {
        translate_process(process);
    }
    let mut linux = guest.linux().clone().unwrap_or_default();
    let in_pod = kubernetes::joins_pod(spec);
    translate_linux(&mut linux, container_id, in_pod);
    guest.set_linux(Some(linux));
    guest
}

fn guest_hooks(hooks: &Hooks) -> Option<Hooks> {
    let start = hooks.start_container().clone()?;
    let mut guest = Hooks::default();
    guest.set_start_container(Some(start));
    Some(guest)
}

fn root(host: Option<&Root>, container_id: &str) -> Root {
    let read_only = host.and_then(Root::readonly).unwrap_or(false);
    RootBuilder::default()
        .path(guest_rootfs(container_id))
        .readonly(read_only)
        .build()
        .expect("every field of the root has a value")
}

/// Takes host policy out of a process, an exec's included.
pub fn translate_process(process: &mut Process) {
    process.set_apparmor_profile(None).set_selinux_label(None);
}

/// Takes processors and memory nodes of the host out of limits: the machine runs on
/// them ([`crate::cgroup`]), the guest has its own.
pub fn translate_resources(resources: &mut LinuxResources) {
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_cpus(None).set_mems(None);
        resources.set_cpu(Some(cpu));
    }
}

/// The namespaces a spec lists.
pub fn namespaces(spec: &Spec) -> &[LinuxNamespace] {
    let linux = spec.linux().as_ref();
    linux
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default()
}

fn translate_linux(linux: &mut Linux, container_id: &str, in_pod: bool) {
    let asked = linux.namespaces().as_deref().unwrap_or_default();
    let namespaces = if in_pod {
        pod_namespaces(asked)
    } else {
        own_namespaces(asked)
    };
    keep_kernel_s(linux);
    if let Some(mut resources) = linux.resources().clone() {
        translate_resources(&mut resources);
        linux.set_resources(Some(resources));
    }
    linux
        .set_namespaces(Some(namespaces))
        .set_cgroups_path(Some(Path::new("/").join(container_id)))
        .set_mount_label(None)
        .set_intel_rdt(None)
        .set_net_devices(None);
}

fn own_namespaces(asked: &[LinuxNamespace]) -> Vec<LinuxNamespace> {
    let mut types: Vec<_> = asked
        .iter()
        .map(LinuxNamespace::typ)
        .filter(|typ| *typ != LinuxNamespaceType::Network)
        .collect();
    types.extend(ALWAYS_NEW);
    let mut namespaces: Vec<LinuxNamespace> = Vec::new();
    for typ in types {
        if namespaces.iter().all(|known| known.typ() != typ) {
            let mut namespace = LinuxNamespace::default();
            namespace.set_typ(typ);
            namespaces.push(namespace);
        }
    }
    namespaces
}

/// Those of a container that joins a pod: what it names by a path is the pod's.
fn pod_namespaces(asked: &[LinuxNamespace]) -> Vec<LinuxNamespace> {
    use LinuxNamespaceType::{Ipc, Pid, Uts};
    let is_joined = |namespace: &LinuxNamespace| {
        let path = namespace.path().as_ref();
        path.is_some_and(|path| !path.as_os_str().is_empty())
    };
    let joined: Vec<_> = asked
        .iter()
        .filter(|namespace| is_joined(namespace))
        .map(LinuxNamespace::typ)
        .collect();
    let mut namespaces = own_namespaces(asked);
    namespaces.retain(|own| !matches!(own.typ(), Ipc | Uts) || !joined.contains(&own.typ()));
    if let Some(pids) = namespaces.iter_mut().find(|own| own.typ() == Pid)
        && joined.contains(&Pid)
    {
        pids.set_path(Some(POD_PID_NAMESPACE.into()));
    }
    namespaces
}

#[cfg(test)]
mod tests;
