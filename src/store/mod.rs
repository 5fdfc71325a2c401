//! Where bytes live: files, pipes, files of other hosts and of the web, objects of object stores, artifacts of registries.
//!
//! This module moves bytes and knows no format. A [`FileSink`] writes under a temporary name in the target's
//! directory and takes the good name only when it is published; a [`PipeSink`] writes to a descriptor and keeps
//! the end back until then.

mod any_file;
mod append;
mod file;
mod location;
#[cfg(feature = "s3")]
pub mod object;
mod part;
mod pipe;
#[cfg(feature = "oci")]
pub mod registry;
pub mod remote;
mod surroundings;
pub mod web;

pub use any_file::{AnyFile, FarFile, far_cause, open_far};
pub use append::FileAppender;
pub use file::{FileIdentity, FileSink, FileSource, check_target, open_to_change, temporary_name};
pub use location::{Location, ObjectLocation, RegistryLocation, SshLocation};
pub use part::PartFile;
pub use pipe::{PipeSink, spool};
pub use surroundings::Surroundings;

use std::io;
use std::path::PathBuf;

use crate::error::{Blame, ErrorKind};

/// What can go wrong with files and pipes.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file could not be opened, read, made or removed.
    #[error("cannot {act} {}", path.display())]
    File {
        /// What was tried: `open`, `create`, …
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Something of that name is there already.
    #[error("{} exists", path.display())]
    Exists {
        /// The name.
        path: PathBuf,
    },
    /// A guest runs on the image.
    #[error("{} is in use: a guest runs on it", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// Somebody changes the image.
    #[error("{} is being changed by another program", path.display())]
    BeingChanged {
        /// The image.
        path: PathBuf,
    },
    /// The path names no regular file.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The path has no file name, or names a location this program does not know.
    #[error("{text:?} is no location of an image")]
    NotALocation {
        /// What was given.
        text: String,
    },
    /// What reaches such places is a feature that was left out.
    #[error("this vmstow was built without {feature}, so it cannot reach {there}")]
    NotBuilt {
        /// The feature of the package.
        feature: &'static str,
        /// The location.
        there: String,
    },
    /// The file is elsewhere, and has to be here.
    #[error("{there} is not on this host")]
    FarAway {
        /// The location.
        there: String,
    },
    /// Another program makes a file of that name.
    #[error("{} is being written by another program", path.display())]
    BeingMade {
        /// The name.
        path: PathBuf,
    },
    /// The file system has not enough room.
    #[error("there is not enough room for {}: {needed} bytes are needed, {free} are free", path.display())]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// Bytes that are still to be written.
        needed: u64,
        /// Bytes that the file system can take.
        free: u64,
    },
    /// An image does not go to a terminal.
    #[error("standard output is a terminal, an image cannot go there")]
    Terminal,
    /// A pipe could not be read or written.
    #[error("cannot {act} the pipe")]
    Pipe {
        /// What was tried.
        act: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl Blame for StoreError {
    fn kind(&self) -> ErrorKind {
        match self {
            StoreError::Exists { .. }
            | StoreError::NotALocation { .. }
            | StoreError::FarAway { .. }
            | StoreError::NotBuilt { .. }
            | StoreError::Terminal => ErrorKind::Usage,
            StoreError::NotAFile { .. } => ErrorKind::Usage,
            StoreError::InUse { .. }
            | StoreError::BeingChanged { .. }
            | StoreError::BeingMade { .. }
            | StoreError::NoRoom { .. } => ErrorKind::Host,
            StoreError::File { .. } | StoreError::Pipe { .. } => ErrorKind::Failed,
        }
    }
}
