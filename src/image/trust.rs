//! Whose image it is.
//!
//! An image is code: restoring it runs a program with its author's arguments. Only the author's signature, made with a
//! key that this user trusts, over exactly what the image holds now, makes it ours.

use std::fmt;

use serde::Serialize;

use crate::bytes::ReadAt;
use crate::container::Image;
use crate::error::Result;
use crate::host::keys::{signer_of, trusted_signers};

/// Who vouches for an image. Reads behind "its image" or "it".
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Trust {
    /// Signed by this host's key or an allowed signer.
    Trusted {
        /// The key's fingerprint, `SHA256:…`.
        key: String,
        /// The key's comment.
        comment: String,
    },
    /// Signed, but by nobody this user trusts.
    Stranger {
        /// The keys' fingerprints.
        keys: Vec<String>,
    },
    /// There are signatures, of which none speaks of what the image holds now.
    Stale,
    /// There is no signature.
    Unsigned,
}

impl Trust {
    /// Checks every signature of the image.
    ///
    /// # Errors
    /// A section or a key file that cannot be read.
    pub fn of<R: ReadAt>(image: &Image<R>) -> Result<Self> {
        let statement = image.statement();
        let signatures = image.signatures()?;
        if signatures.is_empty() {
            return Ok(Trust::Unsigned);
        }
        let current = signatures
            .iter()
            .filter(|signature| signature.statement == statement);
        let signers: Vec<_> = current
            .filter_map(|signature| signer_of(&signature.statement, &signature.armored))
            .collect();
        if signers.is_empty() {
            return Ok(Trust::Stale);
        }
        let trusted = trusted_signers()?;
        Ok(match trusted.iter().find(|key| signers.contains(key)) {
            Some(key) => Trust::Trusted {
                key: key.fingerprint(),
                comment: key.comment().to_owned(),
            },
            None => Trust::Stranger {
                keys: signers.iter().map(|key| key.fingerprint()).collect(),
            },
        })
    }

    /// Whether the image may use its kept arguments and paths.
    pub fn is_trusted(&self) -> bool {
        matches!(self, Trust::Trusted { .. })
    }
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trust::Trusted { key, comment } if comment.is_empty() => {
                write!(f, "is signed by {key}")
            }
            Trust::Trusted { key, comment } => write!(f, "is signed by {comment} ({key})"),
            Trust::Stranger { keys } => write!(
                f,
                "is signed by {}, whom you do not trust",
                keys.join(" and ")
            ),
            Trust::Stale => f.write_str("has no signature that matches what it holds"),
            Trust::Unsigned => f.write_str("is not signed"),
        }
    }
}
