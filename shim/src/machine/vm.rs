//! [`VmMachine`]: a monitor process and the control channel to it.
//!
//! ```text
//! spawn() -> process in jail, waiting ... boot(config, fds) -> Booted -> Dialed -> ... -> dead
//! ```
//! One task, `watch`, reads the monitor's events and owns the process's end. It
//! reports a stop only when the process is gone, so that cgroup and devices are
//! free by then.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nacre_protocol::channel::{Channel, ChannelError, FdList, Fds};
use nacre_protocol::guest::AGENT_PORT;
use nacre_protocol::vm::{DiskBacking, Event, Request, VmConfig};
use nacre_vmm::jail;
use nacre_vmm::vfio::Passthrough;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::{Machine, MachineError, Stop};
use crate::network::HostNic;
use crate::storage::HostBacking;
use crate::task::lock;
use crate::virtiofsd;

/// How long the guest may take for a step of a resize,
const RESIZE_STALL: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });
/// and for all of them.
const RESIZE_LIMIT: Duration = Duration::from_secs(60);
/// How long a disk may take to have no request under way: longer than a device of the
/// host that has not been given up takes.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 40 });
/// How long the monitor may take to put a device on bus 0, or take it out.
const BUS_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 20 });

/// What a monitor process starts with.
pub struct Launch<'a> {
    /// The shim's own executable: the monitor is one of its modes.
    pub exe: &'a Path,
    /// Where the monitor's messages go.
    pub log: BorrowedFd<'a>,
    /// The pod's network namespace.
    pub netns: Option<BorrowedFd<'a>>,
    /// The pod's cgroup directory.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A monitor process.
pub struct VmMachine {
    pid: u32,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    channel: Arc<AsyncFd<ChannelHolder>>,
    agent: Mutex<Option<oneshot::Receiver<OwnedFd>>>,
    /// Memory the guest uses beyond its size at boot.
    growth_mib: watch::Receiver<u32>,
    unanswered: Arc<Unanswered>,
    stopped: watch::Receiver<Option<Stop>>,
    _kill_on_drop: mpsc::Sender<()>,
}

/// Requests that have a number and no answer.
type Unanswered = std::sync::Mutex<Waiting>;

#[derive(Default)]
struct Waiting {
    last_number: u64,
    /// Who waits, or has waited, for which.
    callers: HashMap<u64, oneshot::Sender<Answer>>,
}

/// What the request says, or what failed.
type Answer = Result<u64, String>;

impl Waiting {
    /// One more.
    fn add(&mut self) -> (u64, oneshot::Receiver<Answer>) {
        let (caller, answer) = oneshot::channel();
        self.last_number += 1;
        self.callers.insert(self.last_number, caller);
        (self.last_number, answer)
    }
}

/// Both directions of the channel. Sending takes `&Channel`, receiving `&mut`;
/// they are separate objects on one socket.
struct ChannelHolder(Channel);

impl AsRawFd for ChannelHolder {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl VmMachine {
    /// Starts the monitor process. It waits for [`VmMachine::boot`].
    ///
    /// # Errors
    ///
    /// When the process or the channel to it cannot be made.
    pub fn spawn(launch: &Launch<'_>) -> Result<Self, MachineError> {
        let (near, far) = Channel::pair().map_err(MachineError::io("make the control channel"))?;
        let child = jail::spawn(jail::Spawn {
            exe: launch.exe,
            args: &["containerd-shim-nacre-v2", "monitor"],
            control: far.into(),
            stderr: launch.log,
            netns: launch.netns,
            cgroup: launch.cgroup,
        })
        .map_err(|error| MachineError::Spawn(error.into()))?;
        let pid = u32::try_from(child.pid).map_err(|error| MachineError::Spawn(error.into()))?;
        Self::adopt(near, pid, child.pidfd)
    }

