//! A mapped-ram stream that lies in a file already → an image's chunks: nothing is written, all of it is hashed as it lies
//! there.
//!
//! The stream may begin anywhere in the file; the places that it names are the file's. A reader of the image has to see the
//! stream's beginning at 0, where it lies in images of this layout: [`FoundMapped::front`] is what it has to see there.
//!
//! QEMU leaves the bytes of a page that became zero while it saved a running guest, and takes the page's bit away. No chunk
//! holds such bytes: it ends before them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::{WORD_PAGES, has};
use crate::bytes::ReadAt;
use crate::container::{ContainerError, ImageWriter, PageMapBuilder, PlacedChunk};
use crate::digest::{Digest, crc32c};
use crate::pipeline::region::is_zero;
use crate::pipeline::{Encoded, Encoding, PipelineError};
use crate::progress::Progress;
use crate::stream::mapped_ram::MappedBlock;
use crate::stream::parser::{MAX_DEVICE_STATE_LEN, MAX_ELEMENT_LEN};
use crate::stream::{Event, Parser, Place, StreamError, StreamSummary};
use crate::units::{FileOffset, PAGE_LEN, StreamOffset};

/// Bytes of framing read at a time.
const PIECE_LEN: u64 = 2 * MAX_ELEMENT_LEN as u64;

/// The longest file with such a stream: a guest of 16 TiB. A file with holes can claim any length.
const MOST_FILE_LEN: u64 = 1 << 44;

/// A mapped-ram stream in a file, its framing read.
#[derive(Debug)]
pub struct FoundMapped {
    /// What a reader has to see from 0 on instead of what the file has there: the stream's beginning, up to the first
    /// bitmap. Empty where the file begins with the stream.
    pub front: Vec<u8>,
    /// What the stream holds; which pages there are is counted when it is hashed.
    pub stream: StreamSummary,
    blocks: Vec<MappedBlock>,
    /// Where each block's entry ends, as a reader of the image sees it.
    headers: Vec<u64>,
    /// Where the device sections and what stands before them lie, up to the stream's end.
    tail: Range<u64>,
}

impl FoundMapped {
    /// Reads the framing of the stream that begins at `start` and ends with the file.
    ///
    /// # Errors
    /// [`PipelineError::Stream`] if there is none.
    pub fn find<R: ReadAt>(file: &R, start: u64) -> Result<Self, PipelineError> {
        let end = file.len();
        let mut parser = Parser::mapped_ram_from(StreamOffset(start));
        let mut blocks: Vec<MappedBlock> = Vec::new();
        let mut headers = Vec::new();
        let mut bytes = Vec::new();
        if end > MOST_FILE_LEN {
            return Err(too_long(end).into());
        }
        loop {
            let position = parser.position().0;
            read(file, &mut bytes, position, end, PIECE_LEN)?;
            let element = parser.next(&bytes)?;
            let Some(element) = element.filter(|_| position < end) else {
                let why = parser.finish().map(drop);
                return Err(why.err().unwrap_or(StreamError::NotAStream).into());
            };
            match element.event {
                Event::MappedBlock {
                    block,
                    bitmap,
                    pages,
                } => {
                    headers.push(position + element.len as u64);
                    blocks.push(MappedBlock {
                        entry: blocks.last().map_or(start, MappedBlock::pages_end),
                        block: parser.blocks()[block].clone(),
                        bitmap,
                        pages,
                    });
                }
                Event::DeviceState => break,
                Event::Framing | Event::Page { .. } => {}
            }
        }
        let mut at = parser.position().0;
        while at < end {
            // One byte too many is refused by the parser.
            read(file, &mut bytes, at, end, MAX_DEVICE_STATE_LEN as u64 + 1)?;
            let Some(element) = parser.next(&bytes)? else {
                break;
            };
            at += element.len as u64;
        }
        let tail = blocks.last().map_or(start, MappedBlock::pages_end)..end;
        let mut found = FoundMapped {
            front: Vec::new(),
            stream: parser.finish()?,
            blocks,
            headers,
            tail,
        };
        if start > 0
            && let Some(first) = found.headers.first_mut()
        {
            let end = *first;
            *first -= start;
            found.front = found.beginning(file, start, end)?;
        }
        Ok(found)
    }

    /// The stream's beginning, and zeros up to the first bitmap.
    fn beginning<R: ReadAt>(
        &self,
        file: &R,
        start: u64,
        end: u64,
    ) -> Result<Vec<u8>, PipelineError> {
        let bitmap = self.blocks.first().map_or(end, |first| first.bitmap);
        let mut beginning = Vec::new();
        read(file, &mut beginning, start, end, end - start)?;
        let most = end + PAGE_LEN as u64;
        let len = usize::try_from(bitmap.min(most)).unwrap_or(0);
        beginning.resize(len.max(beginning.len()), 0);
        Ok(beginning)
    }

