//! Boots a kernel with neither shim nor jail, its serial port on standard output:
//!
//! ```text
//! boot --kernel vmlinux --initrd initrd --cmdline 'console=ttyS0' --memory 256 --vcpus 1
//! ```
//!
//! `--device ADDRESS` gives it a PCI device of the host that is bound to vfio-pci, by the
//! group API, or by iommufd with `--iommu iommufd`. `--disk FILE` adds a read-only disk, `--serial off` leaves the serial port out, to count a boot's exits without it.
//! With `--interrupt on` the guest is sent an NMI when standard input says something, or ends.
//! Ends with the machine and prints how, and the vCPUs' exits, to standard error.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::process::ExitCode;

use nacre_protocol::vm::{PciOptions, StopReason};
use nacre_vmm::boot::NamedFile;
use nacre_vmm::machine::{Machine, Parts};
use nacre_vmm::memory;
use nacre_vmm::stop::{Outcome, Stop};
use nacre_vmm::vfio::open::{self, DeviceNodes};
use nacre_vmm::virtio::VirtioDevice;
use nacre_vmm::virtio::block::{Backing, Block};
use nacre_vmm::virtio::rng::Rng;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

type Error = Box<dyn std::error::Error>;

#[derive(Default)]
struct Options {
    kernel: String,
    initrd: String,
    cmdline: String,
    memory_mib: u32,
    vcpus: u8,
    no_serial: bool,
    disks: Vec<String>,
    devices: Vec<String>,
    iommufd: bool,
    interrupt: bool,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    match options().and_then(|options| run(&options)) {
        Ok(Outcome::Stopped(StopReason::Shutdown)) => ExitCode::SUCCESS,
        Ok(outcome) => {
            eprintln!("boot: {outcome:?}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options, Error> {
    let mut options = Options {
        memory_mib: 256,
        vcpus: 1,
        ..Default::default()
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--kernel" => options.kernel = value,
            "--initrd" => options.initrd = value,
            "--cmdline" => options.cmdline = value,
            "--memory" => options.memory_mib = value.parse()?,
            "--vcpus" => options.vcpus = value.parse()?,
            "--disk" => options.disks.push(value),
            "--device" => options.devices.push(value),
            "--iommu" => options.iommufd = value == "iommufd",
            "--interrupt" => options.interrupt = value == "on",
            "--serial" => options.no_serial = value == "off",
            _ => return Err(format!("{name}: unknown option").into()),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<Outcome, Error> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng::new())];
    for disk in &options.disks {
        let backing = Backing::Whole(File::open(disk)?);
        devices.push(Box::new(Block::new("disk", true, backing, 1)?));
    }
    let open = if options.iommufd {
        open::by_iommufd
    } else {
        open::by_groups
    };
    let nodes = options
        .devices
        .iter()
        .map(|address| DeviceNodes::of(address));
    let nodes = nodes.collect::<io::Result<Vec<_>>>()?;
    let passthrough = (!nodes.is_empty()).then(|| open(Path::new("/dev"), &nodes));
    let passthrough = passthrough.transpose()?;
    let ram = memory::allocate(options.memory_mib, false)?;
    let machine = Machine::new(Parts {
        kvm: kvm.into(),
        vcpus: options.vcpus,
        memory: ram.clone(),
        ram,
        kernel: named(&options.kernel)?,
        initrd: named(&options.initrd)?,
        cmdline: options.cmdline.clone(),
        devices,
        passthrough,
        pci_slots: 0,
        pci: PciOptions::default(),
        serial: (!options.no_serial).then(|| stdout.into()),
    })?;
    let running = machine.start()?;
    let stop = running.stop_handle().clone();
    if options.interrupt && is_told_first(&stop)? {
        running.interrupt()?;
    }
    wait_for(&mut [end_of(&stop)])?;
    let exits = running.stop();
    eprintln!("boot: {exits}");
    stop.outcome().cloned().ok_or_else(|| "no outcome".into())
}

fn named(path: &str) -> io::Result<NamedFile> {
    Ok(NamedFile {
        file: File::open(path)?,
        path: path.into(),
    })
}

/// Whether standard input is the first to say something.
fn is_told_first(stop: &Stop) -> io::Result<bool> {
    let stdin = io::stdin();
    let mut fds = [end_of(stop), PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    wait_for(&mut fds)?;
    Ok(fds[0].any() == Some(false))
}

fn end_of(stop: &Stop) -> PollFd<'_> {
    // SAFETY: the event is open as long as `stop` is borrowed.
    let event = unsafe { BorrowedFd::borrow_raw(stop.event().as_raw_fd()) };
    PollFd::new(event, PollFlags::POLLIN)
}

fn wait_for(fds: &mut [PollFd<'_>]) -> io::Result<()> {
    poll(fds, PollTimeout::NONE)?;
    Ok(())
}
