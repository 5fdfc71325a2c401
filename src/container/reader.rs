//! Opens an image: footer → directory → chunk table head → any section, any chunk.
//!
//! Opening reads a few kilobytes however large the image is. Chunk table pages, sections and chunks are read, and held
//! against their digests, when they are asked for.
//!
//! Source: spec/container.md.

use std::sync::Arc;

use crate::bytes::ReadAt;
use crate::digest::Digest;
use crate::units::FileOffset;

use super::Identity;
use super::chunk_table::{TableHead, root};
use super::delta::{KeptPages, ParentImage, TwinsHead, read_twins_head};
use super::directory::{DirectoryEntry, check_entries, live_digest, parse_entries};
use super::error::ContainerError;
use super::footer::{Footer, image_digest};
use super::head::HeadFields;
use super::layout::{
    CHUNK_TABLE_FIXED_LEN, DIRECTORY_ENTRY_LEN, FOOTER_LEN, HEAD_FIXED_LEN, Layout,
    MAX_DIRECTORY_ENTRIES, MAX_MANIFEST_LEN, MAX_SIGNATURE_LEN, MAX_XML_LEN, SectionType,
};
use super::manifest::{Manifest, SCHEMA};
use super::page_map::PageMap;
use super::section::{OVERHEAD, parse_section, read_at, read_header};
use super::signature::{Signature, parse_signature, statement};

/// An image whose footer, directory and chunk table head are read and agree.
#[derive(Debug)]
pub struct Image<R: ReadAt> {
    pub(super) reader: R,
    pub(super) footer: Footer,
    pub(super) directory: Vec<DirectoryEntry>,
    pub(super) table: TableHead,
    pub(super) table_offset: u64,
    pub(super) page_digests: Vec<Digest>,
    /// Of a delta.
    pub(super) twins: Option<TwinsHead>,
    /// Of a delta, when it was found.
    pub(super) parent: Option<Arc<ParentImage>>,
    pub(super) kept: KeptPages,
}

impl<R: ReadAt> Image<R> {
    /// Opens the image that `reader` holds, all of it.
    ///
    /// # Errors
    /// [`ContainerError::NoFooter`] if it does not end in a footer; else whatever the spec refuses and can be seen
    /// without reading whole sections.
    pub fn open(reader: R) -> Result<Self, ContainerError> {
        let file_len = reader.len();
        Self::open_at(reader, file_len)
    }

    /// Opens the image that ends at `end`, whatever lies behind.
    pub(super) fn open_at(reader: R, end: u64) -> Result<Self, ContainerError> {
        let footer = read_footer(&reader, end)?;
        let directory = read_directory(&reader, &footer)?;
        check_entries(&directory, &footer)?;
        check_unknown_sections(&reader, &directory)?;
        let table_entry = directory
            .iter()
            .find(|entry| entry.section == SectionType::ChunkTable);
        let table_entry = *table_entry.ok_or(ContainerError::WrongCount {
            section: SectionType::ChunkTable,
            count: 0,
        })?;
        let (table, page_digests) = read_table_head(&reader, &table_entry)?;
        check_agreement(&footer, &table, table_entry.offset)?;
        let table_offset = table_entry.offset.0;
        let twins_entry = directory
            .iter()
            .find(|entry| entry.section == SectionType::Twins);
        let twins = twins_entry
            .map(|entry| read_twins_head(&reader, entry, table.chunk_count))
            .transpose()?;
        let image = Image {
            reader,
            footer,
            directory,
            table,
            table_offset,
            page_digests,
            twins,
            parent: None,
            kept: KeptPages::default(),
        };
        image.check_head()?;
        Ok(image)
    }

    /// What the footer says.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// How the payload is laid out.
    pub fn layout(&self) -> Layout {
        self.footer.layout
    }

    /// Which save of which guest it is.
    pub fn identity(&self) -> Identity {
        self.footer.identity
    }

    /// 1 for a fresh image, one more for each edit.
    pub fn generation(&self) -> u32 {
        self.footer.generation
    }

    /// Names the saved guest; the same after edits and recompression.
    pub fn image_digest(&self) -> Digest {
        self.footer.image_digest
    }

    /// Bytes of the stream, decoded.
    pub fn stream_len(&self) -> u64 {
        self.footer.stream_len
    }

