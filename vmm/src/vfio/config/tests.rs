use proptest::prelude::*;

use super::*;
use crate::pci::config::BridgeWindow;
use crate::vfio::mock::{self, Mock};

const BAR_SIZES: [u64; BARS] = [0x8000, 0, 0x1000_0000, 0, 0x100, 0x20];

fn config() -> GuestConfig {
    GuestConfig::new(&mock::space(), BAR_SIZES).unwrap()
}

fn u32_of(config: &GuestConfig, mock: &Mock, register: usize) -> u32 {
    let mut bytes = [0; 4];
    config.read(mock, register, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

/// Ids of the capabilities a guest finds.
fn list(config: &GuestConfig, mock: &Mock) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut at = u32_of(config, mock, 0x34) & 0xff;
    while at != 0 {
        let header = u32_of(config, mock, at as usize);
        ids.push(header & 0xff);
        at = header >> 8 & 0xff;
    }
    ids
}

fn extended_list(config: &GuestConfig, mock: &Mock) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut at = 0x100;
    while at != 0 {
        let header = u32_of(config, mock, at as usize);
        ids.push(header & 0xffff);
        at = header >> 20;
    }
    ids
}

#[test]
fn identity_is_the_device_s_and_its_traps_are_gone() {
    let (config, mock) = (config(), Mock::default());
    assert_eq!(u32_of(&config, &mock, 0), 0x5678_1234);
    assert_eq!(u32_of(&config, &mock, 8), 0x0108_0201);
    assert_eq!(u32_of(&config, &mock, 0x0c) >> 16, 0, "one function");
    assert_eq!(
        u32_of(&config, &mock, 0x04),
        0x0010_0000,
        "all off, no INTx pending"
    );
    assert_eq!(u32_of(&config, &mock, 0x30), 0, "no ROM");
    assert_eq!(
        u32_of(&config, &mock, 0x3c),
        0x100,
        "INTA, without a number"
    );
    assert_eq!(
        u32_of(&config, &mock, 0x24),
        0,
        "the I/O BAR has no place yet"
    );
}

#[test]
fn guest_finds_only_what_it_may_drive() {
    let (config, mock) = (config(), Mock::default());
    assert_eq!(list(&config, &mock), [0x05, 0x10, 0x11, 0x09]);
    assert_eq!(u32_of(&config, &mock, mock::POWER), 0);
    assert_eq!(u32_of(&config, &mock, mock::VPD), 0);
    assert_eq!(extended_list(&config, &mock), [0xffff, 0x03, 0x0b]);
    assert_eq!(u32_of(&config, &mock, mock::SERIAL + 4), 0x0403_0201);
    assert_eq!(u32_of(&config, &mock, mock::VIRTUAL_FUNCTIONS), 0);
    assert_eq!(u32_of(&config, &mock, mock::ACCESS_CONTROL), 0);
}

/// Drivers of mediated devices may have less than others, and nothing keeps the kernel's
/// sample, mtty, from reading on.
#[test]
fn nothing_is_read_past_the_end() {
    let mock = Mock::default();
    mock.state().config[0xfc..].fill(0x77);
    for (size, register, expected) in [
        (0xff, 0xfc, 0x0077_7777),
        (0xff, 0xfe, 0x77),
        (0x40, 0x40, 0),
        (0x40, 0xfc, 0),
    ] {
        mock.state().config.truncate(size);
        let config = GuestConfig::new(&mock.state().config, BAR_SIZES).unwrap();
        let found = u32_of(&config, &mock, register);
        assert_eq!(found, expected, "{register:#x} of {size:#x}");
    }
}

#[test]
fn capabilities_past_the_end_are_none() {
    for size in 0x40..=0x100 {
        let mock = Mock::default();
        let config = GuestConfig::new(&mock::space()[..size], BAR_SIZES).unwrap();
        mock.state().config.truncate(size);
        let ids = list(&config, &mock);
        assert!(
            [0x05, 0x10, 0x11, 0x09].starts_with(&ids),
            "{size:#x}: {ids:?}"
        );
    }
}

