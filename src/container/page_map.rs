//! `PMAP`: where every page of guest memory lies.
//!
//! [`PageMapBuilder`] is told each page record as the stream goes by and merges them into runs; [`PageMap`] answers
//! where a page lies. Where a page was sent twice the later record holds.
//!
//! Source: spec/container.md §7.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::units::{ChunkIndex, FileOffset, PAGE_LEN, PageIndex};

use super::error::ContainerError;
use super::layout::{PAGE_RUN_LEN, SectionType, array, page_run, put, u16_at, u32_at, u64_at};

/// Most pages of a run that has bytes: one bit each in `DATA`.
const MAX_DATA_PAGES: u32 = 64;
/// Bytes of a record's header, with `RAM_SAVE_FLAG_CONTINUE`.
const RECORD_HEADER_LEN: u32 = 8;
const PAGE_LEN_U32: u32 = 4096;
const PAGE_LEN_U64: u64 = PAGE_LEN as u64;

/// `RUN_KIND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunKind {
    Zero,
    Records,
    Plain,
}

impl RunKind {
    fn number(self) -> u8 {
        match self {
            RunKind::Zero => 0,
            RunKind::Records => 1,
            RunKind::Plain => 2,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [RunKind::Zero, RunKind::Records, RunKind::Plain]
            .into_iter()
            .find(|kind| kind.number() == number)
    }
}

/// Consecutive pages of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) block: u16,
    pub(super) kind: RunKind,
    pub(super) page_count: u32,
    pub(super) first_page: u64,
    pub(super) chunk: u32,
    body: u32,
    pub(super) data: u64,
}

impl Run {
    fn write(&self) -> [u8; PAGE_RUN_LEN] {
        let mut bytes = [0; PAGE_RUN_LEN];
        put(&mut bytes, page_run::BLOCK, &self.block.to_le_bytes());
        put(&mut bytes, page_run::RUN_KIND, &[self.kind.number()]);
        put(
            &mut bytes,
            page_run::PAGE_COUNT,
            &self.page_count.to_le_bytes(),
        );
        put(
            &mut bytes,
            page_run::FIRST_PAGE,
            &self.first_page.to_le_bytes(),
        );
        put(&mut bytes, page_run::CHUNK, &self.chunk.to_le_bytes());
        put(&mut bytes, page_run::BODY, &self.body.to_le_bytes());
        put(&mut bytes, page_run::DATA, &self.data.to_le_bytes());
        bytes
    }

    /// Parses run `index`, at file offset `at`.
    fn parse(
        bytes: &[u8; PAGE_RUN_LEN],
        index: u64,
        at: FileOffset,
    ) -> Result<Self, ContainerError> {
        let wrong = |field| ContainerError::WrongRun {
            run: index,
            field,
            at,
        };
        let run = Run {
            block: u16_at(bytes, page_run::BLOCK),
            kind: RunKind::from_number(bytes[page_run::RUN_KIND.start])
                .ok_or_else(|| wrong("RUN_KIND"))?,
            page_count: u32_at(bytes, page_run::PAGE_COUNT),
            first_page: u64_at(bytes, page_run::FIRST_PAGE),
            chunk: u32_at(bytes, page_run::CHUNK),
            body: u32_at(bytes, page_run::BODY),
            data: u64_at(bytes, page_run::DATA),
        };
        if bytes[3] != 0 {
            return Err(ContainerError::NotZero {
                section: SectionType::PageMap,
                at,
            });
        }
        let is_zero = run.kind == RunKind::Zero;
        if run.page_count == 0 || (!is_zero && run.page_count > MAX_DATA_PAGES) {
            return Err(wrong("PAGE_COUNT"));
        }
        if is_zero && (run.chunk, run.body, run.data) != (0, 0, 0) {
            return Err(ContainerError::NotZero {
                section: SectionType::PageMap,
                at,
            });
        }
        if !is_zero && run.data.checked_shr(run.page_count).unwrap_or(0) != 0 {
            return Err(wrong("DATA"));
        }
        Ok(run)
    }

