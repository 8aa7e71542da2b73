//! The BARs of a device of the host in the guest's address space.
//!
//! What the device lets us map is a memory slot of the guest: its accesses do not
//! leave the processor. The pages of the MSI-X table and its pending bits are left
//! out, because those are ours; accesses there, and to what cannot be mapped, come to
//! [`super::VfioPci`].
//!
//! ```text
//!   BAR 0   |  slot  | table | pending |        slot        |
//! ```

use std::io;
use std::sync::Arc;

use super::access::{Access, Region};
use super::capabilities::MsixLayout;
use super::config::Bar;
use super::sys::DmaRange;
use crate::layout;
use crate::vm::{DeviceMemory, PAGE_SIZE, Vm, VmError};

const PAGE: u64 = PAGE_SIZE as u64;

/// The mapped parts of a device's BARs.
pub struct BarMap {
    vm: Arc<Vm>,
    window64: Option<(u64, u64)>,
    bars: Vec<Vec<Area>>,
}

struct Area {
    offset: u64,
    memory: DeviceMemory,
}

impl BarMap {
    /// Maps what there is to be mapped, nowhere in the guest yet.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn new(
        vm: &Arc<Vm>,
        window64: Option<(u64, u64)>,
        device: &dyn Access,
        bars: &[(Bar, Region)],
        msix: Option<MsixLayout>,
    ) -> io::Result<Self> {
        // What is in it by then is unmapped with it when a step fails.
        let mut map = Self {
            vm: vm.clone(),
            window64,
            bars: bars.iter().map(|_| Vec::new()).collect(),
        };
        for (areas, (bar, region)) in map.bars.iter_mut().zip(bars) {
            for (start, end) in mapped_areas(*bar, region, msix) {
                let mapping = device.map(region_of(*bar), start, end - start)?;
                areas.push(Area {
                    offset: start,
                    memory: vm.add_device_memory(mapping),
                });
            }
        }
        Ok(map)
    }

    /// Has a BAR of `size` bytes at `address`, or nowhere. Outside of the windows, where a
    /// guest may put it while it asks for its size, it is not mapped.
    ///
    /// # Errors
    ///
    /// KVM's first, when the guest puts it over another one. Its other parts are
    /// where they belong all the same.
    pub fn move_bar(
        &mut self,
        place: usize,
        size: u64,
        address: Option<u64>,
    ) -> Result<(), VmError> {
        let address = address.filter(|address| self.is_in_window(*address, size));
        let Some(areas) = self.bars.get_mut(place) else {
            return Ok(());
        };
        let mut result = Ok(());
        for area in areas {
            let to = address.map(|address| address + area.offset);
            result = result.and(self.vm.move_device_memory(&mut area.memory, to));
        }
        result
    }

    /// The mapped parts of a BAR, for other devices' DMA, when it is at `address`.
    pub fn dma_ranges(&self, place: usize, address: u64) -> impl Iterator<Item = DmaRange> {
        let areas = self.bars.get(place).into_iter().flatten();
        areas.map(move |area| {
            let (host, len) = area.memory.mapped();
            DmaRange {
                iova: address + area.offset,
                len,
                host,
            }
        })
    }

    /// Maps nothing any more.
    ///
    /// # Errors
    ///
    /// KVM's first: the guest has that part yet. It has none of the others.
    pub fn close(&mut self) -> Result<(), VmError> {
        let mut result = Ok(());
        for mut area in std::mem::take(&mut self.bars).into_iter().flatten() {
            result = result.and(self.vm.remove_device_memory(&mut area.memory));
        }
        result
    }

    /// Where the mapped parts of a BAR are.
    #[cfg(test)]
    pub fn addresses(&self, place: usize) -> Vec<Option<u64>> {
        let areas = self.bars[place].iter();
        areas.map(|area| area.memory.address()).collect()
    }

    fn is_in_window(&self, address: u64, size: u64) -> bool {
        let windows = [
            Some((layout::WINDOW32_START, layout::WINDOW32_END)),
            self.window64,
        ];
        let end = address.checked_add(size);
        let mut windows = windows.into_iter().flatten();
        windows.any(|window| window.0 <= address && end.is_some_and(|end| end <= window.1))
    }
}

impl Drop for BarMap {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, "a device's registers stay mapped");
        }
    }
}

/// The VFIO region of a BAR.
pub fn region_of(bar: Bar) -> u32 {
    u32::try_from(bar.index).unwrap_or(u32::MAX)
}

