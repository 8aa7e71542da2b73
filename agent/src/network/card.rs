//! The machine's network cards, by their addresses on the PCI bus.
//!
//! Cards may come and go while the guest runs, on bus 0, which has no hot-plug slots:
//! the kernel looks for them, and lets go of them, when it is told to
//! (Documentation/ABI/testing/sysfs-bus-pci: `rescan`, `remove`). Both return when the
//! driver has taken the card, or left it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::pci;

/// A card whose driver has made an interface of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Card {
    /// The interface's index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC address, as text.
    pub mac: String,
}

/// The card at `address`, if it is there.
///
/// # Errors
///
/// `InvalidArgument` for what is no address, else `Io`.
pub(super) fn look(sys: &Path, address: &str) -> Result<Option<Card>> {
    let what = || format!("look for network card {address}");
    for device in entries(&dir_of(sys, address)?).with_context(what)? {
        let is_virtio = device
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"virtio"));
        if is_virtio
            && let Some(interface) = entries(&device.join("net")).with_context(what)?.first()
        {
            return read(interface).map(Some).with_context(what);
        }
    }
    Ok(None)
}

/// The card at `address`; the kernel looks for it if it does not know it.
///
/// # Errors
///
/// `NotFound`, those of [`look`].
pub(super) async fn find(sys: &Path, address: &str) -> Result<Card> {
    if let Some(card) = look(sys, address)? {
        return Ok(card);
    }
    pci::rescan(sys)
        .await
        .with_context(|| format!("have the kernel look for network card {address}"))?;
    look(sys, address)?.ok_or_else(|| Error::NotFound(format!("network card {address}")))
}

/// Has the kernel let go of the card at `address`, if it is there.
///
/// # Errors
///
/// `InvalidArgument` for what is no address, else `Io`.
pub(super) async fn remove(sys: &Path, address: &str) -> Result<()> {
    match pci::write(&dir_of(sys, address)?.join("remove"), "1").await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        told => told.with_context(|| format!("let go of network card {address}")),
    }
}

fn dir_of(sys: &Path, address: &str) -> Result<PathBuf> {
    let is_address = |byte: u8| byte.is_ascii_hexdigit() || b":.".contains(&byte);
    if address.starts_with('.') || address.is_empty() || !address.bytes().all(is_address) {
        let text = format!("{address:?} is no PCI address");
        return Err(Error::InvalidArgument(text));
    }
    Ok(sys.join("bus/pci/devices").join(address))
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.path())).collect(),
    }
}

fn read(interface: &Path) -> io::Result<Card> {
    let text = |file| fs::read_to_string(interface.join(file));
    let index = text("ifindex")?.trim().parse().map_err(io::Error::other)?;
    let name = interface.file_name().unwrap_or_default();
    Ok(Card {
        index,
        name: name.to_string_lossy().into_owned(),
        mac: text("address")?.trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: &str = "0000:00:07.0";

    /// What the kernel shows of a machine, with a card or without.
    fn sys(with_card: bool) -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let pci = sys.path().join("bus/pci");
        fs::create_dir_all(pci.join("devices")).unwrap();
        fs::write(pci.join("rescan"), "").unwrap();
        if with_card {
            let device = pci.join("devices").join(ADDRESS);
            let interface = device.join("virtio5/net/eth1");
            fs::create_dir_all(&interface).unwrap();
            fs::create_dir_all(device.join("msi_irqs")).unwrap();
            fs::write(device.join("remove"), "").unwrap();
            fs::write(interface.join("ifindex"), "4\n").unwrap();
            fs::write(interface.join("address"), "02:00:00:00:00:05\n").unwrap();
        }
        sys
    }

    fn told(sys: &tempfile::TempDir, file: &str) -> String {
        fs::read_to_string(sys.path().join("bus/pci").join(file)).unwrap()
    }

    #[tokio::test]
    async fn card_that_is_there_is_not_looked_for() {
        let sys = sys(true);
        let card = find(sys.path(), ADDRESS).await.unwrap();
        assert_eq!((card.index, card.name.as_str()), (4, "eth1"));
        assert_eq!(card.mac, "02:00:00:00:00:05");
        assert_eq!(told(&sys, "rescan"), "");
    }

    #[tokio::test]
    async fn card_that_is_not_there_is_looked_for() {
        let sys = sys(false);
        assert_eq!(look(sys.path(), ADDRESS).unwrap(), None);
        let error = find(sys.path(), ADDRESS).await.unwrap_err();
        assert_eq!(error.full(), "network card 0000:00:07.0 not found");
        assert_eq!(told(&sys, "rescan"), "1");
    }

    #[tokio::test]
    async fn card_is_let_go_once() {
        let with_card = sys(true);
        remove(with_card.path(), ADDRESS).await.unwrap();
        let file = format!("devices/{ADDRESS}/remove");
        assert_eq!(told(&with_card, &file), "1");
        remove(sys(false).path(), ADDRESS).await.unwrap();
    }

    #[test]
    fn what_is_no_address_is_no_path() {
        for wrong in ["", "..", "../../class", "0000:00:07.0/virtio5"] {
            let error = look(Path::new("/sys"), wrong).unwrap_err();
            assert!(error.full().ends_with("is no PCI address"), "{wrong}");
        }
    }
}
