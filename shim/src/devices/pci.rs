//! One PCI function, or what a guest takes for one: what it is, and what it needs.

use std::fmt;

use super::{Address, VFIO_DRIVER};

/// PCI-to-PCI bridge (PCI Code and ID Assignment 1.11, section 1.7).
const CLASS_PCI_BRIDGE: u32 = 0x0604;
/// Base class of bridges.
const BASE_CLASS_BRIDGE: u32 = 0x06;
/// A function's base address registers (PCI Express base 7.5.1.2.1).
const BARS: usize = 6;
/// linux/ioport.h
const IORESOURCE_IO: u64 = 0x100;

/// A range of addresses the function answers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Which register, from 0.
    pub index: usize,
    /// Its size in bytes.
    pub size: u64,
    /// Whether in I/O space rather than memory.
    pub is_io: bool,
}

impl fmt::Display for Bar {
    /// `2:128G`, `4:32io`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["", "K", "M", "G", "T", "P"];
        let mut size = self.size;
        let mut unit = 0;
        while size != 0 && size.is_multiple_of(1024) && unit + 1 < UNITS.len() {
            size /= 1024;
            unit += 1;
        }
        let kind = if self.is_io { "io" } else { "" };
        write!(f, "{}:{size}{}{kind}", self.index, UNITS[unit])
    }
}

/// The registers in sysfs's `resource`: a line for each with first and last address and
/// flags; those of the expansion ROM and of virtual functions follow.
pub(super) fn bars(resource: &str) -> Option<Vec<Bar>> {
    let mut bars = Vec::new();
    for (index, line) in resource.lines().take(BARS).enumerate() {
        let mut numbers = line
            .split_whitespace()
            .map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
        let (start, end, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
        if flags != 0 && end > start {
            bars.push(Bar {
                index,
                size: (end - start).checked_add(1)?,
                is_io: flags & IORESOURCE_IO != 0,
            });
        }
    }
    Some(bars)
}

/// What a mediated device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mediated {
    /// The name of the device that it is a part of, an address if that is a PCI function.
    pub parent: String,
    /// What its driver calls such ones, if it does.
    pub kind: Option<String>,
}

/// A PCI function of the host, or a mediated device (`mediated.rs`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Where.
    pub address: Address,
    /// Of a mediated device: what it is.
    pub mediated: Option<Mediated>,
    /// Vendor id.
    pub vendor: u32,
    /// Device id, the vendor's.
    pub device: u32,
    /// Class code: base class, sub-class, programming interface.
    pub class: u32,
    /// The driver that has it.
    pub driver: Option<String>,
    /// The driver it is reserved for.
    pub driver_override: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// Its base address registers.
    pub bars: Vec<Bar>,
    /// The NUMA node it is at, where the host has several.
    pub numa_node: Option<u32>,
    /// How the kernel can reset it, the preferred way first.
    pub reset_methods: Vec<String>,
    /// Of a virtual function: the physical one (SR-IOV).
    pub physical_function: Option<Address>,
    /// Of a physical function: its virtual ones.
    pub virtual_functions: Vec<Address>,
    /// Whether the firmware showed its messages on it.
    pub boot_vga: bool,
    /// Its node below `/dev/vfio/devices`, for iommufd.
    pub vfio_node: Option<String>,
}

impl Function {
    /// Whether it belongs to the host's bus rather than being a device on it.
    pub fn is_bridge(&self) -> bool {
        self.class >> 16 == BASE_CLASS_BRIDGE
    }

    /// Whether it is a PCI bridge: its driver does no DMA of its own, so that the
    /// kernel takes it as a member of a passed group.
    pub fn is_pci_bridge(&self) -> bool {
        self.class >> 8 == CLASS_PCI_BRIDGE
    }

    /// Whether it is ready to be passed: with vfio-pci or a vendor's version of it,
    /// such as `nvgrace-gpu-vfio-pci`. All drivers of mediated devices are for VFIO.
    pub fn is_on_vfio(&self) -> bool {
        if self.mediated.is_some() {
            return self.driver.is_some();
        }
        let name = self.driver.as_deref().unwrap_or_default();
        name.replace('_', "-").ends_with(VFIO_DRIVER)
    }

    /// How large its BARs of memory are together.
    pub fn memory_bytes(&self) -> u64 {
        let memory = self.bars.iter().filter(|bar| !bar.is_io);
        memory.map(|bar| bar.size).fold(0, u64::saturating_add)
    }

    /// Its driver, or "none".
    pub fn driver_name(&self) -> &str {
        self.driver.as_deref().unwrap_or("none")
    }

    /// What kind of device it is (PCI Code and ID Assignment 1.11, section 1).
    pub fn class_name(&self) -> String {
        let name = match (self.class >> 16, (self.class >> 8) & 0xff) {
            (0x01, 0x06) => "SATA",
            (0x01, 0x08) => "NVMe",
            (0x01, _) => "storage",
            (0x02, 0x00) => "Ethernet",
            (0x02, 0x07) => "InfiniBand",
            (0x02, _) => "network",
            (0x03, 0x00) => "GPU (VGA)",
            (0x03, 0x02) => "GPU (3D)",
            (0x03, _) => "GPU (display)",
            (0x04, _) => "audio",
            (0x05, 0x02) => "CXL memory",
            (0x05, _) => "memory",
            (0x06, 0x00) => "host bridge",
            (0x06, 0x01) => "ISA bridge",
            (0x06, 0x04) => "PCI bridge",
            (0x06, _) => "bridge",
            (0x0b, _) => "co-processor",
            (0x0c, 0x03) => "USB",
            (0x10, _) => "encryption",
            (0x12, _) => "accelerator",
            _ => return format!("{:06x}", self.class),
        };
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_by_the_kernel_s_lines() {
        let none = "0x0000000000000000 0x0000000000000000 0x0000000000000000";
        let resource = [
            "0x00000000febd0000 0x00000000febd3fff 0x0000000000140204",
            none,
            "0x0000200000000000 0x0000201fffffffff 0x000000000014220c",
            none,
            "0x000000000000c040 0x000000000000c05f 0x0000000000040101",
            none,
            // The expansion ROM.
            "0x00000000feb00000 0x00000000feb7ffff 0x0000000000046200",
        ];
        let shown: Vec<_> = bars(&resource.join("\n")).unwrap();
        let shown: Vec<_> = shown.iter().map(Bar::to_string).collect();
        assert_eq!(shown, ["0:16K", "2:128G", "4:32io"]);
        assert_eq!(bars("0x1 0x2"), None);
        assert_eq!(bars("0x0 0xffffffffffffffff 0x200"), None);
    }
}
