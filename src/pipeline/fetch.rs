//! Single chunks, in any order: read, checked and decompressed when they are wanted.

use std::sync::OnceLock;

use super::load::{Loader, grow};
use crate::bytes::ReadAt;
use crate::container::{ChunkEntry, ContainerError, Image};
use crate::digest::Digest;
use crate::units::ChunkIndex;

/// Chunks that [`Fetcher::fetch`] takes at once: as many are hashed side by side.
pub const MOST_AT_ONCE: usize = 4;

/// The chunk table of an image, each page of it read and verified when it is first needed. Any thread may ask.
#[derive(Debug)]
pub struct ChunkTable<'a, R: ReadAt> {
    image: &'a Image<R>,
    pages: Vec<OnceLock<Vec<ChunkEntry>>>,
}

impl<'a, R: ReadAt> ChunkTable<'a, R> {
    /// Nothing is read yet.
    pub fn new(image: &'a Image<R>) -> Self {
        let pages = (0..image.table_page_count()).map(|_| OnceLock::new());
        ChunkTable {
            image,
            pages: pages.collect(),
        }
    }

    /// The image.
    pub fn image(&self) -> &'a Image<R> {
        self.image
    }

    /// The entry of a chunk.
    ///
    /// # Errors
    /// As [`Image::table_page`].
    pub fn entry(&self, chunk: ChunkIndex) -> Result<ChunkEntry, ContainerError> {
        let missing = ContainerError::NoSuchChunk {
            chunk,
            chunk_count: self.image.chunk_count(),
        };
        let per_page = u64::from(crate::container::layout::ENTRIES_PER_PAGE);
        let page = u32::try_from(chunk.0 / per_page).unwrap_or(u32::MAX);
        let Some(kept) = self.pages.get(page as usize) else {
            return Err(missing);
        };
        let entries = match kept.get() {
            Some(entries) => entries,
            // Two threads may read it at the same time; they find the same.
            None => {
                let entries = self.image.table_page(page)?;
                kept.get_or_init(|| entries)
            }
        };
        let index = usize::try_from(chunk.0 % per_page).unwrap_or(usize::MAX);
        entries.get(index).copied().ok_or(missing)
    }
}

/// Fetches chunks for one thread; its buffers are used again and again.
#[derive(Default)]
pub struct Fetcher {
    loader: Loader,
    buffers: [Vec<u8>; MOST_AT_ONCE],
}

impl Fetcher {
    /// The raw bytes of up to [`MOST_AT_ONCE`] chunks, verified: none is given if one of them is damaged.
    ///
    /// # Errors
    /// What is wrong with the first damaged one.
    pub fn fetch<R: ReadAt>(
        &mut self,
        table: &ChunkTable<'_, R>,
        chunks: &[ChunkIndex],
    ) -> Result<Vec<&mut [u8]>, ContainerError> {
        let entries: Result<Vec<ChunkEntry>, _> =
            chunks.iter().map(|chunk| table.entry(*chunk)).collect();
        let entries = entries?;
        for (entry, buffer) in entries.iter().zip(&mut self.buffers) {
            let len = entry.raw_len as usize;
            grow(buffer, len);
            self.loader.load(table.image, entry, &mut buffer[..len])?;
        }
        let filled = entries.iter().zip(&mut self.buffers);
        let filled: Vec<&mut [u8]> = filled
            .map(|(entry, buffer)| &mut buffer[..entry.raw_len as usize])
            .collect();
        let shown: Vec<&[u8]> = filled.iter().map(|raw| &**raw).collect();
        for (entry, digest) in entries.iter().zip(Digest::of_each(&shown)) {
            entry.check_digest(digest)?;
        }
        Ok(filled)
    }
}
