//! An agent in the test's own process: containers are plain host processes.

use std::collections::HashMap;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio as ProcessStdio;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use nacre_protocol::agent::*;
use nacre_protocol::agent_ttrpc::{self, create_agent};
use nix::sys::socket::{Shutdown, shutdown};
use oci_spec::runtime::{Process as OciProcess, Spec};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::{Notify, watch};
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};
use ttrpc::error::get_rpc_status;
use ttrpc::{Code, Result};

use super::Journal;
use crate::task::lock;

/// A container or exec.
struct Process {
    command: OciProcess,
    stdio: Stdio,
    pid: u32,
    /// `Some` once it has ended.
    exit: watch::Sender<Option<u32>>,
}

/// The agent.
#[derive(Default)]
pub struct Agent {
    processes: Mutex<HashMap<(String, String), Process>>,
    streams: Mutex<HashMap<u64, UnixStream>>,
    arrived: Notify,
    dead: watch::Sender<bool>,
    /// Whether pings, and all that is asked of what runs, stay without an answer.
    pub hung: watch::Sender<bool>,
    /// Whether deletions do.
    pub deletes_hang: watch::Sender<bool>,
    /// How many do.
    pub held: watch::Sender<u32>,
    /// The container of which it says that there was no memory. With an exit it says so of all.
    pub lacks_memory: watch::Sender<Option<String>>,
    /// Whether it freezes no container and thaws none.
    pub keeps_phases: AtomicBool,
    /// Whether it lets go of no network card.
    pub keeps_cards: AtomicBool,
    /// How many changes of the network, or of what is shared, it refuses yet.
    pub refusals: AtomicU32,
    /// How many were answered.
    pub pings: watch::Sender<u32>,
    /// The fewest and the most vCPUs it uses.
    pub vcpus: Mutex<Option<RangeInclusive<u32>>>,
    /// By how much the guest's clock is ahead of the host's.
    pub clock_ahead_ns: watch::Sender<i64>,
    journal: Journal,
}

/// Serves an agent on one connection.
pub fn serve(connection: UnixStream, journal: Journal) -> Arc<Agent> {
    let agent = Arc::new(Agent {
        journal,
        ..Agent::default()
    });
    let service = Arc::new(Service(agent.clone()));
    let mut dead = agent.dead.subscribe();
    let line = connection.as_fd().try_clone_to_owned().unwrap();
    tokio::spawn(async move {
        let connections = futures::stream::iter([Ok(connection)]);
        let mut server = Server::new()
            .add_listener(Listener::new(connections))
            .register_service(create_agent(service));
        server.start().await.unwrap();
        dead.wait_for(|dead| *dead).await.ok();
        // The server alone would wait for calls that hang.
        shutdown(line.as_raw_fd(), Shutdown::Both).unwrap();
        server.disconnect().await;
    });
    agent
}

impl Agent {
    /// The shim's end of a new stream.
    pub fn stream(self: &Arc<Self>) -> io::Result<UnixStream> {
        let (near, mut far) = UnixStream::pair()?;
        let agent = self.clone();
        tokio::spawn(async move {
            let mut id = [0u8; 8];
            if far.read_exact(&mut id).await.is_ok() {
                lock(&agent.streams).insert(u64::from_le_bytes(id), far);
                agent.arrived.notify_waiters();
            }
        });
        Ok(near)
    }

    /// Breaks the RPC connection and ends all processes.
    pub fn die(&self) {
        self.dead.send_replace(true);
        for process in lock(&self.processes).values() {
            kill(process.pid, libc::SIGKILL);
        }
        lock(&self.streams).clear();
    }

    async fn take_stream(&self, id: u64) -> Option<UnixStream> {
        if id == 0 {
            return None;
        }
        loop {
            let arrived = self.arrived.notified();
            if let Some(stream) = lock(&self.streams).remove(&id) {
                return Some(stream);
            }
            arrived.await;
        }
    }

    fn add(&self, key: (String, String), command: OciProcess, stdio: Stdio) -> Result<()> {
        let mut processes = lock(&self.processes);
        if processes.contains_key(&key) {
            return Err(get_rpc_status(Code::ALREADY_EXISTS, "exists"));
        }
        let process = Process {
            command,
            stdio,
            pid: 0,
            exit: watch::Sender::new(None),
        };
        processes.insert(key, process);
        Ok(())
    }

