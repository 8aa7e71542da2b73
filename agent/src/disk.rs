//! virtio-blk disks by serial number.
//!
//! /sys/block/vdX/serial asks the device (virtio 1.2, 5.2.6.1), which may have requests
//! under way for as long as a device of the host takes. So each disk is asked once, by a
//! thread that may wait, and its answer kept: who looks for a disk waits for that one alone.
//! Disks that are there at boot are found at once; one that was just attached shows up in
//! /dev, which is watched. One that was made empty gets its bytes later, of which the
//! kernel tells nobody.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use nix::sys::inotify::AddWatchFlags;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::engine::sys;
use crate::error::{Context, Error, Result};
use crate::watch::Watch;

/// How long a disk may take to appear,
const LIMIT: Duration = Duration::from_secs(10);
/// and how long the file systems of a container that is gone may be in use.
const RELEASE_LIMIT: Duration = Duration::from_secs(3);
/// What /sys/block/vdX/size counts in, whatever the disk has.
const SECTOR_BYTES: u64 = 512;
/// Between two looks at a disk: at first,
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// and at most.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Those of this kernel.
static HERE: LazyLock<Disks> = LazyLock::new(|| Disks::new("/sys", "/dev"));

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

    fn whole(serial: &str) -> Self {
        Self {
            serial: serial.into(),
            partition: None,
        }
    }

    /// Looks the disk up, waiting for it if need be.
    ///
    /// # Errors
    ///
    /// `NotFound` if it does not appear in time.
    pub async fn wait(&self) -> Result<PathBuf> {
        HERE.wait(self).await
    }
}

/// Waits until the disk with this serial number has a size and sectors of a size: one
/// that was made empty gets its bytes later.
///
/// # Errors
///
/// `NotFound` if there is no such disk, or not in time, else `Io`.
pub async fn wait_for(serial: &str, size_bytes: u64, sector_bytes: u32) -> Result<PathBuf> {
    let disk = DiskRef::whole(serial);
    HERE.wait_for(&disk, size_bytes, sector_bytes.into()).await
}

/// The same for a disk whose file systems are to be mounted: the kernel knows its partitions
/// then, and none of what the disk was before.
///
/// # Errors
///
/// Those of [`wait_for`]; `Io` while something of what the disk was before is in use: to
/// mount the disk would be to have that again.
pub async fn wait_for_contents(serial: &str, size_bytes: u64, sector_bytes: u32) -> Result<()> {
    let path = wait_for(serial, size_bytes, sector_bytes).await?;
    let what = format!("look for partitions of {}", path.display());
    unless_busy(LIMIT, move || scan_partitions(&path))
        .await
        .context(what)
}

/// Waits until no file system on these disks is in use.
///
/// # Errors
///
/// `Io` when one still is after some seconds.
pub async fn released(serials: &[String]) -> Result<()> {
    for serial in serials {
        let disk = HERE.find(&DiskRef::whole(serial));
        let Some(path) = disk.context("look for a disk")? else {
            continue;
        };
        let what = format!("have {} for ourselves", path.display());
        unless_busy(RELEASE_LIMIT, move || claim(&path))
            .await
            .context(what)?;
    }
    Ok(())
}

/// Has the kernel forget the partitions it knows of a disk and look for those there are,
/// which it does by itself only when it adds a disk (`disk_scan_partitions` in
/// block/genhd.c).
fn scan_partitions(disk: &Path) -> io::Result<()> {
    sys::scan_partitions(fs::File::open(disk)?)
}

/// Opens a disk as who mounts it does: one at a time can, and none while one of the
/// partitions is mounted (`O_EXCL` of block devices, open(2)).
fn claim(disk: &Path) -> io::Result<()> {
    let mut options = fs::File::options();
    options.read(true).custom_flags(libc::O_EXCL);
    options.open(disk).map(drop)
}

/// Tries again what fails because something is in use. The file systems of a container that
/// is gone may be for a moment yet: by the mounts that one which is just being made has
/// copies of.
async fn unless_busy(
    limit: Duration,
    action: impl Fn() -> io::Result<()> + Clone + Send + 'static,
) -> io::Result<()> {
    let mut looks = Looks::within(limit);
    loop {
        let done = tokio::task::spawn_blocking(action.clone()).await;
        let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
        match done {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && looks.again().await => (),
            done => return done,
        }
    }
}

/// Looks at what the kernel tells nobody of, in time.
struct Looks {
    begin: Instant,
    limit: Duration,
    pause: Duration,
}

