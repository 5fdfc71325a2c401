//! Where a stream is cut into chunks.
//!
//! A chunk holds the page records of one aligned region of a RAMBlock, so that it usually equals its twin in the next
//! save of the same guest. Regions of zero pages only are gathered, up to [`ZERO_REGIONS`] in one chunk; framing
//! between pages and device state get chunks of their own. Pure: it is told of elements and answers with cuts.
//!
//! The pages of a guest that runs on come out of order: those that it is about to write to before all others. Then a
//! chunk gathers pages as they come, up to the size of a region, and ends where a region begins if it is half full by
//! then, so that a few loose pages do not move the cuts of all that come in order.

use crate::container::PageMapBuilder;
use crate::stream::parser::MAX_ELEMENT_LEN;
use crate::stream::{Element, Event};
use crate::units::PAGE_LEN;

/// All-zero regions gathered in one chunk, counted from a multiple of as many.
pub const ZERO_REGIONS: u64 = 64;

/// Bytes of a page record's header when it does not name its RAMBlock.
const RECORD_HEADER_LEN: usize = 8;

/// Room in a chunk for named records, framing and a block list.
const SLACK: usize = 64 << 10;

/// The largest chunk that regions of `chunk_len` bytes of guest memory give.
pub fn max_chunk_len(chunk_len: usize) -> usize {
    chunk_len / PAGE_LEN * (PAGE_LEN + RECORD_HEADER_LEN) + SLACK
}

/// Bytes read at once where pages are gathered: QEMU has to be relieved of them quickly.
const GATHER_LEN: usize = 128 << 10;

/// What the open chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Nothing,
    Framing,
    Pages {
        block: usize,
        region: u64,
        has_data: bool,
    },
    DeviceState,
}

/// Decides on cuts and draws the page map. Positions are bytes in the open chunk.
pub struct Chunker {
    region_pages: u64,
    /// Device state is cut every so many bytes.
    device_state_len: usize,
    max_len: usize,
    content: Content,
    /// Where the region begins that is zero so far, behind other zero regions in the same chunk.
    zero_region_at: usize,
    /// Zero pages since there: block, page, body. They go to the page map when their chunk is settled.
    unsettled: Vec<(usize, u64, usize)>,
    chunk: u32,
    page_map: Option<PageMapBuilder>,
    /// Whether pages are gathered in whatever order they come.
    gathers: bool,
    /// The page before, and its block.
    last: Option<(usize, u64)>,
}

impl Chunker {
    /// A chunker for regions of `chunk_len` bytes, a multiple of the page size.
    pub fn new(chunk_len: usize) -> Self {
        Chunker {
            region_pages: (chunk_len / PAGE_LEN).max(1) as u64,
            device_state_len: chunk_len.max(MAX_ELEMENT_LEN),
            max_len: max_chunk_len(chunk_len),
            content: Content::Nothing,
            zero_region_at: 0,
            unsettled: Vec::new(),
            chunk: 0,
            page_map: None,
            gathers: false,
            last: None,
        }
    }

    /// A chunker for pages that come out of order.
    pub fn gathering(chunk_len: usize) -> Self {
        Chunker {
            gathers: true,
            ..Chunker::new(chunk_len)
        }
    }

    /// Says which RAMBlocks there are, before the first page.
    pub fn begin_blocks(&mut self, blocks: &[(String, u64)]) {
        self.page_map = Some(PageMapBuilder::new(blocks));
    }

    /// Where to cut before `element`, which begins at `position` of the open chunk: `Some(cut)` closes the chunk at
    /// `cut ≤ position`, and what lies behind it opens the next one. Ask again, with the new position, until `None`.
    pub fn cut_before(&mut self, element: &Element, position: usize) -> Option<usize> {
        let cut = self.place_of_cut(element, position)?;
        if cut == position {
            self.close();
            return Some(cut);
        }
        self.unsettled
            .iter_mut()
            .for_each(|(_, _, body)| *body -= cut);
        self.chunk += 1;
        self.zero_region_at = 0;
        Some(cut)
    }

    /// Closes the open chunk where parsing stands, because it is full.
    pub fn close(&mut self) {
        self.settle();
        self.chunk += 1;
        self.zero_region_at = 0;
        self.content = Content::Nothing;
    }

