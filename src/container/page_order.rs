//! What the page map tells of the order of page records in the stream.
//!
//! Source: spec/container.md §7.

use super::page_map::{PageMap, RunKind};
use crate::units::ChunkIndex;

impl PageMap {
    /// Whether the map names each page of `block`, an index into [`PageMap::blocks`], once only: then it is all the same
    /// which of its pages is read first.
    pub fn names_once(&self, block: usize) -> bool {
        let runs = self.runs.iter();
        let runs = runs.filter(|run| usize::from(run.block) == block);
        let named: u64 = runs.map(|run| u64::from(run.page_count)).sum();
        // No page is missing, so nothing is left over for a second naming.
        let block = self.blocks().get(block);
        block.is_some_and(|block| block.page_count() == named)
    }

    /// The chunks that hold stream records with page bytes, each with the block of such records, an index into
    /// [`PageMap::blocks`]. In stream order; a chunk comes once for each run of records in it.
    pub fn chunk_blocks(&self) -> impl Iterator<Item = (ChunkIndex, usize)> {
        let runs = self.runs.iter();
        let records = runs.filter(|run| run.kind == RunKind::Records);
        records.map(|run| (ChunkIndex(run.chunk.into()), usize::from(run.block)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::PageMapBuilder;
    use crate::units::FileOffset;

    fn map_of(pages: &[(usize, u64, u32, bool)]) -> PageMap {
        let blocks = [("a".to_owned(), 2 * 4096), ("b".to_owned(), 4096)];
        let mut builder = PageMapBuilder::new(&blocks);
        for (block, page, chunk, is_zero) in pages {
            builder.page(*block, *page, *chunk, 8, *is_zero);
        }
        PageMap::parse(&builder.finish(), FileOffset(0), 10, 1 << 20).unwrap()
    }

    #[test]
    fn a_page_that_came_twice_is_not_named_once() {
        let map = map_of(&[(0, 0, 0, true), (0, 1, 1, false), (1, 0, 2, false)]);
        assert!(map.names_once(0) && map.names_once(1) && !map.names_once(2));
        let twice = (1, 0, 3, true);
        let map = map_of(&[(0, 0, 0, true), (0, 1, 1, false), (1, 0, 2, false), twice]);
        assert!(map.names_once(0) && !map.names_once(1));
    }

    #[test]
    fn chunks_with_page_bytes_come_with_their_block() {
        let map = map_of(&[(0, 0, 0, true), (0, 1, 1, false), (1, 0, 2, false)]);
        let found: Vec<_> = map.chunk_blocks().collect();
        assert_eq!(found, [(ChunkIndex(1), 0), (ChunkIndex(2), 1)]);
    }
}
