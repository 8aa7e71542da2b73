use std::io::Write;

use super::*;
use crate::memory;
use crate::test_kernel;

fn file(name: &str, bytes: &[u8]) -> NamedFile {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    NamedFile {
        file,
        path: name.into(),
    }
}

fn load_into(
    memory: &GuestMemory,
    kernel: &[u8],
    initrd: &[u8],
    cmdline: &str,
) -> Result<u64, BootError> {
    let mut payload = Payload {
        kernel: &mut file("/boot/vmlinux", kernel),
        initrd: &mut file("/boot/initrd.img", initrd),
        cmdline,
    };
    load(memory, &mut payload).map(|loaded| loaded.entry)
}

#[test]
fn kernel_initramfs_and_start_info_are_in_place() {
    let memory = memory::allocate(64, false).unwrap();
    let kernel = test_kernel::pvh(&[0xf4]);
    let entry = load_into(&memory, &kernel, b"cpio", "quiet").unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(entry)).unwrap(), 0xf4);

    let info: hvm_start_info = memory.read_obj(GuestAddress(layout::START_INFO)).unwrap();
    assert_eq!(info.magic, START_MAGIC);
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!(module.size, 4);
    assert_eq!(module.paddr, 64 * layout::MIB - PAGE);
    let mut text = [0; 4];
    memory
        .read_slice(&mut text, GuestAddress(module.paddr))
        .unwrap();
    assert_eq!(&text, b"cpio");
    let mut line = [0xff; 6];
    memory
        .read_slice(&mut line, GuestAddress(info.cmdline_paddr))
        .unwrap();
    assert_eq!(&line, b"quiet\0");
}

#[test]
fn memory_map_is_sorted_and_disjoint() {
    let memory = memory::allocate(4096, false).unwrap();
    let map = memory_map(&memory);
    assert!(
        map.windows(2)
            .all(|pair| pair[0].addr + pair[0].size <= pair[1].addr)
    );
    let ram: u64 = map
        .iter()
        .filter(|entry| entry.type_ == TYPE_RAM)
        .map(|entry| entry.size)
        .sum();
    assert_eq!(
        ram,
        4096 * layout::MIB - (layout::HIGH_RAM_START - layout::LOW_RAM_END) - layout::PSTORE_SIZE
    );
}

#[test]
fn unusable_payloads_are_refused() {
    let memory = memory::allocate(32, false).unwrap();
    let kernel = test_kernel::pvh(&[0xf4]);
    let refused = |kernel: &[u8], initrd: &[u8]| {
        let refused = load_into(&memory, kernel, initrd, "");
        refused.unwrap_err().to_string()
    };
    // What it runs is at its end.
    for bad in [&b""[..], b"not ELF", &kernel[..kernel.len() - 1]] {
        let error = refused(bad, b"");
        assert!(error.starts_with("kernel /boot/vmlinux: "), "{error}");
    }
    let error = refused(&kernel, &vec![0u8; 32 << 20]);
    let expected = "no room for initramfs /boot/initrd.img, 33554432 bytes, above the kernel";
    assert_eq!(error, expected);
    let long = "x".repeat(layout::CMDLINE_MAX);
    assert!(matches!(
        load_into(&memory, &kernel, b"", &long),
        Err(BootError::Cmdline(2048))
    ));
    assert!(matches!(
        load_into(&memory, &kernel, b"", "a\0b"),
        Err(BootError::Cmdline(3))
    ));
}

#[test]
fn kernel_without_pvh_note_is_refused() {
    let memory = memory::allocate(32, false).unwrap();
    let mut kernel = test_kernel::pvh(&[0xf4]);
    let note = kernel
        .windows(4)
        .position(|window| window == b"Xen\0")
        .unwrap();
    kernel[note] = b'Y';
    let error = load_into(&memory, &kernel, b"", "").unwrap_err();
    let expected = "kernel /boot/vmlinux has no PVH entry point (CONFIG_PVH)";
    assert_eq!(error.to_string(), expected);
}
