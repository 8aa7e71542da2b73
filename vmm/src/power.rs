//! How the guest ends itself: ACPI sleep and reset registers, and pvpanic.

use std::sync::Arc;

use nacre_protocol::vm::StopReason;

use crate::bus::BusDevice;
use crate::stop::{Outcome, Stop};

/// `SLP_TYP` of soft-off, as the `\_S5` object says.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What the guest writes to the reset register, as the FADT says.
pub const RESET_VALUE: u8 = 1;

/// `SLP_EN` of the sleep control register (ACPI 6.5, table 4.17).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
/// Offset of the reset register among the power ports.
const RESET_OFFSET: u64 = 2;
/// pvpanic's event "the kernel panicked".
const PANICKED: u8 = 1;

/// Sleep control, sleep status and reset registers, one byte each.
pub struct Power(pub Arc<Stop>);

impl BusDevice for Power {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Nothing is pending: never asleep, never woken.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(value) = data.first() else { return };
        let sleep = SLEEP_ENABLE | (SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT);
        let mask = SLEEP_ENABLE | (SLEEP_TYPE_MASK << SLEEP_TYPE_SHIFT);
        match offset {
            0 if value & mask == sleep => self.0.set(Outcome::Stopped(StopReason::Shutdown)),
            RESET_OFFSET if *value == RESET_VALUE => {
                self.0.set(Outcome::Stopped(StopReason::Reboot));
            }
            _ => {}
        }
    }
}

/// The pvpanic device (QEMU `docs/specs/pvpanic`), "panicked" only.
pub struct PvPanic(pub Arc<Stop>);

impl BusDevice for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(events) = data.first_mut() {
            *events = PANICKED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|events| events & PANICKED != 0) {
            self.0.panicked();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome_of(write: impl FnOnce(Arc<Stop>)) -> Option<Outcome> {
        let stop = Arc::new(Stop::new().unwrap());
        write(stop.clone());
        stop.outcome().cloned()
    }

    #[test]
    fn soft_off_needs_type_and_enable() {
        let sleep = |value: u8| outcome_of(|stop| Power(stop).write(0, &[value]));
        assert_eq!(sleep(0x34), Some(Outcome::Stopped(StopReason::Shutdown)));
        assert_eq!(sleep(0x14), None);
        assert_eq!(sleep(0x20), None);
    }

    #[test]
    fn reset_and_panic_are_told_apart() {
        let reset = outcome_of(|stop| Power(stop).write(2, &[1]));
        let panic = outcome_of(|stop| {
            PvPanic(stop.clone()).write(0, &[1]);
            assert_eq!(stop.outcome(), None, "it has last words to say");
            Power(stop).write(2, &[1]);
        });
        assert_eq!(reset, Some(Outcome::Stopped(StopReason::Reboot)));
        assert_eq!(panic, Some(Outcome::Stopped(StopReason::Panic)));
    }

    #[test]
    fn status_and_unknown_values_do_nothing() {
        assert_eq!(outcome_of(|stop| Power(stop).write(1, &[0x80])), None);
        assert_eq!(outcome_of(|stop| Power(stop).write(2, &[0])), None);
        assert_eq!(outcome_of(|stop| PvPanic(stop).write(0, &[2])), None);
        assert_eq!(outcome_of(|stop| Power(stop).write(0, &[])), None);
    }
}
