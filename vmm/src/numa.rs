//! Where the kernel takes memory from (`set_mempolicy(2)`).
//!
//! A policy is a thread's, and what a thread starts has it too: a monitor that is spawned
//! under a [`Preference`] has its guest's memory near the pod's devices. It stays a
//! preference: when that node has no more, memory comes from others.

use std::io;
use std::marker::PhantomData;
use std::ptr;

const WORD_BITS: usize = u64::BITS as usize;
/// As many as any Linux is made for.
const MAX_NODES: usize = 1024;

/// Memory comes from a node first, for this thread and what it starts, until this is
/// dropped.
#[must_use]
pub struct Preference(PhantomData<*const ()>);

impl Preference {
    /// For a node of the host.
    ///
    /// # Errors
    ///
    /// The kernel's: there is no such node, or none that this process may use.
    pub fn of(node: u32) -> io::Result<Self> {
        let mut nodes = [0u64; MAX_NODES / WORD_BITS];
        let node = usize::try_from(node).map_err(io::Error::other)?;
        let word = nodes.get_mut(node / WORD_BITS);
        *word.ok_or(io::ErrorKind::InvalidInput)? |= 1 << (node % WORD_BITS);
        // The kernel takes one bit less than it is told of.
        set(libc::MPOL_PREFERRED, nodes.as_ptr(), MAX_NODES + 1)?;
        Ok(Self(PhantomData))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        if let Err(error) = set(libc::MPOL_DEFAULT, ptr::null(), 0) {
            tracing::warn!(%error, "memory goes on coming from one node");
        }
    }
}

fn set(mode: libc::c_int, nodes: *const u64, bits: usize) -> io::Result<()> {
    // SAFETY: `nodes` is null, with no bits, or as many bits as `bits` less one.
    if unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, nodes, bits) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// The policies of a new process's memory (proc(5), `numa_maps`).
    fn policies() -> String {
        let child = Command::new("cat").arg("/proc/self/numa_maps").output();
        String::from_utf8(child.unwrap().stdout).unwrap()
    }

    #[test]
    fn what_is_started_prefers_the_node_until_the_end() {
        if !policies().contains(" default") {
            eprintln!("skipped: no memory policies here");
            return;
        }
        let preference = match Preference::of(0) {
            Ok(preference) => preference,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                eprintln!("skipped: memory policies are not for this process");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        assert!(policies().contains(" prefer:0"), "{}", policies());
        drop(preference);
        assert!(!policies().contains(" prefer:"), "{}", policies());
    }

    #[test]
    fn nodes_that_cannot_be_are_refused() {
        let error = Preference::of(4096).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
