//! The pod's shared directory: virtio-fs, whose device the machine boots with or gets while it
//! runs. Then it is on bus 0, as network cards that come late are, where the kernel looks for
//! it when it is told to.

use std::path::Path;

use nacre_protocol::guest::{SHARED_DIR, SHARED_TAG};
use tokio::sync::OnceCell;

use crate::error::{Context, Result};
use crate::pci;
use crate::sandbox::blocking;

/// Mounted once, for all containers.
#[derive(Default)]
pub struct SharedDir(OnceCell<()>);

impl SharedDir {
    /// Mounts what the machine has booted with, unless it is mounted.
    ///
    /// # Errors
    ///
    /// Those of mount(2).
    pub async fn mount(&self) -> Result<()> {
        self.0.get_or_try_init(|| blocking(mount)).await?;
        Ok(())
    }

    /// Looks for what has come since and mounts it, unless it is mounted.
    ///
    /// # Errors
    ///
    /// What keeps the kernel from looking, those of mount(2). It may be asked for again.
    pub async fn find(&self, sys: &Path) -> Result<()> {
        let find = async {
            pci::rescan(sys)
                .await
                .context("have the kernel look for the shared directory")?;
            blocking(mount).await
        };
        self.0.get_or_try_init(|| find).await?;
        Ok(())
    }
}

fn mount() -> Result<()> {
    let what = || format!("mount the share on {SHARED_DIR}");
    std::fs::create_dir_all(SHARED_DIR).with_context(what)?;
    nix::mount::mount(
        Some(SHARED_TAG),
        Path::new(SHARED_DIR),
        Some("virtiofs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .with_context(what)
}