    fn place_of_cut(&self, element: &Element, position: usize) -> Option<usize> {
        if position == 0 {
            return None;
        }
        if position + element.len > self.max_len {
            return Some(position);
        }
        let here = Some(position);
        match (self.content, &element.event) {
            (Content::Nothing, _) | (Content::Framing, Event::Framing) => None,
            (Content::DeviceState, Event::DeviceState) => {
                (position >= self.device_state_len).then_some(position)
            }
            (Content::Pages { .. }, Event::Page { block, page, .. }) if self.gathers => {
                let is_next = page.0.checked_sub(1).map(|before| (*block, before)) == self.last;
                let begins_region = page.0.is_multiple_of(self.region_pages);
                let is_half_full = position as u64 * 2 >= self.region_pages * PAGE_LEN as u64;
                (is_next && begins_region && is_half_full).then_some(position)
            }
            (
                Content::Pages {
                    block,
                    region,
                    has_data,
                },
                Event::Page {
                    block: now,
                    page,
                    is_zero,
                    ..
                },
            ) => {
                let next = page.0 / self.region_pages;
                if *now == block && next == region {
                    let late = !has_data && !is_zero && self.zero_region_at > 0;
                    return late.then_some(self.zero_region_at);
                }
                let may_gather = !has_data && *is_zero && *now == block && next == region + 1;
                if may_gather && !next.is_multiple_of(ZERO_REGIONS) {
                    None
                } else {
                    here
                }
            }
            _ => here,
        }
    }

    /// How many bytes behind `position` the parser may be shown, so that where device state is cut does not depend on
    /// how much of it has arrived.
    pub fn window(&self, position: usize) -> usize {
        match self.content {
            Content::DeviceState if position < self.device_state_len => {
                self.device_state_len - position
            }
            _ => self.device_state_len,
        }
    }

    /// Takes in `element`, which begins at `position` of the open chunk, after [`Chunker::cut_before`] said `None`.
    pub fn take(&mut self, element: &Element, position: usize) {
        match element.event {
            Event::Framing | Event::MappedBlock { .. } => self.content = Content::Framing,
            Event::DeviceState => self.content = Content::DeviceState,
            Event::Page {
                block,
                page,
                is_zero,
                body,
            } if self.gathers => {
                self.content = Content::Pages {
                    block,
                    region: page.0 / self.region_pages,
                    has_data: true,
                };
                self.last = Some((block, page.0));
                self.map(block, page.0, position + body, is_zero);
            }
            Event::Page {
                block,
                page,
                is_zero,
                body,
            } => {
                let region = page.0 / self.region_pages;
                let had_data = match self.content {
                    Content::Pages {
                        block: was,
                        region: before,
                        has_data,
                    } => {
                        if (was, before) != (block, region) {
                            self.settle();
                            self.zero_region_at = position;
                        }
                        has_data
                    }
                    _ => false,
                };
                self.content = Content::Pages {
                    block,
                    region,
                    has_data: had_data || !is_zero,
                };
                if is_zero && !had_data {
                    self.unsettled.push((block, page.0, position + body));
                } else {
                    self.settle();
                    self.map(block, page.0, position + body, is_zero);
                }
            }
        }
    }

    /// Enters the unsettled pages into the page map, as pages of the open chunk.
    fn settle(&mut self) {
        let mut unsettled = std::mem::take(&mut self.unsettled);
        for (block, page, body) in unsettled.drain(..) {
            self.map(block, page, body, true);
        }
        self.unsettled = unsettled;
    }

    fn map(&mut self, block: usize, page: u64, body: usize, is_zero: bool) {
        if let Some(page_map) = &mut self.page_map {
            // Both fit: a chunk is at most 64 MiB, and its index was counted in 32 bits.
            page_map.page(
                block,
                page,
                self.chunk,
                u32::try_from(body).unwrap_or(u32::MAX),
                is_zero,
            );
        }
    }

    /// How many bytes to read at the most before `next_page`: enough for the region, not so many that much of the next
    /// one has to be moved.
    pub fn read_len(&self, next_page: Option<u64>) -> usize {
        match (self.content, next_page) {
            _ if self.gathers => GATHER_LEN,
            (Content::Pages { has_data: true, .. }, Some(page)) => {
                let left = self.region_pages - page % self.region_pages;
                usize::try_from(left).unwrap_or(0).max(1) * (PAGE_LEN + RECORD_HEADER_LEN)
            }
            _ => SLACK / 2,
        }
    }

    /// The page map's section payload, when the stream is over; `None` if there was no RAMBlock.
    pub fn finish(mut self) -> Option<PageMapBuilder> {
        self.settle();
        self.page_map
    }
}
