//! The smallest kernel there is, for tests: an ELF file with a PVH note and a
//! few bytes of 32-bit code.

/// Where its code is loaded and entered.
pub const ENTRY: u32 = 0x10_0000;

const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const NOTE_LEN: u64 = 20;

/// An ELF file that runs `code`.
pub fn pvh(code: &[u8]) -> Vec<u8> {
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let code_at = note_at + NOTE_LEN;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2u16, 62].map(u16::to_le_bytes).concat());
    elf.extend(1u32.to_le_bytes());
    elf.extend([u64::from(ENTRY), HEADER, 0].map(u64::to_le_bytes).concat());
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    program_header(&mut elf, 4, note_at, 0, NOTE_LEN);
    program_header(&mut elf, 1, code_at, u64::from(ENTRY), code.len() as u64);
    elf.extend([4u32, 4, 18].map(u32::to_le_bytes).concat());
    elf.extend(b"Xen\0");
    elf.extend(ENTRY.to_le_bytes());
    elf.extend(code);
    elf
}

fn program_header(elf: &mut Vec<u8>, kind: u32, offset: u64, address: u64, len: u64) {
    elf.extend([kind, 5].map(u32::to_le_bytes).concat());
    elf.extend(
        [offset, address, address, len, len, 4]
            .map(u64::to_le_bytes)
            .concat(),
    );
}
