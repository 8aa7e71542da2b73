//! The compiled programs are run by a small interpreter of classic BPF.

use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | 1;

struct Call {
    arch: u32,
    nr: u32,
    args: [u64; 6],
}

fn call(nr: libc::c_long, args: &[u64]) -> Call {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    Call {
        arch: AUDIT_ARCH_X86_64,
        nr: u32::try_from(nr).unwrap(),
        args: all,
    }
}

fn load(call: &Call, offset: u32) -> u32 {
    match offset {
        NR => call.nr,
        ARCH => call.arch,
        _ => {
            let offset = offset - ARGS;
            let value = call.args[(offset / 8) as usize];
            (value >> (8 * (offset % 8))) as u32
        }
    }
}

fn run(filter: &Filter, call: &Call) -> u32 {
    let (mut pc, mut a) = (0, 0);
    loop {
        let insn = filter.program[pc];
        pc += 1;
        let jump = |hold: bool| usize::from(if hold { insn.jt } else { insn.jf });
        match insn.code {
            LOAD => a = load(call, insn.k),
            AND => a &= insn.k,
            JUMP => pc += insn.k as usize,
            JEQ => pc += jump(a == insn.k),
            JGT => pc += jump(a > insn.k),
            JGE => pc += jump(a >= insn.k),
            RETURN => return insn.k,
            code => panic!("instruction {code:#x}"),
        }
    }
}

fn compile(json: &serde_json::Value) -> Filter {
    Filter::compile(&serde_json::from_value(json.clone()).unwrap()).unwrap()
}

fn with_test(op: &str, value: u64, value_two: u64) -> Filter {
    compile(&serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{
            "names": ["personality"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": value, "valueTwo": value_two, "op": op}],
        }],
    }))
}

#[test]
fn names_actions_and_default() {
    let filter = compile(&serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        ],
    }));
    assert_eq!(run(&filter, &call(libc::SYS_read, &[])), ALLOW);
    assert_eq!(run(&filter, &call(libc::SYS_mount, &[])), EPERM);
    assert_eq!(
        run(&filter, &call(libc::SYS_clone3, &[])),
        libc::SECCOMP_RET_ERRNO | 38
    );
}

#[test]
fn other_architectures() {
    let profile = |architectures: serde_json::Value| {
        compile(&serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": architectures,
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}],
        }))
    };
    let mut read = call(3, &[]);
    read.arch = AUDIT_ARCH_I386;
    let both = profile(serde_json::json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]));
    let native = profile(serde_json::json!(["SCMP_ARCH_X86_64"]));
    assert_eq!(run(&both, &read), ALLOW);
    assert_eq!(run(&native, &read), libc::SECCOMP_RET_KILL_PROCESS);
    let x32 = call(i64::from(X32_SYSCALL_BIT), &[]);
    assert_eq!(run(&both, &x32), NO_SUCH_CALL);
}

#[test]
fn comparisons_hold_over_64_bits() {
    const V: u64 = 0x0000_0005_0000_0007;
    let probes = [
        0,
        7,
        V - 1,
        V,
        V + 1,
        0x0000_0004_ffff_ffff,
        0x0000_0006_0000_0000,
        0x0000_0005_0000_0000,
        u64::MAX,
    ];
    type Operator = (&'static str, fn(u64) -> bool);
    let operators: [Operator; 6] = [
        ("SCMP_CMP_EQ", |x| x == V),
        ("SCMP_CMP_NE", |x| x != V),
        ("SCMP_CMP_LT", |x| x < V),
        ("SCMP_CMP_LE", |x| x <= V),
        ("SCMP_CMP_GT", |x| x > V),
        ("SCMP_CMP_GE", |x| x >= V),
    ];
    for (name, holds) in operators {
        let filter = with_test(name, V, 0);
        for probe in probes {
            let expected = if holds(probe) { ALLOW } else { EPERM };
            let got = run(&filter, &call(libc::SYS_personality, &[probe]));
            assert_eq!(got, expected, "{name} {probe:#x}");
        }
    }
}

#[test]
fn masked_comparison() {
    let filter = with_test("SCMP_CMP_MASKED_EQ", 0x1_0000_00f0, 0x1_0000_0020);
    let probe = |value| run(&filter, &call(libc::SYS_personality, &[value]));
    assert_eq!(probe(0x1_0000_0020), ALLOW);
    assert_eq!(probe(0xf1_0000_0f2f), ALLOW);
    assert_eq!(probe(0x0_0000_0020), EPERM);
    assert_eq!(probe(0x1_0000_0030), EPERM);
}

#[test]
fn several_rules_for_one_call() {
    let rule = |value: u64| {
        serde_json::json!({"names": ["personality"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]})
    };
    let filter = compile(&serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
        "syscalls": [rule(0), rule(8), rule(0xffff_ffff)],
    }));
    let probe = |value| run(&filter, &call(libc::SYS_personality, &[value]));
    assert_eq!((probe(0), probe(8), probe(9)), (ALLOW, ALLOW, EPERM));
}
