//! PCI devices of the host that pods get whole, by VFIO (Linux
//! Documentation/driver-api/vfio.rst).
//!
//! ```text
//! nacre devices bind     bind.rs: away from the host's driver, to vfio-pci     an administrator, once
//! container created      request.rs: what its spec asks for (cdi.rs)           the shim, per container
//! sandbox created        kubelet.rs: and what kubelet has given the pod
//!                        group.rs: each a whole IOMMU group, or a refusal
//!                        claim.rs: for one pod at a time
//! monitor started        numa.rs: near them
//! machine booted         request.rs: opened, for the monitor
//!                        drivers.rs: the driver images that the guest needs for them
//! ```
//! What the kernel says of devices is read through [`System`] (`sysfs.rs`,
//! `pci.rs`, `mediated.rs`); `usage.rs` tells who on the host uses one. A device is the
//! administrator's to give: the shim never moves one to another driver.

pub mod address;
pub mod bind;
mod cdi;
pub mod claim;
pub mod drivers;
pub mod group;
pub mod kubelet;
mod mediated;
pub mod names;
pub mod numa;
pub mod pci;
pub mod request;
pub mod sysfs;
#[cfg(test)]
pub(crate) mod testing;
mod usage;

use std::io;
use std::path::PathBuf;

use crate::rundir::RunDirError;

pub use address::Address;
pub use claim::{ClaimError, Claims};
pub use drivers::{DriverError, DriverImage};
pub use kubelet::{Allocated, KubeletError};
pub use pci::Function;
pub use request::{AssignedDevice, RequestError};
pub use sysfs::System;

/// The driver that hands a device to a program.
pub const VFIO_DRIVER: &str = "vfio-pci";

/// Errors of the host's devices.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A file of the kernel cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the kernel says something unheard of.
    #[error("{} says {text:?}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What.
        text: String,
    },
    /// The kernel refused a step.
    #[error("cannot write {text:?} to {}", path.display())]
    Write {
        /// What.
        text: String,
        /// Where to.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not an address.
    #[error("{0:?} is not a PCI address; they look like 0000:01:00.0")]
    BadAddress(String),
    /// An address without a device.
    #[error("this host has no {kind} {0}; `nacre devices` lists them", kind = .0.kind())]
    NoDevice(Address),
    /// A mediated device has the one driver that made it.
    #[error(
        "{0} is a mediated device: it has no other driver than its own, and pods can be given it \
         as it is"
    )]
    Mediated(Address),
    /// A bridge is the host's.
    #[error("{0} is a bridge: it stays with the host, what is behind it can be passed")]
    Bridge(Address),
    /// DMA of the device could not be confined.
    #[error(
        "{0} is in no IOMMU group: turn the IOMMU on in the firmware (VT-d, AMD-Vi) and, on Intel, \
         with intel_iommu=on on the host's kernel command line"
    )]
    NoIommu(Address),
    /// The driver is not there.
    #[error("the host's kernel has no driver vfio-pci: modprobe vfio-pci")]
    NoVfio,
    /// Somebody needs the device.
    #[error("{address} is in use: {by}")]
    InUse {
        /// Which.
        address: Address,
        /// What by, and how to end that.
        by: String,
    },
    /// Who has which device cannot be told.
    #[error(transparent)]
    Claims(#[from] RunDirError),
    /// The driver asked for did not take the device.
    #[error("vfio-pci did not take {0}; the kernel's log (dmesg) may say why")]
    NotTaken(Address),
    /// The device went back to vfio-pci by itself.
    #[error(
        "{0} is vfio-pci's again: the host gives it that driver itself, look for \"vfio-pci\" and \
         \"ids=\" in /etc/modprobe.d and on the kernel command line"
    )]
    TakenAgain(Address),
    /// A failure, and a second one in undoing what was done by then.
    #[error("{failure}; and {address} is not with its driver {driver} again")]
    NotRestored {
        /// The device.
        address: Address,
        /// What it was with, "none" included.
        driver: String,
        /// What went wrong first.
        failure: Box<DeviceError>,
    },
    /// The group has members that would stay with the host.
    #[error(
        "IOMMU group {group} can only be passed whole, and the host still drives {others}; \
         `nacre devices bind` them too, or ask for a device of another group"
    )]
    IncompleteGroup {
        /// Its number.
        group: u32,
        /// The others and their drivers.
        others: String,
    },
}
