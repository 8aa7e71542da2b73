//! The monitor: one process, one virtual machine.
//!
//! It holds no privilege and opens nothing by path: the shim hands it every
//! descriptor it needs over the control channel ([`nacre_protocol::channel`]).
//! Plain threads, no async runtime: one thread per vCPU, one per activated
//! device, and the main thread, which listens to the shim.
#![warn(missing_docs)]
#![warn(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless
)]

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod devices;
pub mod jail;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod nmi;
pub mod numa;
pub mod pci;
pub mod power;
pub mod pstore;
pub mod serial;
pub mod stop;
#[cfg(test)]
mod test_kernel;
pub mod vcpu;
pub mod vfio;
pub mod virtio;
pub mod vm;
pub mod worker;
