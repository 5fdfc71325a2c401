//! The frame around every section: a legal zstd skippable frame with our magic, type, lengths and checksum.
//!
//! Source: spec/container.md §3.

use crate::bytes::{ReadAt, Sink};
use crate::digest::{Digest, Hasher, crc32c, crc32c_append};
use crate::units::FileOffset;

use super::directory::DirectoryEntry;
use super::error::{ContainerError, describe};
use super::layout::{
    CRITICAL, FRAME_MAGIC, SECTION_HEADER_LEN, SECTION_MAGIC, SECTION_TRAILER_LEN, SECTION_VERSION,
    SectionType, array, put, section, u16_at, u32_at, u64_at,
};

/// Largest piece of a section that is in memory while it is only checked.
const PIECE_LEN: usize = 1 << 20;

/// The first 32 bytes of a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the section holds.
    pub section: SectionType,
    /// Bytes of its payload.
    pub payload_len: u64,
}

impl FrameHeader {
    /// Bytes of the whole section.
    pub fn total_len(&self) -> u64 {
        self.payload_len + OVERHEAD
    }

    /// Parses the first bytes of the section at file offset `at`.
    ///
    /// # Errors
    /// Whatever spec §3 refuses, an unknown critical section included; the checksum is not in these bytes.
    pub fn parse(bytes: &[u8; SECTION_HEADER_LEN], at: FileOffset) -> Result<Self, ContainerError> {
        let section = section_type(bytes, at)?;
        let payload_len = u64_at(bytes, section::PAYLOAD_LEN);
        let expected = u64::from(u32_at(bytes, section::FRAME_LEN)) + 8;
        if payload_len.checked_add(OVERHEAD) != Some(expected) {
            let found = payload_len.saturating_add(OVERHEAD);
            return Err(ContainerError::LengthMismatch {
                section,
                at,
                expected,
                found,
            });
        }
        check_flags(bytes, section, at)?;
        Ok(FrameHeader {
            section,
            payload_len,
        })
    }

    /// The bytes that [`FrameHeader::parse`] reads.
    ///
    /// # Errors
    /// [`ContainerError::TooLarge`] if the section is longer than a zstd frame can be.
    pub(super) fn write(&self) -> Result<[u8; SECTION_HEADER_LEN], ContainerError> {
        let frame_len = self.payload_len.checked_add(OVERHEAD - 8);
        let frame_len = frame_len.and_then(|len| u32::try_from(len).ok());
        let frame_len = frame_len.ok_or(ContainerError::TooLarge {
            section: self.section,
            at: FileOffset(0),
            len: self.payload_len,
            limit: u64::from(u32::MAX) - (OVERHEAD - 8),
        })?;
        let flags = if self.section.is_critical() {
            CRITICAL
        } else {
            0
        };
        let mut bytes = [0; SECTION_HEADER_LEN];
        put(&mut bytes, section::FRAME_MAGIC, &FRAME_MAGIC);
        put(&mut bytes, section::FRAME_LEN, &frame_len.to_le_bytes());
        put(&mut bytes, section::SECTION_MAGIC, &SECTION_MAGIC);
        put(&mut bytes, section::TYPE, &self.section.code());
        put(&mut bytes, section::VERSION, &SECTION_VERSION.to_le_bytes());
        put(&mut bytes, section::FLAGS, &flags.to_le_bytes());
        put(
            &mut bytes,
            section::PAYLOAD_LEN,
            &self.payload_len.to_le_bytes(),
        );
        Ok(bytes)
    }
}

/// Bytes of a section that are not payload.
pub(super) const OVERHEAD: u64 = (SECTION_HEADER_LEN + SECTION_TRAILER_LEN) as u64;

/// The type of the section at `at`, once both magics are right.
pub(super) fn section_type(
    bytes: &[u8; SECTION_HEADER_LEN],
    at: FileOffset,
) -> Result<SectionType, ContainerError> {
    if bytes[section::FRAME_MAGIC] != FRAME_MAGIC || bytes[section::SECTION_MAGIC] != SECTION_MAGIC
    {
        return Err(ContainerError::WrongMagic {
            at,
            found: describe(bytes),
        });
    }
    Ok(SectionType::from_code(array(bytes, section::TYPE)))
}

