//! `CHNK`: where each chunk lies, its checksum as stored and its digest as decoded.
//!
//! Source: spec/container.md §6.

use crate::digest::{Digest, Hasher, crc32c};
use crate::units::{ChunkIndex, FileOffset, StreamOffset};

use super::delta::TEXT_FRAME_LEN;
use super::error::ContainerError;
use super::footer::Footer;
use super::layout::{
    CHUNK_ENTRY_LEN, CHUNK_TABLE_FIXED_LEN, ENTRIES_PER_PAGE, HASH_SHA256, Layout,
    MAX_MAX_CHUNK_LEN, NO_TWIN, SECTION_HEADER_LEN, SECTION_TRAILER_LEN, SectionType, array,
    chunk_entry, chunk_table, put, u32_at, u64_at,
};
use super::zstd_frame;

/// How a chunk's stored bytes give its raw bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    /// One zstd frame.
    Zstd,
    /// The raw bytes themselves.
    Plain,
    /// One zstd frame that follows the raw bytes of this chunk of the parent.
    Patched(ChunkIndex),
    /// Nothing is stored: it is this chunk of the parent.
    Same(ChunkIndex),
}

impl ChunkKind {
    /// The only kind that belongs to a full image of `layout`.
    pub fn of(layout: Layout) -> Self {
        match layout {
            Layout::Zstd => ChunkKind::Zstd,
            Layout::Raw | Layout::Mapped => ChunkKind::Plain,
        }
    }

    fn number(self) -> u8 {
        match self {
            ChunkKind::Zstd => 1,
            ChunkKind::Plain => 2,
            ChunkKind::Patched(_) => 3,
            ChunkKind::Same(_) => 4,
        }
    }

    /// The kind of this number in a delta, of a chunk whose twin has the number `twin`; `None` if they do not fit.
    fn in_delta(number: u8, twin: u32) -> Option<Self> {
        let index = ChunkIndex(twin.into());
        match (number, twin) {
            (1, NO_TWIN) => Some(ChunkKind::Zstd),
            (_, NO_TWIN) => None,
            (3, _) => Some(ChunkKind::Patched(index)),
            (4, _) => Some(ChunkKind::Same(index)),
            _ => None,
        }
    }

    /// Whether it may be in a full image of `layout`, or in a delta.
    pub(super) fn belongs_into(self, layout: Layout, is_delta: bool) -> bool {
        match self {
            ChunkKind::Patched(_) | ChunkKind::Same(_) => is_delta,
            ChunkKind::Zstd | ChunkKind::Plain => self == ChunkKind::of(layout),
        }
    }

    /// Whether so many stored bytes can be a chunk of `raw_len` bytes.
    pub(super) fn allows(self, stored_len: u32, raw_len: u32) -> bool {
        match self {
            ChunkKind::Plain => stored_len == raw_len,
            ChunkKind::Zstd | ChunkKind::Patched(_) => {
                (1..=max_stored_len(raw_len.into())).contains(&stored_len.into())
            }
            ChunkKind::Same(_) => stored_len == 0,
        }
    }
}

/// One chunk of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEntry {
    /// Its number in stream order.
    pub index: ChunkIndex,
    /// Where its stored bytes begin in the file.
    pub stored_offset: FileOffset,
    /// Where its raw bytes begin in the stream.
    pub stream_offset: StreamOffset,
    /// Bytes in the file, at least 1 unless it is all the parent's.
    pub stored_len: u32,
    /// Bytes in the stream, at least 1.
    pub raw_len: u32,
    /// How the one gives the other.
    pub kind: ChunkKind,
    /// CRC-32C of the stored bytes.
    pub stored_crc: u32,
    /// SHA-256 of the raw bytes.
    pub raw_digest: Digest,
}

impl ChunkEntry {
    /// Holds stored bytes against the entry: length, checksum, and for zstd that they are one frame of `raw_len` bytes.
    ///
    /// # Errors
    /// [`ContainerError::ChunkCrc`] or [`ContainerError::NotAFrame`].
    pub fn check_stored(&self, stored: &[u8]) -> Result<(), ContainerError> {
        let (chunk, at, expected) = (self.index, self.stored_offset, self.stored_crc);
        let found = crc32c(stored);
        if found != expected || stored.len() as u64 != u64::from(self.stored_len) {
            return Err(ContainerError::ChunkCrc {
                chunk,
                at,
                expected,
                found,
            });
        }
        if matches!(self.kind, ChunkKind::Zstd | ChunkKind::Patched(_)) {
            let frame = zstd_frame::measure(stored, 0, u64::from(self.stored_len))
                .ok()
                .flatten();
            let is_whole = frame.is_some_and(|frame| {
                frame.len == u64::from(self.stored_len)
                    && frame.content_len == Some(u64::from(self.raw_len))
                    && !frame.needs_dictionary
            });
            if !is_whole {
                return Err(ContainerError::NotAFrame { chunk, at });
            }
        }
        Ok(())
    }

