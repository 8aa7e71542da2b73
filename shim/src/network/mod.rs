//! The pod's network: from the interfaces a CNI plugin left in the pod's network
//! namespace to virtio-net devices.
//!
//! Beside each interface a tap is made, and the two are joined in the kernel:
//!
//! ```text
//!            pod's network namespace on the host              |  guest
//!  node ---- eth0 (veth) --ingress: redirect--> tap_eth0 -----|-> eth0
//!            eth0 (veth) <--redirect :ingress-- tap_eth0 <----|-- same MAC, MTU, addresses, routes
//! ```
//!
//! The redirect is a tc filter on the ingress hook, which comes before the
//! namespace's own IP stack. So the interface keeps its addresses, as CNI's
//! `check` and node agents expect, and yet no frame reaches that stack: the
//! guest alone answers for them. No iptables, no bridge, no address of our own.
//!
//! Taps live as long as their descriptors, and the filters go with the
//! namespace; there is nothing to clean up.

mod bpf;
pub mod loopback;
mod netlink;
mod rules;
mod tap;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use nacre_protocol::agent;
use nix::sched::{CloneFlags, setns};

use netlink::Netlink;

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
    /// What the agent configures: interfaces,
    pub interfaces: Vec<agent::Interface>,
    /// routes, in an order in which they can be added,
    pub routes: Vec<agent::Route>,
    /// rules of which table they are looked up in,
    pub rules: Vec<agent::Rule>,
    /// and permanent neighbours.
    pub neighbors: Vec<agent::Neighbor>,
}

/// A virtio-net device to be.
#[derive(Debug)]
pub struct HostNic {
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
    in_netns(netns, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(system("start a runtime"))?;
        runtime.block_on(join_all(queues))
    })
}

async fn join_all(queues: u16) -> Result<PodNetwork, NetworkError> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let mut network = PodNetwork::default();
    for link in &links {
        let taps = tap::open(&link.tap_name(), queues)?;
        netlink.join(link, &link.tap_name()).await?;
        network.nics.push(HostNic {
            mac: link.mac,
            mtu: link.mtu,
            taps,
            vhost: tap::open_vhost(queues)?,
        });
    }
    network.interfaces = netlink.interfaces(&links).await?;
    network.routes = netlink.routes(&links).await?;
    network.rules = netlink.rules().await?;
    network.neighbors = netlink.neighbors(&links).await?;
    Ok(network)
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

/// Runs `work` on a thread inside `netns`.
fn in_netns<T: Send>(
    netns: &File,
    work: impl FnOnce() -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
                .map_err(system("enter the pod's network namespace"))?;
            work()
        });
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
mod tests;
