use super::*;

fn event(tid: u32, at: f64, name: &str, text: &str) -> Event {
    Event {
        tid,
        at,
        name: name.into(),
        text: text.into(),
    }
}

const EXEC: &str = "filename=/usr/local/bin/containerd-shim-nacre-v2 pid=1 old_pid=1";
const EXIT: &str = "vcpu 0 reason npf rip 0xffffffff81000000 info1 0x0";
const USER_EXIT: &str = "vcpu 0 reason cpuid rip 0x40a000 info1 0x0";
const CPUID: &str = "func 0 idx 0 rax d rbx 68747541 rcx 444d4163 rdx 69746e65, cpuid entry found";

#[test]
fn the_tree_that_runs_a_vm_is_counted_up_to_the_last_user_cpuid() {
    let events = [
        event(1, 1.0, "sched_process_exec", EXEC),
        event(1, 1.1, "sys_enter", "NR 0 (3, 0, 0, 0, 0, 0)"),
        event(5, 2.0, "sched_process_exec", EXEC),
        event(
            5,
            2.0,
            "sched_process_fork",
            "comm=x pid=5 child_comm=x child_pid=6",
        ),
        event(
            6,
            2.1,
            "sched_process_exec",
            "filename=/proc/self/exe pid=6 old_pid=6",
        ),
        event(6, 2.2, "sys_enter", "NR 16 (3, 0, 0, 0, 0, 0)"),
        event(9, 2.2, "sys_enter", "NR 16 (3, 0, 0, 0, 0, 0)"),
        event(6, 2.3, "kvm_exit", EXIT),
        event(
            6,
            2.3,
            "kvm_mmio",
            "mmio unsatisfied-read len 4 gpa 0xe0000000 val 0x0",
        ),
        event(6, 2.3, "kvm_userspace_exit", "reason KVM_EXIT_MMIO (6)"),
        event(6, 2.4, "kvm_exit", USER_EXIT),
        event(6, 2.4, "kvm_cpuid", CPUID),
        event(6, 2.5, "kvm_exit", USER_EXIT),
        event(6, 2.5, "kvm_cpuid", CPUID),
        event(6, 9.0, "kvm_exit", EXIT),
        event(6, 9.1, "kvm_cpuid", CPUID),
    ];
    let counts = count(&events).unwrap();
    assert_eq!(
        counts.exits,
        [("cpuid".into(), 2), ("npf".into(), 1)].into()
    );
    let user = [("PCI configuration (ECAM) read".to_owned(), 1)];
    assert_eq!(counts.user_exits, user.into());
    assert_eq!(counts.calls, [((Role::Monitor, "ioctl".into()), 1)].into());
    assert!((counts.seconds - 0.5).abs() < 1e-9);
}

#[test]
fn port_exits_go_to_their_range_and_console_bytes_are_counted() {
    let io = "vcpu 0 reason io rip 0xffffffff81000000 info1 0x0000000003f80010";
    let mut counts = Counts::default();
    let mut touched = HashMap::new();
    for event in [
        event(6, 1.0, "kvm_exit", io),
        event(
            6,
            1.0,
            "kvm_pio",
            "pio_write at 0x3f8 size 1 count 1 val 0x41",
        ),
        event(6, 1.0, "kvm_userspace_exit", "reason KVM_EXIT_IO (2)"),
    ] {
        tally(&event, Role::Monitor, &mut counts, &mut touched);
    }
    assert_eq!(counts.console_bytes, 1);
    assert_eq!(counts.user_exits, [("ports: serial".to_owned(), 1)].into());
}
