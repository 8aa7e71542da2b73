//! vCPUs: one thread each, from creation to the last exit.
//!
//! ```text
//!   Vcpu::new (main thread) --start--> thread: KVM_RUN, serve the exit, again
//!                                         |  until Stop is set, by the guest or by us
//!   VcpuThread::join  <--- VcpuFd, Exits -+
//! ```
//!
//! A thread leaves KVM_RUN when [`VcpuThread::kick`] has set `immediate_exit`
//! in its shared page and sent it a signal: set first, so that a thread about to
//! enter KVM_RUN does not, and one inside is interrupted. The signal's handler
//! does nothing.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use nacre_protocol::vm::StopReason;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::stop::{Outcome, Stop};
use crate::vm::{Vm, VmError};

mod cpuid;
mod exits;
mod pre_fault;
mod registers;

pub use cpuid::{Cpuid, MAX_VCPUS};
pub use exits::Exits;

/// Why a vCPU cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] VmError),
    /// No CPUID table of this size.
    #[error("CPUID table with {0} entries")]
    Cpuid(usize),
    /// No thread or signal.
    #[error("vCPU thread: {0}")]
    Thread(#[from] io::Error),
}

/// What vCPUs reach with their exits.
#[derive(Clone)]
pub struct Buses {
    /// Memory-mapped devices.
    pub mmio: Arc<Bus>,
    /// Devices at I/O ports.
    pub ports: Arc<Bus>,
}

/// A vCPU that does not run yet.
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
}

impl Vcpu {
    /// Creates vCPU `index`. The first one begins at `entry`, the others wait
    /// for it to start them.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn new(vm: &Vm, cpuid: &Cpuid, index: u8, entry: u64) -> Result<Self, VcpuError> {
        let fd = vm.create_vcpu(index)?;
        let table = cpuid.of(index)?;
        fd.set_cpuid2(&table).map_err(VmError::new("set CPUID"))?;
        registers::set_msrs(&fd)?;
        if index == 0 {
            registers::set_entry(&fd, entry)?;
        }
        Ok(Self { index, fd })
    }

    /// Maps guest memory that is about to be used, see [`pre_fault`].
    pub fn pre_fault(&self, ranges: &[(u64, u64)]) {
        for &(start, end) in ranges {
            if let Err(error) = pre_fault::map(&self.fd, start, end) {
                // A kernel before 6.11. The guest's own accesses will do it.
                tracing::debug!(%error, "guest memory is not mapped ahead");
                return;
            }
        }
    }

    /// Runs it in a thread of its own.
    ///
    /// # Errors
    ///
    /// When there is no thread.
    pub fn start(mut self, buses: Buses, stop: Arc<Stop>) -> Result<VcpuThread, VcpuError> {
        let page = RunPage(NonNull::from(self.fd.get_kvm_run()));
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", self.index))
            .spawn(move || {
                let mut exits = Exits::default();
                run(&mut self.fd, &buses, &stop, &mut exits);
                (self.fd, exits)
            })?;
        Ok(VcpuThread { thread, page })
    }
}

/// The page a vCPU shares with KVM. It lives as long as the [`VcpuFd`].
struct RunPage(NonNull<kvm_run>);

/// A vCPU's thread.
pub struct VcpuThread {
    /// Returns the descriptor, so that the page is there until we have joined.
    thread: JoinHandle<(VcpuFd, Exits)>,
    page: RunPage,
}

impl VcpuThread {
    /// Makes it look at [`Stop`].
    pub fn kick(&self) {
        // SAFETY: the page is mapped while the VcpuFd exists, which is at least
        // until the thread is joined. KVM and the vCPU thread only read this byte.
        unsafe {
            let byte = &raw mut (*self.page.0.as_ptr()).immediate_exit;
            byte.write_volatile(1);
        }
        if let Err(error) = self.thread.kill(SIGRTMIN()) {
            tracing::debug!(%error, "vCPU thread not signalled");
        }
    }

    /// Waits for the thread; `None` if it panicked.
    pub fn join(self) -> Option<Exits> {
        self.thread.join().ok().map(|(_fd, exits)| exits)
    }
}

/// Installs the handler of the signal that interrupts KVM_RUN.
///
/// # Errors
///
/// Those of sigaction(2).
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    Ok(register_signal_handler(SIGRTMIN(), interrupt)?)
}

fn run(fd: &mut VcpuFd, buses: &Buses, stop: &Stop, exits: &mut Exits) {
    let page = NonNull::from(fd.get_kvm_run());
    while stop.outcome().is_none() {
        match fd.run() {
            Ok(exit) => serve(exit, port_width(page), buses, stop, exits),
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
                exits.interrupted += 1;
            }
            Err(error) => stop.set(Outcome::Failed(format!("KVM_RUN: {error}"))),
        }
    }
}

/// Bytes of each access to a port, if that is why the vCPU has left the kernel: an instruction
/// may do several (`rep outsw`), which come as one exit.
fn port_width(page: NonNull<kvm_run>) -> usize {
    // SAFETY: the page is mapped as long as the vCPU's descriptor is open, and the vCPU does not
    // run; any bytes are a size.
    let size = unsafe { (*page.as_ptr()).__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}

fn serve(exit: VcpuExit<'_>, width: usize, buses: &Buses, stop: &Stop, exits: &mut Exits) {
    match exit {
        VcpuExit::MmioRead(address, data) => {
            exits.mmio_reads += 1;
            buses.mmio.read(address, data);
        }
        VcpuExit::MmioWrite(address, data) => {
            exits.mmio_writes += 1;
            buses.mmio.write(address, data);
        }
        VcpuExit::IoIn(port, data) => {
            exits.port_reads += 1;
            for access in data.chunks_mut(width) {
                buses.ports.read(port.into(), access);
            }
        }
        VcpuExit::IoOut(port, data) => {
            exits.port_writes += 1;
            for access in data.chunks(width) {
                buses.ports.write(port.into(), access);
            }
        }
        VcpuExit::Shutdown => stop.set(Outcome::Stopped(StopReason::TripleFault)),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) => exits.others += 1,
        other => {
            exits.others += 1;
            stop.set(Outcome::Failed(format!("vCPU exit {other:?}")));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::bus::BusDevice;

    /// Lengths of the accesses.
    #[derive(Default)]
    struct Lengths(Mutex<Vec<usize>>);

    impl BusDevice for Lengths {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(7);
            self.0.lock().unwrap().push(data.len());
        }
        fn write(&self, _: u64, data: &[u8]) {
            self.0.lock().unwrap().push(data.len());
        }
    }

    #[test]
    fn accesses_of_one_instruction_reach_the_port_one_by_one() {
        let lengths = Arc::new(Lengths::default());
        let mut ports = Bus::default();
        ports.add(0x1000, 1, lengths.clone()).unwrap();
        let buses = Buses {
            mmio: Arc::default(),
            ports: Arc::new(ports),
        };
        let (stop, mut exits) = (Stop::new().unwrap(), Exits::default());
        let mut data = [0; 6];
        serve(
            VcpuExit::IoIn(0x1000, &mut data),
            2,
            &buses,
            &stop,
            &mut exits,
        );
        serve(VcpuExit::IoOut(0x1000, &data), 4, &buses, &stop, &mut exits);
        assert_eq!(
            (data, &*lengths.0.lock().unwrap()),
            ([7; 6], &vec![2, 2, 2, 4, 2])
        );
        assert_eq!((exits.port_reads, exits.port_writes), (1, 1));
    }
}