    /// Hashes all of it and names the chunks to `image`. `file` shows [`FoundMapped::front`] already.
    ///
    /// # Errors
    /// What cannot be read; [`PipelineError::Cancelled`].
    pub fn adopt<R: ReadAt>(
        mut self,
        file: &R,
        image: &mut ImageWriter<'_>,
        encoding: &Encoding,
        progress: &dyn Progress,
    ) -> Result<Encoded, PipelineError> {
        let parts = self.parts(file, encoding.chunk_len)?;
        let hashed = hash(file, &parts, encoding, progress)?;
        let names = self.blocks.iter();
        let names = names.map(|it| (it.block.idstr.clone(), it.block.used_length));
        let mut page_map = PageMapBuilder::new(&names.collect::<Vec<_>>());
        let mut mapper = Mapper {
            page_map: &mut page_map,
            next: (0, 0),
        };
        let mut number = 0;
        for (part, chunks) in parts.iter().zip(hashed) {
            for (first_page, chunk) in chunks {
                image.place_chunk(&chunk)?;
                if let Some(pages) = &part.pages {
                    mapper.zeros_until(&self.blocks, pages.block, first_page);
                    self.stream.data_pages += mapper.take(pages, first_page, &chunk, number);
                }
                number += 1;
            }
        }
        mapper.zeros_until(&self.blocks, self.blocks.len(), 0);
        let all: u64 = self.blocks.iter().map(MappedBlock::page_count).sum();
        self.stream.zero_pages = all.saturating_sub(self.stream.data_pages);
        Ok(Encoded {
            stream: self.stream,
            page_map: Some(page_map),
        })
    }

    /// Where to cut: framing with bitmaps, then for each aligned region of a block from its first page that is there to its
    /// last.
    fn parts<R: ReadAt>(&self, file: &R, chunk_len: usize) -> Result<Vec<Part>, PipelineError> {
        let mut parts = Vec::new();
        let region_pages = (chunk_len / PAGE_LEN).max(1).next_multiple_of(64) as u64;
        for (number, block) in self.blocks.iter().enumerate() {
            let entry = match number {
                0 => 0,
                _ => block.entry,
            };
            match self.headers.get(number) {
                Some(&header) if header != block.bitmap => {
                    cut(&mut parts, entry..header, chunk_len);
                    cut(&mut parts, block.bitmap..block.bitmap_end(), chunk_len);
                }
                _ => cut(&mut parts, entry..block.bitmap_end(), chunk_len),
            }
            let mut first = 0;
            let mut words = Vec::new();
            while first < block.page_count() {
                let pages = region_pages.min(block.page_count() - first);
                let at = block.bitmap + first / WORD_PAGES * 8;
                // Where the bitmap is a hole no page is there.
                let data = file.next_data(at).map_err(cannot_read(at))?;
                let skipped = data.saturating_sub(at) * 8 / region_pages * region_pages;
                if skipped > 0 {
                    first = first.saturating_add(skipped);
                    continue;
                }
                read(
                    file,
                    &mut words,
                    at,
                    block.bitmap_end(),
                    pages.div_ceil(WORD_PAGES) * 8,
                )?;
                let (bitmap, _) = words.as_chunks::<8>();
                let bitmap: Vec<u64> = bitmap.iter().copied().map(u64::from_le_bytes).collect();
                let is_there = |page: &u64| has(&bitmap, *page);
                if let Some(begin) = (0..pages).find(is_there) {
                    let last = (begin..pages).rev().find(is_there).unwrap_or(begin);
                    let start = block.page_offset(first + begin);
                    parts.push(Part {
                        range: start..block.page_offset(first + last + 1),
                        pages: Some(Pages {
                            block: number,
                            first: first + begin,
                            base: first,
                            bitmap,
                        }),
                    });
                }
                first += pages;
            }
        }
        cut(&mut parts, self.tail.clone(), chunk_len);
        Ok(parts)
    }
}

/// A piece of the file that becomes one chunk, or several where it has bytes that are no page's.
struct Part {
    range: Range<u64>,
    pages: Option<Pages>,
}

/// Which pages of a block a part holds.
struct Pages {
    block: usize,
    /// The page at the part's beginning.
    first: u64,
    /// The page of the first bit.
    base: u64,
    bitmap: Vec<u64>,
}

impl Pages {
    fn is_there(&self, page: u64) -> bool {
        has(&self.bitmap, page - self.base)
    }
}

fn cut(parts: &mut Vec<Part>, range: Range<u64>, len: usize) {
    let mut start = range.start;
    while start < range.end {
        let end = range.end.min(start + len as u64);
        parts.push(Part {
            range: start..end,
            pages: None,
        });
        start = end;
    }
}

/// The chunks of a part, each with the page that it begins with.
type Hashed = Vec<(u64, PlacedChunk)>;

