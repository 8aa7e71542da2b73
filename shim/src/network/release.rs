//! Interfaces whose machine is gone: a redirect to its tap leads nowhere, and would take
//! every frame from a namespace that outlives its pod.
//!
//! That it leads nowhere tells it from one of a machine that came later to the same
//! namespace, and from what others do with frames.

use std::fs::File;
use std::io;
use std::path::Path;

use netlink_packet_route::tc::{
    TcActionAttribute, TcActionMirrorOption, TcActionOption, TcAttribute, TcFilterU32Option,
    TcMessage, TcOption,
};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use super::{NetworkError, refuse_host_network, system, with_netlink};

/// Gives the namespace at `path` the frames back that went to machines which are gone, taps
/// and all. It may be gone, too, with its interfaces, and others may be joined to machines
/// that live. Blocks, as [`super::prepare`] does.
///
/// # Errors
///
/// What the kernel refused.
pub fn release(path: &Path) -> Result<(), NetworkError> {
    let failed = system("open the pod's network namespace");
    let netns = match File::open(path) {
        Ok(netns) => netns,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    let stat = fstatfs(&netns).map_err(|errno| failed(errno.into()))?;
    // Where a namespace was mounted is a file.
    if stat.filesystem_type() != NSFS_MAGIC {
        return Ok(());
    }
    match refuse_host_network(&netns) {
        // No machine has ever been joined to it.
        Err(NetworkError::HostNetwork) => Ok(()),
        Err(error) => Err(error),
        Ok(()) => with_netlink(&netns, async |netlink| netlink.part_from_gone().await),
    }
}

/// Whether a filter is a redirect to an interface that is gone: of those the kernel tells no
/// index (`tcf_mirred_dump` in net/sched/act_mirred.c).
pub(super) fn leads_nowhere(filter: &TcMessage) -> bool {
    let options = filter
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        });
    let actions = options.flatten().filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    let attributes = actions.flatten().flat_map(|action| &action.attributes);
    let options = attributes.filter_map(|attribute| match attribute {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten().any(|option| {
        matches!(option, TcActionOption::Mirror(TcActionMirrorOption::Parms(redirect))
            if redirect.ifindex == 0)
    })
}
