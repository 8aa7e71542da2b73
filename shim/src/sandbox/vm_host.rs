//! [`VmHost`]: everything a pod's virtual machine has on the host.
//!
//! ```text
//! open: devices -> netns -> uid, cgroup -> monitor process (near the devices) -> host hooks -> taps
//! boot: taps, if there was no interface before -> virtiofsd, if there is need -> Boot -> agent
//!       -> what comes and goes in the netns ([`cards`](super::cards))
//! ```
//! What each step makes is put into [`Parts`] and the run directory's state
//! before the next begins, so that [`VmHost::teardown`], or `delete` after a
//! killed shim, can undo any prefix of it.

mod boot;
mod devices;
mod near;
mod netns;
mod network;
mod progress;
mod share;
mod size;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use nacre_protocol::agent::ConfigureSandboxRequest;
use oci_spec::runtime::Spec;
use tracing::{info, warn};

use super::cards::Cards;
use super::hotplug::HotPlug;
use super::sizing::{Size, host_limits, pin_time};
use super::{
    ContainerConfig, DiskSlots, MemorySize, Room, Sandbox, SandboxError, SlotCounts, VcpuCount,
    blocking,
};
use crate::cgroup::{Limits, PodCgroup};
use crate::config::Config;
use crate::devices::{AssignedDevice, System};
use crate::error::chain;
use crate::hooks;
use crate::machine::{Launch, Machine, SELF_EXE, VmMachine};
use crate::network::PodNetwork;
use crate::oci::{self, kubernetes};
use crate::oom;
use crate::rundir::{DEATH_WAIT, Proc, RunDir, RunDirError, State};
use crate::storage::{self, Prepared, StorageError};

use boot::{BootConfig, BootFds};
use near::Near;
use netns::{NetNs, open_netns, refuse_host_namespaces};
use network::listen;

/// `HOST_NAME_MAX`, sethostname(2).
const HOST_NAME_MAX: usize = 64;
const GROUP: &str = "io.containerd.runc.v2.group";

/// What lives on the host for the pod.
#[derive(Default)]
struct Parts {
    machine: Option<Arc<VmMachine>>,
    virtiofsd: Option<Child>,
    cgroup: Option<Arc<PodCgroup>>,
    netns: Option<NetNs>,
    /// As far as it is known.
    network: Option<PodNetwork>,
    /// The host's devices that are the pod's, in the order of the machine's.
    devices: Vec<AssignedDevice>,
    /// Slots for devices of containers that join the pod.
    pci_slots: u8,
    /// What its containers ask for.
    oom_score_adj: Option<i32>,
    state: State,
}

impl Parts {
    /// Whether devices of the host reach the pod's memory, or may later.
    fn is_pinned(&self) -> bool {
        !self.devices.is_empty() || self.pci_slots > 0
    }

    /// Has the host's kernel end the machine before the shim.
    fn expose(&self) {
        for process in [self.state.monitor, self.state.virtiofsd]
            .into_iter()
            .flatten()
        {
            if let Err(error) = oom::expose(process, self.oom_score_adj) {
                warn!(pid = process.pid, %error, "oom_score_adj stays as it is");
            }
        }
    }

    /// What the devices reach of each other's BARs. Those that come later are not reached.
    fn peer_bars_mib(&self, config: &Config) -> u64 {
        if !config.pci_peers || self.devices.len() < 2 {
            return 0;
        }
        let bytes = self.devices.iter().map(|device| device.bar_bytes);
        bytes.fold(0, u64::saturating_add).div_ceil(1 << 20)
    }
}

/// See the module.
pub struct VmHost {
    config: Config,
    run_dir: RunDir,
    sandbox_id: String,
    system: System,
    hot_plug: HotPlug,
    hooks: hooks::Runner,
    parts: Mutex<Parts>,
    /// The turn of whoever takes the machine down: what it has is free when it is gone.
    teardown: tokio::sync::Mutex<()>,
}

