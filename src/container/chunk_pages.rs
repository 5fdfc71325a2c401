//! From a chunk to the pages that have their bytes in it.
//!
//! [`PageMap::locate`](super::PageMap::locate) leads from a page to its chunk; who gives out whole chunks needs the way back.
//!
//! Source: spec/container.md §7.

use super::page_map::{PageLocation, PageMap, RunKind, Segment};
use crate::units::{ChunkIndex, PageIndex};

/// A page with bytes, and where they lie in the raw bytes of its chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacedPage {
    /// Its RAMBlock: an index into [`PageMap::blocks`](super::PageMap::blocks).
    pub block: usize,
    /// Its number there.
    pub page: PageIndex,
    /// Where its 4096 bytes begin.
    pub body: u32,
}

/// For each chunk its pages. A page that came more than once is found in the chunk that holds, and in no other.
#[derive(Debug)]
pub struct ChunkPages<'m> {
    map: &'m PageMap,
    /// Chunk, block and segment, in order of chunks.
    segments: Vec<(u32, usize, Segment)>,
    chunks: Vec<ChunkIndex>,
}

impl<'m> ChunkPages<'m> {
    /// Turns the map around.
    pub fn of(map: &'m PageMap) -> Self {
        let mut segments = Vec::new();
        for (block, of_block) in map.index.segments.iter().enumerate() {
            for segment in of_block {
                let run = &map.runs[segment.run];
                if run.kind != RunKind::Zero {
                    segments.push((run.chunk, block, *segment));
                }
            }
        }
        segments.sort_by_key(|(chunk, ..)| *chunk);
        let pages = ChunkPages {
            map,
            segments,
            chunks: Vec::new(),
        };
        let mut chunks: Vec<u32> = pages.segments.iter().map(|(chunk, ..)| *chunk).collect();
        chunks.dedup();
        let chunks = chunks.into_iter().map(|chunk| ChunkIndex(chunk.into()));
        let chunks = chunks.filter(|chunk| pages.in_chunk(*chunk).next().is_some());
        let chunks = chunks.collect();
        ChunkPages { chunks, ..pages }
    }

    /// The chunks that hold pages, in their order.
    pub fn chunks(&self) -> &[ChunkIndex] {
        &self.chunks
    }

    /// The pages that have their bytes in `chunk`, block by block in ascending order.
    pub fn in_chunk(&self, chunk: ChunkIndex) -> impl Iterator<Item = PlacedPage> + '_ {
        let is_before = |(one, ..): &(u32, usize, Segment)| u64::from(*one) < chunk.0;
        let first = self.segments.partition_point(is_before);
        let rest = self.segments[first..].iter();
        let of_chunk = rest.take_while(move |(one, ..)| u64::from(*one) == chunk.0);
        of_chunk.flat_map(|&(_, block, segment)| {
            let run = &self.map.runs[segment.run];
            let pages = segment.first_page..segment.end;
            pages.filter_map(move |page| match run.locate(page) {
                PageLocation::Data { body, .. } => Some(PlacedPage {
                    block,
                    page: PageIndex(page),
                    body,
                }),
                PageLocation::Zero => None,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::PageMapBuilder;
    use crate::units::FileOffset;

    #[test]
    fn a_chunk_leads_to_its_pages_and_a_repeated_page_to_its_last_chunk() {
        let blocks = [("a".to_owned(), 4 * 4096), ("b".to_owned(), 4096)];
        let mut builder = PageMapBuilder::new(&blocks);
        for (block, page, chunk, is_zero) in [
            (0, 0, 0, false),
            (0, 1, 0, true),
            (0, 2, 0, true),
            (0, 3, 0, true),
            (1, 0, 1, true),
            (0, 0, 2, false),
            (1, 0, 2, false),
        ] {
            builder.page(block, page, chunk, 8, is_zero);
        }
        let map = PageMap::parse(&builder.finish(), FileOffset(0), 3, 1 << 20).unwrap();
        let pages = ChunkPages::of(&map);
        assert_eq!(pages.chunks(), [ChunkIndex(2)]);
        let found: Vec<_> = pages.in_chunk(ChunkIndex(2)).collect();
        let placed = |block| PlacedPage {
            block,
            page: PageIndex(0),
            body: 8,
        };
        assert_eq!(found, [placed(0), placed(1)]);
        assert_eq!(pages.in_chunk(ChunkIndex(0)).count(), 0);
        assert_eq!(pages.in_chunk(ChunkIndex(1)).count(), 0);
    }
}
