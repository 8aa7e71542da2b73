//! What changes in a pod's network namespace while its machine runs.
//!
//! rtnetlink(7) tells that something has changed; what has, is found by looking, since
//! what it tells may get lost, and a CNI plugin makes a dozen changes at once. The
//! socket belongs to the namespace it was made in, whichever thread reads it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nacre_protocol::agent::{Interface, NetworkConfig};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;

use super::{NetworkError, in_netns, system};

/// What is heard of: interfaces, addresses, routes, rules, neighbours.
const GROUPS: libc::c_int = libc::RTMGRP_LINK
    | libc::RTMGRP_NEIGH
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV4_RULE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE
    | 1 << (libc::RTNLGRP_IPV6_RULE - 1);

/// Hears of changes in a namespace.
pub struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    /// Those in `netns` from now on.
    ///
    /// # Errors
    ///
    /// What the kernel refused.
    pub fn of(netns: &File) -> Result<Self, NetworkError> {
        let socket = in_netns(netns, || {
            open().map_err(system("listen to changes of the pod's network"))
        })?;
        // SAFETY: an OwnedFd names the same open descriptor until it is dropped,
        // and the AsyncFd deregisters it before that.
        let socket = unsafe { AsyncFd::register(socket) };
        let socket = socket.map_err(io::Error::from);
        Ok(Self(socket.map_err(system("watch a netlink socket"))?))
    }

    /// Returns when something has changed since the last call.
    ///
    /// # Errors
    ///
    /// Those of recv(2).
    pub async fn next(&self) -> io::Result<()> {
        loop {
            let mut guard = self.0.readable().await?;
            let mut has_changed = false;
            loop {
                match take(guard.get_inner()) {
                    // Or what was told is lost, which also tells that there was something.
                    Ok(()) | Err(Errno::ENOBUFS) => has_changed = true,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => break,
                    Err(errno) => return Err(errno.into()),
                }
            }
            guard.clear_ready();
            if has_changed {
                return Ok(());
            }
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkRoute,
    )?;
    bind(
        socket.as_raw_fd(),
        &NetlinkAddr::new(0, GROUPS.cast_unsigned()),
    )?;
    Ok(socket)
}

/// Takes a message off the socket; what does not fit is lost with it.
fn take(socket: &OwnedFd) -> Result<(), Errno> {
    let mut start = [0; 16];
    recv(socket.as_raw_fd(), &mut start, MsgFlags::empty()).map(drop)
}

/// What is to be taken away from a guest with `given`, and what it is to get, so that
/// it has `wanted`. An interface is known by its card; with its card goes, unasked, all
/// that is configured of it ([`forget`]).
pub fn difference(given: &NetworkConfig, wanted: &NetworkConfig) -> (NetworkConfig, NetworkConfig) {
    let removed = NetworkConfig {
        interfaces: wanted
            .interfaces
            .iter()
            .filter_map(|new| without(find(given, new)?, new))
            .collect(),
        routes: missing(&given.routes, &wanted.routes),
        rules: missing(&given.rules, &wanted.rules),
        neighbors: missing(&given.neighbors, &wanted.neighbors),
        ..Default::default()
    };
    let added = NetworkConfig {
        interfaces: wanted
            .interfaces
            .iter()
            .filter_map(|new| match find(given, new) {
                Some(old) => changed(old, new),
                None => Some(new.clone()),
            })
            .collect(),
        routes: missing(&wanted.routes, &given.routes),
        rules: missing(&wanted.rules, &given.rules),
        neighbors: missing(&wanted.neighbors, &given.neighbors),
        ..Default::default()
    };
    (removed, added)
}

/// A guest with `given` has lost a card, and with it what was configured of it.
pub fn forget(given: &mut NetworkConfig, card: &str) {
    let lost = |interface: &&Interface| interface.card == card;
    let Some(name) = given.interfaces.iter().find(lost).map(|one| &one.name) else {
        return;
    };
    given.routes.retain(|route| route.device != *name);
    given.neighbors.retain(|neighbor| neighbor.device != *name);
    given.interfaces.retain(|interface| interface.card != card);
}

