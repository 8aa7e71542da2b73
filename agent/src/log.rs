//! The agent's log: to the kernel's log as PID 1, else to standard error.
//!
//! The guest's console is off on the normal path, and each line on it would be
//! VM exits: only warnings and errors are written.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Writes each event as one record of /dev/kmsg.
struct Kmsg(File);

impl<'a> MakeWriter<'a> for Kmsg {
    type Writer = Record<'a>;

    fn make_writer(&'a self) -> Record<'a> {
        Record(&self.0)
    }
}

struct Record<'a>(&'a File);

impl Write for Record<'_> {
    /// One write is one record; the prefix is syslog's daemon.warning.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        const PREFIX: &[u8] = b"<28>nacre-agent: ";
        let mut file = self.0;
        file.write_all(&[PREFIX, bytes].concat())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn filter() -> EnvFilter {
    EnvFilter::try_from_env("NACRE_AGENT_LOG").unwrap_or_else(|_| EnvFilter::new("warn"))
}

/// Logs to /dev/kmsg, or to standard error if that cannot be opened.
pub fn init_guest() {
    match OpenOptions::new().write(true).open("/dev/kmsg") {
        Ok(file) => tracing_subscriber::fmt()
            .with_env_filter(filter())
            .with_ansi(false)
            .without_time()
            .with_writer(Kmsg(file))
            .init(),
        Err(_) => init_stderr(),
    }
}

/// Logs to standard error.
pub fn init_stderr() {
    tracing_subscriber::fmt()
        .with_env_filter(filter())
        .with_ansi(false)
        .without_time()
        .with_writer(io::stderr)
        .init();
}

/// The last words of PID 1: to the kernel's log with emergency priority, so
/// that a debug console shows them whatever its level.
pub fn last_words(message: &str) {
    let line = format!("<0>nacre-agent: {message}\n");
    let written = OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut kmsg| kmsg.write_all(line.as_bytes()));
    if written.is_err() {
        eprintln!("nacre-agent: {message}");
    }
}
