//! The pod's network: from the interfaces a CNI plugin left in the pod's network
//! namespace to virtio-net devices.
//!
//! Beside each interface a tap is made, and the two are joined in the kernel:
//!
//! ```text
//!            pod's network namespace on the host              |  guest
//!  node ---- eth0 (veth) --ingress: redirect--> tap_2 --------|-> eth0
//!            eth0 (veth) <--redirect :ingress-- tap_2 <-------|-- same MAC, MTU, addresses, routes
//! ```
//!
//! The redirect is a tc filter on the ingress hook, which comes before the
//! namespace's own IP stack. So the interface keeps its addresses, as CNI's
//! `check` and node agents expect, and yet no frame reaches that stack: the
//! guest alone answers for them. No iptables, no bridge, no address of our own.
//!
//! Taps live as long as their descriptors. The filters go with the namespace; in one that
//! outlives its pod they would lead nowhere, and [`release`] takes them away. What changes in
//! the namespace while the machine runs, [`follow`] finds out.

mod bpf;
pub mod follow;
pub mod loopback;
mod netlink;
mod release;
mod rules;
mod tap;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nacre_protocol::agent::NetworkConfig;
use nacre_protocol::channel::FdList;
use nacre_protocol::vm::Nic;
use nix::sched::{CloneFlags, setns};

pub use netlink::Link;
use netlink::Netlink;
pub use release::release;

/// Smallest and largest number of queue pairs (`TAP_MAX_QUEUES` is 256; one
/// descriptor each).
const QUEUES: std::ops::RangeInclusive<u16> = 1..=64;

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The pod has the host's network.
    #[error(
        "the pod uses the host's network, which a VM cannot share: give it a network of its own \
         (Kubernetes: hostNetwork: false; ctr: without --net-host; nerdctl: without --net host)"
    )]
    HostNetwork,
    /// A number of queues out of range.
    #[error("{0} network queues; allowed: 1 to 64")]
    Queues(u16),
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused a netlink request.
    #[error("cannot {action} {interface}")]
    Netlink {
        /// What was tried.
        action: &'static str,
        /// On which interface, empty if on none.
        interface: String,
        /// Why.
        source: rtnetlink::Error,
    },
    /// A tap could not be made.
    #[error("cannot make tap {name}; is the tun module loaded?")]
    Tap {
        /// Name of the tap.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// An interface without what a network card has.
    #[error("interface {interface} has no usable {what}")]
    Interface {
        /// Its name.
        interface: String,
        /// What is missing.
        what: &'static str,
    },
}

/// A pod's network, ready for a VM.
#[derive(Debug, Default)]
pub struct PodNetwork {
    /// virtio-net devices.
    pub nics: Vec<HostNic>,
    /// What the agent configures, the interfaces in the order of their devices.
    pub config: NetworkConfig,
    /// Other interfaces that are up, of which it was said that the VM does not get them.
    pub others: Vec<String>,
}

/// A virtio-net device to be.
#[derive(Debug)]
pub struct HostNic {
    /// Index of the interface it stands for.
    pub index: u32,
    /// MAC address of the interface it stands for.
    pub mac: [u8; 6],
    /// MTU of that interface.
    pub mtu: u16,
    /// One tap descriptor per queue pair.
    pub taps: Vec<OwnedFd>,
    /// One vhost-net descriptor per queue pair, or none if the host has no
    /// `/dev/vhost-net`.
    pub vhost: Vec<OwnedFd>,
}

impl HostNic {
    /// It in a message to the monitor.
    pub fn describe<'a>(&'a self, list: &mut FdList<'a>) -> Nic {
        Nic {
            mac: self.mac,
            mtu: self.mtu,
            taps: self.taps.iter().map(|fd| list.push(fd.as_fd())).collect(),
            vhost: self.vhost.iter().map(|fd| list.push(fd.as_fd())).collect(),
        }
    }
}

/// What a network namespace holds.
#[derive(Debug, Default)]
pub struct Seen {
    /// Interfaces a VM can stand in for, by index.
    pub links: Vec<Link>,
    /// What is configured of them, the interfaces in the same order, without cards; routes
    /// in an order in which they can be added.
    pub config: NetworkConfig,
    /// Other interfaces that are up.
    pub others: Vec<String>,
}

impl Seen {
    async fn by(netlink: &Netlink) -> Result<Self, NetworkError> {
        let (links, others) = netlink.links().await?;
        let config = NetworkConfig {
            interfaces: netlink.interfaces(&links).await?,
            routes: netlink.routes(&links).await?,
            rules: netlink.rules().await?,
            neighbors: netlink.neighbors(&links).await?,
            ..Default::default()
        };
        Ok(Self {
            links,
            config,
            others,
        })
    }
}

/// The interfaces that a VM does not get.
pub fn complain<'a>(others: impl IntoIterator<Item = &'a String>) {
    for interface in others {
        tracing::warn!(
            interface,
            "not a veth, macvlan or ipvlan with a MAC address and an MTU up to 65535: the VM does \
             not get it"
        );
    }
}

