//! The device against a back end that only remembers what it is told.

use super::*;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    BackendReqHandler, Error as UserError, GpuBackend, Result as UserResult,
    VhostUserBackendReqHandlerMut,
};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::allocate;
use crate::virtio::driver::Driver;

/// One ring, as the back end knows it.
#[derive(Default)]
struct Vring {
    size: u32,
    base: u32,
    descriptors: u64,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
    stopped: u32,
}

struct FakeBackEnd {
    features: u64,
    protocol: VhostUserProtocolFeatures,
    queues: u64,
    acked: u64,
    regions: Vec<VhostUserMemoryRegion>,
    vrings: [Vring; 2],
}

impl FakeBackEnd {
    fn new() -> Self {
        Self {
            features: RING_FEATURES | PROTOCOL_FEATURES | (1 << 24),
            protocol: VhostUserProtocolFeatures::all(),
            queues: 2,
            acked: 0,
            regions: Vec::new(),
            vrings: Default::default(),
        }
    }

    fn vring(&mut self, index: u32) -> UserResult<&mut Vring> {
        let index = usize::try_from(index).unwrap();
        self.vrings.get_mut(index).ok_or(UserError::InvalidParam)
    }

    /// The guest's address for one of the front end's process.
    fn guest_address(&self, user: u64) -> u64 {
        let region = self.regions.iter().find(|region| {
            (region.user_addr..region.user_addr + region.memory_size).contains(&user)
        });
        let region = region.unwrap();
        region.guest_phys_addr + (user - region.user_addr)
    }
}

fn unused<T>() -> UserResult<T> {
    Err(UserError::InvalidOperation("not for file systems"))
}

impl VhostUserBackendReqHandlerMut for FakeBackEnd {
    fn set_owner(&mut self) -> UserResult<()> {
        Ok(())
    }

    fn get_features(&mut self) -> UserResult<u64> {
        Ok(self.features)
    }

