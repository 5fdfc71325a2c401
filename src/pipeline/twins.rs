//! For each chunk of a new delta the chunk of its parent that it may follow.
//!
//! One with the same digest, anywhere in the parent, first: then nothing has to be stored. Else the one that holds the same
//! guest memory, which the parent's page map tells, or for device state the parent's. What is kept of the parent is small: 16
//! bytes a chunk, and 8 for each 64 KiB of guest memory.

use std::collections::HashMap;
use std::sync::Arc;

use super::PipelineError;
use super::load::{Loader, grow};
use crate::container::{ChunkEntry, ContainerError, PageLocation, PageMap, ParentId, ParentImage};
use crate::digest::Digest;
use crate::units::{ChunkIndex, PAGE_LEN, PageIndex, StreamOffset};

/// For each so many pages of guest memory one chunk of the parent is known.
const GRANULE_PAGES: u64 = 16;

/// What a new chunk holds, as far as that tells which chunk of the parent may be like it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// Pages of the RAMBlock of that idstr, from this one on.
    Pages(&'a str, u64),
    /// Device state.
    DeviceState,
    /// Framing, or nothing that is known.
    Other,
}

/// So many pages at a place: their number, and a chunk.
type Granule = (u64, u32);

/// A parent of new deltas, ready to be asked. Any thread may ask.
#[derive(Debug)]
pub struct Twins {
    parent: Arc<ParentImage>,
    name: Option<String>,
    /// The beginning of each chunk's digest and its number, in order.
    by_digest: Vec<(u64, u32)>,
    /// For each RAMBlock those of its granules that are not zero, in order, each with the chunk of the first page that is not.
    by_place: HashMap<String, Vec<Granule>>,
    device_state: Option<u32>,
}

impl Twins {
    /// Reads the parent's chunk table and page map. `name` is that of its file.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn of(parent: Arc<ParentImage>, name: Option<String>) -> Result<Self, ContainerError> {
        let count = usize::try_from(parent.chunk_count()).unwrap_or(0);
        let mut by_digest = Vec::new();
        // A table that cannot be read is found below.
        by_digest.reserve_exact(count.min(1 << 22));
        for entry in parent.chunks() {
            let entry = entry?;
            let index = u32::try_from(entry.index.0).map_err(|_| ContainerError::Full)?;
            by_digest.push((beginning(&entry.raw_digest), index));
        }
        by_digest.sort_unstable();
        let by_place = parent.page_map()?.as_ref().map(places).unwrap_or_default();
        let device_state = device_state(&parent);
        Ok(Twins {
            parent,
            name,
            by_digest,
            by_place,
            device_state,
        })
    }

    /// The parent.
    pub fn parent(&self) -> &Arc<ParentImage> {
        &self.parent
    }

    /// As a delta names it.
    pub fn parent_id(&self) -> ParentId {
        self.parent.as_parent()
    }

    /// The name of the parent's file, if it has one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The parent's chunk of these bytes.
    ///
    /// # Errors
    /// A chunk table that cannot be read.
    pub(super) fn same(
        &self,
        raw_len: usize,
        digest: &Digest,
    ) -> Result<Option<ChunkIndex>, ContainerError> {
        let wanted = beginning(digest);
        let first = self.by_digest.partition_point(|(found, _)| *found < wanted);
        let alike = self.by_digest[first..].iter();
        for (_, index) in alike.take_while(|(found, _)| *found == wanted) {
            let entry = self.parent.look_up(ChunkIndex(u64::from(*index)))?;
            if entry.raw_len as usize == raw_len && entry.raw_digest == *digest {
                return Ok(Some(entry.index));
            }
        }
        Ok(None)
    }

    /// The parent's chunk that is likely to be like one of `chunk_len` bytes of guest memory that holds `content`.
    pub(super) fn near(&self, content: Content<'_>, chunk_len: usize) -> Option<ChunkIndex> {
        let found = match content {
            Content::Pages(idstr, first_page) => {
                let granules = self.by_place.get(idstr)?;
                let region_pages = (chunk_len / PAGE_LEN).max(1) as u64;
                let end = first_page - first_page % region_pages + region_pages;
                let range = first_page / GRANULE_PAGES..end.div_ceil(GRANULE_PAGES);
                let start = granules.partition_point(|(number, _)| *number < range.start);
                let end = granules.partition_point(|(number, _)| *number < range.end);
                most_of(granules.get(start..end)?)
            }
            Content::DeviceState => self.device_state,
            Content::Other => None,
        };
        found.map(|index| ChunkIndex(index.into()))
    }
}

