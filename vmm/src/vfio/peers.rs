//! Transfers from one device of a pod to another: registers and memory of each are
//! put into the address space of their DMA, at the addresses the guest has them at.
//!
//! Only if it is wanted (`pci_peers`), and only with two devices or more: mapping takes time, and the
//! host's root complex has to pass on what one device sends to another, which not all do. It is done
//! once, for what is there before the guest runs: a BAR that the guest moves is still
//! reached where it was, whatever the guest has put there since. A device that comes later is in the same address space:
//! it reaches the BARs of the others, and they do not reach its.
//!
//! What is mapped stays so. While the kernel resets one of them, or it has failed, the others' transfers to it
//! end in errors of the bus: so the guest cannot begin a reset ([`super::capabilities`]), and all are
//! quiet before one is reset at the end.

use super::VfioError;
use super::container::{self, AddressSpace, Mapped};
use super::sys::DmaRange;
use crate::layout::MIB;

/// What of a device's BARs others can reach.
#[derive(Debug)]
pub struct Reachable {
    /// The device's address on the host.
    pub address: String,
    /// The parts that are mapped.
    pub ranges: Vec<DmaRange>,
}

/// Maps the BARs of all of `devices`, if there are others for each.
///
/// # Errors
///
/// The kernel's, with the device it is about.
pub fn map(space: &AddressSpace, devices: &[Reachable]) -> Result<Mapped, VfioError> {
    map_each(devices, |range| space.map_range(range))
}

fn map_each(
    devices: &[Reachable],
    mut map: impl FnMut(DmaRange) -> std::io::Result<()>,
) -> Result<Mapped, VfioError> {
    let mut mapped = Mapped::default();
    if devices.len() < 2 {
        return Ok(mapped);
    }
    for Reachable { address, ranges } in devices {
        for range in ranges {
            map(*range).map_err(|source| VfioError::Peer {
                address: address.clone(),
                mib: range.len.div_ceil(MIB),
                iova: range.iova,
                hint: container::hint(&source),
                source,
            })?;
            mapped.calls += 1;
            mapped.bytes += range.len;
        }
    }
    Ok(mapped)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn device(address: &str, iova: u64, len: u64) -> Reachable {
        let range = DmaRange { iova, len, host: 0 };
        Reachable {
            address: address.into(),
            ranges: vec![range],
        }
    }

    #[test]
    fn a_device_alone_is_mapped_for_nobody() {
        let alone = [device("0000:01:00.0", 0xc010_0000, 0x4000)];
        let mapped = map_each(&alone, |_| Err(io::ErrorKind::InvalidInput.into()));
        assert_eq!(mapped.unwrap(), Mapped::default());
    }

    #[test]
    fn devices_are_mapped_where_the_guest_has_them_and_counted() {
        let devices = [
            device("0000:01:00.0", 0xc010_0000, 0x4000),
            device("0000:02:00.0", 64 << 30, 16 << 30),
        ];
        let mut ranges = Vec::new();
        let mapped = map_each(&devices, |range| {
            ranges.push(range);
            Ok(())
        });
        let expected = Mapped {
            calls: 2,
            bytes: 0x4000 + (16 << 30),
        };
        assert_eq!(mapped.unwrap(), expected);
        assert_eq!(ranges, [devices[0].ranges[0], devices[1].ranges[0]]);
        let error = map_each(&devices, |range| match range.len {
            0x4000 => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        });
        let text = error.unwrap_err().to_string();
        let start = "PCI device 0000:02:00.0: mapping 16384 MiB of its BARs at 0x1000000000 for the \
                     pod's other devices, as pci_peers in nacre.toml asks: Invalid argument";
        assert!(text.starts_with(start), "{text}");
        assert!(text.contains("IOMMU may reserve addresses"), "{text}");
    }
}
