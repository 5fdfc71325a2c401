//! The receiving side: what a chunk would hold if nothing had changed since an earlier save of the guest.

use super::wire::{Asked, State};
use super::{PIECE_LEN, hash_around, short_hash, spaces};
use crate::bytes::ReadAt;
use crate::container::{
    ChunkEntry, ChunkKind, ChunkPages, ContainerError, Image, Layout, PageLocation, PageMap,
    PlacedPage,
};
use crate::digest::Digest;
use crate::pipeline::fetch::ChunkTable;
use crate::pipeline::load::{Loader, grow};
use crate::stream::wire::{RAM_SAVE_FLAG_CONTINUE, RAM_SAVE_FLAG_PAGE, RAM_SAVE_FLAG_ZERO};
use crate::units::{ChunkIndex, PAGE_LEN, PageIndex};

/// Chunks of the earlier image that a thread keeps.
const KEPT_CHUNKS: usize = 4;

/// Bytes of a page record's header, of a block that was named before.
const HEADER_LEN: usize = 8;

/// Runs of pages of both images together; with more than that no guess is made, for their memory.
const MOST_RUNS: usize = 1 << 20;

/// An image of an earlier save. Nothing in it is believed: what comes of it is judged by the digests of the image that arrives.
#[derive(Debug)]
pub struct Earlier<'a, R: ReadAt> {
    table: ChunkTable<'a, R>,
    map: Option<PageMap>,
    /// The beginning of each chunk's digest, and its number, in ascending order.
    digests: Vec<(u64, u64)>,
}

fn beginning(digest: &Digest) -> u64 {
    let first = digest.0.split_first_chunk::<8>();
    first.map_or(0, |(first, _)| u64::from_be_bytes(*first))
}

impl<'a, R: ReadAt> Earlier<'a, R> {
    /// Reads the chunk table and the page map of `image`.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn open(image: &'a Image<R>) -> Result<Self, ContainerError> {
        let mut digests = Vec::new();
        for entry in image.chunks() {
            let entry = entry?;
            digests.push((beginning(&entry.raw_digest), entry.index.0));
        }
        digests.sort_unstable();
        let map = image.page_map()?;
        Ok(Earlier {
            table: ChunkTable::new(image),
            map: map.filter(|map| map.run_count() <= MOST_RUNS / 2),
            digests,
        })
    }

    /// The image.
    pub fn image(&self) -> &'a Image<R> {
        self.table.image()
    }

    /// Its chunk with the raw bytes of this digest, if it has one.
    pub fn same(&self, digest: &Digest) -> Option<ChunkEntry> {
        let wanted = beginning(digest);
        let first = self.digests.partition_point(|(it, _)| *it < wanted);
        let found = self.digests[first..].iter();
        let found = found.take_while(|(it, _)| *it == wanted);
        let mut entries = found.filter_map(|(_, chunk)| self.table.entry(ChunkIndex(*chunk)).ok());
        entries.find(|entry| entry.raw_digest == *digest)
    }
}

/// Which pages the chunks of the image that arrives hold, and which RAMBlocks of the earlier one they belong to.
pub struct Expected<'m> {
    pages: ChunkPages<'m>,
    layout: Layout,
    blocks: Vec<Option<usize>>,
}

impl<'m> Expected<'m> {
    /// Of an image in `layout` with this page map; `None` if nothing can be guessed of it.
    pub fn of<R: ReadAt>(
        map: &'m PageMap,
        layout: Layout,
        earlier: &Earlier<'_, R>,
    ) -> Option<Self> {
        let before = earlier.map.as_ref()?;
        let blocks = map.blocks().iter().map(|block| {
            let mut before = before.blocks().iter();
            before.position(|it| it.idstr == block.idstr)
        });
        (map.run_count() <= MOST_RUNS / 2).then(|| Expected {
            pages: ChunkPages::of(map),
            layout,
            blocks: blocks.collect(),
        })
    }

    /// Whether a chunk holds pages at all.
    pub fn has_pages(&self, chunk: ChunkIndex) -> bool {
        self.pages.in_chunk(chunk).next().is_some()
    }
}

