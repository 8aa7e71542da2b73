//! The monitor process, from its first message to its exit.
//!
//! ```text
//!   shim --Boot--> enter the jail, build --Booted--> run --Stopped--> exit
//!                         |                           |
//!                         +---Failed---> exit         +-- channel closed: exit at once
//! ```
//!
//! The main thread serves the control channel. The vsock thread hands it the
//! guest's calls through a bounded queue: a guest that dials faster than the shim
//! listens is refused. What may take as long as a device of the host takes is done on
//! threads of its own ([`exchanges`], [`hotplug`]) and answered later ([`answers`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use nacre_protocol::channel::{Channel, ChannelError, FdList, Fds};
use nacre_protocol::vm::{Event, Memory, NamedFd, Request, SharedDir, VmConfig};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing_subscriber::EnvFilter;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::boot::NamedFile;
use crate::devices::{self, DeviceError};
use crate::jail::{self, JailError};
use crate::layout::MIB;
use crate::machine::{Machine, MachineError, Parts, Running};
use crate::memory::{self, MemoryError};
use crate::pstore;
use crate::stop::Outcome;
use crate::vfio::Passthrough;
use crate::vfio::hotplug::{self, Job};
use crate::virtio::mem::Resizer;
use crate::virtio::net;
use crate::virtio::vsock::Dialer;

mod answers;
mod exchanges;

use answers::Answers;
use exchanges::Exchanges;

/// Calls of the guest that wait for the main thread.
const MAX_CALLS: usize = 16;

/// Why the monitor ends with a failure.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The shim went away, or sent nonsense.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The first message was not `Boot`.
    #[error("the first request was not Boot")]
    NotBoot,
    /// See the source.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// See the source.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// See the source.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// See the source.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Memory that PCI devices reach is pinned.
    #[error("{0} MiB of memory to be added later: not to a guest with PCI devices of the host")]
    PinnedGrowth(u32),
    /// There is one already.
    #[error("the machine has a shared directory")]
    SharedDir,
    /// No event descriptor.
    #[error("events: {0}")]
    Event(#[from] io::Error),
}

/// Runs the monitor on its end of the control channel.
#[must_use]
pub fn run(control: OwnedFd) -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // Fails only if a subscriber is already there, whose choice stands then.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .try_init();
    let mut channel = Channel::from(control);
    match serve(&mut channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(MonitorError::Channel(ChannelError::Closed)) => {
            tracing::info!("the shim is gone");
            ExitCode::FAILURE
        }
        Err(error) => {
            tracing::error!(%error, "monitor failed");
            let event = Event::Failed {
                message: error.to_string(),
            };
            if let Err(error) = channel.send(&event, &FdList::default()) {
                tracing::warn!(%error, "failure not reported");
            }
            ExitCode::FAILURE
        }
    }
}

fn serve(channel: &mut Channel) -> Result<(), MonitorError> {
    let (Request::Boot(config), fds) = channel.recv::<Request>()? else {
        return Err(MonitorError::NotBoot);
    };
    let sandbox = tracing::info_span!("monitor", sandbox_id = %config.sandbox_id);
    let _inside = sandbox.enter();
    jail::enter(config.jail, pinned_bytes(&config)?)?;
    let (calls, caller) = Calls::new()?;
    let (machine, mut peers) = build(&config, fds, caller)?;
    channel.send(&Event::Booted, &FdList::default())?;
    let running = machine.start()?;
    let result = wait(channel, &running, &mut peers, &calls);
    if matches!(result, Err(MonitorError::Channel(ChannelError::Closed))) {
        return result.map(drop);
    }
    let memory = running.memory().clone();
    let exits = running.stop();
    tracing::info!(%exits, "virtual machine stopped");
    let outcome = result?;
    if matches!(outcome, Outcome::Stopped(_)) {
        for line in pstore::last_words(&memory) {
            tracing::warn!("guest kernel: {line}");
        }
    }
    report(channel, outcome)
}

/// What the kernel pins of a guest with devices, or slots for them, and counts against a
/// limit: all of its memory, which therefore is all there from the start.
fn pinned_bytes(config: &VmConfig) -> Result<Option<u64>, MonitorError> {
    let Memory {
        size_mib,
        growth_mib,
        ..
    } = config.memory;
    if config.passthrough.is_none() && config.pci_slots == 0 {
        Ok(None)
    } else if growth_mib > 0 {
        Err(MonitorError::PinnedGrowth(growth_mib))
    } else {
        Ok(Some(u64::from(size_mib) * MIB))
    }
}

