//! From a number or a stream offset to a chunk's entry, and to its stored bytes.
//!
//! The chunk table is read one page of 4096 entries at a time, each held against its digest. The stream offset in an
//! entry guides a search before its page is verified; a wrong one gives a wrong chunk, whose digest then does not match.
//!
//! Source: spec/container.md §6.

use crate::bytes::ReadAt;
use crate::units::{ChunkIndex, FileOffset, StreamOffset};

use super::chunk_table::{ChunkEntry, EntryRules, PageDigests};
use super::error::ContainerError;
use super::layout::{CHUNK_ENTRY_LEN, ENTRIES_PER_PAGE, NO_TWIN, chunk_entry};
use super::reader::Image;
use super::section::read_at;

impl<R: ReadAt> Image<R> {
    /// All chunks in stream order; reads one page of the table at a time.
    pub fn chunks(&self) -> ChunkIter<'_, R> {
        ChunkIter {
            image: self,
            next_page: 0,
            page: Vec::new().into_iter(),
            previous: None,
        }
    }

    /// Number of table pages, of 4096 chunks each.
    pub fn table_page_count(&self) -> u32 {
        self.table.table_page_count
    }

    /// The chunks of one table page, held against the page's digest.
    ///
    /// # Errors
    /// [`ContainerError::TablePage`]; [`ContainerError::WrongChunk`]; [`ContainerError::NoSuchChunk`].
    pub fn table_page(&self, page: u32) -> Result<Vec<ChunkEntry>, ContainerError> {
        self.table_page_behind(page, None)
    }

    /// As [`Image::table_page`], also held against the chunk before it.
    pub(super) fn table_page_behind(
        &self,
        page: u32,
        previous: Option<ChunkEntry>,
    ) -> Result<Vec<ChunkEntry>, ContainerError> {
        let chunks = self.table.page_range(page);
        let (chunk, chunk_count) = (ChunkIndex(chunks.start), self.chunk_count());
        let expected = self.page_digests.get(page as usize).copied();
        let expected = expected.ok_or(ContainerError::NoSuchChunk { chunk, chunk_count })?;
        let at = self.table_offset + self.table.entry_position(chunks.start);
        let bytes = self.read_page(at, chunks.end - chunks.start)?;
        let twins = self.read_twins(&chunks)?;
        let mut digests = PageDigests::default();
        let mut entries: Vec<ChunkEntry> = Vec::new();
        let (bytes, _) = bytes.as_chunks::<CHUNK_ENTRY_LEN>();
        let rules = EntryRules {
            footer: &self.footer,
            max_chunk_len: self.table.max_chunk_len,
        };
        for ((index, bytes), position) in chunks.zip(bytes).zip((at..).step_by(CHUNK_ENTRY_LEN)) {
            let twin = twins.as_ref();
            let twin = twin.map(|twins| twins.get(entries.len()).copied().unwrap_or(NO_TWIN));
            let entry = rules.parse(
                bytes,
                index,
                FileOffset(position),
                entries.last().or(previous.as_ref()),
                twin,
            )?;
            digests.push(entry.raw_len, &entry.raw_digest);
            entries.push(entry);
        }
        let found = digests.finish().first().copied().unwrap_or_default();
        match found == expected {
            true => Ok(entries),
            false => Err(ContainerError::TablePage {
                page,
                at: FileOffset(at),
                expected,
                found,
            }),
        }
    }

    /// The bytes of `count` entries, at most a page.
    fn read_page(&self, at: u64, count: u64) -> Result<Vec<u8>, ContainerError> {
        let count = usize::try_from(count)
            .unwrap_or(0)
            .min(ENTRIES_PER_PAGE as usize);
        let mut bytes = vec![0; count * CHUNK_ENTRY_LEN];
        read_at(&self.reader, &mut bytes, at)?;
        Ok(bytes)
    }

    /// The chunk with this number.
    ///
    /// # Errors
    /// As [`Image::table_page`]; the whole page is read.
    pub fn chunk(&self, chunk: ChunkIndex) -> Result<ChunkEntry, ContainerError> {
        let missing = ContainerError::NoSuchChunk {
            chunk,
            chunk_count: self.chunk_count(),
        };
        let per_page = u64::from(ENTRIES_PER_PAGE);
        let Ok(page) = u32::try_from(chunk.0 / per_page) else {
            return Err(missing);
        };
        let entries = self.table_page(page)?;
        let index = usize::try_from(chunk.0 % per_page).unwrap_or(usize::MAX);
        entries.get(index).copied().ok_or(missing)
    }

    /// The chunk that holds the byte at `stream_offset`.
    ///
    /// # Errors
    /// [`ContainerError::NoSuchStreamOffset`]; else as [`Image::table_page`].
    pub fn chunk_of_stream_offset(
        &self,
        stream_offset: StreamOffset,
    ) -> Result<ChunkEntry, ContainerError> {
        let missing = ContainerError::NoSuchStreamOffset {
            stream_offset,
            stream_len: self.stream_len(),
        };
        let field = chunk_entry::STREAM_OFFSET.start;
        let page = self.last_page_whose_first(field, stream_offset.0)?;
        let entries = self.table_page(page)?;
        let holds = |entry: &&ChunkEntry| {
            entry.stream_offset <= stream_offset && stream_offset.0 < entry.stream_end()
        };
        entries.iter().find(holds).copied().ok_or(missing)
    }

    /// The table page that holds the last chunk which begins at `offset` of the file or before; the first one if none does.
    ///
    /// # Errors
    /// [`ContainerError::Read`].
    pub fn table_page_of_file_offset(&self, offset: FileOffset) -> Result<u32, ContainerError> {
        self.last_page_whose_first(chunk_entry::STORED_OFFSET.start, offset.0)
    }

    /// The last table page whose first entry has a value of at most `most` at `field`; the first one if none has. Not
    /// verified: it only guides a search.
    fn last_page_whose_first(&self, field: usize, most: u64) -> Result<u32, ContainerError> {
        let (mut low, mut high) = (0, self.table.table_page_count);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let first = self.table.page_range(middle).start;
            let at = self.table_offset + self.table.entry_position(first) + field as u64;
            let mut bytes = [0; 8];
            read_at(&self.reader, &mut bytes, at)?;
            match u64::from_le_bytes(bytes) <= most {
                true => low = middle,
                false => high = middle,
            }
        }
        Ok(low)
    }

    /// Reads a chunk's stored bytes into `buf` and checks them, see [`ChunkEntry::check_stored`].
    ///
    /// # Errors
    /// [`ContainerError::ChunkCrc`]; [`ContainerError::NotAFrame`]; [`ContainerError::Read`].
    pub fn read_stored(&self, entry: &ChunkEntry, buf: &mut Vec<u8>) -> Result<(), ContainerError> {
        self.check_place(entry)?;
        if self.footer.is_delta() {
            return self.read_data_section(entry, buf);
        }
        buf.resize(entry.stored_len as usize, 0);
        self.read_stored_into(entry, buf)
    }

    /// As [`Image::read_stored`], into a buffer of exactly the stored length. The section around a chunk of a delta is not looked at.
    ///
    /// # Errors
    /// As [`Image::read_stored`].
    pub fn read_stored_into(
        &self,
        entry: &ChunkEntry,
        buf: &mut [u8],
    ) -> Result<(), ContainerError> {
        self.check_place(entry)?;
        read_at(&self.reader, buf, entry.stored_offset.0)?;
        entry.check_stored(buf)
    }

    /// Nothing is read, and no memory taken, for bytes outside the payload.
    fn check_place(&self, entry: &ChunkEntry) -> Result<(), ContainerError> {
        let end = self.footer.payload_end();
        match end.is_some_and(|end| self.extent(entry).end <= end) {
            true => Ok(()),
            false => Err(ContainerError::WrongChunk {
                chunk: entry.index,
                field: "STORED_OFFSET",
                at: entry.stored_offset,
            }),
        }
    }
}

/// All chunks of an image in stream order; after an error it gives nothing more.
#[derive(Debug)]
pub struct ChunkIter<'a, R: ReadAt> {
    image: &'a Image<R>,
    next_page: u32,
    page: std::vec::IntoIter<ChunkEntry>,
    previous: Option<ChunkEntry>,
}

impl<R: ReadAt> Iterator for ChunkIter<'_, R> {
    type Item = Result<ChunkEntry, ContainerError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.page.len() == 0 {
            if self.next_page >= self.image.table_page_count() {
                return None;
            }
            match self.image.table_page_behind(self.next_page, self.previous) {
                Ok(page) => self.page = page.into_iter(),
                Err(error) => {
                    self.next_page = u32::MAX;
                    return Some(Err(error));
                }
            }
            self.next_page += 1;
        }
        self.previous = self.page.next();
        self.previous.map(Ok)
    }
}
