//! The pod's loopback, as seen from its network namespace on the host.
//!
//! `kubectl port-forward` makes containerd dial 127.0.0.1 in the pod's network
//! namespace: the host's side of it, where no program of the pod listens. So the
//! shim does, on behalf of every port: a BPF program of the namespace
//! (`BPF_PROG_TYPE_SK_LOOKUP`) leads each TCP connection that would go to a
//! socket of the namespace to one of two listeners, by IPv4 or IPv6. Each then
//! goes by vsock to the agent, which dials the guest's loopback.
//!
//! ```text
//! containerd -> 127.0.0.1:port --sk_lookup--> shim --vsock, "port"--> agent -> 127.0.0.1:port
//! ```
//! Frames of pod and guest never reach this stack (see [`super`]), so nobody
//! gets here but those who enter the namespace on the host. Program, map and
//! link live as long as their descriptors.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nacre_protocol::guest::FORWARD_PORT;
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use super::bpf;
use super::{NetworkError, in_netns, system};
use crate::machine::Machine;

/// The listeners of a namespace and what leads connections to them.
pub struct Loopback {
    listeners: Vec<StdListener>,
    _steering: OwnedFd,
}

/// Listens on the loopback of `netns`, on all ports.
///
/// # Errors
///
/// What the kernel refused.
pub fn listen(netns: &File) -> Result<Loopback, NetworkError> {
    in_netns(netns, || {
        let mut listeners = Vec::new();
        let any_port: [SocketAddr; 2] = [
            (Ipv4Addr::LOCALHOST, 0).into(),
            (Ipv6Addr::LOCALHOST, 0).into(),
        ];
        for address in any_port {
            match StdListener::bind(address) {
                Ok(listener) => listeners.push(listener),
                // A host without IPv6.
                Err(error) if address.is_ipv6() => debug!(%error, "no IPv6 loopback"),
                Err(error) => return Err(system("listen on the pod's loopback")(error)),
            }
        }
        let sockets: Vec<BorrowedFd<'_>> = listeners.iter().map(AsFd::as_fd).collect();
        let steering = bpf::steer(netns.as_fd(), &sockets)
            .map_err(system("lead connections to the pod's loopback"))?;
        Ok(Loopback {
            listeners,
            _steering: steering,
        })
    })
}

impl Loopback {
    /// Joins connections to the guest until the machine is dead.
    pub async fn serve(self, machine: Arc<dyn Machine>) {
        let mut accepting = tokio::task::JoinSet::new();
        for listener in self.listeners {
            let machine = machine.clone();
            accepting.spawn(async move {
                if let Err(error) = accept(listener, machine).await {
                    warn!(%error, "the pod's loopback is not served any more");
                }
            });
        }
        machine.stopped().await;
    }
}

async fn accept(listener: StdListener, machine: Arc<dyn Machine>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (connection, _) = listener.accept().await?;
        let machine = machine.clone();
        tokio::spawn(async move {
            if let Err(error) = join(connection, &*machine).await {
                debug!(error = crate::error::chain(&*error), "forwarded connection");
            }
        });
    }
}

async fn join(
    mut connection: TcpStream,
    machine: &dyn Machine,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // The one that was dialled: the listener's own is another.
    let port = connection.local_addr()?.port();
    let mut guest = machine.connect(FORWARD_PORT).await?;
    guest.write_all(&port.to_le_bytes()).await?;
    tokio::select! {
        copied = copy_bidirectional(&mut connection, &mut guest) => copied.map(drop)?,
        _ = machine.stopped() => (),
    }
    Ok(())
}
