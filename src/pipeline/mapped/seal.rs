//! Pages in their places → an image's chunks: bitmaps and framing are written, all of it is hashed as it lies there.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::places::{Placed, write_at};
use super::{WORD_PAGES, has};
use crate::container::{ContainerError, ImageWriter, PageMapBuilder, PlacedChunk};
use crate::digest::{Digest, crc32c};
use crate::pipeline::{Encoded, Encoding, PipelineError, batch_len};
use crate::progress::Progress;
use crate::stream::{Parser, StreamSummary};
use crate::units::{FileOffset, PAGE_LEN};

/// Everything that an image is told of its payload.
pub struct SealedPayload {
    chunks: Vec<PlacedChunk>,
    page_map: PageMapBuilder,
    stream: StreamSummary,
}

impl SealedPayload {
    /// Names the chunks to the image.
    ///
    /// # Errors
    /// [`PipelineError::Container`] if the image cannot take them.
    pub fn place(self, image: &mut ImageWriter<'_>) -> Result<Encoded, PipelineError> {
        for chunk in &self.chunks {
            image.place_chunk(chunk)?;
        }
        Ok(Encoded {
            stream: self.stream,
            page_map: Some(self.page_map),
        })
    }
}

/// A chunk to be: a part of the file.
struct Part {
    offset: u64,
    len: usize,
}