impl VmHost {
    /// The host side of pod `sandbox_id`; touches nothing yet.
    pub fn new(
        config: Config,
        run_dir: RunDir,
        sandbox_id: String,
        state: State,
        hooks: hooks::Runner,
    ) -> Self {
        Self {
            system: System::with_vfio_api(config.vfio_api),
            config,
            hot_plug: HotPlug::new(run_dir.clone()),
            run_dir,
            sandbox_id,
            hooks,
            parts: Mutex::new(Parts {
                state,
                ..Parts::default()
            }),
            teardown: tokio::sync::Mutex::default(),
        }
    }

    /// See [`super::Host::sandbox_id`].
    pub fn sandbox_id(&self) -> &str {
        &self.sandbox_id
    }

    /// See [`super::Host::hooks`].
    pub fn hooks(&self) -> &hooks::Runner {
        &self.hooks
    }

    /// See [`super::Host::prepare`].
    pub async fn prepare(
        &self,
        config: &ContainerConfig,
        slots: Option<&DiskSlots>,
    ) -> Result<Prepared, StorageError> {
        if kubernetes::is_sandbox(&config.spec) {
            return Ok(Prepared::nothing(&config.spec));
        }
        let (config, slots) = (config.clone(), slots.cloned());
        let (system, shared_root) = (self.system.clone(), self.run_dir.shared_root());
        blocking(move || storage::prepare(&system, &config, &shared_root, slots.as_ref())).await
    }

    /// See [`super::Host::release`].
    pub async fn release(&self, container_id: &str) {
        let (shared_root, id) = (self.run_dir.shared_root(), container_id.to_owned());
        if let Err(error) = blocking(move || storage::release(&shared_root, &id)).await {
            warn!(container_id, error = chain(&error), "storage not released");
        }
    }

    /// See [`super::Host::open`].
    pub async fn open(&self, config: &ContainerConfig) -> Result<Sandbox, SandboxError> {
        self.refuse_undead().await?;
        let result = self.try_open(config).await;
        if let Err(error) = &result {
            warn!(error = chain(error), "sandbox not made");
            self.teardown().await;
        }
        result
    }

    async fn try_open(&self, config: &ContainerConfig) -> Result<Sandbox, SandboxError> {
        refuse_host_namespaces(&config.spec, &config.id)?;
        self.claim_devices(config).await?;
        let netns = open_netns(&config.spec, &config.id)?;
        self.claim_identity(&config.spec, &netns).await?;
        let near = self.near(&config.spec).await;
        let machine = self.start_monitor(&netns, near.as_ref())?;
        self.hooks.create(config, machine.pid()).await?;
        let network = self.join_network(&netns).await?;
        // A namespace that came with a path is its owner's finished work. Into
        // one of our own somebody may yet put an interface.
        let known = netns.path.is_some() || !network.nics.is_empty();
        let mut parts = crate::task::lock(&self.parts);
        parts.network = known.then_some(network);
        parts.netns = Some(netns);
        Ok(Sandbox::new(machine))
    }

    /// See [`super::Host::files_dir`].
    pub fn files_dir(&self) -> PathBuf {
        self.run_dir.path().join("etc")
    }

    /// See [`super::Host::knows_network`].
    pub fn knows_network(&self) -> bool {
        crate::task::lock(&self.parts).network.is_some()
    }

    /// See [`super::Host::boot`].
    pub async fn boot(
        &self,
        sandbox: &Sandbox,
        config: &ContainerConfig,
        prepared: &mut Prepared,
    ) -> Result<(), SandboxError> {
        let result = self.try_boot(sandbox, config, prepared).await;
        let result = result.map_err(|error| self.with_cause(error, config));
        if let Err(error) = &result {
            warn!(error = chain(error), "sandbox not booted");
            self.teardown().await;
        }
        result
    }

