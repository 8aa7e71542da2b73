//! Counts of what brought a vCPU out of the kernel.

use std::fmt;
use std::ops::AddAssign;

/// Exits to the monitor, by kind. Each vCPU thread counts its own.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Exits {
    /// Reads of memory-mapped registers.
    pub mmio_reads: u64,
    /// Writes of memory-mapped registers.
    pub mmio_writes: u64,
    /// Reads of I/O ports.
    pub port_reads: u64,
    /// Writes of I/O ports.
    pub port_writes: u64,
    /// Signals.
    pub interrupted: u64,
    /// Anything else.
    pub others: u64,
}

impl AddAssign for Exits {
    fn add_assign(&mut self, other: Self) {
        self.mmio_reads += other.mmio_reads;
        self.mmio_writes += other.mmio_writes;
        self.port_reads += other.port_reads;
        self.port_writes += other.port_writes;
        self.interrupted += other.interrupted;
        self.others += other.others;
    }
}

impl fmt::Display for Exits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "mmio {} read {} written, ports {} read {} written, {} interrupted, {} other",
            self.mmio_reads,
            self.mmio_writes,
            self.port_reads,
            self.port_writes,
            self.interrupted,
            self.others
        )
    }
}
