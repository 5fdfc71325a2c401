//! Finds the last whole generation of an image whose last append was cut off.
//!
//! Only a walk *forward* over whole frames and sections decides: guest memory may hold a forged footer, so nothing is
//! searched for backwards.
//!
//! Source: spec/container.md §9.

use crate::bytes::ReadAt;
use crate::units::FileOffset;

use super::error::ContainerError;
use super::layout::{FOOTER_LEN, FRAME_MAGIC, SectionType};
use super::reader::{Image, read_footer};
use super::section::{digest_section, read_at, read_header};
use super::zstd_frame;

/// What lies behind the last whole generation of a torn image.
#[derive(Debug)]
pub struct TornTail {
    /// Bytes of the file that are whole; a repair cuts it here.
    pub valid_len: u64,
    /// Bytes of the file.
    pub file_len: u64,
    /// Why the walk ended; `None` if the file is not torn at all.
    pub cause: Option<ContainerError>,
}

impl<R: ReadAt> Image<R> {
    /// Opens the last whole generation of an image that no longer ends in a footer.
    ///
    /// `payload_end` is where its payload ends; `None` lets layout `zstd` find out by itself, while for `raw` and
    /// `mapped` the caller has to parse the stream. The image is for reading only, with a warning.
    ///
    /// # Errors
    /// [`ContainerError::PayloadEndUnknown`]; [`ContainerError::NoGeneration`] if no footer is whole; else as
    /// [`Image::open`].
    pub fn open_torn(
        reader: R,
        payload_end: Option<u64>,
    ) -> Result<(Self, TornTail), ContainerError> {
        let file_len = reader.len();
        let payload_end = match payload_end {
            Some(payload_end) => payload_end,
            None => find_payload_end(&reader, file_len)?,
        };
        let (valid_len, cause) = last_generation(&reader, payload_end, file_len)?;
        let image = Self::open_at(reader, valid_len)?;
        if image.footer.payload_end() != Some(payload_end) {
            let (section, at) = (SectionType::Footer, image.footer.self_offset);
            let found = image.footer.payload_len;
            return Err(ContainerError::WrongField {
                section,
                field: "PAYLOAD_LEN",
                at,
                found,
            });
        }
        Ok((
            image,
            TornTail {
                valid_len,
                file_len,
                cause,
            },
        ))
    }

    /// Whether the file goes on behind this generation.
    pub(super) fn is_torn(&self) -> bool {
        self.len() != self.reader.len()
    }
}

/// Walks from `HEAD` over the zstd frames of the chunks, or the sections in which those of a delta lie, to the first
/// section behind them.
fn find_payload_end<R: ReadAt>(reader: &R, file_len: u64) -> Result<u64, ContainerError> {
    let at = FileOffset(0);
    let head = match read_header(reader, 0, file_len) {
        Ok(head) if head.section == SectionType::Head => head,
        Ok(_) | Err(ContainerError::WrongMagic { .. }) => {
            return Err(ContainerError::PayloadEndUnknown { at });
        }
        Err(error) => return Err(error),
    };
    let mut position = head.total_len();
    loop {
        let mut magic = [0; 4];
        if file_len.saturating_sub(position) < 4 {
            return Err(ContainerError::NoGeneration {
                at: FileOffset(position),
            });
        }
        read_at(reader, &mut magic, position)?;
        if magic == FRAME_MAGIC {
            // The chunks of a delta lie in sections.
            match read_header(reader, position, file_len) {
                Ok(header) if header.section == SectionType::Data => {
                    position += header.total_len();
                    continue;
                }
                Err(error @ ContainerError::Read { .. }) => return Err(error),
                _ => return Ok(position),
            }
        }
        let frame = zstd_frame::measure(reader, position, file_len);
        let frame = frame.map_err(|source| ContainerError::Read {
            at: FileOffset(position),
            source,
        })?;
        let frame = frame.ok_or(ContainerError::NoGeneration {
            at: FileOffset(position),
        })?;
        position += frame.len;
    }
}

/// Walks over whole sections; gives where the last footer ends, and why the walk did.
fn last_generation<R: ReadAt>(
    reader: &R,
    payload_end: u64,
    file_len: u64,
) -> Result<(u64, Option<ContainerError>), ContainerError> {
    let (mut position, mut valid_len) = (payload_end, None);
    let cause = loop {
        if position >= file_len {
            break None;
        }
        match whole_section(reader, position, file_len) {
            Ok((end, is_footer)) => {
                position = end;
                valid_len = if is_footer { Some(end) } else { valid_len };
            }
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => break Some(error),
        }
    };
    match (valid_len, cause) {
        (Some(valid_len), None) if valid_len < file_len => {
            let (at, found) = (
                FileOffset(valid_len),
                "sections without a footer".to_owned(),
            );
            Ok((
                valid_len,
                Some(ContainerError::NoFooter {
                    file_len,
                    at,
                    found,
                }),
            ))
        }
        (Some(valid_len), cause) => Ok((valid_len, cause)),
        (None, _) => Err(ContainerError::NoGeneration {
            at: FileOffset(payload_end),
        }),
    }
}

/// Whether an earlier generation must not be used instead: the reader failed, or the footer is whole but too new.
fn is_final(error: &ContainerError) -> bool {
    use ContainerError as E;
    matches!(
        error,
        E::Read { .. } | E::UnsupportedVersion { .. } | E::UnknownIncompatible { .. }
    )
}

/// Where the section at `position` ends, and whether it is a footer.
fn whole_section<R: ReadAt>(
    reader: &R,
    position: u64,
    file_len: u64,
) -> Result<(u64, bool), ContainerError> {
    let (header, _) = digest_section(reader, position, file_len)?;
    let (section, at) = (header.section, FileOffset(position));
    let (expected, found) = (FOOTER_LEN as u64, header.total_len());
    let end = position + found;
    if section != SectionType::Footer {
        return Ok((end, false));
    }
    if found != expected {
        return Err(ContainerError::LengthMismatch {
            section,
            at,
            expected,
            found,
        });
    }
    read_footer(reader, end)?;
    Ok((end, true))
}
