//! `FOOT`: the last 512 bytes of an image, from which everything else is found.
//!
//! Source: spec/container.md §8.

use uuid::Uuid;

use crate::digest::{Digest, Hasher};
use crate::units::FileOffset;

use super::Identity;
use super::delta::ParentId;
use super::error::{ContainerError, describe};
use super::layout::{
    DELTA, FOOTER_LEN, FORMAT_VERSION, HASH_SHA256, IMAGE_DIGEST_PREFIX, Layout,
    SECTION_HEADER_LEN, SectionType, array, footer, put, u32_at, u64_at,
};
use super::section::{parse_section, section_type};

/// What a footer says; its own frame, version and place are already checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// How the payload is laid out.
    pub layout: Layout,
    /// Which save of which guest.
    pub identity: Identity,
    /// Whose chunks it needs, if it is a delta.
    pub parent: Option<ParentId>,
    /// Unknown bits: read, never edit.
    pub readonly_compatible: u64,
    /// Unknown bits are ignored.
    pub compatible: u64,
    /// 1 for a fresh image, one more for each edit.
    pub generation: u32,
    /// Where the payload begins: the length of `HEAD`, or 0.
    pub payload_offset: FileOffset,
    /// Bytes of payload in the file.
    pub payload_len: u64,
    /// Bytes of the stream, decoded.
    pub stream_len: u64,
    /// Where this generation's directory lies.
    pub directory_offset: FileOffset,
    /// Bytes of the directory section.
    pub directory_len: u64,
    /// Of all bytes of the directory section.
    pub directory_sha256: Digest,
    /// Names the saved guest: the same in every generation and after recompression.
    pub image_digest: Digest,
    /// Where this footer lies.
    pub self_offset: FileOffset,
    /// Where the footer of the generation before lies; 0 in generation 1.
    pub previous_footer_offset: FileOffset,
}

impl Footer {
    /// Parses the footer found at file offset `at`, the last bytes of a file of `at + 512` bytes.
    ///
    /// # Errors
    /// [`ContainerError::NoFooter`] if these bytes are no footer at all; else whatever spec §3 and §8 refuse.
    pub(super) fn parse(bytes: &[u8; FOOTER_LEN], at: FileOffset) -> Result<Self, ContainerError> {
        let section = SectionType::Footer;
        check_presence(bytes, at)?;
        let version = u32_at(bytes, footer::FORMAT_VERSION);
        if version != FORMAT_VERSION {
            return Err(ContainerError::UnsupportedVersion { version, at });
        }
        parse_section(bytes, at)?;
        check_features(u64_at(bytes, footer::INCOMPATIBLE), at)?;
        check_zero(bytes, at)?;
        let footer = Self::fields(bytes, at)?;
        if footer.self_offset != at {
            let found = footer.self_offset.0;
            return Err(ContainerError::WrongField {
                section,
                field: "SELF_OFFSET",
                at,
                found,
            });
        }
        Ok(footer)
    }

    fn fields(bytes: &[u8; FOOTER_LEN], at: FileOffset) -> Result<Self, ContainerError> {
        let offset = |position| FileOffset(u64_at(bytes, position));
        Ok(Footer {
            layout: parse_layout(bytes[footer::LAYOUT.start], SectionType::Footer, at)?,
            identity: Identity {
                image_uuid: Uuid::from_bytes(array(bytes, footer::IMAGE_UUID)),
                guest_uuid: guest_uuid(array(bytes, footer::GUEST_UUID)),
            },
            parent: parent(bytes, at)?,
            readonly_compatible: u64_at(bytes, footer::READONLY_COMPATIBLE),
            compatible: u64_at(bytes, footer::COMPATIBLE),
            generation: u32_at(bytes, footer::GENERATION),
            payload_offset: offset(footer::PAYLOAD_OFFSET),
            payload_len: u64_at(bytes, footer::PAYLOAD_LEN),
            stream_len: u64_at(bytes, footer::STREAM_LEN),
            directory_offset: offset(footer::DIRECTORY_OFFSET),
            directory_len: u64_at(bytes, footer::DIRECTORY_LEN),
            directory_sha256: Digest(array(bytes, footer::DIRECTORY_SHA256)),
            image_digest: Digest(array(bytes, footer::IMAGE_DIGEST)),
            self_offset: offset(footer::SELF_OFFSET),
            previous_footer_offset: offset(footer::PREVIOUS_FOOTER_OFFSET),
        })
    }

