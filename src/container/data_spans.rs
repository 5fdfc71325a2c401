//! Runs of pages with bytes, and the zero pages between them, without asking for each page.
//!
//! Source: spec/container.md §7.

use std::ops::Range;

use super::page_map::{PageMap, RunKind, Segment};
use crate::units::PageIndex;

impl PageMap {
    /// The runs of pages of `block`, an index into [`PageMap::blocks`], that have bytes: disjoint, in ascending order, no
    /// two of them adjacent. A block that does not exist has none.
    pub fn data_spans(&self, block: usize) -> DataSpans<'_> {
        DataSpans {
            map: self,
            segments: self.index.segments.get(block).map_or(&[], Vec::as_slice),
            page: 0,
            open: None,
        }
    }

    /// How many pages of `block` have bytes.
    pub fn data_page_count(&self, block: usize) -> u64 {
        let spans = self.data_spans(block);
        spans.map(|pages| pages.end.0 - pages.start.0).sum()
    }
}

/// Made by [`PageMap::data_spans`].
#[derive(Debug)]
pub struct DataSpans<'m> {
    map: &'m PageMap,
    segments: &'m [Segment],
    /// What lies before it was looked at.
    page: u64,
    /// What was found and may yet grow.
    open: Option<Range<u64>>,
}

impl DataSpans<'_> {
    /// The next run of pages with bytes in one segment of the map.
    fn next_in_segments(&mut self) -> Option<Range<u64>> {
        while let Some((segment, rest)) = self.segments.split_first() {
            let run = &self.map.runs[segment.run];
            let first = self.page.max(segment.first_page);
            let is_data = |page: u64| run.has_data(page);
            let start = match run.kind {
                RunKind::Zero => None,
                _ => (first..segment.end).find(|page| is_data(*page)),
            };
            let Some(start) = start else {
                self.segments = rest;
                continue;
            };
            let end = (start..segment.end).find(|page| !is_data(*page));
            let end = end.unwrap_or(segment.end);
            self.page = end;
            return Some(start..end);
        }
        None
    }
}

impl Iterator for DataSpans<'_> {
    type Item = Range<PageIndex>;

    fn next(&mut self) -> Option<Range<PageIndex>> {
        loop {
            let found = self.next_in_segments();
            match (&mut self.open, found) {
                (Some(open), Some(found)) if open.end == found.start => open.end = found.end,
                (open, found) => {
                    let is_end = found.is_none();
                    let whole = std::mem::replace(open, found);
                    if whole.is_some() || is_end {
                        return whole.map(|it| PageIndex(it.start)..PageIndex(it.end));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::PageMapBuilder;
    use crate::units::FileOffset;

    #[test]
    fn spans_are_joined_across_runs_and_heed_what_came_later() {
        let blocks = [("a".to_owned(), 300 * 4096), ("b".to_owned(), 4096)];
        let mut builder = PageMapBuilder::new(&blocks);
        builder.zeros(0, 0, 3);
        for page in 3..200 {
            builder.page(0, page, 0, 8, false);
        }
        builder.zeros(0, 200, 100);
        builder.zeros(1, 0, 1);
        // Sent once more, the other way round.
        builder.page(0, 100, 1, 8, true);
        builder.page(0, 299, 1, 20, false);
        let map = PageMap::parse(&builder.finish(), FileOffset(0), 2, 1 << 20).unwrap();
        let spans: Vec<_> = map.data_spans(0).collect();
        let span = |start, end| PageIndex(start)..PageIndex(end);
        assert_eq!(spans, [span(3, 100), span(101, 200), span(299, 300)]);
        assert_eq!(map.data_page_count(0), 97 + 99 + 1);
        assert_eq!(map.data_spans(1).count(), 0);
        assert_eq!(map.data_spans(2).count(), 0);
    }
}