    async fn try_boot(
        &self,
        sandbox: &Sandbox,
        config: &ContainerConfig,
        prepared: &mut Prepared,
    ) -> Result<(), SandboxError> {
        let size = self.size_of(&config.spec);
        let pin_time = pin_time(size);
        info!(id = self.sandbox_id, ?size, ?pin_time, "booting");
        let (machine, netns, network, uid, pci_slots) = {
            let mut parts = crate::task::lock(&self.parts);
            let machine = parts.machine.clone().ok_or(SandboxError::Stopped)?;
            let uid = parts.state.uid.ok_or(SandboxError::Stopped)?;
            parts.state.pin_time = pin_time;
            parts.state.vcpus = Some(size.vcpus);
            self.run_dir.save(&parts.state)?;
            let (netns, network) = (parts.netns.take(), parts.network.take());
            (machine, netns, network, uid, parts.pci_slots)
        };
        let netns = netns.ok_or(SandboxError::Stopped)?;
        let loopback = if kubernetes::is_sandbox(&config.spec) {
            listen(&netns).await?
        } else {
            None
        };
        let network = match network {
            Some(network) => network,
            None => self.join_network(&netns).await?,
        };
        let (disks, images) = self.driver_disks(&config.id).await?;
        prepared.disks.extend(disks);
        prepared.pci_devices.drivers = images.of(&prepared.pci_devices.addresses);
        let fds = self.boot_fds(config, prepared).await?;
        let slots = fds.slots;
        let boot = BootConfig {
            sandbox_id: &self.sandbox_id,
            kernel: &self.config.kernel,
            initrd: &self.config.initrd,
            network: &network,
            size,
            hugepages: self.config.hugepages,
            pci_slots,
            pci: self.config.pci_options(),
            uid,
        };
        let timeout = Duration::from_secs(self.config.boot_timeout_seconds) + pin_time;
        let drivers = images.in_use();
        let first = (self.pod_devices(), fds.passthrough.as_ref());
        self.hot_plug
            .start(pci_slots, first, images, timeout)
            .await
            .map_err(io_error("duplicate a descriptor"))?;
        let first_nic = fds.send(&machine, &boot).await?;
        let (pid, pins) = (machine.pid(), fds.passthrough.is_some());
        let shares = fds.socket.is_some();
        // What the monitor alone has, the kernel frees with it.
        drop(fds);
        let cards = Cards::new(network, first_nic);
        if let Some(loopback) = loopback {
            tokio::spawn(loopback.serve(machine.clone()));
        }
        let request = ConfigureSandboxRequest {
            hostname: hostname(&config.spec, &self.sandbox_id),
            network: Some(cards.given().clone()).into(),
            shared_dir: shares,
            sysctls: oci::pod::sysctls(&config.spec),
            drivers,
            ..Default::default()
        };
        let room = Room {
            memory: MemorySize {
                boot_mib: size.memory_mib,
                growth_mib: size.growth_mib,
                is_pinned: size.is_pinned,
            },
            vcpus: VcpuCount {
                boot: size.vcpus,
                max: size.max_vcpus,
            },
            disks: slots,
        };
        let attach = sandbox.attach(timeout, &request, room);
        if pins {
            progress::logged(attach, pid, size.memory_mib).await?;
        } else {
            attach.await?;
        }
        self.follow(netns, machine, sandbox, cards).await
    }

    async fn boot_fds(
        &self,
        config: &ContainerConfig,
        prepared: &mut Prepared,
    ) -> Result<BootFds, SandboxError> {
        let slots = self.slots_for(config, prepared);
        // Those that join share their root file systems, unless there are disks for them.
        let shares = prepared.uses_shared_dir || (may_grow(&config.spec) && slots.roots == 0);
        Ok(BootFds {
            socket: shares.then(|| self.start_virtiofsd()).transpose()?,
            kvm: open(Path::new("/dev/kvm"), true)?,
            kernel: open(&self.config.kernel, false)?,
            initrd: open(&self.config.initrd, false)?,
            console: self.open_console()?,
            disks: std::mem::take(&mut prepared.disks),
            slots,
            passthrough: self.open_devices(&config.id).await?,
        })
    }

