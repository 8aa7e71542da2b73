//! virtio-blk disks by serial number.
//!
//! /sys/block/vdX/serial asks the device (virtio 1.2, 5.2.6.1). Disks that are
//! there at boot are found at once; one that was just attached shows up in
//! /dev, which is watched.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::inotify::AddWatchFlags;

use crate::error::{Context, Error, Result};
use crate::uevent::Uevents;
use crate::watch::Watch;

/// How long a disk may take to appear.
const LIMIT: Duration = Duration::from_secs(10);
/// What /sys/block/vdX/size counts in, whatever the disk has.
const SECTOR_BYTES: u64 = 512;

/// A disk or one of its partitions, as a `Storage` source names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRef {
    serial: String,
    partition: Option<u32>,
}

impl DiskRef {
    /// Parses "serial:X" and "serial:X:n"; `None` for any other source.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for an empty serial or a partition below 1.
    pub fn parse(source: &str) -> Result<Option<Self>> {
        let Some(rest) = source.strip_prefix("serial:") else {
            return Ok(None);
        };
        let bad = || Error::InvalidArgument(format!("disk {source:?}"));
        let (serial, partition) = match rest.split_once(':') {
            None => (rest, None),
            Some((serial, number)) => (serial, Some(number.parse().map_err(|_| bad())?)),
        };
        if serial.is_empty() || partition == Some(0) {
            return Err(bad());
        }
        Ok(Some(Self {
            serial: serial.into(),
            partition,
        }))
    }

    /// Looks the disk up, waiting for it if need be.
    ///
    /// # Errors
    ///
    /// `NotFound` if it does not appear in time.
    pub async fn wait(&self) -> Result<PathBuf> {
        let (sys, dev) = (Path::new("/sys/block"), Path::new("/dev"));
        if let Some(path) = self.find(sys, dev).context("look for a disk")? {
            return Ok(path);
        }
        let watch = Watch::new(dev, AddWatchFlags::IN_CREATE).context("watch /dev")?;
        let appear = async {
            loop {
                if let Some(path) = self.find(sys, dev).context("look for a disk")? {
                    return Ok(path);
                }
                watch.changed().await.context("watch /dev")?;
            }
        };
        tokio::time::timeout(LIMIT, appear)
            .await
            .unwrap_or_else(|_| {
                Err(Error::NotFound(format!(
                    "disk with serial {:?}",
                    self.serial
                )))
            })
    }

    fn find(&self, sys: &Path, dev: &Path) -> io::Result<Option<PathBuf>> {
        for entry in fs::read_dir(sys)? {
            let entry = entry?;
            // Disks of other kinds have no such file.
            let Ok(serial) = fs::read_to_string(entry.path().join("serial")) else {
                continue;
            };
            if serial.trim_end_matches(['\n', '\0']) != self.serial {
                continue;
            }
            let disk = entry.file_name().to_string_lossy().into_owned();
            let name = match self.partition {
                None => disk,
                Some(number) => format!("{disk}{number}"),
            };
            return Ok(Some(dev.join(name)).filter(|path| path.exists()));
        }
        Ok(None)
    }
}

/// Waits until the disk with this serial number has a size and sectors of a size: one
/// that was made empty gets its bytes later.
///
/// # Errors
///
/// `NotFound` if there is no such disk, or not in time, else `Io`.
pub async fn wait_for(serial: &str, size_bytes: u64, sector_bytes: u32) -> Result<PathBuf> {
    let path = wait_for_size(serial, size_bytes).await?;
    let has_sectors = |path: &Path| -> Result<bool> {
        let bytes = sector_bytes_of(Path::new("/sys"), path);
        Ok(bytes.context("look at a disk's sectors")? == sector_bytes)
    };
    if has_sectors(&path)? {
        return Ok(path);
    }
    // Of another size its driver takes notice at once, of other sectors only when it
    // takes the device (virtio 1.2, 5.2.5). Nobody has the disk yet.
    let what = format!("have {} taken anew", path.display());
    tokio::task::spawn_blocking(move || rebind(Path::new("/sys"), &path))
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
        .context(what)?;
    let path = wait_for_size(serial, size_bytes).await?;
    if has_sectors(&path)? {
        return Ok(path);
    }
    let text = format!("disk with serial {serial:?} and sectors of {sector_bytes} bytes");
    Err(Error::NotFound(text))
}