#[test]
fn bars_are_ours() {
    let (mut config, mock) = (config(), Mock::default());
    let requests: Vec<_> = config.bars().iter().map(|bar| bar.request()).collect();
    let sizes: Vec<_> = requests.iter().map(|request| request.size).collect();
    assert_eq!(sizes, [0x8000, 0x1000_0000, 0x100, 0x20]);
    assert_eq!(requests[0].window, BridgeWindow::Memory);
    assert_eq!(requests[1].window, BridgeWindow::Prefetchable);
    assert_eq!(requests[3].window, BridgeWindow::Io);
    config.set_bars(&[0xc010_0000, 0x20_0000_0000, 0xc010_8000, 0x1000]);
    assert_eq!(config.bar_address(1), None, "memory space is off");
    config.write(&mock, COMMAND, &[2, 0]).unwrap();
    assert_eq!(config.bar_address(0), Some(0xc010_0000));
    assert_eq!(config.bar_address(1), Some(0x20_0000_0000));
    assert_eq!(config.bar_address(2), Some(0xc010_8000));
    for (register, size) in [
        (0x10, 0xffff_8004),
        (0x18, 0xf000_000c),
        (0x20, 0xffff_ff00),
        (0x24, 0xffff_ffe1),
    ] {
        config.write(&mock, register, &[0xff; 4]).unwrap();
        assert_eq!(u32_of(&config, &mock, register), size);
    }
    config.write(&mock, 0x1c, &[0xff; 4]).unwrap();
    assert_eq!(config.bar_address(1), Some(0xffff_ffff_f000_0000));
    assert!(mock.state().config_writes.is_empty());
}

#[test]
fn ports_are_where_the_guest_has_them_while_it_has_them_on() {
    let (mut config, mock) = (config(), Mock::default());
    config.set_bars(&[0xc010_0000, 0x20_0000_0000, 0xc010_8000, 0x1000]);
    config.write(&mock, COMMAND, &[2]).unwrap();
    assert_eq!(config.bar_address(3), None);
    config.write(&mock, COMMAND, &[1]).unwrap();
    assert_eq!(
        (config.bar_address(3), config.bar_address(0)),
        (Some(0x1000), None)
    );
    config.write(&mock, 0x24, &[0xff, 0x2f]).unwrap();
    assert_eq!(config.bar_address(3), Some(0x2fe0));
    // Without a place it is not there, and stays so.
    let mut config = GuestConfig::new(&mock::space(), BAR_SIZES).unwrap();
    config.set_bars(&[0xc010_0000, 0x20_0000_0000, 0xc010_8000, 0]);
    config.write(&mock, COMMAND, &[1]).unwrap();
    config.write(&mock, 0x24, &[0xff; 4]).unwrap();
    assert_eq!(u32_of(&config, &mock, 0x24), 0);
    assert_eq!(config.bar_address(3), None);
    // A device without any has no such bit.
    let mut sizes = BAR_SIZES;
    sizes[5] = 0;
    let mut config = GuestConfig::new(&mock::space(), sizes).unwrap();
    config.write(&mock, COMMAND, &[1]).unwrap();
    assert_eq!(config.byte(COMMAND), 0);
    config.sync_command(&mock, false).unwrap();
    let written = mock.state().config_writes.last().cloned();
    assert_eq!(written, Some((4, vec![2, 4])));
}

#[test]
fn rom_answers_where_it_is_while_it_is_on() {
    let (mut config, mock) = (config(), Mock::default());
    for (size, is_possible) in [(0x800, true), (16 << 20, true), (0, false), (0x400, false)] {
        assert_eq!(is_rom_size(size), is_possible, "{size:#x}");
    }
    assert!(!is_rom_size(0x1800) && !is_rom_size(32 << 20));
    config.show_rom(0x1_0000);
    let request = config.bars()[4].request();
    assert_eq!(
        (request.size, request.window),
        (0x1_0000, BridgeWindow::Memory)
    );
    config.set_bars(&[
        0xc010_0000,
        0x20_0000_0000,
        0xc010_8000,
        0x1000,
        0xc012_0000,
    ]);
    assert_eq!(u32_of(&config, &mock, ROM), 0xc012_0000, "off");
    config.write(&mock, COMMAND, &[3]).unwrap();
    assert_eq!(config.bar_address(4), None);
    config.write(&mock, ROM, &[0xff; 4]).unwrap();
    assert_eq!(u32_of(&config, &mock, ROM), 0xffff_0001);
    config
        .write(&mock, ROM, &0xc013_0001_u32.to_le_bytes())
        .unwrap();
    assert_eq!(config.bar_address(4), Some(0xc013_0000));
    config.write(&mock, COMMAND, &[1]).unwrap();
    assert_eq!(config.bar_address(4), None);
    assert!(mock.state().config_writes.is_empty());
}

