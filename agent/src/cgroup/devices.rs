//! Device rules of a cgroup: a BPF program the kernel asks at each open and
//! mknod of a device node.
//!
//! cgroup v2 has no files for this; a program of type
//! `BPF_PROG_TYPE_CGROUP_DEVICE` takes `struct bpf_cgroup_dev_ctx` (linux/bpf.h)
//! and returns 1 to allow. Ours is assembled here, rule by rule, the last rule
//! of the specification first, for there the last match decides:
//!
//! ```text
//!   r3 = type   r2 = access   r4 = major   r5 = minor
//!   rule: type differs? access not covered? major, minor differ? -> next rule
//!         return allow
//!   ...
//!   return 0
//! ```

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::engine::sys;
use crate::error::{Context, Error, Result};

/// An eBPF instruction (linux/bpf.h, `struct bpf_insn`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const MOVE_REGISTER: u8 = 0xbf; // ... | BPF_X
const AND: u8 = 0x57; // BPF_ALU64 | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x77; // BPF_ALU64 | BPF_RSH | BPF_K
const JUMP_EQ: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_NE: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const JUMP_NE_REGISTER: u8 = 0x5d; // ... | BPF_X
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// `BPF_DEVCG_DEV_*` and `BPF_DEVCG_ACC_*`.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MAKE_NODE: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL_ACCESS: i32 = MAKE_NODE | READ | WRITE;

/// One rule in the kernel's terms; `None` is "any".
#[derive(Debug, Clone, Copy)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    fn is_unconditional(&self) -> bool {
        self.kind.is_none()
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == ALL_ACCESS
    }
}

const fn allow(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

/// What every container may use, as under runc: making nodes is harmless when
/// opening them is not allowed.
const ALWAYS: [Rule; 10] = [
    allow(CHARACTER, None, None, MAKE_NODE),
    allow(BLOCK, None, None, MAKE_NODE),
    allow(CHARACTER, Some(1), Some(3), ALL_ACCESS), // null
    allow(CHARACTER, Some(1), Some(5), ALL_ACCESS), // zero
    allow(CHARACTER, Some(1), Some(7), ALL_ACCESS), // full
    allow(CHARACTER, Some(1), Some(8), ALL_ACCESS), // random
    allow(CHARACTER, Some(1), Some(9), ALL_ACCESS), // urandom
    allow(CHARACTER, Some(5), Some(0), ALL_ACCESS), // tty
    allow(CHARACTER, Some(5), Some(2), ALL_ACCESS), // ptmx
    allow(CHARACTER, Some(136), None, ALL_ACCESS),  // pts/*
];

/// Loads the program for `rules` and attaches it to the cgroup.
///
/// # Errors
///
/// `InvalidArgument` for rules that make no sense, else those of bpf(2).
pub fn attach(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    let program = assemble(rules)?;
    let directory = File::open(cgroup).context("open the cgroup")?;
    let program = sys::bpf_load_device(&program).context("load the device program")?;
    sys::bpf_attach_device(directory.as_fd(), program.as_fd()).context("attach the device program")
}

/// The program for the specification's rules.
///
/// # Errors
///
/// `InvalidArgument` for rules that make no sense.
pub fn assemble(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Instruction>> {
    let mut all = rules.iter().map(translate).collect::<Result<Vec<_>>>()?;
    all.extend(ALWAYS);
    let mut program = vec![
        insn(LOAD_WORD, 2, 1, 0, 0),
        insn(MOVE_REGISTER, 3, 2, 0, 0),
        insn(AND, 3, 0, 0, 0xffff),
        insn(SHIFT_RIGHT, 2, 0, 0, 16),
        insn(LOAD_WORD, 4, 1, 4, 0),
        insn(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in all.iter().rev() {
        program.extend(rule_code(*rule));
        if rule.is_unconditional() {
            // The verifier refuses instructions that cannot be reached.
            return Ok(program);
        }
    }
    program.extend([insn(MOVE, 0, 0, 0, 0), insn(EXIT, 0, 0, 0, 0)]);
    Ok(program)
}

fn insn(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate,
    }
}

fn translate(rule: &LinuxDeviceCgroup) -> Result<Rule> {
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => i32::try_from(value)
            .map(Some)
            .map_err(|_| Error::InvalidArgument(format!("device number {value}"))),
    };
    let kind = match rule.typ().unwrap_or_default() {
        LinuxDeviceType::A => None,
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::P => {
            return Err(Error::InvalidArgument("device rule for a FIFO".into()));
        }
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MAKE_NODE,
            _ => return Err(Error::InvalidArgument(format!("device access {letter:?}"))),
        };
    }
    Ok(Rule {
        allow: rule.allow(),
        kind,
        major: number(rule.major())?,
        minor: number(rule.minor())?,
        access,
    })
}

/// An allowing rule must cover all of the access asked for; a denying one
/// applies if it touches any of it.
fn rule_code(rule: Rule) -> Vec<Instruction> {
    // (instruction, whether it jumps to the next rule)
    let mut code = Vec::new();
    if let Some(kind) = rule.kind {
        code.push((insn(JUMP_NE, 3, 0, 0, kind), true));
    }
    if rule.access != ALL_ACCESS {
        code.push((insn(MOVE_REGISTER, 1, 2, 0, 0), false));
        code.push((insn(AND, 1, 0, 0, rule.access), false));
        let test = if rule.allow {
            insn(JUMP_NE_REGISTER, 1, 2, 0, 0)
        } else {
            insn(JUMP_EQ, 1, 0, 0, 0)
        };
        code.push((test, true));
    }
    for (register, number) in [(4, rule.major), (5, rule.minor)] {
        if let Some(number) = number {
            code.push((insn(JUMP_NE, register, 0, 0, number), true));
        }
    }
    code.push((insn(MOVE, 0, 0, 0, rule.allow.into()), false));
    code.push((insn(EXIT, 0, 0, 0, 0), false));
    // At most ten instructions: the distance always fits.
    let len = code.len();
    (1..)
        .zip(code)
        .map(|(next, (mut insn, jumps))| {
            if jumps {
                insn.offset = i16::try_from(len - next).unwrap_or(i16::MAX);
            }
            insn
        })
        .collect()
}

#[cfg(test)]
mod tests;
