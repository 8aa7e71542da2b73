//! KVM's own side of VFIO: it must know which devices the guest drives, so that
//! it keeps the guest's caching of their registers honest
//! (`Documentation/virt/kvm/devices/vfio.rst`).

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::PoisonError;

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};

use super::{Vm, VmError};

impl Vm {
    /// Tells KVM of the groups, or the devices of iommufd, that the guest gets.
    /// Once; a device of iommufd must not be bound yet.
    ///
    /// # Errors
    ///
    /// KVM's: it has no VFIO, or a descriptor is neither.
    pub fn attach_vfio<'a>(
        &self,
        files: impl IntoIterator<Item = BorrowedFd<'a>>,
    ) -> Result<(), VmError> {
        let mut request = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        let device = self
            .fd
            .create_device(&mut request)
            .map_err(VmError::new("make its VFIO device"))?;
        for file in files {
            let fd = file.as_raw_fd();
            let add = kvm_device_attr {
                group: KVM_DEV_VFIO_FILE,
                attr: KVM_DEV_VFIO_FILE_ADD.into(),
                addr: (&raw const fd).addr() as u64,
                flags: 0,
            };
            device
                .set_device_attr(&add)
                .map_err(VmError::new("add a VFIO group or device"))?;
        }
        *self.vfio.lock().unwrap_or_else(PoisonError::into_inner) = Some(device);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::vm::test_vm;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn descriptor_that_is_no_vfio_file_is_refused() {
        let Some(vm) = test_vm() else {
            return;
        };
        let null = File::open("/dev/null").unwrap();
        let error = vm.attach_vfio([null.as_fd()]).unwrap_err();
        // A host without VFIO has not even the device.
        assert!(error.what.contains("VFIO"), "{error}");
    }
}
