//! What the copy is called: the target, or in a directory that it names what the source is called.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::TransferError;
use crate::store::SshLocation;

/// The path of a copy that shall be at `target`.
///
/// # Errors
/// [`TransferError::NoName`] if that is a directory and the image has no name.
pub fn place(target: &Path, name: Option<&OsStr>) -> Result<PathBuf, TransferError> {
    match target.is_dir() {
        true => Ok(target.join(name.ok_or(TransferError::NoName)?)),
        false => Ok(target.to_owned()),
    }
}

/// Where the copy is that was ordered for `there`, as far as the other side is believed.
pub fn told(there: &SshLocation, name: Option<&OsStr>, told: &str) -> SshLocation {
    let inside = name.map(|name| there.path.join(name));
    let path = inside.filter(|path| path == Path::new(told));
    SshLocation {
        path: path.unwrap_or_else(|| there.path.clone()),
        ..there.clone()
    }
}