    /// Where page `index` of the run has its body, counted from the chunk's start.
    fn body_of(&self, index: u32) -> u64 {
        let before = u64::from(index);
        match self.kind {
            RunKind::Zero => 0,
            RunKind::Plain => u64::from(self.body) + before * PAGE_LEN_U64,
            RunKind::Records => {
                let mask = 1u64.checked_shl(index).map_or(u64::MAX, |bit| bit - 1);
                let data_pages = u64::from((self.data & mask).count_ones());
                let headers = before * u64::from(RECORD_HEADER_LEN);
                u64::from(self.body) + headers + data_pages * PAGE_LEN_U64 + (before - data_pages)
            }
        }
    }

    /// Where the last body ends, counted from the chunk's start.
    fn end(&self) -> u64 {
        match self.kind {
            RunKind::Records => self
                .body_of(self.page_count)
                .saturating_sub(RECORD_HEADER_LEN.into()),
            RunKind::Zero | RunKind::Plain => self.body_of(self.page_count),
        }
    }

    /// Whether `page`, which is one of the run's, has bytes.
    pub(super) fn has_data(&self, page: u64) -> bool {
        let index = u32::try_from(page - self.first_page).unwrap_or(u32::MAX);
        self.data.checked_shr(index).unwrap_or(0) & 1 == 1
    }

    pub(super) fn locate(&self, page: u64) -> PageLocation {
        let index = u32::try_from(page - self.first_page).unwrap_or(u32::MAX);
        match u32::try_from(self.body_of(index)) {
            Ok(body) if self.has_data(page) => PageLocation::Data {
                chunk: ChunkIndex(self.chunk.into()),
                body,
            },
            _ => PageLocation::Zero,
        }
    }
}

/// Makes the payload of `PMAP` while the stream goes by.
///
/// Holds 32 bytes for each run: at best 64 pages with bytes, or any number of zero pages.
#[derive(Debug)]
pub struct PageMapBuilder {
    blocks: Vec<Block>,
    runs: Vec<Run>,
    open: Option<Run>,
    /// Where the open run's next page would have its body.
    next_body: u32,
}

impl PageMapBuilder {
    /// A builder for these RAMBlocks: idstr and used length, in stream order.
    pub fn new(blocks: &[(String, u64)]) -> Self {
        let block = |(idstr, used_length): &(String, u64)| Block {
            idstr: idstr.clone(),
            used_length: *used_length,
        };
        PageMapBuilder {
            blocks: blocks.iter().map(block).collect(),
            runs: Vec::new(),
            open: None,
            next_body: 0,
        }
    }

    /// Takes in the next page record: its block and page, the chunk it lies in, and where its body (4096 bytes, or the
    /// one byte of a zero page) begins in that chunk.
    #[inline]
    pub fn page(&mut self, block: usize, page: u64, chunk: u32, body: u32, is_zero: bool) {
        let bit = u64::from(!is_zero);
        let body_len = if is_zero { 1 } else { PAGE_LEN_U32 };
        if let Some(run) = &mut self.open
            && run.page_count < MAX_DATA_PAGES
            && usize::from(run.block) == block
            && run.first_page + u64::from(run.page_count) == page
            && (run.chunk, self.next_body) == (chunk, body)
        {
            run.data |= bit << run.page_count;
            run.page_count += 1;
        } else {
            self.close();
            let Ok(block) = u16::try_from(block) else {
                return;
            };
            let (kind, page_count, first_page) = (RunKind::Records, 1, page);
            self.open = Some(Run {
                block,
                kind,
                page_count,
                first_page,
                chunk,
                body,
                data: bit,
            });
        }
        self.next_body = body.saturating_add(body_len + RECORD_HEADER_LEN);
    }

    /// Takes in the next pages of a block that lie at places of their own: at most 64, of which bit i of `data` says whether
    /// page `first_page` + i lies at `body` + 4096 × i of the chunk. Those whose bit is clear are zero.
    pub fn plain(
        &mut self,
        block: usize,
        first_page: u64,
        page_count: u32,
        at: (u32, u32),
        data: u64,
    ) {
        self.close();
        let Ok(block) = u16::try_from(block) else {
            return;
        };
        let (chunk, body) = at;
        self.open = Some(Run {
            block,
            kind: RunKind::Plain,
            page_count,
            first_page,
            chunk,
            body,
            data,
        });
        self.close();
    }

