//! What the shim tells the monitor, and what the monitor reports.
//!
//! The first message on the channel is [`Request::Boot`]. Every descriptor a
//! message needs travels with it; a message names its descriptors by their
//! position, [`FdIndex`]. The monitor opens nothing by path.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::channel::MAX_FDS_PER_PACKET;

/// Position of a descriptor among those that came with the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdIndex(pub usize);

/// A file, and where it is on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedFd {
    /// It, open.
    pub fd: FdIndex,
    /// For messages only.
    pub path: PathBuf,
}

/// From the shim to the monitor.
///
/// What may take time has a number, another one for each request: the monitor answers it
/// with [`Event::Answered`] when it is done, whatever else comes meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Enter the jail, build the VM, run it. Sent once, first.
    Boot(Box<VmConfig>),
    /// Connect `stream`, one end of a unix stream socket pair, to `port` of the
    /// guest. Should the guest refuse, the monitor closes the stream.
    Connect {
        /// vsock port in the guest.
        port: u32,
        /// The monitor's end.
        stream: FdIndex,
    },
    /// Ask the guest to use this much of [`Memory::growth_mib`].
    Resize {
        /// Beyond the size at boot, a multiple of [`GROWTH_STEP_MIB`].
        growth_mib: u32,
    },
    /// Give a disk that booted as [`DiskBacking::Empty`] other bytes; answered with its
    /// size in bytes. Nothing touches the bytes it had after that. The answer waits for
    /// what the disk has under way; answers for other disks, and what the guest asks of
    /// this one, do not wait for it. Of two requests for one disk the one with the higher
    /// number counts.
    Exchange {
        /// See [`Request`].
        number: u64,
        /// The disk's serial number.
        serial: String,
        /// What they are, or that the disk is empty again.
        backing: DiskBacking,
        /// Whether writes fail.
        read_only: bool,
    },
    /// Put devices of the host into empty slots, all of them or none; answered with how
    /// many. The guest hears of it from its root ports.
    Plug {
        /// See [`Request`].
        number: u64,
        /// A slot for each device, counted from 0 to [`VmConfig::pci_slots`].
        slots: Vec<u8>,
        /// The devices. Of their IOMMU the monitor uses the one it has, if any device is in
        /// the guest already; groups are in its container by then.
        devices: Passthrough,
    },
    /// Take out what came with one [`Request::Plug`], whether the guest has let go of it
    /// or not; answered with how many devices. The monitor has nothing of them open then. After
    /// an error the guest may reach them as long as the VM is there.
    Unplug {
        /// See [`Request`].
        number: u64,
        /// The slots of that request.
        slots: Vec<u8>,
    },
    /// Put one more virtio-net device on bus 0; answered with its slot ([`slot_address`]).
    /// The guest finds it when it looks there.
    AddNic {
        /// See [`Request`].
        number: u64,
        /// The device.
        nic: Nic,
    },
    /// Take a virtio-net device out that came with [`VmConfig::nics`] or
    /// [`Request::AddNic`], whether the guest has let go of it or not; answered with its
    /// slot. The monitor has nothing of it open then.
    RemoveNic {
        /// See [`Request`].
        number: u64,
        /// Where it is on bus 0.
        slot: u8,
        /// Whether the guest has let go of it. Else nothing comes into its slot any more.
        is_let_go: bool,
    },
    /// Put the virtio-fs device on bus 0 of a machine that has none; answered with its slot
    /// ([`slot_address`]). The guest finds it when it looks there. The answer waits for the
    /// back end, and so does whatever is asked of the monitor meanwhile.
    AddSharedDir {
        /// See [`Request`].
        number: u64,
        /// The device.
        dir: SharedDir,
    },
    /// Have the kernel of a guest that does not answer say where it is, by an NMI: it panics
    /// then, if it still can, and [`Event::Stopped`] follows.
    Interrupt,
}

/// From the monitor to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The VM was built and its vCPUs run.
    Booted,
    /// The guest dialled `port`; `stream` is the shim's end of the connection.
    Dialed {
        /// vsock port on the host, always [`crate::guest::AGENT_PORT`].
        port: u32,
        /// The shim's end, a unix stream socket.
        stream: FdIndex,
    },
    /// The guest plugged or unplugged memory.
    Resized {
        /// What it uses beyond the size at boot, in whole MiB.
        growth_mib: u32,
    },
    /// What became of a request with a number.
    Answered {
        /// The request's.
        number: u64,
        /// What the request says, or why all is as it was; but see [`Request::Unplug`].
        result: Result<u64, String>,
    },
    /// The VM stopped. The monitor exits after this.
    Stopped(StopReason),
    /// The VM could not be built or run. The monitor exits after this.
    Failed {
        /// One line: what failed and why.
        message: String,
    },
}

/// Why a VM stopped by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// The guest powered off (ACPI S5).
    Shutdown,
    /// The guest asked for a reset (ACPI reset register).
    Reboot,
    /// A vCPU triple-faulted.
    TripleFault,
    /// The guest kernel reported a panic (pvpanic).
    Panic,
}

