//! What makes an image a delta: whose chunks it needs, the one plain frame that says so, and which of them its own follow.
//!
//! A delta owns its parent, once somebody has found it ([`Image::set_parent`]); where it lies is not known here.
//!
//! Source: spec/container.md §16.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;

use crate::bytes::ReadAt;
use crate::digest::{Digest, crc32c, crc32c_combine};
use crate::units::{ChunkIndex, FileOffset};

use super::chunk_table::{ChunkEntry, ChunkKind};
use super::directory::DirectoryEntry;
use super::error::ContainerError;
use super::layout::{
    ENTRIES_PER_PAGE, MAX_DELTAS, MAX_PARENT_NAME_LEN, NO_TWIN, SECTION_HEADER_LEN,
    SECTION_TRAILER_LEN, SectionType, TWINS_FIXED_LEN, twins, u16_at, u32_at,
};
use super::reader::{Image, read_expected};
use super::section::{FrameHeader, read_at};

/// Table pages of a parent that are kept, of 4096 chunks each.
const KEPT_PAGES: usize = 4;

/// Which image a delta needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParentId {
    /// Its UUID.
    pub image_uuid: Uuid,
    /// Its image digest.
    pub image_digest: Digest,
}

impl fmt::Display for ParentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (uuid, digest) = (self.image_uuid, self.image_digest);
        write!(f, "image {uuid} with digest sha256:{digest}")
    }
}

/// What a parent is read from, wherever it lies.
#[derive(Clone)]
pub struct ParentReader(Arc<dyn ReadAt>);

impl ParentReader {
    /// Reads from `reader`.
    pub fn new(reader: impl ReadAt + 'static) -> Self {
        ParentReader(Arc::new(reader))
    }
}

impl fmt::Debug for ParentReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ParentReader")
    }
}

impl ReadAt for ParentReader {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        self.0.next_data(offset)
    }
}

/// A parent that was found and opened, with its own parent if it is a delta too.
pub type ParentImage = Image<ParentReader>;

/// Table pages that were read last, so that single chunks can be looked up.
#[derive(Debug, Default)]
pub(super) struct KeptPages(Mutex<VecDeque<(u32, Arc<Vec<ChunkEntry>>)>>);

/// `TWIN`, without its entries.
#[derive(Debug)]
pub(super) struct TwinsHead {
    /// Where the entries begin in the file.
    pub(super) entries_offset: u64,
    /// The parent's file name, as far as that is known.
    pub(super) name: Option<String>,
}

/// The pieces of the text; the delta's UUID, the parent's and its digest stand between them.
const TEXT: [&str; 4] = [
    "vmstow: this is the delta ",
    "; it needs its parent, image ",
    " with digest sha256:",
    "\n",
];

/// Bytes of the text.
const TEXT_LEN: u8 = {
    let pieces = TEXT[0].len() + TEXT[1].len() + TEXT[2].len() + TEXT[3].len();
    let len = pieces + 2 * 36 + 64;
    assert!(len < 256);
    #[expect(clippy::cast_possible_truncation, reason = "it was just looked at")]
    let len = len as u8;
    len
};

/// Bytes of the frame that begins the payload of a delta.
pub const TEXT_FRAME_LEN: u64 = TEXT_LEN as u64 + 9;

/// The frame that begins the payload of a delta: all that `zstd -dc` makes of it.
pub(super) fn text_frame(delta: Uuid, parent: &ParentId) -> Vec<u8> {
    let [begin, needs, digest, end] = TEXT;
    let ParentId {
        image_uuid,
        image_digest,
    } = parent;
    let text = format!("{begin}{delta}{needs}{image_uuid}{digest}{image_digest}{end}");
    let block = (u32::from(TEXT_LEN) << 3 | 1).to_le_bytes();
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x20, TEXT_LEN];
    frame.extend_from_slice(&block[..3]);
    frame.extend_from_slice(text.as_bytes());
    frame
}