    /// Takes in the next pages of a block, all of which are zero.
    pub fn zeros(&mut self, block: usize, first_page: u64, page_count: u64) {
        let (mut first_page, mut left) = (first_page, page_count);
        while left > 0 {
            let count = u32::try_from(left).unwrap_or(u32::MAX);
            self.plain(block, first_page, count, (0, 0), 0);
            first_page += u64::from(count);
            left -= u64::from(count);
        }
    }

    /// The first page that no record named, if there is one; a map that lacks a page must not be stored.
    pub fn first_missing(&mut self) -> Option<(String, PageIndex)> {
        self.close();
        let index = Index::of(&self.runs, self.blocks.len());
        let (block, page) = index.first_missing(&self.blocks)?;
        Some((self.blocks[block].idstr.clone(), page))
    }

    /// The payload of the section.
    pub fn finish(mut self) -> Vec<u8> {
        self.close();
        let mut list = Vec::new();
        for block in &self.blocks {
            let idstr = &block.idstr.as_bytes()[..block.idstr.len().min(255)];
            list.push(u8::try_from(idstr.len()).unwrap_or(u8::MAX));
            list.extend_from_slice(idstr);
            list.extend_from_slice(&block.used_length.to_le_bytes());
        }
        let block_count = u32::try_from(self.blocks.len()).unwrap_or(u32::MAX);
        let mut payload = Vec::with_capacity(24 + list.len() + self.runs.len() * PAGE_RUN_LEN);
        payload.extend_from_slice(&block_count.to_le_bytes());
        payload.extend_from_slice(&PAGE_LEN_U32.to_le_bytes());
        payload.extend_from_slice(&(self.runs.len() as u64).to_le_bytes());
        payload.extend_from_slice(&(list.len() as u64).to_le_bytes());
        payload.extend_from_slice(&list);
        self.runs
            .iter()
            .for_each(|run| payload.extend_from_slice(&run.write()));
        payload
    }

    /// Ends the open run; zero runs grow their predecessor where they continue it.
    fn close(&mut self) {
        let Some(mut run) = self.open.take() else {
            return;
        };
        if run.data == 0 {
            (run.kind, run.chunk, run.body) = (RunKind::Zero, 0, 0);
            if let Some(last) = self.runs.last_mut()
                && last.kind == RunKind::Zero
                && last.block == run.block
                && last.first_page + u64::from(last.page_count) == run.first_page
                && let Some(page_count) = last.page_count.checked_add(run.page_count)
            {
                last.page_count = page_count;
                return;
            }
        }
        self.runs.push(run);
    }
}

/// A RAMBlock of the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// QEMU's name for it.
    pub idstr: String,
    /// Bytes in use.
    pub used_length: u64,
}

impl Block {
    /// Pages in use.
    pub fn page_count(&self) -> u64 {
        self.used_length.div_ceil(PAGE_LEN_U64)
    }
}

/// Where a page lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageLocation {
    /// Nowhere: all its bytes are zero.
    Zero,
    /// Its 4096 bytes begin at `body` in the raw bytes of `chunk`.
    Data {
        /// Which chunk.
        chunk: ChunkIndex,
        /// Position in its raw bytes.
        body: u32,
    },
}

/// A page map as read: checked, complete, and quick to ask.
#[derive(Debug)]
pub struct PageMap {
    blocks: Vec<Block>,
    pub(super) runs: Vec<Run>,
    pub(super) index: Index,
}

