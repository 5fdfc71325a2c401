//! Chunks → guest memory: workers read, check and decompress, and put the pages where QEMU keeps them; the caller gets
//! only the rest of the stream: framing, pages of other RAMBlocks, device state.
//!
//! QEMU accepts a stream in which pages are missing and keeps what it finds in memory. Where a worker may put a chunk
//! the page map tells, for only with it a chunk is known to hold pages of a RAMBlock before those in front of it were
//! read. It is a hint: behind the workers, in stream order, the parser of the saves reads every record, and what it finds
//! has to be what they did. So QEMU's memory is what the stream says, or the restore fails.
//!
//! The caller gets a byte of the stream only when every page before it is in its place. Device state comes behind
//! all pages; what QEMU does when it loads it, such as reading the rings of virtio, finds memory complete.
//!
//! Source: QEMU `migration/ram.c`, `ram_load_precopy`; spec/qemu-stream.md §12.

use std::io::IoSlice;
use std::ops::Range;

use super::PipelineError;
use super::decode::work;
use crate::bytes::ReadAt;
use crate::container::{Image, PageMap};
use crate::host::{HostError, MOST_SLICES, ProcessMemory};
use crate::progress::Progress;
use crate::stream::{Event, Parser, wire};
use crate::units::{ChunkIndex, PAGE_LEN};

/// Where QEMU keeps a RAMBlock.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The RAMBlock.
    pub idstr: String,
    /// Its length in bytes, whole pages.
    pub used_length: u64,
    /// The address of its first byte in QEMU's memory, which is private and anonymous.
    pub address: u64,
    /// The pages that may hold something else than zeros, in ascending order.
    pub touched: Vec<Range<u64>>,
}

/// Which chunk goes where.
#[derive(Debug)]
pub struct Placement<'a> {
    memory: &'a ProcessMemory,
    destinations: Vec<Destination>,
    /// For each chunk the destination of its first page with bytes.
    first: Vec<Option<u16>>,
}

impl<'a> Placement<'a> {
    /// Lays the RAMBlocks of `page_map` that have a destination over the chunks of an image.
    ///
    /// Each page of theirs has to be named once, see [`PageMap::names_once`].
    pub fn new(
        memory: &'a ProcessMemory,
        destinations: Vec<Destination>,
        page_map: &PageMap,
    ) -> Self {
        let of_block = |idstr: &str| destinations.iter().position(|one| one.idstr == idstr);
        let blocks = page_map.blocks().iter();
        let targets: Vec<Option<u16>> = blocks
            .map(|block| u16::try_from(of_block(&block.idstr)?).ok())
            .collect();
        let mut first = Vec::new();
        let mut known = ChunkIndex(0);
        for (chunk, block) in page_map.chunk_blocks() {
            let Ok(index) = usize::try_from(chunk.0) else {
                break;
            };
            if index >= first.len() || chunk > known {
                first.resize(first.len().max(index + 1), None);
                first[index] = targets.get(block).copied().flatten();
                known = chunk;
            }
        }
        Placement {
            memory,
            destinations,
            first,
        }
    }

    fn destination(&self, chunk: ChunkIndex) -> Option<&Destination> {
        let first = self.first.get(usize::try_from(chunk.0).ok()?)?;
        self.destinations.get(usize::from((*first)?))
    }

    /// Puts the pages of a chunk in their places, if it holds nothing else; whether it did.
    fn take(&self, chunk: ChunkIndex, raw: &[u8]) -> Result<bool, HostError> {
        let Some(destination) = self.destination(chunk) else {
            return Ok(false);
        };
        let Some(pages) = pages_only(raw, destination) else {
            return Ok(false);
        };
        let mut span = Span::new(self.memory, destination);
        for (page, bytes) in pages {
            span.push(page, bytes)?;
        }
        span.write()?;
        Ok(true)
    }
}