    /// Takes charge of a monitor process that exists. Everything that follows
    /// its start is here, so that tests can put another process in its place.
    fn adopt(near: Channel, pid: u32, pidfd: OwnedFd) -> Result<Self, MachineError> {
        set_nonblocking(near.as_fd())
            .map_err(MachineError::io("make the control channel non-blocking"))?;
        let reader = near
            .as_fd()
            .try_clone_to_owned()
            .map_err(MachineError::io("duplicate the control channel"))?;
        let watching = "watch the monitor";
        let pidfd = Arc::new(register(pidfd).map_err(MachineError::io(watching))?);
        let reader = register(ChannelHolder(reader.into())).map_err(MachineError::io(watching))?;
        let channel = register(ChannelHolder(near)).map_err(MachineError::io(watching))?;
        let (agent_tx, agent_rx) = oneshot::channel();
        let (growth_tx, growth_rx) = watch::channel(0);
        let unanswered = Arc::<Unanswered>::default();
        let (stopped_tx, stopped_rx) = watch::channel(None);
        let (kill_on_drop, dropped) = mpsc::channel(1);
        let news = News {
            agent: Some(agent_tx),
            growth_mib: growth_tx,
            unanswered: unanswered.clone(),
        };
        tokio::spawn(watch_monitor(
            reader,
            pidfd.clone(),
            news,
            stopped_tx,
            dropped,
        ));
        Ok(Self {
            pid,
            pidfd,
            channel: Arc::new(channel),
            agent: Mutex::new(Some(agent_rx)),
            growth_mib: growth_rx,
            unanswered,
            stopped: stopped_rx,
            _kill_on_drop: kill_on_drop,
        })
    }

    /// A machine whose monitor is another process, and the monitor's end of its channel.
    #[cfg(test)]
    pub(crate) fn with_stand_in(pid: u32) -> (Self, Channel) {
        let (near, far) = Channel::pair().unwrap();
        let pidfd = crate::rundir::pidfd_open(pid).unwrap();
        (Self::adopt(near, pid, pidfd).unwrap(), far)
    }

    /// Tells the monitor to build and run the VM. The reply is an event: the
    /// agent's connection, or the machine's end.
    ///
    /// # Errors
    ///
    /// When the monitor is gone or the message cannot be sent.
    pub async fn boot(&self, config: VmConfig, fds: &FdList<'_>) -> Result<(), MachineError> {
        self.send(&Request::Boot(Box::new(config)), fds).await
    }

    async fn send(&self, request: &Request, fds: &FdList<'_>) -> Result<(), MachineError> {
        loop {
            let mut guard = self
                .channel
                .writable()
                .await
                .map_err(MachineError::io("wait for the control channel"))?;
            match self.channel.get_ref().0.send(request, fds) {
                Err(ChannelError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    guard.clear_ready();
                }
                result => return Ok(result?),
            }
        }
    }

    /// Sends the request with a number and waits for its answer. The monitor does what it
    /// was asked for, whether it is waited for or not.
    async fn ask(
        &self,
        fds: &FdList<'_>,
        request: impl FnOnce(u64) -> Request,
    ) -> Result<Answer, MachineError> {
        let (number, answer) = lock(&self.unanswered).add();
        self.send(&request(number), fds)
            .await
            .map_err(|error| self.stop_or(error))?;
        tokio::select! {
            biased;
            Ok(answer) = answer => Ok(answer),
            stop = self.stopped() => Err(MachineError::Stopped(stop)),
        }
    }

    fn stop_or(&self, otherwise: MachineError) -> MachineError {
        match &*self.stopped.borrow() {
            Some(stop) => MachineError::Stopped(stop.clone()),
            None => otherwise,
        }
    }
}

#[async_trait]
impl Machine for VmMachine {
    fn pid(&self) -> u32 {
        self.pid
    }

    async fn connect(&self, port: u32) -> Result<UnixStream, MachineError> {
        let (near, far) =
            StdUnixStream::pair().map_err(MachineError::io("make a stream's socket pair"))?;
        let mut fds = FdList::default();
        let stream = fds.push(far.as_fd());
        self.send(&Request::Connect { port, stream }, &fds)
            .await
            .map_err(|error| self.stop_or(error))?;
        to_tokio(near)
    }

    async fn agent(&self) -> Result<UnixStream, MachineError> {
        let receiver = self.agent.lock().await.take();
        let Some(receiver) = receiver else {
            return Err(self.stop_or(MachineError::Stopped(Stop::Died)));
        };
        tokio::select! {
            biased;
            fd = receiver => match fd {
                Ok(fd) => to_tokio(StdUnixStream::from(fd)),
                Err(_) => Err(MachineError::Stopped(self.stopped().await)),
            },
            stop = self.stopped() => Err(MachineError::Stopped(stop)),
        }
    }

