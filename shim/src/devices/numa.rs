//! The NUMA node that devices are at: a guest whose memory and processors are there too
//! has its DMA and interrupts without a way between sockets.

use std::collections::BTreeMap;

use super::{Address, DeviceError, System};
use crate::cgroup::NumberList;

/// A NUMA node of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub number: u32,
    /// Its processors.
    pub cpus: NumberList,
}

/// The node that most of the devices are at, the first of several; `None` where the host
/// has one node, or the firmware does not say.
///
/// # Errors
///
/// What sysfs says that cannot be.
pub fn node_of(system: &System, devices: &[Address]) -> Result<Option<Node>, DeviceError> {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for address in devices {
        if let Some(node) = system.function(*address)?.numa_node {
            *counts.entry(node).or_default() += 1;
        }
    }
    // Of equals `max_by_key` has the last.
    let most = counts.iter().rev().max_by_key(|(_, count)| **count);
    let Some((number, _)) = most else {
        return Ok(None);
    };
    let cpus = system.node_cpus(*number)?;
    Ok(cpus.map(|cpus| Node {
        number: *number,
        cpus,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Tree, address};

    const DEVICES: [&str; 4] = [
        "0000:17:00.0",
        "0000:65:00.0",
        "0000:b1:00.0",
        "0000:b2:00.0",
    ];

    /// A host of two sockets, and a device of which nobody knows where it is.
    fn host() -> Tree {
        let tree = Tree::new();
        for (name, node) in DEVICES.into_iter().zip(["0\n", "-1\n", "1\n", "1\n"]) {
            tree.add(name, 0x03_0200).file("numa_node", node);
        }
        tree.write("sys/devices/system/node/node0/cpulist", "0-15,32-47\n");
        tree.write("sys/devices/system/node/node1/cpulist", "16-31,48-63\n");
        tree
    }

    fn node(tree: &Tree, devices: &[usize]) -> Option<(u32, String)> {
        let devices: Vec<_> = devices.iter().map(|at| address(DEVICES[*at])).collect();
        let node = node_of(&tree.system(), &devices).unwrap();
        node.map(|node| (node.number, node.cpus.to_string()))
    }

    #[test]
    fn most_of_the_devices_decide() {
        let tree = host();
        let first = Some((0, "0-15,32-47".to_owned()));
        let second = Some((1, "16-31,48-63".to_owned()));
        assert_eq!(node(&tree, &[0]), first);
        assert_eq!(node(&tree, &[2]), second);
        assert_eq!(node(&tree, &[0, 2, 3]), second);
        assert_eq!(node(&tree, &[0, 1, 2]), first, "one each");
        assert_eq!(node(&tree, &[1]), None, "nobody knows");
        assert_eq!(node(&tree, &[]), None);
    }

    /// Of a mediated device nobody says where it is, but for its parent.
    #[test]
    fn a_mediated_device_is_where_its_parent_is() {
        let tree = host();
        let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        let parent = format!("devices/pci0000:00/{}", DEVICES[2]);
        tree.add_mediated(uuid, &parent);
        let node = node_of(&tree.system(), &[address(uuid)]).unwrap();
        assert_eq!(node.map(|node| node.number), Some(1));
    }

    #[test]
    fn nodes_without_processors_and_bad_lists() {
        let tree = host();
        tree.write("sys/devices/system/node/node1/cpulist", "\n");
        assert_eq!(node(&tree, &[2]), None);
        tree.write("sys/devices/system/node/node0/cpulist", "0-\n");
        let error = node_of(&tree.system(), &[address(DEVICES[0])]).unwrap_err();
        assert!(matches!(error, DeviceError::Malformed { .. }), "{error}");
    }
}
