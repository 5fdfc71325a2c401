//! A file, wherever it is, to be read at any place.

use std::fmt;
use std::io;
use std::sync::Arc;

#[cfg(feature = "oci")]
use super::registry::RegistryError;
use super::remote::{Asker, RemoteError, RemoteFile};
use super::web::WebError;
use super::{FileSource, Location, StoreError};
use crate::bytes::ReadAt;
use crate::error::{Error, Result};

/// Something that lies elsewhere, to be read at any place by any thread.
pub trait FarFile: ReadAt + fmt::Debug {
    /// Why nothing can be read any more, if so: a connection that ended, an object that was replaced.
    fn failure(&self) -> Option<Error>;

    /// Whom else can be asked about it, if another program like this one reads it for us.
    fn asker(&self) -> Option<&Arc<Asker>> {
        None
    }
}

impl FarFile for RemoteFile {
    fn failure(&self) -> Option<Error> {
        RemoteFile::asker(self).failure().map(Error::from)
    }

    fn asker(&self) -> Option<&Arc<Asker>> {
        Some(RemoteFile::asker(self))
    }
}

/// Opens what lies elsewhere.
///
/// # Errors
/// [`StoreError::NotALocation`] for a path or a pipe; [`StoreError::NotBuilt`]; what the other side says.
pub fn open_far(location: &Location) -> Result<Arc<dyn FarFile>> {
    match location {
        Location::Path(_) | Location::Pipe => Err(StoreError::NotALocation {
            text: location.to_string(),
        }
        .into()),
        Location::Ssh(there) => Ok(Arc::new(RemoteFile::open_at(there)?)),
        Location::Peer(socket) => Ok(Arc::new(RemoteFile::relayed(socket)?)),
        #[cfg(feature = "s3")]
        Location::Object(there) => Ok(Arc::new(super::object::open_object(there)?)),
        #[cfg(not(feature = "s3"))]
        Location::Object(_) => Err(not_built("s3", location).into()),
        #[cfg(feature = "http")]
        Location::Web(url) => Ok(Arc::new(super::web::open_web(url)?)),
        #[cfg(not(feature = "http"))]
        Location::Web(_) => Err(not_built("http", location).into()),
        #[cfg(feature = "oci")]
        Location::Registry(there) => Ok(Arc::new(super::registry::RegistryFile::open(there)?)),
        #[cfg(not(feature = "oci"))]
        Location::Registry(_) => Err(not_built("oci", location).into()),
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
        let web = inner.downcast_ref::<WebError>().cloned().map(Error::from);
        web.or_else(|| {
            inner
                .downcast_ref::<RemoteError>()
                .cloned()
                .map(Error::from)
        })
    };
    error.causes().find_map(far)
}

/// A place for which this program lacks the feature.
#[cfg(not(all(feature = "http", feature = "oci", feature = "s3")))]
fn not_built(feature: &'static str, location: &Location) -> StoreError {
    StoreError::NotBuilt {
        feature,
        there: location.to_string(),
    }
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

    /// As [`FarFile::asker`].
    pub fn asker(&self) -> Option<&Arc<Asker>> {
        match self {
            AnyFile::File(_) => None,
            AnyFile::Far(file) => file.asker(),
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

    fn read_to(&self, buf: &mut Vec<u8>, len: usize, offset: u64) -> io::Result<()> {
        match self {
            AnyFile::File(file) => file.read_to(buf, len, offset),
            AnyFile::Far(file) => file.read_to(buf, len, offset),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        match self {
            AnyFile::File(file) => file.next_data(offset),
            AnyFile::Far(file) => file.next_data(offset),
        }
    }
}