impl Looks {
    fn within(limit: Duration) -> Self {
        Self {
            begin: Instant::now(),
            limit,
            pause: FIRST_PAUSE,
        }
    }

    /// Resolves when it is time for the next; to false when there is none.
    async fn again(&mut self) -> bool {
        if self.begin.elapsed() >= self.limit {
            return false;
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        true
    }
}

/// A kernel's disks.
struct Disks {
    /// Where it describes them,
    sys: PathBuf,
    /// and where they are.
    dev: PathBuf,
    serials: watch::Sender<Serials>,
}

/// Serial numbers of disks by `diskseq`, which no two disks have
/// (Documentation/ABI/stable/sysfs-block); none of one that has not answered.
type Serials = HashMap<u64, Option<String>>;

impl Disks {
    fn new(sys: impl Into<PathBuf>, dev: impl Into<PathBuf>) -> Self {
        Self {
            sys: sys.into(),
            dev: dev.into(),
            serials: watch::Sender::default(),
        }
    }

    async fn wait(&self, disk: &DiskRef) -> Result<PathBuf> {
        let mut answers = self.serials.subscribe();
        let nodes = Watch::new(&self.dev, AddWatchFlags::IN_CREATE).context("watch /dev")?;
        let appear = async {
            loop {
                if let Some(path) = self.find(disk).context("look for a disk")? {
                    return Ok(path);
                }
                tokio::select! {
                    node = nodes.changed() => node.context("watch /dev")?,
                    // Fails only without the sender, which `self` holds.
                    _ = answers.changed() => (),
                }
            }
        };
        tokio::time::timeout(LIMIT, appear)
            .await
            .unwrap_or_else(|_| {
                Err(Error::NotFound(format!(
                    "disk with serial {:?}",
                    disk.serial
                )))
            })
    }

    /// The disk, if it is there and has told its number.
    fn find(&self, disk: &DiskRef) -> io::Result<Option<PathBuf>> {
        for entry in fs::read_dir(self.sys.join("block"))? {
            let name = PathBuf::from(entry?.file_name());
            if self.serial(&name).as_ref() != Some(&disk.serial) {
                continue;
            }
            let name = name.display();
            let name = match disk.partition {
                None => name.to_string(),
                Some(number) => format!("{name}{number}"),
            };
            return Ok(Some(self.dev.join(name)).filter(|path| path.exists()));
        }
        Ok(None)
    }

    /// The serial number of the disk with this name. One that was not asked yet is asked.
    fn serial(&self, name: &Path) -> Option<String> {
        let file = self.block(name).join("serial");
        // Disks of other kinds have no such file, nor has one that is just being added.
        if !file.exists() {
            return None;
        }
        let number = self.number(name, "diskseq").ok()?;
        let known = self.serials.borrow().get(&number).cloned();
        known.unwrap_or_else(|| {
            self.ask(number, file);
            None
        })
    }

    fn ask(&self, number: u64, file: PathBuf) {
        self.serials.send_if_modified(|serials| {
            serials.insert(number, None);
            false
        });
        let serials = self.serials.clone();
        tokio::task::spawn_blocking(move || {
            let answer = fs::read_to_string(&file);
            serials.send_if_modified(|serials| match &answer {
                Ok(text) => {
                    let serial = text.trim_end_matches(['\n', '\0']).to_owned();
                    serials.insert(number, Some(serial));
                    true
                }
                Err(error) => {
                    tracing::warn!("read {}: {error}", file.display());
                    serials.remove(&number);
                    false
                }
            });
        });
    }

    async fn wait_for(
        &self,
        disk: &DiskRef,
        size_bytes: u64,
        sector_bytes: u64,
    ) -> Result<PathBuf> {
        let path = self.sized(disk, size_bytes).await?;
        if self.sector_bytes(&path)? == sector_bytes {
            return Ok(path);
        }
        // Of another size its driver takes notice at once, of other sectors only when it
        // takes the device (virtio 1.2, 5.2.5). Nobody has the disk yet.
        let what = format!("have {} taken anew", path.display());
        let block = self.block(&path);
        let driver = self.sys.join("bus/virtio/drivers/virtio_blk");
        tokio::task::spawn_blocking(move || rebind(&driver, &block))
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .context(what)?;
        let path = self.sized(disk, size_bytes).await?;
        if self.sector_bytes(&path)? == sector_bytes {
            return Ok(path);
        }
        let serial = &disk.serial;
        let text = format!("disk with serial {serial:?} and sectors of {sector_bytes} bytes");
        Err(Error::NotFound(text))
    }

