//! `HEAD`: what a reader of a pipe needs before the end. A hint that must agree with the footer.
//!
//! Source: spec/container.md §5.

use crate::units::FileOffset;

use super::Identity;
use super::error::ContainerError;
use super::footer::{check_features, guest_uuid, parse_layout};
use super::layout::{
    DELTA, FORMAT_VERSION, HEAD_FIXED_LEN, Layout, MAX_MANIFEST_LEN, MAX_MAX_CHUNK_LEN,
    MAX_XML_LEN, SectionType, array, head, put, u32_at, u64_at,
};
use super::section::parse_section;

/// The part of `HEAD` that is provisional: what the saver knows before the stream begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Head<'a> {
    /// The manifest, without what is known only at the end.
    pub manifest_json: &'a [u8],
    /// The guest's domain XML.
    pub xml: &'a str,
}

/// The part of `HEAD` that has a fixed length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadFields {
    /// As in the footer.
    pub identity: Identity,
    /// Whether the image is a delta: what follows is no guest.
    pub is_delta: bool,
    /// No chunk of the payload decodes to more bytes.
    pub max_chunk_len: u32,
    /// Bytes of the provisional manifest.
    pub manifest_len: u32,
    /// Bytes of the provisional XML.
    pub xml_len: u32,
}

impl HeadFields {
    /// Parses the first 96 bytes of a file whose frame header is already checked.
    pub(super) fn parse(
        bytes: &[u8; HEAD_FIXED_LEN],
        payload_len: u64,
    ) -> Result<Self, ContainerError> {
        let section = SectionType::Head;
        let at = FileOffset(0);
        let version = u32_at(bytes, head::FORMAT_VERSION);
        if version != FORMAT_VERSION {
            return Err(ContainerError::UnsupportedVersion { version, at });
        }
        let is_delta = check_features(u64_at(bytes, head::INCOMPATIBLE), at)?;
        let layout = parse_layout(bytes[head::LAYOUT.start], section, at)?;
        if layout != Layout::Zstd {
            return Err(ContainerError::WrongField {
                section,
                field: "LAYOUT",
                at,
                found: layout.number().into(),
            });
        }
        if bytes[37..40] != [0; 3] || bytes[92..96] != [0; 4] {
            return Err(ContainerError::NotZero { section, at });
        }
        let fields = HeadFields {
            identity: Identity {
                image_uuid: uuid::Uuid::from_bytes(array(bytes, head::IMAGE_UUID)),
                guest_uuid: guest_uuid(array(bytes, head::GUEST_UUID)),
            },
            is_delta,
            max_chunk_len: u32_at(bytes, head::MAX_CHUNK_LEN),
            manifest_len: u32_at(bytes, head::MANIFEST_LEN),
            xml_len: u32_at(bytes, head::XML_LEN),
        };
        fields.check(payload_len)?;
        Ok(fields)
    }

    /// Holds the lengths against their limits and the section's length.
    fn check(&self, payload_len: u64) -> Result<(), ContainerError> {
        let (section, at) = (SectionType::Head, FileOffset(0));
        let limits = [
            (
                "MAX_CHUNK_LEN",
                self.max_chunk_len.into(),
                MAX_MAX_CHUNK_LEN.into(),
            ),
            ("MANIFEST_LEN", self.manifest_len.into(), MAX_MANIFEST_LEN),
            ("XML_LEN", self.xml_len.into(), MAX_XML_LEN),
        ];
        for (field, found, limit) in limits {
            if found > limit {
                return Err(ContainerError::WrongField {
                    section,
                    field,
                    at,
                    found,
                });
            }
        }
        let found = u64::from(self.manifest_len) + u64::from(self.xml_len) + 64;
        if found != payload_len {
            return Err(ContainerError::LengthMismatch {
                section,
                at,
                expected: payload_len,
                found,
            });
        }
        Ok(())
    }

    /// The payload's fixed part, which `head` follows.
    fn write(&self) -> [u8; HEAD_FIXED_LEN] {
        let mut bytes = [0; HEAD_FIXED_LEN];
        let guest_uuid = self.identity.guest_uuid.unwrap_or_default();
        put(
            &mut bytes,
            head::FORMAT_VERSION,
            &FORMAT_VERSION.to_le_bytes(),
        );
        put(&mut bytes, head::LAYOUT, &[Layout::Zstd.number()]);
        let incompatible = if self.is_delta { DELTA } else { 0 };
        put(&mut bytes, head::INCOMPATIBLE, &incompatible.to_le_bytes());
        put(
            &mut bytes,
            head::IMAGE_UUID,
            self.identity.image_uuid.as_bytes(),
        );
        put(&mut bytes, head::GUEST_UUID, guest_uuid.as_bytes());
        put(
            &mut bytes,
            head::MAX_CHUNK_LEN,
            &self.max_chunk_len.to_le_bytes(),
        );
        put(
            &mut bytes,
            head::MANIFEST_LEN,
            &self.manifest_len.to_le_bytes(),
        );
        put(&mut bytes, head::XML_LEN, &self.xml_len.to_le_bytes());
        bytes
    }
}

/// Parses a whole `HEAD` section, as it comes out of a pipe: 32 bytes for
/// [`FrameHeader::parse`](super::FrameHeader::parse), then as many more as that says.
///
/// # Errors
/// Whatever spec §3 and §5 refuse.
pub fn parse_head(bytes: &[u8]) -> Result<(HeadFields, Head<'_>), ContainerError> {
    let at = FileOffset(0);
    let (found, payload) = parse_section(bytes, at)?;
    if found != SectionType::Head {
        return Err(ContainerError::WrongType {
            expected: SectionType::Head,
            found,
            at,
        });
    }
    let Some(fixed) = bytes
        .first_chunk::<HEAD_FIXED_LEN>()
        .filter(|_| payload.len() >= 64)
    else {
        let found = payload.len() as u64;
        return Err(ContainerError::LengthMismatch {
            section: SectionType::Head,
            at,
            expected: 64,
            found,
        });
    };
    let fields = HeadFields::parse(fixed, payload.len() as u64)?;
    let (manifest_json, xml) = payload[64..].split_at(fields.manifest_len as usize);
    let xml = std::str::from_utf8(xml).map_err(|_| ContainerError::NotXml { at })?;
    Ok((fields, Head { manifest_json, xml }))
}

/// The payload of a `HEAD` section.
///
/// # Errors
/// [`ContainerError::TooLarge`] or [`ContainerError::WrongField`] if a part is larger than the format allows.
pub(super) fn head_payload(
    identity: Identity,
    is_delta: bool,
    max_chunk_len: u32,
    head: Head<'_>,
) -> Result<Vec<u8>, ContainerError> {
    let len = |len: usize| {
        let too_large = ContainerError::TooLarge {
            section: SectionType::Head,
            at: FileOffset(0),
            len: len as u64,
            limit: MAX_MANIFEST_LEN,
        };
        u32::try_from(len).map_err(|_| too_large)
    };
    let (manifest_len, xml_len) = (len(head.manifest_json.len())?, len(head.xml.len())?);
    let fields = HeadFields {
        identity,
        is_delta,
        max_chunk_len,
        manifest_len,
        xml_len,
    };
    let mut payload = fields.write()[32..].to_vec();
    payload.extend_from_slice(head.manifest_json);
    payload.extend_from_slice(head.xml.as_bytes());
    fields.check(payload.len() as u64)?;
    Ok(payload)
}
