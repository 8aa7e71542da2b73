//! What a device is called on the host, and to its administrator.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::DeviceError;

/// Devices on a bus, functions of a device (PCI Express base 7.5.1.1.9 and 6.13).
const MAX_DEVICE: u8 = 0x1f;
const MAX_FUNCTION: u8 = 7;
/// How many digits a UUID has between its hyphens (RFC 9562, section 4).
const UUID_PARTS: [usize; 5] = [8, 4, 4, 4, 12];

/// A device's name: the kernel's for it, in sysfs and in its IOMMU group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// Where a PCI function is: `0000:01:00.0`.
    Function {
        /// PCI segment.
        domain: u32,
        /// Bus.
        bus: u8,
        /// Device on it.
        device: u8,
        /// Function of that.
        function: u8,
    },
    /// The UUID of a mediated device, which is on no bus of the hardware's:
    /// `83b8f4f2-509f-382f-3c1e-e6bfe0fa1001`.
    Mediated([u8; 16]),
}

impl Address {
    /// What kind of device has it.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Function { .. } => "PCI device",
            Self::Mediated(_) => "mediated device",
        }
    }
}

impl FromStr for Address {
    type Err = DeviceError;

    /// As the kernel writes it; that of a function without the domain too, as `lspci` does.
    fn from_str(text: &str) -> Result<Self, DeviceError> {
        function(text)
            .or_else(|| uuid(text).map(Self::Mediated))
            .ok_or_else(|| DeviceError::BadAddress(text.to_owned()))
    }
}

fn function(text: &str) -> Option<Address> {
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
    // VMD's domains have more than four digits.
    let domain = digits(domain, 4..=8)?;
    let bus = digits(bus, 2..=2)?.try_into().ok()?;
    let device = digits(device, 2..=2)?.try_into().ok()?;
    let function = digits(function, 1..=1)?.try_into().ok()?;
    (device <= MAX_DEVICE && function <= MAX_FUNCTION).then_some(Address::Function {
        domain,
        bus,
        device,
        function,
    })
}

fn digits(text: &str, count: RangeInclusive<usize>) -> Option<u32> {
    (count.contains(&text.len()) && is_hexadecimal(text))
        .then(|| u32::from_str_radix(text, 16).ok())
        .flatten()
}

fn uuid(text: &str) -> Option<[u8; 16]> {
    let parts: Vec<_> = text.split('-').collect();
    let lengths = parts.iter().map(|part| part.len());
    let is_uuid = lengths.eq(UUID_PARTS) && parts.iter().all(|part| is_hexadecimal(part));
    is_uuid
        .then(|| u128::from_str_radix(&parts.concat(), 16).ok())
        .flatten()
        .map(u128::to_be_bytes)
}

fn is_hexadecimal(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function {
                domain,
                bus,
                device,
                function,
            } => write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}"),
            Self::Mediated(uuid) => {
                let uuid = u128::from_be_bytes(*uuid);
                let [a, b, c, d] = [96, 80, 64, 48].map(|shift| uuid >> shift);
                let [b, c, d] = [b, c, d].map(|part| part & 0xffff);
                let e = uuid & 0xffff_ffff_ffff;
                write!(f, "{a:08x}-{b:04x}-{c:04x}-{d:04x}-{e:012x}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_with_and_without_a_domain() {
        for (text, shown) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("af:1f.7", "0000:af:1f.7"),
            ("10000:E1:00.0", "10000:e1:00.0"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_address() {
        for text in [
            "",
            "0000:01:00",
            "01.0",
            "0000:01:20.0",
            "0000:01:00.8",
            "0000:1:00.0",
            "000:01:00.0",
            "+000:01:00.0",
            "0000:01:00.0/..",
            "0000:00:01:00.0",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa100",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001-",
            "83b8f4f2509f382f3c1ee6bfe0fa1001",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa100g",
            "+3b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
            "83b8f4f25-09f-382f-3c1e-e6bfe0fa1001",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains("is not a PCI address"), "{text}: {error}");
        }
    }

    #[test]
    fn uuids_as_the_kernel_writes_them() {
        let text = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        for written in [text, &text.to_uppercase()] {
            let address: Address = written.parse().unwrap();
            assert_eq!(address.to_string(), text);
            assert_eq!(address.kind(), "mediated device");
        }
        let zeros = "00000000-0000-0001-0000-000000000000";
        let address: Address = zeros.parse().unwrap();
        assert_eq!(address.to_string(), zeros);
        let function: Address = "ff:1f.7".parse().unwrap();
        assert!(function < address, "functions come first in lists");
    }
}
