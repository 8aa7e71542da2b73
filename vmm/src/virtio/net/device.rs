//! The device: features, configuration space, and who moves the packets.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_net as spec;

use super::pair::{self, Queues, Receive};
use super::tap::{HEADER_BYTES, Tap};
use super::vhost::Vhost;
use super::{NetError, control};
use crate::virtio::ring::RingError;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, GuestMemory, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1, VirtioDevice,
};
use crate::worker::Worker;

/// Device type (virtio 1.2, 5).
pub const DEVICE_TYPE: u16 = 1;
const QUEUE_SIZE: u16 = 256;
/// Most queue pairs; a tap has no more queues (`MAX_TAP_QUEUES`).
pub const MAX_PAIRS: usize = 256;
/// Least MTU (virtio 1.2, 5.1.4.1).
const MIN_MTU: u16 = 68;
/// Ethernet header and two VLAN tags.
const LINK_BYTES: usize = 14 + 8;
/// Largest packet with segmentation offload (virtio 1.2, 5.1.6.3.1).
const MAX_SEGMENTED_BYTES: usize = 65550 + HEADER_BYTES;

/// Offloads to the guest: the driver's feature, the tap's flag.
const OFFLOADS: [(u32, libc::c_uint); 3] = [
    (spec::VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (spec::VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (spec::VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
];

const fn bits(features: &[u32]) -> u64 {
    let mut set = 0;
    let mut index = 0;
    while index < features.len() {
        set |= 1 << features[index];
        index += 1;
    }
    set
}

/// What works over any tap.
const FEATURES: u64 = VIRTIO_F_VERSION_1
    | bits(&[
        spec::VIRTIO_NET_F_MAC,
        spec::VIRTIO_NET_F_MTU,
        spec::VIRTIO_NET_F_STATUS,
        spec::VIRTIO_NET_F_CSUM,
        spec::VIRTIO_NET_F_GUEST_CSUM,
        spec::VIRTIO_NET_F_HOST_TSO4,
        spec::VIRTIO_NET_F_HOST_TSO6,
        spec::VIRTIO_NET_F_GUEST_TSO4,
        spec::VIRTIO_NET_F_GUEST_TSO6,
    ]);
/// What whoever works the rings must know.
const RING_FEATURES: u64 = VIRTIO_F_VERSION_1
    | VIRTIO_F_EVENT_IDX
    | VIRTIO_F_INDIRECT_DESC
    | bits(&[spec::VIRTIO_NET_F_MRG_RXBUF]);
/// What several pairs need.
const MULTI_QUEUE: u64 = bits(&[spec::VIRTIO_NET_F_CTRL_VQ, spec::VIRTIO_NET_F_MQ]);

/// The device.
pub struct Net {
    mac: [u8; 6],
    mtu: u16,
    features: u64,
    taps: Arc<[Tap]>,
    /// One per tap queue, or none.
    vhost: Vec<Vhost>,
    workers: Vec<Worker<()>>,
    active: bool,
}

impl Net {
    /// A device with as many queue pairs as there are tap queues. With a vhost
    /// descriptor for each the kernel moves the packets.
    ///
    /// # Errors
    ///
    /// When the numbers do not fit, the MTU is too small, or a descriptor is
    /// not what it should be.
    pub fn new(
        mac: [u8; 6],
        mtu: u16,
        taps: Vec<OwnedFd>,
        vhost: Vec<OwnedFd>,
    ) -> Result<Self, NetError> {
        if taps.is_empty() || taps.len() > MAX_PAIRS {
            return Err(NetError::Taps(taps.len()));
        }
        if !vhost.is_empty() && vhost.len() != taps.len() {
            return Err(NetError::Vhost {
                taps: taps.len(),
                vhost: vhost.len(),
            });
        }
        if mtu < MIN_MTU {
            return Err(NetError::Mtu(mtu));
        }
        let taps: Vec<Tap> = taps.into_iter().map(Tap::new).collect::<Result<_, _>>()?;
        let vhost: Vec<Vhost> = vhost.into_iter().map(Vhost::new).collect();
        let mut features = FEATURES | RING_FEATURES;
        if let Some(first) = vhost.first() {
            features &= first.features()? | !RING_FEATURES;
        }
        if taps.len() > 1 {
            features |= MULTI_QUEUE;
        }
        Ok(Self {
            mac,
            mtu,
            features,
            taps: taps.into(),
            vhost,
            workers: Vec::new(),
            active: false,
        })
    }

    /// `struct virtio_net_config` up to `mtu` (virtio 1.2, 5.1.4).
    fn config(&self) -> impl Iterator<Item = u8> {
        // At most MAX_PAIRS.
        let pairs = u16::try_from(self.taps.len()).unwrap_or(u16::MAX);
        let status: u16 = 1; // VIRTIO_NET_S_LINK_UP
        let numbers = [status, pairs, self.mtu].map(u16::to_le_bytes);
        self.mac.into_iter().chain(numbers.into_iter().flatten())
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let memory = activation.memory;
        let (pairs, control) = split(activation.queues, features, self.taps.len())?;
        self.set_up_tap(features).map_err(|error| refused(&error))?;
        let usable = pairs.len();
        for (index, queues) in pairs.into_iter().enumerate() {
            self.start_pair(index, &memory, features, queues)?;
        }
        if let Some(queue) = control {
            self.start_control(memory, queue, usable)?;
        }
        Ok(())
    }

    /// Offloads as accepted, and one pair until the driver asks for more.
    fn set_up_tap(&self, features: u64) -> Result<(), NetError> {
        if let Some(first) = self.taps.first() {
            let flags = OFFLOADS
                .iter()
                .filter(|(bit, _)| features & (1 << bit) != 0);
            first.set_offload(flags.fold(0, |set, (_, flag)| set | flag))?;
        }
        attach(&self.taps, 1)
    }

    fn start_pair(
        &mut self,
        index: usize,
        memory: &GuestMemory,
        features: u64,
        queues: Queues,
    ) -> Result<(), ActivateError> {
        let taps = Arc::clone(&self.taps);
        if let (Some(vhost), Some(tap)) = (self.vhost.get_mut(index), taps.get(index)) {
            let common = features & self.features & RING_FEATURES;
            return vhost
                .start(memory, common, &queues, tap)
                .map_err(|error| refused(&error));
        }
        let receive = self.receive(features);
        let memory = memory.clone();
        let worker = Worker::spawn(&format!("net{index}"), move |mut poller| {
            let Some(tap) = taps.get(index) else {
                return;
            };
            report(pair::serve(&mut poller, &memory, queues, tap, receive));
        });
        self.workers.push(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn receive(&self, features: u64) -> Receive {
        let segmented = bits(&[spec::VIRTIO_NET_F_GUEST_TSO4, spec::VIRTIO_NET_F_GUEST_TSO6]);
        Receive {
            mergeable: features & bits(&[spec::VIRTIO_NET_F_MRG_RXBUF]) != 0,
            max_bytes: if features & segmented == 0 {
                usize::from(self.mtu) + LINK_BYTES + HEADER_BYTES
            } else {
                MAX_SEGMENTED_BYTES
            },
        }
    }

    fn start_control(
        &mut self,
        memory: GuestMemory,
        queue: ActiveQueue,
        usable: usize,
    ) -> Result<(), ActivateError> {
        let taps = Arc::clone(&self.taps);
        let worker = Worker::spawn("net-control", move |mut poller| {
            let mut set_pairs = |wanted: u16| {
                let wanted = usize::from(wanted);
                if !(1..=usable).contains(&wanted) {
                    return false;
                }
                let attached = attach(&taps, wanted);
                if let Err(error) = &attached {
                    tracing::warn!(%error, source = ?error, wanted, "queue pairs");
                }
                attached.is_ok()
            };
            report(control::serve(&mut poller, &memory, queue, &mut set_pairs));
        });
        self.workers.push(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let pairs = self.taps.len();
        vec![QUEUE_SIZE; 2 * pairs + usize::from(pairs > 1)]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let fields = self.config().skip(start).chain(std::iter::repeat(0));
        for (byte, value) in data.iter_mut().zip(fields) {
            *byte = value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.active {
            return Err(ActivateError::Unavailable);
        }
        self.active = true;
        let started = self.start(activation);
        if started.is_err() {
            self.reset();
        }
        started
    }

    fn reset(&mut self) {
        for worker in self.workers.drain(..) {
            worker.stop();
        }
        if std::mem::take(&mut self.active) {
            self.vhost.iter_mut().for_each(Vhost::stop);
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Sorts the queues (virtio 1.2, 5.1.2): receive and transmit of each pair in
/// turn, then the control queue, whose place depends on whether the driver
/// knows of several pairs.
fn split(
    mut queues: Vec<Option<ActiveQueue>>,
    features: u64,
    offered: usize,
) -> Result<(Vec<Queues>, Option<ActiveQueue>), ActivateError> {
    let has = |feature: u32| features & (1 << feature) != 0;
    let known = if has(spec::VIRTIO_NET_F_MQ) {
        offered
    } else {
        1
    };
    let control = has(spec::VIRTIO_NET_F_CTRL_VQ)
        .then(|| queues.get_mut(2 * known).and_then(Option::take))
        .flatten();
    let mut queues = queues.into_iter().take(2 * known);
    let mut pairs = Vec::new();
    while let (Some(Some(rx)), Some(Some(tx))) = (queues.next(), queues.next()) {
        pairs.push(Queues { rx, tx });
    }
    if pairs.is_empty() {
        return Err(ActivateError::QueueDisabled(0));
    }
    Ok((pairs, control))
}

/// Lets the first `count` queues of the tap have all its packets.
fn attach(taps: &[Tap], count: usize) -> Result<(), NetError> {
    taps.iter()
        .enumerate()
        .try_for_each(|(index, tap)| tap.set_attached(index < count))
}

fn refused(error: &NetError) -> ActivateError {
    ActivateError::Backend(format!("{error}: {:?}", std::error::Error::source(error)))
}

fn report(result: Result<(), RingError>) {
    if let Err(error) = result {
        tracing::error!(%error, source = ?error, "network stops until the guest resets it");
    }
}
