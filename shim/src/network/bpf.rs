//! The BPF program that leads a namespace's TCP connections to given sockets;
//! bpf(2), linux/bpf.h, Documentation/bpf/prog_sk_lookup.rst.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;

const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// An instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const LOAD_IMMEDIATE: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW, two instructions long
const STORE_WORD: u8 = 0x63; // BPF_STX | BPF_MEM | BPF_W
const MOVE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const MOVE_REGISTER: u8 = 0xbf; // ... | BPF_X
const ADD: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
const JUMP_EQ: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_NE: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// A map's descriptor, not a number, is the immediate.
const PSEUDO_MAP_FD: u8 = 1;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;

/// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;

const fn insn(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: (from << 4) | to,
        offset,
        immediate,
    }
}

/// `map[family == AF_INET ? 0 : 1]` gets the connection; with an empty place, or
/// for what is not TCP, the kernel looks as ever.
fn program(map: i32) -> [Instruction; 23] {
    [
        insn(MOVE_REGISTER, 6, 1, 0, 0),
        insn(LOAD_WORD, 2, 1, PROTOCOL, 0),
        insn(JUMP_NE, 2, 0, 18, libc::IPPROTO_TCP),
        insn(LOAD_WORD, 2, 1, FAMILY, 0),
        insn(MOVE, 3, 0, 0, 0),
        insn(JUMP_EQ, 2, 0, 1, libc::AF_INET),
        insn(MOVE, 3, 0, 0, 1),
        insn(STORE_WORD, 10, 3, -4, 0),
        insn(LOAD_IMMEDIATE, 1, PSEUDO_MAP_FD, 0, map),
        insn(0, 0, 0, 0, 0),
        insn(MOVE_REGISTER, 2, 10, 0, 0),
        insn(ADD, 2, 0, 0, -4),
        insn(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        insn(JUMP_EQ, 0, 0, 7, 0),
        insn(MOVE_REGISTER, 7, 0, 0, 0),
        insn(MOVE_REGISTER, 1, 6, 0, 0),
        insn(MOVE_REGISTER, 2, 7, 0, 0),
        insn(MOVE, 3, 0, 0, 0),
        insn(CALL, 0, 0, 0, SK_ASSIGN),
        insn(MOVE_REGISTER, 1, 7, 0, 0),
        insn(CALL, 0, 0, 0, SK_RELEASE),
        insn(MOVE, 0, 0, 0, SK_PASS),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

/// Leads the TCP connections of `netns` to `listeners`: IPv4 to the first, IPv6
/// to the second, if there is one. As long as the answer lives.
///
/// # Errors
///
/// Those of bpf(2); `EINVAL` from kernels before 5.9.
pub(super) fn steer(netns: BorrowedFd<'_>, listeners: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    let map = create_map(2)?;
    for (place, listener) in (0u32..).zip(listeners) {
        put(&map, place, *listener)?;
    }
    let program = load(&program(map.as_raw_fd()))?;
    #[repr(C)]
    struct Link {
        program: i32,
        target: i32,
        attach_type: u32,
        flags: u32,
    }
    // The link holds the program, and that the map.
    bpf_fd(
        LINK_CREATE,
        &Link {
            program: program.as_raw_fd(),
            target: netns.as_raw_fd(),
            attach_type: ATTACH_SK_LOOKUP,
            flags: 0,
        },
    )
}

fn create_map(places: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Map {
        kind: u32,
        key_bytes: u32,
        value_bytes: u32,
        places: u32,
        flags: u32,
    }
    bpf_fd(
        MAP_CREATE,
        &Map {
            kind: MAP_TYPE_SOCKMAP,
            key_bytes: 4,
            value_bytes: 8,
            places,
            flags: 0,
        },
    )
}

fn put(map: &OwnedFd, place: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Put {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let socket = u64::from(socket.as_raw_fd().cast_unsigned());
    bpf(
        MAP_UPDATE_ELEM,
        &Put {
            map: map.as_raw_fd().cast_unsigned(),
            padding: 0,
            key: (&raw const place).expose_provenance() as u64,
            value: (&raw const socket).expose_provenance() as u64,
            flags: 0,
        },
    )
    .map(drop)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_bytes: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
    }
    bpf_fd(
        PROG_LOAD,
        &Load {
            program_type: PROG_TYPE_SK_LOOKUP,
            instruction_count: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
            instructions: program.as_ptr().expose_provenance() as u64,
            license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
            log_level: 0,
            log_bytes: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name: *b"nacre_loopback\0\0",
            interface: 0,
            attach_type: ATTACH_SK_LOOKUP,
        },
    )
}

fn bpf_fd<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: the kernel has just installed this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `attributes` is the part of `union bpf_attr` that the command uses; the
/// kernel takes the rest as 0.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    let attributes: *const T = attributes;
    // SAFETY: the structure, and what it points to, outlive the call; of a
    // command of this file the kernel only reads both.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    let result = Errno::result(result)?;
    Ok(i32::try_from(result).map_err(|_| Errno::EOVERFLOW)?)
}
