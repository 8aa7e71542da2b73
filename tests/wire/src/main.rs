//! `nacre-wire`: carries bytes from one machine to another and finds out whether they
//! are those that arrived. The tests run one end in a pod, the other in a pod or on
//! the host.
//!
//! ```text
//! nacre-wire serve ADDRESS            takes them by TCP and by UDP, until it is killed
//! nacre-wire tcp|udp ADDRESS BYTES    sends so many; both ends must have the same sum
//! ```
//! A network may lose datagrams, so that alone is no failure: udp.rs sends them again,
//! and the number of those is printed.

mod data;
mod tcp;
mod udp;

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nacre-wire: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["serve", address] => serve(parse(address)?),
        ["tcp", address, bytes] => {
            let bytes = data::size(bytes)?;
            tcp::send(parse(address)?, bytes)?;
            println!("{bytes} bytes");
            Ok(())
        }
        ["udp", address, bytes] => {
            let bytes = data::size(bytes)?;
            let again = udp::send(parse(address)?, bytes)?;
            println!("{bytes} bytes, {again} datagrams sent again");
            Ok(())
        }
        _ => bail!("serve ADDRESS, tcp ADDRESS BYTES or udp ADDRESS BYTES"),
    }
}

fn parse(address: &str) -> Result<SocketAddr> {
    address
        .parse()
        .with_context(|| format!("{address:?} is no address and port"))
}

fn serve(address: SocketAddr) -> Result<()> {
    let tcp = tcp::Server::bind(address)?;
    let udp = udp::Server::bind(address)?;
    println!("ready");
    std::thread::spawn(move || tcp.serve());
    udp.serve()
}