    /// Disks to be made empty: what the first container needs, and in a pod as many
    /// as the configuration says. Those for root file systems only where its containers can
    /// have them, as each costs the pod's start.
    fn slots_for(&self, config: &ContainerConfig, prepared: &Prepared) -> SlotCounts {
        let volumes = prepared.block_devices.len();
        if !may_grow(&config.spec) {
            return SlotCounts { volumes, roots: 0 };
        }
        let roots = if storage::has_root_on_disks(config) {
            self.config.root_disks
        } else {
            0
        };
        SlotCounts {
            volumes: volumes.max(self.config.pod_disks.into()),
            roots: roots.into(),
        }
    }

    /// See [`super::Host::hang_timeout`].
    pub fn hang_timeout(&self) -> Duration {
        Duration::from_secs(self.config.hang_timeout_seconds)
    }

    /// See [`super::Host::debug_shell`].
    pub fn debug_shell(&self) -> Option<&Path> {
        self.config.debug_shell.as_deref()
    }

    /// The monitor's uid and the pod's cgroup.
    async fn claim_identity(&self, spec: &Spec, netns: &NetNs) -> Result<(), SandboxError> {
        let uid = self
            .run_dir
            .allocate_uid(self.config.uid_base, self.config.uid_count)?;
        let path = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.cgroups_path().clone())
            .map(|path| path.display().to_string())
            .filter(|path| !path.is_empty());
        // The sandbox container asks for itself, which is no process.
        let oom_score_adj = if kubernetes::is_sandbox(spec) {
            None
        } else {
            Limits::of(spec).oom_score_adj
        };
        self.record(|parts| {
            parts.oom_score_adj = oom_score_adj;
            parts.state.uid = Some(uid);
            parts.state.netns.clone_from(&netns.path);
        })?;
        if let Some(path) = path {
            let size = self.size_of(spec);
            let containers = [Limits::of(spec)];
            let Size {
                memory_mib,
                is_pinned,
                peer_bars_mib,
                ..
            } = size;
            let config = &self.config;
            let limits = host_limits(&containers, memory_mib, is_pinned, peer_bars_mib, config);
            let created = path.clone();
            let cgroup = blocking(move || PodCgroup::create(&created, &limits)).await?;
            // Before it is known to be ours it is not to be cleaned up: it may be another's.
            // Of a shim that is killed meanwhile a scope ends by itself, a directory stays empty.
            self.record(|parts| {
                parts.cgroup = Some(Arc::new(cgroup));
                parts.state.cgroup = Some(path);
            })?;
        }
        Ok(())
    }

    fn start_monitor(
        &self,
        netns: &NetNs,
        near: Option<&Near>,
    ) -> Result<Arc<VmMachine>, SandboxError> {
        let log = self.run_dir.open_log()?;
        let _memory = near.and_then(Near::memory);
        let machine = {
            let parts = crate::task::lock(&self.parts);
            VmMachine::spawn(&Launch {
                exe: Path::new(SELF_EXE),
                log: log.as_fd(),
                netns: Some(netns.file.as_fd()),
                cgroup: parts.cgroup.as_deref().map(PodCgroup::dir_fd),
            })?
        };
        if let Some(near) = near {
            near.run(machine.pid());
        }
        let machine = Arc::new(machine);
        self.record(|parts| {
            parts.state.monitor = Proc::of(machine.pid());
            parts.machine = Some(machine.clone());
            parts.expose();
        })?;
        Ok(machine)
    }

    fn open_console(&self) -> Result<Option<File>, SandboxError> {
        if !self.config.debug_console {
            return Ok(None);
        }
        let path = self.run_dir.path().join("console");
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map(Some)
            .map_err(io_error(format!("open {}", path.display())))
    }

    /// A machine that a teardown has killed and that is not gone has what the next one
    /// would get. If it is gone by now, the teardown can be finished.
    async fn refuse_undead(&self) -> Result<(), SandboxError> {
        let (machine, pin_time) = {
            let parts = crate::task::lock(&self.parts);
            (parts.machine.clone(), parts.state.pin_time)
        };
        let Some(machine) = machine else {
            return Ok(());
        };
        if machine.stopped().now_or_never().is_none() {
            return Err(SandboxError::RunDir(RunDirError::NotGone {
                pod: self.run_dir.owner().display().to_string(),
                pid: machine.pid(),
                seconds: pin_time.as_secs(),
            }));
        }
        self.teardown().await;
        Ok(())
    }

    /// Notes a change of what is there, in memory and on disk.
    fn record(&self, change: impl FnOnce(&mut Parts)) -> Result<(), SandboxError> {
        let mut parts = crate::task::lock(&self.parts);
        change(&mut parts);
        Ok(self.run_dir.save(&parts.state)?)
    }

    /// See [`super::Host::teardown`].
    pub async fn teardown(&self) {
        let _turn = self.teardown.lock().await;
        let (machine, virtiofsd, process, pin_time) = {
            let mut parts = crate::task::lock(&self.parts);
            (parts.network, parts.netns) = (None, None);
            let (process, pin_time) = (parts.state.virtiofsd, parts.state.pin_time);
            let virtiofsd = parts.virtiofsd.take();
            (parts.machine.clone(), virtiofsd, process, pin_time)
        };
        if let Some(machine) = &machine {
            machine.kill();
        }
        let killed = process.map(Proc::kill);
        let mut is_gone = true;
        if let Some(machine) = machine {
            let wait = tokio::time::timeout(DEATH_WAIT + pin_time, machine.stopped());
            is_gone = wait.await.is_ok();
            if !is_gone {
                warn!("the monitor does not die; until it has, its devices are the pod's");
            }
        }
        let cgroup = if is_gone {
            let mut parts = crate::task::lock(&self.parts);
            parts.machine = None;
            parts.cgroup.take()
        } else {
            None
        };
        let run_dir = self.run_dir.clone();
        let is_removed = blocking(move || {
            if is_gone {
                run_dir.claims().release(&run_dir);
            }
            share::end(killed, virtiofsd);
            let removed = cgroup.map(|cgroup| cgroup.remove());
            if let Some(Err(error)) = &removed {
                warn!(error = chain(error), "cgroup stays");
            }
            matches!(removed, Some(Ok(())))
        });
        // Its name may be another's from now on.
        if is_removed.await
            && let Err(error) = self.record(|parts| parts.state.cgroup = None)
        {
            warn!(error = chain(&error), "state not written");
        }
    }
}

