//! Which of the host's devices a container asks for, and what of them a monitor opens.
//!
//! | in the spec | stands for |
//! |---|---|
//! | `linux.devices` with the numbers of `/dev/vfio/N` | IOMMU group N; so CRI, nerdctl and device plugins hand over what they chose |
//! | of `/dev/vfio/devices/vfioN` | the device with that node, for iommufd |
//! | of `/dev/vfio/vfio`, `/dev/iommu` | nothing by itself: what the others are used through |
//! | annotation `io.nacre.devices` | PCI addresses, UUIDs of mediated devices, or directories in sysfs, with commas between |
//! | annotations `cdi.k8s.io/...` | the nodes that CDI specs of the host name (`cdi.rs`) |
//!
//! A pod has besides what kubelet has given to its containers, where kubelet is asked
//! (`kubelet.rs`).
//!
//! However a device is named, its whole IOMMU group is meant. Annotations come from whoever
//! makes the pod, so they are refused unless the configuration allows them
//! (`device_annotations`), and what they name ends up in paths only as an address that
//! was parsed. Nodes come from whoever may hand out devices, with one exception: a
//! privileged container has all nodes of the host in its spec, and asks by those only that
//! have a device rule of their own besides. Which node of the host one is, its numbers say:
//! its path is the container's, where CDI (`hostPath`) may have it called anything.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nacre_protocol::vm::guest_address;
use nacre_vmm::vfio::Passthrough;
use nacre_vmm::vfio::open::{self, DeviceNodes, OpenError};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use super::pci::Function;
use super::{Address, Allocated, DeviceError, System, cdi, group};
use crate::oci::device_rules;

/// The annotation that names devices.
pub const DEVICES_ANNOTATION: &str = "io.nacre.devices";

const VFIO_DIR: &str = "/dev/vfio";
const IOMMU_NODE: &str = "/dev/iommu";
/// The container of groups, in the group interface.
const CONTAINER_NODE: &str = "/dev/vfio/vfio";

/// Errors in what a container asks for.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The device cannot be passed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The host still drives it.
    #[error(
        "PCI device {address} is with driver {driver}, and pods get what vfio-pci has: \
         `nacre devices bind {address}`"
    )]
    NotBound {
        /// Which.
        address: Address,
        /// Whose it is.
        driver: String,
    },
    /// Nothing hands it to programs.
    #[error(
        "mediated device {0} has no driver, and cannot be passed without: remove it, and make it anew"
    )]
    NoDriver(Address),
    /// Annotations count for nothing here.
    #[error(
        "annotation {0} asks for devices of the host, which annotations may only do where \
         device_annotations is true in /etc/nacre/nacre.toml"
    )]
    Annotation(String),
    /// A node that no device has.
    #[error("{} is no device's that could be passed; `nacre devices` lists them", .0.display())]
    NoNode(PathBuf),
    /// Neither an address nor a directory of a device.
    #[error(
        "annotation io.nacre.devices: {0:?} is neither a PCI address, nor the UUID of a mediated \
         device, nor the directory of either in /sys"
    )]
    BadName(String),
    /// A name that no CDI spec has.
    #[error("no CDI spec names a device {name:?}; {known}")]
    NoCdiDevice {
        /// The name.
        name: String,
        /// What was looked at.
        known: String,
    },
    /// A name that two specs have.
    #[error("CDI device {name:?} is in {files}; which is meant?")]
    CdiConflict {
        /// The name.
        name: String,
        /// Where.
        files: String,
    },
    /// A name without a VFIO device behind it.
    #[error(
        "CDI device {0:?} names no node of a device below /dev/vfio, and a virtual machine can \
         be given no other"
    )]
    CdiWithoutVfio(String),
    /// A spec cannot be read.
    #[error("cannot read CDI spec {}", path.display())]
    CdiRead {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A spec is malformed.
    #[error("malformed CDI spec {}", path.display())]
    CdiSyntax {
        /// Which.
        path: PathBuf,
        /// The parser's complaint.
        source: serde_json::Error,
    },
}

