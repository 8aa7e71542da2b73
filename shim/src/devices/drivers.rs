//! Driver images: which of them a pod's devices need (`[drivers]` in nacre.toml).
//!
//! The host hands an image on and reads nothing of it; what is in it is for the
//! guest (`agent/src/drivers.rs`, docs/driver-images.md).

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::pci::Function;
use super::{Address, DeviceError, System};
use crate::storage::devices::check_size;

/// Digits of an id and of a class in a [`Filter`].
const DIGITS: usize = 4;

/// Which PCI functions are meant, as `lspci -d` takes it: `vendor:device:class`, each of
/// four hexadecimal digits, `x` for any digit, or nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    vendor: String,
    device: String,
    class: String,
}

impl FromStr for Filter {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split(':');
        let (vendor, device) = (part(parts.next())?, part(parts.next())?);
        let class = parts
            .next()
            .map_or(Ok(String::new()), |class| part(Some(class)))?;
        let is_empty = vendor.is_empty() && device.is_empty() && class.is_empty();
        if is_empty || parts.next().is_some() {
            return Err(());
        }
        Ok(Self {
            vendor,
            device,
            class,
        })
    }
}

fn part(text: Option<&str>) -> Result<String, ()> {
    let text = text.ok_or(())?.to_ascii_lowercase();
    let is_digit = |byte: u8| byte.is_ascii_hexdigit() || byte == b'x';
    let is_id = text.len() == DIGITS && text.bytes().all(is_digit);
    (is_id || text.is_empty()).then_some(text).ok_or(())
}

impl Filter {
    /// Whether a function is among those meant. Of its class, base class and sub-class count.
    pub fn matches(&self, function: &Function) -> bool {
        let is = |pattern: &str, number: u32| {
            let digits = format!("{number:04x}");
            let same = |(wanted, digit)| wanted == 'x' || wanted == digit;
            pattern.is_empty() || pattern.chars().zip(digits.chars()).all(same)
        };
        is(&self.vendor, function.vendor)
            && is(&self.device, function.device)
            && is(&self.class, function.class >> 8)
    }
}

/// An entry of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverImage {
    /// What it is for.
    pub filter: Filter,
    /// Its file.
    pub path: PathBuf,
}

/// An image that a pod needs.
#[derive(Debug)]
pub struct OpenImage {
    /// Its file.
    pub path: PathBuf,
    /// The same, for reading.
    pub file: File,
    /// Positions of the devices it is for, among the pod's.
    pub devices: Vec<usize>,
}

/// Errors of images.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// What a device is cannot be told.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// There is no such file, or it cannot be read.
    #[error(
        "driver image {} of {owner}: put it there, or correct [drivers] in nacre.toml",
        path.display()
    )]
    Open {
        /// Which.
        path: PathBuf,
        /// What it is for.
        owner: String,
        /// Why.
        source: io::Error,
    },
    /// A file that no disk can be made of.
    #[error(
        "driver image {} is not as guest-kernel/driver-image makes them: {why}", path.display()
    )]
    NoImage {
        /// Which.
        path: PathBuf,
        /// What it is.
        why: String,
    },
}

/// The image for a device: of the first entry that it matches; one without any has what
/// the guest's kernel has.
///
/// # Errors
///
/// When what the device is cannot be told.
pub fn image_for<'a>(
    images: &'a [DriverImage],
    system: &System,
    device: Address,
) -> Result<Option<&'a Path>, DriverError> {
    let function = system.function(device)?;
    let image = images.iter().find(|image| image.filter.matches(&function));
    Ok(image.map(|image| &*image.path))
}

/// Opens what a pod with these devices needs, and if others may come all there is.
///
/// # Errors
///
/// An image that cannot be had.
pub fn open(
    images: &[DriverImage],
    system: &System,
    devices: &[Address],
    others_may_come: bool,
) -> Result<Vec<OpenImage>, DriverError> {
    let mut opened: Vec<OpenImage> = Vec::new();
    for (position, &address) in devices.iter().enumerate() {
        let Some(path) = image_for(images, system, address)? else {
            continue;
        };
        if let Some(same) = opened.iter_mut().find(|other| other.path == path) {
            same.devices.push(position);
            continue;
        }
        let class = system.function(address)?.class_name();
        let mut image = open_image(path, &format!("PCI device {address} ({class})"))?;
        image.devices.push(position);
        opened.push(image);
    }
    for image in images.iter().filter(|_| others_may_come) {
        if !opened.iter().any(|other| other.path == image.path) {
            opened.push(open_image(
                &image.path,
                "PCI devices that may come (pci_slots)",
            )?);
        }
    }
    Ok(opened)
}

fn open_image(path: &Path, owner: &str) -> Result<OpenImage, DriverError> {
    let file = File::open(path).map_err(|source| DriverError::Open {
        path: path.to_owned(),
        owner: owner.to_owned(),
        source,
    })?;
    check(path, &file)?;
    Ok(OpenImage {
        path: path.to_owned(),
        file,
        devices: Vec::new(),
    })
}

