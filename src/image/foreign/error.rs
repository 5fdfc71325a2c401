//! Why a file of others cannot be read.

use std::io;

use super::libvirt::SaveFormat;
use crate::error::{Blame, ErrorKind};

/// Why a libvirt save image or a bare stream cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ForeignError {
    /// libvirt has not finished it: it is being written, or its writer ended before that.
    #[error("it is not complete: libvirt marks it as LibvirtQemudPart")]
    Incomplete,
    /// A header of a later libvirt, or none.
    #[error("it is a libvirt save image of version {version}; 0 to 2 are known")]
    UnknownVersion {
        /// What stands there.
        version: u32,
    },
    /// A format of a later libvirt, or none.
    #[error("it is a libvirt save image of format {format}; 0 to 6 are known")]
    UnknownFormat {
        /// What stands there.
        format: u32,
    },
    /// Its beginning is not what it says.
    #[error("it is a libvirt save image that {problem}")]
    Metadata {
        /// Behind "a save image that".
        problem: &'static str,
    },
    /// The stream is not compressed as the header says.
    #[error("its header says {format}, and its stream is not compressed so")]
    OtherFormat {
        /// What the header says.
        format: SaveFormat,
    },
    /// The compressed stream is damaged or cut off.
    #[error("its compressed stream cannot be decompressed")]
    Decompress(#[source] io::Error),
    /// The stream could not be compressed.
    #[error("the stream could not be compressed")]
    Compress(#[source] io::Error),
    /// A program that is needed is not here.
    #[error("{program} cannot be started")]
    NoProgram {
        /// Its name, which is that of the Debian package too.
        program: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The decompressed stream is longer than any of such a guest.
    #[error(
        "its stream is longer than {limit} bytes, which is more than a guest of {memory} bytes gives"
    )]
    TooLong {
        /// What is read at most.
        limit: u64,
        /// All RAMBlocks.
        memory: u64,
    },
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// What is read cannot be kept for the time being.
    #[error("there is no place for its stream in the directory for temporary files")]
    Temporary(#[source] io::Error),
    /// The manifest could not be written.
    #[error("the manifest could not be written")]
    Manifest(#[source] serde_json::Error),
}

impl Blame for ForeignError {
    fn kind(&self) -> ErrorKind {
        match self {
            ForeignError::NoProgram { .. } => ErrorKind::Host,
            ForeignError::Read(_)
            | ForeignError::Temporary(_)
            | ForeignError::Compress(_)
            | ForeignError::Manifest(_) => ErrorKind::Failed,
            _ => ErrorKind::Image,
        }
    }
}
