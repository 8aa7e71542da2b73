//! A 16550 that only sends: early kernel messages of a debug console.
//!
//! Each byte is a VM exit, so it exists only when a console was asked for. The
//! guest never gets an interrupt from it; Linux polls.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

use crate::bus::BusDevice;

/// A line longer than this is written in pieces.
const LINE_MAX: usize = 512;

/// The device.
pub struct Serial(Mutex<vm_superio::Serial<NoInterrupt, NoEvents, Lines>>);

impl Serial {
    /// A serial port whose output goes to `output`.
    #[must_use]
    pub fn new(output: File) -> Self {
        let lines = Lines {
            buffer: Vec::new(),
            output,
        };
        Self(Mutex::new(vm_superio::Serial::new(NoInterrupt, lines)))
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let register = u8::try_from(offset).unwrap_or(u8::MAX);
        data.fill_with(|| port.read(register));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let register = u8::try_from(offset).unwrap_or(u8::MAX);
        for byte in data {
            if let Err(error) = port.write(register, *byte) {
                tracing::debug!(?error, "serial output lost");
            }
        }
    }
}

struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Writes whole lines: one system call each instead of one per byte.
struct Lines {
    buffer: Vec<u8>,
    output: File,
}

impl Lines {
    fn send(&mut self) -> io::Result<()> {
        let result = self.output.write_all(&self.buffer);
        self.buffer.clear();
        result
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if bytes.contains(&b'\n') || self.buffer.len() >= LINE_MAX {
            self.send()?;
        }
        Ok(bytes.len())
    }

    /// The port flushes after each byte, which is what this type is to avoid.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if let Err(error) = self.send() {
            tracing::debug!(%error, "serial output lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn bytes_arrive_by_line_and_the_rest_at_the_end() {
        let mut file = tempfile::tempfile().unwrap();
        let serial = Serial::new(file.try_clone().unwrap());
        for byte in b"one\ntwo" {
            serial.write(0, &[*byte]);
        }
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\n");
        drop(serial);
        file.rewind().unwrap();
        text.clear();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\ntwo");
    }

    #[test]
    fn transmitter_is_always_ready() {
        let serial = Serial::new(tempfile::tempfile().unwrap());
        let mut status = [0];
        serial.read(5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60);
        serial.read(u64::MAX, &mut status);
    }
}
