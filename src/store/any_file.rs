//! A file, wherever it is, to be read at any place.

use std::io;

use super::remote::{RemoteError, RemoteFile};
use super::{FileSource, StoreError};
use crate::bytes::ReadAt;

/// A file of this host, or of another.
#[derive(Debug)]
pub enum AnyFile {
    /// Of this host.
    File(FileSource),
    /// Of another.
    Remote(RemoteFile),
}

impl AnyFile {
    /// The file, if it is one of this host.
    pub fn local(&self) -> Option<&FileSource> {
        match self {
            AnyFile::File(file) => Some(file),
            AnyFile::Remote(_) => None,
        }
    }

    /// As [`FileSource::lock_shared`]; the other host does so by itself.
    ///
    /// # Errors
    /// As [`FileSource::lock_shared`].
    pub fn lock_shared(&self, path: &std::path::Path) -> Result<(), StoreError> {
        self.local().map_or(Ok(()), |file| file.lock_shared(path))
    }

    /// Why nothing can be read any more, if so: a connection that ended.
    pub fn failure(&self) -> Option<RemoteError> {
        match self {
            AnyFile::File(_) => None,
            AnyFile::Remote(file) => file.asker().failure(),
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
            AnyFile::Remote(file) => file.len(),
        }
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            AnyFile::File(file) => file.read_exact_at(buf, offset),
            AnyFile::Remote(file) => file.read_exact_at(buf, offset),
        }
    }

    fn read_to(&self, buf: &mut Vec<u8>, len: usize, offset: u64) -> io::Result<()> {
        match self {
            AnyFile::File(file) => file.read_to(buf, len, offset),
            AnyFile::Remote(file) => file.read_to(buf, len, offset),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        match self {
            AnyFile::File(file) => file.next_data(offset),
            AnyFile::Remote(file) => file.next_data(offset),
        }
    }
}
