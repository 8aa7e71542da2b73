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
use std::time::Duration;

use async_trait::async_trait;
use nacre_protocol::agent::{ConfigureSandboxRequest, Driver};
use nacre_protocol::channel::FdList;
use nacre_protocol::guest::STREAM_PORT;
use nacre_vmm::vfio::Passthrough;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};

use super::{Machine, MachineError, Stop};
use crate::cgroup::Limits;
use crate::devices::{AssignedDevice, DriverImage, System, request};
use crate::hooks::Runner;
use crate::network::HostNic;
use crate::rundir::{RunDir, State};
use crate::sandbox::{
    ContainerConfig, DiskSlots, HotPlug, Images, MemorySize, Room, Sandbox, SandboxError,
    SlotCounts, VcpuCount,
};
use crate::storage::{self, HostBacking, Prepared, StorageError};
use crate::task::lock;

mod scripted;

const BOOT_TIMEOUT: Duration = Duration::from_secs(10);
/// The slot of bus 0 that cards are put in.
const FREE_SLOT: u8 = 20;
const ROOM: Room = Room {
    memory: MemorySize {
        boot_mib: 256,
        growth_mib: 1024,
        is_pinned: false,
    },
    vcpus: VcpuCount { boot: 1, max: 4 },
    disks: SlotCounts {
        volumes: 2,
        roots: 2,
    },
};

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

/// Id of each pod on such a host.
pub const SANDBOX_ID: &str = "fake-5a5a";

/// Makes fake machines in place of `VmHost`.
pub struct FakeHost {
    /// The machine it made, for tests to shoot.
    pub machine: Arc<Mutex<Option<Arc<FakeMachine>>>>,
    /// Whether machines boot with their creation or with the start.
    pub knows_network: bool,
    /// Whether its machines' guests hang from the start.
    pub hangs: bool,
    /// How long they may; zero: as long as they like.
    pub hang_timeout: Duration,
    /// A console's shell.
    pub debug_shell: Option<PathBuf>,
    /// What was resized and limited, in order.
    pub journal: Journal,
    /// What runs the containers' hooks.
    pub hooks: Runner,
    /// Where the host's devices are.
    pub system: System,
    /// Those that its machine has.
    devices: Mutex<Vec<AssignedDevice>>,
    /// Driver images that its machine has as disks.
    pub drivers: Vec<DriverImage>,
    /// Empty slots of its machine,
    pub pci_slots: u8,
    /// what is in them,
    pub hot_plug: HotPlug,
    /// and where devices are claimed.
    pub run_dir: RunDir,
    /// The agent's executable; the scripted one if `None`.
    agent_exe: Option<PathBuf>,
    root: tempfile::TempDir,
}

impl FakeHost {
    /// A host whose machines run the agent of this process.
    pub fn scripted() -> Self {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(root.path(), "default", "pod").unwrap();
        run_dir.create().unwrap();
        let state = State::of_daemon(std::process::id(), PathBuf::new(), Path::new("/none"));
        run_dir.save(&state).unwrap();
        Self {
            machine: Arc::default(),
            knows_network: true,
            hangs: false,
            hang_timeout: Duration::ZERO,
            debug_shell: None,
            journal: Journal::default(),
            hooks: Runner::default(),
            system: System::default(),
            devices: Mutex::default(),
            drivers: Vec::new(),
            pci_slots: 0,
            hot_plug: HotPlug::new(run_dir.clone()),
            run_dir,
            agent_exe: None,
            root,
        }
    }

    /// The same with a console. Its shell only looks like a static program: the
    /// scripted agent runs this host's /bin/sh instead.
    pub fn with_console() -> Self {
        let host = Self::scripted();
        let mut header = [0; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[18] = 62; // EM_X86_64
        let shell = host.root.path().join("shell");
        std::fs::write(&shell, header).unwrap();
        Self {
            debug_shell: Some(shell),
            ..host
        }
    }

    /// A host whose machines run the agent `NACRE_TEST_AGENT` names; `None`,
    /// with the reason on stderr, where that cannot be.
    pub fn real() -> Option<Self> {
        let Some(exe) = std::env::var_os("NACRE_TEST_AGENT").map(PathBuf::from) else {
            eprintln!("skipped: NACRE_TEST_AGENT names no nacre-agent");
            return None;
        };
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: the agent makes containers, which takes root");
            return None;
        }
        Some(Self {
            agent_exe: Some(exe),
            ..Self::scripted()
        })
    }

    /// The container's root stays where its bundle is, unless containerd names mounts of
    /// it; its volumes are prepared as for a guest.
    pub fn prepare(
        &self,
        config: &ContainerConfig,
        slots: Option<&DiskSlots>,
    ) -> Result<Prepared, StorageError> {
        let shared_root = self.root.path().join("shared");
        if config.rootfs.is_empty() {
            storage::prepare_volumes(&config.spec, &config.id, &shared_root)
        } else {
            storage::prepare(config, &shared_root, slots)
        }
    }

    /// Next to the machine's own.
    pub fn files_dir(&self) -> PathBuf {
        self.root.path().join("etc")
    }

    /// Kills the machine.
    pub fn teardown(&self) {
        if let Some(machine) = lock(&self.machine).as_ref() {
            machine.kill();
        }
    }