    async fn resize(&self, growth_mib: u32) -> Result<u32, MachineError> {
        let mut now = self.growth_mib.clone();
        let reached = |now: &watch::Receiver<u32>| *now.borrow() == growth_mib;
        let start = Instant::now();
        self.send(&Request::Resize { growth_mib }, &FdList::default())
            .await
            .map_err(|error| self.stop_or(error))?;
        while !reached(&now) && start.elapsed() < RESIZE_LIMIT {
            match tokio::time::timeout(RESIZE_STALL, now.changed()).await {
                Ok(Ok(())) => (),
                Ok(Err(_)) => return Err(MachineError::Stopped(self.stopped().await)),
                Err(_) => break,
            }
        }
        Ok(*now.borrow())
    }

    async fn exchange(
        &self,
        serial: &str,
        backing: Option<&HostBacking>,
        read_only: bool,
    ) -> Result<u64, MachineError> {
        let mut fds = FdList::default();
        let backing = backing.map_or(DiskBacking::Empty, |bytes| bytes.describe(&mut fds));
        let exchange = self.ask(&fds, |number| Request::Exchange {
            number,
            serial: serial.to_owned(),
            backing,
            read_only,
        });
        let answer = tokio::time::timeout(EXCHANGE_LIMIT, exchange).await;
        let serial = serial.to_owned();
        match answer {
            Ok(answer) => answer?.map_err(|reason| MachineError::Disk { serial, reason }),
            Err(_) => {
                let seconds = EXCHANGE_LIMIT.as_secs();
                Err(MachineError::DiskBusy { serial, seconds })
            }
        }
    }

    async fn plug(&self, slots: &[u8], devices: &Passthrough) -> Result<(), MachineError> {
        let mut fds = FdList::default();
        let devices = devices.describe(&mut fds);
        let plug = self.ask(&fds, |number| Request::Plug {
            number,
            slots: slots.to_owned(),
            devices,
        });
        plug.await?.map(drop).map_err(MachineError::Slots)
    }

    async fn unplug(&self, slots: &[u8]) -> Result<(), MachineError> {
        let fds = FdList::default();
        let unplug = self.ask(&fds, |number| Request::Unplug {
            number,
            slots: slots.to_owned(),
        });
        unplug.await?.map(drop).map_err(MachineError::Slots)
    }

    async fn add_nic(&self, nic: &HostNic) -> Result<u8, MachineError> {
        let mut fds = FdList::default();
        let nic = nic.describe(&mut fds);
        let add = self.ask(&fds, |number| Request::AddNic { number, nic });
        slot_answer(add, MachineError::Nic).await
    }

    async fn remove_nic(&self, slot: u8, is_let_go: bool) -> Result<(), MachineError> {
        let fds = FdList::default();
        let remove = self.ask(&fds, |number| Request::RemoveNic {
            number,
            slot,
            is_let_go,
        });
        slot_answer(remove, MachineError::Nic).await.map(drop)
    }

    async fn add_shared_dir(&self, file_server: &StdUnixStream) -> Result<u8, MachineError> {
        let mut fds = FdList::default();
        let dir = virtiofsd::describe(file_server, &mut fds);
        let add = self.ask(&fds, |number| Request::AddSharedDir { number, dir });
        slot_answer(add, MachineError::SharedDir).await
    }

    async fn interrupt(&self) -> Result<(), MachineError> {
        let sent = self.send(&Request::Interrupt, &FdList::default()).await;
        sent.map_err(|error| self.stop_or(error))
    }

    async fn stopped(&self) -> Stop {
        let mut stopped = self.stopped.clone();
        match stopped.wait_for(Option::is_some).await {
            Ok(stop) => stop.clone().unwrap_or(Stop::Died),
            // The watcher is gone: the runtime is shutting down.
            Err(_) => Stop::Died,
        }
    }

    fn kill(&self) {
        kill_pidfd(self.pidfd.as_fd());
    }
}

/// The slot that the monitor answers with when it is to put a device in or take it out, in
/// time. After that nobody knows whether the machine has it.
async fn slot_answer(
    answer: impl Future<Output = Result<Answer, MachineError>>,
    refused: fn(String) -> MachineError,
) -> Result<u8, MachineError> {
    match tokio::time::timeout(BUS_LIMIT, answer).await {
        Ok(answer) => {
            let slot = answer?.map_err(refused)?;
            u8::try_from(slot).map_err(|_| refused(format!("no slot {slot}")))
        }
        Err(_) => {
            let seconds = BUS_LIMIT.as_secs();
            let reason = format!("the monitor does not answer within {seconds} s");
            Err(refused(reason))
        }
    }
}

fn to_tokio(stream: StdUnixStream) -> Result<UnixStream, MachineError> {
    stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .map_err(MachineError::io("watch a guest stream"))
}

/// Watches a descriptor by its owner.
fn register<T: OwnsFd>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: the owner has one descriptor for life and closes it when dropped.
    unsafe { AsyncFd::register(owner) }.map_err(io::Error::from)
}