/// What stands before and behind the stored bytes of a delta's chunk: a section `DATA` around them.
pub(super) fn data_frame(
    stored_len: u32,
    stored_crc: u32,
) -> Result<([u8; SECTION_HEADER_LEN], [u8; SECTION_TRAILER_LEN]), ContainerError> {
    let header = FrameHeader {
        section: SectionType::Data,
        payload_len: stored_len.into(),
    };
    let before = header.write()?;
    let total_len = u32::try_from(header.total_len()).map_err(|_| ContainerError::Full)?;
    let stored_len = usize::try_from(stored_len).map_err(|_| ContainerError::Full)?;
    let crc = crc32c_combine(crc32c(&before), stored_crc, stored_len);
    let crc = crc32c_combine(crc, crc32c(&total_len.to_le_bytes()), 4);
    let mut behind = [0; SECTION_TRAILER_LEN];
    behind[..4].copy_from_slice(&total_len.to_le_bytes());
    behind[4..].copy_from_slice(&crc.to_le_bytes());
    Ok((before, behind))
}

/// Whether a file can be called so: a plain name, not a path.
fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

/// The payload of `TWIN`. A name that is none is left out.
pub(super) fn twins_payload(
    name: Option<&str>,
    twins: &[u32],
) -> Result<(Vec<u8>, u64), ContainerError> {
    let name = name.filter(|name| is_file_name(name) && name.len() <= MAX_PARENT_NAME_LEN);
    let name = name.unwrap_or_default();
    let count = u32::try_from(twins.len()).map_err(|_| ContainerError::Full)?;
    let name_len = u16::try_from(name.len()).map_err(|_| ContainerError::Full)?;
    let mut head = count.to_le_bytes().to_vec();
    head.extend_from_slice(&name_len.to_le_bytes());
    head.extend([0; 2]);
    head.extend_from_slice(name.as_bytes());
    let len = head.len() as u64 + u64::from(count) * 4;
    Ok((head, len))
}

/// Reads `TWIN` but for its entries, of which there has to be one for each chunk.
pub(super) fn read_twins_head<R: ReadAt + ?Sized>(
    reader: &R,
    entry: &DirectoryEntry,
    chunk_count: u64,
) -> Result<TwinsHead, ContainerError> {
    let (section, at) = (SectionType::Twins, entry.offset);
    let found = read_expected(reader, entry)?;
    let too_short = |expected| ContainerError::LengthMismatch {
        section,
        at,
        expected,
        found,
    };
    if found < 8 {
        return Err(too_short(8));
    }
    let mut fixed = [0; TWINS_FIXED_LEN];
    read_at(reader, &mut fixed, at.0)?;
    let wrong = |field, found| ContainerError::WrongField {
        section,
        field,
        at,
        found,
    };
    let (count, name_len) = (
        u64::from(u32_at(&fixed, twins::TWIN_COUNT)),
        u16_at(&fixed, twins::NAME_LEN),
    );
    if fixed[38..40] != [0; 2] {
        return Err(ContainerError::NotZero { section, at });
    }
    if count != chunk_count {
        return Err(wrong("TWIN_COUNT", count));
    }
    if usize::from(name_len) > MAX_PARENT_NAME_LEN {
        return Err(wrong("NAME_LEN", name_len.into()));
    }
    let expected = 8 + u64::from(name_len) + 4 * count;
    if expected != found {
        return Err(too_short(expected));
    }
    let mut name = vec![0; usize::from(name_len)];
    let name_offset = at.0 + TWINS_FIXED_LEN as u64;
    read_at(reader, &mut name, name_offset)?;
    let name = match name_len {
        0 => None,
        _ => {
            let name = String::from_utf8(name).ok().filter(|it| is_file_name(it));
            Some(name.ok_or_else(|| wrong("parent name", name_len.into()))?)
        }
    };
    Ok(TwinsHead {
        entries_offset: name_offset + u64::from(name_len),
        name,
    })
}

