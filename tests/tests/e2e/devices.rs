//! PCI devices of the host in a Linux guest, by vmm's example `boot`. They are QEMU's,
//! in a lab that has them (`lab run --devices`); elsewhere these tests are skipped.

use std::fs;
use std::path::{Path, PathBuf};

use nacre_tests::{Machine, Said};

use crate::boot::boot;

const EDU: [&str; 2] = ["0x1234", "0x11e8"];
const TESTDEV: [&str; 2] = ["0x1b36", "0x0005"];
const NVME: [&str; 2] = ["0x1b36", "0x0010"];
const XHCI: [&str; 2] = ["0x1b36", "0x000d"];

/// What a guest's init needs to look around: a line of `resource` is start, end, flags.
const LOOK: &str = "mkdir /sys; mount -t sysfs sys /sys; cd /sys/bus/pci/devices
say complaints $(dmesg | grep -c -i -e \"can't claim\" -e 'no space for' -e 'failed to assign' -e 'can.t assign')
for d in 0000:0[1-9]:00.0; do
  say \"$d $(cat $d/vendor) $(cat $d/device) under $(basename $(dirname $(readlink -f $d)))\"
  grep -v '^0x0* 0x0* ' $d/resource | while read -r bar; do say \"$d has $bar\"; done
done
poweroff -f";

/// What it needs to have a device's interrupt line found, which happens when it is enabled.
const ENABLE: &str = "mkdir /sys; mount -t sysfs sys /sys; cd /sys/bus/pci/devices/0000:01:00.0
echo 1 >enable
say complaints $(dmesg | grep -c -e 'no GSI' -e 'derive routing')
say line $(cat irq).
poweroff -f";

/// Addresses of devices that are alone in their groups, in the hands of vfio-pci; `None` if
/// one is not there.
fn devices(ids: &[[&str; 2]]) -> Option<Vec<String>> {
    let groups: Vec<_> = ids.iter().map(|id| (*id, 1)).collect();
    groups_of(&groups)
}

/// The same of devices that are so many together in a group.
fn groups_of(ids: &[([&str; 2], usize)]) -> Option<Vec<String>> {
    let found: Option<Vec<_>> = ids.iter().map(|(id, count)| bound(*id, *count)).collect();
    if found.is_none() {
        let expected = std::env::var_os("LAB_DEVICES").is_some();
        assert!(!expected, "no IOMMU, or not all of {ids:?}");
        eprintln!("skipped: this machine is no lab with --devices");
    }
    found.map(|groups| groups.concat())
}

/// The first by address.
fn bound(id: [&str; 2], count: usize) -> Option<Vec<String>> {
    let read = |device: &Path, name: &str| fs::read_to_string(device.join(name)).unwrap();
    let all = fs::read_dir("/sys/bus/pci/devices").unwrap();
    let all = all.map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = all
        .filter(|device| {
            is_one_of(count, device)
                && ["vendor", "device"]
                    .map(|name| read(device, name))
                    .map(|id| id.trim().to_owned())
                    == id
        })
        .collect();
    found.sort();
    let found = found.get(..count)?.iter();
    found.map(|device| bind(device)).collect()
}

fn bind(device: &Path) -> Option<String> {
    let address = device.file_name()?.to_str()?.to_owned();
    let driver = fs::read_link(device.join("driver")).unwrap_or_default();
    if !driver.ends_with("vfio-pci") {
        if device.join("driver").exists() {
            fs::write(device.join("driver/unbind"), &address).unwrap();
        }
        fs::write(device.join("driver_override"), "vfio-pci").unwrap();
        fs::write("/sys/bus/pci/drivers_probe", &address).unwrap();
    }
    Some(address)
}

/// Of several NVMe disks in the lab, not all may be passed without others.
fn is_one_of(count: usize, device: &Path) -> bool {
    let members = fs::read_dir(device.join("iommu_group/devices"));
    members.is_ok_and(|members| members.count() == count)
}

fn look(addresses: &[String]) -> Said {
    run(LOOK, addresses)
}

fn run(script: &str, addresses: &[String]) -> Said {
    let options = addresses.iter().flat_map(|address| ["--device", address]);
    let options: Vec<&str> = options.collect();
    boot(script, &options).exits(0)
}

fn says(said: &Said, line: &str) {
    assert!(said.stdout.contains(line), "no {line:?} in {said:#?}");
}

#[test]
fn linux_keeps_the_buses_and_bars_it_finds() {
    let Some(addresses) = groups_of(&[(EDU, 1), (NVME, 1), (XHCI, 2)]) else {
        return;
    };
    let before = Machine::now();
    let said = look(&addresses);
    says(&said, "complaints 0\r\n");
    says(&said, "0000:01:00.0 0x1234 0x11e8 under 0000:00:02.0\r\n");
    says(&said, "0000:02:00.0 0x1b36 0x0010 under 0000:00:03.0\r\n");
    says(&said, "0000:04:00.0 0x1b36 0x000d under 0000:00:05.0\r\n");
    says(
        &said,
        "0000:01:00.0 has 0x00000000c0100000 0x00000000c01fffff",
    );
    says(
        &said,
        "0000:02:00.0 has 0x00000000c0200000 0x00000000c0203fff",
    );
    let log = &said.stderr;
    assert!(
        log.contains("resets=3"),
        "nvme by itself, two functions by their bus, edu not: {log}"
    );
    assert!(log.contains("map_calls=1"), "one region of memory: {log}");
    let bytes = format!("bytes_mapped={}", 256u64 << 20);
    assert!(log.contains(&bytes), "all of the guest's memory: {log}");
    assert!(
        log.contains("bar_bytes_mapped=0"),
        "nobody asked for transfers between them: {log}"
    );
    before.await_return();
}

#[test]
fn large_bar_is_where_the_processor_s_address_bits_allow() {
    let Some(addresses) = devices(&[TESTDEV]) else {
        return;
    };
    let said = look(&addresses);
    says(&said, "complaints 0\r\n");
    says(
        &said,
        "0000:01:00.0 has 0x0000001000000000 0x00000010ffffffff",
    );
    // Its ports, which the root port passes on.
    says(
        &said,
        "0000:01:00.0 has 0x0000000000001000 0x00000000000010ff",
    );
}

/// By the tables' I/O APIC and the root port's entry among the routes.
#[test]
fn linux_finds_the_interrupt_line_of_a_device() {
    let Some(addresses) = devices(&[EDU]) else {
        return;
    };
    let said = run(ENABLE, &addresses);
    says(&said, "complaints 0\r\n");
    let line = said.stdout.split_once("line ").unwrap().1;
    let line = line.split_once('.').unwrap().0;
    assert!(line.parse::<u32>().unwrap() > 0, "{said:#?}");
}
