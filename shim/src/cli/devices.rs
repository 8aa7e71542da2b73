//! `nacre devices`: which of the host's devices pods could be given, and moving
//! them to vfio-pci and back ([`crate::devices`]).

use std::io::Write;

use super::{CliError, table};
use crate::devices::bind::{self, Moved};
use crate::devices::names::Names;
use crate::devices::{Address, Claims, DeviceError, Function, System, group};

/// Prints a table of all devices in IOMMU groups. Bridges are left out: they are no
/// device's to pass, nor in its way.
pub(super) fn list(system: &System, claims: &Claims, out: &mut impl Write) -> Result<(), CliError> {
    let names = Names::load(system);
    let mut rows = vec![
        [
            "ADDRESS", "ID", "CLASS", "GROUP", "DRIVER", "BARS", "NUMA", "RESET", "HELD BY", "NAME",
        ]
        .map(str::to_owned),
    ];
    let groups = system.groups()?;
    for members in groups.values() {
        let devices: Vec<_> = members
            .iter()
            .filter(|member| !member.is_bridge())
            .collect();
        for device in &devices {
            let holder = claims.holder(device.address).map_err(DeviceError::from)?;
            rows.push(row(device, &devices, holder, &names));
        }
    }
    // By address, the header first.
    rows.get_mut(1..).unwrap_or_default().sort();
    table::print(out, &rows).map_err(CliError::Write)?;
    if groups.is_empty() {
        let hint = "no device is in an IOMMU group: turn the IOMMU on in the firmware (VT-d, AMD-Vi) \
                    and, on Intel, with intel_iommu=on on the kernel command line";
        writeln!(out, "{hint}").map_err(CliError::Write)?;
    }
    Ok(())
}

fn row(
    device: &Function,
    group: &[&Function],
    holder: Option<String>,
    names: &Names,
) -> [String; 10] {
    let dash = || "-".to_owned();
    // Those of a mediated device nobody knows before it is opened.
    let ids = match device.mediated {
        Some(_) => dash(),
        None => format!("{:04x}:{:04x}", device.vendor, device.device),
    };
    [
        device.address.to_string(),
        ids,
        class(device),
        group_cell(device, group),
        device.driver.clone().unwrap_or_else(dash),
        table::list(&device.bars),
        device.numa_node.map_or_else(dash, |node| node.to_string()),
        table::list(&device.reset_methods),
        holder.unwrap_or_else(dash),
        names.of(device).unwrap_or_else(dash),
    ]
}

fn class(device: &Function) -> String {
    if let Some(mediated) = &device.mediated {
        return format!("mediated, of {}", mediated.parent);
    }
    let name = device.class_name();
    match (device.physical_function, device.virtual_functions.len()) {
        (Some(physical), _) => format!("{name}, VF of {physical}"),
        (None, 0) => name,
        (None, count) => format!("{name}, {count} VFs"),
    }
}

/// The group's number, and who else is in it.
fn group_cell(device: &Function, group: &[&Function]) -> String {
    let number = device
        .group
        .map_or_else(|| "-".into(), |group| group.to_string());
    let members = group.iter().map(|member| member.address);
    let others: Vec<_> = members.filter(|other| *other != device.address).collect();
    if others.is_empty() {
        number
    } else {
        format!("{number} with {}", table::list(&others))
    }
}

/// Gives devices to vfio-pci, and tells of what is missing to pass them.
pub(super) fn bind(
    system: &System,
    addresses: &[Address],
    out: &mut impl Write,
) -> Result<(), CliError> {
    for moved in bind::bind(system, addresses)? {
        tell(&moved, out)?;
    }
    for address in addresses {
        let function = system.function(*address)?;
        let (number, members) = group::of(system, &function)?;
        if let Err(error) = group::check(number, &members, addresses) {
            writeln!(out, "{address} is not ready yet: {error}").map_err(CliError::Write)?;
        }
    }
    Ok(())
}

/// Gives devices back to the host.
pub(super) fn unbind(
    system: &System,
    claims: &Claims,
    addresses: &[Address],
    out: &mut impl Write,
) -> Result<(), CliError> {
    for moved in bind::unbind(system, claims, addresses)? {
        tell(&moved, out)?;
    }
    Ok(())
}

