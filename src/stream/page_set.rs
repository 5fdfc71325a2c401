//! Which pages of a RAMBlock have come: one bit a page, and only where some but not all have.

const LEAF_PAGES: u64 = 1 << 15;
const WORDS: usize = 512;

/// A set of page numbers below a fixed count.
///
/// Memory: 16 bytes for 128 MiB of guest memory, and 4 KiB more while some but not all of its pages are in the set.
pub(super) struct PageSet {
    page_count: u64,
    present: u64,
    leaves: Vec<Leaf>,
}

enum Leaf {
    Empty,
    Partial(Box<Partial>),
    Full,
}

struct Partial {
    present: u64,
    words: [u64; WORDS],
}

impl PageSet {
    /// The empty set of pages below `page_count`; `None` if this host cannot address that many.
    pub(super) fn new(page_count: u64) -> Option<Self> {
        let leaf_count = usize::try_from(page_count.div_ceil(LEAF_PAGES)).ok()?;
        let mut leaves = Vec::new();
        leaves.resize_with(leaf_count, || Leaf::Empty);
        Some(PageSet {
            page_count,
            present: 0,
            leaves,
        })
    }

    /// Puts `page` in; whether it was not there before. A page beyond the count changes nothing.
    #[inline]
    pub(super) fn insert(&mut self, page: u64) -> bool {
        let leaf_pages = self.leaf_pages(page / LEAF_PAGES);
        let leaf = usize::try_from(page / LEAF_PAGES).ok();
        let Some(leaf) = leaf.and_then(|leaf| self.leaves.get_mut(leaf)) else {
            return false;
        };
        let is_new = leaf.insert(page % LEAF_PAGES, leaf_pages);
        self.present += u64::from(is_new);
        is_new
    }

    /// Puts every page in.
    pub(super) fn fill(&mut self) {
        self.leaves.fill_with(|| Leaf::Full);
        self.present = self.page_count;
    }

    fn leaf_pages(&self, leaf: u64) -> u64 {
        let before = leaf.saturating_mul(LEAF_PAGES);
        self.page_count.saturating_sub(before).min(LEAF_PAGES)
    }

    /// How many pages are not in the set.
    pub(super) fn missing(&self) -> u64 {
        self.page_count - self.present
    }

    /// The first page that is not in the set.
    pub(super) fn first_missing(&self) -> Option<u64> {
        let is_open = |leaf: &Leaf| !matches!(leaf, Leaf::Full);
        let leaf = self.leaves.iter().position(is_open)?;
        let within = match &self.leaves[leaf] {
            Leaf::Partial(partial) => partial.first_missing(),
            Leaf::Empty | Leaf::Full => 0,
        };
        Some(leaf as u64 * LEAF_PAGES + within)
    }
}

impl Leaf {
    #[inline]
    fn insert(&mut self, page: u64, leaf_pages: u64) -> bool {
        if page >= leaf_pages || matches!(self, Leaf::Full) {
            return false;
        }
        if matches!(self, Leaf::Empty) {
            let words = [0; WORDS];
            *self = Leaf::Partial(Box::new(Partial { present: 0, words }));
        }
        let Leaf::Partial(partial) = self else {
            return false;
        };
        let is_new = partial.insert(page);
        if partial.present == leaf_pages {
            *self = Leaf::Full;
        }
        is_new
    }
}

impl Partial {
    #[inline]
    fn insert(&mut self, page: u64) -> bool {
        let word = usize::try_from(page / 64).unwrap_or(usize::MAX);
        let Some(word) = self.words.get_mut(word) else {
            return false;
        };
        let bit = 1 << (page % 64);
        let is_new = *word & bit == 0;
        *word |= bit;
        self.present += u64::from(is_new);
        is_new
    }

    fn first_missing(&self) -> u64 {
        let words = self.words.iter().zip(0u64..);
        let mut open = words.filter(|(word, _)| **word != u64::MAX);
        open.next().map_or(LEAF_PAGES, |(word, index)| {
            index * 64 + u64::from(word.trailing_ones())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_set_misses_nothing_and_holds_no_bits() {
        let mut set = PageSet::new(LEAF_PAGES + 3).unwrap();
        for page in 0..LEAF_PAGES + 3 {
            assert_eq!(set.first_missing(), Some(page));
            assert!(set.insert(page));
        }
        assert_eq!((set.missing(), set.first_missing()), (0, None));
        assert!(set.leaves.iter().all(|leaf| matches!(leaf, Leaf::Full)));
        assert!(!set.insert(7) && !set.insert(LEAF_PAGES + 3) && !set.insert(u64::MAX));
    }

    #[test]
    fn the_largest_block_costs_nothing_until_pages_come() {
        let set = PageSet::new((16 << 40) / 4096).unwrap();
        assert_eq!(set.missing(), 1 << 32);
        assert!(set.leaves.len() * size_of::<Leaf>() <= 2 << 20);
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_plain_set(
            count in 1..70_000u64,
            pages in proptest::collection::vec(0..70_000u64, 0..400),
        ) {
            let mut set = PageSet::new(count).unwrap();
            let mut plain = BTreeSet::new();
            for page in pages {
                prop_assert_eq!(set.insert(page), page < count && plain.insert(page));
            }
            prop_assert_eq!(set.missing(), count - plain.len() as u64);
            prop_assert_eq!(set.first_missing(), (0..count).find(|page| !plain.contains(page)));
        }
    }
}
