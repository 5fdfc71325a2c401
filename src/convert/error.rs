//! Why an image was not converted.

use std::io;

use crate::error::{Blame, ErrorKind};

/// Why an image was not converted; the old one is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The new image could not be made durable.
    #[error("the new image could not be written")]
    Write(#[source] io::Error),
    /// The manifest could not be written.
    #[error("the manifest could not be written")]
    Manifest(#[source] serde_json::Error),
    /// The new image did not get its name.
    #[error("the new image is whole but did not get its name, and is gone")]
    Publish(#[source] io::Error),
    /// Nobody knows whether it did.
    #[error("it is not known whether the new image got its name")]
    PublishUnknown(#[source] io::Error),
    /// The same chunks have to have the same digest.
    #[error("the new image would not have the digest of the old one")]
    OtherDigest,
}

impl Blame for ConvertError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Failed
    }
}
