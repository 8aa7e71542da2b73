//! The driver images of a machine ([`crate::devices::drivers`]), and for which of its
//! devices each is.
//!
//! A device's place among those of an image is its number in the image's CDI specs. It
//! keeps that as long as it is there; one that comes takes the first that is free.

use std::path::Path;

use nacre_protocol::agent::Driver;

use crate::devices::DriverImage;

/// See the module.
#[derive(Debug, Default)]
pub struct Images {
    /// Which devices need which.
    rules: Vec<DriverImage>,
    /// Those the machine has as disks.
    disks: Vec<Driver>,
}

impl Images {
    /// The machine's disks are `disks`, chosen by `rules`.
    pub fn new(rules: Vec<DriverImage>, disks: Vec<Driver>) -> Self {
        Self { rules, disks }
    }

    /// Those with these devices among theirs, by the guest's addresses.
    pub fn of(&self, devices: &[String]) -> Vec<Driver> {
        let has = |driver: &&Driver| driver.devices.iter().any(|one| devices.contains(one));
        self.disks.iter().filter(has).cloned().collect()
    }

    /// Those with any devices.
    pub fn in_use(&self) -> Vec<Driver> {
        let has = |driver: &&Driver| !driver.devices.is_empty();
        self.disks.iter().filter(has).cloned().collect()
    }

    /// Which devices need which.
    pub fn rules(&self) -> &[DriverImage] {
        &self.rules
    }

    /// A device that needs the image `path` is in the guest now.
    pub fn came(&mut self, path: &Path, in_guest: String) {
        let path = path.display().to_string();
        if let Some(disk) = self.disks.iter_mut().find(|disk| disk.path == path) {
            match disk.devices.iter_mut().find(|place| place.is_empty()) {
                Some(place) => *place = in_guest,
                None => disk.devices.push(in_guest),
            }
        }
    }

    /// It is gone.
    pub fn went(&mut self, in_guest: &str) {
        let places = self.disks.iter_mut().flat_map(|disk| &mut disk.devices);
        let its = places.filter(|place| place.as_str() == in_guest);
        its.for_each(String::clear);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_come_and_go_and_have_their_numbers() {
        let disk = |name: &str, devices: &[&str]| Driver {
            serial: name.into(),
            path: format!("/images/{name}"),
            devices: devices.iter().map(|&device| device.into()).collect(),
            ..Driver::default()
        };
        let disks = vec![disk("gpu", &[]), disk("nvme", &["a", "b"])];
        let mut images = Images::new(Vec::new(), disks);
        assert!(images.of(&["c".into()]).is_empty());
        assert_eq!(images.in_use(), [disk("nvme", &["a", "b"])]);
        images.came(Path::new("/images/gpu"), "c".into());
        images.came(Path::new("/images/nvme"), "d".into());
        images.came(Path::new("/images/other"), "x".into());
        let both = ["c".to_owned(), "b".into()];
        let now = [disk("gpu", &["c"]), disk("nvme", &["a", "b", "d"])];
        assert_eq!(images.of(&both), now);
        images.went("b");
        images.went("c");
        assert!(images.of(&both).is_empty());
        images.came(Path::new("/images/nvme"), "e".into());
        let all = ["a", "d", "e"].map(str::to_owned);
        assert_eq!(images.of(&all), [disk("nvme", &["a", "e", "d"])]);
    }
}
