//! A VM of three instructions. `/dev/kvm` may be there and yet run nothing: on a
//! cloud machine without nested virtualisation, in a sandbox that emulates it.

use std::io;
use std::sync::mpsc;
use std::time::Duration;

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};

/// `mov al, 42; mov dx, 0x3f8; out dx, al; hlt`, in real mode.
const CODE: [u8; 7] = [0xb0, ANSWER, 0xba, 0xf8, 0x03, 0xee, 0xf4];
const ANSWER: u8 = 42;
const PORT: u16 = 0x3f8;
const CODE_ADDRESS: u64 = 0x1000;
const MEMORY_BYTES: usize = 0x1000;
/// Microseconds on real hardware.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Runs the VM.
///
/// # Errors
///
/// One line: how far it got.
pub(super) fn run() -> Result<(), String> {
    let (sender, receiver) = mpsc::channel();
    // A thread that can be left behind: a vCPU that never exits cannot be
    // waited for.
    std::thread::spawn(move || sender.send(try_run()));
    receiver
        .recv_timeout(TIMEOUT)
        .unwrap_or_else(|_| Err("three instructions did not finish in ten seconds".into()))
}

fn try_run() -> Result<(), String> {
    let kvm = Kvm::new().map_err(|error| format!("cannot be opened: {error}"))?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(format!(
            "API version {version} instead of {KVM_API_VERSION}"
        ));
    }
    let vm = kvm
        .create_vm()
        .map_err(|e| format!("cannot make a VM: {e}"))?;
    let memory = Memory::with_code().map_err(|e| format!("cannot map memory: {e}"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE_ADDRESS,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: memory.0 as u64,
    };
    // SAFETY: the mapping is as large as the region says and outlives the VM,
    // which was declared before it but is not run after it is gone.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|error| format!("cannot give memory to a VM: {error}"))?;
    let mut vcpu = vm
        .create_vcpu(0)
        .map_err(|e| format!("cannot make a vCPU: {e}"))?;
    let setup = |error: kvm_ioctls::Error| format!("cannot set up a vCPU: {error}");
    let mut special = vcpu.get_sregs().map_err(setup)?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_sregs(&special).map_err(setup)?;
    let mut registers = vcpu.get_regs().map_err(setup)?;
    registers.rip = CODE_ADDRESS;
    // Bit 1 is always set (Intel SDM volume 1, 3.4.3).
    registers.rflags = 2;
    vcpu.set_regs(&registers).map_err(setup)?;

    match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, [ANSWER])) => {}
        other => return Err(format!("the guest's first exit was {other:?}")),
    }
    match vcpu.run() {
        Ok(VcpuExit::Hlt) => Ok(()),
        other => Err(format!("the guest did not halt: {other:?}")),
    }
}

/// A page of anonymous memory.
struct Memory(*mut libc::c_void);

impl Memory {
    fn with_code() -> io::Result<Self> {
        // SAFETY: a new anonymous mapping touches no other memory.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the code is shorter than the mapping, which is ours alone.
        unsafe { address.cast::<u8>().copy_from(CODE.as_ptr(), CODE.len()) };
        Ok(Self(address))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing points into it any more.
        unsafe { libc::munmap(self.0, MEMORY_BYTES) };
    }
}
