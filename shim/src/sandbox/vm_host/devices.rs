//! The devices of the host that a pod's containers ask for ([`crate::devices`]): claimed
//! when the machine is made, opened when it boots, and the monitor's alone from then on.
//! The machine has the driver images for them as disks.

use nacre_protocol::agent::Driver;
use nacre_protocol::vm::guest_address;
use nacre_vmm::vfio::Passthrough;

use super::super::{ContainerConfig, SandboxError};
use super::{VmHost, blocking};
use crate::devices::{AssignedDevice, drivers, request};
use crate::storage::{HostBacking, HostDisk};

impl VmHost {
    /// What a container asks for.
    ///
    /// # Errors
    ///
    /// `Devices`: what cannot be passed.
    pub async fn devices(
        &self,
        config: &ContainerConfig,
    ) -> Result<Vec<AssignedDevice>, SandboxError> {
        let (system, spec) = (self.system.clone(), config.spec.clone());
        let by_annotation = self.config.device_annotations;
        blocking(move || request::assigned(&system, &spec, by_annotation))
            .await
            .map_err(|source| SandboxError::Devices {
                container_id: config.id.clone(),
                source,
            })
    }

    /// What the pod's machine has, in its order.
    pub fn pod_devices(&self) -> Vec<AssignedDevice> {
        crate::task::lock(&self.parts).devices.clone()
    }

    /// Makes the devices the first container asks for this pod's.
    pub(super) async fn claim_devices(&self, config: &ContainerConfig) -> Result<(), SandboxError> {
        let devices = self.devices(config).await?;
        if devices.is_empty() {
            return Ok(());
        }
        let addresses: Vec<_> = devices.iter().map(|device| device.address).collect();
        let run_dir = self.run_dir.clone();
        blocking(move || run_dir.claims().claim(&run_dir, &addresses))
            .await
            .map_err(|source| SandboxError::Claim {
                container_id: config.id.clone(),
                source,
            })?;
        crate::task::lock(&self.parts).devices = devices;
        Ok(())
    }

    /// The driver images for the pod's devices: disks of the machine, and what the guest
    /// is told of each. All pods read the same file, so the host has its pages once.
    pub(super) async fn driver_disks(
        &self,
        container_id: &str,
    ) -> Result<(Vec<HostDisk>, Vec<Driver>), SandboxError> {
        let devices = self.pod_devices();
        let addresses: Vec<_> = devices.iter().map(|device| device.address).collect();
        let (system, images) = (self.system.clone(), self.config.drivers.clone());
        let opened = blocking(move || drivers::open(&images, &system, &addresses))
            .await
            .map_err(|source| SandboxError::Drivers {
                container_id: container_id.to_owned(),
                source,
            })?;
        let numbered = opened.into_iter().enumerate();
        let both = numbered.map(|(number, image)| {
            let serial = format!("driver{number}");
            let driver = Driver {
                serial: serial.clone(),
                path: image.path.display().to_string(),
                devices: image.devices.into_iter().map(guest_address).collect(),
                ..Driver::default()
            };
            let disk = HostDisk {
                serial,
                read_only: true,
                backing: HostBacking::Whole(image.file),
            };
            (disk, driver)
        });
        Ok(both.unzip())
    }