/// Joins every interface of `netns` to a tap of its own with `queues` queue
/// pairs. A namespace with nothing but `lo` gives an empty network.
///
/// Blocks for a few netlink round trips; runs on a thread of its own, since a
/// network namespace belongs to a thread.
///
/// # Errors
///
/// `HostNetwork` if `netns` is the host's; what the kernel refused otherwise.
pub fn prepare(netns: &File, queues: u16) -> Result<PodNetwork, NetworkError> {
    if !QUEUES.contains(&queues) {
        return Err(NetworkError::Queues(queues));
    }
    refuse_host_network(netns)?;
    with_netlink(netns, async |netlink| {
        let seen = Seen::by(netlink).await?;
        complain(&seen.others);
        let mut nics = Vec::new();
        for link in &seen.links {
            nics.push(join_one(netlink, link, queues).await?);
        }
        Ok(PodNetwork {
            nics,
            config: seen.config,
            others: seen.others,
        })
    })
}

/// Looks at what is in `netns` now. Blocks, as [`prepare`] does.
///
/// # Errors
///
/// What the kernel refused.
pub fn look(netns: &File) -> Result<Seen, NetworkError> {
    with_netlink(netns, async |netlink| Seen::by(netlink).await)
}

/// Joins an interface of `netns` to a tap as [`prepare`] does, and blocks so.
///
/// # Errors
///
/// What the kernel refused.
pub fn join(netns: &File, link: &Link, queues: u16) -> Result<HostNic, NetworkError> {
    with_netlink(netns, async |netlink| join_one(netlink, link, queues).await)
}

/// Joins an interface of `netns` to its tap, which is there. Blocks, as [`prepare`] does.
///
/// # Errors
///
/// What the kernel refused.
pub fn rejoin(netns: &File, link: &Link) -> Result<(), NetworkError> {
    with_netlink(netns, async |netlink| {
        netlink.join(link, &link.tap_name()).await
    })
}

/// Undoes the part of [`join`] that does not go with the taps: frames that come to the
/// interface are the namespace's again.
///
/// # Errors
///
/// What the kernel refused.
pub fn part(netns: &File, link: &Link) -> Result<(), NetworkError> {
    with_netlink(netns, async |netlink| netlink.part(link).await)
}

async fn join_one(netlink: &Netlink, link: &Link, queues: u16) -> Result<HostNic, NetworkError> {
    let taps = tap::open(&link.tap_name(), queues)?;
    let vhost = tap::open_vhost(queues)?;
    netlink.join(link, &link.tap_name()).await?;
    Ok(HostNic {
        index: link.index,
        mac: link.mac,
        mtu: link.mtu,
        taps,
        vhost,
    })
}

/// Does `work` on a thread inside `netns`, with a connection to the kernel there.
fn with_netlink<T: Send>(
    netns: &File,
    work: impl AsyncFnOnce(&Netlink) -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    in_netns(netns, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(system("start a runtime"))?;
        runtime.block_on(async { work(&Netlink::open()?).await })
    })
}

fn refuse_host_network(netns: &File) -> Result<(), NetworkError> {
    let look = system("look at network namespaces");
    let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    let pod = identity(netns.metadata().map_err(&look)?);
    let own = identity(std::fs::metadata("/proc/self/ns/net").map_err(&look)?);
    let init = match std::fs::metadata("/proc/1/ns/net") {
        Ok(metadata) => Some(identity(metadata)),
        // A shim without CAP_SYS_PTRACE, as in a container; its own is what it
        // can tell.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
        Err(error) => return Err(look(error)),
    };
    if pod == own || Some(pod) == init {
        return Err(NetworkError::HostNetwork);
    }
    Ok(())
}

/// The same namespace by a descriptor to keep: one that was opened by its path keeps what is
/// mounted there busy, and whoever made the namespace could not unmount it.
///
/// # Errors
///
/// What the kernel refused.
pub fn unmounted(netns: &File) -> Result<File, NetworkError> {
    in_netns(netns, || {
        File::open("/proc/thread-self/ns/net").map_err(system("open the pod's network namespace"))
    })
}

/// Runs `work` on a thread inside `netns`.
fn in_netns<T: Send>(
    netns: &File,
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    std::thread::scope(|scope| {
        let inside = || {
            setns(netns, CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
                .map_err(system("enter the pod's network namespace"))?;
            work()
        };
        // A pod may have as many threads as its limit of processes says.
        let worker = std::thread::Builder::new()
            .spawn_scoped(scope, inside)
            .map_err(system("start a thread"))?;
        worker.join().unwrap_or_else(|_| {
            Err(system("finish the network")(io::Error::other(
                "the thread panicked",
            )))
        })
    })
}

fn system(action: &'static str) -> impl Fn(io::Error) -> NetworkError {
    move |source| NetworkError::System { action, source }
}

#[cfg(test)]
pub(crate) mod tests;
