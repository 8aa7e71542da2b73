//! Compiles an OCI seccomp profile to a classic BPF program.
//!
//! libseccomp would have to be linked from a distribution's static library,
//! and the `seccompiler` crate knows one action per filter, while profiles mix
//! several (allow, errno 38 for clone3, ...). The program is plain:
//!
//! ```text
//!   load arch;  x86-64 -> A;  i386 (if the profile names it) -> B;  else kill
//!   A: x32 numbers (bit 30) -> ENOSYS
//!      for each system call, in the order of their numbers:
//!        nr != n -> next; argument tests -> their actions; ...; default action
//!      default action
//!   B: the same with i386's numbers
//! ```
//!
//! The chain is linear. That costs nothing: since Linux 5.11 the kernel runs a
//! filter once per system call number when it is installed and remembers those
//! that are always allowed.

use std::collections::BTreeMap;
use std::io;
use std::str::FromStr;

use libc::sock_filter;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};

use super::error::{InitError, Step};
use super::sys;

/// Offsets in `struct seccomp_data` (linux/seccomp.h).
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

/// linux/audit.h
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const X32_SYSCALL_BIT: u32 = 0x4000_0000;
/// The guest kernel has no x32; a profile that allows by default must not let
/// its numbers pass unfiltered on one that has.
const NO_SUCH_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const JEQ: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JGT: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
const JGE: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// A compiled profile.
#[derive(Debug, Clone)]
pub struct Filter {
    program: Vec<sock_filter>,
    flags: libc::c_ulong,
}

/// One rule for one system call: all tests must hold.
struct Rule<'a> {
    action: u32,
    tests: &'a [LinuxSeccompArg],
}

impl Filter {
    /// Compiles a profile. System calls this kernel's architecture does not
    /// know are skipped, as runc does: profiles name those of all.
    ///
    /// # Errors
    ///
    /// `Invalid` for actions that need a listener, and for filters that exceed
    /// what classic BPF can express.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self, InitError> {
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let wants_i386 = profile
            .architectures()
            .as_ref()
            .is_some_and(|list| list.contains(&Arch::ScmpArchX86));
        let native = section(profile, default, |name| {
            syscalls::x86_64::Sysno::from_str(name)
                .ok()
                .map(|nr| nr as u32)
        })?;
        let mut program = vec![
            statement(LOAD, ARCH),
            branch(JEQ, AUDIT_ARCH_X86_64, 1, 0),
            statement(JUMP, length(native.len())?),
        ];
        program.extend(native);
        if wants_i386 {
            program.push(branch(JEQ, AUDIT_ARCH_I386, 1, 0));
            program.push(statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS));
            program.extend(section(profile, default, |name| {
                syscalls::x86::Sysno::from_str(name)
                    .ok()
                    .map(|nr| nr as u32)
            })?);
        } else {
            program.push(statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS));
        }
        Ok(Self {
            program,
            flags: flags(profile),
        })
    }

    /// Installs the filter for this process.
    ///
    /// # Errors
    ///
    /// Those of seccomp(2).
    pub fn install(&self) -> Result<(), InitError> {
        self.enter().step(|| "install seccomp filter")
    }

    /// The same, for a process that has just been forked.
    ///
    /// # Errors
    ///
    /// Those of seccomp(2).
    pub fn enter(&self) -> io::Result<()> {
        sys::install_seccomp(&self.program, self.flags)
    }
}

fn flags(profile: &LinuxSeccomp) -> libc::c_ulong {
    let given = profile.flags().as_deref().unwrap_or_default();
    given.iter().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                    libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
                }
                // One thread; no listener: nothing to synchronise or wait for.
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync
                | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
            }
    })
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, InitError> {
    match action {
        LinuxSeccompAction::ScmpActNotify => Err(InitError::Invalid(
            "seccomp: SCMP_ACT_NOTIFY is not supported".into(),
        )),
        // The return value has 16 bits for it.
        _ if errno.is_some_and(|errno| errno > 0xffff) => {
            Err(InitError::Invalid(format!("seccomp: errno {errno:?}")))
        }
        _ => Ok(action.as_u32(errno)),
    }
}