    /// Holds decoded bytes against the entry: length and SHA-256.
    ///
    /// # Errors
    /// [`ContainerError::RawLength`] or [`ContainerError::HashMismatch`].
    pub fn check_raw(&self, raw: &[u8]) -> Result<(), ContainerError> {
        let (chunk, at, stream_offset) = (self.index, self.stored_offset, self.stream_offset);
        let (expected, found) = (u64::from(self.raw_len), raw.len() as u64);
        if expected != found {
            return Err(ContainerError::RawLength {
                chunk,
                at,
                stream_offset,
                expected,
                found,
            });
        }
        self.check_digest(Digest::of(raw))
    }

    /// Holds the digest of decoded bytes, whose length is right, against the entry.
    ///
    /// # Errors
    /// [`ContainerError::HashMismatch`].
    pub fn check_digest(&self, found: Digest) -> Result<(), ContainerError> {
        let expected = self.raw_digest;
        if expected == found {
            return Ok(());
        }
        Err(ContainerError::HashMismatch {
            chunk: self.index,
            at: self.stored_offset,
            stream_offset: self.stream_offset,
            expected,
            found,
        })
    }

    /// Where its stored bytes end. Entries that were parsed do not overflow here.
    pub(super) fn stored_end(&self) -> u64 {
        self.stored_offset.0.saturating_add(self.stored_len.into())
    }

    /// Where its raw bytes end.
    pub fn stream_end(&self) -> u64 {
        self.stream_offset.0.saturating_add(self.raw_len.into())
    }

    /// The bytes in the table.
    pub(super) fn write(&self) -> [u8; CHUNK_ENTRY_LEN] {
        let mut bytes = [0; CHUNK_ENTRY_LEN];
        put(
            &mut bytes,
            chunk_entry::STORED_OFFSET,
            &self.stored_offset.0.to_le_bytes(),
        );
        put(
            &mut bytes,
            chunk_entry::STREAM_OFFSET,
            &self.stream_offset.0.to_le_bytes(),
        );
        put(
            &mut bytes,
            chunk_entry::STORED_LEN,
            &self.stored_len.to_le_bytes(),
        );
        put(
            &mut bytes,
            chunk_entry::RAW_LEN,
            &self.raw_len.to_le_bytes(),
        );
        put(&mut bytes, chunk_entry::KIND, &[self.kind.number()]);
        put(
            &mut bytes,
            chunk_entry::STORED_CRC,
            &self.stored_crc.to_le_bytes(),
        );
        put(&mut bytes, chunk_entry::RAW_SHA256, &self.raw_digest.0);
        bytes
    }
}

/// The fixed part of `CHNK`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableHead {
    pub(super) chunk_count: u64,
    pub(super) table_page_count: u32,
    pub(super) max_chunk_len: u32,
    pub(super) stream_len: u64,
    pub(super) root: Digest,
}

impl TableHead {
    /// Parses the first 96 bytes of the table at `at`, whose frame header says `payload_len`.
    pub(super) fn parse(
        bytes: &[u8; CHUNK_TABLE_FIXED_LEN],
        payload_len: u64,
        at: FileOffset,
    ) -> Result<Self, ContainerError> {
        let section = SectionType::ChunkTable;
        let wrong = |field, found| ContainerError::WrongField {
            section,
            field,
            at,
            found,
        };
        let head = TableHead {
            chunk_count: u64_at(bytes, chunk_table::CHUNK_COUNT),
            table_page_count: u32_at(bytes, chunk_table::TABLE_PAGE_COUNT),
            max_chunk_len: u32_at(bytes, chunk_table::MAX_CHUNK_LEN),
            stream_len: u64_at(bytes, chunk_table::STREAM_LEN),
            root: Digest(array(bytes, chunk_table::ROOT)),
        };
        let algorithm = u32_at(bytes, chunk_table::HASH_ALGORITHM);
        let per_page = u32_at(bytes, chunk_table::ENTRIES_PER_PAGE);
        if algorithm != HASH_SHA256 {
            return Err(wrong("HASH_ALGORITHM", algorithm.into()));
        }
        if per_page != ENTRIES_PER_PAGE {
            return Err(wrong("ENTRIES_PER_PAGE", per_page.into()));
        }
        if head.max_chunk_len > MAX_MAX_CHUNK_LEN {
            return Err(wrong("MAX_CHUNK_LEN", head.max_chunk_len.into()));
        }
        if page_count(head.chunk_count) != u64::from(head.table_page_count) {
            return Err(wrong("TABLE_PAGE_COUNT", head.table_page_count.into()));
        }
        if head.chunk_count == 0 || head.payload_len() != Some(payload_len) {
            return Err(wrong("CHUNK_COUNT", head.chunk_count));
        }
        Ok(head)
    }

