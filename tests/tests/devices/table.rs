//! `nacre devices`, the list.

use std::collections::BTreeMap;

use crate::{
    Bound, CARD_PORT, EDU, NIC, NVME_PORT, PAIR, SWITCH_PORT, TESTDEV, VGA, behind, devices, group,
};

/// The cells of a device's line by the names of their columns.
pub fn row(address: &str) -> BTreeMap<String, String> {
    let table = devices(&[]).exits(0).stdout;
    let cells = |line: &str| -> Vec<String> {
        let cells = line.split("  ").map(str::trim);
        let cells = cells.filter(|cell| !cell.is_empty());
        cells.map(str::to_owned).collect()
    };
    let names = cells(table.lines().next().unwrap());
    let line = table.lines().find(|line| line.starts_with(address));
    let line = line.unwrap_or_else(|| panic!("no {address} in {table}"));
    names.into_iter().zip(cells(line)).collect()
}

#[test]
fn what_the_machine_has_is_listed() {
    let address = behind(NVME_PORT);
    let nvme = row(&address);
    let group = group(&address);
    for (column, cell) in [
        ("ID", "1b36:0010"),
        ("CLASS", "NVMe"),
        ("DRIVER", "nvme"),
        ("GROUP", group.as_str()),
        ("BARS", "0:16K"),
        ("HELD BY", "-"),
    ] {
        assert_eq!(nvme[column], cell, "{column}: {nvme:?}");
    }
    assert!(nvme["RESET"].starts_with("flr"), "{nvme:?}");
    let edu = row(EDU);
    assert_eq!(
        (edu["ID"].as_str(), edu["DRIVER"].as_str()),
        ("1234:11e8", "-")
    );
    assert_eq!(edu["RESET"], "-");
    assert!(row(TESTDEV)["BARS"].contains("2:4G"), "{:?}", row(TESTDEV));
    assert_eq!(row(NIC)["CLASS"], "Ethernet");
    assert_eq!(row(VGA)["CLASS"], "GPU (VGA)");
}

#[test]
fn members_of_a_group_are_named_and_bridges_are_not() {
    // Behind one port, so that a bus is theirs alone.
    let card = behind(CARD_PORT);
    let slot = card.strip_suffix(".0").or_else(|| card.strip_suffix(".1"));
    let card = [0, 1].map(|function| format!("{}.{function}", slot.unwrap()));
    for [first, second] in [PAIR, [&card[0], &card[1]]] {
        for [one, other] in [[first, second], [second, first]] {
            let row = row(one);
            assert_eq!(row["GROUP"], format!("{} with {other}", group(one)));
        }
    }
    // The kernel tells it of the one it finds first, when that is alone there still.
    assert_eq!(
        card.map(|function| row(&function)["RESET"].clone()),
        ["bus", "-"]
    );
    let switched = behind(SWITCH_PORT);
    assert_eq!(row(&switched)["GROUP"], group(&switched));
    let table = devices(&[]).exits(0).stdout;
    assert!(
        !table.contains(SWITCH_PORT) && !table.contains("bridge"),
        "{table}"
    );
}

#[test]
fn the_driver_shown_is_the_one_it_has() {
    let _bound = Bound::new(&[EDU]);
    assert_eq!(row(EDU)["DRIVER"], "vfio-pci");
}
