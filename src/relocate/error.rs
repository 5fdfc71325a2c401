//! What can go wrong with a move.

use std::io;
use std::path::PathBuf;

use uuid::Uuid;

use crate::error::{Blame, Error, ErrorKind};
use crate::save::GuestLeft;

/// What can go wrong with a move, on either side.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// Nothing moved, and what was done here was undone.
    #[error("{guest} was not moved; it {left}")]
    NotMoved {
        /// Its name.
        guest: String,
        /// How it was left.
        left: GuestLeft,
        /// Why it was not moved.
        why: Error,
    },
    /// GO was said, and the other side cannot be asked what came of it.
    #[error("whether {guest} runs on {host} is not known; it stays stopped here")]
    Unknown {
        /// Its name.
        guest: String,
        /// Where it was to go.
        host: String,
        /// Why not.
        why: Error,
    },
    /// The other side let it run, and its QEMU is gone there.
    #[error("{guest} was let run on {host} and is not there any more; it stays stopped here")]
    Lost {
        /// Its name.
        guest: String,
        /// Where it went.
        host: String,
    },
    /// It was not let run there, and its QEMU here has ended.
    #[error("{guest} does not run on {host}, and its QEMU here has ended")]
    Nowhere {
        /// Its name.
        guest: String,
        /// Where it was to go.
        host: String,
    },
    /// The other side loaded it, and then could not let it run.
    #[error("{host} could not let it run")]
    NotLetRun {
        /// Where it was to go.
        host: String,
    },
    /// It runs there and waits for memory that only this host has.
    #[error("{guest} runs on {host} and does not get its memory from here any more")]
    Unserved {
        /// Its name.
        guest: String,
        /// Where it runs.
        host: String,
        /// Why not.
        why: Error,
    },
    /// An earlier move to somewhere else is not settled.
    #[error("an earlier move of {guest} to {host} is not settled")]
    Unsettled {
        /// Its name.
        guest: String,
        /// Where that went.
        host: String,
    },
    /// There is no earlier move.
    #[error("no move of {guest} was cut off")]
    NothingToSettle {
        /// Its name.
        guest: String,
    },
    /// It runs there, and its QEMU here did not end.
    #[error("{guest} runs on {host}, but its QEMU here did not end")]
    NotEnded {
        /// Its name.
        guest: String,
        /// Where it runs.
        host: String,
        /// Why not.
        why: Error,
    },
    /// Somebody let it run here while it was not known whether it runs there; it does.
    #[error("{guest} runs on {host}, and somebody has let it run here as well")]
    RunsTwice {
        /// Its name.
        guest: String,
        /// Where it runs too.
        host: String,
    },
    /// It was put back by the other side's word, and cannot run here.
    #[error("{guest} does not run on {host}, and could not be let run on here")]
    NotPutBack {
        /// Its name.
        guest: String,
        /// Where it was to go.
        host: String,
        /// Why not.
        why: Error,
    },
    /// A record of a move could not be read or written.
    #[error("cannot {act} {}", path.display())]
    Record {
        /// What was tried.
        act: &'static str,
        /// The record.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The image on its way there cannot be kept here.
    #[error("cannot {act} the image of the guest that moves")]
    Spool {
        /// What was tried.
        act: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// What a client orders is not clear.
    #[error("the order is not clear: {what}")]
    Order {
        /// What is not.
        what: String,
    },
    /// The move was taken back, or is none.
    #[error("the move {id} was taken back")]
    Refused {
        /// The move.
        id: Uuid,
    },
    /// A move of that name is under way already.
    #[error("the move {id} is under way already")]
    Twice {
        /// The move.
        id: Uuid,
    },
}

impl Blame for MoveError {
    fn kind(&self) -> ErrorKind {
        match self {
            MoveError::NotMoved { why, .. } => why.kind(),
            MoveError::Unknown { .. }
            | MoveError::Lost { .. }
            | MoveError::Nowhere { .. }
            | MoveError::Unserved { .. }
            | MoveError::NotLetRun { .. }
            | MoveError::Refused { .. } => ErrorKind::Remote,
            MoveError::Unsettled { .. }
            | MoveError::NothingToSettle { .. }
            | MoveError::Order { .. } => ErrorKind::Usage,
            MoveError::NotEnded { .. }
            | MoveError::RunsTwice { .. }
            | MoveError::NotPutBack { .. } => ErrorKind::Host,
            MoveError::Record { .. } | MoveError::Spool { .. } | MoveError::Twice { .. } => {
                ErrorKind::Failed
            }
        }
    }

    fn at(&self) -> Option<String> {
        match self {
            MoveError::NotMoved { why, .. } => why.at(),
            _ => None,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            MoveError::NotMoved { why, .. }
            | MoveError::Unknown { why, .. }
            | MoveError::Unserved { why, .. }
            | MoveError::NotEnded { why, .. }
            | MoveError::NotPutBack { why, .. } => {
                let causes = why.causes().map(ToString::to_string);
                std::iter::once(why.to_string())
                    .chain(why.facts())
                    .chain(causes)
                    .collect()
            }
            _ => Vec::new(),
        }
    }
}

/// What became of a record.
pub(super) fn failed(
    act: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> MoveError {
    let path = path.into();
    move |source| MoveError::Record { act, path, source }
}
