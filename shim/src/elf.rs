//! What an x86-64 ELF file is good for: as a kernel the monitor can start, which
//! takes the PVH entry note (Xen's `XEN_ELFNOTE_PHYS32_ENTRY`), or as a program
//! for a guest that has no other file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const MACHINE_X86_64: u16 = 62;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const PHYS32_ENTRY: u32 = 18;
/// Notes are small; a file that says otherwise is no kernel.
const MAX_NOTES_BYTES: u64 = 1 << 20;

/// A part of the file that its program headers name.
struct Segment {
    kind: u32,
    offset: u64,
    bytes: u64,
}

/// Checks a kernel image.
///
/// # Errors
///
/// One line: what the file lacks.
pub(crate) fn check_kernel(file: &mut File) -> Result<(), String> {
    let header = read_header(file, "; nacre needs vmlinux, not bzImage")?;
    if has_pvh_note(file, &header).map_err(|error| error.to_string())? {
        Ok(())
    } else {
        Err("no PVH entry note; build it with CONFIG_PVH=y".into())
    }
}

/// Checks that a program needs no loader and no libraries.
///
/// # Errors
///
/// One line: what is wrong with it.
pub(crate) fn check_static(file: &mut File) -> Result<(), String> {
    let header = read_header(file, "")?;
    let segments = segments(file, &header).map_err(|error| error.to_string())?;
    if segments.iter().any(|segment| segment.kind == PT_INTERP) {
        return Err("not static: it needs a loader and libraries".into());
    }
    Ok(())
}

/// The ELF header; `hint` is added to the complaint about a file of another kind.
fn read_header(file: &mut File, hint: &str) -> Result<Vec<u8>, String> {
    let header = read_at(file, 0, HEADER_BYTES).map_err(|_| "too short".to_owned())?;
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return Err(format!("not a 64-bit ELF file{hint}"));
    }
    if u16_at(&header, 18) != Some(MACHINE_X86_64) {
        return Err("not for x86-64".into());
    }
    Ok(header)
}

fn has_pvh_note(file: &mut File, header: &[u8]) -> io::Result<bool> {
    for segment in segments(file, header)? {
        if segment.kind != PT_NOTE {
            continue;
        }
        let bytes = segment.bytes.min(MAX_NOTES_BYTES);
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let text = read_at(file, segment.offset, bytes)?;
        if notes(&text).any(|note| note == (b"Xen\0", PHYS32_ENTRY)) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn segments(file: &mut File, header: &[u8]) -> io::Result<Vec<Segment>> {
    let malformed = || io::Error::other("malformed ELF header");
    let start = u64_at(header, 32).ok_or_else(malformed)?;
    let count = u16_at(header, 56).ok_or_else(malformed)?;
    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let offset = index
            .checked_mul(PROGRAM_HEADER_BYTES as u64)
            .and_then(|offset| start.checked_add(offset))
            .ok_or_else(malformed)?;
        let program = read_at(file, offset, PROGRAM_HEADER_BYTES)?;
        segments.push(Segment {
            kind: u32_at(&program, 0).ok_or_else(malformed)?,
            offset: u64_at(&program, 8).ok_or_else(malformed)?,
            bytes: u64_at(&program, 32).ok_or_else(malformed)?,
        });
    }
    Ok(segments)
}

/// Name and type of each note (elf(5), "Notes"): sizes of name and description,
/// type, then both, each padded to four bytes.
fn notes(mut rest: &[u8]) -> impl Iterator<Item = (&[u8], u32)> {
    std::iter::from_fn(move || {
        let name_bytes = usize::try_from(u32_at(rest, 0)?).ok()?;
        let data_bytes = usize::try_from(u32_at(rest, 4)?).ok()?;
        let kind = u32_at(rest, 8)?;
        let body = rest.get(12..)?;
        let name = body.get(..name_bytes)?;
        let padded = name_bytes
            .checked_next_multiple_of(4)?
            .checked_add(data_bytes.checked_next_multiple_of(4)?)?;
        rest = body.get(padded..).unwrap_or_default();
        Some((name, kind))
    })
}

fn read_at(file: &mut File, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(offset))?;
    let mut buffer = vec![0; bytes];
    file.read_exact(&mut buffer)?;
    Ok(buffer)
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array_at(bytes, offset).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array_at(bytes, offset).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    array_at(bytes, offset).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// An ELF file of one segment, which holds notes.
    fn image(segment: u32, note_kind: u32) -> File {
        let mut bytes = vec![0; HEADER_BYTES + PROGRAM_HEADER_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, b"\x7fELF\x02\x01");
        put(18, &MACHINE_X86_64.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(56, &1u16.to_le_bytes());
        put(64, &segment.to_le_bytes());
        put(72, &120u64.to_le_bytes());
        put(96, &40u64.to_le_bytes());
        for (name, kind) in [(b"GNU\0", 1u32), (b"Xen\0", note_kind)] {
            bytes.extend(4u32.to_le_bytes());
            bytes.extend(4u32.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(name);
            bytes.extend([0; 4]);
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn pvh_note_is_found_after_others() {
        check_kernel(&mut image(PT_NOTE, PHYS32_ENTRY)).unwrap();
    }

    #[test]
    fn what_is_missing_is_told() {
        let error = check_kernel(&mut image(PT_NOTE, 5)).unwrap_err();
        assert!(error.contains("CONFIG_PVH"), "{error}");
        let mut script = tempfile::tempfile().unwrap();
        script.write_all(&[b'#'; 200]).unwrap();
        assert!(check_kernel(&mut script).unwrap_err().contains("ELF"));
    }

    #[test]
    fn programs_with_a_loader_are_not_static() {
        check_static(&mut image(PT_NOTE, 5)).unwrap();
        let error = check_static(&mut image(PT_INTERP, 5)).unwrap_err();
        assert!(error.contains("not static"), "{error}");
        let mut script = tempfile::tempfile().unwrap();
        script.write_all(&[b'#'; 200]).unwrap();
        assert_eq!(
            check_static(&mut script).unwrap_err(),
            "not a 64-bit ELF file"
        );
    }
}
