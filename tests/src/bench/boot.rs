//! Counts of one pod's start, from `shim start` to the container's first
//! instruction.
//!
//! The beginning is the execve of the process that containerd runs as `shim
//! start`; everything it makes (daemon, monitor, file server) is its tree. The
//! end is an instruction of the container itself: the first thing its C library
//! does is to execute CPUID with leaf 0, which leaves the guest on every
//! processor. In the guest only the agent, its helper and the container do so,
//! in this order, so the last one in user mode before the container's output is
//! the container's.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use anyhow::{Context, ensure};
use nacre_tests::{BUSYBOX, RUNTIME, ctr};
use nacre_vmm::layout;
use syscalls::Sysno;

use crate::table::Table;
use crate::trace::{Event, Recording};

const SHIM: &str = "containerd-shim-nacre-v2";
/// User space of x86-64 ends here.
const USER_END: u64 = 1 << 47;

/// Which program of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Shim,
    Monitor,
    FileServer,
}

/// What was counted.
#[derive(Default)]
pub struct Counts {
    /// Seconds of the trace's clock.
    seconds: f64,
    /// VM exits, by reason.
    exits: BTreeMap<String, u64>,
    /// Exits that reach user space, by what they touch.
    user_exits: BTreeMap<String, u64>,
    /// Bytes written to the serial port.
    console_bytes: u64,
    calls: BTreeMap<(Role, String), u64>,
}

impl Counts {
    fn calls_of(&self, roles: &[Role]) -> u64 {
        let calls = self.calls.iter();
        calls
            .filter(|((role, _), _)| roles.contains(role))
            .map(|(_, count)| count)
            .sum()
    }
}

/// Starts a container under the tracer and counts.
pub fn measure(snapshotter: &str) -> anyhow::Result<Counts> {
    let recording = Recording::start()?;
    let said = ctr(&[
        "run",
        "--rm",
        "--runtime",
        RUNTIME,
        "--snapshotter",
        snapshotter,
        BUSYBOX,
        "bench-boot",
        "/bin/echo",
        "ready",
    ]);
    let events = recording.stop()?;
    ensure!(said.stdout == "ready\n", "the container failed: {said:?}");
    count(&events).context("reading the trace")
}

fn count(events: &[Event]) -> anyhow::Result<Counts> {
    let end = first_instruction(events).context("no CPUID of the container")?;
    let mut trees: Vec<(f64, Counts)> = Vec::new();
    let mut members: HashMap<u32, (usize, Role)> = HashMap::new();
    let mut touched: HashMap<u32, String> = HashMap::new();
    for event in events.get(..end).unwrap_or_default() {
        match event.name.as_str() {
            "sched_process_fork" => {
                if let (Some(member), Some(child)) =
                    (members.get(&event.tid).copied(), event.number("child_pid="))
                {
                    members.insert(u32::try_from(child)?, member);
                }
                continue;
            }
            "sched_process_exec" => {
                executed(event, &mut members, &mut trees);
                continue;
            }
            _ => {}
        }
        let Some((tree, role)) = members.get(&event.tid).copied() else {
            continue;
        };
        let Some((start, counts)) = trees.get_mut(tree) else {
            continue;
        };
        counts.seconds = event.at - *start;
        tally(event, role, counts, &mut touched);
    }
    trees
        .into_iter()
        .map(|(_, counts)| counts)
        .find(|counts| !counts.exits.is_empty())
        .context("no shim that ran a VM")
}

/// Index of the container's first known instruction, see the module.
fn first_instruction(events: &[Event]) -> Option<usize> {
    let mut last_rip = HashMap::new();
    let mut found = None;
    for (index, event) in events.iter().enumerate() {
        if event.name == "kvm_exit" {
            last_rip.insert(event.tid, event.number("rip "));
        } else if event.name == "kvm_cpuid" && event.word("func ") == Some("0") {
            // The kernel asks too, at first from low addresses as well, but by
            // the time of a container it is long at its own.
            let rip = last_rip.get(&event.tid).copied().flatten();
            if rip.is_some_and(|rip| rip < USER_END) {
                found = Some(index);
            }
        }
    }
    found
}

/// A process became another program: the beginning of a tree, or a new role.
fn executed(
    event: &Event,
    members: &mut HashMap<u32, (usize, Role)>,
    trees: &mut Vec<(f64, Counts)>,
) {
    let file = event.word("filename=").unwrap_or_default();
    match members.get_mut(&event.tid) {
        Some((_, role)) if file.ends_with("virtiofsd") => *role = Role::FileServer,
        // The daemon runs itself by this path, as the monitor.
        Some((_, role)) if file == "/proc/self/exe" => *role = Role::Monitor,
        Some(_) => {}
        None if file.ends_with(SHIM) => {
            members.insert(event.tid, (trees.len(), Role::Shim));
            trees.push((event.at, Counts::default()));
        }
        None => {}
    }
}

