//! `nacre devices bind` and `unbind`: a device from its driver to vfio-pci, and back.
//!
//! ```text
//!                    driver_override        driver's unbind    drivers_probe
//! nvme --------------> reserved ---------------> none -------------> vfio-pci
//! vfio-pci ----------> not reserved -----------> none -------------> whichever the kernel picks
//! nvme, reserved ----> not reserved --------------------------------> nvme, all the time
//! ```
//! (Linux Documentation/ABI/testing/sysfs-bus-pci.) Nothing is moved unless all that
//! was asked for may be; what was moved before a failure is moved back.

use super::pci::Function;
use super::{Address, Claims, DeviceError, System, VFIO_DRIVER, group, usage};

/// What takes a reservation away.
const NO_OVERRIDE: &str = "\n";

/// A device and the drivers it was and is with.
#[derive(Debug, PartialEq, Eq)]
pub struct Moved {
    /// Which.
    pub address: Address,
    /// The driver it had.
    pub from: Option<String>,
    /// The driver it has; the same if there was nothing to do.
    pub to: Option<String>,
}

/// Gives devices to vfio-pci.
///
/// # Errors
///
/// A device that is not there, is a bridge, is in use or in no IOMMU group; the
/// kernel's refusal. All devices are with their drivers then.
pub fn bind(system: &System, addresses: &[Address]) -> Result<Vec<Moved>, DeviceError> {
    let mut functions = Vec::new();
    for address in addresses {
        functions.push(movable(system, *address)?);
    }
    if !system.has_vfio() {
        return Err(DeviceError::NoVfio);
    }
    let mut moved = Vec::new();
    for (index, function) in functions.iter().enumerate() {
        match take(system, function) {
            Ok(step) => moved.push(step),
            Err(failure) => {
                let touched = functions.iter().take(index + 1).rev();
                return Err(touched.fold(failure, |failure, function| {
                    match restore(system, function) {
                        Ok(()) => failure,
                        Err(_) => DeviceError::NotRestored {
                            address: function.address,
                            driver: function.driver_name().to_owned(),
                            failure: Box::new(failure),
                        },
                    }
                }));
            }
        }
    }
    Ok(moved)
}

/// The device, unless it is one that no driver takes from another.
fn function(system: &System, address: Address) -> Result<Function, DeviceError> {
    let function = system.function(address)?;
    match function.mediated {
        Some(_) => Err(DeviceError::Mediated(address)),
        None => Ok(function),
    }
}

/// The device, if it can be given to vfio-pci.
fn movable(system: &System, address: Address) -> Result<Function, DeviceError> {
    let function = function(system, address)?;
    if function.is_bridge() {
        return Err(DeviceError::Bridge(address));
    }
    group::of(system, &function)?;
    if !function.is_on_vfio() {
        refuse_use(address, usage::user_of(system, &function)?)?;
    }
    Ok(function)
}

fn refuse_use(address: Address, user: Option<String>) -> Result<(), DeviceError> {
    user.map_or(Ok(()), |by| Err(DeviceError::InUse { address, by }))
}

fn take(system: &System, function: &Function) -> Result<Moved, DeviceError> {
    let address = function.address;
    if !function.is_on_vfio() {
        reserve(system, function, VFIO_DRIVER)?;
        release(system, address)?;
        probe(system, address)?;
    }
    let now = system.function(address)?;
    if !now.is_on_vfio() {
        return Err(DeviceError::NotTaken(address));
    }
    Ok(Moved {
        address,
        from: function.driver.clone(),
        to: now.driver,
    })
}

/// Has a device be as it was.
fn restore(system: &System, before: &Function) -> Result<(), DeviceError> {
    let address = before.address;
    let now = system.function(address)?;
    let reserved = before.driver_override.as_deref().unwrap_or(NO_OVERRIDE);
    reserve(system, before, reserved)?;
    if now.driver == before.driver {
        return Ok(());
    }
    release(system, address)?;
    if let Some(driver) = &before.driver {
        let path = system.driver_dir(driver).join("bind");
        system.write(&path, &address.to_string())?;
    }
    if system.function(address)?.driver == before.driver {
        Ok(())
    } else {
        Err(DeviceError::NotTaken(address))
    }
}

/// Gives devices back to the host's drivers; whichever is with one of those keeps it, and
/// loses its reservation for vfio-pci if it has one. `claims` tell which a pod has.
///
/// # Errors
///
/// A device that is not there or in use; the kernel's refusal.
pub fn unbind(
    system: &System,
    claims: &Claims,
    addresses: &[Address],
) -> Result<Vec<Moved>, DeviceError> {
    let mut functions = Vec::new();
    for address in addresses {
        let function = function(system, *address)?;
        if function.is_on_vfio() {
            refuse_claimed(claims, *address)?;
            refuse_use(*address, usage::opened_by(system, &function)?)?;
        }
        functions.push(function);
    }
    let give = |function: &Function| give_back(system, function);
    functions.iter().map(give).collect()
}

fn refuse_claimed(claims: &Claims, address: Address) -> Result<(), DeviceError> {
    let holder = claims.holder(address)?;
    refuse_use(address, holder.map(|pod| format!("pod {pod} has it")))
}

fn give_back(system: &System, function: &Function) -> Result<Moved, DeviceError> {
    let address = function.address;
    let is_reserved = function.driver_override.as_deref() == Some(VFIO_DRIVER);
    if function.is_on_vfio() || is_reserved {
        reserve(system, function, NO_OVERRIDE)?;
        // One that is only reserved may be in use, and is where it belongs.
        if function.is_on_vfio() {
            release(system, address)?;
        }
        probe(system, address)?;
    }
    let now = system.function(address)?;
    if now.is_on_vfio() {
        return Err(DeviceError::TakenAgain(address));
    }
    Ok(Moved {
        address,
        from: function.driver.clone(),
        to: now.driver,
    })
}

fn reserve(system: &System, function: &Function, driver: &str) -> Result<(), DeviceError> {
    let dir = system.device_dir(function.address);
    system.write(&dir.join("driver_override"), driver)
}

/// Takes a device from the driver it has, if it has one.
fn release(system: &System, address: Address) -> Result<(), DeviceError> {
    match system.function(address)?.driver {
        Some(driver) => {
            let path = system.driver_dir(&driver).join("unbind");
            system.write(&path, &address.to_string())
        }
        None => Ok(()),
    }
}

/// Has the kernel look for the driver of a device that has none.
fn probe(system: &System, address: Address) -> Result<(), DeviceError> {
    let path = system.sys.join("bus/pci/drivers_probe");
    system.write(&path, &address.to_string())
}

#[cfg(test)]
mod tests;