#[test]
fn device_decodes_memory_whatever_the_guest_says() {
    let (mut config, mock) = (config(), Mock::default());
    config.sync_command(&mock, false).unwrap();
    for command in [[0xff, 0xff], [0, 0]] {
        config.write(&mock, COMMAND, &command).unwrap();
        config.sync_command(&mock, true).unwrap();
    }
    let writes = mock.state().config_writes.clone();
    let words: Vec<_> = writes
        .iter()
        .map(|(at, value)| (*at, u16::from_le_bytes([value[0], value[1]])))
        .collect();
    // Memory and ports on and INTx off, bus master and errors as the guest has them.
    assert_eq!(words, [(4, 0x403), (4, 0x547), (4, 0x403)]);
    assert_eq!(u32_of(&config, &mock, COMMAND) & 0xffff, 0);
}

#[test]
fn link_is_shown_and_not_driven() {
    let (mut config, mock) = (config(), Mock::default());
    let link = Link {
        speed: 4,
        width: 8,
        payload: 2,
    };
    assert_eq!(config.link(), link);
    let at = mock::EXPRESS;
    assert_eq!(u32_of(&config, &mock, at + 0x0c), 8 << 4 | 4, "no ASPM");
    config.write(&mock, at + 0x10, &[0xff, 0xff]).unwrap();
    assert_eq!(u32_of(&config, &mock, at + 0x10) & 0xffff, 0);
    // Function-level reset is neither offered nor begun.
    assert_eq!(u32_of(&config, &mock, at + 0x04), 0x8002);
    config.write(&mock, at + 0x08, &[0x3f, 0xd0]).unwrap();
    assert_eq!(
        mock.state().config_writes.last(),
        Some(&(at as u64 + 8, vec![0x3f, 0x50]))
    );
    assert_eq!(
        u32_of(&config, &mock, at + 0x08),
        0x503f,
        "device control is the device's"
    );
    assert_eq!(u32_of(&config, &mock, at + 0x24), 0x1f, "no LTR");
}

#[test]
fn integrated_endpoint_gets_a_link() {
    let mut space = mock::space();
    space[mock::EXPRESS + 2] = 0x92;
    space[mock::EXPRESS + 0x0c..mock::EXPRESS + 0x14].fill(0);
    let config = GuestConfig::new(&space, BAR_SIZES).unwrap();
    assert_eq!(config.byte(mock::EXPRESS + 2), 0x02);
    assert_eq!((config.link().speed, config.link().width), (1, 1));
}

#[test]
fn msi_is_off_and_without_masks() {
    let (mut config, mock) = (config(), Mock::default());
    let control = u32_of(&config, &mock, mock::MSI) >> 16;
    assert_eq!(control, 0x0086);
    config.write(&mock, mock::MSI + 2, &[0xff, 0xff]).unwrap();
    assert_eq!(u32_of(&config, &mock, mock::MSI) >> 16, 0x00f7);
    let msi = config.layout().msi.unwrap();
    assert_eq!((msi.vectors, msi.wide), (8, true));
    assert!(mock.state().config_writes.is_empty());
}

#[test]
fn table_of_msix_is_not_larger_than_we_serve() {
    let mut space = mock::space();
    space[mock::MSIX + 2..mock::MSIX + 4].copy_from_slice(&0x7ff_u16.to_le_bytes());
    // Where there is room for 2048.
    let sizes = [0x20000, 0, 0x1000_0000, 0, 0x100, 0x20];
    let config = GuestConfig::new(&space, sizes).unwrap();
    let msix = config.layout().msix.unwrap();
    assert_eq!(msix.vectors, 256);
    assert_eq!(config.u16_at(msix.control), 255);
    assert_eq!(msix.entries, 2048);
    assert_eq!((msix.table_len(), msix.pending_len()), (32768, 256));
}