/// The part of the program for one architecture.
fn section(
    profile: &LinuxSeccomp,
    default: u32,
    number: impl Fn(&str) -> Option<u32>,
) -> Result<Vec<sock_filter>, InitError> {
    let mut by_number: BTreeMap<u32, Vec<Rule<'_>>> = BTreeMap::new();
    for call in profile.syscalls().as_deref().unwrap_or_default() {
        let action = action(call.action(), call.errno_ret())?;
        let tests = call.args().as_deref().unwrap_or_default();
        for nr in call.names().iter().filter_map(|name| number(name)) {
            by_number
                .entry(nr)
                .or_default()
                .push(Rule { action, tests });
        }
    }
    let mut code = vec![
        statement(LOAD, NR),
        branch(JGE, X32_SYSCALL_BIT, 0, 1),
        statement(RETURN, NO_SUCH_CALL),
    ];
    for (nr, rules) in by_number {
        let body = call_body(&rules, default)?;
        match u8::try_from(body.len()) {
            Ok(skip) => code.push(branch(JEQ, nr, 0, skip)),
            Err(_) => {
                code.push(branch(JEQ, nr, 1, 0));
                code.push(statement(JUMP, length(body.len())?));
            }
        }
        code.extend(body);
    }
    code.push(statement(RETURN, default));
    Ok(code)
}

/// What happens once the number matches: rules with tests first (libseccomp's
/// order), then an unconditional one, else the default.
fn call_body(rules: &[Rule<'_>], default: u32) -> Result<Vec<sock_filter>, InitError> {
    let mut body = Vec::new();
    for rule in rules.iter().filter(|rule| !rule.tests.is_empty()) {
        let mut code = vec![statement(RETURN, rule.action)];
        // Built backwards: a test needs to know how far the end of the rule is.
        for test in rule.tests.iter().rev() {
            let fail = u8::try_from(code.len())
                .map_err(|_| InitError::Invalid("seccomp: too many argument tests".into()))?;
            let mut longer = argument_test(test, fail)?;
            longer.append(&mut code);
            code = longer;
        }
        body.append(&mut code);
    }
    let last = rules.iter().find(|rule| rule.tests.is_empty());
    body.push(statement(RETURN, last.map_or(default, |rule| rule.action)));
    Ok(body)
}

/// A 64-bit comparison in 32-bit steps. Falls through when it holds; jumps
/// `fail` instructions past its own end when it does not.
fn argument_test(test: &LinuxSeccompArg, fail: u8) -> Result<Vec<sock_filter>, InitError> {
    use LinuxSeccompOperator as Op;
    let index = u32::try_from(test.index()).ok().filter(|index| *index < 6);
    let index =
        index.ok_or_else(|| InitError::Invalid(format!("seccomp: argument {}", test.index())))?;
    let (low, high) = (ARGS + 8 * index, ARGS + 8 * index + 4);
    let far = |extra: u8| {
        fail.checked_add(extra)
            .ok_or_else(|| InitError::Invalid("seccomp: too many argument tests".into()))
    };
    let halves = |value: u64| ((value >> 32) as u32, (value & 0xffff_ffff) as u32);
    let (value_high, value_low) = halves(test.value());
    // (jump on low half, true means the comparison holds)
    let ordered = |jump, holds: bool, above: bool| -> Result<_, InitError> {
        // high > value: decided as `above`; high != value (so lower): the opposite.
        let (on_above, on_below) = if above { (3, far(2)?) } else { (far(3)?, 2) };
        let (yes, no) = if holds { (0, fail) } else { (fail, 0) };
        Ok(vec![
            statement(LOAD, high),
            branch(JGT, value_high, on_above, 0),
            branch(JEQ, value_high, 0, on_below),
            statement(LOAD, low),
            branch(jump, value_low, yes, no),
        ])
    };
    match test.op() {
        Op::ScmpCmpEq => Ok(vec![
            statement(LOAD, high),
            branch(JEQ, value_high, 0, far(2)?),
            statement(LOAD, low),
            branch(JEQ, value_low, 0, fail),
        ]),
        Op::ScmpCmpNe => Ok(vec![
            statement(LOAD, high),
            branch(JEQ, value_high, 0, 2),
            statement(LOAD, low),
            branch(JEQ, value_low, fail, 0),
        ]),
        Op::ScmpCmpGt => ordered(JGT, true, true),
        Op::ScmpCmpGe => ordered(JGE, true, true),
        Op::ScmpCmpLt => ordered(JGE, false, false),
        Op::ScmpCmpLe => ordered(JGT, false, false),
        // value is the mask, value_two what is left under it.
        Op::ScmpCmpMaskedEq => {
            let (want_high, want_low) = halves(test.value_two().unwrap_or(0));
            Ok(vec![
                statement(LOAD, high),
                statement(AND, value_high),
                branch(JEQ, want_high, 0, far(3)?),
                statement(LOAD, low),
                statement(AND, value_low),
                branch(JEQ, want_low, 0, fail),
            ])
        }
    }
}

fn length(len: usize) -> Result<u32, InitError> {
    u32::try_from(len).map_err(|_| InitError::Invalid("seccomp: profile too long".into()))
}

fn statement(code: u16, k: u32) -> sock_filter {
    branch(code, k, 0, 0)
}

fn branch(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests;