impl<R: ReadAt> Image<R> {
    /// Whose chunks it needs; `None` if it is no delta.
    pub fn parent_id(&self) -> Option<ParentId> {
        self.footer.parent
    }

    /// The name that the parent's file had when the delta was written, if that is known. A plain file name.
    pub fn parent_name(&self) -> Option<&str> {
        self.twins.as_ref()?.name.as_deref()
    }

    /// Its parent, if it is a delta and that was found.
    pub fn parent(&self) -> Option<&Arc<ParentImage>> {
        self.parent.as_ref()
    }

    /// How many deltas lie between it and a full image, itself included, as far as parents were found.
    pub fn delta_depth(&self) -> u32 {
        let above = self.parent().map_or(0, |parent| parent.delta_depth());
        above.saturating_add(self.footer.is_delta().into())
    }

    /// Which image it is, as one that has it for a parent names it.
    pub fn as_parent(&self) -> ParentId {
        ParentId {
            image_uuid: self.footer.identity.image_uuid,
            image_digest: self.footer.image_digest,
        }
    }

    /// Gives it the parent that it needs.
    ///
    /// # Errors
    /// [`ContainerError::OtherParent`]; [`ContainerError::ChainTooLong`].
    pub fn set_parent(&mut self, parent: Arc<ParentImage>) -> Result<(), ContainerError> {
        let found = parent.as_parent();
        match self.footer.parent {
            Some(expected) if expected == found => {}
            expected => {
                let expected = expected.unwrap_or_else(|| self.as_parent());
                return Err(ContainerError::OtherParent { expected, found });
            }
        }
        if parent.delta_depth() >= MAX_DELTAS {
            return Err(ContainerError::ChainTooLong);
        }
        self.parent = Some(parent);
        Ok(())
    }

    /// The parent's chunk that `entry` follows, with the parent; `None` if the chunk follows none.
    ///
    /// # Errors
    /// [`ContainerError::NoParent`] if it was not found; [`ContainerError::WrongChunk`] if there is no such chunk, or not the same one
    /// where it has to be; [`ContainerError::Twin`] if the parent does not tell.
    pub fn twin(
        &self,
        entry: &ChunkEntry,
    ) -> Result<Option<(&Arc<ParentImage>, ChunkEntry)>, ContainerError> {
        let (ChunkKind::Patched(twin) | ChunkKind::Same(twin)) = entry.kind else {
            return Ok(None);
        };
        let parent = self.parent_id().unwrap_or_else(|| self.as_parent());
        let there = self.parent().ok_or(ContainerError::NoParent { parent })?;
        let wrong = || ContainerError::WrongChunk {
            chunk: entry.index,
            field: "twin",
            at: entry.stored_offset,
        };
        let found = match there.look_up(twin) {
            Err(ContainerError::NoSuchChunk { .. }) => return Err(wrong()),
            found => found.map_err(|source| self.twin_error(entry, source))?,
        };
        let is_same = (found.raw_len, found.raw_digest) == (entry.raw_len, entry.raw_digest);
        match entry.kind {
            ChunkKind::Same(_) if !is_same => Err(wrong()),
            _ => Ok(Some((there, found))),
        }
    }

    /// What is wrong with the parent's chunk that `entry` follows.
    pub fn twin_error(&self, entry: &ChunkEntry, source: ContainerError) -> ContainerError {
        let parent = self.parent_id().unwrap_or_else(|| self.as_parent());
        match entry.kind {
            ChunkKind::Patched(twin) | ChunkKind::Same(twin) => ContainerError::Twin {
                chunk: entry.index,
                twin,
                parent: parent.image_uuid,
                source: Box::new(source),
            },
            ChunkKind::Zstd | ChunkKind::Plain => source,
        }
    }

