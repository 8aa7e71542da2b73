//! A machine without a VM: an agent behind a socket pair.
//!
//! Two agents fit in. [`FakeHost::scripted`] is a small one in this process that
//! runs commands as plain host processes: it needs no privilege, and tests make
//! it misbehave. [`FakeHost::real`] is `nacre-agent serve`, if it was built.

use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use nacre_protocol::channel::FdList;
use nacre_protocol::guest::STREAM_PORT;
use nacre_protocol::vm::StopReason;
use nacre_vmm::vfio::Passthrough;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};

use super::{Machine, MachineError, Stop};
use crate::network::HostNic;
use crate::storage::HostBacking;
use crate::task::lock;

mod host;
mod scripted;

pub use host::{FakeHost, SANDBOX_ID};

/// The slot of bus 0 that cards are put in.
const FREE_SLOT: u8 = 20;

/// What happened, in order.
pub type Journal = Arc<Mutex<Vec<String>>>;

/// Where a fake machine's agent takes streams.
enum Streams {
    Scripted(Arc<scripted::Agent>),
    Real(PathBuf),
}

/// See the module.
pub struct FakeMachine {
    rpc: Mutex<Option<UnixStream>>,
    streams: Streams,
    stopped: watch::Sender<Option<Stop>>,
    child: Mutex<Option<Child>>,
    /// The most memory the guest takes beyond what it booted with.
    takes_mib: AtomicU32,
    /// And the least it keeps.
    keeps_mib: AtomicU32,
    /// What becomes of exchanges of disks.
    disks: watch::Sender<Disks>,
    /// Why it takes no devices, and leaves those it has.
    keeps_devices: Mutex<Option<fn() -> MachineError>>,
    /// Whether it never says what becomes of them, and who is told that it was asked.
    devices_hang: AtomicBool,
    devices_asked: Notify,
    /// Whether it has no room for network cards, nor for a shared directory.
    is_full: AtomicBool,
    /// Whether a guest that hangs still panics when it is interrupted.
    panics: AtomicBool,
    journal: Journal,
}

/// What a fake machine does when it is to exchange a disk's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disks {
    /// Do so.
    Exchange,
    /// Refuse files.
    Refuse,
    /// Say that it takes too long.
    Busy,
    /// Nothing, until told otherwise.
    Wait,
}

#[async_trait]
impl Machine for FakeMachine {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    async fn connect(&self, port: u32) -> Result<UnixStream, MachineError> {
        assert_eq!(port, STREAM_PORT);
        match &self.streams {
            Streams::Scripted(agent) => agent.stream().map_err(MachineError::io("fake stream")),
            Streams::Real(path) => UnixStream::connect(path)
                .await
                .map_err(MachineError::io("fake stream")),
        }
    }

    async fn agent(&self) -> Result<UnixStream, MachineError> {
        let stream = lock(&self.rpc).take();
        match stream {
            Some(stream) => Ok(stream),
            None => Err(MachineError::Stopped(self.stopped().await)),
        }
    }

    async fn resize(&self, growth_mib: u32) -> Result<u32, MachineError> {
        lock(&self.journal).push(format!("machine +{growth_mib}"));
        let taken = growth_mib.min(self.takes_mib.load(Ordering::Relaxed));
        Ok(taken.max(self.keeps_mib.load(Ordering::Relaxed)))
    }

    async fn exchange(
        &self,
        serial: &str,
        backing: Option<&HostBacking>,
        read_only: bool,
    ) -> Result<u64, MachineError> {
        let what = match (backing, read_only) {
            (None, _) => "empty".to_owned(),
            (Some(HostBacking::Partitions(files)), true) => format!("{} layers", files.len()),
            (Some(_), true) => "read-only".to_owned(),
            (Some(_), false) => "writable".to_owned(),
        };
        lock(&self.journal).push(format!("{serial} {what}"));
        let mut disks = self.disks.subscribe();
        let disks = *disks.wait_for(|disks| *disks != Disks::Wait).await.unwrap();
        let serial = serial.to_owned();
        match disks {
            Disks::Refuse if backing.is_some() => {
                let reason = "not this one".into();
                return Err(MachineError::Disk { serial, reason });
            }
            Disks::Busy => return Err(MachineError::DiskBusy { serial, seconds: 0 }),
            Disks::Exchange | Disks::Refuse | Disks::Wait => (),
        }
        let files = match backing {
            None => &[],
            Some(HostBacking::Whole(file)) => std::slice::from_ref(file),
            Some(HostBacking::Partitions(files)) => files.as_slice(),
        };
        let sizes = files.iter().map(|mut file| file.seek(SeekFrom::End(0)));
        let size = sizes.sum::<std::io::Result<u64>>();
        size.map_err(MachineError::io("look at a disk's file"))
    }

