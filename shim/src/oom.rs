//! Whom the host's kernel ends first when memory runs out (proc_pid_oom_score_adj(5)).
//!
//! Of a group that is full the kernel ends the process that uses most, by what it sees
//! of it: neither huge pages nor what is left of a dead monitor's memory. The shim is to be
//! there afterwards and tell what happened. It inherits containerd's value, which spares it,
//! and its monitor and file server would, too, on a node that runs out of memory
//! as a whole. So these have what kubelet wants of the pod's containers, and are ended before
//! the shim in any case.

use std::fs::{self, File};
use std::io::{self, Write};

use crate::rundir::Proc;

/// By how much more readily they are ended than the shim: thousandths of the memory of
/// group or node. More than a shim uses of the smallest group, and less than what is between
/// the classes of Kubernetes' pods (-997, 2 to 999, 1000).
const MARGIN: i32 = 100;
/// `OOM_SCORE_ADJ_MAX`
const MAX: i32 = 1000;

/// Sets it for a process of the pod whose containers ask for `wanted`, if it still runs.
///
/// # Errors
///
/// Those of the process's file.
pub fn expose(process: Proc, wanted: Option<i32>) -> io::Result<()> {
    let own = fs::read_to_string("/proc/self/oom_score_adj")?;
    let own = own.trim().parse().map_err(io::Error::other)?;
    let value = value(own, wanted).to_string();
    let path = format!("/proc/{}/oom_score_adj", process.pid);
    let file = File::options().write(true).open(path);
    // In this order: the file is that of one process, whichever had the pid when it was opened.
    if Proc::of(process.pid) != Some(process) {
        return Ok(());
    }
    file?.write_all(value.as_bytes())
}

fn value(own: i32, wanted: Option<i32>) -> i32 {
    let least = own.saturating_add(MARGIN);
    wanted.map_or(least, |wanted| wanted.max(least)).min(MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn shim_is_spared_whatever_is_wanted() {
        for (own, wanted, expected) in [
            (-999, None, -899),
            (-999, Some(-997), -899),
            (-999, Some(2), 2),
            (-999, Some(1000), 1000),
            (0, None, 100),
            (0, Some(-998), 100),
            (950, Some(0), 1000),
        ] {
            assert_eq!(value(own, wanted), expected, "{own} {wanted:?}");
        }
    }

    #[test]
    fn it_is_set_for_another_process() {
        let mut process = Command::new("sleep").arg("600").spawn().unwrap();
        let this = Proc::of(process.id()).unwrap();
        let before = Proc {
            start_time: this.start_time - 1,
            ..this
        };
        let exposed = expose(this, Some(1000)).and_then(|()| expose(before, Some(999)));
        let set = fs::read_to_string(format!("/proc/{}/oom_score_adj", this.pid));
        process.kill().unwrap();
        process.wait().unwrap();
        exposed.unwrap();
        assert_eq!(set.unwrap().trim(), "1000", "not by who had its pid before");
        expose(this, None).unwrap();
    }
}