    /// Bytes up to the footer's end: the file's length, or less for a torn image.
    pub fn len(&self) -> u64 {
        self.footer.self_offset.0 + FOOTER_LEN as u64
    }

    /// Never: an image without bytes is none.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Every section before this generation's directory, live or not, in order of offset.
    pub fn sections(&self) -> &[DirectoryEntry] {
        &self.directory
    }

    /// Number of chunks.
    pub fn chunk_count(&self) -> u64 {
        self.table.chunk_count
    }

    /// No chunk decodes to more bytes.
    pub fn max_chunk_len(&self) -> u32 {
        self.table.max_chunk_len
    }

    /// What the image is read from.
    pub fn reader(&self) -> &R {
        &self.reader
    }

    /// The live sections of this type.
    pub(super) fn live(&self, section: SectionType) -> impl Iterator<Item = &DirectoryEntry> {
        self.directory
            .iter()
            .filter(move |entry| entry.is_live && entry.section == section)
    }

    /// The one live section of a type that has exactly one.
    fn the(&self, section: SectionType) -> Result<&DirectoryEntry, ContainerError> {
        self.live(section)
            .next()
            .ok_or(ContainerError::WrongCount { section, count: 0 })
    }

    /// Reads a section's payload of at most `limit` bytes and holds it against checksum and digest.
    ///
    /// # Errors
    /// Whatever spec §3 refuses; [`ContainerError::TooLarge`].
    pub fn section_payload(
        &self,
        entry: &DirectoryEntry,
        limit: u64,
    ) -> Result<Vec<u8>, ContainerError> {
        let (section, at) = (entry.section, entry.offset);
        let len = entry.length.saturating_sub(OVERHEAD);
        let too_large = || ContainerError::TooLarge {
            section,
            at,
            len,
            limit,
        };
        let total_len = usize::try_from(entry.length)
            .ok()
            .filter(|_| len <= limit)
            .ok_or_else(too_large)?;
        let mut bytes = vec![0; total_len];
        read_at(&self.reader, &mut bytes, at.0)?;
        let (found, payload) = parse_section(&bytes, at)?;
        if found != section {
            return Err(ContainerError::WrongType {
                expected: section,
                found,
                at,
            });
        }
        let payload_end = bytes.len() - 8;
        debug_assert_eq!(payload.len(), payload_end - 32);
        let (expected, found) = (entry.sha256, Digest::of(&bytes));
        if expected != found {
            return Err(ContainerError::SectionDigest {
                section,
                at,
                expected,
                found,
            });
        }
        bytes.truncate(payload_end);
        bytes.drain(..32);
        Ok(bytes)
    }

    /// The guest's domain XML.
    ///
    /// # Errors
    /// Whatever is wrong with the section; [`ContainerError::NotXml`] if it is not UTF-8 or has a DOCTYPE.
    pub fn xml(&self) -> Result<String, ContainerError> {
        let entry = self.the(SectionType::Xml)?;
        let not_xml = || ContainerError::NotXml { at: entry.offset };
        let xml =
            String::from_utf8(self.section_payload(entry, MAX_XML_LEN)?).map_err(|_| not_xml())?;
        match xml.starts_with('\u{feff}') || xml.contains("<!DOCTYPE") {
            true => Err(not_xml()),
            false => Ok(xml),
        }
    }

    /// The manifest as it stands in the file.
    ///
    /// # Errors
    /// Whatever is wrong with the section.
    pub fn manifest_json(&self) -> Result<Vec<u8>, ContainerError> {
        self.section_payload(self.the(SectionType::Manifest)?, MAX_MANIFEST_LEN)
    }

    /// The manifest.
    ///
    /// # Errors
    /// Whatever is wrong with the section or its JSON; [`ContainerError::ManifestSchema`] if it is a newer one.
    pub fn manifest(&self) -> Result<Manifest, ContainerError> {
        let at = self.the(SectionType::Manifest)?.offset;
        let manifest = Manifest::from_json(&self.manifest_json()?);
        let manifest = manifest.map_err(|source| ContainerError::Manifest { at, source })?;
        match manifest.schema {
            SCHEMA => Ok(manifest),
            schema => Err(ContainerError::ManifestSchema { at, schema }),
        }
    }

