//! Pages in their places → the stream that a migration would have sent: workers read and check chunks, the caller gets
//! page records in order.

use super::has;
use super::payload::{MappedImage, Payload};
use crate::bytes::ReadAt;
use crate::container::Image;
use crate::pipeline::PipelineError;
use crate::pipeline::decode::work;
use crate::pipeline::region::is_zero;
use crate::progress::Progress;
use crate::stream::writer::{push_str8, record_word};
use crate::units::{PAGE_LEN, PageIndex};

/// Bytes of the stream that are collected before they are given away.
const PIECE_LEN: usize = 256 << 10;

/// Gives the stream of an image of layout `mapped` to `output`; as [`decode()`](crate::pipeline::decode()).
///
/// # Errors
/// As there; [`PipelineError::NotZero`] if a page has bytes that its block's bitmap does not know.
pub fn decode<R: ReadAt>(
    image: &Image<R>,
    threads: usize,
    progress: &dyn Progress,
    output: &mut dyn FnMut(&[u8]) -> Result<(), PipelineError>,
) -> Result<(), PipelineError> {
    let mapped = MappedImage::open(image)?;
    let mut payload = Payload::new(image);
    let bitmaps = mapped.blocks.iter();
    let bitmaps = bitmaps.map(|block| MappedImage::bitmap(&mut payload, block));
    let mut bitmaps = bitmaps.collect::<Result<Vec<_>, _>>()?.into_iter();
    let mut recorder = Recorder::begin(&mapped, output)?;
    let mut number = 0;
    recorder.begin_block(number, bitmaps.next().unwrap_or_default())?;
    work(image, threads, progress, &|_, _| (), &mut |entry, raw| {
        let (raw, ()) = raw?;
        let (start, end) = (
            entry.stored_offset.0,
            entry.stored_offset.0 + raw.len() as u64,
        );
        recorder.take(start, raw)?;
        while number + 1 < mapped.blocks.len() && mapped.blocks[number].pages_end() <= end {
            recorder.end_block()?;
            number += 1;
            recorder.begin_block(number, bitmaps.next().unwrap_or_default())?;
            recorder.take(start, raw)?;
        }
        Ok(())
    })?;
    recorder.end_block()?;
    recorder.finish(&mapped.device_sections(image)?)
}

/// Writes page records, block after block, from bytes that come in the order of the file.
pub struct Recorder<'a> {
    mapped: &'a MappedImage,
    output: &'a mut dyn FnMut(&[u8]) -> Result<(), PipelineError>,
    block: usize,
    bitmap: Vec<u64>,
    /// The next page without a record.
    next_page: u64,
    /// A page of which bytes were met in one chunk and more may be in the next.
    begun: Option<(u64, [u8; PAGE_LEN])>,
    records: Vec<u8>,
}

impl<'a> Recorder<'a> {
    /// Gives what stands before the first page record.
    pub fn begin(
        mapped: &'a MappedImage,
        output: &'a mut dyn FnMut(&[u8]) -> Result<(), PipelineError>,
    ) -> Result<Self, PipelineError> {
        output(&mapped.before_pages())?;
        Ok(Recorder {
            mapped,
            output,
            block: 0,
            bitmap: Vec::new(),
            next_page: 0,
            begun: None,
            records: Vec::with_capacity(PIECE_LEN + 2 * PAGE_LEN),
        })
    }

    /// Begins a block, of whose pages `bitmap` says which are there.
    pub fn begin_block(&mut self, block: usize, bitmap: Vec<u64>) -> Result<(), PipelineError> {
        (self.block, self.bitmap, self.next_page) = (block, bitmap, 0);
        Ok(())
    }

    /// Takes bytes of the file from `offset` on; those that are no pages of this block are passed over.
    pub fn take(&mut self, offset: u64, bytes: &[u8]) -> Result<(), PipelineError> {
        let block = &self.mapped.blocks[self.block];
        let (pages, pages_end) = (block.pages, block.pages_end());
        let start = offset.max(pages);
        let end = (offset + bytes.len() as u64).min(pages_end);
        let place = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
        let mut at = start;
        while at < end {
            let (page, within) = (
                (at - pages) / PAGE_LEN as u64,
                (at - pages) % PAGE_LEN as u64,
            );
            let until = end.min(at - within + PAGE_LEN as u64);
            let part = &bytes[place(at)..place(until)];
            if part.len() == PAGE_LEN {
                self.end_page()?;
                self.record(page, part)?;
            } else {
                self.collect(page, within, part)?;
            }
            at = until;
        }
        Ok(())
    }

    /// Takes a part of a page.
    fn collect(&mut self, page: u64, within: u64, part: &[u8]) -> Result<(), PipelineError> {
        if self.begun.is_none_or(|(begun, _)| begun != page) {
            self.end_page()?;
        }
        let (_, bytes) = self.begun.get_or_insert((page, [0; PAGE_LEN]));
        let within = usize::try_from(within).unwrap_or(0);
        bytes[within..within + part.len()].copy_from_slice(part);
        Ok(())
    }

    fn end_page(&mut self) -> Result<(), PipelineError> {
        match self.begun.take() {
            Some((page, bytes)) => self.record(page, &bytes),
            None => Ok(()),
        }
    }

    fn record(&mut self, page: u64, bytes: &[u8]) -> Result<(), PipelineError> {
        self.zeros_until(page)?;
        let is_there = has(&self.bitmap, page);
        if !is_there && !is_zero(bytes) {
            let block = &self.mapped.blocks[self.block].block;
            return Err(PipelineError::NotZero {
                idstr: block.idstr.clone(),
                page: PageIndex(page),
            });
        }
        self.head(page, !is_there);
        match is_there {
            true => self.records.extend_from_slice(bytes),
            false => self.records.push(0),
        }
        self.next_page = page + 1;
        self.give(PIECE_LEN)
    }

    fn zeros_until(&mut self, end: u64) -> Result<(), PipelineError> {
        for page in self.next_page..end {
            self.head(page, true);
            self.records.push(0);
            self.give(PIECE_LEN)?;
        }
        self.next_page = self.next_page.max(end);
        Ok(())
    }

    fn head(&mut self, page: u64, is_zero: bool) {
        let is_first = page == 0;
        self.records
            .extend(record_word(PageIndex(page), is_zero, is_first));
        if is_first {
            push_str8(
                &mut self.records,
                &self.mapped.blocks[self.block].block.idstr,
            );
        }
    }

    /// Gives away what was collected, if it has at least `least` bytes.
    fn give(&mut self, least: usize) -> Result<(), PipelineError> {
        if self.records.len() >= least && !self.records.is_empty() {
            (self.output)(&self.records)?;
            self.records.clear();
        }
        Ok(())
    }

    /// The block's pages are all taken; those that never came are zero.
    pub fn end_block(&mut self) -> Result<(), PipelineError> {
        self.end_page()?;
        self.zeros_until(self.mapped.blocks[self.block].page_count())
    }

    /// Gives what stands behind the last page record.
    pub fn finish(mut self, device_sections: &[u8]) -> Result<(), PipelineError> {
        self.give(0)?;
        (self.output)(&self.mapped.behind_pages())?;
        (self.output)(device_sections)
    }
}