fn tell(moved: &Moved, out: &mut impl Write) -> Result<(), CliError> {
    let Moved { address, from, to } = moved;
    let name = |driver: &Option<String>| driver.clone().unwrap_or_else(|| "no driver".into());
    let (from, to) = (name(from), name(to));
    if from == to {
        writeln!(out, "{address}: {to}, as before")
    } else {
        writeln!(out, "{address}: {from} -> {to}")
    }
    .map_err(CliError::Write)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Tree, address};
    use crate::rundir::{Proc, RunDir, State};
    use std::path::Path;

    fn host() -> Tree {
        let tree = Tree::new();
        let gpu = tree.add("0000:01:00.0", 0x03_0200);
        gpu.group(12)
            .driver("nouveau")
            .file("vendor", "0x10de\n")
            .file("device", "0x2330\n")
            .file("numa_node", "1\n")
            .file("reset_method", "flr bus\n")
            .file(
                "resource",
                "0x00000000febd0000 0x00000000febd3fff 0x0000000000140204\n",
            );
        tree.add("0000:01:00.1", 0x04_0300).group(12);
        tree.add("0000:00:01.0", 0x06_0400)
            .group(12)
            .driver("pcieport");
        tree.add("0000:00:1f.3", 0x0c_0500);
        tree
    }

    fn living_pod(root: &Path, id: &str) -> RunDir {
        let pod = RunDir::new(root, "k8s.io", id).unwrap();
        pod.create().unwrap();
        let state = State {
            daemon: Proc::of(std::process::id()),
            ..State::default()
        };
        pod.save(&state).unwrap();
        pod
    }

    fn table_of(tree: &Tree, run_dir: &Path) -> Vec<Vec<String>> {
        let mut out = Vec::new();
        list(&tree.system(), &Claims::of(run_dir), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let cells = |line: &str| -> Vec<String> {
            let cells = line
                .split("  ")
                .map(str::trim)
                .filter(|cell| !cell.is_empty());
            cells.map(str::to_owned).collect()
        };
        text.lines().map(cells).collect()
    }

    #[test]
    fn devices_in_groups_are_listed_with_all_there_is_to_know() {
        let tree = host();
        tree.write(
            "usr/share/misc/pci.ids",
            "10de  NVIDIA Corporation\n\t2330  GH100 [H100]\n",
        );
        let root = tempfile::tempdir().unwrap();
        let pod = living_pod(root.path(), "web");
        pod.claims().claim(&pod, &[address("01:00.0")]).unwrap();

        let table = table_of(&tree, root.path());
        let gpu = [
            "0000:01:00.0",
            "10de:2330",
            "GPU (3D)",
            "12 with 0000:01:00.1",
            "nouveau",
            "0:16K",
            "1",
            "flr,bus",
            "k8s.io/web",
            "NVIDIA Corporation GH100 [H100]",
        ];
        assert_eq!(table[0][8], "HELD BY");
        assert_eq!(table[1], gpu);
        let audio = [
            "0000:01:00.1",
            "0000:0000",
            "audio",
            "12 with 0000:01:00.0",
            "-",
            "-",
            "-",
            "-",
            "-",
            "-",
        ];
        assert_eq!(table[2], audio);
        assert_eq!(table.len(), 3, "no bridge, nothing without a group");
    }

    #[test]
    fn a_host_without_iommu_is_told_how_to_turn_it_on() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", 0x03_0200);
        let table = table_of(&tree, Path::new("/nonexistent"));
        assert!(table[1][0].contains("intel_iommu=on"), "{table:?}");
    }

    #[test]
    fn virtual_functions_and_theirs() {
        let tree = Tree::new();
        let physical = tree.add("0000:01:00.0", 0x02_0000);
        physical.group(1).link("virtfn0", "../0000:01:10.0");
        let function = tree.add("0000:01:10.0", 0x02_0000);
        function.group(2).link("physfn", "../0000:01:00.0");
        let table = table_of(&tree, Path::new("/nonexistent"));
        assert_eq!(table[1][2], "Ethernet, 1 VFs");
        assert_eq!(table[2][2], "Ethernet, VF of 0000:01:00.0");
    }

    #[test]
    fn mediated_devices_are_listed_by_their_uuids() {
        let tree = host();
        let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        tree.add_mediated(uuid, "devices/virtual/mtty/mtty")
            .group(13)
            .file("mdev_type/name", "Dual port serial\n");
        let root = tempfile::tempdir().unwrap();
        let pod = living_pod(root.path(), "web");
        pod.claims().claim(&pod, &[address(uuid)]).unwrap();
        let table = table_of(&tree, root.path());
        let part = [
            uuid,
            "-",
            "mediated, of mtty",
            "13",
            "mtty",
            "-",
            "-",
            "-",
            "k8s.io/web",
            "Dual port serial",
        ];
        assert_eq!(table[3], part);
    }

    #[test]
    fn moves_are_told_and_what_is_missing() {
        let tree = host();
        let nothing = Claims::of(Path::new("/nonexistent"));
        let gpu = [address("01:00.0")];
        let mut out = Vec::new();
        bind(&tree.system(), &gpu, &mut out).unwrap();
        bind(&tree.system(), &gpu, &mut out).unwrap();
        unbind(&tree.system(), &nothing, &gpu, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let expected = "0000:01:00.0: nouveau -> vfio-pci\n0000:01:00.0: vfio-pci, as before\n\
                        0000:01:00.0: vfio-pci -> nouveau\n";
        assert_eq!(text, expected);

        tree.add("0000:01:00.2", 0x0c_0330)
            .group(12)
            .driver("xhci_hcd");
        let mut out = Vec::new();
        bind(&tree.system(), &gpu, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("not ready yet"), "{text}");
        assert!(text.contains("0000:01:00.2 (xhci_hcd)"), "{text}");
    }
}