    /// Opens the pod's devices, for the monitor.
    pub(super) async fn open_devices(
        &self,
        container_id: &str,
    ) -> Result<Option<Passthrough>, SandboxError> {
        let devices = self.pod_devices();
        if devices.is_empty() {
            return Ok(None);
        }
        let system = self.system.clone();
        blocking(move || request::open(&system, &devices))
            .await
            .map(Some)
            .map_err(|source| SandboxError::OpenDevices {
                container_id: container_id.to_owned(),
                source,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use nacre_protocol::channel::FdList;
    use nacre_protocol::vm::Iommu;
    use serde_json::json;
    use tempfile::TempDir;

    use crate::config::Config;
    use crate::devices::testing::Tree;
    use crate::devices::{Address, DriverImage};
    use crate::error::chain;
    use crate::machine::{Machine, VmMachine};
    use crate::rundir::{RunDir, State, Undying};

    /// A pod of a container that asks for the devices of a made-up host.
    struct Pod {
        root: TempDir,
        run_dir: RunDir,
        host: VmHost,
        config: ContainerConfig,
    }

    impl Pod {
        fn asks(tree: &Tree, devices: &str) -> Self {
            let root = tempfile::tempdir().unwrap();
            let run_dir = RunDir::new(root.path(), "default", "web").unwrap();
            run_dir.create().unwrap();
            let state = State::of_daemon(std::process::id(), PathBuf::new(), Path::new("/none"));
            run_dir.save(&state).unwrap();
            let config = Config {
                device_annotations: true,
                ..Config::default()
            };
            let mut host = VmHost::new(
                config,
                run_dir.clone(),
                "web".into(),
                state,
                crate::hooks::Runner::default(),
            );
            host.system = tree.system();
            let spec = json!({
                "ociVersion": "1.1.0",
                "annotations": {"io.nacre.devices": devices},
            });
            let config = ContainerConfig {
                api: crate::sandbox::Api::Task,
                id: "web".into(),
                bundle: PathBuf::new(),
                rootfs: Vec::new(),
                spec: Arc::new(serde_json::from_value(spec).unwrap()),
            };
            Self {
                root,
                run_dir,
                host,
                config,
            }
        }

        fn holder(&self, address: &str) -> Option<String> {
            let address: Address = address.parse().unwrap();
            self.run_dir.claims().holder(address).unwrap()
        }
    }

    #[tokio::test]
    async fn devices_are_claimed_opened_and_freed() {
        let tree = Tree::new();
        for (address, group) in [("0000:01:00.0", 4), ("0000:02:00.0", 5)] {
            let device = tree.add(address, 0x01_0802);
            device.group(group).driver("vfio-pci");
            device.file(&format!("vfio-dev/vfio{group}/dev"), "511:0\n");
            tree.write(&format!("dev/vfio/devices/vfio{group}"), "");
        }
        tree.write("dev/iommu", "");
        let pod = Pod::asks(&tree, "0000:02:00.0,0000:01:00.0");
        assert!(pod.host.open_devices("web").await.unwrap().is_none());
        pod.host.claim_devices(&pod.config).await.unwrap();
        assert_eq!(pod.holder("0000:01:00.0").as_deref(), Some("default/web"));
        let other = RunDir::new(pod.root.path(), "default", "other").unwrap();
        let address = "0000:02:00.0".parse().unwrap();
        assert!(other.claims().claim(&other, &[address]).is_err());

        // This host has no groups.
        let opened = pod.host.open_devices("web").await.unwrap().unwrap();
        let mut list = FdList::default();
        let message = opened.describe(&mut list);
        assert!(matches!(message.iommu, Iommu::Iommufd(_)), "{message:?}");
        let addresses: Vec<_> = message
            .devices
            .iter()
            .map(|device| &device.address)
            .collect();
        assert_eq!(addresses, ["0000:01:00.0", "0000:02:00.0"]);

        let size = pod.host.size_of(&pod.config.spec);
        assert_eq!((size.growth_mib, size.is_pinned), (0, true));

        pod.host.teardown().await;
        assert_eq!(pod.holder("0000:01:00.0"), None);
        assert_eq!(pod.holder("0000:02:00.0"), None);
    }

    /// Killed, it may unpin memory for long, and has the devices open until it has.
    #[tokio::test]
    async fn a_monitor_that_is_not_gone_keeps_its_devices() {
        let Some(monitor) = Undying::new() else {
            return;
        };
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x01_0802)
            .group(4)
            .driver("vfio-pci");
        let pod = Pod::asks(&tree, "0000:01:00.0");
        pod.host.claim_devices(&pod.config).await.unwrap();
        let (machine, channel) = VmMachine::with_stand_in(monitor.process.pid);
        let machine = Arc::new(machine);
        crate::task::lock(&pod.host.parts).machine = Some(machine.clone());
        for _ in 0..2 {
            pod.host.teardown().await;
            assert_eq!(pod.holder("0000:01:00.0").as_deref(), Some("default/web"));
        }
        let open = async || chain(&pod.host.open(&pod.config).await.err().unwrap());
        let text = open().await;
        assert!(text.contains("killed and not gone"), "{text}");
        drop((monitor, channel));
        machine.stopped().await;
        let text = open().await;
        assert!(text.contains("host's network"), "its spec has none: {text}");
        assert_eq!(pod.holder("0000:01:00.0"), None);
    }

    #[tokio::test]
    async fn annotations_are_refused_by_default() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x01_0802)
            .group(4)
            .driver("vfio-pci");
        let mut pod = Pod::asks(&tree, "0000:01:00.0");
        pod.host.config = Config::default();
        let error = pod.host.claim_devices(&pod.config).await.err().unwrap();
        let text = chain(&error);
        let parts = ["container web", "io.nacre.devices", "device_annotations"];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert_eq!(pod.holder("0000:01:00.0"), None);
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_named() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x01_0802)
            .group(4)
            .driver("vfio-pci");
        tree.write("dev/vfio/vfio", "");
        let pod = Pod::asks(&tree, "0000:01:00.0");
        pod.host.claim_devices(&pod.config).await.unwrap();
        let error = pod.host.open_devices("web").await.err().unwrap();
        let text = chain(&error);
        assert!(text.contains("container web"), "{text}");
        assert!(text.contains("vfio/4: No such file"), "{text}");
    }

    #[tokio::test]
    async fn driver_images_are_disks_that_nobody_writes() {
        let tree = Tree::new();
        for (address, class) in [
            ("0000:01:00.0", 0x01_0802),
            ("0000:02:00.0", 0x03_0200),
            ("0000:03:00.0", 0x01_0802),
        ] {
            let device = tree.add(address, class);
            device.group(4).driver("vfio-pci");
            device.file("vendor", "0x10de").file("device", "0x2330");
        }
        let mut pod = Pod::asks(&tree, "0000:01:00.0");
        pod.host.config.drivers = vec![DriverImage {
            filter: "::0108".parse().unwrap(),
            path: tree.path("nvme.erofs"),
        }];
        let (disks, drivers) = pod.host.driver_disks("web").await.unwrap();
        assert!(disks.is_empty() && drivers.is_empty(), "it has no devices");
        pod.host.claim_devices(&pod.config).await.unwrap();
        let error = pod.host.driver_disks("web").await.err().unwrap();
        let text = chain(&error);
        assert!(text.contains("container web"), "{text}");
        assert!(text.contains("nvme.erofs of PCI device"), "{text}");

        tree.write("nvme.erofs", &"-".repeat(4096));
        let (disks, drivers) = pod.host.driver_disks("web").await.unwrap();
        let [disk] = disks.as_slice() else {
            panic!("{disks:?}");
        };
        assert!(disk.read_only);
        let [driver] = drivers.as_slice() else {
            panic!("{drivers:?}");
        };
        assert_eq!(driver.serial, disk.serial);
        assert_eq!(driver.path, tree.path("nvme.erofs").display().to_string());
        // Where the guest has the first and the third device.
        assert_eq!(driver.devices, ["0000:01:00.0", "0000:03:00.0"]);
    }

    /// Whatever step after it fails: here it is that the container has no network.
    #[tokio::test]
    async fn a_pod_that_is_not_made_has_no_devices() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x01_0802)
            .group(4)
            .driver("vfio-pci");
        let mut pod = Pod::asks(&tree, "0000:01:00.0");
        let mut spec = (*pod.config.spec).clone();
        spec.set_linux(None);
        pod.config.spec = Arc::new(spec);
        let error = pod.host.open(&pod.config).await.err().unwrap();
        assert!(matches!(error, SandboxError::HostNetwork { .. }), "{error}");
        assert_eq!(pod.host.pod_devices().len(), 1, "they were claimed");
        assert_eq!(pod.holder("0000:01:00.0"), None, "and freed");
    }
}
