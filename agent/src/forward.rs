//! Connections to the pod's loopback that arrived on the host, as those of
//! `kubectl port-forward` do. Each comes by vsock, says its TCP port and is
//! joined to a connection from here: to the guest's loopback or, when nobody
//! listens there, to an address of the pod.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::error::{Context, Error, Result};
use crate::io::Stream;
use crate::streams::{StreamListener, read_exact};

/// How long a connection may take to say its port.
const LIMIT: Duration = Duration::from_secs(10);
/// Bytes copied at a time.
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
    let host = Arc::new(Stream::new(connection).context("register")?);
    let mut port = [0; 2];
    timeout(LIMIT, read_exact(&host, &mut port))
        .await
        .map_err(|_| Error::Internal("no port in time".into()))?
        .context("read the port")?;
    let server = Arc::new(dial(u16::from_le_bytes(port)).await?);
    let there = tokio::spawn(copy(host.clone(), server.clone()));
    let back = copy(server, host).await;
    back.context("copy from the server")?;
    let there = there
        .await
        .map_err(|error| Error::Internal(error.to_string()))?;
    there.context("copy to the server")
}

/// What listens on `localhost` may do so by either protocol.
async fn dial(port: u16) -> Result<Stream> {
    let mut addresses: Vec<SocketAddr> = vec![
        (Ipv4Addr::LOCALHOST, port).into(),
        (Ipv6Addr::LOCALHOST, port).into(),
    ];
    addresses.extend(own_addresses(port)?);
    let connected = TcpStream::connect(&addresses[..]).await;
    let connection = connected.with_context(|| format!("connect to port {port}"))?;
    let connection = connection.into_std().context("leave the reactor")?;
    Stream::new(connection.into()).context("register")
}

/// The guest's addresses, loopback among them.
fn own_addresses(port: u16) -> Result<impl Iterator<Item = SocketAddr>> {
    let interfaces = getifaddrs().context("list the pod's addresses")?;
    Ok(interfaces.filter_map(move |interface| {
        let address = interface.address?;
        let ipv4 = || Some((address.as_sockaddr_in()?.ip(), port).into());
        // Its scope is the interface of a link-local address.
        let ipv6 = || {
            let address = address.as_sockaddr_in6()?;
            Some(SocketAddrV6::new(address.ip(), port, 0, address.scope_id()).into())
        };
        ipv4().or_else(ipv6)
    }))
}

/// Copies to the end, and passes it on.
async fn copy(from: Arc<Stream>, to: Arc<Stream>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let bytes = from.read(&mut buffer).await?;
        let Some(read) = buffer.get(..bytes).filter(|read| !read.is_empty()) else {
            return to.end_output();
        };
        to.write_all(read).await?;
    }
}