#[test]
fn msix_outside_of_its_bar_is_not_offered() {
    for (table, pending) in [(0x7ff8_u32, 0_u32), (1, 0), (0, 0x7fff_fff8), (5, 0)] {
        let mut space = mock::space();
        space[mock::MSIX + 4..mock::MSIX + 8].copy_from_slice(&table.to_le_bytes());
        space[mock::MSIX + 8..mock::MSIX + 12].copy_from_slice(&pending.to_le_bytes());
        let config = GuestConfig::new(&space, BAR_SIZES).unwrap();
        assert_eq!(config.layout().msix, None);
        assert_eq!(list(&config, &Mock::default()), [0x05, 0x10, 0x09]);
    }
}

#[test]
fn devices_no_guest_can_have_are_refused() {
    let refusal = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut space = mock::space();
        change(&mut space);
        GuestConfig::new(&space, BAR_SIZES).err().unwrap()
    };
    assert_eq!(refusal(&|space| space[0x0e] = 0x81), ConfigError::Bridge(1));
    assert_eq!(refusal(&|space| space.fill(0xff)), ConfigError::Gone);
    let odd = GuestConfig::new(&mock::space(), [3 << 12, 0, 0, 0, 0, 0]);
    assert_eq!(odd.err(), Some(ConfigError::BarSize(0, 3 << 12)));
    // Neither interrupts nor capabilities: nothing is missed.
    let mut space = mock::space();
    (space[0x34], space[0x3d]) = (0, 0);
    let config = GuestConfig::new(&space, BAR_SIZES).unwrap();
    assert_eq!(config.byte(STATUS) & STATUS_LIST, 0);
}

#[test]
fn line_is_wanted_by_a_guest_that_uses_the_device_without_messages() {
    let (mut config, mock) = (config(), Mock::default());
    let mut wants = |register: usize, value: u8| {
        config.write(&mock, register, &[value]).unwrap();
        config.wants_intx()
    };
    assert!(!wants(COMMAND, 0) && wants(COMMAND, 2) && wants(COMMAND, 4));
    assert!(!wants(mock::MSI + 2, 1) && wants(mock::MSI + 2, 0));
    assert!(!wants(mock::MSIX + 3, 0x80) && wants(mock::MSIX + 3, 0));
    assert!(wants(COMMAND + 1, 4) && wants(COMMAND + 1, 0));
    // One with a line only, of a function that is not the first of its device; and one with none.
    let mut space = mock::space();
    (space[0x34], space[0x3d]) = (0, 4);
    let mut config = GuestConfig::new(&space, BAR_SIZES).unwrap();
    config.write(&mock, COMMAND, &[4]).unwrap();
    assert!(config.wants_intx());
    assert_eq!(config.byte(INTERRUPT_PIN), 1);
    space[0x3d] = 0;
    let mut config = GuestConfig::new(&space, BAR_SIZES).unwrap();
    config.write(&mock, COMMAND, &[4]).unwrap();
    assert!(!config.wants_intx());
}

#[test]
fn interrupt_that_is_pending_shows() {
    let (config, mock) = (config(), Mock::default());
    let status = |config: &GuestConfig, register: usize, len: usize| {
        let mut bytes = [0; 8];
        config.read(&mock, register, &mut bytes[..len]).unwrap();
        bytes[STATUS - register]
    };
    let ways = [(STATUS, 1), (STATUS, 2), (COMMAND, 4), (COMMAND, 8)];
    for (register, len) in ways {
        assert_eq!(status(&config, register, len), 0x10, "a capability list");
    }
    mock.state().config[STATUS] |= 8;
    for (register, len) in ways {
        assert_eq!(status(&config, register, len), 0x18);
    }
    let mut without = GuestConfig::new(&mock::space(), BAR_SIZES).unwrap();
    without.hide_intx().unwrap();
    assert_eq!(status(&without, COMMAND, 4), 0x10);
    mock.state().is_gone = true;
    let mut byte = [0];
    assert!(config.read(&mock, STATUS, &mut byte).is_err());
    assert_eq!(byte, [0x10], "nothing is said of one");
}