/// What a chunk may hold.
#[derive(Debug)]
pub struct Guess {
    /// The chunk.
    pub entry: ChunkEntry,
    /// Its raw bytes, as far as they could be guessed.
    pub raw: Vec<u8>,
    pieces: Vec<u32>,
}

/// Makes guesses for one thread.
#[derive(Default)]
pub struct Guesser {
    loader: Loader,
    /// Chunks of the earlier image, the latest last; empty if one cannot be read.
    kept: Vec<(ChunkIndex, Vec<u8>)>,
    around: Vec<u8>,
}

impl Guesser {
    /// Guesses the raw bytes of a chunk, in `raw`. That is given back if the earlier image knows none of its pages or the page
    /// map makes no sense; but for chunks that are stored as they are: even of what is not known fewer bytes come over.
    ///
    /// # Errors
    /// The buffer.
    pub fn guess<R: ReadAt>(
        &mut self,
        expected: &Expected<'_>,
        earlier: &Earlier<'_, R>,
        entry: &ChunkEntry,
        mut raw: Vec<u8>,
    ) -> Result<Guess, Vec<u8>> {
        let mut pages: Vec<PlacedPage> = expected.pages.in_chunk(entry.index).collect();
        pages.sort_unstable_by_key(|page| page.body);
        let raw_len = entry.raw_len as usize;
        let mut end = 0;
        for page in &pages {
            if (page.body as usize) < end {
                return Err(raw);
            }
            end = page.body as usize + PIECE_LEN;
        }
        if end > raw_len {
            return Err(raw);
        }
        raw.clear();
        raw.resize(raw_len, 0);
        let mut is_known = entry.kind == ChunkKind::Plain;
        for page in &pages {
            let before = expected.blocks.get(page.block).copied().flatten();
            let place = &mut raw[page.body as usize..page.body as usize + PIECE_LEN];
            is_known |= before.is_some_and(|block| self.copy(earlier, block, page.page, place));
        }
        if !is_known {
            return Err(raw);
        }
        if expected.layout != Layout::Mapped {
            guess_headers(&mut raw, &pages);
        }
        Ok(Guess {
            entry: *entry,
            raw,
            pieces: pages.iter().map(|page| page.body).collect(),
        })
    }

    /// The question about a guess.
    pub fn ask(&mut self, guess: &Guess) -> Asked {
        let digest = &guess.entry.raw_digest;
        let hash = |piece: &u32| {
            let begin = *piece as usize;
            short_hash(digest, &guess.raw[begin..begin + PIECE_LEN])
        };
        Asked {
            chunk: guess.entry.index,
            around: hash_around(digest, &guess.raw, &guess.pieces, &mut self.around),
            hashes: guess.pieces.iter().map(hash).collect(),
            pieces: guess.pieces.clone(),
        }
    }

