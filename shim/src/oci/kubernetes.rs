//! What CRI's annotations tell of a container.
//!
//! Every pod has a sandbox container, made first and removed last. Elsewhere its
//! one process, pause, holds the pod's namespaces; here the machine does, so the
//! sandbox container has no process and nothing of its image is used. The
//! others join the pod: they name the sandbox's namespaces by host paths.

use oci_spec::runtime::Spec;

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";

fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    let annotations = spec.annotations().as_ref()?;
    annotations.get(name).map(String::as_str)
}

/// Whether this is a pod's sandbox container.
pub fn is_sandbox(spec: &Spec) -> bool {
    annotation(spec, CONTAINER_TYPE) == Some("sandbox")
}

/// Whether this is a container that joins a pod.
pub fn joins_pod(spec: &Spec) -> bool {
    annotation(spec, CONTAINER_TYPE) == Some("container")
}
