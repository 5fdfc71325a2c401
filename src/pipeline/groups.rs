//! Chunks → groups that travel as one, cut where the chunks themselves say, so that two saves of one guest share most of them.
//!
//! A group ends behind a chunk whose digest fulfils a condition, within bounds. So one chunk that changed changes its own group
//! and seldom the next one, and chunks that came in between do not move all later cuts.
//!
//! Source: spec/registry.md §3.

use super::fetch::ChunkTable;
use crate::bytes::ReadAt;
use crate::container::{ChunkEntry, ContainerError};
use crate::digest::Digest;
use crate::units::ChunkIndex;

/// Stored bytes of a group, at least, where the next ones follow.
const MIN_LEN: u64 = 2 << 20;
/// Stored bytes of a group of more than one chunk, at most.
const MAX_LEN: u64 = 16 << 20;
/// One chunk of so many ends a group.
const ENDS_ONE_IN: u64 = 8;
/// Places of a group, at most: runs of stored bytes without a gap.
const MAX_PLACES: usize = 4096;
/// Up to so many stored bytes the bounds are as they stand here; of more they are larger, so that groups do not become too many.
const FINE_UP_TO: u64 = 8 << 30;

/// Chunks that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// The first.
    pub first: ChunkIndex,
    /// How many.
    pub count: u64,
    /// Their stored bytes.
    pub stored_len: u64,
}

impl Group {
    /// Its chunks.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkIndex> + use<> {
        (self.first.0..self.first.0 + self.count).map(ChunkIndex)
    }
}

/// All chunks of an image, in groups.
///
/// # Errors
/// As [`ChunkTable::entry`].
pub fn groups<R: ReadAt>(table: &ChunkTable<'_, R>) -> Result<Vec<Group>, ContainerError> {
    let all = || (0..table.image().chunk_count()).map(|chunk| table.entry(ChunkIndex(chunk)));
    let mut stored = 0u64;
    for entry in all() {
        stored = stored.saturating_add(entry?.stored_len.into());
    }
    let mut cutter = Cutter::new(scale(stored));
    for entry in all() {
        cutter.add(&entry?);
    }
    Ok(cutter.finish())
}

/// The smallest power of two that is enough for so many stored bytes.
fn scale(stored: u64) -> u64 {
    stored.div_ceil(FINE_UP_TO).max(1).next_power_of_two()
}

struct Cutter {
    scale: u64,
    groups: Vec<Group>,
    /// The one that is not yet cut off.
    open: Option<Group>,
    places: usize,
    /// Where the last chunk ended in the file.
    end: u64,
}

impl Cutter {
    fn new(scale: u64) -> Self {
        Cutter {
            scale,
            groups: Vec::new(),
            open: None,
            places: 0,
            end: 0,
        }
    }

    fn add(&mut self, entry: &ChunkEntry) {
        let len = u64::from(entry.stored_len);
        let begins_place = entry.stored_offset.0 != self.end;
        let is_full = self.open.is_some_and(|open| {
            open.stored_len + len > MAX_LEN * self.scale
                || (begins_place && self.places == MAX_PLACES)
        });
        if is_full {
            self.cut();
        }
        self.places += usize::from(begins_place || self.open.is_none());
        let open = self.open.get_or_insert(Group {
            first: entry.index,
            count: 0,
            stored_len: 0,
        });
        open.count += 1;
        open.stored_len += len;
        self.end = entry.stored_offset.0.saturating_add(len);
        if open.stored_len >= MIN_LEN * self.scale && self.ends_group(&entry.raw_digest) {
            self.cut();
        }
    }

    fn ends_group(&self, digest: &Digest) -> bool {
        let first = digest.0.first_chunk().copied().unwrap_or_default();
        u64::from_le_bytes(first).is_multiple_of(ENDS_ONE_IN * self.scale)
    }

    fn cut(&mut self) {
        self.groups.extend(self.open.take());
        self.places = 0;
    }

    fn finish(mut self) -> Vec<Group> {
        self.cut();
        self.groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::ChunkKind;
    use crate::units::{FileOffset, StreamOffset};

    /// Chunks of these contents, each of `len` stored bytes with `gap` bytes behind it.
    fn cut(contents: &[u64], len: u32, gap: u64, scale: u64) -> Vec<Vec<u64>> {
        let mut cutter = Cutter::new(scale);
        let step = u64::from(len) + gap;
        for (index, content) in (0..).zip(contents) {
            cutter.add(&ChunkEntry {
                index: ChunkIndex(index),
                stored_offset: FileOffset(100 + index * step),
                stream_offset: StreamOffset(index * u64::from(len)),
                stored_len: len,
                raw_len: len,
                kind: ChunkKind::Plain,
                stored_crc: 0,
                raw_digest: Digest::of(&content.to_le_bytes()),
            });
        }
        let groups = cutter.finish();
        let numbers = |group: &Group| {
            group
                .chunks()
                .map(|it| usize::try_from(it.0).unwrap())
                .collect::<Vec<_>>()
        };
        groups
            .iter()
            .map(|group| numbers(group).iter().map(|at| contents[*at]).collect())
            .collect()
    }

    #[test]
    fn groups_keep_to_their_bounds_and_leave_nothing_out() {
        let contents: Vec<u64> = (0..2000).collect();
        let groups = cut(&contents, 500 << 10, 0, 1);
        assert_eq!(groups.concat(), contents);
        let lens: Vec<u64> = groups
            .iter()
            .map(|group| group.len() as u64 * (500 << 10))
            .collect();
        let (last, others) = lens.split_last().unwrap();
        assert!(
            others.iter().all(|len| (MIN_LEN..=MAX_LEN).contains(len)),
            "{lens:?}"
        );
        assert!(*last <= MAX_LEN);
        let mean = lens.iter().sum::<u64>() / lens.len() as u64;
        assert!((4 << 20..8 << 20).contains(&mean), "{mean}");
    }

    #[test]
    fn what_changed_or_came_in_between_changes_few_groups() {
        let before: Vec<u64> = (0..2000).collect();
        let mut after = before.clone();
        after[300] = 9000;
        after.splice(700..700, [9001, 9002, 9003]);
        after.drain(1500..1502);
        let [before, after] = [&before, &after].map(|contents| cut(contents, 500 << 10, 0, 1));
        let new = after.iter().filter(|group| !before.contains(group)).count();
        assert!(new <= 9, "{new} of {}", after.len());
    }

    #[test]
    fn a_group_has_no_more_places_than_it_may() {
        let contents: Vec<u64> = (0..10_000).collect();
        let groups = cut(&contents, 64, 64, 1);
        let lens: Vec<usize> = groups.iter().map(Vec::len).collect();
        assert_eq!(lens, [4096, 4096, 1808]);
        assert_eq!(cut(&contents, 64, 0, 1).len(), 1);
    }

    #[test]
    fn larger_images_have_larger_groups_and_not_more() {
        assert_eq!(
            [0, FINE_UP_TO, FINE_UP_TO + 1, 9 * FINE_UP_TO].map(scale),
            [1, 1, 2, 16]
        );
        let contents: Vec<u64> = (0..4000).collect();
        let [fine, coarse] = [1, 4].map(|scale| cut(&contents, 500 << 10, 0, scale).len());
        assert!(fine / coarse >= 3, "{fine}, {coarse}");
    }

    #[test]
    fn a_chunk_that_is_too_large_is_a_group_of_its_own() {
        assert_eq!(cut(&[1, 2, 3], 20 << 20, 0, 1), [[1], [2], [3]]);
    }
}