    /// All signatures, stale ones too: one counts only if its statement is [`Image::statement`].
    ///
    /// # Errors
    /// Whatever is wrong with a section.
    pub fn signatures(&self) -> Result<Vec<Signature>, ContainerError> {
        let parse = |entry: &DirectoryEntry| {
            let payload = self.section_payload(entry, MAX_SIGNATURE_LEN)?;
            parse_signature(&payload, entry.offset)
        };
        self.live(SectionType::Signature).map(parse).collect()
    }

    /// What a signature of this image has to sign.
    pub fn statement(&self) -> String {
        let identity = self.footer.identity;
        statement(
            identity.image_uuid,
            self.footer.image_digest,
            live_digest(&self.directory),
        )
    }

    /// The page map, if there is one.
    ///
    /// # Errors
    /// Whatever is wrong with the section.
    pub fn page_map(&self) -> Result<Option<PageMap>, ContainerError> {
        let Some(entry) = self.live(SectionType::PageMap).next() else {
            return Ok(None);
        };
        let payload = self.section_payload(entry, u32::MAX.into())?;
        PageMap::parse(
            &payload,
            entry.offset,
            self.chunk_count(),
            self.max_chunk_len(),
        )
        .map(Some)
    }

    /// Which guest memory a damaged chunk holds, in words: `RAMBlock "pc.ram", pages 0x6800..0x6a00`. `None` if the
    /// error is about something else, or if the page map does not tell.
    pub fn damaged_pages(&self, error: &ContainerError) -> Option<String> {
        let chunk = error.damaged_chunk()?;
        let page_map = self.page_map().ok()??;
        let pages = page_map.pages_in(chunk);
        let shown = pages.iter().map(|(block, pages)| {
            let idstr = block.idstr.escape_debug();
            format!("RAMBlock \"{idstr}\", pages {}..{}", pages.start, pages.end)
        });
        let shown: Vec<String> = shown.collect();
        (!shown.is_empty()).then(|| shown.join(", "))
    }

    /// Holds the fixed part of `HEAD` against the footer.
    fn check_head(&self) -> Result<(), ContainerError> {
        let Some(entry) = self
            .directory
            .first()
            .filter(|first| first.section == SectionType::Head)
        else {
            return Ok(());
        };
        let at = entry.offset;
        let header = read_expected(&self.reader, entry)?;
        if entry.length < HEAD_FIXED_LEN as u64 {
            let (section, found) = (SectionType::Head, entry.length);
            return Err(ContainerError::LengthMismatch {
                section,
                at,
                expected: HEAD_FIXED_LEN as u64,
                found,
            });
        }
        let mut bytes = [0; HEAD_FIXED_LEN];
        read_at(&self.reader, &mut bytes, at.0)?;
        let head = HeadFields::parse(&bytes, header)?;
        let disagrees = |field| ContainerError::Disagrees {
            section: SectionType::Head,
            field,
            at,
        };
        if head.identity.image_uuid != self.footer.identity.image_uuid {
            return Err(disagrees("IMAGE_UUID"));
        }
        if head.identity.guest_uuid != self.footer.identity.guest_uuid {
            return Err(disagrees("GUEST_UUID"));
        }
        if head.is_delta != self.footer.is_delta() {
            return Err(disagrees("INCOMPATIBLE"));
        }
        match head.max_chunk_len < self.table.max_chunk_len {
            true => Err(disagrees("MAX_CHUNK_LEN")),
            false => Ok(()),
        }
    }
}

/// Reads the frame header of the section in `entry`; gives its payload's length.
pub(super) fn read_expected<R: ReadAt + ?Sized>(
    reader: &R,
    entry: &DirectoryEntry,
) -> Result<u64, ContainerError> {
    let (expected, at) = (entry.section, entry.offset);
    let end = at.0.saturating_add(entry.length);
    let header = read_header(reader, at.0, end)?;
    if header.section != expected {
        return Err(ContainerError::WrongType {
            expected,
            found: header.section,
            at,
        });
    }
    if header.total_len() != entry.length {
        let (section, expected, found) = (expected, entry.length, header.total_len());
        return Err(ContainerError::LengthMismatch {
            section,
            at,
            expected,
            found,
        });
    }
    Ok(header.payload_len)
}

