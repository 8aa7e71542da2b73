//! The message that boots a machine.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nacre_protocol::channel::FdList;
use nacre_protocol::vm::{Disk, Jail, Memory, NamedFd, PciOptions, VmConfig};
use nacre_vmm::vfio::Passthrough;

use super::super::sizing::Size;
use super::super::slots::{self, SlotCounts};
use super::super::{SandboxError, cmdline};
use crate::machine::VmMachine;
use crate::network::PodNetwork;
use crate::storage::HostDisk;
use crate::virtiofsd;

/// Each request queue of a disk is a thread of the monitor: one a vCPU, so that
/// vCPUs do not wait for each other, up to what a disk can make use of.
const MAX_DISK_QUEUES: u16 = 4;

/// Descriptors the message borrows.
pub(super) struct BootFds {
    pub(super) kvm: File,
    pub(super) kernel: File,
    pub(super) initrd: File,
    pub(super) console: Option<File>,
    pub(super) disks: Vec<HostDisk>,
    /// Disks without bytes.
    pub(super) slots: SlotCounts,
    pub(super) passthrough: Option<Passthrough>,
    pub(super) socket: Option<UnixStream>,
}

/// What the message says besides.
pub(super) struct BootConfig<'a> {
    pub(super) sandbox_id: &'a str,
    /// Where these are, for messages.
    pub(super) kernel: &'a Path,
    pub(super) initrd: &'a Path,
    pub(super) network: &'a PodNetwork,
    pub(super) size: Size,
    pub(super) hugepages: bool,
    pub(super) pci_slots: u8,
    pub(super) pci: PciOptions,
    /// The monitor's.
    pub(super) uid: u32,
}

impl BootFds {
    /// Has a monitor build and run the machine; the slot of bus 0 with its first network
    /// card.
    pub(super) async fn send(
        &self,
        machine: &VmMachine,
        boot: &BootConfig<'_>,
    ) -> Result<u8, SandboxError> {
        let mut list = FdList::default();
        let size = boot.size;
        let disk_queues = u16::from(size.vcpus).min(MAX_DISK_QUEUES);
        let config = VmConfig {
            sandbox_id: boot.sandbox_id.to_owned(),
            jail: Jail {
                uid: boot.uid,
                gid: boot.uid,
            },
            kvm: list.push(self.kvm.as_fd()),
            vcpus: size.max_vcpus,
            memory: Memory {
                size_mib: size.memory_mib,
                growth_mib: size.growth_mib,
                hugepages: boot.hugepages,
            },
            kernel: NamedFd {
                fd: list.push(self.kernel.as_fd()),
                path: boot.kernel.into(),
            },
            initrd: NamedFd {
                fd: list.push(self.initrd.as_fd()),
                path: boot.initrd.into(),
            },
            cmdline: cmdline::cmdline(self.console.is_some(), size.vcpus, size.max_vcpus),
            disks: self
                .disks
                .iter()
                .map(|disk| vm_disk(disk, disk_queues, &mut list))
                .chain(slots::disks(self.slots, disk_queues))
                .collect(),
            nics: boot
                .network
                .nics
                .iter()
                .map(|nic| nic.describe(&mut list))
                .collect(),
            passthrough: self
                .passthrough
                .as_ref()
                .map(|devices| devices.describe(&mut list)),
            pci_slots: boot.pci_slots,
            pci: boot.pci,
            shared_dir: self
                .socket
                .as_ref()
                .map(|socket| virtiofsd::describe(socket, &mut list)),
            console: self.console.as_ref().map(|file| list.push(file.as_fd())),
        };
        let first_nic = config.first_nic_slot();
        machine.boot(config, &list).await?;
        Ok(first_nic)
    }
}

fn vm_disk<'a>(disk: &'a HostDisk, queues: u16, list: &mut FdList<'a>) -> Disk {
    Disk {
        serial: disk.serial.clone(),
        read_only: disk.read_only,
        backing: disk.backing.describe(list),
        queues,
    }
}
