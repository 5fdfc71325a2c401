//! `SIGN`: the statement a signature speaks of, and the signature as OpenSSH writes it. No cryptography here.
//!
//! Source: spec/container.md §11.

use uuid::Uuid;

use crate::digest::Digest;
use crate::units::FileOffset;

use super::error::ContainerError;
use super::layout::{MAX_SIGNATURE_LEN, SectionType, u32_at};

/// A signature of an image. Whether it is good, stale or trusted is for others to find out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// What was signed; it counts only if it equals [`Image::statement`](super::Image::statement).
    pub statement: String,
    /// The armored OpenSSH signature over it, namespace `vmstow`.
    pub armored: String,
}

/// The text a signature of this image has to sign.
pub(super) fn statement(image_uuid: Uuid, image_digest: Digest, directory: Digest) -> String {
    let uuid = image_uuid.hyphenated();
    format!(
        "vmstow statement 1\nimage-uuid {uuid}\nimage-digest sha256:{image_digest}\ndirectory sha256:{directory}\n"
    )
}

/// The payload of a `SIGN` section.
///
/// # Errors
/// [`ContainerError::TooLarge`] if it is larger than the format allows.
pub fn sign_payload(signature: &Signature) -> Result<Vec<u8>, ContainerError> {
    let (statement, armored) = (signature.statement.as_bytes(), signature.armored.as_bytes());
    let len = 8 + statement.len() as u64 + armored.len() as u64;
    let too_large = || ContainerError::TooLarge {
        section: SectionType::Signature,
        at: FileOffset(0),
        len,
        limit: MAX_SIGNATURE_LEN,
    };
    if len > MAX_SIGNATURE_LEN {
        return Err(too_large());
    }
    let mut payload = Vec::new();
    for part in [statement, armored] {
        let len = u32::try_from(part.len()).map_err(|_| too_large())?;
        payload.extend_from_slice(&len.to_le_bytes());
    }
    payload.extend_from_slice(statement);
    payload.extend_from_slice(armored);
    Ok(payload)
}

/// Parses the payload of the `SIGN` section at `at`.
pub(super) fn parse_signature(payload: &[u8], at: FileOffset) -> Result<Signature, ContainerError> {
    let section = SectionType::Signature;
    let found = payload.len() as u64;
    let Some((fixed, rest)) = payload.split_first_chunk::<8>() else {
        return Err(ContainerError::LengthMismatch {
            section,
            at,
            expected: 8,
            found,
        });
    };
    let (statement_len, armored_len) = (u32_at(fixed, 0..4), u32_at(fixed, 4..8));
    let expected = 8 + u64::from(statement_len) + u64::from(armored_len);
    if expected != found {
        return Err(ContainerError::LengthMismatch {
            section,
            at,
            expected,
            found,
        });
    }
    let (statement, armored) = rest.split_at(statement_len as usize);
    let text = |bytes: &[u8], field| {
        let not_text = ContainerError::WrongField {
            section,
            field,
            at,
            found: bytes.len() as u64,
        };
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| not_text)
    };
    Ok(Signature {
        statement: text(statement, "statement")?,
        armored: text(armored, "signature")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_is_four_lines() {
        let text = statement(
            Uuid::from_bytes([0xab; 16]),
            Digest([1; 32]),
            Digest([2; 32]),
        );
        let (ones, twos) = ("01".repeat(32), "02".repeat(32));
        let uuid = "abababab-abab-abab-abab-abababababab";
        let expected = format!(
            "vmstow statement 1\nimage-uuid {uuid}\nimage-digest sha256:{ones}\ndirectory sha256:{twos}\n"
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn a_signature_comes_back_and_wrong_lengths_do_not() {
        let signature = Signature {
            statement: "a\n".into(),
            armored: "-----BEGIN".into(),
        };
        let payload = sign_payload(&signature).unwrap();
        assert_eq!(parse_signature(&payload, FileOffset(0)).unwrap(), signature);
        for len in 0..payload.len() {
            parse_signature(&payload[..len], FileOffset(0)).unwrap_err();
        }
    }
}
