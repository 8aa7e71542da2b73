//! From the shim's configuration to virtio devices.
//!
//! The one place that knows every device's constructor. Slots are given in this
//! order: vsock, rng, console, shared directory, disks, network interfaces
//! ([`VmConfig::first_nic_slot`] counts on that), memory.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use nacre_protocol::channel::{ChannelError, Fds};
use nacre_protocol::guest::GUEST_CID;
use nacre_protocol::vm::{Disk, DiskBacking, FdIndex, Nic, SharedDir, VmConfig};

use crate::memory::Growth;
use crate::virtio::VirtioDevice;
use crate::virtio::block::{Backing, Block, BlockError, Exchanger};
use crate::virtio::console::Console;
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::mem::{Mem, Resizer};
use crate::virtio::net::{Net, NetError};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Dialer, Vsock, VsockError};

/// A device that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A descriptor is missing.
    #[error(transparent)]
    Fd(#[from] ChannelError),
    /// No vsock.
    #[error("vsock: {0}")]
    Vsock(#[from] VsockError),
    /// No disk.
    #[error("disk {serial}: {source}")]
    Disk {
        /// Its serial number.
        serial: String,
        /// The device's reason.
        source: BlockError,
    },
    /// No network interface.
    #[error("network interface: {0}")]
    Nic(#[from] NetError),
    /// No shared directory.
    #[error("shared directory: {0}")]
    SharedDir(#[from] FsError),
    /// No memory device.
    #[error("memory device: {0}")]
    Mem(#[source] std::io::Error),
    /// The console's descriptor cannot be shared.
    #[error("console: {0}")]
    Console(#[from] std::io::Error),
}

/// The devices of a machine.
pub struct Devices {
    /// In order of their slots.
    pub devices: Vec<Box<dyn VirtioDevice>>,
    /// Reaches the guest's vsock ports.
    pub dialer: Dialer,
    /// Output of the serial port, if there is a console.
    pub serial: Option<File>,
    /// The connection to the file server, if there is a shared directory: it hangs
    /// up when the server ends.
    pub file_server: Option<OwnedFd>,
    /// Resizes the memory, if it can grow.
    pub resizer: Option<Resizer>,
    /// The disks that were made empty, by their serial numbers.
    pub slots: HashMap<String, Exchanger>,
}

/// Makes the devices `config` names out of `fds`; `dialed` hears of connections
/// the guest makes. Memory can be added at `growth`.
///
/// # Errors
///
/// The first device that cannot be made.
pub fn build(
    config: &VmConfig,
    fds: &mut Fds,
    growth: Option<Growth>,
    dialed: impl Fn(u32, OwnedFd) + Send + 'static,
) -> Result<Devices, DeviceError> {
    let (vsock, dialer) = Vsock::new(GUEST_CID, dialed)?;
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(vsock), Box::new(Rng::new())];
    let mut serial = None;
    let mut file_server = None;
    if let Some(console) = config.console {
        let output = File::from(fds.take(console)?);
        serial = Some(output.try_clone()?);
        devices.push(Box::new(Console::new(output)));
    }
    if let Some(dir) = &config.shared_dir {
        let (device, connection) = shared_dir(dir, fds)?;
        file_server = Some(connection);
        devices.push(Box::new(device));
    }
    let mut slots = HashMap::new();
    for disk in &config.disks {
        let block = block(disk, fds)?;
        if disk.backing == DiskBacking::Empty {
            slots.insert(disk.serial.clone(), block.exchanger());
        }
        devices.push(Box::new(block));
    }
    for nic in &config.nics {
        devices.push(Box::new(net(nic, fds)?));
    }
    let mut resizer = None;
    if let Some(growth) = growth {
        let (mem, handle) = Mem::new(growth).map_err(DeviceError::Mem)?;
        devices.push(Box::new(mem));
        resizer = Some(handle);
    }
    Ok(Devices {
        devices,
        dialer,
        serial,
        file_server,
        resizer,
        slots,
    })
}

fn block(disk: &Disk, fds: &mut Fds) -> Result<Block, DeviceError> {
    let backing = backing(&disk.backing, fds)?;
    Block::new(&disk.serial, disk.read_only, backing, disk.queues).map_err(|source| {
        DeviceError::Disk {
            serial: disk.serial.clone(),
            source,
        }
    })
}

/// The bytes of a disk.
///
/// # Errors
///
/// A descriptor is missing.
pub fn backing(backing: &DiskBacking, fds: &mut Fds) -> Result<Backing, ChannelError> {
    Ok(match backing {
        DiskBacking::Whole(file) => Backing::Whole(fds.take(*file)?.into()),
        DiskBacking::Partitions(files) => {
            let files = take_all(files, fds)?;
            Backing::Partitions(files.into_iter().map(File::from).collect())
        }
        DiskBacking::Empty => Backing::Empty,
    })
}

/// Makes the shared directory, and another descriptor of the connection to its file server.
/// Waits for that, as long as it takes or is there.
///
/// # Errors
///
/// When the descriptor is missing or the file server is not what it should be.
pub fn shared_dir(dir: &SharedDir, fds: &mut Fds) -> Result<(Fs, OwnedFd), DeviceError> {
    let socket = fds.take(dir.socket)?;
    let connection = socket.try_clone().map_err(FsError::Socket)?;
    Ok((Fs::new(&dir.tag, socket)?, connection))
}

/// Makes a network interface.
///
/// # Errors
///
/// When a descriptor is missing or is not what it should be.
pub fn net(nic: &Nic, fds: &mut Fds) -> Result<Net, DeviceError> {
    let taps = take_all(&nic.taps, fds)?;
    let vhost = take_all(&nic.vhost, fds)?;
    Ok(Net::new(nic.mac, nic.mtu, taps, vhost)?)
}

fn take_all(indices: &[FdIndex], fds: &mut Fds) -> Result<Vec<OwnedFd>, ChannelError> {
    indices.iter().map(|index| fds.take(*index)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::fd::AsFd;

    use crate::virtio::fs;

    use nacre_protocol::channel::{Channel, FdList};
    use nacre_protocol::vm::{Jail, Memory, NamedFd, PciOptions, Request};

    /// A configuration, and its descriptors as a monitor gets them.
    fn config(with_console: bool, is_shared: bool, disks: usize) -> (VmConfig, Fds) {
        let file = tempfile::tempfile().unwrap();
        let file_server = fs::tests::back_end();
        let mut list = FdList::default();
        let fd = list.push(file.as_fd());
        let socket = list.push(file_server.as_fd());
        let disk = |index: usize| Disk {
            serial: format!("slot{index}"),
            read_only: false,
            backing: DiskBacking::Empty,
            queues: 1,
        };
        let unnamed = NamedFd {
            fd,
            path: "-".into(),
        };
        let config = VmConfig {
            sandbox_id: "pod".into(),
            jail: Jail { uid: 1, gid: 1 },
            kvm: fd,
            vcpus: 1,
            memory: Memory {
                size_mib: 64,
                growth_mib: 0,
                hugepages: false,
            },
            kernel: unnamed.clone(),
            initrd: unnamed,
            cmdline: String::new(),
            disks: (0..disks).map(disk).collect(),
            nics: Vec::new(),
            passthrough: None,
            pci_slots: 0,
            pci: PciOptions::default(),
            shared_dir: is_shared.then(|| SharedDir {
                tag: "shared".into(),
                socket,
            }),
            console: with_console.then_some(fd),
        };
        let (near, mut far) = Channel::pair().unwrap();
        let boot = Request::Boot(Box::new(config.clone()));
        near.send(&boot, &list).unwrap();
        let (_, fds) = far.recv::<Request>().unwrap();
        (config, fds)
    }

    #[test]
    fn network_interfaces_are_where_the_shim_takes_them_to_be() {
        for (with_console, is_shared, disks) in [
            (false, false, 0),
            (false, true, 2),
            (true, false, 1),
            (true, true, 3),
        ] {
            let (config, mut fds) = config(with_console, is_shared, disks);
            let built = build(&config, &mut fds, None, |_, _| {}).unwrap();
            // The first device is in slot 1.
            let next = built.devices.len() + 1;
            assert_eq!(next, usize::from(config.first_nic_slot()));
        }
    }
}