    async fn plug(&self, slots: &[u8], devices: &Passthrough) -> Result<(), MachineError> {
        self.may_change_devices().await?;
        let described = devices.describe(&mut FdList::default());
        for (slot, device) in slots.iter().zip(described.devices) {
            lock(&self.journal).push(format!("plug {slot} {}", device.address));
        }
        Ok(())
    }

    async fn unplug(&self, slots: &[u8]) -> Result<(), MachineError> {
        self.may_change_devices().await?;
        lock(&self.journal).push(format!("unplug {slots:?}"));
        Ok(())
    }

    async fn add_nic(&self, nic: &HostNic) -> Result<u8, MachineError> {
        if self.is_full.load(Ordering::Relaxed) {
            lock(&self.journal).push("no room for a card".into());
            return Err(MachineError::Nic("no room".into()));
        }
        let mac = nic.mac.map(|byte| format!("{byte:02x}")).join(":");
        lock(&self.journal).push(format!("card {mac}, mtu {}, in {FREE_SLOT}", nic.mtu));
        Ok(FREE_SLOT)
    }

    async fn remove_nic(&self, slot: u8, is_let_go: bool) -> Result<(), MachineError> {
        let how = if is_let_go { "" } else { ", by force" };
        lock(&self.journal).push(format!("no card in {slot}{how}"));
        Ok(())
    }

    async fn add_shared_dir(&self, _: &StdUnixStream) -> Result<u8, MachineError> {
        if self.is_full.load(Ordering::Relaxed) {
            return Err(MachineError::SharedDir("no room".into()));
        }
        lock(&self.journal).push(format!("shared directory in {FREE_SLOT}"));
        Ok(FREE_SLOT)
    }

    async fn interrupt(&self) -> Result<(), MachineError> {
        lock(&self.journal).push("interrupt".into());
        if self.panics.load(Ordering::Relaxed) {
            self.end(Stop::Guest(StopReason::Panic));
        }
        Ok(())
    }

    async fn stopped(&self) -> Stop {
        let mut stopped = self.stopped.subscribe();
        let stop = stopped.wait_for(Option::is_some).await.unwrap();
        stop.clone().unwrap()
    }

    fn kill(&self) {
        if let Some(mut child) = lock(&self.child).take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        if let Streams::Scripted(agent) = &self.streams {
            agent.die();
        }
        self.end(Stop::Died);
    }
}

impl FakeMachine {
    fn new(rpc: UnixStream, streams: Streams, child: Option<Child>, journal: Journal) -> Self {
        Self {
            rpc: Mutex::new(Some(rpc)),
            streams,
            stopped: watch::Sender::new(None),
            child: Mutex::new(child),
            takes_mib: AtomicU32::new(u32::MAX),
            keeps_mib: AtomicU32::new(0),
            disks: watch::Sender::new(Disks::Exchange),
            keeps_devices: Mutex::default(),
            devices_hang: AtomicBool::new(false),
            devices_asked: Notify::new(),
            is_full: AtomicBool::new(false),
            panics: AtomicBool::new(false),
            journal,
        }
    }

    /// From now on the guest brings at most so many vCPUs online, and keeps at least so
    /// many.
    pub fn uses_vcpus(&self, range: std::ops::RangeInclusive<u32>) {
        if let Streams::Scripted(agent) = &self.streams {
            *lock(&agent.vcpus) = Some(range);
        }
    }

    /// From now on it does not say how many it uses.
    pub fn tells_no_vcpus(&self) {
        self.uses_vcpus(std::ops::RangeInclusive::new(1, 0));
    }

    /// From now on the guest takes at most this much memory beyond its boot's.
    pub fn takes(&self, growth_mib: u32) {
        self.takes_mib.store(growth_mib, Ordering::Relaxed);
    }

    /// From now on the guest keeps at least this much.
    pub fn keeps(&self, growth_mib: u32) {
        self.keeps_mib.store(growth_mib, Ordering::Relaxed);
    }

    /// From now on it keeps the devices it has and takes no others, or does so again.
    pub fn keeps_devices(&self, why: Option<fn() -> MachineError>) {
        *lock(&self.keeps_devices) = why;
    }

    /// From now on it never says what becomes of devices; resolves when it has been asked.
    pub async fn hang_devices(&self) {
        self.devices_hang.store(true, Ordering::Relaxed);
        self.devices_asked.notified().await;
    }

    async fn may_change_devices(&self) -> Result<(), MachineError> {
        if self.devices_hang.load(Ordering::Relaxed) {
            self.devices_asked.notify_one();
            std::future::pending::<()>().await;
        }
        match *lock(&self.keeps_devices) {
            Some(why) => Err(why()),
            None => Ok(()),
        }
    }

