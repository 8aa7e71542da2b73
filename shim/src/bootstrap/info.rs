//! `-info` and `-v`: what the runtime is and can do.

use std::collections::HashMap;

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use super::BootstrapError;
use crate::RUNTIME_NAME;

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Mounts containerd 2.2 and later may hand over unmounted.
const ALLOW_MOUNTS: (&str, &str) = (
    "containerd.io/runtime-allow-mounts",
    "mkdir/*,format/*,erofs",
);
/// Type under which containerd looks for the runtime's features; the value is
/// the JSON of runtime-spec's features.md.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Mount options the guest's runtime understands; `rro` unlocks Kubernetes'
/// recursive read-only mounts.
const MOUNT_OPTIONS: [&str; 26] = [
    "async",
    "atime",
    "bind",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "ridmap",
    "ro",
    "rprivate",
    "rro",
    "rslave",
    "rw",
    "slave",
    "suid",
    "sync",
];

/// The `RuntimeInfo` message.
pub fn runtime_info() -> Result<Vec<u8>, BootstrapError> {
    let info = RuntimeInfo {
        name: RUNTIME_NAME.into(),
        version: Some(RuntimeVersion {
            version: VERSION.into(),
            ..Default::default()
        })
        .into(),
        features: Some(Any {
            type_url: FEATURES_TYPE.into(),
            value: features().to_string().into_bytes(),
            ..Default::default()
        })
        .into(),
        annotations: HashMap::from([(ALLOW_MOUNTS.0.into(), ALLOW_MOUNTS.1.into())]),
        ..Default::default()
    };
    Ok(info.write_to_bytes()?)
}

/// The line `-v` prints.
pub fn version_text() -> String {
    format!("containerd-shim-nacre-v2:\n  Version:  {VERSION}\n")
}

fn features() -> serde_json::Value {
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "startContainer", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": { "v1": false, "v2": true },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_says_which_mounts_come_raw() {
        let info = RuntimeInfo::parse_from_bytes(&runtime_info().unwrap()).unwrap();
        assert_eq!(info.name, "io.containerd.nacre.v2");
        assert_eq!(
            info.annotations["containerd.io/runtime-allow-mounts"],
            "mkdir/*,format/*,erofs"
        );
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
        // containerd gives `hostUsers: false` to who has both of these.
        assert_eq!(
            features["linux"]["mountExtensions"]["idmap"]["enabled"],
            true
        );
        let namespaces = features["linux"]["namespaces"].as_array().unwrap();
        assert!(namespaces.contains(&"user".into()));
    }
}
