//! The devices of the host that a pod's containers ask for ([`crate::devices`]).

use super::super::{ContainerConfig, SandboxError};
use super::{VmHost, blocking};
use crate::devices::{AssignedDevice, request};

impl VmHost {
    /// See [`super::Host::devices`].
    pub async fn devices(
        &self,
        config: &ContainerConfig,
    ) -> Result<Vec<AssignedDevice>, SandboxError> {
        let (system, spec) = (self.system.clone(), config.spec.clone());
        blocking(move || request::assigned(&system, &spec))
            .await
            .map_err(|source| SandboxError::Devices {
                container_id: config.id.clone(),
                source,
            })
    }

    /// The devices a container asks for; from now on they are this pod's.
    pub(super) async fn claim_devices(
        &self,
        config: &ContainerConfig,
    ) -> Result<Vec<AssignedDevice>, SandboxError> {
        let devices = self.devices(config).await?;
        if devices.is_empty() {
            return Ok(devices);
        }
        let addresses: Vec<_> = devices.iter().map(|device| device.address).collect();
        let run_dir = self.run_dir.clone();
        blocking(move || run_dir.claims().claim(&run_dir, &addresses))
            .await
            .map_err(|source| SandboxError::Claim {
                container_id: config.id.clone(),
                source,
            })?;
        Ok(devices)
    }
}

/// The monitor takes no devices.
pub(super) fn refuse(devices: &[AssignedDevice], container_id: &str) -> Result<(), SandboxError> {
    if devices.is_empty() {
        return Ok(());
    }
    let addresses: Vec<_> = devices
        .iter()
        .map(|device| device.address.to_string())
        .collect();
    Err(SandboxError::NoPassthrough {
        container_id: container_id.to_owned(),
        devices: addresses.join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use serde_json::json;

    use crate::config::Config;
    use crate::devices::testing::Tree;
    use crate::rundir::{RunDir, State};

    /// A container that asks for a device of a made-up host: what it is told, and whose
    /// the device is afterwards.
    #[tokio::test]
    async fn devices_are_claimed_refused_and_freed() {
        let tree = Tree::new();
        let nvme = tree.add("0000:01:00.0", 0x01_0802);
        nvme.group(4).driver("vfio-pci");
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(root.path(), "default", "web").unwrap();
        run_dir.create().unwrap();
        let state = State::of_daemon(std::process::id(), PathBuf::new(), Path::new("/none"));
        run_dir.save(&state).unwrap();
        let mut host = VmHost::new(Config::default(), run_dir.clone(), "web".into(), state);
        host.system = tree.system();
        let spec = json!({
            "ociVersion": "1.1.0",
            "annotations": {"io.nacre.devices": "0000:01:00.0"},
        });
        let config = ContainerConfig {
            api: crate::sandbox::Api::Task,
            id: "web".into(),
            bundle: PathBuf::new(),
            rootfs: Vec::new(),
            spec: Arc::new(serde_json::from_value(spec).unwrap()),
        };
        let address = "0000:01:00.0".parse().unwrap();
        let devices = host.claim_devices(&config).await.unwrap();
        assert_eq!((devices[0].address, devices[0].group), (address, 4));
        let holder = run_dir.claims().holder(address).unwrap();
        assert_eq!(holder.as_deref(), Some("default/web"));
        let other = RunDir::new(root.path(), "default", "other").unwrap();
        assert!(other.claims().claim(&other, &[address]).is_err());

        let error = host.open(&config).await.err().unwrap();
        assert!(
            matches!(error, SandboxError::NoPassthrough { .. }),
            "{error}"
        );
        let text = error.to_string();
        assert!(
            text.contains("container web") && text.contains("0000:01:00.0"),
            "{text}"
        );
        assert_eq!(
            run_dir.claims().holder(address).unwrap(),
            None,
            "freed by the failure"
        );
    }
}