fn build(
    config: &VmConfig,
    mut fds: Fds,
    caller: Caller,
) -> Result<(Machine, Peers), MonitorError> {
    let kvm = fds.take(config.kvm)?;
    let kernel = named_file(&config.kernel, &mut fds)?;
    let initrd = named_file(&config.initrd, &mut fds)?;
    let passthrough = config.passthrough.as_ref();
    let passthrough = passthrough.map(|devices| Passthrough::take(devices, &mut fds));
    let passthrough = passthrough.transpose()?;
    let ram = memory::allocate(config.memory.size_mib, config.memory.hugepages)?;
    let (memory, growth) = match config.memory.growth_mib {
        0 => (ram.clone(), None),
        mib => memory::with_growth(&ram, mib).map(|(all, growth)| (all, Some(growth)))?,
    };
    let devices = devices::build(config, &mut fds, growth, move |port, stream| {
        caller.call(port, stream);
    })?;
    let machine = Machine::new(Parts {
        kvm,
        vcpus: config.vcpus,
        ram,
        memory,
        kernel,
        initrd,
        cmdline: config.cmdline.clone(),
        devices: devices.devices,
        passthrough,
        pci_slots: config.pci_slots,
        pci: config.pci,
        serial: devices.serial,
    })?;
    let answers = Answers::new()?;
    let peers = Peers {
        dialer: devices.dialer,
        file_server: devices.file_server,
        resizer: devices.resizer,
        exchanges: Exchanges::new(devices.slots, answers.answerer()),
        answers,
    };
    Ok((machine, peers))
}

fn named_file(named: &NamedFd, fds: &mut Fds) -> Result<NamedFile, ChannelError> {
    Ok(NamedFile {
        file: fds.take(named.fd)?.into(),
        path: named.path.clone(),
    })
}

/// Whom the main thread talks to besides the shim.
struct Peers {
    dialer: Dialer,
    file_server: Option<OwnedFd>,
    resizer: Option<Resizer>,
    exchanges: Exchanges,
    answers: Answers,
}

/// Serves the channel until the machine has ended.
fn wait(
    channel: &mut Channel,
    running: &Running,
    peers: &mut Peers,
    calls: &Calls,
) -> Result<Outcome, MonitorError> {
    let stop = running.stop_handle().clone();
    // An event of our own never hangs up, and the end of the machine is looked at
    // anyway.
    let own = borrow(stop.event());
    loop {
        let server = peers.file_server.as_ref().map_or(own, OwnedFd::as_fd);
        let resizer = peers.resizer.as_ref();
        let resized = resizer.map_or(own, |resizer| borrow(resizer.changed()));
        let ready = wait_for([
            input(channel.as_fd()),
            input(own),
            input(borrow(&calls.event)),
            input(resized),
            input(borrow(peers.answers.event())),
            hangup(server),
        ])?;
        let [request, stopped, called, resized, answered, lost] = ready;
        if called {
            calls.report(channel)?;
        }
        if answered {
            peers.answers.report(channel)?;
        }
        if stopped && let Some(outcome) = stop.outcome() {
            return Ok(outcome.clone());
        }
        if resized && let Some(resizer) = resizer {
            resizer.changed().read()?;
            let growth_mib = u32::try_from(resizer.plugged() / MIB).unwrap_or(u32::MAX);
            channel.send(&Event::Resized { growth_mib }, &FdList::default())?;
        }
        if lost {
            // Whoever uses the share now would wait for ever.
            let message = "the file server of the shared directory has ended";
            return Ok(Outcome::Failed(message.into()));
        }
        if request {
            obey(channel, running, peers)?;
        }
    }
}