    /// The disk, once it has a size. Of one that was 0 the kernel tells nobody
    /// (`set_capacity_and_notify` in block/genhd.c).
    async fn sized(&self, disk: &DiskRef, size_bytes: u64) -> Result<PathBuf> {
        let path = self.wait(disk).await?;
        let mut looks = Looks::within(LIMIT);
        loop {
            let sectors = self
                .number(&path, "size")
                .context("look at a disk's size")?;
            if sectors.saturating_mul(SECTOR_BYTES) == size_bytes {
                return Ok(path);
            }
            if !looks.again().await {
                let text = format!("disk with serial {:?} and {size_bytes} bytes", disk.serial);
                return Err(Error::NotFound(text));
            }
        }
    }

    fn sector_bytes(&self, disk: &Path) -> Result<u64> {
        self.number(disk, "queue/logical_block_size")
            .context("look at a disk's sectors")
    }

    /// A number that the kernel tells of a disk, without asking it.
    fn number(&self, disk: &Path, attribute: &str) -> io::Result<u64> {
        let text = fs::read_to_string(self.block(disk).join(attribute))?;
        text.trim().parse().map_err(io::Error::other)
    }

    /// Where a disk is described.
    fn block(&self, disk: &Path) -> PathBuf {
        let name = disk.file_name().unwrap_or_default();
        self.sys.join("block").join(name)
    }
}

/// Has its driver let a virtio-blk disk go and take it again.
fn rebind(driver: &Path, block: &Path) -> io::Result<()> {
    let device = fs::read_link(block.join("device"))?;
    let name = device.file_name().unwrap_or_default().as_encoded_bytes();
    fs::write(driver.join("unbind"), name)?;
    fs::write(driver.join("bind"), name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::channel;

    use nix::errno::Errno;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use tokio::time::sleep;

    use super::*;

    fn parse(source: &str) -> DiskRef {
        DiskRef::parse(source).unwrap().unwrap()
    }

    #[test]
    fn sources() {
        assert_eq!(DiskRef::parse("tmpfs").unwrap(), None);
        let whole = parse("serial:layers");
        assert_eq!((whole.serial.as_str(), whole.partition), ("layers", None));
        assert_eq!(parse("serial:layers:12").partition, Some(12));
        for bad in ["serial:", "serial:x:0", "serial:x:y", "serial::1"] {
            assert!(DiskRef::parse(bad).is_err(), "{bad}");
        }
    }

    /// A made-up kernel.
    struct Kernel {
        disks: Disks,
        _root: tempfile::TempDir,
    }

    impl Kernel {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let disks = Disks::new(root.path().join("sys"), root.path().join("dev"));
            fs::create_dir_all(disks.sys.join("block")).unwrap();
            fs::create_dir(&disks.dev).unwrap();
            Self { disks, _root: root }
        }

        /// Adds a disk of no bytes.
        fn add(&self, name: &str, number: u64, serial: &str) {
            self.write(name, "diskseq", &format!("{number}\n"));
            self.write(name, "serial", serial);
            self.write(name, "size", "0\n");
            self.node(name);
        }

        fn write(&self, name: &str, attribute: &str, text: &str) {
            let file = self.disks.sys.join("block").join(name).join(attribute);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }

        fn node(&self, name: &str) {
            fs::write(self.disks.dev.join(name), "").unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn disks_are_found_by_serial() {
        let kernel = Kernel::new();
        kernel.add("vda", 1, "one\n");
        kernel.add("vdb", 2, "two");
        kernel.node("vdb2");
        fs::remove_file(kernel.disks.dev.join("vda")).unwrap();
        // Not one of ours.
        kernel.write("loop0", "diskseq", "3");
        let path = |name| kernel.disks.dev.join(name);
        let find = async |source| kernel.disks.wait(&parse(source)).await.ok();
        assert_eq!(find("serial:two").await, Some(path("vdb")));
        assert_eq!(find("serial:two:2").await, Some(path("vdb2")));
        assert_eq!(find("serial:two:3").await, None, "no such partition");
        assert_eq!(find("serial:one").await, None, "no node");
        assert_eq!(find("serial:three").await, None);
        // Another disk with the same name.
        kernel.add("vdb", 4, "three");
        assert_eq!(find("serial:three").await, Some(path("vdb")));
        assert_eq!(find("serial:two").await, None);
    }

    #[tokio::test]
    async fn a_disk_is_found_when_it_comes() {
        let kernel = Kernel::new();
        kernel.add("vda", 1, "one");
        let disk = parse("serial:two");
        let come = async {
            kernel.disks.wait(&parse("serial:one")).await.unwrap();
            kernel.add("vdb", 2, "two");
        };
        let (path, ()) = tokio::join!(kernel.disks.wait(&disk), come);
        assert_eq!(path.unwrap(), kernel.disks.dev.join("vdb"));
    }

    /// Its device of the host hangs, or a request is under way that takes long.
    #[tokio::test]
    async fn a_disk_that_does_not_answer_keeps_nobody_waiting() {
        let kernel = Kernel::new();
        let names = ["vda", "vdb", "vdc"];
        for (number, name) in (1..).zip(names) {
            kernel.add(name, number, name);
        }
        let silent = kernel.disks.sys.join("block/vdb/serial");
        fs::remove_file(&silent).unwrap();
        mkfifo(&silent, Mode::S_IRWXU).unwrap();
        let (found, others) = channel();
        // Answers in the end, so that a test that waits for it fails.
        let device = std::thread::spawn(move || {
            let in_time = others.recv_timeout(LIMIT / 2).is_ok();
            fs::write(silent, "vdb").unwrap();
            in_time
        });
        for _ in 0..2 {
            for name in ["vda", "vdc"] {
                let disk = parse(&format!("serial:{name}"));
                kernel.disks.wait(&disk).await.unwrap();
            }
        }
        assert!(found.send(()).is_ok(), "they waited");
        kernel.disks.wait(&parse("serial:vdb")).await.unwrap();
        // A second reader of it would have found no writer.
        assert!(device.join().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_size_is_seen_of_which_the_kernel_does_not_tell() {
        let kernel = Kernel::new();
        kernel.add("vda", 1, "slot0");
        let disk = parse("serial:slot0");
        let begin = Instant::now();
        let grow = async {
            sleep(Duration::from_secs(3)).await;
            kernel.write("vda", "size", "8\n");
        };
        let (path, ()) = tokio::join!(kernel.disks.sized(&disk, 4096), grow);
        assert_eq!(path.unwrap(), kernel.disks.dev.join("vda"));
        let took = begin.elapsed();
        assert!(took <= Duration::from_secs(3) + LONGEST_PAUSE, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_size_is_looked_for_a_last_time_and_then_given_up() {
        let kernel = Kernel::new();
        kernel.add("vda", 1, "slot0");
        let disk = parse("serial:slot0");
        let begin = Instant::now();
        let error = kernel.disks.sized(&disk, 4096).await.unwrap_err();
        assert!(error.to_string().contains("4096 bytes"), "{error}");
        let took = begin.elapsed();
        assert!((LIMIT..=LIMIT + LONGEST_PAUSE).contains(&took), "{took:?}");

        let grow_last = async {
            sleep(LIMIT).await;
            kernel.write("vda", "size", "8\n");
        };
        let (path, ()) = tokio::join!(kernel.disks.sized(&disk, 4096), grow_last);
        path.unwrap();
    }

    #[tokio::test]
    async fn what_is_in_use_is_tried_again() {
        let tries = Arc::new(AtomicU32::new(0));
        let after = |count: u32, then: Errno| {
            let tries = tries.clone();
            move || match tries.fetch_add(1, Ordering::Relaxed) {
                tried if tried < count => Err(Errno::EBUSY.into()),
                _ => Err(then.into()),
            }
        };
        let error = unless_busy(LIMIT, after(3, Errno::EIO)).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert_eq!(tries.load(Ordering::Relaxed), 4);
        let error = unless_busy(Duration::ZERO, after(9, Errno::EIO));
        assert_eq!(error.await.unwrap_err().raw_os_error(), Some(libc::EBUSY));
    }

    #[test]
    fn what_is_no_disk_has_no_partitions() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = scan_partitions(file.path()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn a_disk_is_taken_anew_by_its_device() {
        let kernel = Kernel::new();
        kernel.write("vdc", "queue/logical_block_size", "4096\n");
        let node = Path::new("/dev/vdc");
        assert_eq!(kernel.disks.sector_bytes(node).unwrap(), 4096);
        let block = kernel.disks.block(node);
        let driver = kernel.disks.sys.join("driver");
        fs::create_dir(&driver).unwrap();
        rebind(&driver, &block).unwrap_err();
        symlink("../../../virtio5", block.join("device")).unwrap();
        rebind(&driver, &block).unwrap();
        for step in ["unbind", "bind"] {
            let written = fs::read_to_string(driver.join(step)).unwrap();
            assert_eq!(written, "virtio5", "{step}");
        }
    }
}