/// Has its driver let a virtio-blk disk go and take it again.
fn rebind(sys: &Path, disk: &Path) -> io::Result<()> {
    let device = fs::read_link(block(sys, disk).join("device"))?;
    let name = device.file_name().unwrap_or_default().as_encoded_bytes();
    let driver = sys.join("bus/virtio/drivers/virtio_blk");
    fs::write(driver.join("unbind"), name)?;
    fs::write(driver.join("bind"), name)
}

fn sector_bytes_of(sys: &Path, disk: &Path) -> io::Result<u32> {
    let text = fs::read_to_string(block(sys, disk).join("queue/logical_block_size"))?;
    text.trim().parse().map_err(io::Error::other)
}

fn block(sys: &Path, disk: &Path) -> PathBuf {
    let name = disk.file_name().unwrap_or_default();
    sys.join("block").join(name)
}

/// Waits until the disk with this serial number has a size, of which the kernel tells.
async fn wait_for_size(serial: &str, size_bytes: u64) -> Result<PathBuf> {
    let disk = DiskRef {
        serial: serial.into(),
        partition: None,
    };
    let path = disk.wait().await?;
    let uevents = Uevents::listen().context("listen to the kernel")?;
    let grow = async {
        while size_of(&path).context("look at a disk's size")? != size_bytes {
            uevents.happened().await.context("listen to the kernel")?;
        }
        Ok(())
    };
    tokio::time::timeout(LIMIT, grow)
        .await
        .unwrap_or_else(|_| {
            let text = format!("disk with serial {serial:?} and {size_bytes} bytes");
            Err(Error::NotFound(text))
        })?;
    Ok(path)
}

fn size_of(disk: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(block(Path::new("/sys"), disk).join("size"))?;
    let sectors: u64 = text.trim().parse().map_err(io::Error::other)?;
    Ok(sectors.saturating_mul(SECTOR_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn sources() {
        let parse = |source| DiskRef::parse(source).unwrap();
        assert_eq!(parse("tmpfs"), None);
        let whole = parse("serial:layers").unwrap();
        assert_eq!((whole.serial.as_str(), whole.partition), ("layers", None));
        let part = parse("serial:layers:12").unwrap();
        assert_eq!(part.partition, Some(12));
        for bad in ["serial:", "serial:x:0", "serial:x:y", "serial::1"] {
            assert!(DiskRef::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_disk_is_taken_anew_by_its_device() {
        let sys = tempfile::tempdir().unwrap();
        let disk = sys.path().join("block/vdc");
        fs::create_dir_all(disk.join("queue")).unwrap();
        fs::write(disk.join("queue/logical_block_size"), "4096\n").unwrap();
        symlink("../../../virtio5", disk.join("device")).unwrap();
        let driver = sys.path().join("bus/virtio/drivers/virtio_blk");
        fs::create_dir_all(&driver).unwrap();
        let node = Path::new("/dev/vdc");
        assert_eq!(sector_bytes_of(sys.path(), node).unwrap(), 4096);
        rebind(sys.path(), node).unwrap();
        for step in ["unbind", "bind"] {
            let written = fs::read_to_string(driver.join(step)).unwrap();
            assert_eq!(written, "virtio5", "{step}");
        }
        assert!(rebind(sys.path(), Path::new("/dev/vdd")).is_err());
    }

    #[test]
    fn disks_are_found_by_serial() {
        let (sys, dev) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (disk, serial) in [("vda", "one\n"), ("vdb", "two")] {
            fs::create_dir(sys.path().join(disk)).unwrap();
            fs::write(sys.path().join(disk).join("serial"), serial).unwrap();
        }
        fs::create_dir(sys.path().join("loop0")).unwrap();
        fs::write(dev.path().join("vdb"), "").unwrap();
        fs::write(dev.path().join("vdb2"), "").unwrap();
        let find = |source: &str| {
            let disk = DiskRef::parse(source).unwrap().unwrap();
            disk.find(sys.path(), dev.path()).unwrap()
        };
        assert_eq!(find("serial:two"), Some(dev.path().join("vdb")));
        assert_eq!(find("serial:two:2"), Some(dev.path().join("vdb2")));
        assert_eq!(find("serial:two:3"), None, "partition not there yet");
        assert_eq!(find("serial:one"), None, "node not there yet");
        assert_eq!(find("serial:three"), None);
    }
}