    /// Copies a page of the earlier image to `place`; `false` if it has no bytes there that can be read.
    fn copy<R: ReadAt>(
        &mut self,
        earlier: &Earlier<'_, R>,
        block: usize,
        page: PageIndex,
        place: &mut [u8],
    ) -> bool {
        let location = earlier.map.as_ref().and_then(|map| map.locate(block, page));
        let Some(PageLocation::Data { chunk, body }) = location else {
            return false;
        };
        let kept = self.kept.iter().position(|(kept, _)| *kept == chunk);
        let kept = kept.unwrap_or_else(|| self.keep(earlier, chunk));
        let body = body as usize;
        match self.kept[kept].1.get(body..body + PAGE_LEN) {
            Some(bytes) => {
                place.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }

    /// Reads a chunk of the earlier image, whose digest does not matter here; gives where it is kept.
    fn keep<R: ReadAt>(&mut self, earlier: &Earlier<'_, R>, chunk: ChunkIndex) -> usize {
        let mut bytes = match self.kept.len() < KEPT_CHUNKS {
            true => Vec::new(),
            false => self.kept.remove(0).1,
        };
        let is_read = earlier.table.entry(chunk).is_ok_and(|entry| {
            let len = entry.raw_len as usize;
            grow(&mut bytes, len);
            bytes.truncate(len);
            let loaded = self.loader.load(earlier.image(), &entry, &mut bytes);
            loaded.is_ok()
        });
        if !is_read {
            bytes.clear();
        }
        self.kept.push((chunk, bytes));
        self.kept.len() - 1
    }
}

impl Guess {
    /// How many pages it has.
    pub fn piece_count(&self) -> usize {
        self.pieces.len()
    }

    /// How many bytes a reply adds that finds wrong what is set in `bits`.
    pub fn wrong_len(&self, bits: &[u8]) -> usize {
        let pieces = (1..=self.pieces.len()).filter(|index| State::is_wrong(bits, *index));
        let around = match State::is_wrong(bits, 0) {
            true => self.raw.len() - self.pieces.len() * PIECE_LEN,
            false => 0,
        };
        around + pieces.count() * PIECE_LEN
    }

    /// Puts `bytes`, as many as [`Guess::wrong_len`] says, where the guess was wrong.
    pub fn correct(&mut self, bits: &[u8], mut bytes: &[u8]) {
        let mut put = |place: &mut [u8]| {
            let (taken, rest) = bytes.split_at(place.len().min(bytes.len()));
            place[..taken.len()].copy_from_slice(taken);
            bytes = rest;
        };
        if State::is_wrong(bits, 0) {
            for space in spaces(self.raw.len(), &self.pieces) {
                put(&mut self.raw[space]);
            }
        }
        for (index, piece) in (1..).zip(&self.pieces) {
            if State::is_wrong(bits, index) {
                put(&mut self.raw[*piece as usize..*piece as usize + PIECE_LEN]);
            }
        }
    }
}

/// Bytes of a zero page's record.
const ZERO_LEN: usize = HEADER_LEN + 1;

fn header(page: u64, flag: u64) -> [u8; HEADER_LEN] {
    let word = page.wrapping_mul(PAGE_LEN as u64) | flag | RAM_SAVE_FLAG_CONTINUE;
    word.to_be_bytes()
}

/// Writes what QEMU's stream has between pages: their headers, and records of zero pages where just so many fit.
fn guess_headers(raw: &mut [u8], pages: &[PlacedPage]) {
    let mut end = 0;
    let mut next = None;
    for page in pages {
        let body = page.body as usize;
        let at = body.checked_sub(HEADER_LEN).filter(|at| *at >= end);
        if let Some(at) = at {
            let before = ((at - end) / ZERO_LEN) as u64;
            let first = next.or_else(|| page.page.0.checked_sub(before));
            guess_zeros(&mut raw[end..at], first);
            raw[at..body].copy_from_slice(&header(page.page.0, RAM_SAVE_FLAG_PAGE));
        }
        end = body + PIECE_LEN;
        next = Some(page.page.0 + 1);
    }
    guess_zeros(&mut raw[end..], next);
}

/// Fills a space between pages with records of zero pages from `first` on.
fn guess_zeros(space: &mut [u8], first: Option<u64>) {
    let Some(first) = first.filter(|_| space.len().is_multiple_of(ZERO_LEN)) else {
        return;
    };
    for (place, page) in space.chunks_exact_mut(ZERO_LEN).zip(first..) {
        place[..HEADER_LEN].copy_from_slice(&header(page, RAM_SAVE_FLAG_ZERO));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_writes_around_pages_is_guessed() {
        // Two zero pages, pages 2 and 5 with bytes, and what lies between and behind them.
        let mut expected = Vec::new();
        let mut pages = Vec::new();
        for page in 0..7 {
            let flag =
                [RAM_SAVE_FLAG_ZERO, RAM_SAVE_FLAG_PAGE][usize::from(page == 2 || page == 5)];
            expected.extend_from_slice(&header(page, flag));
            if flag == RAM_SAVE_FLAG_ZERO {
                expected.push(0);
                continue;
            }
            pages.push(PlacedPage {
                block: 0,
                page: PageIndex(page),
                body: u32::try_from(expected.len()).unwrap(),
            });
            expected.extend_from_slice(&[0; PIECE_LEN]);
        }
        let mut raw = vec![0; expected.len()];
        guess_headers(&mut raw, &pages);
        assert!(raw == expected);
        // Something else behind the last page is left alone.
        let mut raw = vec![0; expected.len() + 5];
        guess_headers(&mut raw, &pages);
        assert_eq!(raw[expected.len() - 9..], [0; 14]);
    }
}
