//! The disks of a guest that runs on while it is saved: its image shows one instant, so must they.

use std::path::{Path, PathBuf};

use super::SaveError;
use crate::error::Result;
use crate::qmp::{BlockNode, DiskSnapshot, QmpClient, QmpError};

/// What stands between a disk's file and its overlay's name.
const MARK: &str = ".live-";

/// The disks that the guest may write to: the top nodes, with the device or drive that each belongs to.
pub fn writable(qmp: &mut QmpClient) -> Result<Vec<(String, BlockNode)>, QmpError> {
    let devices = qmp.query_block()?.into_iter();
    let media = devices.filter_map(|device| {
        let name = match (&device.qdev, device.device.as_str()) {
            (_, name) if !name.is_empty() => name.to_owned(),
            (Some(qdev), _) => qdev.clone(),
            (None, _) => String::new(),
        };
        Some((name, device.inserted?))
    });
    Ok(media.filter(|(_, node)| !node.ro).collect())
}

/// The snapshots that let all writable disks go on in overlays beside their files, named after `time`.
///
/// # Errors
/// [`SaveError::NoSnapshot`] for the first disk that is no file beside which there is room for another.
pub fn snapshots(
    qmp: &mut QmpClient,
    guest: &str,
    cwd: &Path,
    time: &str,
) -> Result<Vec<DiskSnapshot>> {
    let mut found = Vec::new();
    for (number, (name, node)) in (0..).zip(writable(qmp)?) {
        let refused = |why: &str| SaveError::NoSnapshot {
            guest: guest.to_owned(),
            disk: name.clone(),
            why: why.to_owned(),
        };
        let file = &node.image.filename;
        let is_path = !file.split('/').next().unwrap_or_default().contains(':');
        if !is_path {
            return Err(refused("it is no file of this host").into());
        }
        // QEMU names the file in its overlay as it was named itself, and looks for it beside the overlay.
        if !file.starts_with('/') && file.contains('/') {
            return Err(refused(&format!("the path {file} is relative")).into());
        }
        let path = cwd.join(file);
        if !path.is_file() {
            return Err(refused(&format!("{} is no plain file", path.display())).into());
        }
        let overlay = overlay_beside(&path, time);
        if overlay.symlink_metadata().is_ok() {
            return Err(refused(&format!("{} is there already", overlay.display())).into());
        }
        found.push(DiskSnapshot {
            node: node.node_name,
            overlay: overlay.display().to_string(),
            overlay_node: format!("vmstow{MARK}{time}-{number}").replace('.', "-"),
        });
    }
    Ok(found)
}

/// `DISK.live-TIME.qcow2`; the overlay of an overlay is named after the disk, too.
fn overlay_beside(disk: &Path, time: &str) -> PathBuf {
    let name = disk.file_name().unwrap_or_default().to_string_lossy();
    let name = match name.rsplit_once(MARK) {
        Some((before, rest)) if rest.ends_with(".qcow2") && !before.is_empty() => before,
        _ => &name,
    };
    disk.with_file_name(format!("{name}{MARK}{time}.qcow2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_lies_beside_the_disk_it_is_named_after() {
        let named = |disk: &str| overlay_beside(Path::new(disk), "2").display().to_string();
        assert_eq!(named("/srv/a.img"), "/srv/a.img.live-2.qcow2");
        assert_eq!(named("/srv/a.img.live-1.qcow2"), "/srv/a.img.live-2.qcow2");
        assert_eq!(named("/srv/.live-x.raw"), "/srv/.live-x.raw.live-2.qcow2");
    }
}
