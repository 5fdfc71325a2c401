//! The memory of a saved guest, read anywhere: page map → chunks → bytes, each chunk verified before a byte of it is given.
//!
//! Nothing is unpacked: a read costs the chunks that its pages lie in. [`GuestMemory`] can be shared by threads; each
//! reads through a [`MemoryReader`] of its own, which keeps the last few chunks.

use super::PipelineError;
use super::fetch::{ChunkTable, Fetcher, MOST_AT_ONCE};
use crate::bytes::ReadAt;
use crate::container::{Block, Image, PageLocation, PageMap};
use crate::units::{ChunkIndex, PAGE_LEN, PageIndex};

/// Chunks that a reader keeps, for reads that need few of them at a time.
const KEPT_CHUNKS: usize = 8;

/// The memory in an image: named blocks of bytes.
#[derive(Debug)]
pub struct GuestMemory<'a, R: ReadAt> {
    table: ChunkTable<'a, R>,
    map: PageMap,
}

impl<'a, R: ReadAt> GuestMemory<'a, R> {
    /// The memory in `image`. The page map is read, no page.
    ///
    /// # Errors
    /// [`PipelineError::NoPageMap`] if the image has none; what is wrong with it.
    pub fn open(image: &'a Image<R>) -> Result<Self, PipelineError> {
        let map = image.page_map()?.ok_or(PipelineError::NoPageMap)?;
        let table = ChunkTable::new(image);
        Ok(GuestMemory { table, map })
    }

    /// The RAMBlocks, in stream order; others name them by their index.
    pub fn blocks(&self) -> &[Block] {
        self.map.blocks()
    }

    /// Where each page lies.
    pub fn page_map(&self) -> &PageMap {
        &self.map
    }

    /// A reader for one thread.
    pub fn reader(&self) -> MemoryReader<'_, 'a, R> {
        MemoryReader {
            memory: self,
            fetcher: Fetcher::default(),
            kept: Vec::new(),
        }
    }
}

/// Reads guest memory; made by [`GuestMemory::reader`].
pub struct MemoryReader<'m, 'a, R: ReadAt> {
    memory: &'m GuestMemory<'a, R>,
    fetcher: Fetcher,
    /// The latest last.
    kept: Vec<(ChunkIndex, Vec<u8>)>,
}

/// A part of a page that has to be copied out of a chunk.
struct Piece {
    chunk: ChunkIndex,
    /// Where it begins in the chunk's bytes.
    from: usize,
    /// Where it goes to.
    to: usize,
    len: usize,
}

impl<R: ReadAt> MemoryReader<'_, '_, R> {
    /// Fills `buf` with the bytes at `offset` of `block`, an index into [`GuestMemory::blocks`]. What no page holds is zero.
    ///
    /// # Errors
    /// [`PipelineError::OutsideBlock`] if the block is shorter; [`PipelineError::Container`] for a damaged chunk.
    pub fn read(&mut self, block: usize, offset: u64, buf: &mut [u8]) -> Result<(), PipelineError> {
        let blocks = self.memory.blocks();
        let known = blocks.get(block).map_or(0, |block| block.used_length);
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > known) {
            return Err(PipelineError::OutsideBlock {
                idstr: blocks.get(block).map(|it| it.idstr.clone()),
                offset,
                len: buf.len() as u64,
            });
        }
        let mut pieces = self.pieces(block, offset, buf);
        // In a live save neighbours may lie far apart: each chunk is fetched once all the same.
        pieces.sort_by_key(|piece| (piece.chunk, piece.to));
        let mut chunks: Vec<ChunkIndex> = pieces.iter().map(|piece| piece.chunk).collect();
        chunks.dedup();
        if chunks.len() <= MOST_AT_ONCE {
            return self.read_few(&pieces, &chunks, buf);
        }
        let mut pieces = pieces.as_slice();
        for group in chunks.chunks(MOST_AT_ONCE) {
            let fetched = self.fetcher.fetch(&self.memory.table, group)?;
            for (chunk, raw) in group.iter().zip(fetched) {
                let count = pieces.partition_point(|piece| piece.chunk <= *chunk);
                let (of_chunk, rest) = pieces.split_at(count);
                copy(of_chunk, raw, buf)?;
                pieces = rest;
            }
        }
        Ok(())
    }

    /// What has to be copied from where; the rest of `buf` is cleared.
    fn pieces(&self, block: usize, offset: u64, buf: &mut [u8]) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(buf.len() / PAGE_LEN + 2);
        let mut to = 0;
        while to < buf.len() {
            let at = offset + to as u64;
            let page = PageIndex(at / PAGE_LEN as u64);
            let skipped = usize::try_from(at % PAGE_LEN as u64).unwrap_or(0);
            let len = (PAGE_LEN - skipped).min(buf.len() - to);
            match self.memory.map.locate(block, page) {
                Some(PageLocation::Data { chunk, body }) => pieces.push(Piece {
                    chunk,
                    from: body as usize + skipped,
                    to,
                    len,
                }),
                _ => buf[to..to + len].fill(0),
            }
            to += len;
        }
        pieces
    }

    /// A read that needs few chunks: those that were read before are still there, and these will be.
    fn read_few(
        &mut self,
        pieces: &[Piece],
        chunks: &[ChunkIndex],
        buf: &mut [u8],
    ) -> Result<(), PipelineError> {
        let is_kept = |chunk: &ChunkIndex| self.kept.iter().any(|(kept, _)| kept == chunk);
        let missing: Vec<ChunkIndex> = chunks.iter().copied().filter(|it| !is_kept(it)).collect();
        if !missing.is_empty() {
            let fetched = self.fetcher.fetch(&self.memory.table, &missing)?;
            for (chunk, raw) in missing.iter().zip(fetched) {
                let place = match self.kept.len() < KEPT_CHUNKS {
                    true => Vec::new(),
                    // The oldest that is not wanted now; there is one, for more are kept than can be wanted.
                    false => {
                        let mut kept = self.kept.iter();
                        let oldest = kept.position(|(kept, _)| !chunks.contains(kept));
                        self.kept.remove(oldest.unwrap_or(0)).1
                    }
                };
                let mut bytes = place;
                bytes.clear();
                bytes.extend_from_slice(raw);
                self.kept.push((*chunk, bytes));
            }
        }
        for (chunk, raw) in &self.kept {
            let first = pieces.partition_point(|piece| piece.chunk < *chunk);
            let end = pieces.partition_point(|piece| piece.chunk <= *chunk);
            copy(&pieces[first..end], raw, buf)?;
        }
        Ok(())
    }
}

fn copy(pieces: &[Piece], raw: &[u8], buf: &mut [u8]) -> Result<(), PipelineError> {
    for piece in pieces {
        let from = raw.get(piece.from..piece.from + piece.len);
        let from = from.ok_or(PipelineError::ShortChunk { chunk: piece.chunk })?;
        buf[piece.to..piece.to + piece.len].copy_from_slice(from);
    }
    Ok(())
}