    /// As [`Image::chunk`]; the table pages that were asked for last are kept.
    ///
    /// # Errors
    /// As [`Image::chunk`].
    pub fn look_up(&self, chunk: ChunkIndex) -> Result<ChunkEntry, ContainerError> {
        let missing = ContainerError::NoSuchChunk {
            chunk,
            chunk_count: self.chunk_count(),
        };
        let per_page = u64::from(ENTRIES_PER_PAGE);
        let Ok(page) = u32::try_from(chunk.0 / per_page) else {
            return Err(missing);
        };
        // Who panicked left whole pages.
        let kept = || self.kept.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept().iter().find(|(number, _)| *number == page).cloned();
        let entries = match known {
            Some((_, entries)) => entries,
            None => {
                let entries = Arc::new(self.table_page(page)?);
                let mut kept = kept();
                if kept.len() == KEPT_PAGES {
                    kept.pop_front();
                }
                kept.push_back((page, Arc::clone(&entries)));
                entries
            }
        };
        let index = usize::try_from(chunk.0 % per_page).unwrap_or(usize::MAX);
        entries.get(index).copied().ok_or(missing)
    }

    /// The numbers of the twins of these chunks, at most a table page; `None` if it is no delta.
    pub(super) fn read_twins(
        &self,
        chunks: &std::ops::Range<u64>,
    ) -> Result<Option<Vec<u32>>, ContainerError> {
        let Some(head) = &self.twins else {
            return Ok(None);
        };
        let count = chunks.end.saturating_sub(chunks.start);
        let count = usize::try_from(count)
            .unwrap_or(0)
            .min(ENTRIES_PER_PAGE as usize);
        let mut bytes = vec![0; count * 4];
        read_at(
            &self.reader,
            &mut bytes,
            head.entries_offset + chunks.start * 4,
        )?;
        let (numbers, _) = bytes.as_chunks::<4>();
        Ok(Some(
            numbers.iter().map(|it| u32::from_le_bytes(*it)).collect(),
        ))
    }

    /// Reads the section in which a delta's chunk lies; `buf` then holds the chunk's stored bytes.
    pub(super) fn read_data_section(
        &self,
        entry: &ChunkEntry,
        buf: &mut Vec<u8>,
    ) -> Result<(), ContainerError> {
        let extent = self.extent(entry);
        buf.resize(usize::try_from(extent.end - extent.start).unwrap_or(0), 0);
        read_at(&self.reader, buf, extent.start)?;
        let len = self.stored_in(entry, buf)?.len();
        if len < buf.len() {
            buf.truncate(SECTION_HEADER_LEN + len);
            buf.drain(..SECTION_HEADER_LEN);
        }
        Ok(())
    }

    /// The bytes of the file that belong to the chunk: what is stored of it, in a delta with the section around that. Empty if nothing
    /// is stored.
    pub fn extent(&self, entry: &ChunkEntry) -> std::ops::Range<u64> {
        let stored = entry.stored_offset.0..entry.stored_end();
        match self.footer.is_delta() && !stored.is_empty() {
            true => {
                let start = stored.start.saturating_sub(SECTION_HEADER_LEN as u64);
                start..stored.end.saturating_add(SECTION_TRAILER_LEN as u64)
            }
            false => stored,
        }
    }