impl Placed<'_> {
    /// Writes what is missing of the payload, with `device_sections` at its end, and hashes all of it.
    ///
    /// # Errors
    /// What cannot be written or read back, or is wrong with the device sections.
    pub fn seal(
        &self,
        device_sections: &[u8],
        encoding: &Encoding,
        progress: &dyn Progress,
    ) -> Result<SealedPayload, PipelineError> {
        let stream = self.summary(device_sections)?;
        self.write_framing(device_sections)?;
        let (parts, page_map) = self.parts(device_sections.len(), encoding.chunk_len);
        let chunks = self.hash(&parts, encoding, progress)?;
        Ok(SealedPayload {
            chunks,
            page_map,
            stream,
        })
    }

    /// What the stream holds, by our own parser.
    fn summary(&self, device_sections: &[u8]) -> Result<StreamSummary, PipelineError> {
        let mut parser = Parser::mapped_ram();
        let behind = [self.layout.behind_pages.as_slice(), device_sections];
        for mut bytes in self.layout.entries.iter().map(Vec::as_slice).chain(behind) {
            while let Some(element) = parser.next(bytes)? {
                bytes = &bytes[element.len..];
            }
        }
        let mut summary = parser.finish()?;
        for (block, bitmap) in self.layout.blocks.iter().zip(&self.bitmaps) {
            let there: u64 = bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
            summary.data_pages += there;
            summary.zero_pages += block.page_count() - there;
        }
        Ok(summary)
    }

    /// Writes bitmaps and all else that is no page; gives where the stream ends.
    ///
    /// # Errors
    /// [`ContainerError::Write`].
    pub fn write_framing(&self, device_sections: &[u8]) -> Result<u64, PipelineError> {
        let blocks = self.layout.blocks.iter().zip(&self.layout.entries);
        for ((block, entry), bitmap) in blocks.zip(&self.bitmaps) {
            let bitmap = bitmap.iter().flat_map(|word| word.to_le_bytes());
            let bytes: Vec<u8> = entry.iter().copied().chain(bitmap).collect();
            write_at(self.target, &bytes, block.entry)?;
        }
        let tail = [self.layout.behind_pages.as_slice(), device_sections].concat();
        write_at(self.target, &tail, self.layout.pages_end())?;
        Ok(self.layout.pages_end() + tail.len() as u64)
    }

    /// Where to cut: framing with bitmaps, then one chunk for each aligned region of a block, from its first page that is
    /// there to its last.
    fn parts(&self, sections_len: usize, chunk_len: usize) -> (Vec<Part>, PageMapBuilder) {
        let blocks = self.layout.blocks.iter();
        let names = blocks.map(|it| (it.block.idstr.clone(), it.block.used_length));
        let mut cutter = Cutter {
            parts: Vec::new(),
            page_map: PageMapBuilder::new(&names.collect::<Vec<_>>()),
            chunk_len,
        };
        for (number, (block, bitmap)) in self.layout.blocks.iter().zip(&self.bitmaps).enumerate() {
            cutter.take(block.entry, block.bitmap_end());
            let region_pages = (chunk_len / PAGE_LEN).max(1) as u64;
            let mut mapped = 0;
            for start in (0..block.page_count()).step_by(chunk_len / PAGE_LEN) {
                let end = block.page_count().min(start + region_pages);
                let is_there = |page: &u64| has(bitmap, *page);
                let Some(first) = (start..end).find(is_there) else {
                    continue;
                };
                let last = (first..end).rev().find(is_there).unwrap_or(first);
                cutter.page_map.zeros(number, mapped, first - mapped);
                cutter.map(number, first..last + 1, bitmap);
                cutter.take(block.page_offset(first), block.page_offset(last + 1));
                mapped = last + 1;
            }
            let left = block.page_count() - mapped;
            cutter.page_map.zeros(number, mapped, left);
        }
        let tail_len = self.layout.behind_pages.len() + sections_len;
        let end = self.layout.pages_end();
        cutter.take(end, end + tail_len as u64);
        (cutter.parts, cutter.page_map)
    }

    /// Hashes parts, by all workers.
    fn hash(
        &self,
        parts: &[Part],
        encoding: &Encoding,
        progress: &dyn Progress,
    ) -> Result<Vec<PlacedChunk>, PipelineError> {
        let threads = encoding.threads.max(1);
        let batch = batch_len(threads, encoding.chunk_len);
        let next = AtomicUsize::new(0);
        let work = || self.hash_next(parts, &next, batch, progress);
        let hashed = thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let hashed = workers.into_iter().map(|worker| {
                let joined = worker.join();
                joined.map_err(|_| PipelineError::Worker).flatten()
            });
            hashed.collect::<Result<Vec<_>, _>>()
        });
        let mut chunks = hashed?.concat();
        chunks.sort_by_key(|chunk| chunk.offset);
        Ok(chunks)
    }

    fn hash_next(
        &self,
        parts: &[Part],
        next: &AtomicUsize,
        batch: usize,
        progress: &dyn Progress,
    ) -> Result<Vec<PlacedChunk>, PipelineError> {
        let mut chunks = Vec::new();
        let mut buffers = vec![Vec::new(); batch];
        loop {
            if progress.is_cancelled() {
                return Err(PipelineError::Cancelled);
            }
            let first = next.fetch_add(batch, Ordering::Relaxed).min(parts.len());
            let taken = &parts[first..parts.len().min(first + batch)];
            if taken.is_empty() {
                return Ok(chunks);
            }
            for (part, buffer) in taken.iter().zip(&mut buffers) {
                buffer.resize(part.len, 0);
                let read = self.target.read_back_at(buffer, part.offset);
                let at = FileOffset(part.offset);
                read.map_err(|source| ContainerError::Read { at, source })?;
            }
            let bytes: Vec<&[u8]> = buffers.iter().map(Vec::as_slice).collect();
            let bytes = &bytes[..taken.len()];
            let digests = Digest::of_each(bytes);
            for ((part, bytes), digest) in taken.iter().zip(bytes).zip(digests) {
                chunks.push(PlacedChunk {
                    offset: FileOffset(part.offset),
                    len: u32::try_from(part.len).unwrap_or(u32::MAX),
                    crc: crc32c(bytes),
                    digest,
                });
            }
        }
    }
}

/// Cuts the payload, and draws the page map.
struct Cutter {
    parts: Vec<Part>,
    page_map: PageMapBuilder,
    chunk_len: usize,
}

impl Cutter {
    /// The bytes `start..end` of the file become chunks.
    fn take(&mut self, start: u64, end: u64) {
        let mut offset = start;
        while offset < end {
            let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
            let len = left.min(self.chunk_len);
            self.parts.push(Part { offset, len });
            offset += len as u64;
        }
    }

    /// Enters pages of the next chunk, which begins with the first of them.
    fn map(&mut self, block: usize, pages: std::ops::Range<u64>, bitmap: &[u64]) {
        let chunk = u32::try_from(self.parts.len()).unwrap_or(u32::MAX);
        let mut body = 0;
        for first in pages.clone().step_by(64) {
            let count = u32::try_from((pages.end - first).min(WORD_PAGES)).unwrap_or(64);
            let bits = (0..count).filter(|index| has(bitmap, first + u64::from(*index)));
            let data = bits.fold(0, |data, index| data | 1 << index);
            self.page_map
                .plain(block, first, count, (chunk, body), data);
            body += count * 4096;
        }
    }
}
