//! The device: configuration space, activation, and the thread's loop.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::VsockError;
use super::muxer::{Muxer, RX_TOKEN, TX_TOKEN};
use super::packet::HOST_CID;
use crate::virtio::ring::{Ring, RingError};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, GuestMemory, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VirtioDevice,
};
use crate::worker::{Poller, Worker};

/// Device type (virtio 1.2, 5).
const DEVICE_TYPE: u16 = 19;
/// receive, transmit, event (virtio 1.2, 5.10.2)
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Stream sockets (virtio 1.2, 5.10.3).
const VIRTIO_VSOCK_F_STREAM: u64 = 1;
/// Token of the dialer's event; the muxer's own are given in its module.
const DIAL_TOKEN: u64 = 2;

/// Hands the shim's end of a connection the guest dialled to whom it concerns:
/// port and a non-blocking unix stream socket.
pub type Dialed = Box<dyn Fn(u32, OwnedFd) + Send>;

/// The device.
pub struct Vsock {
    guest_cid: u64,
    host: Option<Host>,
    worker: Option<Worker<Host>>,
}

/// What the device's thread needs of the host, and gives back when it ends.
struct Host {
    dials: Receiver<(u32, UnixStream)>,
    dial_event: EventFd,
    dialed: Dialed,
}

/// Dials ports of the guest, from any thread and at any time.
pub struct Dialer {
    dials: Sender<(u32, UnixStream)>,
    event: EventFd,
}

impl Dialer {
    /// Connects `stream`, a unix stream socket, to `port` of the guest. A dial
    /// waits for a device that is not active yet; should the guest refuse, or
    /// the device go away, the stream is closed.
    pub fn connect(&self, port: u32, stream: OwnedFd) {
        let stream = UnixStream::from(stream);
        let queued = stream.set_nonblocking(true).and_then(|()| {
            self.dials
                .send((port, stream))
                .map_err(|_| io::Error::from(io::ErrorKind::NotConnected))?;
            self.event.write(1)
        });
        if let Err(error) = queued {
            tracing::warn!(port, %error, "cannot dial the guest");
        }
    }

    /// Another dialer for the same guest.
    ///
    /// # Errors
    ///
    /// When there is no descriptor left.
    pub fn try_clone(&self) -> Result<Self, VsockError> {
        Ok(Self {
            dials: self.dials.clone(),
            event: self.event.try_clone().map_err(VsockError::Event)?,
        })
    }
}

impl Vsock {
    /// A device for a guest with this CID. `dialed` is called on the device's
    /// thread for each connection the guest makes, and should not block.
    ///
    /// # Errors
    ///
    /// For a CID no guest can have, and when there is no descriptor left.
    pub fn new(
        guest_cid: u64,
        dialed: impl Fn(u32, OwnedFd) + Send + 'static,
    ) -> Result<(Self, Dialer), VsockError> {
        if guest_cid <= HOST_CID || guest_cid >= u64::from(u32::MAX) {
            return Err(VsockError::GuestCid(guest_cid));
        }
        let (sender, dials) = channel();
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VsockError::Event)?;
        let host = Host {
            dials,
            dial_event: event.try_clone().map_err(VsockError::Event)?,
            dialed: Box::new(dialed),
        };
        let device = Self {
            guest_cid,
            host: Some(host),
            worker: None,
        };
        let dialer = Dialer {
            dials: sender,
            event,
        };
        Ok((device, dialer))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC | VIRTIO_VSOCK_F_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let fields = config.iter().copied().skip(start);
        for (byte, value) in data.iter_mut().zip(fields.chain(std::iter::repeat(0))) {
            *byte = value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [rx, tx, _events] =
            <[ActiveQueue; 3]>::try_from(Activation::all_queues(activation.queues)?)
                .map_err(|queues| ActivateError::QueueDisabled(queues.len()))?;
        let host = self.host.take().ok_or(ActivateError::Unavailable)?;
        let guest_cid = self.guest_cid;
        let memory = activation.memory;
        let worker = Worker::spawn("vsock", move |mut poller| {
            if let Err(error) = serve(&mut poller, &host, &memory, guest_cid, rx, tx) {
                tracing::error!(%error, source = ?error, "vsock stops until the guest resets it");
                refuse_dials(&mut poller, &host);
            }
            host
        });
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.host = worker.stop();
        }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Works the queues until told to stop.
fn serve(
    poller: &mut Poller,
    host: &Host,
    memory: &GuestMemory,
    guest_cid: u64,
    rx: ActiveQueue,
    tx: ActiveQueue,
) -> Result<(), RingError> {
    let rx = Ring::new(memory, rx);
    let tx = Ring::new(memory, tx);
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    poller
        .add(rx.kick(), edge, RX_TOKEN)
        .and_then(|()| poller.add(tx.kick(), edge, TX_TOKEN))
        .and_then(|()| poller.add(&host.dial_event, edge, DIAL_TOKEN))
        .map_err(RingError::Poll)?;
    let mut muxer = Muxer::new(memory, guest_cid, rx, tx, &host.dialed);
    let mut events = Vec::new();
    // The driver may have kicked, and the shim dialled, before we listened.
    let mut busy = true;
    take_dials(&mut muxer, host, poller);
    loop {
        let ready = poller.wait(if busy { 0 } else { -1 });
        let Some(ready) = ready.map_err(RingError::Poll)? else {
            return Ok(());
        };
        events.clear();
        events.extend(ready.iter().map(|event| (event.data(), event.event_set())));
        for &(token, set) in &events {
            match token {
                RX_TOKEN | TX_TOKEN => {}
                DIAL_TOKEN => take_dials(&mut muxer, host, poller),
                _ => muxer.socket_ready(token, set, poller),
            }
        }
        busy = muxer.work(poller)?;
    }
}

fn take_dials(muxer: &mut Muxer<'_>, host: &Host, poller: &Poller) {
    while let Ok((port, stream)) = host.dials.try_recv() {
        muxer.dial(port, stream, poller);
    }
}

/// A device that no longer works closes what it is given, so that nobody waits.
fn refuse_dials(poller: &mut Poller, host: &Host) {
    loop {
        while host.dials.try_recv().is_ok() {}
        match poller.wait(-1) {
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return,
        }
    }
}
