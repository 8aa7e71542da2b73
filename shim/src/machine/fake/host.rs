//! What a fake machine's host has: pods' files, limits, devices, and the machine itself.

use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nacre_protocol::agent::{ConfigureSandboxRequest, Driver};

use super::{FakeMachine, Journal, real_machine, scripted_machine};
use crate::cgroup::Limits;
use crate::devices::{AssignedDevice, DriverImage, System, request};
use crate::hooks::Runner;
use crate::machine::Machine;
use crate::rundir::{RunDir, State};
use crate::sandbox::{
    ContainerConfig, DiskSlots, HotPlug, Images, MemorySize, Room, Sandbox, SandboxError,
    SlotCounts, VcpuCount,
};
use crate::storage::{self, Prepared, StorageError};
use crate::task::lock;

const BOOT_TIMEOUT: Duration = Duration::from_secs(10);
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
            storage::prepare_volumes(&self.system, &config.spec, &config.id, &shared_root)
        } else {
            storage::prepare(&self.system, config, &shared_root, slots)
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

    /// Shares a directory by a connection to nothing.
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
