//! Guest memory compared, RAMBlock by RAMBlock.

use serde::{Serialize, Serializer};

use super::{DiffError, DiffFailure, In};
use crate::container::PageMap;
use crate::image::OpenedImage;
use crate::pipeline::{self, ComparedBlock, PageBits, Pages, Which};
use crate::progress::Progress;

/// In what the memory of two guests differs.
#[derive(Debug, Serialize)]
pub struct MemoryDiff {
    /// All RAMBlocks: those of the second image in their order, then those that only the first one has.
    pub blocks: Vec<BlockDiff>,
    /// Chunks that had to be read, of both images together.
    pub chunks_read: u64,
}

/// In what a RAMBlock differs.
#[derive(Debug, Serialize)]
pub struct BlockDiff {
    /// Its name.
    pub idstr: String,
    /// Pages it had; `None` if it was not there.
    pub old_pages: Option<u64>,
    /// Pages it has; `None` if it is gone.
    pub new_pages: Option<u64>,
    /// Pages that both have and that differ.
    pub changed_pages: u64,
    /// Bytes that differ in these.
    pub changed_bytes: u64,
    /// How many of these were zero.
    pub filled_pages: u64,
    /// How many of these are zero now.
    pub emptied_pages: u64,
    /// Which they are.
    #[serde(rename = "ranges", serialize_with = "ranges")]
    pub changed: PageBits,
}

#[derive(Serialize)]
struct PageRange {
    first_page: u64,
    page_count: u64,
}

fn ranges<S: Serializer>(pages: &PageBits, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(pages.ranges().map(|range| PageRange {
        first_page: range.start,
        page_count: range.end - range.start,
    }))
}

impl MemoryDiff {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.blocks.iter().all(BlockDiff::is_empty)
    }
}

impl BlockDiff {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.changed_pages == 0 && self.old_pages == self.new_pages
    }

    /// Pages that only one image has: the first one, and the second one.
    pub fn pages_of_one(&self) -> (u64, u64) {
        let (old, new) = (self.old_pages.unwrap_or(0), self.new_pages.unwrap_or(0));
        (old.saturating_sub(new), new.saturating_sub(old))
    }

    fn of_one(idstr: &str, old_pages: Option<u64>, new_pages: Option<u64>) -> Self {
        BlockDiff {
            idstr: idstr.to_owned(),
            old_pages,
            new_pages,
            changed_pages: 0,
            changed_bytes: 0,
            filled_pages: 0,
            emptied_pages: 0,
            changed: PageBits::default(),
        }
    }
}

/// Compares the memory of two images.
pub(super) fn compare(
    old: &OpenedImage,
    new: &OpenedImage,
    threads: usize,
    progress: &dyn Progress,
) -> Result<MemoryDiff, DiffFailure> {
    let (old_map, new_map) = (page_map(old, Which::Old)?, page_map(new, Which::New)?);
    let olds = Pages {
        image: old.image(),
        map: &old_map,
    };
    let news = Pages {
        image: new.image(),
        map: &new_map,
    };
    let compared = pipeline::compare(&olds, &news, threads, progress);
    let compared = compared.map_err(|failed| DiffFailure {
        which: failed.which,
        error: failed.error.into(),
    })?;
    let mut blocks: Vec<BlockDiff> = Vec::new();
    for block in new_map.blocks() {
        let pages = Some(block.page_count());
        let both = compared
            .blocks
            .iter()
            .find(|both| both.idstr == block.idstr);
        blocks.push(match both {
            Some(both) => of_both(both, pages_of(&old_map, &block.idstr), pages),
            None => BlockDiff::of_one(&block.idstr, None, pages),
        });
    }
    for block in old_map.blocks() {
        if pages_of(&new_map, &block.idstr).is_none() {
            let pages = Some(block.page_count());
            blocks.push(BlockDiff::of_one(&block.idstr, pages, None));
        }
    }
    Ok(MemoryDiff {
        blocks,
        chunks_read: compared.chunks_read,
    })
}

fn page_map(opened: &OpenedImage, which: Which) -> Result<PageMap, DiffFailure> {
    let map = opened.image().page_map().in_image(which)?;
    let missing = || DiffError::NoPageMap {
        image: opened.location().to_string(),
    };
    map.ok_or_else(missing).in_image(which)
}

fn pages_of(map: &PageMap, idstr: &str) -> Option<u64> {
    let mut blocks = map.blocks().iter();
    blocks
        .find(|block| block.idstr == idstr)
        .map(|block| block.page_count())
}

fn of_both(both: &ComparedBlock, old_pages: Option<u64>, new_pages: Option<u64>) -> BlockDiff {
    BlockDiff {
        idstr: both.idstr.clone(),
        old_pages,
        new_pages,
        changed_pages: both.changed.count(),
        changed_bytes: both.changed_bytes,
        filled_pages: both.filled,
        emptied_pages: both.emptied,
        changed: both.changed.clone(),
    }
}
