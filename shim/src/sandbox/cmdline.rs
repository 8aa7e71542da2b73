//! The guest kernel's command line.
//!
//! Each word is here for a reason; the monitor adds what its devices need.

/// On every boot.
const ALWAYS: [&str; 13] = [
    // The agent is the initramfs's only file.
    "rdinit=/init",
    // A guest that panics is dead: no waiting, straight to the reset register,
    // which the monitor reports. (pvpanic tells the reason first.)
    "panic=-1",
    // A guest that does not answer is sent an NMI (nacre_vmm::nmi) and is to panic of it, so
    // that its last words say where each of its processors was. One for which the monitor
    // gives a reason is no other's; that is set just before init runs. Until then any is the
    // monitor's, as nothing counts events yet.
    "unknown_nmi_panic",
    "sysctl.kernel.unknown_nmi_panic=0",
    "sysctl.kernel.panic_on_io_nmi=1",
    // PANIC_PRINT_ALL_CPU_BT. Idle ones are a line each.
    "panic_print=0x40",
    // Reset by the ACPI register only; the other ways are ports the monitor
    // does not have.
    "reboot=a",
    // KVM's TSC is stable across vCPUs; without this the kernel spends its
    // first second watching it.
    "tsc=reliable",
    // There is no PIT or HPET to check the timer interrupt against.
    "no_timer_check",
    // A kernel that starts one processor writes over the lock prefixes of its instructions, 8,000
    // one after the other through a page table made for each, and back when a second one comes.
    "noreplace-smp",
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

/// The command line of a machine with `max_vcpus`, of which the guest starts `vcpus`.
pub fn cmdline(debug_console: bool, vcpus: u8, max_vcpus: u8) -> String {
    let last: &[&str] = if debug_console { &DEBUG } else { &SILENT };
    // The agent brings the others online when the pod is to have them. They are present,
    // not "online-capable" (ACPI 6.5, 5.2.12.2): to make one of those present takes an
    // ACPI event, which takes an interrupt line, and saves the guest nothing.
    let started = (vcpus < max_vcpus).then(|| format!("maxcpus={vcpus}"));
    let words = ALWAYS.iter().chain(last).copied();
    words
        .chain(started.as_deref())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_only_on_request() {
        let [silent, debug] = [false, true].map(|debug| cmdline(debug, 1, 1));
        assert!(!silent.contains("console"));
        assert!(debug.contains("console=ttyS0"));
        assert!(!debug.contains("quiet"));
        // The kernel's COMMAND_LINE_SIZE on x86 is 2048, the monitor adds some.
        assert!(debug.len() < 1024);
    }

    #[test]
    fn the_kernel_starts_as_many_vcpus_as_the_pod_has_at_first() {
        assert!(cmdline(false, 2, 4).ends_with(" maxcpus=2"));
        assert!(!cmdline(false, 4, 4).contains("maxcpus"));
    }
}