/// Hashes parts, by all workers; gives the chunks of each.
fn hash<R: ReadAt>(
    file: &R,
    parts: &[Part],
    encoding: &Encoding,
    progress: &dyn Progress,
) -> Result<Vec<Hashed>, PipelineError> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Hashed)>, PipelineError> {
        let mut done = Vec::new();
        let mut bytes = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(part) = parts.get(number) else {
                return Ok(done);
            };
            if progress.is_cancelled() {
                return Err(PipelineError::Cancelled);
            }
            let len = part.range.end - part.range.start;
            read(file, &mut bytes, part.range.start, part.range.end, len)?;
            done.push((number, chunks_of(part, &bytes)));
            progress.advance(len);
        }
    };
    let joined = thread::scope(|scope| {
        let workers = 0..encoding.threads.max(1);
        let workers: Vec<_> = workers.map(|_| scope.spawn(work)).collect();
        let joined = workers.into_iter().map(|worker| worker.join());
        joined.collect::<Vec<_>>()
    });
    let mut hashed = Vec::new();
    for done in joined {
        hashed.extend(done.map_err(|_| PipelineError::Worker).flatten()?);
    }
    hashed.sort_by_key(|(number, _)| *number);
    Ok(hashed.into_iter().map(|(_, chunks)| chunks).collect())
}

fn chunks_of(part: &Part, bytes: &[u8]) -> Hashed {
    let chunk = |range: Range<usize>| PlacedChunk {
        offset: FileOffset(part.range.start + range.start as u64),
        len: u32::try_from(range.len()).unwrap_or(u32::MAX),
        crc: crc32c(&bytes[range.clone()]),
        digest: Digest::of(&bytes[range]),
    };
    let Some(pages) = &part.pages else {
        return vec![(0, chunk(0..bytes.len()))];
    };
    let mut chunks = Vec::new();
    let mut start = 0;
    let mut end = 0;
    for (number, page) in bytes.chunks(PAGE_LEN).enumerate() {
        let at = number * PAGE_LEN;
        let is_there = pages.is_there(pages.first + number as u64);
        if is_there {
            end = at + PAGE_LEN;
        } else if !is_zero(page) || end <= start {
            if end > start {
                chunks.push((start, end));
            }
            (start, end) = (at + PAGE_LEN, at + PAGE_LEN);
        }
    }
    if end > start {
        chunks.push((start, end));
    }
    let first = |start: usize| pages.first + (start / PAGE_LEN) as u64;
    let chunks = chunks.into_iter();
    chunks
        .map(|(start, end)| (first(start), chunk(start..end)))
        .collect()
}

/// Draws the page map, block after block.
struct Mapper<'a> {
    page_map: &'a mut PageMapBuilder,
    /// The block, and its page, that come next.
    next: (usize, u64),
}

impl Mapper<'_> {
    fn zeros_until(&mut self, blocks: &[MappedBlock], block: usize, page: u64) {
        while self.next.0 < block.min(blocks.len()) {
            let (number, first) = self.next;
            self.page_map
                .zeros(number, first, blocks[number].page_count() - first);
            self.next = (number + 1, 0);
        }
        if block < blocks.len() {
            let (number, first) = self.next;
            self.page_map.zeros(number, first, page - first);
            self.next.1 = page;
        }
    }

    /// Enters the pages of a chunk; gives how many have bytes.
    fn take(&mut self, pages: &Pages, first_page: u64, chunk: &PlacedChunk, number: u32) -> u64 {
        let count = u64::from(chunk.len) / PAGE_LEN as u64;
        let end = first_page + count;
        let mut there = 0;
        let mut body = 0;
        for first in (first_page..end).step_by(64) {
            let run = u32::try_from((end - first).min(WORD_PAGES)).unwrap_or(64);
            let bits = (0..run).filter(|index| pages.is_there(first + u64::from(*index)));
            let data: u64 = bits.fold(0, |data, index| data | 1 << index);
            there += u64::from(data.count_ones());
            self.page_map
                .plain(pages.block, first, run, (number, body), data);
            body += run * 4096;
        }
        self.next.1 = end;
        there
    }
}

/// Reads up to `most` bytes at `start`, which end at `end` at the latest.
fn read<R: ReadAt>(
    file: &R,
    bytes: &mut Vec<u8>,
    start: u64,
    end: u64,
    most: u64,
) -> Result<(), PipelineError> {
    let len = end.min(file.len()).saturating_sub(start).min(most);
    bytes.resize(usize::try_from(len).unwrap_or(usize::MAX), 0);
    file.read_exact_at(bytes, start)
        .map_err(cannot_read(start))?;
    Ok(())
}

fn cannot_read(at: u64) -> impl Fn(std::io::Error) -> ContainerError {
    move |source| ContainerError::Read {
        at: FileOffset(at),
        source,
    }
}

fn too_long(len: u64) -> StreamError {
    StreamError::TooLong {
        at: Place {
            offset: StreamOffset(0),
            section: None,
            is_inside: false,
        },
        what: "the file",
        len,
        limit: MOST_FILE_LEN,
    }
}