    async fn run(self: &Arc<Self>, key: (String, String)) -> Result<u32> {
        let (command, stdio) = {
            let processes = lock(&self.processes);
            let process = processes.get(&key).ok_or_else(not_found)?;
            (process.command.clone(), process.stdio.clone())
        };
        let args = command.args().clone().unwrap_or_default();
        let mut child = Command::new(&args[0])
            .args(&args[1..])
            .stdin(ProcessStdio::piped())
            .stdout(ProcessStdio::piped())
            .stderr(ProcessStdio::piped())
            .spawn()
            .map_err(|error| get_rpc_status(Code::INVALID_ARGUMENT, error))?;
        let pid = child.id().unwrap();
        lock(&self.processes)
            .get_mut(&key)
            .ok_or_else(not_found)?
            .pid = pid;
        let agent = self.clone();
        tokio::spawn(async move {
            let status = agent.supervise(&mut child, &stdio).await;
            if let Some(process) = lock(&agent.processes).get(&key) {
                process.exit.send_replace(Some(status));
            }
        });
        Ok(pid)
    }

    /// Moves a child's streams and waits for its end.
    async fn supervise(&self, child: &mut Child, stdio: &Stdio) -> u32 {
        if let (Some(mut input), Some(mut pipe)) =
            (self.take_stream(stdio.stdin).await, child.stdin.take())
        {
            tokio::spawn(async move { tokio::io::copy(&mut input, &mut pipe).await });
        }
        child.stdin = None;
        let stdout = self.take_stream(stdio.stdout).await;
        let stderr = self.take_stream(stdio.stderr).await;
        let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let copy_out = async {
            let mut sink = stdout?;
            tokio::io::copy(&mut out, &mut sink).await.ok()?;
            sink.shutdown().await.ok()
        };
        let copy_err = async {
            let mut sink = stderr?;
            tokio::io::copy(&mut err, &mut sink).await.ok()?;
            sink.shutdown().await.ok()
        };
        let (status, _, _) = tokio::join!(child.wait(), copy_out, copy_err);
        let status = status.unwrap();
        let code = status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap());
        code.unsigned_abs()
    }

    /// Resolves when a container's process has ended and all its output was sent.
    pub async fn ended(&self, container_id: &str) {
        let key = (container_id.to_owned(), String::new());
        let exit = self.with(&key, |process| process.exit.subscribe());
        exit.unwrap().wait_for(Option::is_some).await.unwrap();
    }

    /// Whether it refuses this time.
    fn refuses(&self) -> bool {
        let less = |refusals: u32| refusals.checked_sub(1);
        let refusals = &self.refusals;
        let refused = refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        refused.is_ok()
    }

    /// Returns once the guest does not hang.
    async fn unless_hung(&self) {
        self.unless(&self.hung).await;
    }

    async fn unless(&self, hung: &watch::Sender<bool>) {
        let mut hung = hung.subscribe();
        if *hung.borrow() {
            self.held.send_modify(|held| *held += 1);
        }
        // This agent holds the sender.
        hung.wait_for(|hung| !hung).await.unwrap();
    }

    fn with<T>(&self, key: &(String, String), f: impl FnOnce(&Process) -> T) -> Result<T> {
        lock(&self.processes).get(key).map(f).ok_or_else(not_found)
    }
}

fn kill(pid: u32, signal: i32) {
    if pid != 0 {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
        let signal = nix::sys::signal::Signal::try_from(signal).unwrap();
        nix::sys::signal::kill(pid, signal).ok();
    }
}

fn not_found() -> ttrpc::Error {
    get_rpc_status(Code::NOT_FOUND, "no such process")
}

struct Service(Arc<Agent>);

