//! Guests whose image was found damaged while they ran on it: they are frozen, and marked.

use std::fs;
use std::io;

use jiff::Timestamp;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::error::SuperviseError;
use super::launch::{failed, write_whole};
use crate::host::{GuestDir, ProcessId};

/// `damaged.json`: why a guest was frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// What is wrong: `chunk 52 does not match its hash`.
    pub what: String,
    /// Where in the image: a file offset.
    pub at: Option<String>,
    /// Which memory of the guest it is: `RAMBlock "pc.ram", pages 0x6800..0x6a00`.
    pub pages: Option<String>,
    /// When that was found.
    pub found_at: Timestamp,
}

/// Freezes a guest, and marks it as damaged. Its QEMU does nothing any more, which hears no monitor command either:
/// QMP's `stop` would wait for memory that will never come.
///
/// # Errors
/// What the kernel said of the signal, or of the file; the guest is frozen in the latter case.
pub fn freeze(dir: &GuestDir, process: ProcessId, damage: &Damage) -> Result<(), SuperviseError> {
    process.open()?.signal(Signal::STOP)?;
    let path = dir.damage();
    let text = serde_json::to_vec_pretty(damage);
    let text = text.map_err(|source| SuperviseError::BadDescription {
        path: path.clone(),
        source,
    })?;
    write_whole(&path, &text).map_err(failed("write", &path))
}

/// The damage for which a guest was frozen; `None` if it was not.
///
/// # Errors
/// [`SuperviseError::BadDescription`] if the mark is not ours.
pub fn damage_of(dir: &GuestDir) -> Result<Option<Damage>, SuperviseError> {
    let path = dir.damage();
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read", &path)(error)),
    };
    let damage = serde_json::from_slice(&bytes);
    damage
        .map(Some)
        .map_err(|source| SuperviseError::BadDescription { path, source })
}