    /// The fixed part of the payload.
    pub(super) fn write(&self) -> Vec<u8> {
        let mut bytes = [0; CHUNK_TABLE_FIXED_LEN];
        put(
            &mut bytes,
            chunk_table::HASH_ALGORITHM,
            &HASH_SHA256.to_le_bytes(),
        );
        put(
            &mut bytes,
            chunk_table::ENTRIES_PER_PAGE,
            &ENTRIES_PER_PAGE.to_le_bytes(),
        );
        put(
            &mut bytes,
            chunk_table::CHUNK_COUNT,
            &self.chunk_count.to_le_bytes(),
        );
        put(
            &mut bytes,
            chunk_table::TABLE_PAGE_COUNT,
            &self.table_page_count.to_le_bytes(),
        );
        put(
            &mut bytes,
            chunk_table::MAX_CHUNK_LEN,
            &self.max_chunk_len.to_le_bytes(),
        );
        put(
            &mut bytes,
            chunk_table::STREAM_LEN,
            &self.stream_len.to_le_bytes(),
        );
        put(&mut bytes, chunk_table::ROOT, &self.root.0);
        bytes[32..].to_vec()
    }

    /// Bytes of the section's payload; `None` if that is no length.
    pub(super) fn payload_len(&self) -> Option<u64> {
        let entries = self.chunk_count.checked_mul(CHUNK_ENTRY_LEN as u64)?;
        entries.checked_add(u64::from(self.table_page_count) * 32 + 64)
    }

    /// Where entry `index` begins, counted from the section's start.
    pub(super) fn entry_position(&self, index: u64) -> u64 {
        CHUNK_TABLE_FIXED_LEN as u64
            + u64::from(self.table_page_count) * 32
            + index * CHUNK_ENTRY_LEN as u64
    }

    /// Number of the first chunk of table page `page`, and of the first one behind it.
    pub(super) fn page_range(&self, page: u32) -> std::ops::Range<u64> {
        let start = u64::from(page) * u64::from(ENTRIES_PER_PAGE);
        start..self.chunk_count.min(start + u64::from(ENTRIES_PER_PAGE))
    }
}

/// Table pages that `chunk_count` entries fill.
pub(super) fn page_count(chunk_count: u64) -> u64 {
    chunk_count.div_ceil(ENTRIES_PER_PAGE.into())
}

/// Grows the digests of table pages, entry by entry.
#[derive(Debug, Default)]
pub(super) struct PageDigests {
    page: Hasher,
    entries_in_page: u32,
    done: Vec<Digest>,
}

impl PageDigests {
    /// Takes in the next entry.
    pub(super) fn push(&mut self, raw_len: u32, raw_digest: &Digest) {
        self.page.update(&raw_len.to_le_bytes());
        self.page.update(&raw_digest.0);
        self.entries_in_page += 1;
        if self.entries_in_page == ENTRIES_PER_PAGE {
            self.end_page();
        }
    }

    /// The digest of each page.
    pub(super) fn finish(mut self) -> Vec<Digest> {
        if self.entries_in_page > 0 {
            self.end_page();
        }
        self.done
    }

    fn end_page(&mut self) {
        self.done.push(std::mem::take(&mut self.page).finish());
        self.entries_in_page = 0;
    }
}

/// The root over the digests of all pages.
pub(super) fn root(pages: &[Digest]) -> Digest {
    let mut hasher = Hasher::new();
    pages.iter().for_each(|page| hasher.update(&page.0));
    hasher.finish()
}

/// The rules for entries that the table itself does not hold.
pub(super) struct EntryRules<'a> {
    pub(super) footer: &'a Footer,
    pub(super) max_chunk_len: u32,
}