#[async_trait]
impl agent_ttrpc::Agent for Service {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        _: ConfigureSandboxRequest,
    ) -> Result<Empty> {
        Ok(Empty::new())
    }

    async fn mount_shared(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        if self.0.refuses() {
            return Err(get_rpc_status(Code::INTERNAL, "not yet"));
        }
        lock(&self.0.journal).push("guest mounts it".into());
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Result<ProcessStarted> {
        self.0.unless_hung().await;
        let spec: Spec = serde_json::from_slice(&request.spec)
            .map_err(|error| get_rpc_status(Code::INVALID_ARGUMENT, error))?;
        let command = spec.process().clone().unwrap_or_default();
        let program = command.args().as_ref().and_then(|args| args.first());
        if !program.is_some_and(|program| std::path::Path::new(program).exists()) {
            return Err(get_rpc_status(Code::INVALID_ARGUMENT, "not found"));
        }
        for disk in &request.disks {
            lock(&self.0.journal).push(format!(
                "{} waits for {}, {} bytes in sectors of {}",
                request.container_id, disk.serial, disk.size_bytes, disk.sector_bytes
            ));
        }
        if request.container_id == "aborted" {
            return Err(get_rpc_status(Code::ABORTED, "its disk is in use"));
        }
        for device in &request.pci_devices {
            lock(&self.0.journal).push(format!("{} has {device}", request.container_id));
        }
        for driver in &request.drivers {
            let (id, devices) = (&request.container_id, &driver.devices);
            lock(&self.0.journal).push(format!("{id} has {} for {devices:?}", driver.path));
        }
        let stdio = request.stdio.unwrap_or_default();
        self.0
            .add((request.container_id, String::new()), command, stdio)?;
        Ok(ProcessStarted::new())
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.0.unless_hung().await;
        self.0.run((request.container_id, String::new())).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> Result<ProcessStarted> {
        self.0.unless_hung().await;
        let command: OciProcess = serde_json::from_slice(&request.process)
            .map_err(|error| get_rpc_status(Code::INVALID_ARGUMENT, error))?;
        let key = (request.container_id, request.exec_id);
        self.0
            .add(key.clone(), command, request.stdio.unwrap_or_default())?;
        let started = self.0.run(key.clone()).await;
        if started.is_err() {
            lock(&self.0.processes).remove(&key);
        }
        Ok(ProcessStarted {
            pid: started?,
            ..Default::default()
        })
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> Result<Empty> {
        self.0.unless_hung().await;
        let (width, height) = (request.width, request.height);
        lock(&self.0.journal).push(format!("{} {width}x{height}", request.exec_id));
        Ok(Empty::new())
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> Result<Empty> {
        self.0.unless_hung().await;
        let key = (request.container_id, request.exec_id);
        let signal = i32::try_from(request.signal).unwrap();
        self.0.with(&key, |process| {
            if process.pid == 0 {
                process.exit.send_replace(Some(128 + request.signal));
            }
            kill(process.pid, signal);
        })?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<WaitResponse> {
        let key = (request.container_id, request.exec_id);
        let mut exit = self.0.with(&key, |process| process.exit.subscribe())?;
        let status = exit
            .wait_for(Option::is_some)
            .await
            .map_err(|_| not_found())?;
        Ok(WaitResponse {
            exit_status: status.unwrap(),
            oom_kills: u64::from(self.0.lacks_memory.borrow().is_some()),
            ..Default::default()
        })
    }

    async fn delete_exec(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<Empty> {
        self.0.unless(&self.0.deletes_hang).await;
        let key = (request.container_id, request.exec_id);
        let removed = lock(&self.0.processes).remove(&key);
        removed.map(|_| Empty::new()).ok_or_else(not_found)
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        self.0.unless(&self.0.deletes_hang).await;
        lock(&self.0.processes).retain(|(id, _), _| *id != request.container_id);
        if request.container_id == "held" {
            return Err(get_rpc_status(Code::INTERNAL, "its disk is in use"));
        }
        Ok(Empty::new())
    }

    async fn eject_device(&self, _: &TtrpcContext, request: EjectDeviceRequest) -> Result<Empty> {
        self.0.unless_hung().await;
        lock(&self.0.journal).push(format!("eject {}", request.address));
        Ok(Empty::new())
    }

    async fn set_cpus(&self, _: &TtrpcContext, request: SetCpusRequest) -> Result<SetCpusResponse> {
        lock(&self.0.journal).push(format!("vcpus {}", request.count));
        let count = match &*lock(&self.0.vcpus) {
            Some(range) if range.is_empty() => {
                return Err(get_rpc_status(Code::INTERNAL, "no such number"));
            }
            Some(range) => request.count.clamp(*range.start(), *range.end()),
            None => request.count,
        };
        Ok(SetCpusResponse {
            count,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, _: ContainerRequest) -> Result<Empty> {
        self.0.unless_hung().await;
        if self.0.keeps_phases.load(Ordering::Relaxed) {
            return Err(get_rpc_status(Code::FAILED_PRECONDITION, "does not freeze"));
        }
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, _: ContainerRequest) -> Result<Empty> {
        self.0.unless_hung().await;
        if self.0.keeps_phases.load(Ordering::Relaxed) {
            return Err(get_rpc_status(Code::FAILED_PRECONDITION, "does not thaw"));
        }
        Ok(Empty::new())
    }

    async fn ping(&self, _: &TtrpcContext, _: Empty) -> Result<PingResponse> {
        self.0.unless_hung().await;
        self.0.pings.send_modify(|pings| *pings += 1);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let ahead = *self.0.clock_ahead_ns.borrow();
        Ok(PingResponse {
            time_ns: i64::try_from(now.as_nanos()).unwrap() + ahead,
            ..Default::default()
        })
    }

    async fn adjust_clock(&self, _: &TtrpcContext, request: AdjustClockRequest) -> Result<Empty> {
        let ahead = &self.0.clock_ahead_ns;
        ahead.send_modify(|ahead| *ahead += request.by_ns);
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> Result<Empty> {
        self.0.unless_hung().await;
        let text = String::from_utf8(request.resources).unwrap();
        if text.contains("13") {
            return Err(get_rpc_status(Code::INVALID_ARGUMENT, "unlucky"));
        }
        lock(&self.0.journal).push(format!("guest {text}"));
        Ok(Empty::new())
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> Result<Empty> {
        for (sign, config) in [('-', &request.removed), ('+', &request.added)] {
            let interfaces = config.interfaces.iter().map(|interface| {
                let what = match interface.addresses.as_slice() {
                    [] => format!("mtu {}", interface.mtu),
                    addresses => addresses.join(" "),
                };
                format!("{} {} {what}", interface.name, interface.card)
            });
            let routes = config.routes.iter();
            let routes = routes.map(|route| format!("{} {}", route.destination, route.device));
            let lines = interfaces.chain(routes);
            let lines = lines.map(|line| format!("guest {sign}{line}"));
            lock(&self.0.journal).extend(lines);
        }
        if self.0.refuses() {
            lock(&self.0.journal).push("guest refuses".into());
            return Err(get_rpc_status(Code::INTERNAL, "busy"));
        }
        Ok(Empty::new())
    }

    async fn remove_card(&self, _: &TtrpcContext, request: RemoveCardRequest) -> Result<Empty> {
        if self.0.keeps_cards.load(Ordering::Relaxed) {
            lock(&self.0.journal).push(format!("guest keeps {}", request.card));
            return Err(get_rpc_status(Code::INTERNAL, "in use"));
        }
        lock(&self.0.journal).push(format!("guest lets go of {}", request.card));
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> Result<ListProcessesResponse> {
        self.0.unless_hung().await;
        let processes = lock(&self.0.processes);
        let of_it = processes
            .iter()
            .filter(|((id, _), process)| *id == request.container_id && process.pid != 0);
        Ok(ListProcessesResponse {
            pids: of_it.map(|(_, process)| process.pid).collect(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, _: ContainerRequest) -> Result<StatsResponse> {
        self.0.unless_hung().await;
        Ok(StatsResponse {
            pids: Some(PidsStats {
                current: 1,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
    }

    async fn read_file(&self, _: &TtrpcContext, _: ReadFileRequest) -> Result<ReadFileResponse> {
        self.0.unless_hung().await;
        Err(get_rpc_status(Code::NOT_FOUND, "no such file"))
    }

    /// The same whenever it is asked.
    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> Result<Event> {
        let mut lacks_memory = self.0.lacks_memory.subscribe();
        // This agent holds the sender.
        let container_id = lacks_memory.wait_for(Option::is_some).await.unwrap();
        let mut event = Event {
            container_id: container_id.clone().unwrap(),
            ..Default::default()
        };
        event.set_oom_kill(OomKill {
            count: 1,
            ..Default::default()
        });
        Ok(event)
    }
}