fn obey(channel: &mut Channel, running: &Running, peers: &mut Peers) -> Result<(), MonitorError> {
    let (request, mut fds) = channel.recv::<Request>()?;
    match request {
        Request::Connect { port, stream } => peers.dialer.connect(port, fds.take(stream)?),
        Request::Resize { growth_mib } => match &peers.resizer {
            Some(resizer) => resizer.request(u64::from(growth_mib) * MIB),
            None => tracing::warn!(growth_mib, "memory that cannot grow is not resized"),
        },
        Request::Exchange {
            number,
            serial,
            backing,
            read_only,
        } => {
            let backing = devices::backing(&backing, &mut fds)?;
            peers.exchanges.start(number, &serial, read_only, backing);
        }
        Request::Plug {
            number,
            slots,
            devices,
        } => {
            let devices = Passthrough::take(&devices, &mut fds)?;
            plug(
                running.hot_plug(),
                &peers.answers,
                number,
                Job::Plug(slots, devices),
            );
        }
        Request::Unplug { number, slots } => {
            plug(
                running.hot_plug(),
                &peers.answers,
                number,
                Job::Unplug(slots),
            );
        }
        Request::AddNic { number, nic } => {
            let device = devices::net(&nic, &mut fds).map_err(MonitorError::from);
            let slot = device.and_then(|device| Ok(running.add(Box::new(device))?));
            answer(peers, number, slot);
        }
        Request::RemoveNic {
            number,
            slot,
            is_let_go,
        } => {
            let removed = running.remove(net::DEVICE_TYPE, slot, is_let_go);
            let removed = removed.map_err(MonitorError::from);
            answer(peers, number, removed.map(|()| slot));
        }
        Request::AddSharedDir { number, dir } => {
            let slot = share(running, peers, &dir, &mut fds);
            answer(peers, number, slot);
        }
        Request::Interrupt => {
            if let Err(error) = running.interrupt() {
                tracing::warn!(%error, "the guest is not asked where it is");
            }
        }
        Request::Boot(_) => tracing::warn!("a second Boot request is ignored"),
    }
    Ok(())
}

/// Puts the shared directory into the machine. Should its file server not get ready, whoever
/// asked ends it, and the wait with it.
fn share(
    running: &Running,
    peers: &mut Peers,
    dir: &SharedDir,
    fds: &mut Fds,
) -> Result<u8, MonitorError> {
    if peers.file_server.is_some() {
        return Err(MonitorError::SharedDir);
    }
    let (device, connection) = devices::shared_dir(dir, fds)?;
    let slot = running.add(Box::new(device))?;
    peers.file_server = Some(connection);
    Ok(slot)
}

fn plug(worker: Option<&hotplug::Worker>, answers: &Answers, number: u64, job: Job) {
    let answerer = answers.answerer();
    let done = move |result| answerer.answer(number, result);
    match worker {
        Some(worker) => worker.request(job, done),
        None => done(Err("the machine has no slots for PCI devices".into())),
    }
}

fn answer(peers: &Peers, number: u64, slot: Result<u8, MonitorError>) {
    let slot = slot.map(u64::from).map_err(|error| error.to_string());
    peers.answers.answerer().answer(number, slot);
}

fn report(channel: &Channel, outcome: Outcome) -> Result<(), MonitorError> {
    let event = match outcome {
        Outcome::Stopped(reason) => Event::Stopped(reason),
        Outcome::Failed(message) => Event::Failed { message },
        Outcome::Cancelled => return Ok(()),
    };
    tracing::info!(?event, "reporting");
    Ok(channel.send(&event, &FdList::default())?)
}

/// Waits until `fd` is readable, or closed at the other end.
fn input(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// Waits until `fd` is closed at the other end: poll(2) tells that unasked.
fn hangup(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::empty())
}

/// Which descriptors are ready.
fn wait_for<const N: usize>(mut fds: [PollFd<'_>; N]) -> io::Result<[bool; N]> {
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) => Ok(fds.map(|fd| fd.any().unwrap_or(true))),
        Err(nix::errno::Errno::EINTR) => Ok([false; N]),
        Err(errno) => Err(errno.into()),
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The guest's calls, on the main thread's side.
struct Calls {
    queue: Receiver<(u32, OwnedFd)>,
    event: Arc<EventFd>,
}

/// The vsock thread's side.
struct Caller {
    queue: SyncSender<(u32, OwnedFd)>,
    event: Arc<EventFd>,
}

impl Calls {
    fn new() -> io::Result<(Self, Caller)> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (sender, queue) = sync_channel(MAX_CALLS);
        let caller = Caller {
            queue: sender,
            event: event.clone(),
        };
        Ok((Self { queue, event }, caller))
    }

    fn report(&self, channel: &Channel) -> Result<(), MonitorError> {
        self.event.read()?;
        for (port, stream) in self.queue.try_iter() {
            let mut fds = FdList::default();
            let index = fds.push(stream.as_fd());
            channel.send(
                &Event::Dialed {
                    port,
                    stream: index,
                },
                &fds,
            )?;
        }
        Ok(())
    }
}

impl Caller {
    fn call(&self, port: u32, stream: OwnedFd) {
        if self.queue.try_send((port, stream)).is_err() {
            tracing::warn!(port, "the guest dials too fast");
        } else if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "the guest's call is lost");
        }
    }
}

#[cfg(test)]
mod tests;
