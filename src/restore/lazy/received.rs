//! Which pages a guest has already.

use crate::container::{ChunkPages, PageMap};
use crate::units::PageIndex;

use super::desk::Slot;

/// One bit a page: zero pages that were given, and what was there when a broken connection was taken up again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    blocks: Vec<Vec<u64>>,
}

impl Received {
    /// No page of the RAMBlocks of this map.
    pub fn nothing(page_map: &PageMap) -> Self {
        let words = page_map.blocks().iter().map(|block| {
            let words = block.page_count().div_ceil(64);
            vec![0; usize::try_from(words).unwrap_or(0)]
        });
        Received {
            blocks: words.collect(),
        }
    }

    /// Whether a page is there.
    pub fn has(&self, block: usize, page: PageIndex) -> bool {
        let (word, bit) = place(page);
        let words = self.blocks.get(block);
        words
            .and_then(|words| words.get(word))
            .is_some_and(|it| it & bit != 0)
    }

    /// Notes `count` pages from `first` on.
    pub fn add(&mut self, block: usize, first: PageIndex, count: usize) {
        for page in (first.0..).take(count) {
            let (word, bit) = place(PageIndex(page));
            if let Some(word) = self.blocks.get_mut(block).and_then(|it| it.get_mut(word)) {
                *word |= bit;
            }
        }
    }

    /// The chunks of which nothing is missing, by their place among those that hold pages.
    pub fn whole_chunks(&self, pages: &ChunkPages<'_>) -> Vec<Slot> {
        if self.blocks.iter().flatten().all(|word| *word == 0) {
            return Vec::new();
        }
        let slots = pages.chunks().iter().enumerate();
        let whole = slots.filter(|(_, chunk)| {
            let mut of_chunk = pages.in_chunk(**chunk);
            of_chunk.all(|page| self.has(page.block, page.page))
        });
        whole.map(|(slot, _)| slot).collect()
    }
}

fn place(page: PageIndex) -> (usize, u64) {
    let word = usize::try_from(page.0 / 64).unwrap_or(usize::MAX);
    (word, 1 << (page.0 % 64))
}
