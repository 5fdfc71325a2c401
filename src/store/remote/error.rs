//! What can go wrong with the other side.

use std::io;

use crate::error::{Blame, ErrorKind};

/// What can go wrong with the other side of a connection.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RemoteError {
    /// `ssh` could not be started.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: String,
        /// The system's reason.
        source: std::sync::Arc<io::Error>,
    },
    /// The connection ended, or broke.
    #[error("the connection to {peer} ended")]
    Ended {
        /// Who was at the other end.
        peer: String,
        /// What is known of it: how `ssh` ended, what the system said.
        why: Vec<String>,
    },
    /// Something else than this program answers.
    #[error("no vmstow answers at {peer}")]
    NoGreeting {
        /// Who was asked.
        peer: String,
        /// What came instead, or how it ended.
        why: Vec<String>,
    },
    /// The two programs have no version of the protocol in common.
    #[error(
        "vmstow at {peer} speaks versions {lowest} to {highest} of the protocol, this one speaks {ours}"
    )]
    NoCommonVersion {
        /// Who was asked.
        peer: String,
        /// The other side's lowest version.
        lowest: u32,
        /// Its highest.
        highest: u32,
        /// Ours.
        ours: u32,
    },
    /// The other side broke a rule of the protocol.
    #[error("{peer} broke the protocol: {rule}")]
    BrokenRule {
        /// Who did it.
        peer: String,
        /// What it did.
        rule: &'static str,
    },
    /// The other side could not do what it was asked to.
    #[error("{peer} says: {}", words.first().map_or("it failed", String::as_str))]
    Refused {
        /// Who says so.
        peer: String,
        /// Who is to blame, as the other side sees it.
        kind: ErrorKind,
        /// Its words: what failed, then the causes.
        words: Vec<String>,
    },
}

impl RemoteError {
    /// Whether the connection itself is gone, so that another one may do better.
    pub fn is_lost(&self) -> bool {
        matches!(self, RemoteError::Ended { .. })
    }
}

impl Blame for RemoteError {
    fn kind(&self) -> ErrorKind {
        match self {
            RemoteError::Refused { kind, .. } => *kind,
            RemoteError::Start { .. } => ErrorKind::Host,
            _ => ErrorKind::Remote,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            RemoteError::Ended { why, .. } | RemoteError::NoGreeting { why, .. } => why.clone(),
            RemoteError::Refused { words, .. } => words.iter().skip(1).cloned().collect(),
            _ => Vec::new(),
        }
    }
}
