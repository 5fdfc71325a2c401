//! Device sections without a description: every way to cut the bytes at footers, and what is certain of them.
//!
//! A section with number N ends with 0x7e N, and behind it begins the next FULL section or the region ends. A payload
//! may hold bytes that look like that, so all ways are followed. The true one is among them: if there is only one,
//! it is the truth; if there are several, only the first section is certain; if there is none, the stream is cut.
//!
//! Source: spec/qemu-stream.md §9.

use std::collections::BTreeMap;

use super::cursor::Cursor;
use super::device_state::DeviceSection;
use super::error::Place;
use super::section::SectionHeader;
use super::wire;
use crate::units::StreamOffset;

/// How many bytes are searched at most before the sections count as uncertain.
const SEARCH_LIMIT: usize = 128 << 20;

/// How many sections may seem to follow one before they count as uncertain.
const FOLLOWERS_LIMIT: usize = 256;

/// The sections in `bytes`, which begin at `start` in the stream and end before the EOF byte.
///
/// `None` if `bytes` are no row of sections. Lengths are given if there is one way only.
pub(super) fn search(bytes: &[u8], start: StreamOffset) -> Option<Vec<DeviceSection>> {
    if bytes.is_empty() {
        return Some(Vec::new());
    }
    let mut search = Search {
        bytes,
        start,
        budget: SEARCH_LIMIT,
        waiting: BTreeMap::from([(0, Ways::One(None))]),
        done: BTreeMap::new(),
    };
    match search.run() {
        Ways::None => None,
        Ways::One(last) => search.trace(last),
        Ways::Several => Some(vec![search.section(0)?]),
    }
}

struct Search<'a> {
    bytes: &'a [u8],
    start: StreamOffset,
    budget: usize,
    /// Places where a section may begin that are not looked at yet, and how they are reached.
    waiting: BTreeMap<usize, Ways>,
    /// Those that are.
    done: BTreeMap<usize, Ways>,
}

/// In how many ways a place is reached from the beginning.
#[derive(Clone, Copy)]
enum Ways {
    None,
    /// One, and the section before it begins there.
    One(Option<usize>),
    Several,
}

impl Ways {
    /// One more way: through the section that begins at `from` and is itself reached in `ways`.
    fn add(self, from: usize, ways: Ways) -> Ways {
        match (self, ways) {
            (Ways::None, Ways::One(_)) => Ways::One(Some(from)),
            _ => Ways::Several,
        }
    }
}

