//! One region of a stopped guest's memory → page records, as QEMU's migration would write them.

use std::io::IoSliceMut;

use super::PipelineError;
use super::sealing::Buffer;
use crate::host::{Backing, MOST_SLICES, ProcessMemory};
use crate::stream::RamBlock;
use crate::stream::writer::{RECORD_WORD_LEN, push_str8, record_word};
use crate::units::{PAGE_LEN, PageIndex};

/// A RAMBlock of a guest that does not run.
pub struct StoppedBlock {
    /// Its name and size.
    pub block: RamBlock,
    /// Where it begins in its QEMU's memory.
    pub address: u64,
    /// What stands behind it there.
    pub backing: Backing,
}

impl StoppedBlock {
    /// How many pages it has.
    pub fn page_count(&self) -> u64 {
        self.block.used_length / PAGE_LEN as u64
    }

    /// Where a page lies in QEMU's memory.
    pub fn address_of(&self, page: u64) -> u64 {
        self.address + page * PAGE_LEN as u64
    }
}

/// Some pages of a RAMBlock, one after the other.
pub struct Region {
    /// The block's place in the list.
    pub block: usize,
    /// The first page.
    pub first_page: u64,
    /// For each page whether it has to be looked at; the others are zero.
    pub touched: Vec<bool>,
}

impl Region {
    /// Replaces what is in `buffer` by the region's page records; `touched` then says which of them carry bytes. If none
    /// does, `buffer` is left empty.
    ///
    /// # Errors
    /// [`PipelineError::Memory`] if the guest's memory cannot be read.
    pub fn read(
        &mut self,
        memory: &ProcessMemory,
        block: &StoppedBlock,
        buffer: &mut Buffer,
    ) -> Result<(), PipelineError> {
        let mut name = Vec::new();
        if self.first_page == 0 {
            push_str8(&mut name, &block.block.idstr);
        }
        self.read_bodies(memory, block, name.len(), &mut buffer.bytes)?;
        self.write_records(&name, buffer);
        if !self.touched.contains(&true) {
            buffer.len = 0;
        }
        Ok(())
    }

    /// Fills `pages` with the region's pages, those that were touched; the others are left as they are.
    ///
    /// # Errors
    /// [`PipelineError::Memory`] if the guest's memory cannot be read.
    pub fn read_pages(
        &self,
        memory: &ProcessMemory,
        block: &StoppedBlock,
        pages: &mut [u8],
    ) -> Result<(), PipelineError> {
        let is_same = |before: &bool, next: &bool| before == next;
        let mut first = self.first_page;
        let mut rest = pages;
        for run in self.touched.chunk_by(is_same) {
            let (pages, behind) = rest.split_at_mut(run.len() * PAGE_LEN);
            rest = behind;
            if run.contains(&true) {
                let read = memory.read(block.address_of(first), &mut [IoSliceMut::new(pages)]);
                read.map_err(PipelineError::Memory)?;
            }
            first += run.len() as u64;
        }
        Ok(())
    }

    /// Reads touched pages to where their bodies stand if none of them is zero.
    fn read_bodies(
        &self,
        memory: &ProcessMemory,
        block: &StoppedBlock,
        name_len: usize,
        mut room: &mut [u8],
    ) -> Result<(), PipelineError> {
        let mut run = Vec::with_capacity(self.touched.len().min(MOST_SLICES));
        for (page, &is_touched) in (self.first_page..).zip(&self.touched) {
            if !is_touched || run.len() == MOST_SLICES {
                read_run(memory, block, page, &mut run)?;
            }
            let name_len = if page == 0 { name_len } else { 0 };
            let (_, behind_head) = room.split_at_mut(RECORD_WORD_LEN + name_len);
            let (body, behind) = behind_head.split_at_mut(body_len(is_touched));
            room = behind;
            if is_touched {
                run.push(IoSliceMut::new(body));
            }
        }
        let end = self.first_page + self.touched.len() as u64;
        read_run(memory, block, end, &mut run)
    }

    /// Writes words, names and fill bytes, and closes the gaps where touched pages are zero.
    fn write_records(&mut self, name: &[u8], buffer: &mut Buffer) {
        let mut from = 0;
        buffer.len = 0;
        for (page, is_touched) in (self.first_page..).zip(&mut self.touched) {
            let name = if page == 0 { name } else { &[] };
            let head_len = RECORD_WORD_LEN + name.len();
            let body = from + head_len..from + head_len + body_len(*is_touched);
            from = body.end;
            *is_touched = *is_touched && !is_zero(&buffer.bytes[body.clone()]);
            buffer.push(&record_word(PageIndex(page), !*is_touched, page == 0));
            buffer.push(name);
            match *is_touched {
                true if body.start == buffer.len => buffer.len = body.end,
                true => {
                    buffer.bytes.copy_within(body, buffer.len);
                    buffer.len += PAGE_LEN;
                }
                false => buffer.push(&[0]),
            }
        }
    }
}

/// Fills the slices with the pages that end before `end`, and forgets them.
fn read_run(
    memory: &ProcessMemory,
    block: &StoppedBlock,
    end: u64,
    run: &mut Vec<IoSliceMut<'_>>,
) -> Result<(), PipelineError> {
    if !run.is_empty() {
        let first = block.address_of(end - run.len() as u64);
        memory.read(first, run).map_err(PipelineError::Memory)?;
        run.clear();
    }
    Ok(())
}

fn body_len(has_bytes: bool) -> usize {
    if has_bytes { PAGE_LEN } else { 1 }
}

/// Whether all bytes of a page are zero.
pub fn is_zero(page: &[u8]) -> bool {
    let (blocks, rest) = page.as_chunks::<64>();
    blocks.iter().all(|block| *block == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}
