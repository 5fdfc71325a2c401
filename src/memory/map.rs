//! Where a guest's memory lies: its addresses, the blocks behind them, and how much of it is zero.

use std::ops::Range;

use serde::Serialize;

use super::MemoryView;
use crate::bytes::ReadAt;
use crate::pipeline::GuestMemory;
use crate::units::PAGE_LEN;

/// A stretch of a RAMBlock, seen at guest-physical addresses or, as far as is known, at none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stretch {
    /// Its first guest-physical address; `None` if no rule tells one.
    pub address: Option<u64>,
    /// Bytes.
    pub len: u64,
    /// The block's name.
    pub block: String,
    /// Where in the block it begins, in bytes.
    pub offset: u64,
    /// Pages that are not zero.
    pub data_pages: u64,
    /// Pages that are.
    pub zero_pages: u64,
}

/// All of a guest's memory: first what has addresses, in their order, then the rest of each block. What is seen at two
/// places is listed twice.
pub fn map<R: ReadAt>(view: &MemoryView<'_, R>) -> Vec<Stretch> {
    let (memory, physical) = (view.memory(), &view.space().physical);
    let ranges = physical.ranges().iter();
    let mut found: Vec<Stretch> = ranges
        .map(|range| {
            let bytes = range.offset..range.offset + range.len;
            stretch(memory, range.block, bytes, Some(range.start))
        })
        .collect();
    for (index, block) in memory.blocks().iter().enumerate() {
        let ranges = physical.ranges().iter();
        let of_block = ranges.filter(|range| range.block == index);
        let mut seen: Vec<(u64, u64)> = of_block.map(|it| (it.offset, it.len)).collect();
        seen.sort_unstable();
        let mut behind = 0;
        for (offset, len) in seen.into_iter().chain([(block.used_length, 0)]) {
            if offset > behind {
                found.push(stretch(memory, index, behind..offset, None));
            }
            behind = behind.max(offset + len);
        }
    }
    found
}

fn stretch<R: ReadAt>(
    memory: &GuestMemory<'_, R>,
    block: usize,
    bytes: Range<u64>,
    address: Option<u64>,
) -> Stretch {
    const PAGE: u64 = PAGE_LEN as u64;
    let pages = bytes.start / PAGE..bytes.end.div_ceil(PAGE);
    let spans = memory.page_map().data_spans(block);
    let inside = spans.map(|span| {
        let end = span.end.0.min(pages.end);
        end.saturating_sub(span.start.0.max(pages.start))
    });
    let data_pages: u64 = inside.sum();
    Stretch {
        address,
        len: bytes.end - bytes.start,
        block: memory.blocks()[block].idstr.clone(),
        offset: bytes.start,
        data_pages,
        zero_pages: pages.end - pages.start - data_pages,
    }
}
