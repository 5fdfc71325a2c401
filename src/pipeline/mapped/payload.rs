//! What lies where in an image of layout `mapped`, read from its verified chunks.

use super::stream_out::Recorder;
use crate::bytes::ReadAt;
use crate::container::{ChunkEntry, ContainerError, Image};
use crate::pipeline::PipelineError;
use crate::pipeline::load::{Loader, grow};
use crate::stream::mapped_ram::MappedBlock;
use crate::stream::parser::{MAX_DEVICE_STATE_LEN, MAX_ELEMENT_LEN};
use crate::stream::writer::{before_pages, behind_pages};
use crate::stream::{Event, Parser, RamBlock, StreamError};
use crate::units::FileOffset;

/// Bytes of framing read at a time.
const PIECE_LEN: u64 = 2 * MAX_ELEMENT_LEN as u64;

/// Where everything lies in an image of layout `mapped`.
///
/// To learn it takes the chunks with framing only, a few for each RAMBlock, however much memory the guest has.
#[derive(Debug, Clone)]
pub struct MappedImage {
    /// The resolved machine type.
    pub machine_type: String,
    /// The RAMBlocks, in the order of the list.
    pub blocks: Vec<MappedBlock>,
    ram_section: u32,
    /// Where the device sections begin and the stream ends.
    device_sections: std::ops::Range<u64>,
}

impl MappedImage {
    /// Reads the framing of an image.
    ///
    /// # Errors
    /// [`PipelineError::Container`] for a damaged chunk, [`PipelineError::Stream`] if the payload is no such stream.
    pub fn open<R: ReadAt>(image: &Image<R>) -> Result<Self, PipelineError> {
        let mut payload = Payload::new(image);
        let end = payload.end();
        let mut parser = Parser::mapped_ram();
        let mut blocks: Vec<MappedBlock> = Vec::new();
        loop {
            let position = parser.position().0;
            let len = end.saturating_sub(position).min(PIECE_LEN);
            let bytes = payload.read(position, len)?;
            let Some(element) = parser.next(&bytes)? else {
                let why = parser.finish().map(drop);
                return Err(why.err().unwrap_or(StreamError::NotAStream).into());
            };
            match element.event {
                Event::MappedBlock {
                    block,
                    bitmap,
                    pages,
                } => blocks.push(MappedBlock {
                    entry: blocks.last().map_or(0, MappedBlock::pages_end),
                    block: parser.blocks()[block].clone(),
                    bitmap,
                    pages,
                }),
                Event::DeviceState => {
                    return Ok(MappedImage {
                        machine_type: parser.machine_type().unwrap_or_default().to_owned(),
                        ram_section: parser.ram_section().unwrap_or_default(),
                        blocks,
                        device_sections: position..end,
                    });
                }
                Event::Framing | Event::Page { .. } => {}
            }
        }
    }

    /// What a migration stream has before the first page record.
    pub fn before_pages(&self) -> Vec<u8> {
        let blocks = self.blocks.iter().map(|block| block.block.clone());
        let blocks: Vec<RamBlock> = blocks.collect();
        before_pages(&self.machine_type, self.ram_section, &blocks)
    }

    /// What it has behind the last page record and before the device sections.
    pub fn behind_pages(&self) -> [u8; 13] {
        behind_pages(self.ram_section)
    }

    /// The device sections and all that follows them in the stream.
    ///
    /// # Errors
    /// [`PipelineError::Container`] for a damaged chunk.
    pub fn device_sections<R: ReadAt>(&self, image: &Image<R>) -> Result<Vec<u8>, PipelineError> {
        let range = &self.device_sections;
        let most = MAX_DEVICE_STATE_LEN as u64;
        // One byte too many is refused by whoever parses it.
        let len = (range.end - range.start).min(most + 1);
        Payload::new(image).read(range.start, len)
    }

    /// Where the device state begins in the stream.
    pub fn device_state_at(&self) -> u64 {
        self.device_sections.start
    }

