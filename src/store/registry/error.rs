//! What can go wrong with a registry.

use std::path::PathBuf;

use crate::error::{Blame, ErrorKind};

/// What can go wrong with a registry.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// No connection could be made, or it broke again and again.
    #[error("the registry {registry} cannot be reached")]
    Unreachable {
        /// `HOST[:PORT]`
        registry: String,
        /// What was met.
        why: String,
    },
    /// What answers is none.
    #[error("no registry of container images answers at {registry}")]
    NoRegistry {
        /// `HOST[:PORT]`
        registry: String,
        /// What was met.
        why: String,
    },
    /// The registry wants credentials, or others.
    #[error("{registry} {}", denied(user.as_deref(), repository))]
    Denied {
        /// `HOST[:PORT]`
        registry: String,
        /// What was to be read or written.
        repository: String,
        /// Whose credentials were sent; `None` if none were found.
        user: Option<String>,
        /// Its words.
        words: Vec<String>,
    },
    /// There is no such tag, or no such repository.
    #[error("there is no {there}")]
    NotFound {
        /// The location.
        there: String,
        /// The registry's words.
        words: Vec<String>,
    },
    /// The tag is taken.
    #[error("{there} exists")]
    Exists {
        /// The location.
        there: String,
    },
    /// The artifact is something else.
    #[error("{there} is no image of vmstow: it is {what}")]
    NotAnImage {
        /// The location.
        there: String,
        /// A media type, or what is known.
        what: String,
    },
    /// The artifact's manifest breaks a rule of spec/registry.md.
    #[error("the manifest of {there} is damaged: {what}")]
    BadManifest {
        /// The location.
        there: String,
        /// Which rule.
        what: String,
    },
    /// A blob that the manifest names is not there any more.
    #[error("a part of {there} is gone")]
    Gone {
        /// The location.
        there: String,
        /// The blob.
        digest: String,
    },
    /// The registry gave something else than it was asked for.
    #[error("{registry} gave other bytes than those it was asked for")]
    OtherBytes {
        /// `HOST[:PORT]`
        registry: String,
        /// What was wrong with them.
        what: String,
    },
    /// The registry could not do it.
    #[error("{registry} answers {status} when it is to {act}")]
    Refused {
        /// `HOST[:PORT]`
        registry: String,
        /// What was tried.
        act: &'static str,
        /// The HTTP status.
        status: u16,
        /// Its words.
        words: Vec<String>,
    },
    /// The credentials of the container tools cannot be used.
    #[error("the credentials in {} cannot be used", path.display())]
    Credentials {
        /// Their file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// What was to be sent could not be read.
    #[error("what was to be sent could not be read")]
    Source {
        /// Why.
        why: String,
    },
}

fn denied(user: Option<&str>, repository: &str) -> String {
    match user {
        None => format!("gives no access to {repository} without credentials"),
        Some(user) => format!("gives {user} no access to {repository}"),
    }
}

impl Blame for RegistryError {
    fn kind(&self) -> ErrorKind {
        match self {
            RegistryError::Exists { .. } => ErrorKind::Usage,
            RegistryError::NotAnImage { .. }
            | RegistryError::BadManifest { .. }
            | RegistryError::OtherBytes { .. } => ErrorKind::Image,
            RegistryError::Credentials { .. } => ErrorKind::Host,
            RegistryError::Source { .. } => ErrorKind::Failed,
            _ => ErrorKind::Remote,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            RegistryError::Unreachable { why, .. }
            | RegistryError::NoRegistry { why, .. }
            | RegistryError::Credentials { why, .. }
            | RegistryError::Source { why } => vec![why.clone()],
            RegistryError::OtherBytes { what, .. } => vec![what.clone()],
            RegistryError::Denied { words, .. }
            | RegistryError::NotFound { words, .. }
            | RegistryError::Refused { words, .. } => words.clone(),
            RegistryError::Gone { digest, .. } => {
                vec![format!("the registry has no blob {digest}")]
            }
            _ => Vec::new(),
        }
    }
}
