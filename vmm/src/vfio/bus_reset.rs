//! Devices that cannot be reset alone: by their bus, when everything on it is the pod's.
//!
//! A graphics card of several functions often has no other reset. This is the one before
//! the guest starts; when the last of them is closed the kernel does the same by itself. What
//! can be reset in neither way is told, since its next user finds what the last one left in it.

use std::os::fd::OwnedFd;

use super::VfioError;
use super::access::Neighbor;
use super::device::Endpoint;

/// Resets those of `endpoints` that could not be reset alone, where nothing else is on
/// their bus. No guest may have any of them yet. `groups` are the pod's.
///
/// # Errors
///
/// The kernel's.
pub fn reset_rest(endpoints: &mut [Endpoint], groups: &[OwnedFd]) -> Result<(), VfioError> {
    for index in 0..endpoints.len() {
        let rest = endpoints.get(index).filter(|device| !device.was_reset());
        let Some(device) = rest else { continue };
        let reset = reset_bus_of(device, endpoints, groups)?;
        for device in &mut *endpoints {
            if reset.iter().any(|address| address == device.address()) {
                device.was_reset_with_others();
            }
        }
    }
    Ok(())
}

/// Resets the bus of `device` unless somebody else is on it; the addresses of what was
/// reset.
fn reset_bus_of(
    device: &Endpoint,
    endpoints: &[Endpoint],
    groups: &[OwnedFd],
) -> Result<Vec<String>, VfioError> {
    let address = device.address();
    let neighbors = device.device().on_bus();
    let neighbors = neighbors.map_err(VfioError::device(address, "ask for its bus"))?;
    let names: Vec<_> = neighbors.iter().map(Neighbor::to_string).collect();
    let is_ours = |name: &&String| endpoints.iter().any(|device| device.address() == *name);
    let others: Vec<_> = names.iter().filter(|name| !is_ours(name)).collect();
    if names.is_empty() || !others.is_empty() {
        tracing::warn!(
            device = address,
            ?others,
            "PCI device cannot be reset alone, nor its bus: it has what its last user left in it"
        );
        return Ok(Vec::new());
    }
    let result = device.device().reset_bus(&neighbors, groups);
    result.map_err(VfioError::device(address, "reset its bus"))?;
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::vfio::mock::Mock;

    const GPU: &str = "0000:65:00.0";
    const AUDIO: &str = "0000:65:00.1";
    const DISK: &str = "0000:01:00.0";

    fn function(function: u8) -> Neighbor {
        Neighbor {
            segment: 0,
            bus: 0x65,
            devfn: function,
        }
    }

    /// A card of two functions without a reset of their own, and a disk with one.
    fn mocks() -> [Arc<Mock>; 3] {
        let [gpu, audio, disk] = [(); 3].map(|()| Arc::new(Mock::default()));
        for mock in [&gpu, &audio] {
            let mut state = mock.state();
            state.can_reset = false;
            state.on_bus = vec![function(0), function(1)];
        }
        [gpu, audio, disk]
    }

    fn endpoints(mocks: &[(&str, &Arc<Mock>)]) -> Vec<Endpoint> {
        let open = |(address, mock): &(&str, &Arc<Mock>)| {
            let mock = Arc::clone(mock);
            Endpoint::open(address, mock).unwrap()
        };
        mocks.iter().map(open).collect()
    }

    fn were_reset(endpoints: &[Endpoint]) -> Vec<bool> {
        endpoints.iter().map(Endpoint::was_reset).collect()
    }

    #[test]
    fn functions_of_a_card_are_reset_by_their_bus_once() {
        let [gpu, audio, disk] = mocks();
        let mut endpoints = endpoints(&[(DISK, &disk), (GPU, &gpu), (AUDIO, &audio)]);
        assert_eq!(were_reset(&endpoints), [true, false, false]);
        reset_rest(&mut endpoints, &[]).unwrap();
        assert_eq!(were_reset(&endpoints), [true; 3]);
        let resets = [&gpu, &audio, &disk].map(|mock| mock.state().bus_resets);
        assert_eq!(resets, [1, 0, 0]);
    }

    #[test]
    fn bus_with_somebody_else_s_device_is_left_alone() {
        let [gpu, audio, disk] = mocks();
        let mut endpoints = endpoints(&[(GPU, &gpu), (DISK, &disk)]);
        reset_rest(&mut endpoints, &[]).unwrap();
        assert_eq!(were_reset(&endpoints), [false, true]);
        assert_eq!(gpu.state().bus_resets + audio.state().bus_resets, 0);
    }

    #[test]
    fn device_whose_bus_cannot_be_reset_is_no_error() {
        let [gpu, ..] = mocks();
        gpu.state().on_bus.clear();
        let mut endpoints = endpoints(&[(GPU, &gpu)]);
        reset_rest(&mut endpoints, &[]).unwrap();
        assert_eq!(were_reset(&endpoints), [false]);
    }

    #[test]
    fn bus_that_is_refused_is_an_error_that_names_the_device() {
        let [gpu, audio, _] = mocks();
        let mut endpoints = endpoints(&[(GPU, &gpu), (AUDIO, &audio)]);
        gpu.state().is_gone = true;
        let error = reset_rest(&mut endpoints, &[]).unwrap_err().to_string();
        let text = format!("PCI device {GPU}: cannot reset its bus: ");
        assert!(error.starts_with(&text), "{error}");
    }
}