impl PageMap {
    /// Parses the payload of the `PMAP` section at `at` of an image with so many chunks of at most so many bytes.
    ///
    /// # Errors
    /// Whatever spec §7 refuses; a run is held against the length of its own chunk in
    /// [`Image::verify_sections`](super::Image::verify_sections) only.
    pub(super) fn parse(
        payload: &[u8],
        at: FileOffset,
        chunk_count: u64,
        max_chunk_len: u32,
    ) -> Result<Self, ContainerError> {
        let (blocks, run_bytes) = split(payload, at)?;
        let (run_bytes, _) = run_bytes.as_chunks::<PAGE_RUN_LEN>();
        let mut runs = Vec::with_capacity(run_bytes.len());
        for (index, bytes) in (0..).zip(run_bytes) {
            let run = Run::parse(bytes, index, at)?;
            let wrong = |field| ContainerError::WrongRun {
                run: index,
                field,
                at,
            };
            let block = blocks
                .get(usize::from(run.block))
                .ok_or_else(|| wrong("BLOCK"))?;
            let end = run.first_page.checked_add(run.page_count.into());
            if end.is_none_or(|end| end > block.page_count()) {
                return Err(wrong("FIRST_PAGE"));
            }
            if run.kind != RunKind::Zero && u64::from(run.chunk) >= chunk_count {
                return Err(wrong("CHUNK"));
            }
            if run.end() > max_chunk_len.into() {
                return Err(wrong("BODY"));
            }
            runs.push(run);
        }
        let index = Index::of(&runs, blocks.len());
        if let Some((block, page)) = index.first_missing(&blocks) {
            return Err(ContainerError::PageMissing {
                block: blocks[block].idstr.clone(),
                page,
                at,
            });
        }
        Ok(PageMap {
            blocks,
            runs,
            index,
        })
    }

    /// Holds every run against the raw length of its chunk.
    pub(super) fn check_chunks(
        &self,
        raw_lens: &[u32],
        at: FileOffset,
    ) -> Result<(), ContainerError> {
        for (index, run) in (0..).zip(&self.runs) {
            let raw_len = raw_lens.get(run.chunk as usize).copied().unwrap_or(0);
            if run.kind != RunKind::Zero && run.end() > raw_len.into() {
                return Err(ContainerError::WrongRun {
                    run: index,
                    field: "BODY",
                    at,
                });
            }
        }
        Ok(())
    }

    /// The RAMBlocks, in stream order.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Number of runs in the section.
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// Where `page` of `block` (an index into [`PageMap::blocks`]) lies; `None` if there is no such page.
    pub fn locate(&self, block: usize, page: PageIndex) -> Option<PageLocation> {
        let segments = self.index.segments.get(block)?;
        let behind = segments.partition_point(|segment| segment.first_page <= page.0);
        let segment = segments.get(behind.checked_sub(1)?)?;
        let run = self
            .runs
            .get(segment.run)
            .filter(|_| page.0 < segment.end)?;
        Some(run.locate(page.0))
    }

    /// Which pages have their bytes in `chunk`: of each block from the first one to behind the last.
    pub fn pages_in(&self, chunk: ChunkIndex) -> Vec<(&Block, Range<PageIndex>)> {
        let mut found: BTreeMap<u16, Range<PageIndex>> = BTreeMap::new();
        for run in self.runs.iter().filter(|run| run.kind != RunKind::Zero) {
            if u64::from(run.chunk) == chunk.0 {
                let first = PageIndex(run.first_page);
                let end = PageIndex(first.0 + u64::from(run.page_count));
                let pages = found.entry(run.block).or_insert(first..end);
                *pages = pages.start.min(first)..pages.end.max(end);
            }
        }
        let block = |(block, pages)| Some((self.blocks.get(usize::from(block))?, pages));
        found.into_iter().filter_map(block).collect()
    }

    /// Where `len` pages of `block` from `first` on lie; ends early at the block's end.
    pub fn locate_range(
        &self,
        block: usize,
        first: PageIndex,
        len: u64,
    ) -> impl Iterator<Item = (PageIndex, PageLocation)> + '_ {
        let pages = first.0..first.0.saturating_add(len);
        pages.map_while(move |page| Some((PageIndex(page), self.locate(block, PageIndex(page))?)))
    }
}

