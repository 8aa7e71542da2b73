//! How a guest that does not answer is asked where it is: by an NMI, which its kernel takes
//! whatever it does, with interrupts off too.
//!
//! The reason of an NMI is in a PC's port 0x61 (Intel 300 series PCH datasheet, volume 2,
//! "NMI Status and Control"). With an I/O channel check there, Linux prints registers and stack
//! of the processor that was hit and panics if `panic_on_io_nmi` is set; if not, it
//! clears the check and goes on after two seconds (`io_check_error` in
//! `arch/x86/kernel/nmi.c`). That sysctl is set just before init runs. A kernel that clears the
//! check has not come so far: it is sent a second NMI, without a reason, of which it
//! panics by `unknown_nmi_panic`, a parameter that it knows from the start.
//!
//! ```text
//!   raise() --NMI--> guest reads IOCHK, prints --panics
//!                                      |
//!                                      +--clears IOCHK --NMI--> guest reads no reason, panics
//! ```
//!
//! Nobody else raises a check, so no NMI that a guest causes itself is taken for one.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::bus::BusDevice;
use crate::vm::VmError;

/// Reason: I/O channel check.
const IOCHK: u8 = 1 << 6;
/// Written to clear it.
const CLEAR_IOCHK: u8 = 1 << 3;

/// Sends the guest an NMI.
type Sender = dyn Fn() -> Result<(), VmError> + Send + Sync;

/// The port, and what is behind it.
pub struct Nmi {
    send: Box<Sender>,
    is_raised: AtomicBool,
}

impl Nmi {
    /// No NMI yet; `send` sends one.
    pub fn new(send: impl Fn() -> Result<(), VmError> + Send + Sync + 'static) -> Self {
        Self {
            send: Box::new(send),
            is_raised: AtomicBool::new(false),
        }
    }

    /// Has the guest's kernel say where it is, and end.
    ///
    /// # Errors
    ///
    /// When no NMI can be sent.
    pub fn raise(&self) -> Result<(), VmError> {
        // Before the guest looks: it does so after the system call by which it gets the NMI.
        self.is_raised.store(true, Ordering::SeqCst);
        (self.send)()
    }
}

impl BusDevice for Nmi {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(reason) = data.first_mut()
            && self.is_raised.load(Ordering::SeqCst)
        {
            *reason = IOCHK;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let clears = data.first().is_some_and(|value| value & CLEAR_IOCHK != 0);
        // Once for each time it is raised, whatever the guest writes.
        if clears
            && self.is_raised.swap(false, Ordering::SeqCst)
            && let Err(error) = (self.send)()
        {
            tracing::warn!(%error, "the guest gets no second NMI");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn reason(nmi: &Nmi) -> u8 {
        let mut data = [0xff; 2];
        nmi.read(0, &mut data);
        assert_eq!(data[1], 0);
        data[0]
    }

    #[test]
    fn reason_is_there_until_the_guest_clears_it() {
        let sent = Arc::new(AtomicU32::new(0));
        let count = sent.clone();
        let nmi = Nmi::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        let sent = || sent.load(Ordering::Relaxed);
        nmi.write(0, &[CLEAR_IOCHK]);
        assert_eq!((reason(&nmi), sent()), (0, 0), "it is not asked for");
        nmi.raise().unwrap();
        assert_eq!((reason(&nmi), sent()), (IOCHK, 1));
        nmi.write(0, &[!CLEAR_IOCHK]);
        nmi.write(0, &[]);
        assert_eq!((reason(&nmi), sent()), (IOCHK, 1));
        nmi.write(0, &[CLEAR_IOCHK]);
        assert_eq!((reason(&nmi), sent()), (0, 2), "no reason any more");
        nmi.write(0, &[CLEAR_IOCHK]);
        assert_eq!(sent(), 2, "a guest raises none itself");
    }
}