/// A device for a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssignedDevice {
    /// Where it is on the host.
    pub address: Address,
    /// Its IOMMU group.
    pub group: u32,
    /// To be opened where the host is used by the group interface: the whole group's.
    pub group_node: PathBuf,
    /// To be opened where the host has iommufd: its own.
    pub device_node: Option<PathBuf>,
    /// What its BARs of memory have together.
    pub bar_bytes: u64,
}

/// Opens devices for a monitor, whose others are in `container`.
///
/// # Errors
///
/// What cannot be opened, and why.
pub fn open(
    system: &System,
    devices: &[AssignedDevice],
    container: Option<&OwnedFd>,
) -> Result<Passthrough, OpenError> {
    let nodes = devices.iter().map(|device| DeviceNodes {
        address: device.address.to_string(),
        group: device.group_node.clone(),
        own: device.device_node.clone(),
    });
    let nodes: Vec<_> = nodes.collect();
    let opened = open::by(system.vfio_api, &system.dev, &nodes, container)?;
    devices
        .iter()
        .try_for_each(|device| check(system, device))?;
    Ok(opened)
}

/// Whether what was opened is this device. The kernel may give its nodes to another one
/// when it has gone, as mediated devices do; but not while they are open.
fn check(system: &System, assigned: &AssignedDevice) -> Result<(), OpenError> {
    let cause = match system.function(assigned.address) {
        Ok(function) => {
            let now = device(system, assigned.group, &function);
            if function.group == Some(assigned.group) && now.device_node == assigned.device_node {
                return Ok(());
            }
            io::Error::other("it has gone since the pod was given it, and come back")
        }
        Err(error) => io::Error::other(error),
    };
    let (kind, address) = (assigned.address.kind(), assigned.address);
    Err(OpenError::Step {
        what: format!("open {kind} {address}"),
        cause,
    })
}

/// Where the guest of a machine with the devices `pod_s` has those `asked` for; `None` if
/// one is not among them.
pub fn in_guest(pod_s: &[AssignedDevice], asked: &[AssignedDevice]) -> Option<Vec<String>> {
    let address = |device: &AssignedDevice| position(pod_s, device.address).map(guest_address);
    asked.iter().map(address).collect()
}

/// The place of a device among others.
pub fn position(devices: &[AssignedDevice], address: Address) -> Option<usize> {
    devices.iter().position(|device| device.address == address)
}

/// Whether a device node stands for a device that the machine is given as a whole, so
/// that the container in it has no use for the node. One that is only called so
/// [`assigned`] refuses.
///
/// # Errors
///
/// What sysfs does not tell.
pub fn is_passthrough_node(system: &System, device: &LinuxDevice) -> Result<bool, DeviceError> {
    Ok(is_of_vfio(device.path()) || host_node(system, device)?.is_some())
}

/// Whether a node of this name is VFIO's.
fn is_of_vfio(path: &Path) -> bool {
    path.starts_with(VFIO_DIR) || path == Path::new(IOMMU_NODE)
}

/// The node of VFIO's on the host that a device node of a spec is, whatever the container
/// calls it; `None` if it is none.
fn host_node(system: &System, device: &LinuxDevice) -> Result<Option<PathBuf>, DeviceError> {
    if !matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U) {
        return Ok(None);
    }
    let node = system.node_of(device.major(), device.minor())?;
    Ok(node.filter(|node| is_of_vfio(node)))
}

/// The devices a container gets, by address: all of each group it asks for, and if
/// `by_annotation` also by its annotations.
///
/// # Errors
///
/// A name nobody has, a device or a group that cannot be passed.
pub fn assigned(
    system: &System,
    spec: &Spec,
    by_annotation: bool,
) -> Result<Vec<AssignedDevice>, RequestError> {
    whole_groups(system, asked(system, spec, by_annotation)?)
}

