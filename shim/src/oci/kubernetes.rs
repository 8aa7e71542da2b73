//! What CRI's annotations tell of a container.
//!
//! Every pod has a sandbox container, made first and removed last. Elsewhere its
//! one process, pause, holds the pod's namespaces; here the machine does, so the
//! sandbox container has no process and nothing of its image is used. The
//! others join the pod: they name the sandbox's namespaces by host paths.
//!
//! containerd's CRI writes the annotations of all containers; where it leaves the
//! sandbox container to the shim, the shim writes those ([`super::pod`]).

use oci_spec::runtime::Spec;

/// The kind of a container.
pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// [`CONTAINER_TYPE`] of a pod's sandbox container.
pub const SANDBOX: &str = "sandbox";
/// Id of the sandbox container.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Name of the pod.
pub const SANDBOX_NAME: &str = "io.kubernetes.cri.sandbox-name";
/// Namespace of the pod.
pub const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
/// uid of the pod.
pub const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
/// CPU time the pod's containers may use together in a period, in microseconds.
pub const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// That period, in microseconds.
pub const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// Memory the pod's containers may use together, in bytes.
pub const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    let annotations = spec.annotations().as_ref()?;
    annotations.get(name).map(String::as_str)
}

/// Whether this is a pod's sandbox container.
pub fn is_sandbox(spec: &Spec) -> bool {
    annotation(spec, CONTAINER_TYPE) == Some(SANDBOX)
}

/// The namespace and name of the pod whose sandbox container this is; `None` of any other.
pub fn pod_of_sandbox(spec: &Spec) -> Option<(&str, &str)> {
    let namespace = annotation(spec, SANDBOX_NAMESPACE)?;
    let name = annotation(spec, SANDBOX_NAME)?;
    is_sandbox(spec).then_some((namespace, name))
}

/// Whether this is a container that joins a pod.
pub fn joins_pod(spec: &Spec) -> bool {
    annotation(spec, CONTAINER_TYPE) == Some("container")
}
