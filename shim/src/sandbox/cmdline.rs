//! The guest kernel's command line.
//!
//! Each word is here for a reason; the monitor adds what its devices need.

/// On every boot.
const ALWAYS: [&str; 8] = [
    // The agent is the initramfs's only file.
    "rdinit=/init",
    // A guest that panics is dead: no waiting, straight to the reset register,
    // which the monitor reports. (pvpanic tells the reason first.)
    "panic=-1",
    // Reset by the ACPI register only; the other ways are ports the monitor
    // does not have.
    "reboot=a",
    // KVM's TSC is stable across vCPUs; without this the kernel spends its
    // first second watching it.
    "tsc=reliable",
    // There is no PIT or HPET to check the timer interrupt against.
    "no_timer_check",
    // RDRAND seeds the guest at once; no service waits for entropy.
    "random.trust_cpu=on",
    // Containers' limits are cgroup v2 only.
    "cgroup_no_v1=all",
    // Memory that is added holds nothing the kernel cannot move, as far as it can
    // afford that: else it could not be taken away again.
    "memory_hotplug.online_policy=auto-movable",
];

/// Without a console. Each byte on a serial console is a VM exit, and so is each
/// look for hardware that is not there.
const SILENT: [&str; 5] = [
    "quiet",
    "loglevel=1",
    // No walk over all slots by the ports of old (230 exits) for quirks of
    // chipsets we are not; PCI is found by ECAM.
    "pci=noearly",
    // No probing for four serial ports (31 exits).
    "8250.nr_uarts=0",
    // The dummy driver makes an interface when it starts; nobody asked for it.
    "dummy.numdummies=0",
];

/// With the debug console: from the first message on, on the UART.
const DEBUG: [&str; 2] = ["earlycon=uart8250,io,0x3f8", "console=ttyS0"];

/// The command line.
pub fn cmdline(debug_console: bool) -> String {
    let last: &[&str] = if debug_console { &DEBUG } else { &SILENT };
    ALWAYS
        .iter()
        .chain(last.iter())
        .copied()
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_only_on_request() {
        assert!(!cmdline(false).contains("console"));
        assert!(cmdline(true).contains("console=ttyS0"));
        assert!(!cmdline(true).contains("quiet"));
        // The kernel's COMMAND_LINE_SIZE on x86 is 2048, the monitor adds some.
        assert!(cmdline(true).len() < 1024);
    }
}
