//! A pod's machine near its devices, where the host has several NUMA nodes. Neither is a
//! must: memory comes from elsewhere when the node has no more, and a cpuset counts more than
//! where a device is.

use nacre_vmm::numa::Preference;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use oci_spec::runtime::Spec;
use tracing::{info, warn};

use super::{VmHost, blocking};
use crate::cgroup::NumberList;
use crate::devices::numa::{self, Node};
use crate::error::chain;

/// Where a machine is to be.
pub(super) struct Near {
    node: Node,
    vcpus: u8,
}

impl VmHost {
    /// Where the pod's devices are, if it has any and the host tells.
    pub(super) async fn near(&self, spec: &Spec) -> Option<Near> {
        let vcpus = self.size_of(spec).vcpus;
        let devices = self.pod_devices();
        let addresses: Vec<_> = devices.iter().map(|device| device.address).collect();
        let system = self.system.clone();
        match blocking(move || numa::node_of(&system, &addresses)).await {
            Ok(node) => node.map(|node| Near { node, vcpus }),
            Err(error) => {
                warn!(error = chain(&error), "not known which node devices are at");
                None
            }
        }
    }
}

impl Near {
    /// Memory of what this thread starts comes from there, as long as the result lives.
    pub(super) fn memory(&self) -> Option<Preference> {
        let node = self.node.number;
        let preference = Preference::of(node);
        let preference = preference.inspect_err(|error| {
            warn!(node, %error, "memory of the pod does not come from its devices' node");
        });
        preference.ok()
    }

    /// A process runs there, with the threads it is yet to have.
    pub(super) fn run(&self, pid: u32) {
        let (node, cpus) = (self.node.number, self.node.cpus);
        let process = Pid::from_raw(pid.cast_signed());
        let moved = sched_getaffinity(process).and_then(|allowed| {
            let both = of_both(&allowed, &cpus, self.vcpus);
            both.map(|both| sched_setaffinity(process, &both))
                .transpose()
        });
        match moved {
            Ok(Some(())) => info!(node, ?cpus, "the machine is at its devices' node"),
            Ok(None) => info!(
                node,
                ?cpus,
                "too few processors of the devices' node may be used: the machine runs anywhere"
            ),
            Err(error) => warn!(node, %error, "the machine is not bound to its devices' node"),
        }
    }
}

/// The processors in both, if they are as many as there are vCPUs.
fn of_both(allowed: &CpuSet, node: &NumberList, vcpus: u8) -> Option<CpuSet> {
    let mut both = CpuSet::new();
    let mut count = 0;
    for cpu in 0..CpuSet::count() {
        if allowed.is_set(cpu).unwrap_or(false) && node.has(cpu) && both.set(cpu).is_ok() {
            count += 1;
        }
    }
    (count >= usize::from(vcpus)).then_some(both)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::{Child, Command};

    fn list(text: &str) -> NumberList {
        NumberList::parse(text).unwrap()
    }

    fn set(cpus: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        for cpu in cpus {
            set.set(*cpu).unwrap();
        }
        set
    }

    #[test]
    fn machine_is_where_it_may_be_and_has_room() {
        let allowed = set(&[0, 1, 2, 3, 17, 18]);
        let node = list("16-31");
        assert_eq!(of_both(&allowed, &node, 2), Some(set(&[17, 18])));
        assert_eq!(of_both(&allowed, &node, 3), None, "two for three vCPUs");
        assert_eq!(of_both(&set(&[0]), &node, 1), None);
    }

    struct Sleeper(Child);

    impl Sleeper {
        fn new() -> Self {
            Self(Command::new("sleep").arg("3600").spawn().unwrap())
        }

        fn cpus(&self) -> NumberList {
            let path = format!("/proc/{}/status", self.0.id());
            let status = fs::read_to_string(path).unwrap();
            let mut lines = status.lines();
            let found = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            list(found.unwrap())
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn process_runs_on_the_node_unless_that_is_too_small() {
        let process = Sleeper::new();
        let before = process.cpus();
        let first = (0..1024).find(|cpu| before.has(*cpu)).unwrap();
        let cpus = list(&first.to_string());
        let near = |vcpus| Near {
            node: Node { number: 0, cpus },
            vcpus,
        };
        near(2).run(process.0.id());
        assert_eq!(process.cpus(), before);
        near(1).run(process.0.id());
        assert_eq!(process.cpus(), cpus);
    }
}
