//! Over TCP: the bytes to the sender's half-close, then the receiver's sum of them.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use super::data::{self, Source, Sum};

/// What is written and read at once: segmentation offload has large packets to make.
const PIECE: usize = 256 << 10;
/// How long the other end may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sends bytes, and has them compared.
pub fn send(address: SocketAddr, bytes: u64) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).context("connect")?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut source = Source::new(data::seed());
    let mut sum = Sum::default();
    let mut piece = vec![0; PIECE];
    while sum.bytes < bytes {
        let left = usize::try_from(bytes - sum.bytes).unwrap_or(PIECE);
        let piece = &mut piece[..left.min(PIECE)];
        source.fill(piece);
        sum.add(piece);
        stream.write_all(piece).context("send")?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut answer = [0; Sum::LEN];
    stream.read_exact(&mut answer).context("hear the sum")?;
    data::compare(sum, Sum::of_bytes(answer))
}

pub struct Server(TcpListener);

impl Server {
    pub fn bind(address: SocketAddr) -> Result<Self> {
        Ok(Self(TcpListener::bind(address).context("listen by TCP")?))
    }

    /// Takes one after another.
    pub fn serve(&self) {
        for stream in self.0.incoming() {
            if let Err(error) = stream.and_then(receive) {
                eprintln!("nacre-wire: TCP: {error}");
            }
        }
    }
}

fn receive(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut sum = Sum::default();
    let mut piece = vec![0; PIECE];
    loop {
        let len = read_piece(&mut stream, &mut piece)?;
        sum.add(&piece[..len]);
        if len < PIECE {
            return stream.write_all(&sum.to_bytes());
        }
    }
}

/// Fills it as far as there are bytes.
fn read_piece(stream: &mut TcpStream, piece: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match stream.read(&mut piece[filled..])? {
            0 => break,
            len => filled += len,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn bytes_arrive_however_many() {
        let server = Server::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = server.0.local_addr().unwrap();
        std::thread::spawn(move || server.serve());
        for bytes in [8, PIECE as u64, 3 * PIECE as u64 + 16] {
            send(address, bytes).unwrap();
        }
    }

    #[test]
    fn what_is_lost_is_told() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            let mut sum = Sum::default();
            sum.add(&bytes[8..]);
            stream.write_all(&sum.to_bytes()).unwrap();
        });
        let error = send(address, 64).unwrap_err().to_string();
        assert!(
            error.starts_with("64 bytes were sent, 56 arrived"),
            "{error}"
        );
        server.join().unwrap();
    }
}
