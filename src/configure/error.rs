//! Why an image's configuration was not changed.

use std::path::PathBuf;

use crate::config::Reason;
use crate::config::abi::Change;
use crate::error::{Blame, ErrorKind};

/// Why an image's configuration was not changed, or not told; the image is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    /// The guest would see the difference: the saved state fits only what it saw.
    #[error("{guest} would see {}; nothing was changed", counted(changes.len()))]
    SeenByGuest {
        /// The guest.
        guest: String,
        /// What it would see.
        changes: Vec<Change>,
    },
    /// Other backends that a restore could not give the guest.
    #[error("a restore of {guest} could not do as the changed XML says; nothing was changed")]
    NotCarried {
        /// The guest.
        guest: String,
        /// Each with the reason.
        reasons: Vec<Reason>,
    },
    /// XML without a name, or with an empty one.
    #[error("a guest has a name, and the changed XML has none; nothing was changed")]
    NoName,
    /// XML that no image may hold.
    #[error("the changed XML has a DOCTYPE or a byte order mark; nothing was changed")]
    DocType,
    /// There is nothing where XML should be.
    #[error("the text is empty; nothing was changed")]
    Empty,
    /// The image's last edit was cut off.
    #[error("the last edit of {} was cut off; nothing was changed", path.display())]
    Torn {
        /// The image.
        path: PathBuf,
    },
    /// The image comes through a pipe.
    #[error("an image that comes through a pipe cannot be changed")]
    Pipe,
    /// There is no label of this name, or nothing at this place of the XML.
    #[error("there is no {name:?} in the configuration")]
    Unknown {
        /// The label or the path.
        name: String,
    },
    /// The manifest could not be written.
    #[error("the manifest could not be written")]
    Manifest(#[source] serde_json::Error),
    /// The editor did not end well.
    #[error("the editor ({editor}) ended with {status}; nothing was changed")]
    Editor {
        /// What was started.
        editor: String,
        /// How it ended.
        status: String,
    },
}

fn counted(count: usize) -> String {
    match count {
        1 => "this change".to_owned(),
        count => format!("{count} of the changes"),
    }
}

impl Blame for ConfigureError {
    fn kind(&self) -> ErrorKind {
        match self {
            ConfigureError::Torn { .. } => ErrorKind::Image,
            ConfigureError::Manifest(_) | ConfigureError::Editor { .. } => ErrorKind::Failed,
            _ => ErrorKind::Usage,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            ConfigureError::SeenByGuest { changes, .. } => {
                changes.iter().map(ToString::to_string).collect()
            }
            ConfigureError::NotCarried { reasons, .. } => {
                reasons.iter().map(ToString::to_string).collect()
            }
            _ => Vec::new(),
        }
    }
}