    /// What the containers' limits say, in whole MiB.
    pub fn memory_of(&self, containers: &[Limits]) -> u32 {
        let bytes = containers.iter().filter_map(|limits| limits.memory_bytes);
        u32::try_from(bytes.sum::<u64>() >> 20).unwrap()
    }

    /// What the containers' limits say, in whole vCPUs.
    pub fn vcpus_of(&self, containers: &[Limits]) -> u8 {
        let limits = containers.iter().filter_map(|limits| limits.cpu);
        let vcpus = limits.map(|(quota, period)| quota.div_ceil(period));
        u8::try_from(vcpus.sum::<u64>()).unwrap()
    }

    /// Notes the call: memory, and quota and period of what containers may use together.
    pub fn set_limits(&self, containers: &[Limits], memory_mib: u32) {
        let cpu = Limits::together(containers).cpu;
        let cpu = cpu.map(|(quota, period)| format!(", {quota}/{period}"));
        let cpu = cpu.unwrap_or_default();
        lock(&self.journal).push(format!("host {memory_mib}{cpu}"));
    }

    /// Those of `system` that the container asks for.
    pub fn devices(&self, config: &ContainerConfig) -> Result<Vec<AssignedDevice>, SandboxError> {
        let assigned = request::assigned(&self.system, &config.spec, true);
        assigned.map_err(|source| SandboxError::Devices {
            container_id: config.id.clone(),
            source,
        })
    }

    /// Those that its machine has.
    pub fn pod_devices(&self) -> Vec<AssignedDevice> {
        lock(&self.devices).clone()
    }

    /// Starts an agent in a machine with the devices that a container asks for.
    pub async fn open_for(&self, config: &ContainerConfig) -> Result<Sandbox, SandboxError> {
        *lock(&self.devices) = self.devices(config)?;
        let sandbox = self.open();
        self.hooks.create(config, sandbox.pid()).await?;
        Ok(sandbox)
    }

    /// Starts an agent.
    pub fn open(&self) -> Sandbox {
        let machine = Arc::new(match &self.agent_exe {
            None => scripted_machine(self.journal.clone()),
            Some(exe) => real_machine(exe, self.root.path()),
        });
        if self.hangs {
            machine.hang();
        }
        *lock(&self.machine) = Some(machine.clone());
        Sandbox::new(machine)
    }

    /// The same, with a connection to nothing.
    pub async fn share(&self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        let plug = async {
            let (near, _far) = StdUnixStream::pair().unwrap();
            sandbox.machine().add_shared_dir(&near).await?;
            Ok(())
        };
        sandbox.share(plug).await
    }

    fn images(&self) -> Images {
        let disks = self.drivers.iter().map(|image| Driver {
            serial: image.path.display().to_string(),
            path: image.path.display().to_string(),
            ..Driver::default()
        });
        Images::new(self.drivers.clone(), disks.collect())
    }

    /// Attaches to its agent.
    pub async fn boot(&self, sandbox: &Sandbox) -> Result<(), SandboxError> {
        self.boot_with(sandbox, false).await
    }

    /// The same of a machine that boots with the shared directory, or without.
    pub async fn boot_with(&self, sandbox: &Sandbox, shared_dir: bool) -> Result<(), SandboxError> {
        let mut room = ROOM;
        let (first, images) = ((self.pod_devices(), None), self.images());
        let started = self
            .hot_plug
            .start(self.pci_slots, first, images, BOOT_TIMEOUT);
        started.await.unwrap();
        if !self.pod_devices().is_empty() {
            (room.memory.growth_mib, room.memory.is_pinned) = (0, true);
        }
        let request = ConfigureSandboxRequest {
            shared_dir,
            ..ConfigureSandboxRequest::default()
        };
        sandbox.attach(BOOT_TIMEOUT, &request, room).await
    }
}

fn scripted_machine(journal: Journal) -> FakeMachine {
    let (near, far) = UnixStream::pair().unwrap();
    FakeMachine {
        rpc: Mutex::new(Some(near)),
        streams: Streams::Scripted(scripted::serve(far, journal.clone())),
        stopped: watch::Sender::new(None),
        child: Mutex::new(None),
        takes_mib: AtomicU32::new(u32::MAX),
        keeps_mib: AtomicU32::new(0),
        disks: watch::Sender::new(Disks::Exchange),
        keeps_devices: Mutex::default(),
        devices_hang: AtomicBool::new(false),
        devices_asked: Notify::new(),
        is_full: AtomicBool::new(false),
        journal,
    }
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
    FakeMachine {
        rpc: Mutex::new(Some(UnixStream::from_std(near).unwrap())),
        streams: Streams::Real(path),
        stopped: watch::Sender::new(None),
        child: Mutex::new(Some(child)),
        takes_mib: AtomicU32::new(u32::MAX),
        keeps_mib: AtomicU32::new(0),
        disks: watch::Sender::new(Disks::Exchange),
        keeps_devices: Mutex::default(),
        devices_hang: AtomicBool::new(false),
        devices_asked: Notify::new(),
        is_full: AtomicBool::new(false),
        journal: Journal::default(),
    }
}

fn inheritable(fd: OwnedFd) -> OwnedFd {
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    fd
}
