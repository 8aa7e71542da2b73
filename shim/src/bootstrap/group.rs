//! Which pod a container belongs to.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

use super::{BootstrapError, read_spec};

/// Annotations that name the pod, strongest first: CRI's, and the one runc's
/// shim invented for everybody else.
const GROUP_ANNOTATIONS: [&str; 2] = [
    crate::oci::kubernetes::SANDBOX_ID,
    "io.containerd.runc.v2.group",
];

/// The part of config.json that matters here.
#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: HashMap<String, String>,
}

/// The id of the pod that container `id` with its bundle belongs to. Without an
/// annotation, or without a config.json (as a sandbox under
/// `sandboxer = "shim"` has none), a container is a pod of its own.
///
/// # Errors
///
/// When config.json is unreadable or malformed, or names an impossible pod.
pub fn group_of(bundle: &Path, id: &str) -> Result<String, BootstrapError> {
    let Some(spec) = read_spec::<Annotated>(bundle)? else {
        return Ok(id.to_owned());
    };
    let group = GROUP_ANNOTATIONS
        .iter()
        .find_map(|name| spec.annotations.get(*name))
        .filter(|group| !group.is_empty())
        .map_or(id, String::as_str);
    crate::rundir::check_id(group)?;
    Ok(group.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group_with(config: &str) -> Result<String, BootstrapError> {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::write(bundle.path().join("config.json"), config).unwrap();
        group_of(bundle.path(), "own")
    }

    #[test]
    fn annotations_in_order() {
        let both = r#"{"annotations":{"io.containerd.runc.v2.group":"g","io.kubernetes.cri.sandbox-id":"pod"}}"#;
        assert_eq!(group_with(both).unwrap(), "pod");
        let one = r#"{"annotations":{"io.containerd.runc.v2.group":"g"}}"#;
        assert_eq!(group_with(one).unwrap(), "g");
        assert_eq!(group_with("{}").unwrap(), "own");
        let evil = r#"{"annotations":{"io.containerd.runc.v2.group":"../../etc"}}"#;
        assert!(group_with(evil).is_err());
        assert!(group_with("not json").is_err());
    }

    #[test]
    fn no_config_is_a_pod_of_its_own() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(group_of(bundle.path(), "own").unwrap(), "own");
    }
}