/// The devices of a pod whose first container has `spec`: what that asks for, and what
/// kubelet has given to any of the pod's.
///
/// # Errors
///
/// Those of [`assigned`].
pub fn assigned_to_pod(
    system: &System,
    spec: &Spec,
    by_annotation: bool,
    allocated: &[Allocated],
) -> Result<Vec<AssignedDevice>, RequestError> {
    let mut all = asked(system, spec, by_annotation)?;
    for name in allocated {
        all.extend(by_allocation(system, name)?);
    }
    whole_groups(system, all)
}

fn whole_groups(
    system: &System,
    addresses: BTreeSet<Address>,
) -> Result<Vec<AssignedDevice>, RequestError> {
    let mut groups = BTreeMap::new();
    for address in addresses {
        let function = system.function(address)?;
        if function.is_bridge() {
            return Err(DeviceError::Bridge(address).into());
        }
        if !function.is_on_vfio() {
            return Err(not_ready(&function));
        }
        let (group, members) = group::of(system, &function)?;
        groups.insert(group, members);
    }
    let mut assigned = Vec::new();
    for (group, members) in groups {
        group::check(group, &members, &[])?;
        let passed = members.iter().filter(|member| member.is_on_vfio());
        assigned.extend(passed.map(|member| device(system, group, member)));
    }
    assigned.sort_by_key(|device| device.address);
    Ok(assigned)
}

fn not_ready(function: &Function) -> RequestError {
    match function.mediated {
        Some(_) => RequestError::NoDriver(function.address),
        None => RequestError::NotBound {
            address: function.address,
            driver: function.driver_name().to_owned(),
        },
    }
}

fn device(system: &System, group: u32, function: &Function) -> AssignedDevice {
    let nodes = system.dev.join("vfio");
    let own = function.vfio_node.as_ref();
    AssignedDevice {
        address: function.address,
        group,
        device_node: own.map(|name| nodes.join("devices").join(name)),
        group_node: nodes.join(group.to_string()),
        bar_bytes: function.memory_bytes(),
    }
}

/// What is asked for by name.
fn asked(
    system: &System,
    spec: &Spec,
    by_annotation: bool,
) -> Result<BTreeSet<Address>, RequestError> {
    let mut asked = BTreeSet::new();
    for device in chosen_nodes(spec) {
        asked.extend(by_device(system, device)?);
    }
    for (key, value) in spec.annotations().iter().flatten() {
        let is_cdi = key.starts_with(cdi::ANNOTATION_PREFIX);
        if !is_cdi && key != DEVICES_ANNOTATION {
            continue;
        }
        let names = value.split(',').map(str::trim);
        for name in names.filter(|name| !name.is_empty()) {
            if !by_annotation {
                return Err(RequestError::Annotation(key.clone()));
            }
            if is_cdi {
                asked.extend(by_cdi(system, name)?);
            } else {
                asked.insert(by_name(system, name)?);
            }
        }
    }
    Ok(asked)
}

/// The device nodes of a spec, without those that containerd lists unasked for a
/// privileged container. Who chooses a node has it allowed by its numbers, too: CDI
/// (SPEC.md, "containerEdits"), `--device` of clients.
fn chosen_nodes(spec: &Spec) -> Vec<&LinuxDevice> {
    let Some(linux) = spec.linux() else {
        return Vec::new();
    };
    let rules = device_rules::of(linux);
    let all = !device_rules::allow_everything(rules);
    let devices = linux.devices().iter().flatten();
    devices
        .filter(|device| all || rules.iter().any(|rule| device_rules::is_own(rule, device)))
        .collect()
}

/// The devices behind a device node of a spec; none if it is no VFIO device's.
fn by_device(system: &System, device: &LinuxDevice) -> Result<Vec<Address>, RequestError> {
    let path = device.path();
    match host_node(system, device)? {
        Some(node) => by_node(system, &node),
        // What others are used through may be there without its module (kmod's static nodes).
        None if means_nothing(path) => Ok(Vec::new()),
        None => Err(RequestError::NoNode(path.clone())),
    }
}