/// The pages with bytes, if `raw` is nothing but page records of the RAMBlock.
fn pages_only<'r>(raw: &'r [u8], block: &Destination) -> Option<Vec<(u64, &'r [u8])>> {
    let mut pages = Vec::with_capacity(raw.len() / PAGE_LEN);
    let mut rest = raw;
    let mut begins_unnamed = false;
    while !rest.is_empty() {
        let (word, behind) = rest.split_first_chunk::<8>()?;
        let word = u64::from_be_bytes(*word);
        let flags = word & wire::RAM_SAVE_FLAG_MASK;
        let offset = word - flags;
        rest = behind;
        if flags & wire::RAM_SAVE_FLAG_CONTINUE != 0 {
            // Before the first name it may be of any block.
            begins_unnamed |= rest.len() + 8 == raw.len();
        } else if begins_unnamed {
            return None;
        } else {
            let (len, behind) = rest.split_first()?;
            let (idstr, behind) = behind.split_at_checked(usize::from(*len))?;
            (idstr == block.idstr.as_bytes()).then_some(())?;
            rest = behind;
        }
        (offset < block.used_length).then_some(())?;
        let (body, behind) = match flags & !wire::RAM_SAVE_FLAG_CONTINUE {
            wire::RAM_SAVE_FLAG_PAGE => rest.split_at_checked(PAGE_LEN)?,
            wire::RAM_SAVE_FLAG_ZERO => rest.split_at_checked(1)?,
            _ => return None,
        };
        if body.len() == PAGE_LEN {
            pages.push((offset / PAGE_LEN as u64, body));
        }
        rest = behind;
    }
    Some(pages)
}

/// Pages that follow each other, to be written at once.
struct Span<'a> {
    memory: &'a ProcessMemory,
    address: u64,
    first: u64,
    parts: Vec<IoSlice<'a>>,
}

impl<'a> Span<'a> {
    fn new(memory: &'a ProcessMemory, destination: &Destination) -> Self {
        Span {
            memory,
            address: destination.address,
            first: 0,
            parts: Vec::new(),
        }
    }

    fn push(&mut self, page: u64, bytes: &'a [u8]) -> Result<(), HostError> {
        if page != self.first + self.parts.len() as u64 || self.parts.len() == MOST_SLICES {
            self.write()?;
            self.first = page;
        }
        self.parts.push(IoSlice::new(bytes));
        Ok(())
    }

    fn write(&mut self) -> Result<(), HostError> {
        if self.parts.is_empty() {
            return Ok(());
        }
        let address = self.address + self.first * PAGE_LEN as u64;
        let written = self.memory.write(address, &self.parts);
        self.parts.clear();
        written
    }
}

/// Puts guest memory in its place and gives the rest of the stream, in order, to `output`.
///
/// No byte of a chunk is used before the chunk's checksum and digest were found right.
///
/// # Errors
/// [`PipelineError::Container`] for the first damaged chunk, [`PipelineError::Place`], [`PipelineError::Stream`] and
/// [`PipelineError::PageMap`], what `output` says, or [`PipelineError::Cancelled`]. QEMU's memory is of no use then.
pub fn place<R: ReadAt>(
    image: &Image<R>,
    threads: usize,
    progress: &dyn Progress,
    placement: &Placement<'_>,
    output: &mut dyn FnMut(&[u8]) -> Result<(), PipelineError>,
) -> Result<(), PipelineError> {
    let mut follower = Follower::new(placement, output);
    work(
        image,
        threads,
        progress,
        &|entry, raw| placement.take(entry.index, raw),
        &mut |entry, done| {
            let (raw, is_placed) = done?;
            match is_placed.map_err(PipelineError::Place)? {
                true => follower.confirm(entry.index, raw),
                false => follower.take(raw),
            }
        },
    )?;
    follower.finish()
}

/// Reads the stream behind the workers.
struct Follower<'a> {
    placement: &'a Placement<'a>,
    output: &'a mut dyn FnMut(&[u8]) -> Result<(), PipelineError>,
    parser: Parser,
    /// For each RAMBlock of the stream its destination; empty before the block list.
    targets: Vec<Option<usize>>,
    /// How many pages of each destination came.
    page_counts: Vec<u64>,
    /// The beginning of an element whose end is in the next chunk.
    begun: Vec<u8>,
}

impl<'a> Follower<'a> {
    fn new(
        placement: &'a Placement<'a>,
        output: &'a mut dyn FnMut(&[u8]) -> Result<(), PipelineError>,
    ) -> Self {
        Follower {
            placement,
            output,
            parser: Parser::new(),
            targets: Vec::new(),
            page_counts: vec![0; placement.destinations.len()],
            begun: Vec::new(),
        }
    }

    /// Holds a chunk that a worker put in its place against the stream.
    fn confirm(&mut self, chunk: ChunkIndex, raw: &[u8]) -> Result<(), PipelineError> {
        if !self.begun.is_empty() {
            return Err(self.disagrees());
        }
        let placement = self.placement;
        let expected = placement.destination(chunk);
        let mut zeros = None;
        let mut parsed = 0;
        while parsed < raw.len() {
            let element = self.parser.next(&raw[parsed..])?;
            let Some((
                element,
                Event::Page {
                    block,
                    page,
                    is_zero,
                    ..
                },
            )) = element.map(|element| (element, element.event))
            else {
                return Err(self.disagrees());
            };
            let target = self.target(block).ok_or_else(|| self.disagrees())?;
            let destination = &placement.destinations[target];
            if expected.is_none_or(|expected| expected.address != destination.address) {
                return Err(self.disagrees());
            }
            self.page_counts[target] += 1;
            if is_zero {
                let zeros = zeros.get_or_insert_with(|| Span::new(placement.memory, destination));
                zero(zeros, destination, page.0)?;
            }
            parsed += element.len;
        }
        match zeros {
            Some(mut zeros) => zeros.write().map_err(PipelineError::Place),
            None => Ok(()),
        }
    }

