//! Which of the guest's CPUs are online (Documentation/ABI/testing/sysfs-devices-system-cpu).
//!
//! A machine may have more vCPUs than its pod was to have at first: the kernel leaves those
//! out of its boot (`maxcpus=`), and they sleep until one is brought online here. The first
//! CPU of an x86 machine is always online and has no switch.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::error::{Context, Result};

/// Held by who turns CPUs on and off. A caller who has waited too long may ask again
/// meanwhile.
static TURN: Mutex<()> = Mutex::new(());

/// Has the first `count` CPUs be online and no others, as far as the kernel goes along;
/// returns how many are. What it refuses is logged.
///
/// # Errors
///
/// When the CPUs cannot be looked for.
pub fn set_online(count: u32) -> Result<u32> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    set_online_in(Path::new("/sys/devices/system/cpu"), count)
}

fn set_online_in(dir: &Path, count: u32) -> Result<u32> {
    let mut numbers = numbers_in(dir).context("look for CPUs")?;
    numbers.sort_unstable();
    let mut online = 0;
    for number in numbers {
        let switch = dir.join(format!("cpu{number}/online"));
        let is_wanted = number < count;
        let turned = turn(&switch, is_wanted);
        if let Err(error) = &turned {
            let state = if is_wanted { "offline" } else { "online" };
            tracing::warn!("CPU {number} stays {state}: {error}");
        }
        online += u32::from(turned.is_ok() == is_wanted);
    }
    Ok(online)
}

/// Numbers of those there are.
fn numbers_in(dir: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu"));
        numbers.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    Ok(numbers)
}

fn turn(switch: &Path, on: bool) -> io::Result<()> {
    let is_on = match fs::read_to_string(switch) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        text => text?.trim() == "1",
    };
    if is_on == on {
        return Ok(());
    }
    // Not one that is not there.
    let mut file = fs::File::options().write(true).open(switch)?;
    file.write_all(if on { b"1" } else { b"0" })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CPUs as sysfs has them: the first one without a switch.
    fn cpus(count: u32, online: u32) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..count {
            let cpu = dir.path().join(format!("cpu{number}"));
            fs::create_dir(&cpu).unwrap();
            if number > 0 {
                let state = u32::from(number < online);
                fs::write(cpu.join("online"), state.to_string()).unwrap();
            }
        }
        for other in ["cpufreq", "cpuidle", "hotplug"] {
            fs::create_dir(dir.path().join(other)).unwrap();
        }
        dir
    }

    fn switches(dir: &Path, count: u32) -> String {
        let read = |number| {
            let text = fs::read_to_string(dir.join(format!("cpu{number}/online"))).unwrap();
            text.trim().to_owned()
        };
        (1..count).map(read).collect()
    }

    #[test]
    fn the_first_ones_are_online() {
        let dir = cpus(12, 1);
        let set = |count| {
            let online = set_online_in(dir.path(), count).unwrap();
            (online, switches(dir.path(), 12))
        };
        assert_eq!(set(3), (3, "11000000000".into()));
        assert_eq!(set(11), (11, "11111111110".into()));
        assert_eq!(set(2), (2, "10000000000".into()));
        assert_eq!(set(1), (1, "00000000000".into()));
        assert_eq!(set(100), (12, "11111111111".into()), "all there are");
        assert_eq!(set(0).0, 1, "one cannot go");
    }

    #[test]
    fn one_that_cannot_be_turned_keeps_no_other_from_it() {
        let dir = cpus(4, 1);
        let switch = dir.path().join("cpu2/online");
        fs::remove_file(&switch).unwrap();
        fs::create_dir(&switch).unwrap();
        let set = |count| set_online_in(dir.path(), count).unwrap();
        let last = || fs::read_to_string(dir.path().join("cpu3/online")).unwrap();
        assert_eq!((set(4), last()), (3, "1".into()), "it is none");
        assert_eq!((set(1), last()), (2, "0".into()), "it is one");
    }

    #[test]
    fn what_has_no_cpus_is_told_of() {
        set_online_in(Path::new("/none"), 1).unwrap_err();
    }
}