/// The guest's hostname: the spec's, or the pod's id, which fits with its end cut off.
fn hostname(spec: &Spec, sandbox_id: &str) -> String {
    let given = spec.hostname().as_deref().filter(|name| !name.is_empty());
    given
        .unwrap_or(sandbox_id)
        .chars()
        .take(HOST_NAME_MAX)
        .collect()
}

/// Whether containers may join the pod later, whose files nobody knows yet.
fn may_grow(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    kubernetes::is_sandbox(spec)
        || annotations.is_some_and(|annotations| annotations.contains_key(GROUP))
}

fn open(path: &Path, write: bool) -> Result<File, SandboxError> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .map_err(io_error(format!("open {}", path.display())))
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> SandboxError {
    let what = what.into();
    move |source| SandboxError::Io { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rundir::Undying;
    use serde_json::json;

    fn spec(value: serde_json::Value) -> Spec {
        serde_json::from_value(value).unwrap()
    }

    fn host() -> (tempfile::TempDir, VmHost) {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(root.path(), "default", "pod").unwrap();
        run_dir.create().unwrap();
        let (config, hooks) = (Config::default(), hooks::Runner::default());
        let host = VmHost::new(config, run_dir, "pod".into(), State::default(), hooks);
        (root, host)
    }

    /// It may be another's.
    #[tokio::test]
    async fn a_cgroup_that_is_not_made_is_not_cleaned_up() {
        let (_root, host) = host();
        let path = "neither:spelling";
        let spec = spec(json!({"ociVersion": "1.2.0", "linux": {"cgroupsPath": path}}));
        let file = File::open("/dev/null").unwrap();
        let netns = NetNs { file, path: None };
        let error = host.claim_identity(&spec, &netns).await.unwrap_err();
        assert!(matches!(error, SandboxError::Cgroup(_)), "{error}");
        let state = host.run_dir.load().unwrap().unwrap();
        assert_eq!((state.uid.is_some(), state.cgroup), (true, None));
    }

    #[tokio::test]
    async fn monitor_and_file_server_are_ended_before_the_shim() {
        let (_root, host) = host();
        let mut processes = [(); 2].map(|()| {
            std::process::Command::new("cat")
                .stdin(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        });
        let [monitor, virtiofsd] = [0, 1].map(|at| Proc::of(processes[at].id()));
        host.record(|parts| (parts.state.monitor, parts.state.virtiofsd) = (monitor, virtiofsd))
            .unwrap();
        let limits = |oom_score_adj| {
            [Limits {
                oom_score_adj: Some(oom_score_adj),
                ..Limits::default()
            }]
        };
        host.set_limits(&limits(1000), 256).await.unwrap();
        for process in &mut processes {
            let path = format!("/proc/{}/oom_score_adj", process.id());
            let set = std::fs::read_to_string(path).unwrap();
            drop(process.stdin.take());
            process.wait().unwrap();
            assert_eq!(set.trim(), "1000");
        }
        // Of those that are gone there is nothing to set, nor to complain of.
        crate::task::lock(&host.parts).expose();
    }

    /// As one that waits for a server of the host's files which does not answer.
    #[tokio::test]
    async fn a_file_server_that_does_not_die_is_not_waited_for() {
        let Some(undying) = Undying::new() else {
            return;
        };
        let (_root, host) = host();
        host.record(|parts| parts.state.virtiofsd = Some(undying.process))
            .unwrap();
        for _ in 0..2 {
            let begin = std::time::Instant::now();
            host.teardown().await;
            let took = begin.elapsed();
            assert!(took >= DEATH_WAIT && took < 2 * DEATH_WAIT, "{took:?}");
        }
    }

    /// Nor is it left a zombie that dies.
    #[tokio::test]
    async fn a_file_server_is_reaped() {
        let (_root, host) = host();
        let child = std::process::Command::new("sleep").arg("600").spawn();
        let child = child.unwrap();
        let process = Proc::of(child.id()).unwrap();
        host.record(|parts| {
            parts.state.virtiofsd = Some(process);
            parts.virtiofsd = Some(child);
        })
        .unwrap();
        host.teardown().await;
        assert_eq!(Proc::of(process.pid), None);
    }

    #[test]
    fn hostname_is_the_spec_s_or_the_pod_s() {
        let named = spec(serde_json::json!({"ociVersion": "1.2.0", "hostname": "web"}));
        assert_eq!(hostname(&named, "pod"), "web");
        let none = spec(serde_json::json!({"ociVersion": "1.2.0"}));
        assert_eq!(hostname(&none, "pod"), "pod");
        // containerd's ids may be 76 characters long.
        assert_eq!(hostname(&none, &"p".repeat(76)), "p".repeat(64));
    }

    #[test]
    fn pods_may_grow_and_single_containers_not() {
        let annotations = json!({"io.kubernetes.cri.container-type": "sandbox"});
        let pod = json!({"ociVersion": "1.0.2", "annotations": annotations});
        assert!(may_grow(&spec(pod)));
        assert!(!may_grow(&spec(json!({"ociVersion": "1.0.2"}))));
    }
}