fn tally(event: &Event, role: Role, counts: &mut Counts, touched: &mut HashMap<u32, String>) {
    match event.name.as_str() {
        "sys_enter" => {
            let number = event.number("NR ").and_then(|nr| usize::try_from(nr).ok());
            let name = number.and_then(Sysno::new);
            let name = name.map_or_else(|| "unknown".to_owned(), |name| name.name().to_owned());
            *counts.calls.entry((role, name)).or_default() += 1;
        }
        "kvm_exit" => {
            let reason = event.word("reason ").unwrap_or("unknown").to_owned();
            if matches!(reason.as_str(), "io" | "IO_INSTRUCTION") {
                // Both vendors have the port in the upper half of this word.
                let port = event.number("info1 ").map_or(0, |info| info >> 16 & 0xffff);
                touched.insert(event.tid, port_range(port).to_owned());
            }
            *counts.exits.entry(reason).or_default() += 1;
        }
        "kvm_mmio" => {
            let address = event.number("gpa ").unwrap_or_default();
            let kind = if event.text.contains(" write ") {
                "written"
            } else {
                "read"
            };
            touched.insert(event.tid, format!("{} {kind}", memory_range(address)));
        }
        "kvm_pio" if is_console_byte(event) => counts.console_bytes += 1,
        "kvm_userspace_exit" => {
            let reason = event.word("reason ").unwrap_or("unknown");
            let what = match (reason, touched.get(&event.tid)) {
                ("KVM_EXIT_MMIO" | "KVM_EXIT_IO", Some(range)) => range.clone(),
                _ => reason.to_owned(),
            };
            *counts.user_exits.entry(what).or_default() += 1;
        }
        _ => {}
    }
}

fn is_console_byte(event: &Event) -> bool {
    event.text.starts_with("pio_write") && event.number("at ") == Some(layout::PORT_SERIAL.into())
}

fn memory_range(address: u64) -> &'static str {
    let ecam = layout::ECAM_START..layout::ECAM_START + layout::ECAM_SIZE;
    let window32 = layout::WINDOW32_START..layout::WINDOW32_END;
    match address {
        a if ecam.contains(&a) => "PCI configuration (ECAM)",
        a if window32.contains(&a) || a >= layout::MMIO_HOLE_END => "device registers (BARs)",
        _ => "other memory",
    }
}

fn port_range(port: u64) -> &'static str {
    const SERIAL: [u64; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];
    match port {
        0xcf8..=0xcff => "ports: PCI configuration",
        p if SERIAL.iter().any(|first| (*first..first + 8).contains(&p)) => "ports: serial",
        0x505 | 0x600..=0x602 => "ports: ours (power, pvpanic)",
        _ => "ports: others",
    }
}

/// The tables.
pub fn report(overlayfs: &Counts, erofs: &Counts) -> String {
    let both = [overlayfs, erofs];
    let mut text = String::from("## Start of a pod\n\n");
    text.push_str(
        "From the execve of `shim start` to the container's first instruction (the CPUID its C library begins\n\
         with, seen as a VM exit). overlayfs reaches the guest by virtio-fs, erofs by virtio-blk.\n\n",
    );
    let mut table = Table::new(&["counted", "overlayfs", "erofs", "target"]);
    let total = |counts: &BTreeMap<String, u64>| counts.values().sum::<u64>();
    let row = |table: &mut Table, name: &str, of: &dyn Fn(&Counts) -> u64, target: &str| {
        let [a, b] = both.map(|counts| of(counts).to_string());
        table.row([name, &a, &b, target]);
    };
    row(&mut table, "console bytes", &|c| c.console_bytes, "0");
    row(
        &mut table,
        "exits to user space",
        &|c| total(&c.user_exits),
        "400",
    );
    row(&mut table, "VM exits", &|c| total(&c.exits), "");
    let own = [Role::Shim, Role::Monitor];
    row(
        &mut table,
        "system calls, shim and monitor",
        &|c| c.calls_of(&own),
        "200",
    );
    row(
        &mut table,
        "system calls, shim",
        &|c| c.calls_of(&[Role::Shim]),
        "",
    );
    row(
        &mut table,
        "system calls, monitor",
        &|c| c.calls_of(&[Role::Monitor]),
        "",
    );
    row(
        &mut table,
        "system calls, virtiofsd",
        &|c| c.calls_of(&[Role::FileServer]),
        "",
    );
    let [a, b] = both.map(|counts| format!("{:.3}", counts.seconds));
    table.row(["seconds, traced", &a, &b, ""]);
    text.push_str(&table.to_string());

    text.push_str("VM exits by reason:\n\n");
    text.push_str(&compare(&overlayfs.exits, &erofs.exits, usize::MAX));
    text.push_str("Exits to user space by what the guest touched:\n\n");
    text.push_str(&compare(
        &overlayfs.user_exits,
        &erofs.user_exits,
        usize::MAX,
    ));
    for (title, role) in [
        ("shim", Role::Shim),
        ("monitor", Role::Monitor),
        ("virtiofsd", Role::FileServer),
    ] {
        // A String takes everything.
        let _ = write!(
            text,
            "System calls of the {title}, the ten most frequent:\n\n"
        );
        let [a, b] = both.map(|counts| calls(counts, role));
        text.push_str(&compare(&a, &b, 10));
    }
    text
}

fn calls(counts: &Counts, role: Role) -> BTreeMap<String, u64> {
    let calls = counts.calls.iter().filter(|((of, _), _)| *of == role);
    calls
        .map(|((_, name), count)| (name.clone(), *count))
        .collect()
}

/// Two counts side by side, the largest first.
fn compare(a: &BTreeMap<String, u64>, b: &BTreeMap<String, u64>, limit: usize) -> String {
    let get = |map: &BTreeMap<String, u64>, key: &str| map.get(key).copied().unwrap_or(0);
    let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.sort_by_key(|key| std::cmp::Reverse(get(a, key).max(get(b, key))));
    let mut table = Table::new(&["", "overlayfs", "erofs"]);
    for key in keys.into_iter().take(limit) {
        table.row([key, &get(a, key).to_string(), &get(b, key).to_string()]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests;