    fn set_features(&mut self, features: u64) -> UserResult<()> {
        self.acked = features;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> UserResult<VhostUserProtocolFeatures> {
        Ok(self.protocol)
    }

    fn set_protocol_features(&mut self, _features: u64) -> UserResult<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> UserResult<u64> {
        Ok(self.queues)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> UserResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        assert_eq!(regions.len(), files.len());
        self.regions = regions.to_vec();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> UserResult<()> {
        self.vring(index)?.size = num;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        _used: u64,
        _available: u64,
        _log: u64,
    ) -> UserResult<()> {
        self.vring(index)?.descriptors = descriptor;
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> UserResult<()> {
        self.vring(index)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> UserResult<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.kick = None;
        vring.stopped += 1;
        Ok(VhostUserVringState::new(index, vring.base))
    }

    fn set_vring_kick(&mut self, index: u8, mut fd: Option<File>) -> UserResult<()> {
        // As virtiofsd does: a kick of a ring that is not enabled is taken, and that
        // is all. Without one the descriptor, which does not block, has nothing.
        if let Some(kick) = &mut fd {
            let _ = kick.read_exact(&mut [0; 8]);
        }
        self.vring(index.into())?.kick = fd;
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> UserResult<()> {
        self.vring(index.into())?.call = fd;
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> UserResult<()> {
        self.vring(index)?.enabled = enable;
        Ok(())
    }

    fn reset_owner(&mut self) -> UserResult<()> {
        unused()
    }
    fn reset_device(&mut self) -> UserResult<()> {
        unused()
    }
    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> UserResult<()> {
        unused()
    }
    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> UserResult<Vec<u8>> {
        unused()
    }
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> UserResult<()> {
        unused()
    }
    fn set_gpu_socket(&mut self, _: GpuBackend) -> UserResult<()> {
        unused()
    }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> UserResult<File> {
        unused()
    }
    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> UserResult<(VhostUserInflight, File)> {
        unused()
    }
    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> UserResult<()> {
        unused()
    }
    fn get_max_mem_slots(&mut self) -> UserResult<u64> {
        unused()
    }
    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> UserResult<Option<VhostUserMemoryRegionBase>> {
        unused()
    }
    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> UserResult<()> {
        unused()
    }
    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> UserResult<Option<File>> {
        unused()
    }
    fn check_device_state(&mut self) -> UserResult<()> {
        unused()
    }
    fn get_shmem_config(&mut self) -> UserResult<VhostUserShMemConfig> {
        unused()
    }
    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> UserResult<()> {
        unused()
    }
}

/// A back end at work, and the front end's socket to it.
struct Bench {
    state: Arc<Mutex<FakeBackEnd>>,
    /// The back end's own end, to hang up.
    connection: UnixStream,
    thread: JoinHandle<()>,
}

fn start(back_end: FakeBackEnd) -> (Bench, OwnedFd) {
    let (near, far) = UnixStream::pair().unwrap();
    let state = Arc::new(Mutex::new(back_end));
    let connection = far.try_clone().unwrap();
    let mut handler = BackendReqHandler::from_stream(far, Arc::clone(&state));
    let thread = std::thread::spawn(move || while handler.handle_request().is_ok() {});
    let bench = Bench {
        state,
        connection,
        thread,
    };
    (bench, near.into())
}

/// A back end that works until it is not needed any more.
pub fn back_end() -> OwnedFd {
    start(FakeBackEnd::new()).1
}

fn activation(memory: &GuestMemory, features: u64, drivers: &[Driver<'_>; 2]) -> Activation {
    Activation {
        memory: memory.clone(),
        features,
        queues: drivers.iter().map(|driver| Some(driver.active())).collect(),
        config_interrupt: Arc::new(EventFd::new(0).unwrap()),
    }
}

#[test]
fn back_end_gets_memory_rings_and_events_each_time_the_device_is_activated() {
    let memory = allocate(32, false).unwrap();
    let (bench, socket) = start(FakeBackEnd::new());
    let mut fs = Fs::new("share", socket).unwrap();
    assert_eq!(fs.features(), RING_FEATURES, "the back end's, of the rings");
    for round in 1..=2 {
        let drivers = [1, 2].map(|index| Driver::new(&memory, index, 16));
        let activation = activation(&memory, VIRTIO_F_VERSION_1, &drivers);
        let interrupts = drivers.each_ref().map(|driver| driver.active().interrupt);
        fs.activate(activation).unwrap();
        {
            let mut state = bench.state.lock().unwrap();
            assert_eq!(state.acked, VIRTIO_F_VERSION_1 | PROTOCOL_FEATURES);
            for (index, driver) in drivers.iter().enumerate() {
                let table = state.guest_address(state.vrings[index].descriptors);
                assert_eq!(table, driver.queue().desc_table());
                let vring = &mut state.vrings[index];
                assert!(vring.enabled);
                assert_eq!((vring.size, vring.base), (16, 0));
                driver.kick();
                let mut count = [0; 8];
                vring.kick.as_ref().unwrap().read_exact(&mut count).unwrap();
                let call = vring.call.as_mut().unwrap();
                call.write_all(&1u64.to_ne_bytes()).unwrap();
                assert_eq!(interrupts[index].read().unwrap(), 1);
            }
        }
        fs.reset();
        fs.reset();
        let state = bench.state.lock().unwrap();
        assert!(state.vrings.iter().all(|vring| vring.stopped == round));
    }
}

#[test]
fn a_kick_that_comes_before_its_ring_is_enabled_is_not_lost() {
    let memory = allocate(32, false).unwrap();
    let (bench, socket) = start(FakeBackEnd::new());
    let mut fs = Fs::new("share", socket).unwrap();
    let drivers = [1, 2].map(|index| Driver::new(&memory, index, 16));
    for driver in &drivers {
        driver.kick();
    }
    fs.activate(activation(&memory, VIRTIO_F_VERSION_1, &drivers))
        .unwrap();
    let looks = |vring: &Vring| {
        let mut kick = vring.kick.as_ref().unwrap();
        kick.read_exact(&mut [0; 8]).is_ok()
    };
    let looks = bench.state.lock().unwrap().vrings.each_ref().map(looks);
    assert_eq!(looks, [true; 2], "whether the back end looks at the rings");
}

#[test]
fn rings_outside_memory_are_refused_and_what_ran_is_stopped() {
    let memory = allocate(32, false).unwrap();
    let (bench, socket) = start(FakeBackEnd::new());
    let mut fs = Fs::new("share", socket).unwrap();
    let drivers = [1, 2].map(|index| Driver::new(&memory, index, 16));
    let mut bad = activation(&memory, VIRTIO_F_VERSION_1, &drivers);
    let last = GuestAddress((32 << 20) - 16);
    let queue = &mut bad.queues[1].as_mut().unwrap().queue;
    queue.try_set_desc_table_address(last).unwrap();
    assert!(matches!(fs.activate(bad), Err(ActivateError::Backend(_))));
    assert_eq!(bench.state.lock().unwrap().vrings[0].stopped, 1);
    fs.activate(activation(&memory, VIRTIO_F_VERSION_1, &drivers))
        .unwrap();
}

#[test]
fn device_outlives_its_back_end() {
    let memory = allocate(32, false).unwrap();
    let (bench, socket) = start(FakeBackEnd::new());
    let mut fs = Fs::new("share", socket).unwrap();
    let drivers = [1, 2].map(|index| Driver::new(&memory, index, 16));
    fs.activate(activation(&memory, VIRTIO_F_VERSION_1, &drivers))
        .unwrap();
    bench.connection.shutdown(Shutdown::Both).unwrap();
    bench.thread.join().unwrap();
    fs.reset();
    let again = fs.activate(activation(&memory, VIRTIO_F_VERSION_1, &drivers));
    assert!(matches!(again, Err(ActivateError::Unavailable)));
    fs.reset();
    let mut tag = [0; 8];
    fs.read_config(0, &mut tag);
    assert_eq!(&tag, b"share\0\0\0");
}

#[test]
fn configuration_space_has_the_tag_and_one_request_queue() {
    let tag = "t".repeat(36);
    let (_bench, socket) = start(FakeBackEnd::new());
    let fs = Fs::new(&tag, socket).unwrap();
    let mut config = [0xff; 44];
    fs.read_config(0, &mut config);
    assert_eq!(&config[..36], tag.as_bytes());
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fs.queue_sizes().len(), 2);
    for tag in ["", &"t".repeat(37)] {
        let (_bench, socket) = start(FakeBackEnd::new());
        assert!(matches!(Fs::new(tag, socket), Err(FsError::Tag(_))));
    }
}

#[test]
fn back_ends_that_cannot_be_worked_with_are_refused() {
    let error = |change: fn(&mut FakeBackEnd)| {
        let mut back_end = FakeBackEnd::new();
        change(&mut back_end);
        let (_bench, socket) = start(back_end);
        Fs::new("share", socket).map(|_| ()).unwrap_err()
    };
    let legacy = error(|back_end| back_end.features &= !VIRTIO_F_VERSION_1);
    assert!(matches!(legacy, FsError::Features(_)));
    let narrow = error(|back_end| back_end.queues = 1);
    assert!(matches!(narrow, FsError::Queues(1)));
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    let gone = Fs::new("share", near.into()).map(|_| ()).unwrap_err();
    assert!(matches!(gone, FsError::BackEnd(_)));
}
