//! How large a pod's machine is, and what its cgroup is told of it.

use oci_spec::runtime::Spec;
use tracing::warn;

use super::super::sizing::{Size, host_limits, memory_of, size_of, vcpus_of};
use super::super::{SandboxError, blocking};
use super::{VmHost, may_grow};
use crate::cgroup::Limits;
use crate::error::chain;

impl VmHost {
    /// See [`super::super::Host::memory_of`].
    pub fn memory_of(&self, containers: &[Limits]) -> u32 {
        let is_pinned = crate::task::lock(&self.parts).is_pinned();
        memory_of(containers, is_pinned, &self.config)
    }

    /// See [`super::super::Host::vcpus_of`].
    pub fn vcpus_of(&self, containers: &[Limits]) -> u8 {
        vcpus_of(containers, &self.config)
    }

    /// See [`super::super::Host::note_vcpus`].
    pub fn note_vcpus(&self, vcpus: Option<u8>) {
        if crate::task::lock(&self.parts).state.vcpus == vcpus {
            return;
        }
        // They are what the machine has, whether that can be written or not.
        if let Err(error) = self.record(|parts| parts.state.vcpus = vcpus) {
            warn!(
                error = chain(&error),
                "`nacre ps` does not know of a pod's vCPUs"
            );
        }
    }

    /// See [`super::super::Host::set_limits`].
    pub async fn set_limits(
        &self,
        containers: &[Limits],
        memory_mib: u32,
    ) -> Result<(), SandboxError> {
        let (cgroup, is_pinned, bars_mib) = {
            let mut parts = crate::task::lock(&self.parts);
            parts.oom_score_adj = Limits::together(containers).oom_score_adj;
            parts.expose();
            let bars_mib = parts.peer_bars_mib(&self.config);
            (parts.cgroup.clone(), parts.is_pinned(), bars_mib)
        };
        let Some(cgroup) = cgroup else {
            return Ok(());
        };
        let limits = host_limits(containers, memory_mib, is_pinned, bars_mib, &self.config);
        Ok(blocking(move || cgroup.set_limits(&limits)).await?)
    }

    pub(super) fn size_of(&self, spec: &Spec) -> Size {
        let mut size = {
            let parts = crate::task::lock(&self.parts);
            let bars_mib = parts.peer_bars_mib(&self.config);
            size_of(spec, parts.is_pinned(), bars_mib, &self.config)
        };
        if may_grow(spec) {
            size.max_vcpus = size.max_vcpus.max(self.config.max_vcpus);
        }
        size
    }
}
