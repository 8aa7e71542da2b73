//! The devices of the host that a pod's containers ask for, or kubelet has given them
//! ([`crate::devices`]): claimed when the machine is made, opened when it boots, and the
//! monitor's alone from then on. The machine has the driver images for them as disks.

use nacre_protocol::agent::Driver;
use nacre_protocol::vm::guest_address;
use nacre_vmm::vfio::Passthrough;

use super::super::hotplug::HotPlug;
use super::super::images::Images;
use super::super::{ContainerConfig, SandboxError};
use super::{VmHost, blocking, may_grow};
use crate::devices::{Allocated, AssignedDevice, System, drivers, kubelet, request};
use crate::oci::kubernetes;
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

    /// Where the host's devices are.
    pub fn system(&self) -> &System {
        &self.system
    }

    /// Those that come later.
    pub fn hot_plug(&self) -> &HotPlug {
        &self.hot_plug
    }

    /// What a pod gets whose first container is this.
    async fn devices_of_pod(
        &self,
        config: &ContainerConfig,
    ) -> Result<Vec<AssignedDevice>, SandboxError> {
        let allocated = self.allocated(config).await?;
        let (system, spec) = (self.system.clone(), config.spec.clone());
        let by_annotation = self.config.device_annotations;
        blocking(move || request::assigned_to_pod(&system, &spec, by_annotation, &allocated))
            .await
            .map_err(|source| SandboxError::Devices {
                container_id: config.id.clone(),
                source,
            })
    }

    /// What kubelet has given the pod, where it is asked.
    async fn allocated(&self, config: &ContainerConfig) -> Result<Vec<Allocated>, SandboxError> {
        let socket = self.config.pod_resources_socket.as_deref();
        let pod = kubernetes::pod_of_sandbox(&config.spec);
        let Some((socket, (namespace, name))) = socket.zip(pod) else {
            return Ok(Vec::new());
        };
        let allocated = kubelet::allocated(socket, namespace, name).await;
        allocated.map_err(|source| SandboxError::Kubelet {
            sandbox_id: config.id.clone(),
            source,
        })
    }

    /// Makes the devices the first container asks for this pod's, and if others may join
    /// it decides on slots for what they bring.
    pub(super) async fn claim_devices(&self, config: &ContainerConfig) -> Result<(), SandboxError> {
        let devices = self.devices_of_pod(config).await?;
        let addresses: Vec<_> = devices.iter().map(|device| device.address).collect();
        if !addresses.is_empty() {
            let run_dir = self.run_dir.clone();
            blocking(move || run_dir.claims().claim(&run_dir, &addresses))
                .await
                .map_err(|source| SandboxError::Claim {
                    container_id: config.id.clone(),
                    source,
                })?;
        }
        // Those of an attempt that failed are not claimed any more.
        let mut parts = crate::task::lock(&self.parts);
        parts.devices = devices;
        parts.pci_slots = if may_grow(&config.spec) {
            self.config.pci_slots
        } else {
            0
        };
        Ok(())
    }

    /// The driver images for the pod's devices, and if others may come all there are: disks
    /// of the machine, and what the guest is told of each. All pods read the same file, so
    /// the host has its pages once.
    pub(super) async fn driver_disks(
        &self,
        container_id: &str,
    ) -> Result<(Vec<HostDisk>, Images), SandboxError> {
        let devices = self.pod_devices();
        let addresses: Vec<_> = devices.iter().map(|device| device.address).collect();
        let others = crate::task::lock(&self.parts).pci_slots > 0;
        let (system, rules) = (self.system.clone(), self.config.drivers.clone());
        let opened = blocking(move || drivers::open(&rules, &system, &addresses, others))
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
        let (disks, drivers) = both.unzip();
        Ok((disks, Images::new(self.config.drivers.clone(), drivers)))
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
        blocking(move || request::open(&system, &devices, None))
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
    use oci_spec::runtime::Spec;
    use serde_json::json;
    use tempfile::TempDir;

    use crate::config::Config;
    use crate::devices::kubelet::testing::Kubelet;
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

        /// In Kubernetes, as the first of the pod's containers or another one.
        async fn claim_as(&mut self, kind: &str) -> Result<(), SandboxError> {
            let spec = json!({"ociVersion": "1.1.0", "annotations": {
                "io.kubernetes.cri.container-type": kind,
                "io.kubernetes.cri.sandbox-namespace": "default",
                "io.kubernetes.cri.sandbox-name": "trainer",
            }});
            self.config.spec = Arc::new(serde_json::from_value(spec).unwrap());
            self.host.claim_devices(&self.config).await
        }

        fn holder(&self, address: &str) -> Option<String> {
            let address: Address = address.parse().unwrap();
            self.run_dir.claims().holder(address).unwrap()
        }
    }

    fn spec(annotations: &serde_json::Value) -> Spec {
        let spec = json!({"ociVersion": "1.1.0", "annotations": annotations});
        serde_json::from_value(spec).unwrap()
    }

    /// Of a pod that others join.
    fn sandbox() -> Arc<Spec> {
        Arc::new(spec(
            &json!({"io.kubernetes.cri.container-type": "sandbox"}),
        ))
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

    /// What a device plugin gave to a container that is yet to come.
    #[tokio::test]
    async fn devices_that_kubelet_has_given_are_the_pod_s() {
        let tree = Tree::new();
        for (address, group) in [("0000:01:00.0", 4), ("0000:02:00.0", 5)] {
            let device = tree.add(address, 0x03_0200);
            device.group(group).driver("vfio-pci");
        }
        let kubelet = Kubelet::new(&[("vendor.com/gpu", &["0000:02:00.0"])], &[]);
        let mut pod = Pod::asks(&tree, "");
        pod.host.config.device_annotations = false;
        pod.host.config.pod_resources_socket = Some(kubelet.socket());
        // Another container of the pod asks for its own.
        pod.claim_as("container").await.unwrap();
        assert_eq!(pod.holder("0000:02:00.0"), None);
        pod.claim_as("sandbox").await.unwrap();
        assert_eq!(pod.holder("0000:02:00.0").as_deref(), Some("default/web"));
        assert_eq!(pod.holder("0000:01:00.0"), None);
        pod.host.teardown().await;

        drop(kubelet);
        let error = pod.claim_as("sandbox").await.unwrap_err();
        let text = chain(&error);
        assert!(text.contains("pod web: the devices kubelet"), "{text}");
        pod.host.config.pod_resources_socket = None;
        pod.claim_as("sandbox").await.unwrap();
        assert_eq!(pod.holder("0000:02:00.0"), None);
        assert!(pod.host.pod_devices().is_empty(), "what nobody has claimed");
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
        let is_held = || pod.holder("0000:01:00.0").as_deref() == Some("default/web");
        for _ in 0..2 {
            pod.host.teardown().await;
            assert!(is_held());
        }
        // One that comes while another waits.
        tokio::select! {
            () = pod.host.teardown() => (),
            () = pod.host.teardown() => (),
        }
        assert!(is_held());
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
    async fn memory_of_a_pod_with_slots_is_there_from_the_start() {
        let tree = Tree::new();
        let mut pod = Pod::asks(&tree, "");
        pod.host.config.pci_slots = 2;
        // Nobody joins a container of `ctr run`.
        pod.host.claim_devices(&pod.config).await.unwrap();
        assert!(!pod.host.size_of(&pod.config.spec).is_pinned);
        pod.config.spec = sandbox();
        pod.host.claim_devices(&pod.config).await.unwrap();
        assert_eq!(crate::task::lock(&pod.host.parts).pci_slots, 2);
        let size = pod.host.size_of(&pod.config.spec);
        assert_eq!((size.growth_mib, size.is_pinned), (0, true));
        // If its machine is not made, another container may be the first.
        pod.config.spec = Arc::new(spec(&json!({})));
        pod.host.claim_devices(&pod.config).await.unwrap();
        assert_eq!(crate::task::lock(&pod.host.parts).pci_slots, 0);
    }

    /// A page table for each 2 MiB of it, and the time to fill them.
    #[tokio::test]
    async fn what_devices_reach_of_each_other_is_reckoned_with() {
        let tree = Tree::new();
        let none = "0x0 0x0 0x0\n";
        let large = "0x200000000000 0x201fffffffff 0x14220c\n";
        let ports = "0xc040 0xc05f 0x40101\n";
        for address in ["0000:01:00.0", "0000:02:00.0"] {
            let device = tree.add(address, 0x03_0200);
            device.group(4).driver("vfio-pci");
            device.file("resource", &[none, large, ports].concat());
        }
        let mut pod = Pod::asks(&tree, "0000:01:00.0");
        pod.host.claim_devices(&pod.config).await.unwrap();
        let reached = |pod: &Pod| pod.host.size_of(&pod.config.spec).peer_bars_mib;
        assert_eq!(reached(&pod), 0);
        pod.host.config.pci_peers = true;
        assert_eq!(reached(&pod), 2 * (128 << 10));
        crate::task::lock(&pod.host.parts).devices.pop();
        assert_eq!(reached(&pod), 0, "there is no other");
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
        let (disks, images) = pod.host.driver_disks("web").await.unwrap();
        assert!(disks.is_empty() && images.in_use().is_empty());
        pod.host.claim_devices(&pod.config).await.unwrap();
        let error = pod.host.driver_disks("web").await.err().unwrap();
        let text = chain(&error);
        assert!(text.contains("container web"), "{text}");
        assert!(text.contains("nvme.erofs of PCI device"), "{text}");

        tree.write("nvme.erofs", &"-".repeat(4096));
        let (disks, images) = pod.host.driver_disks("web").await.unwrap();
        let [disk] = disks.as_slice() else {
            panic!("{disks:?}");
        };
        assert!(disk.read_only);
        let drivers = images.in_use();
        let [driver] = drivers.as_slice() else {
            panic!("{drivers:?}");
        };
        assert_eq!(driver.serial, disk.serial);
        assert_eq!(driver.path, tree.path("nvme.erofs").display().to_string());
        // Where the guest has the first and the third device.
        assert_eq!(driver.devices, ["0000:01:00.0", "0000:03:00.0"]);
    }

    #[tokio::test]
    async fn a_pod_with_slots_has_all_driver_images() {
        let tree = Tree::new();
        tree.write("nvme.erofs", &"-".repeat(4096));
        let mut pod = Pod::asks(&tree, "");
        pod.host.config.pci_slots = 1;
        pod.host.config.drivers = vec![DriverImage {
            filter: "::0108".parse().unwrap(),
            path: tree.path("nvme.erofs"),
        }];
        pod.host.claim_devices(&pod.config).await.unwrap();
        let (disks, _) = pod.host.driver_disks("web").await.unwrap();
        assert!(disks.is_empty(), "nobody joins it");
        pod.config.spec = sandbox();
        pod.host.claim_devices(&pod.config).await.unwrap();
        let (disks, images) = pod.host.driver_disks("web").await.unwrap();
        assert_eq!(disks.len(), 1);
        assert!(images.in_use().is_empty(), "until a device comes");
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