/// Whether a node of this name stands for no device: it is none of VFIO's, or one that all of
/// VFIO's are used through.
fn means_nothing(path: &Path) -> bool {
    let mut through = [VFIO_DIR, CONTAINER_NODE, IOMMU_NODE].iter();
    through.any(|node| path == Path::new(node)) || !is_of_vfio(path)
}

/// The devices behind a node of the host; none if it is no VFIO device's.
fn by_node(system: &System, path: &Path) -> Result<Vec<Address>, RequestError> {
    if means_nothing(path) {
        return Ok(Vec::new());
    }
    let below = path.strip_prefix(VFIO_DIR).unwrap_or(path);
    let members = match (below.to_str(), below.strip_prefix("devices")) {
        (_, Ok(node)) => {
            let mut all = system.functions()?;
            all.retain(|function| {
                function
                    .vfio_node
                    .as_ref()
                    .is_some_and(|own| node == Path::new(own))
            });
            all
        }
        // By its exact name: "+4" is none.
        (Some(name), _) if name.bytes().all(|byte| byte.is_ascii_digit()) => match name.parse() {
            Ok(number) => system.group(number)?,
            Err(_) => Vec::new(),
        },
        _ => Vec::new(),
    };
    let devices = members.iter().filter(|member| member.is_on_vfio());
    let devices: Vec<_> = devices.map(|member| member.address).collect();
    if devices.is_empty() {
        return Err(RequestError::NoNode(path.to_owned()));
    }
    Ok(devices)
}

/// The device of an address or a directory in sysfs.
fn by_name(system: &System, name: &str) -> Result<Address, RequestError> {
    let bad = || RequestError::BadName(name.to_owned());
    let Ok(below) = Path::new(name).strip_prefix("/sys") else {
        return name.parse().map_err(|_| bad());
    };
    let is_plain = below
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    let last = below.file_name().and_then(|last| last.to_str());
    let address: Address = last.and_then(|last| last.parse().ok()).ok_or_else(bad)?;
    if !is_plain {
        return Err(bad());
    }
    let real = |path: PathBuf| path.canonicalize().ok();
    let there = real(system.device_dir(address)).ok_or(DeviceError::NoDevice(address))?;
    if real(system.sys.join(below)) != Some(there) {
        return Err(bad());
    }
    Ok(address)
}

/// The devices of what kubelet has given. Plugins name theirs as they like: addresses are
/// usual for PCI devices, UUIDs for mediated ones and not for them alone, and where a CDI
/// spec has the resource's name and this one, its nodes count. All else, and what a driver
/// of the host has, is no device for a machine; should the container want it by a node, it
/// is refused then.
fn by_allocation(system: &System, name: &Allocated) -> Result<Vec<Address>, RequestError> {
    let cdi_name = match name {
        Allocated::Plugin { resource, id } => match id.parse() {
            Ok(address) if is_meant(system, address) => {
                let function = system.function(address)?;
                if function.is_on_vfio() {
                    return Ok(vec![address]);
                }
                let reason = not_ready(&function);
                tracing::info!(?name, %reason, "allocated to the pod, and passed over");
                return Ok(Vec::new());
            }
            _ => format!("{resource}={id}"),
        },
        Allocated::Cdi(name) => name.clone(),
    };
    match by_cdi(system, &cdi_name) {
        Err(RequestError::NoCdiDevice { .. } | RequestError::CdiWithoutVfio(_)) => {
            tracing::info!(
                ?name,
                "allocated to the pod, and no PCI device for a machine"
            );
            Ok(Vec::new())
        }
        result => result,
    }
}

/// Whether a plugin's id that could be an address is one.
fn is_meant(system: &System, address: Address) -> bool {
    match address {
        Address::Function { .. } => true,
        Address::Mediated(_) => system.device_dir(address).exists(),
    }
}

fn by_cdi(system: &System, name: &str) -> Result<Vec<Address>, RequestError> {
    let mut found = Vec::new();
    for node in cdi::nodes(&system.cdi, name)? {
        found.extend(by_node(system, &node)?);
    }
    if found.is_empty() {
        return Err(RequestError::CdiWithoutVfio(name.to_owned()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
