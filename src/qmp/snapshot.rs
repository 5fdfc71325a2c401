//! Overlays over the disks of a guest, made by its QEMU.
//!
//! Source: QEMU `qapi/transaction.json` and `qapi/block-core.json`, `blockdev-snapshot-sync`.

use serde_json::{Value, json};

use super::client::QmpClient;
use super::error::QmpError;

/// A disk that shall go on in an overlay, its file staying as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSnapshot {
    /// The block node at the top of the disk.
    pub node: String,
    /// The overlay's file; QEMU makes it, or overwrites it.
    pub overlay: String,
    /// The overlay's node: at most 31 letters, digits, `-`, `.` and `_`.
    pub overlay_node: String,
}

impl QmpClient {
    /// Lets all these disks go on in new qcow2 overlays, all at one instant or none.
    pub fn snapshot_disks(&mut self, disks: &[DiskSnapshot]) -> Result<(), QmpError> {
        let action = |disk: &DiskSnapshot| {
            json!({
                "type": "blockdev-snapshot-sync",
                "data": {
                    "node-name": disk.node,
                    "snapshot-file": disk.overlay,
                    "snapshot-node-name": disk.overlay_node,
                    "format": "qcow2",
                    "mode": "absolute-paths",
                },
            })
        };
        let actions: Vec<Value> = disks.iter().map(action).collect();
        self.order("transaction", json!({ "actions": actions }))
    }
}
