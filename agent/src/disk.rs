//! virtio-blk disks by serial number.
//!
//! /sys/block/vdX/serial asks the device (virtio 1.2, 5.2.6.1). Disks that are
//! there at boot are found at once; one that was just attached shows up in
//! /dev, which is watched. One that was made empty gets its bytes later, of which the
//! kernel tells nobody.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::inotify::AddWatchFlags;

use crate::error::{Context, Error, Result};
use crate::uevent::Uevents;
use crate::watch::Watch;

/// Where the kernel describes the disks,
const SYS: &str = "/sys/block";
/// and where they are.
const DEV: &str = "/dev";
/// How long a disk may take to appear.
const LIMIT: Duration = Duration::from_secs(10);
/// What /sys/block/vdX/size counts in, whatever the disk has.
const SECTOR_BYTES: u64 = 512;
/// Between two looks at a disk's size: at first,
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// and at most.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

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
        self.wait_in(Path::new(SYS), Path::new(DEV)).await
    }

    async fn wait_in(&self, sys: &Path, dev: &Path) -> Result<PathBuf> {
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

/// Waits until the disk with this serial number has a size.
async fn wait_for_size(serial: &str, size_bytes: u64) -> Result<PathBuf> {
    let uevents = &Uevents::listen().context("listen to the kernel")?;
    let disk = DiskRef {
        serial: serial.into(),
        partition: None,
    };
    let (sys, dev) = (Path::new(SYS), Path::new(DEV));
    sized(&disk, size_bytes, (sys, dev), || uevents.happened()).await
}

/// The disk, once it has a size. `happened` returns when the kernel has told of
/// something. Of a size that was 0 or becomes 0 it does not tell
/// (`set_capacity_and_notify` in block/genhd.c), so that is looked for without a word.
async fn sized<F>(
    disk: &DiskRef,
    size_bytes: u64,
    (sys, dev): (&Path, &Path),
    happened: impl Fn() -> F,
) -> Result<PathBuf>
where
    F: Future<Output = io::Result<()>>,
{
    let path = disk.wait_in(sys, dev).await?;
    let is_sized = || -> Result<bool> {
        Ok(size_of(&path, sys).context("look at a disk's size")? == size_bytes)
    };
    let grow = async {
        let mut pause = FIRST_PAUSE;
        while !is_sized()? {
            if let Ok(told) = tokio::time::timeout(pause, happened()).await {
                told.context("listen to the kernel")?;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(true)
    };
    let in_time = tokio::time::timeout(LIMIT, grow).await;
    if in_time.unwrap_or_else(|_| is_sized())? {
        return Ok(path);
    }
    let text = format!("disk with serial {:?} and {size_bytes} bytes", disk.serial);
    Err(Error::NotFound(text))
}

fn size_of(disk: &Path, sys: &Path) -> io::Result<u64> {
    let name = disk.file_name().unwrap_or_default();
    let text = fs::read_to_string(sys.join(name).join("size"))?;
    let sectors: u64 = text.trim().parse().map_err(io::Error::other)?;
    Ok(sectors.saturating_mul(SECTOR_BYTES))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::unix::fs::symlink;

    use tokio::time::{Instant, sleep};

    use super::*;

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

    /// A machine with one disk, "slot0", that is empty.
    struct EmptyDisk {
        sys: tempfile::TempDir,
        dev: tempfile::TempDir,
        begin: Instant,
    }

    impl EmptyDisk {
        fn new() -> Self {
            let (sys, dev) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            fs::create_dir(sys.path().join("vda")).unwrap();
            fs::write(sys.path().join("vda/serial"), "slot0").unwrap();
            fs::write(dev.path().join("vda"), "").unwrap();
            let begin = Instant::now();
            let disk = Self { sys, dev, begin };
            disk.has_sectors(0);
            disk
        }

        fn has_sectors(&self, sectors: u32) {
            fs::write(self.sys.path().join("vda/size"), format!("{sectors}\n")).unwrap();
        }

        /// Waits for 8 sectors.
        async fn sized<F>(&self, happened: impl Fn() -> F) -> Result<PathBuf>
        where
            F: Future<Output = io::Result<()>>,
        {
            let disk = DiskRef::parse("serial:slot0").unwrap().unwrap();
            let places = (self.sys.path(), self.dev.path());
            sized(&disk, 4096, places, happened).await
        }
    }

    /// As when a disk's size was 0 or becomes 0.
    async fn nothing() -> io::Result<()> {
        std::future::pending().await
    }

    #[tokio::test(start_paused = true)]
    async fn a_size_is_seen_of_which_the_kernel_does_not_tell() {
        let disk = EmptyDisk::new();
        let grow = async {
            sleep(Duration::from_secs(3)).await;
            disk.has_sectors(8);
        };
        let (path, ()) = tokio::join!(disk.sized(nothing), grow);
        assert_eq!(path.unwrap(), disk.dev.path().join("vda"));
        let took = disk.begin.elapsed();
        assert!(took <= Duration::from_secs(3) + LONGEST_PAUSE, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_size_is_looked_for_a_last_time_and_then_given_up() {
        let disk = EmptyDisk::new();
        let looks = Cell::new(0);
        let count = || {
            looks.set(looks.get() + 1);
            nothing()
        };
        let error = disk.sized(count).await.unwrap_err();
        assert!(error.to_string().contains("4096 bytes"), "{error}");
        assert_eq!(disk.begin.elapsed(), LIMIT);
        assert!((50..150).contains(&looks.get()), "{} looks", looks.get());

        let disk = EmptyDisk::new();
        let grow_last = || {
            // The last pause ends after the limit.
            if disk.begin.elapsed() + LONGEST_PAUSE > LIMIT {
                disk.has_sectors(8);
            }
            nothing()
        };
        disk.sized(grow_last).await.unwrap();
        assert_eq!(disk.begin.elapsed(), LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_size_is_looked_for_when_the_kernel_tells_of_something() {
        let disk = EmptyDisk::new();
        let told = async || {
            disk.has_sectors(8);
            Ok(())
        };
        disk.sized(told).await.unwrap();
        assert_eq!(disk.begin.elapsed(), Duration::ZERO);
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