fn check(path: &Path, file: &File) -> Result<(), DriverError> {
    let no_image = |why: String| DriverError::NoImage {
        path: path.to_owned(),
        why,
    };
    let metadata = file
        .metadata()
        .map_err(|error| no_image(error.to_string()))?;
    let bytes = metadata.len();
    if !metadata.is_file() {
        return Err(no_image("it is no file".into()));
    }
    check_size(bytes).map_err(no_image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Tree, address};
    use crate::error::chain;

    const NVME: u32 = 0x01_0802;
    const GPU: u32 = 0x03_0200;
    const AUDIO: u32 = 0x04_0300;

    fn entry(tree: &Tree, filter: &str, name: &str) -> DriverImage {
        DriverImage {
            filter: filter.parse().unwrap(),
            path: tree.path(name),
        }
    }

    fn host() -> Tree {
        let tree = Tree::new();
        for (name, class, vendor, device) in [
            ("0000:01:00.0", NVME, "0x1b36", "0x0010"),
            ("0000:02:00.0", GPU, "0x10de", "0x2330"),
            ("0000:02:00.1", AUDIO, "0x10de", "0x22ba"),
            ("0000:03:00.0", NVME, "0x144d", "0xa808"),
        ] {
            let function = tree.add(name, class);
            function.file("vendor", vendor).file("device", device);
        }
        tree
    }

    const ALL: [&str; 4] = ["01:00.0", "02:00.0", "02:00.1", "03:00.0"];

    #[test]
    fn filters_are_those_of_lspci() {
        let tree = host();
        let matched = |filter: &str| {
            let filter: Filter = filter.parse().unwrap();
            let is_matched = |position: &usize| {
                let function = tree.system().function(address(ALL[*position])).unwrap();
                filter.matches(&function)
            };
            (0..ALL.len()).filter(is_matched).collect::<Vec<_>>()
        };
        assert_eq!(matched("::0108"), [0, 3]);
        assert_eq!(matched("10de:"), [1, 2]);
        assert_eq!(matched("10DE::03xx"), [1]);
        assert_eq!(matched("10de:22ba"), [2]);
        assert_eq!(matched("144d:a808:0108"), [3]);
        assert_eq!(matched("8086:"), [0; 0]);
        for bad in [
            "",
            ":",
            "::",
            "10de",
            "10d:",
            "::0108:00",
            "::010802",
            "nvme:",
        ] {
            assert!(bad.parse::<Filter>().is_err(), "{bad}");
        }
    }

    #[test]
    fn each_device_has_the_first_image_for_it() {
        let tree = host();
        for name in ["nvme", "gpu", "samsung"] {
            tree.write(name, &"-".repeat(512));
        }
        let images = [
            entry(&tree, "144d:", "samsung"),
            entry(&tree, "::0108", "nvme"),
            entry(&tree, "10de::03xx", "gpu"),
            entry(&tree, "::01xx", "never opened"),
        ];
        let opened = open(&images, &tree.system(), &ALL.map(address), false).unwrap();
        let opened: Vec<_> = opened
            .into_iter()
            .map(|image| (image.path, image.devices))
            .collect();
        let at = |name: &str| tree.path(name);
        assert_eq!(
            opened,
            [
                (at("nvme"), vec![0]),
                (at("gpu"), vec![1]),
                (at("samsung"), vec![3])
            ]
        );
        // Two devices, one disk.
        let opened = open(&images[1..], &tree.system(), &ALL.map(address), false).unwrap();
        assert_eq!(opened[0].devices, [0, 3]);
        assert!(
            open(&images, &tree.system(), &[address("02:00.1")], false)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn a_machine_to_which_devices_may_come_has_all_images() {
        let tree = host();
        let images = [entry(&tree, "10de:", "gpu"), entry(&tree, "::0108", "nvme")];
        tree.write("nvme", &"-".repeat(512));
        let open = || open(&images, &tree.system(), &[address("01:00.0")], true);
        let text = chain(&open().unwrap_err());
        let parts = [
            "/gpu of PCI devices that may come (pci_slots)",
            "No such file",
        ];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        tree.write("gpu", &"-".repeat(512));
        let opened = open().unwrap();
        let devices: Vec<_> = opened.iter().map(|image| &*image.devices).collect();
        assert_eq!(devices, [&[0][..], &[]]);
        assert_eq!(opened[1].path, tree.path("gpu"));
    }

    #[test]
    fn an_image_that_cannot_be_used_is_named() {
        let tree = host();
        let told = |name: &str| {
            let images = [entry(&tree, "::0108", name)];
            let error = open(&images, &tree.system(), &[address("01:00.0")], false).unwrap_err();
            let text = chain(&error);
            assert!(
                text.contains(&tree.path(name).display().to_string()),
                "{text}"
            );
            text
        };
        let text = told("gone.erofs");
        for part in [
            "0000:01:00.0 (NVMe)",
            "[drivers] in nacre.toml",
            "No such file",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(told("etc").contains("no file"));
        tree.write("cut", "-----");
        assert!(told("cut").contains("5 bytes"));
        tree.write("empty", "");
        assert!(told("empty").contains("0 bytes"));
    }
}