/// A virtual machine, complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// For messages only.
    pub sandbox_id: String,
    /// Who the monitor becomes.
    pub jail: Jail,
    /// `/dev/kvm`.
    pub kvm: FdIndex,
    /// vCPUs. The kernel may be told to start with fewer (`maxcpus=` in `cmdline`): the
    /// threads of the others sleep.
    pub vcpus: u8,
    /// Guest memory.
    pub memory: Memory,
    /// Uncompressed kernel, `vmlinux`.
    pub kernel: NamedFd,
    /// initramfs (cpio, uncompressed).
    pub initrd: NamedFd,
    /// Kernel command line, without what the monitor adds for its devices.
    pub cmdline: String,
    /// virtio-blk devices, in order of their PCI slots.
    pub disks: Vec<Disk>,
    /// virtio-net devices.
    pub nics: Vec<Nic>,
    /// PCI devices of the host that the guest drives itself. Its memory is pinned
    /// then, and cannot grow: [`Memory::growth_mib`] is 0.
    pub passthrough: Option<Passthrough>,
    /// Empty slots for more of them, which [`Request::Plug`] fills; memory is as if they
    /// were there already.
    pub pci_slots: u8,
    /// What there is with them only if it is wanted.
    pub pci: PciOptions,
    /// virtio-fs device, unless it comes by [`Request::AddSharedDir`].
    pub shared_dir: Option<SharedDir>,
    /// Debug console: kernel messages and `/dev/console` go to this file.
    pub console: Option<FdIndex>,
}

impl VmConfig {
    /// The slot of bus 0 with the first of [`Self::nics`]; the others follow. Before it
    /// are the host bridge, vsock, rng, what there is of console and shared directory,
    /// and the disks.
    #[must_use]
    pub fn first_nic_slot(&self) -> u8 {
        let before = [self.console.is_some(), self.shared_dir.is_some()];
        let before = before.iter().filter(|there| **there).count() + self.disks.len();
        // A bus has 32; more devices than that are refused.
        u8::try_from(3 + before).unwrap_or(u8::MAX)
    }
}

/// Where the guest finds what is in a slot of bus 0.
#[must_use]
pub fn slot_address(slot: u8) -> String {
    format!("0000:00:{slot:02x}.0")
}

/// The identity the monitor takes before it touches guest data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jail {
    /// Numeric user, this pod's alone.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
}

/// What memory grows and shrinks by: the most Linux plugs or unplugs at a time.
pub const GROWTH_STEP_MIB: u32 = 4;

/// Guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Size at boot.
    pub size_mib: u32,
    /// What may be added later; 0 with huge pages, of which there would have to
    /// be as many from the start.
    pub growth_mib: u32,
    /// Back it with 2 MiB huge pages.
    pub hugepages: bool,
}

/// A virtio-blk device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Serial number the guest reads, at most 20 bytes (virtio 1.2, 5.2.6.1).
    pub serial: String,
    /// Whether the guest may write.
    pub read_only: bool,
    /// Where the bytes are.
    pub backing: DiskBacking,
    /// Request queues, at least 1.
    pub queues: u16,
}

/// Most partitions of a disk: as many files as one packet carries. Requests to a machine that
/// runs are of one packet, so that one which finds the channel full is sent again as a whole.
/// Linux would show two more (`DISK_MAX_PARTS`).
pub const MAX_PARTITIONS: usize = MAX_FDS_PER_PACKET;

/// The bytes of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskBacking {
    /// One file or block device.
    Whole(FdIndex),
    /// Read-only files one after another, each a partition of a GPT that
    /// exists in memory only: `/dev/vdX1` is the first. [`MAX_PARTITIONS`] at most.
    Partitions(Vec<FdIndex>),
    /// None yet: [`Request::Exchange`] gives it some.
    Empty,
}

/// A virtio-net device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// MAC address.
    pub mac: [u8; 6],
    /// MTU announced to the guest.
    pub mtu: u16,
    /// One tap queue descriptor per queue pair.
    pub taps: Vec<FdIndex>,
    /// One `/dev/vhost-net` descriptor per queue pair, or none at all: then
    /// the monitor moves the packets itself.
    pub vhost: Vec<FdIndex>,
}

/// A virtio-fs device whose back end is another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedDir {
    /// Mount tag.
    pub tag: String,
    /// Connected vhost-user socket of the back end.
    pub socket: FdIndex,
}

/// PCI devices of the host that the guest drives by VFIO, and what they share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passthrough {
    /// What holds the guest's memory for their DMA.
    pub iommu: Iommu,
    /// At least one; each is behind a root port of its own, in this order. The
    /// guest finds the first at `0000:01:00.0`, the second at `0000:02:00.0`, and so on.
    pub devices: Vec<PciDevice>,
}

/// What devices of the host have in a guest only if it is wanted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciOptions {
    /// The guest sees their expansion ROMs.
    pub roms: bool,
    /// Of several, each reaches the others' registers and memory by DMA. Those that come later reach
    /// them too, and are not reached. Not with [`Iommu::Iommufd`].
    pub peers: bool,
}

/// Where the guest finds a device, by its position in [`Passthrough::devices`]. Slots follow
/// the last of them.
#[must_use]
pub fn guest_address(position: usize) -> String {
    format!("0000:{:02x}:00.0", position + 1)
}

/// One address space for all of a pod's devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Iommu {
    /// Group API: `/dev/vfio/vfio`, of type 1 version 2 already, with the groups of
    /// all devices in it.
    Container {
        /// `/dev/vfio/vfio`.
        container: FdIndex,
        /// `/dev/vfio/N`, each group once.
        groups: Vec<FdIndex>,
    },
    /// `/dev/iommu`, as opened: the monitor binds the devices to it.
    Iommufd(FdIndex),
}

/// A PCI function of the host, or a mediated device that looks like one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDevice {
    /// Its address on the host, `0000:01:00.0`, or the UUID of a mediated device. For messages only.
    pub address: String,
    /// The VFIO device: from its group (`VFIO_GROUP_GET_DEVICE_FD`), or
    /// `/dev/vfio/devices/vfioN` as opened.
    pub device: FdIndex,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buses_and_slots_are_counted_in_hexadecimal() {
        assert_eq!(guest_address(0), "0000:01:00.0");
        assert_eq!(guest_address(15), "0000:10:00.0");
        assert_eq!(slot_address(15), "0000:00:0f.0");
    }
}