/// Judges `FLAGS` and `VERSION`.
fn check_flags(
    bytes: &[u8; SECTION_HEADER_LEN],
    section: SectionType,
    at: FileOffset,
) -> Result<(), ContainerError> {
    let flags = u16_at(bytes, section::FLAGS);
    let version = u16_at(bytes, section::VERSION);
    let is_unknown = matches!(section, SectionType::Other(_));
    if is_unknown && flags & CRITICAL != 0 {
        return Err(ContainerError::UnknownCritical { section, at });
    }
    let expected = if section.is_critical() { CRITICAL } else { 0 };
    if flags != expected {
        return Err(ContainerError::WrongField {
            section,
            field: "FLAGS",
            at,
            found: flags.into(),
        });
    }
    if !is_unknown && version != SECTION_VERSION {
        return Err(ContainerError::UnsupportedSectionVersion {
            section,
            version,
            at,
        });
    }
    Ok(())
}

/// Parses a whole section that lies at file offset `at`; gives its type and payload.
///
/// # Errors
/// Whatever spec §3 refuses.
pub(super) fn parse_section(
    bytes: &[u8],
    at: FileOffset,
) -> Result<(SectionType, &[u8]), ContainerError> {
    let Some((header_bytes, rest)) = bytes.split_first_chunk::<SECTION_HEADER_LEN>() else {
        return Err(ContainerError::WrongMagic {
            at,
            found: describe(bytes),
        });
    };
    let header = FrameHeader::parse(header_bytes, at)?;
    let section = header.section;
    let found = bytes.len() as u64;
    let mismatch = ContainerError::LengthMismatch {
        section,
        at,
        expected: header.total_len(),
        found,
    };
    let Some((payload, trailer)) = rest.split_last_chunk::<SECTION_TRAILER_LEN>() else {
        return Err(mismatch);
    };
    if header.total_len() != found {
        return Err(mismatch);
    }
    let crc = crc32c(&bytes[..bytes.len() - 4]);
    check_trailer(&header, *trailer, crc, at)?;
    Ok((section, payload))
}

/// Holds the last 8 bytes of a section against its first 32 and its checksum.
fn check_trailer(
    header: &FrameHeader,
    trailer: [u8; 8],
    crc: u32,
    at: FileOffset,
) -> Result<(), ContainerError> {
    let section = header.section;
    let found = u64::from(u32_at(&trailer, 0..4));
    if found != header.total_len() {
        return Err(ContainerError::LengthMismatch {
            section,
            at,
            expected: header.total_len(),
            found,
        });
    }
    if u32_at(&trailer, 4..8) != crc {
        return Err(ContainerError::Crc { section, at });
    }
    Ok(())
}

/// Fills `buf` from file offset `at`.
pub(super) fn read_at<R: ReadAt + ?Sized>(
    reader: &R,
    buf: &mut [u8],
    at: u64,
) -> Result<(), ContainerError> {
    let read = reader.read_exact_at(buf, at);
    read.map_err(|source| ContainerError::Read {
        at: FileOffset(at),
        source,
    })
}

/// Reads the first 32 bytes of the section at `at`, which may reach up to `end`, and checks them.
pub(super) fn read_header<R: ReadAt + ?Sized>(
    reader: &R,
    at: u64,
    end: u64,
) -> Result<FrameHeader, ContainerError> {
    let room = end.saturating_sub(at);
    if room < OVERHEAD {
        let mut found = vec![0; usize::try_from(room).unwrap_or(0)];
        read_at(reader, &mut found, at)?;
        return Err(ContainerError::WrongMagic {
            at: FileOffset(at),
            found: describe(&found),
        });
    }
    let mut bytes = [0; SECTION_HEADER_LEN];
    read_at(reader, &mut bytes, at)?;
    let header = FrameHeader::parse(&bytes, FileOffset(at))?;
    if header.total_len() > room {
        return Err(ContainerError::LengthMismatch {
            section: header.section,
            at: FileOffset(at),
            expected: header.total_len(),
            found: room,
        });
    }
    Ok(header)
}

