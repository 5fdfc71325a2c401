//! The records of the `ram` section: the list of RAMBlocks, then pages.
//!
//! A payload is a row of records, each a big-endian u64 with `RAM_SAVE_FLAG_*` in its low twelve bits and a byte
//! offset or a total in the others; `RAM_SAVE_FLAG_EOS` ends it.
//!
//! Source: QEMU `migration/ram.c`, `ram_load_precopy` and `ram_block_from_stream`; spec/qemu-stream.md §6.

use std::collections::HashMap;

use super::cursor::{Cursor, Stop};
use super::error::{Place, StreamError};
use super::mapped_ram::read_places;
use super::page_set::PageSet;
use super::parser::{Element, Event};
use super::wire;
use crate::units::{PAGE_LEN, PageIndex, StreamOffset};

/// The most RAM that a stream may list: its pages need one bit each.
pub(super) const MAX_RAM_LEN: u64 = 16 << 40;
/// The most RAMBlocks that a stream may list.
pub(super) const MAX_BLOCKS: usize = 8192;

/// A named block of guest memory, as the stream's block list has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name, such as `pc.ram`.
    pub idstr: String,
    /// Its size in bytes, whole pages.
    pub used_length: u64,
    /// The size of its pages in bytes: 4096. Streams that speak of huge pages are refused.
    pub page_size: u64,
}

/// How many page records came.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PageCounts {
    pub(super) data: u64,
    pub(super) zero: u64,
    pub(super) repeated: u64,
}

/// What is known about guest memory while the stream is read.
pub(super) struct Ram {
    section_id: u32,
    /// Whether pages lie at places of their own, which the block list names.
    is_mapped: bool,
    /// Bytes of RAM that the block list has still to name; `None` before the list.
    unlisted: Option<u64>,
    blocks: Vec<RamBlock>,
    by_idstr: HashMap<String, usize>,
    seen: Vec<PageSet>,
    /// The block that `RAM_SAVE_FLAG_CONTINUE` means. It lives on across sections.
    current: Option<usize>,
    counts: PageCounts,
}

/// What one record was.
pub(super) enum Record {
    /// It goes on with records.
    Element(Element),
    /// `RAM_SAVE_FLAG_EOS`: the payload is over, the footer follows.
    EndOfPayload(Element),
}

impl Ram {
    /// Before the first record of section `section_id`.
    pub(super) fn new(section_id: u32, is_mapped: bool) -> Self {
        Ram {
            section_id,
            is_mapped,
            unlisted: None,
            blocks: Vec::new(),
            by_idstr: HashMap::new(),
            seen: Vec::new(),
            current: None,
            counts: PageCounts::default(),
        }
    }

    pub(super) fn section_id(&self) -> u32 {
        self.section_id
    }

    pub(super) fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    pub(super) fn counts(&self) -> PageCounts {
        self.counts
    }

    /// Takes every page of every block as come, and as new: `data` of them with bytes, `zero` of them zero.
    pub(super) fn take_all(&mut self, data: u64, zero: u64) {
        self.seen.iter_mut().for_each(PageSet::fill);
        self.counts.data += data;
        self.counts.zero += zero;
    }

    /// Gives the blocks away.
    pub(super) fn into_blocks(self) -> Vec<RamBlock> {
        self.blocks
    }

    /// Whether the block list came and every page of every block.
    pub(super) fn is_complete(&self) -> bool {
        self.unlisted == Some(0) && self.seen.iter().all(|set| set.missing() == 0)
    }

    /// That every page of every block came.
    ///
    /// # Errors
    /// [`StreamError::MissingPages`] for the first block that lacks some.
    pub(super) fn check_complete(&self) -> Result<(), StreamError> {
        for (block, seen) in self.blocks.iter().zip(&self.seen) {
            if let Some(first) = seen.first_missing() {
                return Err(StreamError::MissingPages {
                    idstr: block.idstr.clone(),
                    first: PageIndex(first),
                    count: seen.missing(),
                });
            }
        }
        Ok(())
    }