/// The chunk that has most of these granules, the first of several: QEMU's migration cuts a region in two where its time is over.
fn most_of(granules: &[Granule]) -> Option<u32> {
    let goes_on = |before: &Granule, next: &Granule| (before.0 + 1, before.1) == *next;
    let mut most: Option<(usize, u32)> = None;
    for run in granules.chunk_by(goes_on) {
        if let Some((_, chunk)) = run.first()
            && most.is_none_or(|(len, _)| run.len() > len)
        {
            most = Some((run.len(), *chunk));
        }
    }
    most.map(|(_, chunk)| chunk)
}

/// The first eight bytes, to look for it with.
fn beginning(digest: &Digest) -> u64 {
    let (first, _) = digest.0.as_chunks::<8>();
    first.first().map_or(0, |first| u64::from_be_bytes(*first))
}

/// Memory for data only: a map may speak of any length of zeros.
fn places(page_map: &PageMap) -> HashMap<String, Vec<Granule>> {
    let blocks = page_map.blocks().iter().enumerate();
    let of_blocks = blocks.map(|(index, block)| {
        let mut granules: Vec<Granule> = Vec::new();
        for pages in page_map.data_spans(index) {
            let mut page = pages.start.0;
            while page < pages.end.0 {
                let number = page / GRANULE_PAGES;
                let is_new = granules.last().is_none_or(|(last, _)| *last < number);
                if let (true, Some(PageLocation::Data { chunk, .. })) =
                    (is_new, page_map.locate(index, PageIndex(page)))
                    && let Ok(chunk) = u32::try_from(chunk.0)
                {
                    granules.push((number, chunk));
                }
                page = (number + 1) * GRANULE_PAGES;
            }
        }
        (block.idstr.clone(), granules)
    });
    of_blocks.collect()
}

/// The chunk in which the device state begins; `None` if the image does not tell.
fn device_state(parent: &ParentImage) -> Option<u32> {
    let at = parent.manifest().ok()?.stream?.device_state_at?;
    let chunk = parent.chunk_of_stream_offset(StreamOffset(at)).ok()?;
    u32::try_from(chunk.index.0).ok()
}

/// Reads the parent's chunks, one after the other.
#[derive(Default)]
pub(super) struct TwinReader {
    loader: Loader,
    raw: Vec<u8>,
}

impl TwinReader {
    /// The raw bytes of that chunk of the parent, verified.
    pub(super) fn read(
        &mut self,
        twins: &Twins,
        chunk: ChunkIndex,
    ) -> Result<&[u8], PipelineError> {
        let entry = twins.parent.look_up(chunk).map_err(PipelineError::Parent)?;
        self.load(twins, &entry).map_err(PipelineError::Parent)
    }

    fn load(&mut self, twins: &Twins, entry: &ChunkEntry) -> Result<&[u8], ContainerError> {
        let len = entry.raw_len as usize;
        grow(&mut self.raw, len);
        let raw = &mut self.raw[..len];
        self.loader.load(twins.parent.as_ref(), entry, raw)?;
        entry.check_digest(Digest::of(raw))?;
        Ok(raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_region_in_two_chunks_the_longer_one_is_taken() {
        assert_eq!(most_of(&[]), None);
        assert_eq!(most_of(&[(0, 3), (2, 4), (3, 4)]), Some(4));
        assert_eq!(most_of(&[(0, 3), (1, 3), (2, 4), (3, 4)]), Some(3));
        assert_eq!(most_of(&[(0, 3), (2, 3), (3, 4), (4, 4)]), Some(4));
    }
}