    /// From now on, and for exchanges that wait, this becomes of them.
    pub fn disks(&self, disks: Disks) {
        self.disks.send_replace(disks);
    }

    /// Whether it takes no network cards and no shared directory from now on.
    pub fn refuses_cards(&self, is_full: bool) {
        self.is_full.store(is_full, Ordering::Relaxed);
    }

    /// The guest does not do all it is told of the network and of what is shared, so many times
    /// from now on.
    pub fn refuses_network(&self, times: u32) {
        if let Streams::Scripted(agent) = &self.streams {
            agent.refusals.store(times, Ordering::Relaxed);
        }
    }

    /// From now on the guest lets go of none.
    pub fn keeps_cards(&self) {
        if let Streams::Scripted(agent) = &self.streams {
            agent.keeps_cards.store(true, Ordering::Relaxed);
        }
    }

    /// From now on the guest freezes no container and thaws none.
    pub fn keeps_phases(&self) {
        if let Streams::Scripted(agent) = &self.streams {
            agent.keeps_phases.store(true, Ordering::Relaxed);
        }
    }

    /// Resolves when the guest has answered `count` pings.
    pub async fn answers(&self, count: u32) {
        let Streams::Scripted(agent) = &self.streams else {
            return std::future::pending().await;
        };
        let mut pings = agent.pings.subscribe();
        pings.wait_for(|pings| *pings >= count).await.unwrap();
    }

    /// Puts the guest's clock ahead of the host's by `ns`; returns once it was
    /// brought back to within a second.
    pub async fn clock_is_corrected_by(&self, ns: i64) {
        let Streams::Scripted(agent) = &self.streams else {
            return std::future::pending().await;
        };
        agent.clock_ahead_ns.send_replace(ns);
        let mut ahead = agent.clock_ahead_ns.subscribe();
        let right = |ns: &i64| ns.unsigned_abs() < 1_000_000_000;
        ahead.wait_for(right).await.unwrap();
    }

    /// From now on the guest says that its kernel has killed in this container for want of
    /// memory, and with exits that it has so in theirs.
    pub fn lacks_memory(&self, container_id: &str) {
        if let Streams::Scripted(agent) = &self.streams {
            agent.lacks_memory.send_replace(Some(container_id.into()));
        }
    }

    /// From now on the guest answers nothing that is asked of what runs.
    pub fn hang(&self) {
        if let Streams::Scripted(agent) = &self.streams {
            agent.hung.send_replace(true);
        }
    }

    /// From now on its kernel panics when it is interrupted.
    pub fn panics(&self) {
        self.panics.store(true, Ordering::Relaxed);
    }

    /// From now on it deletes nothing, and does not say so.
    pub fn hang_deletes(&self) {
        if let Streams::Scripted(agent) = &self.streams {
            agent.deletes_hang.send_replace(true);
        }
    }

    /// Resolves when a container's process has ended and all its output was sent.
    pub async fn ended(&self, container_id: &str) {
        match &self.streams {
            Streams::Scripted(agent) => agent.ended(container_id).await,
            Streams::Real(_) => std::future::pending().await,
        }
    }

    /// Resolves when a guest that hangs has been asked `calls` times.
    pub async fn held(&self, calls: u32) {
        let Streams::Scripted(agent) = &self.streams else {
            return std::future::pending().await;
        };
        let mut held = agent.held.subscribe();
        held.wait_for(|held| *held >= calls).await.unwrap();
    }

    /// It answers again.
    pub fn recover(&self) {
        if let Streams::Scripted(agent) = &self.streams {
            agent.hung.send_replace(false);
        }
    }

    /// The guest ends as `stop`; whether it still ran.
    pub fn end(&self, stop: Stop) -> bool {
        self.stopped.send_if_modified(|stopped| {
            let ran = stopped.is_none();
            stopped.get_or_insert(stop);
            ran
        })
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.kill();
    }
}

fn scripted_machine(journal: Journal) -> FakeMachine {
    let (near, far) = UnixStream::pair().unwrap();
    let streams = Streams::Scripted(scripted::serve(far, journal.clone()));
    FakeMachine::new(near, streams, None, journal)
}

fn real_machine(exe: &Path, root: &Path) -> FakeMachine {
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let path = root.join("streams.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let far = inheritable(far.into());
    let listener = inheritable(listener.into());
    let child = Command::new(exe)
        .arg("serve")
        .args(["--rpc-fd", &far.as_raw_fd().to_string()])
        .args(["--streams-fd", &listener.as_raw_fd().to_string()])
        .arg("--root")
        .arg(root.join("agent"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    near.set_nonblocking(true).unwrap();
    let near = UnixStream::from_std(near).unwrap();
    FakeMachine::new(near, Streams::Real(path), Some(child), Journal::default())
}

fn inheritable(fd: OwnedFd) -> OwnedFd {
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    fd
}
