//! Captured regions → image, in order: zero regions gathered as the [chunker](super::chunker) gathers them.

use super::chunker::ZERO_REGIONS;
use super::region::Region;
use super::sealing::{Buffer, Sealed, Sealer, append};
use super::{Encoding, PipelineError};
use crate::container::{ImageWriter, PageMapBuilder};
use crate::progress::Progress;
use crate::stream::RamBlock;
use crate::stream::writer::{RECORD_WORD_LEN, push_str8, record_word};
use crate::units::{PAGE_LEN, PageIndex};

/// How many page records there are, and how long.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Records that carry bytes.
    pub data_pages: u64,
    /// Records of zero pages.
    pub zero_pages: u64,
    /// Bytes of all page records.
    pub len: u64,
}

/// Pages of one block, one after the other, that are all zero and not in the image yet.
struct ZeroRun {
    block: usize,
    first_page: u64,
    page_count: u64,
}

/// Appends chunks, and draws the page map.
pub struct Gatherer<'a, 's> {
    image: &'a mut ImageWriter<'s>,
    blocks: Vec<RamBlock>,
    sealer: Sealer,
    progress: &'a dyn Progress,
    /// Pages between two places where a zero run must end.
    group_pages: u64,
    zeros: Option<ZeroRun>,
    chunk: u32,
    page_map: PageMapBuilder,
    counts: Counts,
}

impl<'a, 's> Gatherer<'a, 's> {
    /// Before the first chunk of `image`.
    pub fn new(
        image: &'a mut ImageWriter<'s>,
        blocks: Vec<RamBlock>,
        encoding: &Encoding,
        progress: &'a dyn Progress,
    ) -> Self {
        let names: Vec<_> = blocks
            .iter()
            .map(|block| (block.idstr.clone(), block.used_length))
            .collect();
        Gatherer {
            image,
            blocks,
            sealer: Sealer::new(encoding),
            progress,
            group_pages: (encoding.chunk_len / PAGE_LEN) as u64 * ZERO_REGIONS,
            zeros: None,
            chunk: 0,
            page_map: PageMapBuilder::new(&names),
            counts: Counts::default(),
        }
    }

    /// Takes a chunk that holds no pages.
    pub fn take_other(&mut self, raw: &Buffer, sealed: &Sealed) -> Result<(), PipelineError> {
        self.flush_zeros()?;
        self.append(raw.filled(), sealed)
    }

    /// Takes a region that was read, with its chunk.
    pub fn take_region(
        &mut self,
        region: &Region,
        raw: &Buffer,
        sealed: &Sealed,
    ) -> Result<(), PipelineError> {
        self.flush_zeros()?;
        let mut at = self.name_len(region.block, region.first_page);
        for (page, &has_bytes) in (region.first_page..).zip(&region.touched) {
            at += RECORD_WORD_LEN;
            self.enter(region.block, page, at, !has_bytes);
            at += if has_bytes { PAGE_LEN } else { 1 };
        }
        self.append_pages(region.touched.len() as u64, raw.filled(), sealed)
    }

    /// Takes pages that are all zero, from the beginning of a region to the end of one.
    pub fn take_zeros(
        &mut self,
        block: usize,
        first_page: u64,
        page_count: u64,
    ) -> Result<(), PipelineError> {
        let goes_on = |run: &ZeroRun| {
            run.block == block
                && run.first_page + run.page_count == first_page
                && !first_page.is_multiple_of(self.group_pages)
        };
        match &mut self.zeros {
            Some(run) if goes_on(run) => run.page_count += page_count,
            _ => {
                self.flush_zeros()?;
                self.zeros = Some(ZeroRun {
                    block,
                    first_page,
                    page_count,
                });
            }
        }
        Ok(())
    }

    /// When all was taken.
    pub fn finish(mut self) -> Result<(PageMapBuilder, Counts), PipelineError> {
        self.flush_zeros()?;
        Ok((self.page_map, self.counts))
    }

    fn flush_zeros(&mut self) -> Result<(), PipelineError> {
        let Some(run) = self.zeros.take() else {
            return Ok(());
        };
        let mut raw = Vec::new();
        for page in run.first_page..run.first_page + run.page_count {
            raw.extend(record_word(PageIndex(page), true, page == 0));
            if page == 0 {
                push_str8(&mut raw, &self.blocks[run.block].idstr);
            }
            self.enter(run.block, page, raw.len(), true);
            raw.push(0);
        }
        let sealed = self.sealer.seal((&raw, None))?;
        self.append_pages(run.page_count, &raw, &sealed)
    }

    fn name_len(&self, block: usize, first_page: u64) -> usize {
        match first_page {
            0 => 1 + self.blocks[block].idstr.len(),
            _ => 0,
        }
    }

    /// Enters a page whose body begins at `body` of the next chunk.
    fn enter(&mut self, block: usize, page: u64, body: usize, is_zero: bool) {
        // It fits: a chunk is at most 64 MiB.
        let body = u32::try_from(body).unwrap_or(u32::MAX);
        self.page_map.page(block, page, self.chunk, body, is_zero);
        match is_zero {
            true => self.counts.zero_pages += 1,
            false => self.counts.data_pages += 1,
        }
    }

    fn append_pages(
        &mut self,
        page_count: u64,
        raw: &[u8],
        sealed: &Sealed,
    ) -> Result<(), PipelineError> {
        self.counts.len += raw.len() as u64;
        self.append(raw, sealed)?;
        self.progress.advance(page_count * PAGE_LEN as u64);
        Ok(())
    }

    fn append(&mut self, raw: &[u8], sealed: &Sealed) -> Result<(), PipelineError> {
        append(self.image, raw, sealed)?;
        self.chunk += 1;
        Ok(())
    }
}
