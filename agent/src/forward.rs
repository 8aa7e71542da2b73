//! Connections to the pod's loopback that arrived on the host, as those of
//! `kubectl port-forward` do. Each comes by vsock, says its TCP port and is
//! joined to a connection from here: to the guest's loopback or, when nobody
//! listens there, to an address of the pod.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use tokio::io::{AsyncReadExt, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::error::{Context, Error, Result};
use crate::io::Stream;
use crate::streams::StreamListener;

/// How long a connection may take to say its port.
const LIMIT: Duration = Duration::from_secs(10);
/// Bytes copied at a time, each way.
const CHUNK: usize = 16 * 1024;

/// Joins connections for as long as the agent runs.
pub async fn run(listener: StreamListener) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                tokio::spawn(async move {
                    if let Err(error) = join(connection).await {
                        tracing::debug!("forwarded connection: {}", error.full());
                    }
                });
            }
            Err(error) => {
                tracing::error!("listener of forwarded connections: {error}");
                return;
            }
        }
    }
}

async fn join(connection: OwnedFd) -> Result<()> {
    let mut host = Stream::new(connection).context("register")?;
    let port = timeout(LIMIT, host.read_u16_le())
        .await
        .map_err(|_| Error::Internal("no port in time".into()))?
        .context("read the port")?;
    let mut server = dial(port).await?;
    copy_bidirectional_with_sizes(&mut host, &mut server, CHUNK, CHUNK)
        .await
        .context("copy")?;
    Ok(())
}

/// What listens on `localhost` may do so by either protocol.
async fn dial(port: u16) -> Result<TcpStream> {
    let mut addresses: Vec<SocketAddr> = vec![
        (Ipv4Addr::LOCALHOST, port).into(),
        (Ipv6Addr::LOCALHOST, port).into(),
    ];
    addresses.extend(own_addresses(port)?);
    let connected = TcpStream::connect(&addresses[..]).await;
    connected.with_context(|| format!("connect to port {port}"))
}

/// The guest's addresses, without the loopback's.
fn own_addresses(port: u16) -> Result<impl Iterator<Item = SocketAddr>> {
    let interfaces = getifaddrs().context("list the pod's addresses")?;
    let addresses = interfaces.filter_map(move |interface| {
        let address = interface.address?;
        let ipv4 = || Some((address.as_sockaddr_in()?.ip(), port).into());
        // Its scope is the interface of a link-local address.
        let ipv6 = || {
            let address = address.as_sockaddr_in6()?;
            Some(SocketAddrV6::new(address.ip(), port, 0, address.scope_id()).into())
        };
        ipv4().or_else(ipv6)
    });
    Ok(addresses.filter(|address: &SocketAddr| !address.ip().is_loopback()))
}
