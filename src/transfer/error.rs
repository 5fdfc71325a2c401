//! What can go wrong with a transfer itself.

use std::io;
use std::path::PathBuf;

use crate::bytes::PublishError;
use crate::error::{Blame, Error, ErrorKind};

/// What can go wrong with a transfer itself.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// Standard output was named as the target.
    #[error("an image that is copied needs a name")]
    NoName,
    /// Only whole images are kept there.
    #[error("a delta cannot be copied to {there}")]
    DeltaThere {
        /// The location.
        there: String,
    },
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
    /// The image of an earlier save that was named cannot be used.
    #[error("{} cannot help as the image of an earlier save", path.display())]
    Parent {
        /// Its name.
        path: PathBuf,
        /// Why.
        why: Error,
    },
    /// The image of an earlier save has to be where the copy shall be.
    #[error("{there} is not on the host of the copy")]
    ParentElsewhere {
        /// Its name.
        there: String,
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
            TransferError::DeltaThere { .. }
            | TransferError::NoName
            | TransferError::Order { .. }
            | TransferError::ParentElsewhere { .. } => ErrorKind::Usage,
            TransferError::Parent { why, .. } => why.kind(),
            TransferError::OtherImage { .. } => ErrorKind::Remote,
            TransferError::Changed | TransferError::Sync(_) | TransferError::Publish(_) => {
                ErrorKind::Failed
            }
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            TransferError::Parent { why, .. } => {
                let causes = why.causes().map(ToString::to_string);
                std::iter::once(why.to_string()).chain(causes).collect()
            }
            _ => Vec::new(),
        }
    }
}
