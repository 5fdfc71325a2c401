//! What cannot be asked of a guest's memory.

use crate::error::{Blame, ErrorKind};

/// What cannot be asked of a guest's memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// There is no RAMBlock of that name.
    #[error("the guest has no RAMBlock {idstr:?}")]
    NoBlock {
        /// The name.
        idstr: String,
        /// All that there are.
        known: Vec<String>,
    },
    /// There is no processor of that number.
    #[error("the guest has no processor {cpu}")]
    NoCpu {
        /// The number.
        cpu: u32,
        /// All that there are.
        known: Vec<u32>,
    },
    /// The device state does not tell the registers, so that nobody knows where page tables are.
    #[error(
        "the image does not tell the registers of the guest's processors, so that its page tables are not known"
    )]
    NoRegisters,
    /// A pattern that is no regular expression.
    #[error("the pattern cannot be understood")]
    Pattern(#[source] Box<regex::Error>),
    /// A pattern that is no bytes in hexadecimal.
    #[error("{text:?} is not bytes in hexadecimal, such as `de ad ?? ef`")]
    NotHex {
        /// The text.
        text: String,
    },
    /// A pattern that would match everywhere.
    #[error("the pattern matches where there is nothing, so it would match everywhere")]
    MatchesNothing,
}

impl Blame for MemoryError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Usage
    }

    fn facts(&self) -> Vec<String> {
        match self {
            MemoryError::NoBlock { known, .. } => vec![format!("there are {}", known.join(", "))],
            MemoryError::NoCpu { known, .. } => {
                let known: Vec<String> = known.iter().map(u32::to_string).collect();
                vec![format!("there are {}", known.join(", "))]
            }
            _ => Vec::new(),
        }
    }
}
