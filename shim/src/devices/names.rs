//! Names of devices by their ids, where the host has the list of them
//! (pci-ids.ucw.cz; packages `pci.ids`, `hwdata`).
//!
//! ```text
//! 10de  NVIDIA Corporation
//! <tab>2330  GH100 [H100 SXM5 80GB]
//! <tab><tab>10de 16c1  a board with it
//! ```

use std::fs;

use super::{Function, System};

/// The list; empty where the host has none.
#[derive(Debug)]
pub struct Names(String);

impl Names {
    /// Reads the host's list.
    pub fn load(system: &System) -> Self {
        let mut lists = system.names.iter().filter_map(|path| fs::read(path).ok());
        let list = lists.next().unwrap_or_default();
        Self(String::from_utf8_lossy(&list).into_owned())
    }

    /// The vendor's name and the device's, as far as they are known; of a mediated device what
    /// its driver calls it.
    pub fn of(&self, function: &Function) -> Option<String> {
        if let Some(mediated) = &function.mediated {
            return mediated.kind.clone();
        }
        let vendor_id = format!("{:04x}", function.vendor);
        let device_id = format!("{:04x}", function.device);
        let mut lines = self.0.lines();
        let vendor = lines.find_map(|line| after(line, &vendor_id))?;
        let device = lines
            .take_while(|line| line.starts_with(['\t', '#']))
            .find_map(|line| after(line.strip_prefix('\t')?, &device_id));
        Some(match device {
            Some(device) => format!("{vendor} {device}"),
            None => vendor.to_owned(),
        })
    }
}

/// The name on a line that starts with an id.
fn after<'a>(line: &'a str, id: &str) -> Option<&'a str> {
    line.strip_prefix(id)?.strip_prefix("  ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Tree, address};

    const LIST: &str = "# a comment\n8086  Intel Corporation\n\t2330  Wrong\n10de  NVIDIA Corporation\n\t10de  A device\n\
                        \t2330  GH100\n\t\t10de 16c1  H100\n10df  Emulex\n\t0001  Other\n";

    fn name(device: &str) -> Option<String> {
        let tree = Tree::new();
        tree.write("usr/share/misc/pci.ids", LIST);
        let made = tree.add("0000:01:00.0", 0x03_0200);
        made.file("vendor", "0x10de\n").file("device", device);
        let system = tree.system();
        let function = system.function(address("01:00.0")).unwrap();
        Names::load(&system).of(&function)
    }

    #[test]
    fn the_vendor_s_own_device() {
        assert_eq!(
            name("0x2330\n").as_deref(),
            Some("NVIDIA Corporation GH100")
        );
        assert_eq!(
            name("0x10de\n").as_deref(),
            Some("NVIDIA Corporation A device")
        );
    }

    #[test]
    fn a_device_newer_than_the_list() {
        assert_eq!(name("0x0001\n").as_deref(), Some("NVIDIA Corporation"));
    }

    #[test]
    fn a_host_without_the_list() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x03_0200);
        let system = tree.system();
        let function = system.function(address("01:00.0")).unwrap();
        assert_eq!(Names::load(&system).of(&function), None);
    }
}