/// The block list and the bytes of the runs.
fn split(payload: &[u8], at: FileOffset) -> Result<(Vec<Block>, &[u8]), ContainerError> {
    let section = SectionType::PageMap;
    let found = payload.len() as u64;
    let Some((fixed, rest)) = payload.split_first_chunk::<24>() else {
        return Err(ContainerError::LengthMismatch {
            section,
            at,
            expected: 24,
            found,
        });
    };
    let wrong = |field, found| ContainerError::WrongField {
        section,
        field,
        at,
        found,
    };
    let (block_count, page_size) = (u32_at(fixed, 0..4), u32_at(fixed, 4..8));
    let (run_count, blocks_len) = (u64_at(fixed, 8..16), u64_at(fixed, 16..24));
    if page_size != PAGE_LEN_U32 {
        return Err(wrong("PAGE_SIZE", page_size.into()));
    }
    if block_count > 65535 {
        return Err(wrong("BLOCK_COUNT", block_count.into()));
    }
    let list_len = usize::try_from(blocks_len)
        .ok()
        .filter(|len| *len <= rest.len());
    let (list, runs) = rest.split_at(list_len.ok_or_else(|| wrong("BLOCKS_LEN", blocks_len))?);
    if run_count.checked_mul(PAGE_RUN_LEN as u64) != Some(runs.len() as u64) {
        return Err(wrong("RUN_COUNT", run_count));
    }
    let blocks = parse_blocks(list, block_count).ok_or(ContainerError::WrongBlockList { at })?;
    Ok((blocks, runs))
}

/// `None` if the list is not exactly `count` blocks.
fn parse_blocks(mut list: &[u8], count: u32) -> Option<Vec<Block>> {
    let mut blocks = Vec::new();
    for _ in 0..count {
        let (idstr_len, rest) = list.split_first()?;
        let (idstr, rest) = rest.split_at_checked(usize::from(*idstr_len))?;
        let (used_length, rest) = rest.split_first_chunk::<8>()?;
        let idstr = std::str::from_utf8(idstr).ok()?.to_owned();
        blocks.push(Block {
            idstr,
            used_length: u64::from_le_bytes(array(used_length, 0..8)),
        });
        list = rest;
    }
    list.is_empty().then_some(blocks)
}

/// For each block, which run holds for which pages: disjoint, ascending.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) segments: Vec<Vec<Segment>>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub(super) first_page: u64,
    pub(super) end: u64,
    pub(super) run: usize,
}

impl Index {
    /// Lays the runs over each other, later ones on top.
    fn of(runs: &[Run], block_count: usize) -> Self {
        let mut layers = vec![BTreeMap::new(); block_count];
        for (number, run) in runs.iter().enumerate() {
            if let Some(layer) = layers.get_mut(usize::from(run.block)) {
                let end = run.first_page.saturating_add(run.page_count.into());
                lay_over(
                    layer,
                    Segment {
                        first_page: run.first_page,
                        end,
                        run: number,
                    },
                );
            }
        }
        let segments = layers
            .into_iter()
            .map(|layer| layer.into_values().collect());
        Index {
            segments: segments.collect(),
        }
    }

    fn first_missing(&self, blocks: &[Block]) -> Option<(usize, PageIndex)> {
        for (number, (block, segments)) in blocks.iter().zip(&self.segments).enumerate() {
            let mut covered = 0;
            for segment in segments {
                if segment.first_page != covered {
                    break;
                }
                covered = segment.end;
            }
            if covered < block.page_count() {
                return Some((number, PageIndex(covered)));
            }
        }
        None
    }
}

/// Puts `new` over whatever lies there, cutting what it covers.
fn lay_over(layer: &mut BTreeMap<u64, Segment>, new: Segment) {
    let below = layer
        .range(..new.end)
        .next_back()
        .map(|(_, segment)| *segment);
    if below.is_some_and(|below| below.end > new.first_page) {
        cut(layer, new.first_page, new.end);
    }
    layer.insert(new.first_page, new);
}

/// Removes the pages `start..end` from every segment of the layer.
fn cut(layer: &mut BTreeMap<u64, Segment>, start: u64, end: u64) {
    while let Some((_, old)) = layer
        .range(..end)
        .next_back()
        .filter(|(_, old)| old.end > start)
    {
        let old = *old;
        layer.remove(&old.first_page);
        if old.end > end {
            layer.insert(
                end,
                Segment {
                    first_page: end,
                    ..old
                },
            );
        }
        if old.first_page < start {
            layer.insert(old.first_page, Segment { end: start, ..old });
        }
    }
}

#[cfg(test)]
mod tests;