/// Owners of exactly one descriptor, which they close and never replace.
trait OwnsFd: AsRawFd {}
impl OwnsFd for OwnedFd {}
impl OwnsFd for ChannelHolder {}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn kill_pidfd(pidfd: BorrowedFd<'_>) {
    // A process that is gone already is what we want.
    if let Err(error) = crate::rundir::pidfd_kill(pidfd)
        && error.raw_os_error() != Some(libc::ESRCH)
    {
        error!(%error, "cannot kill the monitor");
    }
}

/// Follows the monitor from its first event to its end.
async fn watch_monitor(
    reader: AsyncFd<ChannelHolder>,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    mut news: News,
    stopped: watch::Sender<Option<Stop>>,
    mut dropped: mpsc::Receiver<()>,
) {
    let stop = tokio::select! {
        stop = read_events(reader, &mut news) => stop,
        // Nobody holds the machine any more, so nobody could stop it later.
        _ = dropped.recv() => Stop::Died,
    };
    // The channel is the monitor's only tie to us. Once it is broken or the VM
    // has stopped, the process has nothing left to do.
    let grace = tokio::time::timeout(Duration::from_millis(500), reap(&pidfd));
    if grace.await.is_err() {
        kill_pidfd(pidfd.as_fd());
        reap(&pidfd).await;
    }
    info!(%stop, "machine stopped");
    stopped.send_replace(Some(stop));
}

/// Where the monitor's events go, but for the last.
struct News {
    agent: Option<oneshot::Sender<OwnedFd>>,
    growth_mib: watch::Sender<u32>,
    unanswered: Arc<Unanswered>,
}

/// Reads events until one ends the machine.
async fn read_events(mut reader: AsyncFd<ChannelHolder>, news: &mut News) -> Stop {
    loop {
        let (event, mut fds) = match next_event(&mut reader).await {
            Ok(next) => next,
            Err(ChannelError::Closed) => return Stop::Died,
            Err(error) => return Stop::Failed(format!("control channel: {error}")),
        };
        match event {
            Event::Booted => debug!("virtual machine runs"),
            Event::Dialed { port, stream } => match (fds.take(stream), news.agent.take()) {
                (Ok(fd), Some(sender)) if port == AGENT_PORT => {
                    if sender.send(fd).is_err() {
                        warn!("the agent connected after its start was given up");
                    }
                }
                (_, kept) => {
                    news.agent = kept;
                    warn!(port, "ignored a connection the guest may not make");
                }
            },
            Event::Resized { growth_mib } => {
                news.growth_mib.send_replace(growth_mib);
            }
            Event::Answered { number, result } => {
                let caller = lock(&news.unanswered).callers.remove(&number);
                match caller.map(|caller| caller.send(result)) {
                    Some(Ok(())) => (),
                    Some(Err(result)) => info!(number, ?result, "an answer comes late"),
                    None => warn!(number, "the monitor answers what nobody asked for"),
                }
            }
            Event::Stopped(reason) => return Stop::Guest(reason),
            Event::Failed { message } => return Stop::Failed(message),
        }
    }
}

async fn next_event(reader: &mut AsyncFd<ChannelHolder>) -> Result<(Event, Fds), ChannelError> {
    loop {
        let mut guard = reader.readable_mut().await?;
        match guard.get_inner_mut().0.recv::<Event>() {
            Err(ChannelError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                guard.clear_ready();
            }
            result => return result,
        }
    }
}

/// Waits for the process behind `pidfd` to end and reaps it.
async fn reap(pidfd: &AsyncFd<OwnedFd>) {
    loop {
        let guard = match pidfd.readable().await {
            Ok(guard) => guard,
            Err(error) => {
                error!(%error, "cannot wait for the monitor");
                return;
            }
        };
        match waitid(
            Id::PIDFd(pidfd.as_fd()),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
        ) {
            Ok(WaitStatus::StillAlive) => drop(guard),
            Ok(status) => {
                info!(?status, "monitor process ended");
                return;
            }
            // Not our child, or reaped already: gone is gone.
            Err(error) => {
                debug!(%error, "monitor process reaped elsewhere");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
