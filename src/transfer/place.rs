//! What the copy is called: the target, or in a directory that it names what the source is called.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::TransferError;
use crate::store::{Location, SshLocation};

/// What the file at `location` is called.
pub fn name_of(location: &Location) -> Option<OsString> {
    let last = |path: &str| path.rsplit('/').next().map(OsString::from);
    match location {
        Location::Path(path) => path.file_name().map(OsStr::to_owned),
        Location::Ssh(there) => there.path.file_name().map(OsStr::to_owned),
        Location::Object(there) => last(&there.key).filter(|name| !name.is_empty()),
        Location::Web(url) => {
            let end = url.find(['?', '#']).unwrap_or(url.len());
            last(&url[..end]).filter(|name| !name.is_empty())
        }
        Location::Registry(there) => {
            let name = there.repository.rsplit('/').next();
            name.map(|name| format!("{name}-{}.stow", there.tag).into())
        }
        Location::Pipe | Location::Peer(_) => None,
    }
}

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
