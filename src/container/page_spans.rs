//! The pages of a block as stretches of one run each, for those who go through them in order.
//!
//! [`PageMap::locate`] looks each page up on its own. Who compares two maps, or counts what is there, takes whole
//! stretches: a zero run of any length is one.
//!
//! Source: spec/container.md §7.

use std::ops::Range;

use super::page_map::{PageLocation, PageMap, Run, RunKind};
use crate::units::{ChunkIndex, PageIndex};

/// Pages that follow each other and that one run tells of.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// The first of them.
    pub first: u64,
    /// The page behind the last one.
    pub end: u64,
    run: Run,
}

impl Span {
    /// Whether all of them are zero, as far as the map tells without a look at their bytes.
    pub fn is_zero(&self) -> bool {
        self.run.kind == RunKind::Zero || self.run.data == 0
    }

    /// The chunk in which those lie that have bytes; `None` if all are zero.
    pub fn chunk(&self) -> Option<ChunkIndex> {
        (!self.is_zero()).then(|| ChunkIndex(self.run.chunk.into()))
    }

    /// Where a page of the span lies.
    pub fn locate(&self, page: PageIndex) -> PageLocation {
        match (self.first..self.end).contains(&page.0) {
            true => self.run.locate(page.0),
            false => PageLocation::Zero,
        }
    }
}

impl PageMap {
    /// The spans of `pages` of `block` (an index into [`PageMap::blocks`]), in ascending order and without a gap; cut to
    /// `pages`, which end at the block's end at the latest.
    pub fn spans(&self, block: usize, pages: Range<u64>) -> impl Iterator<Item = Span> + '_ {
        let segments = self
            .index
            .segments
            .get(block)
            .map_or(&[][..], Vec::as_slice);
        let first = segments.partition_point(|segment| segment.end <= pages.start);
        let segments = segments[first..].iter();
        let inside = segments.take_while(move |segment| segment.first_page < pages.end);
        inside.filter_map(move |segment| {
            Some(Span {
                first: segment.first_page.max(pages.start),
                end: segment.end.min(pages.end),
                run: *self.runs.get(segment.run)?,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::PageMapBuilder;
    use crate::units::FileOffset;

    /// Twenty pages: three with bytes in chunk 0, zeros, two in chunk 1, of which the first came again in chunk 2.
    fn map() -> PageMap {
        let mut builder = PageMapBuilder::new(&[("a".to_owned(), 20 * 4096)]);
        for page in 0..3u32 {
            builder.page(0, page.into(), 0, 8 + page * 4104, false);
        }
        builder.zeros(0, 3, 15);
        builder.page(0, 18, 1, 8, false);
        builder.page(0, 19, 1, 8 + 4104, false);
        builder.page(0, 18, 2, 8, false);
        PageMap::parse(&builder.finish(), FileOffset(0), 3, 1 << 20).unwrap()
    }

    fn shown(pages: Range<u64>) -> Vec<(u64, u64, Option<u64>)> {
        let map = map();
        let spans = map.spans(0, pages);
        spans
            .map(|span| (span.first, span.end, span.chunk().map(|chunk| chunk.0)))
            .collect()
    }

    #[test]
    fn spans_follow_each_other_and_the_last_word_counts() {
        let all = [
            (0, 3, Some(0)),
            (3, 18, None),
            (18, 19, Some(2)),
            (19, 20, Some(1)),
        ];
        assert_eq!(shown(0..20), all);
        assert_eq!(shown(0..u64::MAX), all);
        assert_eq!(shown(2..4), [(2, 3, Some(0)), (3, 4, None)]);
        assert_eq!(shown(20..30), []);
        assert_eq!(map().spans(1, 0..20).count(), 0);
    }

    #[test]
    fn a_span_locates_its_pages_as_the_map_does() {
        let map = map();
        for span in map.spans(0, 0..20) {
            for page in span.first..span.end {
                let page = PageIndex(page);
                assert_eq!(Some(span.locate(page)), map.locate(0, page));
            }
        }
    }
}