fn find<'a>(config: &'a NetworkConfig, interface: &Interface) -> Option<&'a Interface> {
    let mut interfaces = config.interfaces.iter();
    interfaces.find(|other| other.card == interface.card)
}

/// What is in `one` and not in `other`, in its order.
fn missing<T: Clone + PartialEq>(one: &[T], other: &[T]) -> Vec<T> {
    let missing = one.iter().filter(|item| !other.contains(item));
    missing.cloned().collect()
}

/// The addresses an interface has no more.
fn without(old: &Interface, new: &Interface) -> Option<Interface> {
    let addresses = missing(&old.addresses, &new.addresses);
    (!addresses.is_empty()).then(|| Interface {
        addresses,
        ..old.clone()
    })
}

/// What is new of an interface.
fn changed(old: &Interface, new: &Interface) -> Option<Interface> {
    let added = Interface {
        addresses: missing(&new.addresses, &old.addresses),
        ..new.clone()
    };
    let nothing = Interface {
        addresses: Vec::new(),
        ..old.clone()
    };
    (added != nothing).then_some(added)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nacre_protocol::agent::{Neighbor, Route, Rule};

    fn interface(card: &str, name: &str, addresses: &[&str]) -> Interface {
        Interface {
            card: card.into(),
            name: name.into(),
            addresses: addresses.iter().map(|&address| address.into()).collect(),
            ..Default::default()
        }
    }

    fn route(device: &str, gateway: &str) -> Route {
        Route {
            device: device.into(),
            gateway: gateway.into(),
            ..Default::default()
        }
    }

    fn config(interfaces: &[Interface], routes: &[Route]) -> NetworkConfig {
        NetworkConfig {
            interfaces: interfaces.into(),
            routes: routes.into(),
            ..Default::default()
        }
    }

    #[test]
    fn what_differs_is_taken_and_given() {
        let given = config(
            &[
                interface("5", "eth0", &["a", "b"]),
                interface("6", "eth1", &["c"]),
            ],
            &[route("eth0", "x"), route("eth0", "y")],
        );
        let wanted = config(
            &[
                interface("5", "eth0", &["b", "d"]),
                interface("6", "net1", &["c"]),
                interface("7", "eth2", &["e"]),
            ],
            &[route("eth2", "z"), route("eth0", "y")],
        );
        let (removed, added) = difference(&given, &wanted);
        let gone = config(&[interface("5", "eth0", &["a"])], &[route("eth0", "x")]);
        assert_eq!(removed, gone);
        let new = config(
            &[
                interface("5", "eth0", &["d"]),
                interface("6", "net1", &[]),
                interface("7", "eth2", &["e"]),
            ],
            &[route("eth2", "z")],
        );
        assert_eq!(added, new);
        let nothing = NetworkConfig::default();
        assert_eq!(difference(&wanted, &wanted), (nothing.clone(), nothing));
    }

    #[test]
    fn with_a_card_goes_what_is_configured_of_it() {
        let neighbor = |device: &str| Neighbor {
            device: device.into(),
            ..Default::default()
        };
        let rules = vec![Rule::default()];
        let mut given = NetworkConfig {
            rules: rules.clone(),
            neighbors: vec![neighbor("eth1"), neighbor("eth0")],
            ..config(
                &[interface("5", "eth0", &[]), interface("6", "eth1", &[])],
                &[route("eth1", "x"), route("eth0", "y")],
            )
        };
        forget(&mut given, "6");
        let left = NetworkConfig {
            rules,
            neighbors: vec![neighbor("eth0")],
            ..config(&[interface("5", "eth0", &[])], &[route("eth0", "y")])
        };
        assert_eq!(given, left);
        forget(&mut given, "6");
        assert_eq!(given, left);
    }
}
