//! The programs are run by a small interpreter, and by the kernel's verifier
//! where bpf(2) is permitted.

use super::*;

fn run(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
    let context = [access << 16 | kind, major, minor];
    let mut registers = [0i64; 11];
    let mut pc = 0;
    loop {
        let insn = program[pc];
        pc += 1;
        let (to, from) = (
            usize::from(insn.registers & 15),
            usize::from(insn.registers >> 4),
        );
        let immediate = i64::from(insn.immediate);
        let jump = usize::try_from(insn.offset).unwrap();
        match insn.code {
            LOAD_WORD => registers[to] = i64::from(context[jump / 4]),
            MOVE => registers[to] = immediate,
            MOVE_REGISTER => registers[to] = registers[from],
            AND => registers[to] &= immediate,
            SHIFT_RIGHT => registers[to] >>= immediate,
            JUMP_EQ => pc += if registers[to] == immediate { jump } else { 0 },
            JUMP_NE => pc += if registers[to] == immediate { 0 } else { jump },
            JUMP_NE_REGISTER => {
                pc += if registers[to] == registers[from] {
                    0
                } else {
                    jump
                }
            }
            EXIT => return registers[0] == 1,
            code => panic!("instruction {code:#x}"),
        }
    }
}

fn program(rules: serde_json::Value) -> Vec<Instruction> {
    let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules).unwrap();
    assemble(&rules).unwrap()
}

#[test]
fn defaults_are_allowed_and_the_rest_is_not() {
    let program = program(serde_json::json!([{"allow": false, "access": "rwm"}]));
    assert!(run(&program, CHARACTER, READ | WRITE, 1, 3));
    assert!(run(&program, CHARACTER, READ, 136, 7));
    assert!(run(&program, BLOCK, MAKE_NODE, 8, 0));
    assert!(!run(&program, BLOCK, READ, 8, 0));
    assert!(!run(&program, CHARACTER, READ, 10, 229));
}

#[test]
fn the_last_match_decides() {
    let program = program(serde_json::json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 10, "access": "rw"},
        {"allow": false, "type": "c", "major": 10, "minor": 200, "access": "w"},
        {"allow": true, "type": "b", "major": 254, "minor": 0, "access": "r"},
    ]));
    assert!(run(&program, CHARACTER, READ | WRITE, 10, 229));
    assert!(run(&program, CHARACTER, READ, 10, 200));
    assert!(!run(&program, CHARACTER, READ | WRITE, 10, 200));
    assert!(run(&program, BLOCK, READ, 254, 0));
    assert!(!run(&program, BLOCK, READ | WRITE, 254, 0));
    assert!(!run(&program, BLOCK, READ, 254, 16));
}

#[test]
fn privileged_containers_may_use_everything() {
    let program = program(serde_json::json!([{"allow": true, "access": "rwm"}]));
    assert!(run(&program, BLOCK, READ | WRITE | MAKE_NODE, 8, 0));
}

#[test]
fn nonsense_is_refused() {
    let rule = serde_json::json!([{"allow": true, "type": "c", "access": "x"}]);
    let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rule).unwrap();
    assert!(matches!(assemble(&rules), Err(Error::InvalidArgument(_))));
}

#[test]
fn the_kernel_accepts_the_program() {
    let listed = program(serde_json::json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
        {"allow": false, "type": "b", "access": "m"},
    ]));
    let privileged = program(serde_json::json!([{"allow": true, "access": "rwm"}]));
    let empty = program(serde_json::json!([]));
    for program in [listed, privileged, empty] {
        match sys::bpf_load_device(&program) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => {
                eprintln!("skipped: bpf(2) is not permitted here");
            }
            Err(error) => panic!("the verifier refused it: {error}"),
        }
    }
}