/// The parts of a BAR that are mapped: start and end, whole pages.
fn mapped_areas(bar: Bar, region: &Region, msix: Option<MsixLayout>) -> Vec<(u64, u64)> {
    if bar.is_io() || bar.is_rom() {
        return Vec::new();
    }
    let trapped = |msix: MsixLayout| {
        [
            (msix.table, msix.table_len()),
            (msix.pending, msix.pending_len()),
        ]
    };
    let trapped = msix.into_iter().flat_map(trapped);
    let trapped = trapped.filter(|((index, _), _)| *index == bar.index);
    let mut areas: Vec<(u64, u64)> = region
        .mappable
        .iter()
        .map(|(start, len)| (*start, start.saturating_add(*len).min(bar.size)))
        .collect();
    for ((_, offset), len) in trapped {
        let hole = (offset & !(PAGE - 1), (offset + len).next_multiple_of(PAGE));
        areas = areas
            .into_iter()
            .flat_map(|(start, end)| [(start, end.min(hole.0)), (start.max(hole.1), end)])
            .collect();
    }
    areas
        .into_iter()
        .filter(|(start, end)| start < end)
        .map(|(start, end)| (start.next_multiple_of(PAGE), end & !(PAGE - 1)))
        .filter(|(start, end)| start < end)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{WINDOW32_PORTS, WINDOW32_START};
    use crate::vfio::config::GuestConfig;
    use crate::vfio::mock::{self, Mock};
    use crate::vm::test_vm;

    fn areas(size: u64, mappable: &[(u64, u64)], msix: Option<MsixLayout>) -> Vec<(u64, u64)> {
        let config = GuestConfig::new(&mock::space(), [size, 0, 0, 0, 0, 0]).unwrap();
        let region = Region {
            size,
            mappable: mappable.to_vec(),
        };
        mapped_areas(config.bars()[0], &region, msix)
    }

    fn msix(table: u64, pending: u64, entries: u16) -> MsixLayout {
        MsixLayout {
            control: 0,
            vectors: 1,
            entries,
            table: (0, table),
            pending: (0, pending),
        }
    }

    #[test]
    fn pages_of_the_table_and_the_pending_bits_are_left_out() {
        let whole = [(0, 0x8000)];
        assert_eq!(areas(0x8000, &whole, None), whole);
        let layout = msix(0x2000, 0x3000, 65);
        assert_eq!(
            areas(0x8000, &whole, Some(layout)),
            [(0, 0x2000), (0x4000, 0x8000)]
        );
        // In the middle of pages, the table over two of them.
        let layout = msix(0x1ff0, 0x5800, 2);
        assert_eq!(
            areas(0x8000, &whole, Some(layout)),
            [(0, 0x1000), (0x3000, 0x5000), (0x6000, 0x8000)]
        );
    }

    #[test]
    fn entries_the_guest_is_not_offered_are_left_out_too() {
        let layout = msix(0x2000, 0xc000, 2048);
        assert_eq!(
            areas(0x10000, &[(0, 0x10000)], Some(layout)),
            [(0, 0x2000), (0xa000, 0xc000), (0xd000, 0x10000)]
        );
    }

    #[test]
    fn part_that_has_no_place_does_not_keep_the_others_from_theirs() {
        let Some(vm) = test_vm() else {
            return;
        };
        let mock = Mock::default();
        mock.state().mappable = vec![(0, 0x1000), (0x3000, 0x2000), (0x6000, 0x1000)];
        let config = GuestConfig::new(&mock::space(), mock.state().sizes).unwrap();
        let bars = [(config.bars()[0], mock.region(0).unwrap())];
        let mut map = BarMap::new(&vm, None, &mock, &bars, None).unwrap();
        let mut go_to = |address| {
            let result = map.move_bar(0, mock::BAR0_SIZE, Some(address));
            (result.is_ok(), map.addresses(0))
        };
        let at = |start: u64| [0, 0x3000, 0x6000].map(|offset| Some(start + offset));
        assert_eq!(go_to(WINDOW32_START), (true, at(WINDOW32_START).to_vec()));
        let [_, second, third] = at(WINDOW32_PORTS);
        vm.add_read_only_page(WINDOW32_PORTS).unwrap();
        assert_eq!(go_to(WINDOW32_PORTS), (false, vec![None, second, third]));
    }

    #[test]
    fn nothing_stays_mapped_of_a_device_that_goes_or_fails() {
        let Some(vm) = test_vm() else {
            return;
        };
        let mock = Mock::default();
        mock.state().mappable = vec![(0, 0x1000), (0x3000, 0x1000)];
        let config = GuestConfig::new(&mock::space(), mock.state().sizes).unwrap();
        let bars = [(config.bars()[0], mock.region(0).unwrap())];
        let map = || BarMap::new(&vm, None, &mock, &bars, None);
        mock.state().unmappable = Some(0x3000);
        assert!(map().is_err());
        assert_eq!(vm.mappings(), 0);
        mock.state().unmappable = None;
        let mut mapped = map().unwrap();
        mapped
            .move_bar(0, mock::BAR0_SIZE, Some(WINDOW32_START))
            .unwrap();
        assert_eq!(vm.mappings(), 2);
        drop(mapped);
        assert_eq!(vm.mappings(), 0);
    }

    #[test]
    fn table_in_another_bar_leaves_this_one_whole() {
        let mut layout = msix(0, 0x800, 2);
        (layout.table.0, layout.pending.0) = (4, 4);
        assert_eq!(areas(0x4000, &[(0, 0x4000)], Some(layout)), [(0, 0x4000)]);
    }

    #[test]
    fn only_whole_pages_of_what_the_device_allows_are_mapped() {
        let sparse = [(0, 0x1800), (0x2800, 0x1000), (0x4000, 0x1000)];
        assert_eq!(
            areas(0x8000, &sparse, None),
            [(0, 0x1000), (0x4000, 0x5000)]
        );
        assert!(areas(0x100, &[(0, 0x100)], None).is_empty());
        let absurd = [(0x7000, u64::MAX), (u64::MAX - 0x1000, 0x1000)];
        assert_eq!(areas(0x8000, &absurd, None), [(0x7000, 0x8000)]);
    }
}