#[test]
fn lists_that_are_circles_or_lead_astray_end() {
    let mut space = mock::space();
    space[mock::VENDOR + 1] = 0x50;
    space[mock::ACCESS_CONTROL..mock::ACCESS_CONTROL + 4]
        .copy_from_slice(&(0x140_u32 << 20 | 0x1000d).to_le_bytes());
    let config = GuestConfig::new(&space, BAR_SIZES).unwrap();
    assert_eq!(list(&config, &Mock::default()), [0x05, 0x10, 0x11, 0x09]);
    space[0x34] = 0xff;
    space[0xfc..0x100].copy_from_slice(&[0x05, 0xfe, 0x80, 0]);
    space[0x3d] = 0;
    let config = GuestConfig::new(&space, BAR_SIZES).unwrap();
    assert!(list(&config, &Mock::default()).is_empty());
}

#[test]
fn device_that_is_gone_reads_as_ones_where_it_is_asked() {
    let (config, mock) = (config(), Mock::default());
    mock.state().is_gone = true;
    let mut bytes = [0; 4];
    config.read(&mock, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [0x34, 0x12, 0x78, 0x56], "that is ours");
    assert!(config.read(&mock, mock::EXPRESS + 8, &mut bytes).is_err());
    assert_eq!(bytes, [0xff; 4]);
}

proptest! {
    /// Whatever a device's memory holds, it is refused or the lists a guest finds end.
    #[test]
    fn any_configuration_space_is_safe(
        bytes in prop::collection::vec(any::<u8>(), 256..=4096),
        sizes in prop::array::uniform6((0..64u32).prop_map(|bits| 1u64 << bits)),
    ) {
        let mut bytes = bytes;
        bytes[0x0e] &= 0x80;
        bytes[0x3d] = 0;
        let Ok(config) = GuestConfig::new(&bytes, sizes) else { return Ok(()) };
        let mock = Mock::default();
        prop_assert!(list(&config, &mock).len() <= 48);
        prop_assert!(extended_list(&config, &mock).len() <= 960);
    }

    /// Whatever a guest writes, the device is written only where it may be: its
    /// command, what device status is left to it, device control, vendor's registers. Its line is
    /// let loose only when somebody listens to it.
    #[test]
    fn any_write_stays_within_what_is_passed_on(
        writes in prop::collection::vec(
            (0usize..4100, prop::collection::vec(any::<u8>(), 1..=8), any::<bool>()), 1..64),
    ) {
        let (mut config, mock) = (config(), Mock::default());
        for (register, data, has_listener) in &writes {
            config.write(&mock, *register, data).unwrap();
            config.sync_command(&mock, *has_listener).unwrap();
            let is_loose = mock.state().command() & INTX_DISABLE == 0;
            let guest_lets_it = config.u16_at(COMMAND) & INTX_DISABLE == 0;
            prop_assert_eq!(is_loose, *has_listener && config.wants_intx() && guest_lets_it);
            config.read(&mock, *register, &mut vec![0; data.len()]).ok();
        }
        let allowed = |at: u64| {
            let at = usize::try_from(at).unwrap();
            let express = at.wrapping_sub(mock::EXPRESS);
            matches!(at, 4 | 5 | 7)
                || (8..12).contains(&express)
                || (0x28..0x2a).contains(&express)
                || (mock::VENDOR + 2..mock::VENDOR + 0x10).contains(&at)
                || (mock::VENDOR_EXTENDED + 8..mock::VENDOR_EXTENDED + 0x10).contains(&at)
        };
        for (at, data) in &mock.state().config_writes {
            prop_assert!((*at..).take(data.len()).all(allowed), "{at:#x} {data:?}");
            if *at == 4 {
                prop_assert_eq!(data[0] & 3, 3, "memory and ports stay on");
            }
            let mut bytes = (*at..).zip(data);
            let reset = bytes.find(|(at, _)| *at == mock::EXPRESS as u64 + 9);
            prop_assert!(reset.is_none_or(|(_, byte)| byte & 0x80 == 0), "a reset begins");
        }
        prop_assert_eq!(list(&config, &mock), [0x05, 0x10, 0x11, 0x09]);
    }
}