    /// Which pages of a RAMBlock are there: one bit a page.
    pub(super) fn bitmap<R: ReadAt>(
        payload: &mut Payload<'_, R>,
        block: &MappedBlock,
    ) -> Result<Vec<u64>, PipelineError> {
        let bytes = payload.read(block.bitmap, block.word_count() * 8)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().copied().map(u64::from_le_bytes).collect())
    }

    /// Gives `output` the stream without the pages of those RAMBlocks for which `is_left_out` says so; each chunk is
    /// verified before a byte of it is given.
    ///
    /// # Errors
    /// [`PipelineError::Container`] for a damaged chunk; what `output` says.
    pub fn feed_without<R: ReadAt>(
        &self,
        image: &Image<R>,
        is_left_out: &dyn Fn(&MappedBlock) -> bool,
        output: &mut dyn FnMut(&[u8]) -> Result<(), PipelineError>,
    ) -> Result<(), PipelineError> {
        let mut payload = Payload::new(image);
        let mut recorder = Recorder::begin(self, output)?;
        for (number, block) in self.blocks.iter().enumerate() {
            if is_left_out(block) {
                continue;
            }
            let bitmap = MappedImage::bitmap(&mut payload, block)?;
            recorder.begin_block(number, bitmap)?;
            let mut at = block.pages;
            while let Some(entry) = payload.next_chunk(at)? {
                if entry.stored_offset.0 >= block.pages_end() {
                    break;
                }
                recorder.take(entry.stored_offset.0, payload.load(&entry)?)?;
                at = entry.stored_offset.0 + u64::from(entry.stored_len);
            }
            recorder.end_block()?;
        }
        recorder.finish(&self.device_sections(image)?)
    }
}

/// The verified bytes of a payload with gaps, which are zero.
pub(super) struct Payload<'a, R: ReadAt> {
    image: &'a Image<R>,
    loader: Loader,
    /// The page of the chunk table that was read last.
    table: Option<(u32, Vec<ChunkEntry>)>,
    /// The chunk that was read last.
    chunk: Option<ChunkEntry>,
    raw: Vec<u8>,
}

impl<'a, R: ReadAt> Payload<'a, R> {
    pub(super) fn new(image: &'a Image<R>) -> Self {
        Payload {
            image,
            loader: Loader::default(),
            table: None,
            chunk: None,
            raw: Vec::new(),
        }
    }

    fn end(&self) -> u64 {
        let footer = self.image.footer();
        footer.payload_offset.0.saturating_add(footer.payload_len)
    }

    /// The bytes at `start`, which lie inside the payload.
    pub(super) fn read(&mut self, start: u64, len: u64) -> Result<Vec<u8>, PipelineError> {
        let end = start.saturating_add(len).min(self.end());
        let len = usize::try_from(end.saturating_sub(start)).unwrap_or(0);
        let mut bytes = vec![0; len];
        let mut at = start;
        while at < end {
            let Some(entry) = self.next_chunk(at)? else {
                break;
            };
            let (first, behind) = (entry.stored_offset.0, self.end_of(&entry));
            if first >= end {
                break;
            }
            let (from, to) = (first.max(start), behind.min(end));
            let place = |at: u64, base: u64| usize::try_from(at - base).unwrap_or(usize::MAX);
            let raw = self.load(&entry)?;
            bytes[place(from, start)..place(to, start)]
                .copy_from_slice(&raw[place(from, first)..place(to, first)]);
            at = behind;
        }
        Ok(bytes)
    }

    fn end_of(&self, entry: &ChunkEntry) -> u64 {
        entry
            .stored_offset
            .0
            .saturating_add(entry.stored_len.into())
    }

    /// The first chunk that ends behind `at`.
    pub(super) fn next_chunk(&mut self, at: u64) -> Result<Option<ChunkEntry>, ContainerError> {
        let mut page = self.image.table_page_of_file_offset(FileOffset(at))?;
        while page < self.image.table_page_count() {
            if self.table.as_ref().is_none_or(|(known, _)| *known != page) {
                self.table = Some((page, self.image.table_page(page)?));
            }
            let entries = self.table.iter().flat_map(|(_, entries)| entries);
            let mut behind = entries.skip_while(|entry| self.end_of(entry) <= at);
            if let Some(entry) = behind.next() {
                return Ok(Some(*entry));
            }
            page += 1;
        }
        Ok(None)
    }

    /// A chunk's verified bytes.
    pub(super) fn load(&mut self, entry: &ChunkEntry) -> Result<&[u8], ContainerError> {
        let len = entry.raw_len as usize;
        if self.chunk.as_ref() != Some(entry) {
            self.chunk = None;
            grow(&mut self.raw, len);
            self.loader.load(self.image, entry, &mut self.raw[..len])?;
            entry.check_raw(&self.raw[..len])?;
            self.chunk = Some(*entry);
        }
        Ok(&self.raw[..len])
    }
}