    /// The payload of a `FOOT` section.
    pub(super) fn payload(&self) -> Vec<u8> {
        let mut bytes = [0; FOOTER_LEN];
        let guest_uuid = self.identity.guest_uuid.unwrap_or_default();
        put(
            &mut bytes,
            footer::FORMAT_VERSION,
            &FORMAT_VERSION.to_le_bytes(),
        );
        put(&mut bytes, footer::LAYOUT, &[self.layout.number()]);
        put(
            &mut bytes,
            footer::READONLY_COMPATIBLE,
            &self.readonly_compatible.to_le_bytes(),
        );
        put(
            &mut bytes,
            footer::COMPATIBLE,
            &self.compatible.to_le_bytes(),
        );
        put(
            &mut bytes,
            footer::IMAGE_UUID,
            self.identity.image_uuid.as_bytes(),
        );
        put(&mut bytes, footer::GUEST_UUID, guest_uuid.as_bytes());
        if let Some(parent) = self.parent {
            let ParentId {
                image_uuid,
                image_digest,
            } = parent;
            put(&mut bytes, footer::INCOMPATIBLE, &DELTA.to_le_bytes());
            put(&mut bytes, footer::PARENT_UUID, image_uuid.as_bytes());
            put(&mut bytes, footer::PARENT_DIGEST, &image_digest.0);
        }
        put(
            &mut bytes,
            footer::GENERATION,
            &self.generation.to_le_bytes(),
        );
        put(
            &mut bytes,
            footer::PAYLOAD_OFFSET,
            &self.payload_offset.0.to_le_bytes(),
        );
        put(
            &mut bytes,
            footer::PAYLOAD_LEN,
            &self.payload_len.to_le_bytes(),
        );
        put(
            &mut bytes,
            footer::STREAM_LEN,
            &self.stream_len.to_le_bytes(),
        );
        put(
            &mut bytes,
            footer::DIRECTORY_OFFSET,
            &self.directory_offset.0.to_le_bytes(),
        );
        put(
            &mut bytes,
            footer::DIRECTORY_LEN,
            &self.directory_len.to_le_bytes(),
        );
        put(
            &mut bytes,
            footer::DIRECTORY_SHA256,
            &self.directory_sha256.0,
        );
        put(&mut bytes, footer::IMAGE_DIGEST, &self.image_digest.0);
        put(
            &mut bytes,
            footer::SELF_OFFSET,
            &self.self_offset.0.to_le_bytes(),
        );
        put(
            &mut bytes,
            footer::PREVIOUS_FOOTER_OFFSET,
            &self.previous_footer_offset.0.to_le_bytes(),
        );
        bytes[SECTION_HEADER_LEN..FOOTER_LEN - 8].to_vec()
    }

    /// Whether it is of use only with its parent.
    pub fn is_delta(&self) -> bool {
        self.parent.is_some()
    }

    /// Where the payload ends and the sections begin; `None` if that is no file offset.
    pub(super) fn payload_end(&self) -> Option<u64> {
        self.payload_offset.0.checked_add(self.payload_len)
    }
}

/// Tells whether these bytes mean to be a footer.
fn check_presence(bytes: &[u8; FOOTER_LEN], at: FileOffset) -> Result<(), ContainerError> {
    let header = array(bytes, 0..SECTION_HEADER_LEN);
    match section_type(&header, at) {
        Ok(SectionType::Footer) => Ok(()),
        _ => Err(ContainerError::NoFooter {
            file_len: at.0 + 512,
            at,
            found: describe(bytes),
        }),
    }
}

/// The fields that this version leaves zero; the parent's too, unless it is a delta.
fn check_zero(bytes: &[u8; FOOTER_LEN], at: FileOffset) -> Result<(), ContainerError> {
    let parent = match u64_at(bytes, footer::INCOMPATIBLE) & DELTA {
        0 => footer::PARENT_UUID.start..footer::PARENT_DIGEST.end,
        _ => 0..0,
    };
    for position in [37..40, parent, 148..152, 272..504] {
        if bytes[position].iter().any(|byte| *byte != 0) {
            return Err(ContainerError::NotZero {
                section: SectionType::Footer,
                at,
            });
        }
    }
    Ok(())
}

/// Refuses every incompatible bit but `DELTA`; whether that is set.
pub(super) fn check_features(bits: u64, at: FileOffset) -> Result<bool, ContainerError> {
    match bits & !DELTA {
        0 => Ok(bits & DELTA != 0),
        bits => Err(ContainerError::UnknownIncompatible { bits, at }),
    }
}

/// The parent of a delta, which has layout `zstd` and is not its own parent.
fn parent(bytes: &[u8; FOOTER_LEN], at: FileOffset) -> Result<Option<ParentId>, ContainerError> {
    if u64_at(bytes, footer::INCOMPATIBLE) & DELTA == 0 {
        return Ok(None);
    }
    let wrong = |field, found| ContainerError::WrongField {
        section: SectionType::Footer,
        field,
        at,
        found,
    };
    let layout = bytes[footer::LAYOUT.start];
    if layout != Layout::Zstd.number() {
        return Err(wrong("LAYOUT", layout.into()));
    }
    let image_uuid = array(bytes, footer::PARENT_UUID);
    if image_uuid == [0; 16] || image_uuid == array(bytes, footer::IMAGE_UUID) {
        return Err(wrong("PARENT_UUID", u64_at(&image_uuid, 0..8)));
    }
    Ok(Some(ParentId {
        image_uuid: Uuid::from_bytes(image_uuid),
        image_digest: Digest(array(bytes, footer::PARENT_DIGEST)),
    }))
}

/// The layout of this number, in `section`.
pub(super) fn parse_layout(
    number: u8,
    section: SectionType,
    at: FileOffset,
) -> Result<Layout, ContainerError> {
    let unknown = ContainerError::WrongField {
        section,
        field: "LAYOUT",
        at,
        found: number.into(),
    };
    Layout::from_number(number).ok_or(unknown)
}

/// Zeros are no UUID.
pub(super) fn guest_uuid(bytes: [u8; 16]) -> Option<Uuid> {
    Some(Uuid::from_bytes(bytes)).filter(|uuid| !uuid.is_nil())
}

/// Names the saved guest: the same in every generation and after recompression.
///
/// Source: spec/container.md §8, "Image digest".
pub(super) fn image_digest(
    guest_uuid: Option<Uuid>,
    chunk_count: u64,
    stream_len: u64,
    root: Digest,
) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(IMAGE_DIGEST_PREFIX);
    hasher.update(&HASH_SHA256.to_le_bytes());
    hasher.update(guest_uuid.unwrap_or_default().as_bytes());
    hasher.update(&chunk_count.to_le_bytes());
    hasher.update(&stream_len.to_le_bytes());
    hasher.update(&root.0);
    hasher.finish()
}
