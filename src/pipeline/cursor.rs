//! Which part of a stopped guest's memory is next: the workers' turns.

use super::PipelineError;
use super::capture::StoppedGuestMemory;
use super::chunker::ZERO_REGIONS;
use super::region::{Region, StoppedBlock};
use crate::host::Backing;
use crate::units::PAGE_LEN;

/// What is to be done in a turn.
pub enum Next {
    /// Nothing but to say so: pages that were never touched. Block, first page, page count.
    Zeros(usize, u64, u64),
    /// A region is to be read.
    Region(Region),
}

/// Walks through guest memory region by region, and numbers the turns.
pub struct Cursor<'a> {
    guest: &'a StoppedGuestMemory,
    region_pages: usize,
    turns: u64,
    block: usize,
    page: u64,
    /// Whether the pages from `page` on were touched, as far as that was looked up.
    known: Vec<bool>,
    /// How many of `known` lie before `page`.
    passed: usize,
}

impl<'a> Cursor<'a> {
    /// Before the first page, for regions of `chunk_len` bytes.
    pub fn new(guest: &'a StoppedGuestMemory, chunk_len: usize) -> Self {
        Cursor {
            guest,
            region_pages: (chunk_len / PAGE_LEN).max(1),
            turns: 0,
            block: 0,
            page: 0,
            known: Vec::new(),
            passed: 0,
        }
    }

    /// Takes a turn for something that is not guest memory.
    pub fn turn(&mut self) -> u64 {
        self.turns += 1;
        self.turns - 1
    }

    /// The next turn and what is to be done in it; `None` behind the last page.
    ///
    /// # Errors
    /// [`PipelineError::Memory`] if the kernel does not tell what was touched.
    pub fn next(&mut self) -> Result<Option<(u64, Next)>, PipelineError> {
        let Some(block) = self.guest.blocks.get(self.block) else {
            return Ok(None);
        };
        if self.passed == self.known.len() {
            self.look_up(block)?;
        }
        let regions = self.known[self.passed..].chunks(self.region_pages);
        let untouched = regions.take_while(|region| !region.contains(&true));
        let mut count: usize = untouched.map(<[bool]>::len).sum();
        let (index, first_page) = (self.block, self.page);
        let next = if count > 0 {
            Next::Zeros(index, first_page, count as u64)
        } else {
            let left = &self.known[self.passed..];
            count = left.len().min(self.region_pages);
            Next::Region(Region {
                block: index,
                first_page,
                touched: left[..count].to_vec(),
            })
        };
        self.passed += count;
        self.page += count as u64;
        if self.page >= block.page_count() {
            self.block += 1;
            self.page = 0;
            self.known.clear();
            self.passed = 0;
        }
        Ok(Some((self.turn(), next)))
    }

    /// Looks up which of the next pages were touched, for as many as a run of zero regions may span.
    fn look_up(&mut self, block: &StoppedBlock) -> Result<(), PipelineError> {
        let most = self.region_pages as u64 * ZERO_REGIONS;
        let count = most.min(block.page_count() - self.page);
        self.known.clear();
        self.known.resize(usize::try_from(count).unwrap_or(0), true);
        self.passed = 0;
        if block.backing == Backing::Anonymous {
            let address = block.address_of(self.page);
            let look_up = self.guest.memory.touched(address, &mut self.known);
            look_up.map_err(PipelineError::Memory)?;
        }
        Ok(())
    }
}