/// Reads all of the section at `at`, which may reach up to `end`, in bounded memory; gives its digest.
///
/// # Errors
/// Whatever spec §3 refuses.
pub(super) fn digest_section<R: ReadAt + ?Sized>(
    reader: &R,
    at: u64,
    end: u64,
) -> Result<(FrameHeader, Digest), ContainerError> {
    let header = read_header(reader, at, end)?;
    let total_len = header.total_len();
    let mut buf = vec![
        0;
        usize::try_from(total_len)
            .unwrap_or(PIECE_LEN)
            .min(PIECE_LEN)
    ];
    let (mut hasher, mut crc, mut done) = (Hasher::new(), 0, 0);
    let body_len = total_len - SECTION_TRAILER_LEN as u64;
    while done < body_len {
        let left = usize::try_from(body_len - done).unwrap_or(PIECE_LEN);
        let piece = &mut buf[..left.min(PIECE_LEN)];
        read_at(reader, piece, at + done)?;
        hasher.update(piece);
        crc = crc32c_append(crc, piece);
        done += piece.len() as u64;
    }
    let mut trailer = [0; SECTION_TRAILER_LEN];
    read_at(reader, &mut trailer, at + body_len)?;
    hasher.update(&trailer);
    check_trailer(
        &header,
        trailer,
        crc32c_append(crc, &trailer[..4]),
        FileOffset(at),
    )?;
    Ok((header, hasher.finish()))
}

/// Appends one section to a sink, piece by piece.
pub(super) struct SectionWriter<'a> {
    sink: &'a mut dyn Sink,
    header: FrameHeader,
    at: u64,
    written: u64,
    hasher: Hasher,
    crc: u32,
}

impl<'a> SectionWriter<'a> {
    /// Begins a section with `payload_len` bytes of payload at file offset `at`, which is where the sink ends.
    pub(super) fn begin(
        sink: &'a mut dyn Sink,
        at: u64,
        section: SectionType,
        payload_len: u64,
    ) -> Result<Self, ContainerError> {
        let header = FrameHeader {
            section,
            payload_len,
        };
        let bytes = header.write()?;
        let (hasher, crc, written) = (Hasher::new(), 0, 0);
        let mut writer = SectionWriter {
            sink,
            header,
            at,
            written,
            hasher,
            crc,
        };
        writer.write(&bytes)?;
        Ok(writer)
    }

    /// Appends the next bytes of the payload.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), ContainerError> {
        let at = FileOffset(self.at + self.written);
        self.hasher.update(bytes);
        self.crc = crc32c_append(self.crc, bytes);
        self.written += bytes.len() as u64;
        let appended = self.sink.append(bytes);
        appended.map_err(|source| ContainerError::Write { at, source })
    }

    /// Ends the section; gives its entry for the directory, live and of `generation`.
    pub(super) fn finish(mut self, generation: u32) -> Result<DirectoryEntry, ContainerError> {
        let length = self.header.total_len();
        let expected = length - SECTION_TRAILER_LEN as u64;
        let (section, at) = (self.header.section, FileOffset(self.at));
        let total_len = u32::try_from(length)
            .ok()
            .filter(|_| self.written == expected);
        let total_len = total_len.ok_or(ContainerError::LengthMismatch {
            section,
            at,
            expected,
            found: self.written,
        })?;
        self.write(&total_len.to_le_bytes())?;
        self.write(&self.crc.to_le_bytes())?;
        let sha256 = self.hasher.finish();
        Ok(DirectoryEntry {
            section,
            generation,
            offset: at,
            length,
            sha256,
            is_live: true,
        })
    }
}