/// Reads the footer that ends at `end`.
pub(super) fn read_footer<R: ReadAt + ?Sized>(
    reader: &R,
    end: u64,
) -> Result<Footer, ContainerError> {
    let Some(at) = end.checked_sub(FOOTER_LEN as u64) else {
        return Err(ContainerError::TooShort { file_len: end });
    };
    let mut bytes = [0; FOOTER_LEN];
    read_at(reader, &mut bytes, at)?;
    Footer::parse(&bytes, FileOffset(at))
}

/// Reads the directory that lies right before the footer and holds it against the footer's digest.
fn read_directory<R: ReadAt + ?Sized>(
    reader: &R,
    footer: &Footer,
) -> Result<Vec<DirectoryEntry>, ContainerError> {
    const MAX_LEN: u64 = MAX_DIRECTORY_ENTRIES as u64 * DIRECTORY_ENTRY_LEN as u64 + 8 + OVERHEAD;
    let (section, at) = (SectionType::Directory, footer.directory_offset);
    let wrong = |field, found| ContainerError::WrongField {
        section: SectionType::Footer,
        field,
        at,
        found,
    };
    let end = at.0.checked_add(footer.directory_len);
    if end != Some(footer.self_offset.0)
        || footer
            .payload_end()
            .is_none_or(|payload_end| at.0 < payload_end)
    {
        return Err(wrong("DIRECTORY_OFFSET", at.0));
    }
    let len = usize::try_from(footer.directory_len)
        .ok()
        .filter(|_| footer.directory_len <= MAX_LEN);
    let mut bytes = vec![0; len.ok_or_else(|| wrong("DIRECTORY_LEN", footer.directory_len))?];
    read_at(reader, &mut bytes, at.0)?;
    let (found, payload) = parse_section(&bytes, at)?;
    if found != section {
        return Err(ContainerError::WrongType {
            expected: section,
            found,
            at,
        });
    }
    let (expected, found) = (footer.directory_sha256, Digest::of(&bytes));
    if expected != found {
        return Err(ContainerError::SectionDigest {
            section,
            at,
            expected,
            found,
        });
    }
    parse_entries(payload, at)
}

/// Refuses types this program does not know if they are critical; the flag is in the section only.
fn check_unknown_sections<R: ReadAt + ?Sized>(
    reader: &R,
    directory: &[DirectoryEntry],
) -> Result<(), ContainerError> {
    let is_unknown = |entry: &&DirectoryEntry| matches!(entry.section, SectionType::Other(_));
    directory
        .iter()
        .filter(is_unknown)
        .try_for_each(|entry| read_expected(reader, entry).map(drop))
}

/// Reads the chunk table's fixed part and page digests; these are held against its root.
fn read_table_head<R: ReadAt + ?Sized>(
    reader: &R,
    entry: &DirectoryEntry,
) -> Result<(TableHead, Vec<Digest>), ContainerError> {
    let (section, at) = (SectionType::ChunkTable, entry.offset);
    let payload_len = read_expected(reader, entry)?;
    if payload_len < 64 {
        return Err(ContainerError::LengthMismatch {
            section,
            at,
            expected: 64,
            found: payload_len,
        });
    }
    let mut bytes = [0; CHUNK_TABLE_FIXED_LEN];
    read_at(reader, &mut bytes, at.0)?;
    let head = TableHead::parse(&bytes, payload_len, at)?;
    let mut digests = vec![0; head.table_page_count as usize * 32];
    read_at(reader, &mut digests, at.0 + CHUNK_TABLE_FIXED_LEN as u64)?;
    let (digests, _) = digests.as_chunks::<32>();
    let digests: Vec<Digest> = digests.iter().copied().map(Digest).collect();
    match root(&digests) == head.root {
        true => Ok((head, digests)),
        false => Err(ContainerError::WrongField {
            section,
            field: "ROOT",
            at,
            found: 0,
        }),
    }
}

/// What the footer repeats of the chunk table.
fn check_agreement(
    footer: &Footer,
    table: &TableHead,
    at: FileOffset,
) -> Result<(), ContainerError> {
    let disagrees = |field| ContainerError::Disagrees {
        section: SectionType::ChunkTable,
        field,
        at,
    };
    if footer.stream_len != table.stream_len {
        return Err(disagrees("STREAM_LEN"));
    }
    let digest = image_digest(
        footer.identity.guest_uuid,
        table.chunk_count,
        table.stream_len,
        table.root,
    );
    match footer.image_digest == digest {
        true => Ok(()),
        false => Err(disagrees("IMAGE_DIGEST")),
    }
}