impl EntryRules<'_> {
    /// Parses entry `index`, which lies at file offset `at`, behind `previous` (`None`: unknown, or there is none). `twin` is
    /// what `TWIN` says of the chunk; `None` if the image is no delta.
    pub(super) fn parse(
        &self,
        bytes: &[u8; CHUNK_ENTRY_LEN],
        index: u64,
        at: FileOffset,
        previous: Option<&ChunkEntry>,
        twin: Option<u32>,
    ) -> Result<ChunkEntry, ContainerError> {
        let chunk = ChunkIndex(index);
        let wrong = |field| ContainerError::WrongChunk { chunk, field, at };
        let kind = match twin {
            None => ChunkKind::of(self.footer.layout),
            Some(twin) => ChunkKind::in_delta(bytes[chunk_entry::KIND.start], twin)
                .ok_or_else(|| wrong("KIND"))?,
        };
        let entry = ChunkEntry {
            index: chunk,
            stored_offset: FileOffset(u64_at(bytes, chunk_entry::STORED_OFFSET)),
            stream_offset: StreamOffset(u64_at(bytes, chunk_entry::STREAM_OFFSET)),
            stored_len: u32_at(bytes, chunk_entry::STORED_LEN),
            raw_len: u32_at(bytes, chunk_entry::RAW_LEN),
            kind,
            stored_crc: u32_at(bytes, chunk_entry::STORED_CRC),
            raw_digest: Digest(array(bytes, chunk_entry::RAW_SHA256)),
        };
        if bytes[chunk_entry::KIND.start] != kind.number() {
            return Err(wrong("KIND"));
        }
        if bytes[25..28] != [0; 3] {
            return Err(ContainerError::NotZero {
                section: SectionType::ChunkTable,
                at,
            });
        }
        if entry.raw_len == 0 || entry.raw_len > self.max_chunk_len {
            return Err(wrong("RAW_LEN"));
        }
        if !kind.allows(entry.stored_len, entry.raw_len) {
            return Err(wrong("STORED_LEN"));
        }
        if entry.stored_len == 0 && entry.stored_crc != 0 {
            return Err(wrong("STORED_CRC"));
        }
        self.check_place(&entry, previous).map_err(wrong)?;
        Ok(entry)
    }

    /// Where the next chunk's bytes may begin behind this one: in a delta a section lies around each.
    fn end_of(&self, entry: &ChunkEntry) -> u64 {
        let behind = match self.footer.is_delta() && entry.stored_len > 0 {
            true => SECTION_TRAILER_LEN as u64,
            false => 0,
        };
        entry.stored_end().saturating_add(behind)
    }

    /// Names the field that is wrong.
    fn check_place(
        &self,
        entry: &ChunkEntry,
        previous: Option<&ChunkEntry>,
    ) -> Result<(), &'static str> {
        let is_delta = self.footer.is_delta();
        let text_len = if is_delta { TEXT_FRAME_LEN } else { 0 };
        let payload_offset = self.footer.payload_offset.0.saturating_add(text_len);
        let end = entry.stored_offset.0.checked_add(entry.stored_len.into());
        let end = end.map(|_| self.end_of(entry));
        let is_inside = entry.stored_offset.0 >= payload_offset
            && end.is_some_and(|end| {
                self.footer
                    .payload_end()
                    .is_some_and(|payload_end| end <= payload_end)
            });
        let (stored_end, stream_end) = match previous {
            Some(previous) => (Some(self.end_of(previous)), Some(previous.stream_end())),
            None if entry.index.0 == 0 => (Some(payload_offset), Some(0)),
            None => (None, None),
        };
        let header_len = match is_delta && entry.stored_len > 0 {
            true => SECTION_HEADER_LEN as u64,
            false => 0,
        };
        let is_behind = stored_end.is_none_or(|stored_end| match self.footer.layout {
            Layout::Mapped => entry.stored_offset.0 >= stored_end,
            Layout::Zstd if is_delta => {
                stored_end.checked_add(header_len) == Some(entry.stored_offset.0)
            }
            Layout::Zstd | Layout::Raw => entry.stored_offset.0 == stored_end,
        });
        if !is_inside || !is_behind {
            return Err("STORED_OFFSET");
        }
        let raw_end = entry.stream_offset.0.checked_add(entry.raw_len.into());
        let fits = raw_end.is_some_and(|end| end <= self.footer.stream_len);
        if !fits || stream_end.is_some_and(|end| end != entry.stream_offset.0) {
            return Err("STREAM_OFFSET");
        }
        Ok(())
    }
}

/// The most bytes that a zstd frame of `raw_len` bytes may be stored in; spec §6.
pub(super) fn max_stored_len(raw_len: u64) -> u64 {
    raw_len + raw_len / 128 + 256
}
