//! IOMMU groups: what the hardware cannot tell apart when it does DMA, so that a
//! pod gets all of it or nothing.
//!
//! The kernel opens a group only when no member is driven by the host (Linux
//! Documentation/driver-api/vfio.rst, "Groups, Devices, and IOMMUs"). PCI bridges
//! may keep their driver.

use super::pci::Function;
use super::{Address, DeviceError, System};

/// A driver that takes devices out of use; the kernel takes it for none.
const STUB_DRIVER: &str = "pci-stub";

/// Whether a group can be passed, once the devices `asked` for are with vfio-pci.
///
/// # Errors
///
/// `IncompleteGroup` with the members that the host would still drive.
pub fn check(group: u32, members: &[Function], asked: &[Address]) -> Result<(), DeviceError> {
    let others: Vec<_> = members
        .iter()
        .filter(|member| !asked.contains(&member.address) && is_driven(member))
        .map(|member| format!("{} ({})", member.address, member.driver_name()))
        .collect();
    if others.is_empty() {
        return Ok(());
    }
    Err(DeviceError::IncompleteGroup {
        group,
        others: others.join(", "),
    })
}

/// Whether the host drives it in a way that DMA of others could disturb.
fn is_driven(member: &Function) -> bool {
    let driver = member.driver.as_deref();
    let harmless = member.is_pci_bridge() || member.is_on_vfio();
    !harmless && driver.is_some_and(|driver| driver != STUB_DRIVER)
}

/// The members of a device's group.
///
/// # Errors
///
/// `NoIommu`; what sysfs says that cannot be.
pub fn of(system: &System, function: &Function) -> Result<(u32, Vec<Function>), DeviceError> {
    let group = function
        .group
        .ok_or(DeviceError::NoIommu(function.address))?;
    Ok((group, system.group(group)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Tree, address};

    /// What `check` says of a group of a GPU and one more function.
    fn refusal(class: u32, driver: &str, asked: &[&str]) -> Option<String> {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x03_0200)
            .group(4)
            .driver("vfio-pci");
        let other = tree.add("0000:01:00.1", class);
        other.group(4);
        if !driver.is_empty() {
            other.driver(driver);
        }
        let system = tree.system();
        let gpu = system.function(address("01:00.0")).unwrap();
        let (group, members) = of(&system, &gpu).unwrap();
        let asked: Vec<_> = asked.iter().map(|text| address(text)).collect();
        let checked = check(group, &members, &asked);
        checked.err().map(|error| error.to_string())
    }

    #[test]
    fn the_host_s_members_are_named_with_their_drivers() {
        let refusal = refusal(0x04_0300, "snd_hda_intel", &["01:00.0"]).unwrap();
        assert!(refusal.contains("IOMMU group 4"), "{refusal}");
        assert!(
            refusal.contains("0000:01:00.1 (snd_hda_intel)"),
            "{refusal}"
        );
        assert!(!refusal.contains("01:00.0"), "{refusal}");
    }

    #[test]
    fn members_nobody_drives_may_stay() {
        const AUDIO: u32 = 0x04_0300;
        const PCI_BRIDGE: u32 = 0x06_0400;
        const ISA_BRIDGE: u32 = 0x06_0100;
        let gpu = ["01:00.0"];
        assert_eq!(refusal(AUDIO, "", &gpu), None);
        assert_eq!(refusal(AUDIO, "vfio-pci", &gpu), None);
        assert_eq!(refusal(AUDIO, "pci-stub", &gpu), None);
        assert_eq!(refusal(PCI_BRIDGE, "pcieport", &gpu), None);
        // Only the bridge between buses is of no harm.
        assert!(refusal(ISA_BRIDGE, "lpc_ich", &gpu).is_some());
        assert_eq!(
            refusal(AUDIO, "snd_hda_intel", &["01:00.0", "01:00.1"]),
            None
        );
    }

    #[test]
    fn a_host_without_iommu_has_no_groups() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x03_0200);
        let system = tree.system();
        let gpu = system.function(address("01:00.0")).unwrap();
        let error = of(&system, &gpu).unwrap_err().to_string();
        assert!(error.contains("intel_iommu=on"), "{error}");
    }
}
