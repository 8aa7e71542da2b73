//! KVM's own side of VFIO: it must know which devices the guest drives, so that
//! it keeps the guest's caching of their registers honest
//! (`Documentation/virt/kvm/devices/vfio.rst`).

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::PoisonError;

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::DeviceFd;

use super::{Vm, VmError};

impl Vm {
    /// Tells KVM of the groups, or the devices of iommufd, that the guest gets. A device
    /// of iommufd must not be bound yet.
    ///
    /// # Errors
    ///
    /// KVM's: it has no VFIO, or a descriptor is neither. It knows none of them then.
    pub fn attach_vfio<'a>(
        &self,
        files: impl IntoIterator<Item = BorrowedFd<'a>>,
    ) -> Result<(), VmError> {
        let mut vfio = self.vfio.lock().unwrap_or_else(PoisonError::into_inner);
        let device = match &mut *vfio {
            Some(device) => device,
            none => none.insert(self.make_vfio()?),
        };
        let mut added = Vec::new();
        for file in files {
            if let Err(error) = tell(device, KVM_DEV_VFIO_FILE_ADD, file) {
                for file in added {
                    // It was added a moment ago.
                    let _ = tell(device, KVM_DEV_VFIO_FILE_DEL, file);
                }
                return Err(error);
            }
            added.push(file);
        }
        Ok(())
    }

    /// Undoes [`Self::attach_vfio`]: KVM holds them open until then.
    ///
    /// # Errors
    ///
    /// KVM's first: it does not know one (`kvm_vfio_file_del` in virt/kvm/vfio.c). It forgets the others all the same.
    pub fn detach_vfio<'a>(
        &self,
        files: impl IntoIterator<Item = BorrowedFd<'a>>,
    ) -> Result<(), VmError> {
        let vfio = self.vfio.lock().unwrap_or_else(PoisonError::into_inner);
        let mut result = Ok(());
        if let Some(device) = &*vfio {
            for file in files {
                result = result.and(tell(device, KVM_DEV_VFIO_FILE_DEL, file));
            }
        }
        result
    }

    fn make_vfio(&self) -> Result<DeviceFd, VmError> {
        let mut request = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        self.fd
            .create_device(&mut request)
            .map_err(VmError::new("make its VFIO device"))
    }
}

fn tell(device: &DeviceFd, what: u32, file: BorrowedFd<'_>) -> Result<(), VmError> {
    let fd = file.as_raw_fd();
    let attribute = kvm_device_attr {
        group: KVM_DEV_VFIO_FILE,
        attr: what.into(),
        addr: (&raw const fd).addr() as u64,
        flags: 0,
    };
    device
        .set_device_attr(&attribute)
        .map_err(VmError::new("add or remove a VFIO group or device"))
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