impl Search<'_> {
    /// Follows every way and says in how many of them the end is reached.
    fn run(&mut self) -> Ways {
        let mut end = Ways::None;
        while let Some((position, ways)) = self.waiting.pop_first() {
            self.done.insert(position, ways);
            for next in self.next_sections(position) {
                if next == self.bytes.len() {
                    end = end.add(position, ways);
                } else {
                    let known = self.waiting.get(&next).copied().unwrap_or(Ways::None);
                    self.waiting.insert(next, known.add(position, ways));
                }
            }
            if self.budget == 0 {
                return Ways::Several;
            }
        }
        end
    }

    /// Where the section behind the one at `position` may begin.
    fn next_sections(&mut self, position: usize) -> Vec<usize> {
        let Some(section) = self.section(position) else {
            return Vec::new();
        };
        let payload = usize::try_from(section.offset.0 - self.start.0).unwrap_or(usize::MAX);
        let rest = self.bytes.get(payload..).unwrap_or_default();
        self.budget = self.budget.saturating_sub(rest.len());
        let footer = footer(section.section_id);
        let footers = rest.windows(footer.len()).enumerate();
        let next: Vec<_> = footers
            .filter(|(_, window)| *window == footer)
            .map(|(at, _)| payload + at + footer.len())
            .filter(|next| *next == self.bytes.len() || self.section(*next).is_some())
            .take(FOLLOWERS_LIMIT)
            .collect();
        if next.len() == FOLLOWERS_LIMIT {
            self.budget = 0;
        }
        next
    }

    /// The section at `position`, if what is there has the form of one.
    fn section(&self, position: usize) -> Option<DeviceSection> {
        let offset = StreamOffset(self.start.0 + position as u64);
        let mut cursor = Cursor::new(self.bytes.get(position..)?, offset);
        if cursor.u8().ok()? != wire::QEMU_VM_SECTION_FULL {
            return None;
        }
        let header = SectionHeader::read(&mut cursor, |offset| Place::after(offset, None)).ok()?;
        Some(DeviceSection {
            idstr: header.idstr,
            instance_id: header.instance_id,
            version_id: header.version_id,
            section_id: header.section_id,
            offset: cursor.offset(),
            len: None,
        })
    }

    /// The sections of the one way that ends with the section at `last`.
    fn trace(&self, last: Option<usize>) -> Option<Vec<DeviceSection>> {
        let before = |position: &usize| match self.done.get(position) {
            Some(Ways::One(before)) => *before,
            _ => None,
        };
        let mut sections = Vec::new();
        let mut end = self.bytes.len();
        for at in std::iter::successors(last, before) {
            let mut section = self.section(at)?;
            let payload = usize::try_from(section.offset.0 - self.start.0).ok()?;
            let footer = footer(section.section_id).len();
            section.len = Some(end.checked_sub(footer)?.checked_sub(payload)? as u64);
            sections.push(section);
            end = at;
        }
        sections.reverse();
        Some(sections)
    }
}

fn footer(section_id: u32) -> [u8; 5] {
    let [a, b, c, d] = section_id.to_be_bytes();
    [wire::QEMU_VM_SECTION_FOOTER, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(id: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![4, 0, 0, 0, id, 1, b'a' + id, 0, 0, 0, 0, 0, 0, 0, 1];
        bytes.extend_from_slice(payload);
        bytes.extend_from_slice(&footer(u32::from(id)));
        bytes
    }

    fn names(bytes: &[u8]) -> Option<Vec<String>> {
        let sections = search(bytes, StreamOffset(100))?;
        Some(sections.into_iter().map(|one| one.idstr).collect())
    }

    fn lens(bytes: &[u8]) -> Vec<Option<u64>> {
        let sections = search(bytes, StreamOffset(100)).unwrap();
        sections.into_iter().map(|one| one.len).collect()
    }

    #[test]
    fn one_way_through_the_footers_is_the_truth() {
        let bytes = [
            section(1, b"x~y"),
            section(2, &[]),
            section(3, &[0x7e, 0, 0, 0, 3, 9]),
        ];
        let bytes = bytes.concat();
        assert_eq!(names(&bytes).unwrap(), ["b", "c", "d"]);
        assert_eq!(lens(&bytes), [Some(3), Some(0), Some(6)]);
    }

    #[test]
    fn of_several_ways_only_the_first_section_is_certain() {
        let inner = section(2, b"");
        let forged = [&footer(1)[..], &inner, &section(4, b"")[..15]].concat();
        let bytes = [section(1, &forged), section(4, b"")].concat();
        assert_eq!(names(&bytes).unwrap(), ["b"]);
        assert_eq!(lens(&bytes), [None]);
    }

    #[test]
    fn sections_that_are_cut_off_are_no_row() {
        let bytes = [section(1, b"xyz"), section(2, b"abc")].concat();
        let whole = section(1, b"xyz").len();
        for len in 1..bytes.len() {
            assert_eq!(names(&bytes[..len]).is_some(), len == whole, "{len}");
        }
    }

    #[test]
    fn hostile_bytes_end_the_search() {
        let mut bytes = Vec::new();
        for id in 0..20_000u32 {
            bytes.extend_from_slice(&section(u8::try_from(id % 2).unwrap(), b""));
        }
        assert_eq!(names(&bytes).unwrap(), ["a"]);
    }
}