    /// Takes in a chunk of which nothing is done yet.
    fn take(&mut self, raw: &[u8]) -> Result<(), PipelineError> {
        if self.begun.is_empty() {
            let parsed = self.split(raw)?;
            self.begun.extend_from_slice(&raw[parsed..]);
            return Ok(());
        }
        let mut bytes = std::mem::take(&mut self.begun);
        bytes.extend_from_slice(raw);
        let parsed = self.split(&bytes)?;
        bytes.drain(..parsed);
        self.begun = bytes;
        Ok(())
    }

    /// Puts pages that have a destination in their places and passes on what lies between them. Gives how many bytes
    /// were parsed.
    fn split(&mut self, bytes: &[u8]) -> Result<usize, PipelineError> {
        let placement = self.placement;
        let (mut passed, mut parsed) = (0, 0);
        let mut span: Option<(usize, Span<'_>)> = None;
        while parsed < bytes.len() {
            let Some(element) = self.parser.next(&bytes[parsed..])? else {
                break;
            };
            let end = parsed + element.len;
            if let Event::Page {
                block,
                page,
                is_zero,
                body,
            } = element.event
                && let Some(target) = self.target(block)
            {
                if passed < parsed {
                    write(span.take())?;
                    self.pass(&bytes[passed..parsed])?;
                }
                passed = end;
                self.page_counts[target] += 1;
                let destination = &placement.destinations[target];
                if span.as_ref().is_some_and(|(of, _)| *of != target) {
                    write(span.take())?;
                }
                let new = || (target, Span::new(placement.memory, destination));
                let (_, span) = span.get_or_insert_with(new);
                if is_zero {
                    zero(span, destination, page.0)?;
                } else {
                    let page_bytes = &bytes[parsed + body..end];
                    span.push(page.0, page_bytes)
                        .map_err(PipelineError::Place)?;
                }
            }
            parsed = end;
        }
        write(span)?;
        self.pass(&bytes[passed..parsed])?;
        Ok(parsed)
    }

    fn pass(&mut self, bytes: &[u8]) -> Result<(), PipelineError> {
        match bytes {
            [] => Ok(()),
            bytes => (self.output)(bytes),
        }
    }

    /// The destination of a RAMBlock of the stream.
    fn target(&mut self, block: usize) -> Option<usize> {
        if self.targets.is_empty() {
            let destinations = &self.placement.destinations;
            let blocks = self.parser.blocks().iter();
            let targets = blocks.map(|block| {
                let mut destinations = destinations.iter();
                destinations.position(|one| {
                    (&one.idstr, one.used_length) == (&block.idstr, block.used_length)
                })
            });
            self.targets = targets.collect();
        }
        self.targets.get(block).copied().flatten()
    }

    /// The stream is over: it has to be whole, and to hold each page that has a destination once.
    fn finish(self) -> Result<(), PipelineError> {
        let disagrees = self.disagrees();
        self.parser.finish()?;
        let destinations = self.placement.destinations.iter();
        let mut counts = destinations.zip(self.page_counts);
        match counts.all(|(one, count)| one.used_length == count * PAGE_LEN as u64) {
            true => Ok(()),
            false => Err(disagrees),
        }
    }

    fn disagrees(&self) -> PipelineError {
        let at = self.parser.position();
        PipelineError::PageMap { at }
    }
}

/// Makes a page zero, unless it is.
fn zero(span: &mut Span<'_>, destination: &Destination, page: u64) -> Result<(), PipelineError> {
    const ZEROS: [u8; PAGE_LEN] = [0; PAGE_LEN];
    let touched = &destination.touched;
    let behind = touched.partition_point(|range| range.end <= page);
    match touched.get(behind) {
        Some(range) if range.contains(&page) => {
            span.push(page, &ZEROS).map_err(PipelineError::Place)
        }
        _ => Ok(()),
    }
}

fn write(span: Option<(usize, Span<'_>)>) -> Result<(), PipelineError> {
    match span {
        Some((_, mut span)) => span.write().map_err(PipelineError::Place),
        None => Ok(()),
    }
}