    /// What is being read, for people.
    pub(super) fn reading(&self) -> &'static str {
        match self.unlisted {
            Some(0) => "the RAM pages",
            _ => "the list of RAMBlocks",
        }
    }

    /// Where `offset` lies.
    pub(super) fn place(&self, offset: StreamOffset) -> Place {
        Place::inside(offset, self.section_id, wire::RAM_IDSTR)
    }

    /// Reads the record that starts at `input[0]`.
    ///
    /// # Errors
    /// [`StreamError`] for every record that QEMU would not write here; none of it is remembered then.
    #[inline]
    pub(super) fn read_record(
        &mut self,
        input: &[u8],
        start: StreamOffset,
    ) -> Result<Record, Stop> {
        let mut cursor = Cursor::new(input, start);
        if self.unlisted.is_some_and(|left| left > 0) {
            return self.read_block(cursor).map(Record::Element);
        }
        let word = cursor.be64()?;
        let flags = word & wire::RAM_SAVE_FLAG_MASK;
        let offset = word - flags;
        match flags & !wire::RAM_SAVE_FLAG_CONTINUE {
            _ if self.is_mapped => self.read_other(&cursor, flags, offset),
            wire::RAM_SAVE_FLAG_PAGE => self.read_page(cursor, flags, offset, false),
            wire::RAM_SAVE_FLAG_ZERO => self.read_page(cursor, flags, offset, true),
            _ => self.read_other(&cursor, flags, offset),
        }
    }

    /// One page record: [str8 idstr unless CONTINUE] and 4096 bytes, or the one byte that fills the page.
    #[inline]
    fn read_page(
        &mut self,
        mut cursor: Cursor<'_>,
        flags: u64,
        offset: u64,
        is_zero: bool,
    ) -> Result<Record, Stop> {
        let start = StreamOffset(cursor.offset().0 - 8);
        let block = if flags & wire::RAM_SAVE_FLAG_CONTINUE != 0 {
            let at = || self.place(start);
            let none = || StreamError::NoCurrentBlock { at: at() };
            self.current.ok_or_else(none)?
        } else {
            self.read_block_name(&mut cursor)?
        };
        if offset >= self.blocks[block].used_length {
            return Err(self.outside(start, block, offset).into());
        }
        let page = PageIndex(offset / PAGE_LEN as u64);
        let body = cursor.len();
        if is_zero {
            let fill = cursor.u8()?;
            if fill != 0 {
                return Err(self.non_zero_fill(start, block, page, fill).into());
            }
            self.counts.zero += 1;
        } else {
            cursor.take(PAGE_LEN)?;
            self.counts.data += 1;
        }
        self.current = Some(block);
        self.counts.repeated += u64::from(!self.seen[block].insert(page.0));
        let event = Event::Page {
            block,
            page,
            is_zero,
            body,
        };
        let len = cursor.len();
        Ok(Record::Element(Element { len, event }))
    }

    fn read_block_name(&self, cursor: &mut Cursor<'_>) -> Result<usize, Stop> {
        let offset = cursor.offset();
        let name = cursor.str8()?;
        if let Some(&block) = name.ok().and_then(|idstr| self.by_idstr.get(idstr)) {
            return Ok(block);
        }
        let bytes = name.map_or_else(|bytes| bytes, str::as_bytes);
        let idstr = String::from_utf8_lossy(bytes).into_owned();
        let at = self.place(offset);
        Err(StreamError::UnknownBlock { at, idstr }.into())
    }

    /// The records that carry no page.
    #[cold]
    fn read_other(&mut self, cursor: &Cursor<'_>, flags: u64, offset: u64) -> Result<Record, Stop> {
        let element = Element {
            len: cursor.len(),
            event: Event::Framing,
        };
        let at = self.place(StreamOffset(cursor.offset().0 - 8));
        match flags {
            wire::RAM_SAVE_FLAG_EOS if offset == 0 => Ok(Record::EndOfPayload(element)),
            wire::RAM_SAVE_FLAG_MEM_SIZE => {
                self.begin_block_list(at, offset)?;
                Ok(Record::Element(element))
            }
            _ => Err(refused(at, flags).into()),
        }
    }

    fn begin_block_list(&mut self, at: Place, total: u64) -> Result<(), StreamError> {
        if self.unlisted.is_some() {
            return Err(StreamError::RepeatedBlockList { at });
        }
        if total == 0 {
            return Err(StreamError::NoBlockList { at });
        }
        if total > MAX_RAM_LEN {
            let limit = MAX_RAM_LEN;
            return Err(StreamError::TooMuchRam { at, total, limit });
        }
        self.unlisted = Some(total);
        Ok(())
    }

    /// One entry of the block list: str8 idstr · be64 used_length, and where pages lie if they have places of their own.
    fn read_block(&mut self, mut cursor: Cursor<'_>) -> Result<Element, Stop> {
        let at = self.place(cursor.offset());
        let idstr = match cursor.str8()? {
            Ok(idstr) => idstr.to_owned(),
            Err(found) => {
                let found = String::from_utf8_lossy(found).into_owned();
                let what = "a RAMBlock's idstr";
                return Err(StreamError::NotText { at, what, found }.into());
            }
        };
        let used_length = cursor.be64()?;
        let mut event = Event::Framing;
        if self.is_mapped {
            let places = read_places(&mut cursor, &at, &idstr, used_length)?;
            event = Event::MappedBlock {
                block: self.blocks.len(),
                bitmap: places.bitmap,
                pages: places.pages,
            };
        }
        self.add_block(at, idstr, used_length)?;
        if let Some(seen) = self.seen.last_mut().filter(|_| self.is_mapped) {
            seen.fill();
        }
        Ok(Element {
            len: cursor.len(),
            event,
        })
    }

    fn add_block(&mut self, at: Place, idstr: String, used_length: u64) -> Result<(), StreamError> {
        let left = self.unlisted.unwrap_or(0);
        if self.blocks.len() == MAX_BLOCKS {
            let limit = MAX_BLOCKS;
            return Err(StreamError::TooManyBlocks { at, limit });
        }
        if used_length > left {
            return Err(StreamError::BlockListTotal {
                at,
                idstr,
                used_length,
                left,
            });
        }
        let page_size = PAGE_LEN as u64;
        let page_count = used_length / page_size;
        let seen = PageSet::new(page_count).filter(|_| used_length.is_multiple_of(page_size));
        let Some(seen) = seen else {
            return Err(StreamError::BlockLength {
                at,
                idstr,
                used_length,
            });
        };
        if self.by_idstr.contains_key(&idstr) {
            return Err(StreamError::RepeatedBlock { at, idstr });
        }
        self.by_idstr.insert(idstr.clone(), self.blocks.len());
        self.seen.push(seen);
        self.blocks.push(RamBlock {
            idstr,
            used_length,
            page_size,
        });
        self.unlisted = Some(left - used_length);
        Ok(())
    }

    #[cold]
    fn outside(&self, start: StreamOffset, block: usize, offset: u64) -> StreamError {
        let RamBlock {
            idstr, used_length, ..
        } = &self.blocks[block];
        StreamError::PageOutside {
            at: self.place(start),
            idstr: idstr.clone(),
            offset,
            used_length: *used_length,
        }
    }

    #[cold]
    fn non_zero_fill(
        &self,
        start: StreamOffset,
        block: usize,
        page: PageIndex,
        fill: u8,
    ) -> StreamError {
        StreamError::NonZeroFill {
            at: self.place(start),
            idstr: self.blocks[block].idstr.clone(),
            page,
            fill,
        }
    }
}

/// The error for a record of a kind that is not read.
fn refused(at: Place, flags: u64) -> StreamError {
    let name = match flags & !wire::RAM_SAVE_FLAG_CONTINUE {
        wire::RAM_SAVE_FLAG_FULL => "FULL",
        wire::RAM_SAVE_FLAG_XBZRLE => "XBZRLE",
        wire::RAM_SAVE_FLAG_HOOK => "HOOK (RDMA)",
        wire::RAM_SAVE_FLAG_COMPRESS_PAGE => "COMPRESS_PAGE",
        wire::RAM_SAVE_FLAG_MULTIFD_FLUSH => "MULTIFD_FLUSH",
        _ => return StreamError::UnknownFlags { at, flags },
    };
    StreamError::RefusedRecord { at, name }
}
