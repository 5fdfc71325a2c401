//! What can go wrong with a transfer itself.

use std::io;

use crate::bytes::PublishError;
use crate::error::{Blame, ErrorKind};

/// What can go wrong with a transfer itself.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// Standard output was named as the target.
    #[error("an image that is copied needs a name")]
    NoName,
    /// The image on the other side is not the one that was sent.
    #[error("{peer} made another image than the one it was given")]
    OtherImage {
        /// Who made it.
        peer: String,
    },
    /// What the sender says of the image changed on the way.
    #[error("the image changed while it was copied")]
    Changed,
    /// What the peer was asked to make is not clear.
    #[error("the order is not clear: {what}")]
    Order {
        /// What is not.
        what: String,
    },
    /// The finished image could not be made durable.
    #[error("the copy could not be written to the disk")]
    Sync(#[source] io::Error),
    /// The finished image did not get its name, or may not have got it.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl Blame for TransferError {
    fn kind(&self) -> ErrorKind {
        match self {
            TransferError::NoName | TransferError::Order { .. } => ErrorKind::Usage,
            TransferError::OtherImage { .. } => ErrorKind::Remote,
            TransferError::Changed | TransferError::Sync(_) | TransferError::Publish(_) => {
                ErrorKind::Failed
            }
        }
    }
}
