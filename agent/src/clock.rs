//! The guest's clock, which the shim keeps on the host's.

use std::io;
use std::time::SystemTime;

use nix::errno::Errno;

const MICROS_PER_SECOND: i64 = 1_000_000;
/// A difference that is made up for at once.
const STEP_NS: u64 = 25_000_000;

/// CLOCK_REALTIME in nanoseconds since 1970.
#[must_use]
pub fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    i64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(i64::MAX)
}

/// Moves CLOCK_REALTIME.
///
/// # Errors
///
/// Those of adjtimex(2).
pub fn adjust(by_ns: i64) -> io::Result<()> {
    let mut change = change_by(by_ns);
    // SAFETY: the structure outlives the call.
    Errno::result(unsafe { libc::adjtimex(&raw mut change) })?;
    Ok(())
}

/// Time that jumps breaks what measures with it, so small differences are made
/// up for at the kernel's pace, 0.5 ms each second.
fn change_by(by_ns: i64) -> libc::timex {
    // SAFETY: all-zero is a valid timex.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    let by_us = by_ns / 1000;
    if by_ns.unsigned_abs() < STEP_NS {
        change.modes = libc::ADJ_OFFSET_SINGLESHOT;
        change.offset = by_us;
    } else {
        // The second part may not be negative. ADJ_NANO would do better, but the
        // clock would stay in that mode for the containers too.
        change.modes = libc::ADJ_SETOFFSET;
        change.time.tv_sec = by_us.div_euclid(MICROS_PER_SECOND);
        change.time.tv_usec = by_us.rem_euclid(MICROS_PER_SECOND);
    }
    change
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_differences_are_slewed_and_large_ones_stepped() {
        let small = change_by(-24_999_999);
        assert_eq!(small.modes, libc::ADJ_OFFSET_SINGLESHOT);
        assert_eq!(small.offset, -24_999, "microseconds");
        for (by_ns, seconds, micros) in [
            (25_000_000, 0, 25_000),
            (-25_000_000, -1, 975_000),
            (7_200_000_001_000, 7200, 1),
            (-7_200_000_001_000, -7201, 999_999),
            (i64::MIN, -9_223_372_037, 145_225),
        ] {
            let large = change_by(by_ns);
            assert_eq!(large.modes, libc::ADJ_SETOFFSET);
            assert_eq!((large.time.tv_sec, large.time.tv_usec), (seconds, micros));
        }
    }

    #[test]
    fn time_is_that_of_this_machine() {
        let before = SystemTime::now();
        let now = SystemTime::UNIX_EPOCH + std::time::Duration::from_nanos(now_ns().unsigned_abs());
        assert!(before <= now && now <= SystemTime::now());
    }
}
