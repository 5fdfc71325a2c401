//! A file, wherever it is, to be read at any place.

use std::fmt;
use std::io;
use std::sync::Arc;

#[cfg(feature = "oci")]
use super::registry::RegistryError;
use super::remote::{RemoteError, RemoteFile};
use super::{FileSource, Location, StoreError};
use crate::bytes::ReadAt;
use crate::error::{Error, Result};

/// Something that lies elsewhere, to be read at any place by any thread.
pub trait FarFile: ReadAt + fmt::Debug {
    /// Why nothing can be read any more, if so: a connection that ended, an object that was replaced.
    fn failure(&self) -> Option<Error>;
}

impl FarFile for RemoteFile {
    fn failure(&self) -> Option<Error> {
        self.asker().failure().map(Error::from)
    }
}

/// Opens what lies elsewhere.
///
/// # Errors
/// [`StoreError::NotALocation`] for a path or a pipe; [`StoreError::NotBuilt`]; what the other side says.
pub fn open_far(location: &Location) -> Result<Arc<dyn FarFile>> {
    let there = location.to_string();
    let not_built = |feature| StoreError::NotBuilt { feature, there };
    match location {
        Location::Path(_) | Location::Pipe => Err(StoreError::NotALocation {
            text: location.to_string(),
        }
        .into()),
        Location::Ssh(there) => Ok(Arc::new(RemoteFile::open_at(there)?)),
        Location::Object(_) => Err(not_built("s3").into()),
        Location::Web(_) => Err(not_built("http").into()),
        #[cfg(feature = "oci")]
        Location::Registry(there) => Ok(Arc::new(super::registry::RegistryFile::open(there)?)),
        #[cfg(not(feature = "oci"))]
        Location::Registry(_) => Err(not_built("oci").into()),
    }
}

/// What failed elsewhere, where reading from there is why something failed here.
pub fn far_cause(error: &Error) -> Option<Error> {
    let far = |cause: &(dyn std::error::Error + 'static)| {
        let inner = cause.downcast_ref::<io::Error>()?.get_ref()?;
        #[cfg(feature = "oci")]
        if let Some(error) = inner.downcast_ref::<RegistryError>() {
            return Some(error.clone().into());
        }
        let remote = inner.downcast_ref::<RemoteError>();
        remote.map(|error| error.clone().into())
    };
    error.causes().find_map(far)
}

/// A file of this host, or of another place.
#[derive(Debug)]
pub enum AnyFile {
    /// Of this host.
    File(FileSource),
    /// Of another place.
    Far(Arc<dyn FarFile>),
}

impl AnyFile {
    /// The file, if it is one of this host.
    pub fn local(&self) -> Option<&FileSource> {
        match self {
            AnyFile::File(file) => Some(file),
            AnyFile::Far(_) => None,
        }
    }

    /// As [`FileSource::lock_shared`]; the other side does so by itself.
    ///
    /// # Errors
    /// As [`FileSource::lock_shared`].
    pub fn lock_shared(&self, path: &std::path::Path) -> Result<(), StoreError> {
        self.local().map_or(Ok(()), |file| file.lock_shared(path))
    }

    /// As [`FarFile::failure`].
    pub fn failure(&self) -> Option<Error> {
        match self {
            AnyFile::File(_) => None,
            AnyFile::Far(file) => file.failure(),
        }
    }
}

impl From<FileSource> for AnyFile {
    fn from(file: FileSource) -> Self {
        AnyFile::File(file)
    }
}

impl From<std::fs::File> for AnyFile {
    fn from(file: std::fs::File) -> Self {
        AnyFile::File(FileSource::from(file))
    }
}

impl ReadAt for AnyFile {
    fn len(&self) -> u64 {
        match self {
            AnyFile::File(file) => file.len(),
            AnyFile::Far(file) => file.len(),
        }
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            AnyFile::File(file) => file.read_exact_at(buf, offset),
            AnyFile::Far(file) => file.read_exact_at(buf, offset),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        match self {
            AnyFile::File(file) => file.next_data(offset),
            AnyFile::Far(file) => file.next_data(offset),
        }
    }
}
