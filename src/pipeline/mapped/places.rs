//! Pages → their places in a file, by any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use super::WORD_PAGES;
use crate::bytes::WriteAt;
use crate::container::ContainerError;
use crate::pipeline::PipelineError;
use crate::pipeline::region::is_zero;
use crate::stream::RamBlock;
use crate::stream::mapped_ram::MappedRam;
use crate::units::{FileOffset, PAGE_LEN};

/// Writes pages where they belong and keeps which there are: one bit a page.
pub struct Places<'p> {
    target: &'p dyn WriteAt,
    start: u64,
    machine_type: String,
    blocks: Vec<RamBlock>,
    layout: MappedRam,
    present: Vec<Vec<AtomicU64>>,
}

impl<'p> Places<'p> {
    /// No page is there. The stream begins at `start`.
    pub fn new(
        target: &'p dyn WriteAt,
        start: u64,
        machine_type: &str,
        blocks: Vec<RamBlock>,
    ) -> Self {
        // The number of the section is not known yet, and moves nothing.
        let layout = MappedRam::lay_out_from(start, machine_type, 0, &blocks);
        let bitmaps = layout.blocks.iter().map(|block| {
            let words = (0..block.word_count()).map(|_| AtomicU64::new(0));
            words.collect()
        });
        Places {
            target,
            start,
            machine_type: machine_type.to_owned(),
            present: bitmaps.collect(),
            blocks,
            layout,
        }
    }

    /// Writes pages that follow each other, of which `is_touched` says which may have bytes. The others are zero, as are
    /// those in which nothing but zeros is found: none of these is written, and what was there before is taken away.
    ///
    /// # Errors
    /// [`ContainerError::Write`].
    pub fn put(
        &self,
        block: usize,
        first_page: u64,
        bytes: &[u8],
        is_touched: &[bool],
    ) -> Result<(), PipelineError> {
        let mut run = 0..0;
        for (index, (page, &is_touched)) in bytes.chunks(PAGE_LEN).zip(is_touched).enumerate() {
            if is_touched && !is_zero(page) {
                if run.is_empty() {
                    run = index..index;
                }
                run.end = index + 1;
                continue;
            }
            self.write_run(block, first_page, bytes, &run)?;
            run = 0..0;
            self.clear(block, first_page + index as u64)?;
        }
        self.write_run(block, first_page, bytes, &run)
    }

    /// Takes a page away, if it was there.
    ///
    /// # Errors
    /// [`ContainerError::Write`].
    pub fn clear(&self, block: usize, page: u64) -> Result<(), PipelineError> {
        const ZEROS: [u8; PAGE_LEN] = [0; PAGE_LEN];
        let Some((word, bit)) = self.bit(block, page) else {
            return Ok(());
        };
        if word.fetch_and(!bit, Ordering::Relaxed) & bit == 0 {
            return Ok(());
        }
        self.write_at(&ZEROS, self.layout.blocks[block].page_offset(page))
    }

    fn write_run(
        &self,
        block: usize,
        first_page: u64,
        bytes: &[u8],
        run: &std::ops::Range<usize>,
    ) -> Result<(), PipelineError> {
        if run.is_empty() {
            return Ok(());
        }
        let first = first_page + run.start as u64;
        let bytes = &bytes[run.start * PAGE_LEN..run.end * PAGE_LEN];
        self.write_at(bytes, self.layout.blocks[block].page_offset(first))?;
        for page in first..first + run.len() as u64 {
            if let Some((word, bit)) = self.bit(block, page) {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn bit(&self, block: usize, page: u64) -> Option<(&AtomicU64, u64)> {
        let word = usize::try_from(page / WORD_PAGES).ok()?;
        let word = self.present.get(block)?.get(word)?;
        Some((word, 1 << (page % WORD_PAGES)))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), PipelineError> {
        write_at(self.target, bytes, offset)
    }

    /// When all pages are in their places: what else has to be written, with the `ram` section's number.
    pub fn finish(self, ram_section: u32) -> Placed<'p> {
        let bitmaps = self.present.into_iter().map(|words| {
            let words = words.into_iter().map(AtomicU64::into_inner);
            words.collect()
        });
        Placed {
            target: self.target,
            layout: MappedRam::lay_out_from(
                self.start,
                &self.machine_type,
                ram_section,
                &self.blocks,
            ),
            bitmaps: bitmaps.collect(),
        }
    }
}

/// Pages in their places, and which there are.
pub struct Placed<'p> {
    /// The file.
    pub target: &'p dyn WriteAt,
    /// Where everything lies.
    pub layout: MappedRam,
    /// For each RAMBlock one bit a page.
    pub bitmaps: Vec<Vec<u64>>,
}

/// Writes `bytes` in their place.
pub fn write_at(target: &dyn WriteAt, bytes: &[u8], offset: u64) -> Result<(), PipelineError> {
    let written = target.write_all_at(bytes, offset);
    let at = FileOffset(offset);
    Ok(written.map_err(|source| ContainerError::Write { at, source })?)
}