    /// Holds bytes of [`Image::extent`] against the entry; gives the stored bytes in them.
    ///
    /// # Errors
    /// [`ContainerError::DataSection`]; as [`ChunkEntry::check_stored`].
    pub fn stored_in<'b>(
        &self,
        entry: &ChunkEntry,
        extent: &'b [u8],
    ) -> Result<&'b [u8], ContainerError> {
        if !self.footer.is_delta() || entry.stored_len == 0 {
            entry.check_stored(extent)?;
            return Ok(extent);
        }
        let damaged = ContainerError::DataSection {
            chunk: entry.index,
            at: entry.stored_offset,
        };
        let end = extent.len().checked_sub(SECTION_TRAILER_LEN);
        let stored = end.and_then(|end| extent.get(SECTION_HEADER_LEN..end));
        let Some(stored) = stored else {
            return Err(damaged);
        };
        entry.check_stored(stored)?;
        let (before, behind) = data_frame(entry.stored_len, entry.stored_crc)?;
        let is_right = extent.starts_with(&before) && extent.ends_with(&behind);
        is_right.then_some(stored).ok_or(damaged)
    }

    /// Holds the frame at the beginning of a delta's payload against its parent.
    pub(super) fn check_text_frame(&self) -> Result<(), ContainerError> {
        let Some(parent) = self.footer.parent else {
            return Ok(());
        };
        let at = self.footer.payload_offset;
        let expected = text_frame(self.footer.identity.image_uuid, &parent);
        let mut found = vec![0; expected.len()];
        read_at(&self.reader, &mut found, at.0)?;
        match found == expected {
            true => Ok(()),
            false => Err(ContainerError::TextFrame { at }),
        }
    }

    /// Where the payload's bytes that belong to no chunk end: the text of a delta.
    pub fn chunks_offset(&self) -> FileOffset {
        let text = if self.footer.is_delta() {
            TEXT_FRAME_LEN
        } else {
            0
        };
        FileOffset(self.footer.payload_offset.0.saturating_add(text))
    }
}

/// The number of a chunk's twin as `TWIN` has it.
pub(super) fn twin_number(kind: ChunkKind) -> Option<u32> {
    match kind {
        ChunkKind::Zstd | ChunkKind::Plain => Some(NO_TWIN),
        ChunkKind::Patched(twin) | ChunkKind::Same(twin) => u32::try_from(twin.0)
            .ok()
            .filter(|number| *number != NO_TWIN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Sink;
    use crate::container::section::{SectionWriter, parse_section};
    use proptest::prelude::*;

    #[test]
    fn the_text_is_one_plain_frame_of_the_length_that_is_said() {
        let parent = ParentId {
            image_uuid: Uuid::from_bytes([7; 16]),
            image_digest: Digest([9; 32]),
        };
        let frame = text_frame(Uuid::from_bytes([1; 16]), &parent);
        assert_eq!(frame.len() as u64, TEXT_FRAME_LEN);
        let text = zstd::decode_all(frame.as_slice()).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(&parent.to_string()), "{text}");
        assert!(text.ends_with('\n') && text.lines().count() == 1);
    }

    #[test]
    fn names_that_lead_elsewhere_are_left_out() {
        for name in ["", ".", "..", "a/b", "/a", "../a", &"x".repeat(256)] {
            let (head, len) = twins_payload(Some(name), &[1, 2]).unwrap();
            assert_eq!((head.len(), len), (8, 16), "{name}");
        }
        let (head, len) = twins_payload(Some("a.stow"), &[1, 2]).unwrap();
        assert_eq!((&head[8..], len), (&b"a.stow"[..], 22));
    }

    proptest! {
        #[test]
        fn the_frame_of_a_chunk_is_the_section_that_anybody_would_write(
            stored in proptest::collection::vec(any::<u8>(), 1..5000),
        ) {
            let mut file: Vec<u8> = Vec::new();
            let len = stored.len() as u64;
            let sink: &mut dyn Sink = &mut file;
            let mut writer = SectionWriter::begin(sink, 0, SectionType::Data, len).unwrap();
            writer.write(&stored).unwrap();
            writer.finish(1).unwrap();
            let stored_len = u32::try_from(stored.len()).unwrap();
            let (before, behind) = data_frame(stored_len, crc32c(&stored)).unwrap();
            prop_assert_eq!(&file, &[&before[..], &stored, &behind[..]].concat());
            let (section, payload) = parse_section(&file, FileOffset(0)).unwrap();
            prop_assert_eq!((section, payload), (SectionType::Data, stored.as_slice()));
        }
    }
}
