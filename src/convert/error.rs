//! Why nothing was converted.

use std::io;

use crate::error::{Blame, ErrorKind};

/// Why nothing was converted; the old file is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The new image could not be made durable.
    #[error("the new file could not be written")]
    Write(#[source] io::Error),
    /// The manifest could not be written.
    #[error("the manifest could not be written")]
    Manifest(#[source] serde_json::Error),
    /// The new image did not get its name.
    #[error("the new file is whole but did not get its name, and is gone")]
    Publish(#[source] io::Error),
    /// Nobody knows whether it did.
    #[error("it is not known whether the new file got its name")]
    PublishUnknown(#[source] io::Error),
    /// A core has to be written at many places, which a pipe has not.
    #[error("an ELF core can only be written to a file")]
    CoreToPipe,
    /// The same chunks have to have the same digest.
    #[error("the new image would not have the digest of the old one")]
    OtherDigest,
    /// An image that has a configuration gets another one by being edited.
    #[error("it has a domain XML of its own")]
    HasXml,
    /// libvirt wants to know what to start.
    #[error("it has no configuration, without which libvirt cannot restore it")]
    NoXml,
    /// Domain XML that the user named could not be read.
    #[error("{what} cannot be read")]
    XmlNotRead {
        /// The file.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
    /// An option that has no meaning for what is to be made.
    #[error("{option} has no meaning for what is to be made")]
    Misplaced {
        /// The option.
        option: &'static str,
    },
    /// Pages that have places of their own cannot follow each other.
    #[error("a file of the mapped-ram layout can only be written to a file")]
    NoPlaces,
}

impl Blame for ConvertError {
    fn kind(&self) -> ErrorKind {
        match self {
            ConvertError::HasXml | ConvertError::NoXml | ConvertError::NoPlaces => ErrorKind::Usage,
            ConvertError::XmlNotRead { .. } | ConvertError::Misplaced { .. } => ErrorKind::Usage,
            ConvertError::CoreToPipe => ErrorKind::Usage,
            _ => ErrorKind::Failed,
        }
    }
}
