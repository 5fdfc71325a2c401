//! The guest memory of two images: which pages differ.
//!
//! Chunks are not compared but where they have to be: pages at the same place in two chunks of the same digest are
//! equal and not read, pages that both maps call zero neither. Workers take 4 MiB of guest memory at a time, fetch and
//! verify the chunks that are left of it, and compare their pages. So it does not matter how the two images are laid
//! out, cut into chunks and ordered.
//!
//! A worker holds at most eight chunks; what is found takes one bit a page.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::fetch::{ChunkTable, Fetcher, MOST_AT_ONCE};
use super::region::is_zero;
use super::{DEFAULT_CHUNK_LEN, PipelineError};
use crate::bytes::ReadAt;
use crate::container::{ContainerError, Image, PageLocation, PageMap, Span};
use crate::progress::Progress;
use crate::units::{ChunkIndex, PAGE_LEN, PageIndex};

/// Pages in a worker's turn; a multiple of those in a word of the result, so that no two workers write into one.
const TURN_PAGES: u64 = 16 * WORD_PAGES;

/// Pages in a word of a [`PageBits`].
const WORD_PAGES: u64 = 64;

/// One of two images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The first one.
    Old,
    /// The second one.
    New,
}

/// What ended a comparison, and in which image that was; `None` if it has nothing to do with either.
#[derive(Debug)]
pub struct NotCompared {
    /// The image.
    pub which: Option<Which>,
    /// Why.
    pub error: PipelineError,
}

/// An image and where its pages lie.
pub struct Pages<'a, R: ReadAt> {
    /// The image.
    pub image: &'a Image<R>,
    /// Its page map.
    pub map: &'a PageMap,
}

/// A set of pages of a RAMBlock: one bit each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageBits(Vec<u64>);

/// A RAMBlock that both images have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComparedBlock {
    /// Its name.
    pub idstr: String,
    /// The pages that differ, of those that both have.
    pub changed: PageBits,
    /// Bytes that differ in them.
    pub changed_bytes: u64,
    /// How many of them were zero.
    pub filled: u64,
    /// How many of them are zero now.
    pub emptied: u64,
}

/// What differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compared {
    /// The RAMBlocks that both images have, in the order of the second.
    pub blocks: Vec<ComparedBlock>,
    /// Chunks that were read, of both images together.
    pub chunks_read: u64,
}

impl PageBits {
    /// How many pages are in it.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The pages as ranges, as long as they can be, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next(at, true)?;
            at = self
                .next(first, false)
                .unwrap_or(self.0.len() as u64 * WORD_PAGES);
            Some(first..at)
        })
    }

    /// The first page from `at` on that is in the set, or that is not.
    fn next(&self, at: u64, is_in: bool) -> Option<u64> {
        let first = usize::try_from(at / WORD_PAGES).ok()?;
        let words = self.0.get(first..)?.iter().zip(first as u64..);
        let mut found = words.map(|(word, number)| {
            let wanted = if is_in { *word } else { !*word };
            let passed = at.saturating_sub(number * WORD_PAGES).min(WORD_PAGES);
            let left = wanted
                & u64::MAX
                    .checked_shl(u32::try_from(passed).unwrap_or(64))
                    .unwrap_or(0);
            (left != 0).then(|| number * WORD_PAGES + u64::from(left.trailing_zeros()))
        });
        found.find_map(|page| page)
    }
}

/// Compares the RAMBlocks that both images have, as far as both reach.
///
/// Progress is told in bytes of guest memory. Chunks that were not read are not verified.
///
/// # Errors
/// The first damaged chunk, a page map that does not agree with its image, [`PipelineError::Cancelled`].
pub fn compare<R: ReadAt>(
    old: &Pages<'_, R>,
    new: &Pages<'_, R>,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Compared, NotCompared> {
    let pairs = BlockPair::all(old.map, new.map);
    let total: u64 = pairs.iter().map(|pair| pair.page_count).sum();
    progress.begin("comparing", Some(total * PAGE_LEN as u64));
    let work = Work {
        halves: [
            (old.map, ChunkTable::new(old.image)),
            (new.map, ChunkTable::new(new.image)),
        ],
        pairs: &pairs,
        turns: Mutex::new((0, 0)),
        chunks_read: AtomicU64::new(0),
        is_over: AtomicBool::new(false),
        progress,
    };
    let done = thread::scope(|scope| {
        let workers = (0..threads.max(1)).map(|_| scope.spawn(|| Worker::new(&work).run()));
        let workers: Vec<_> = workers.collect();
        let joined = workers.into_iter().map(|worker| worker.join());
        let worker = |_| NotCompared {
            which: None,
            error: PipelineError::Worker,
        };
        let done = joined.map(|done| done.map_err(worker).flatten());
        // All are joined before the first error is told.
        done.fold(Ok(()), Result::and)
    });
    progress.end();
    done?;
    Ok(Compared {
        chunks_read: work.chunks_read.into_inner(),
        blocks: pairs.into_iter().map(BlockPair::finish).collect(),
    })
}

/// A block that both have, and what was found in it.
struct BlockPair {
    idstr: String,
    /// Its number in each image.
    numbers: [usize; 2],
    /// Pages that both have.
    page_count: u64,
    changed: Vec<AtomicU64>,
    changed_bytes: AtomicU64,
    filled: AtomicU64,
    emptied: AtomicU64,
}

impl BlockPair {
    fn all(old: &PageMap, new: &PageMap) -> Vec<Self> {
        let blocks = new.blocks().iter().enumerate();
        let pairs = blocks.filter_map(|(number, block)| {
            let mut olds = old.blocks().iter().enumerate();
            let (old_number, old) = olds.find(|(_, old)| old.idstr == block.idstr)?;
            let page_count = block.page_count().min(old.page_count());
            let words = (0..page_count.div_ceil(WORD_PAGES)).map(|_| AtomicU64::new(0));
            Some(BlockPair {
                idstr: block.idstr.clone(),
                numbers: [old_number, number],
                page_count,
                changed: words.collect(),
                changed_bytes: AtomicU64::new(0),
                filled: AtomicU64::new(0),
                emptied: AtomicU64::new(0),
            })
        });
        pairs.collect()
    }

    fn tell(&self, page: u64, old: &[u8], new: &[u8]) {
        let word = usize::try_from(page / WORD_PAGES).unwrap_or(usize::MAX);
        if let Some(word) = self.changed.get(word) {
            word.fetch_or(1 << (page % WORD_PAGES), Ordering::Relaxed);
        }
        let differing = old.iter().zip(new).filter(|(old, new)| old != new).count();
        self.changed_bytes
            .fetch_add(differing as u64, Ordering::Relaxed);
        self.filled
            .fetch_add(is_zero(old).into(), Ordering::Relaxed);
        self.emptied
            .fetch_add(is_zero(new).into(), Ordering::Relaxed);
    }

    fn finish(self) -> ComparedBlock {
        let words = self.changed.into_iter().map(AtomicU64::into_inner);
        ComparedBlock {
            idstr: self.idstr,
            changed: PageBits(words.collect()),
            changed_bytes: self.changed_bytes.into_inner(),
            filled: self.filled.into_inner(),
            emptied: self.emptied.into_inner(),
        }
    }
}

/// What all workers share.
struct Work<'a, R: ReadAt> {
    halves: [(&'a PageMap, ChunkTable<'a, R>); 2],
    pairs: &'a [BlockPair],
    /// The next turn: a block pair and a page in it.
    turns: Mutex<(usize, u64)>,
    chunks_read: AtomicU64,
    /// Whether a worker met an error, so that the others need not go on.
    is_over: AtomicBool,
    progress: &'a dyn Progress,
}

impl<R: ReadAt> Work<'_, R> {
    fn next_turn(&self) -> Option<(&BlockPair, Range<u64>)> {
        // A worker that panicked left it whole: it is written at once.
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (number, first) = *turns;
            let pair = self.pairs.get(number)?;
            let end = first.saturating_add(TURN_PAGES).min(pair.page_count);
            *turns = if end < pair.page_count {
                (number, end)
            } else {
                (number + 1, 0)
            };
            if first < end {
                return Some((pair, first..end));
            }
        }
    }
}

/// A page that has to be looked at: its number, and where each image has its bytes; `None` where it is zero.
#[derive(Clone, Copy)]
struct Suspect {
    page: u64,
    places: [Option<(ChunkIndex, u32)>; 2],
}

impl Suspect {
    fn chunk(&self, side: usize) -> Option<ChunkIndex> {
        self.places[side].map(|(chunk, _)| chunk)
    }
}

struct Worker<'w, 'a, R: ReadAt> {
    work: &'w Work<'a, R>,
    fetchers: [Fetcher; 2],
    suspects: Vec<Suspect>,
    /// Chunks of each image that are fetched at once.
    most: usize,
}

const SIDES: [Which; 2] = [Which::Old, Which::New];

fn in_image(side: usize) -> impl Fn(ContainerError) -> NotCompared {
    move |error| NotCompared {
        which: Some(SIDES[side]),
        error: error.into(),
    }
}

impl<'w, 'a, R: ReadAt> Worker<'w, 'a, R> {
    fn new(work: &'w Work<'a, R>) -> Self {
        let lens = work
            .halves
            .each_ref()
            .map(|(_, table)| table.image().max_chunk_len());
        let longest = lens.into_iter().max().unwrap_or(0) as usize;
        Worker {
            work,
            fetchers: Default::default(),
            suspects: Vec::new(),
            most: (MOST_AT_ONCE * 2 * DEFAULT_CHUNK_LEN / longest.max(1)).clamp(1, MOST_AT_ONCE),
        }
    }

    fn run(mut self) -> Result<(), NotCompared> {
        while !self.work.is_over.load(Ordering::Relaxed)
            && let Some((pair, pages)) = self.work.next_turn()
        {
            let len = (pages.end - pages.start) * PAGE_LEN as u64;
            let done = match self.work.progress.is_cancelled() {
                true => Err(NotCompared {
                    which: None,
                    error: PipelineError::Cancelled,
                }),
                false => self.turn(pair, pages),
            };
            if let Err(error) = done {
                self.work.is_over.store(true, Ordering::Relaxed);
                return Err(error);
            }
            self.work.progress.advance(len);
        }
        Ok(())
    }

    fn turn(&mut self, pair: &BlockPair, pages: Range<u64>) -> Result<(), NotCompared> {
        self.suspects.clear();
        self.suspect(pair, pages)?;
        self.suspects
            .sort_unstable_by_key(|one| (one.chunk(0), one.chunk(1), one.page));
        let suspects = std::mem::take(&mut self.suspects);
        let mut left = suspects.as_slice();
        while !left.is_empty() {
            let batch = Batch::of(left, self.most);
            self.look(pair, &batch)?;
            left = &left[batch.suspects.len()..];
        }
        self.suspects = suspects;
        Ok(())
    }

    /// Finds the pages that may differ.
    fn suspect(&mut self, pair: &BlockPair, pages: Range<u64>) -> Result<(), NotCompared> {
        let [(old_map, _), (new_map, _)] = &self.work.halves;
        let mut olds = old_map.spans(pair.numbers[0], pages.clone());
        let mut news = new_map.spans(pair.numbers[1], pages);
        let (mut old, mut new) = (olds.next(), news.next());
        while let (Some(of_old), Some(of_new)) = (old, new) {
            let end = of_old.end.min(of_new.end);
            self.suspect_in(&of_old, &of_new, of_old.first.max(of_new.first)..end)?;
            if of_old.end == end {
                old = olds.next();
            }
            if of_new.end == end {
                new = news.next();
            }
        }
        Ok(())
    }

    fn suspect_in(&mut self, old: &Span, new: &Span, pages: Range<u64>) -> Result<(), NotCompared> {
        if old.is_zero() && new.is_zero() {
            return Ok(());
        }
        let are_same = match (old.chunk(), new.chunk()) {
            (Some(old), Some(new)) => self.are_same(old, new)?,
            _ => false,
        };
        for page in pages {
            let places = [old, new].map(|span| match span.locate(PageIndex(page)) {
                PageLocation::Data { chunk, body } => Some((chunk, body)),
                PageLocation::Zero => None,
            });
            let is_equal = match places {
                [None, None] => true,
                [Some((_, old)), Some((_, new))] => are_same && old == new,
                _ => false,
            };
            if !is_equal {
                self.suspects.push(Suspect { page, places });
            }
        }
        Ok(())
    }

    /// Whether two chunks hold the same bytes.
    fn are_same(&self, old: ChunkIndex, new: ChunkIndex) -> Result<bool, NotCompared> {
        let [(_, olds), (_, news)] = &self.work.halves;
        let old = olds.entry(old).map_err(in_image(0))?;
        let new = news.entry(new).map_err(in_image(1))?;
        Ok(old.raw_len == new.raw_len && old.raw_digest == new.raw_digest)
    }

    /// Fetches the chunks of a batch and compares its pages.
    fn look(&mut self, pair: &BlockPair, batch: &Batch<'_>) -> Result<(), NotCompared> {
        const ZEROS: [u8; PAGE_LEN] = [0; PAGE_LEN];
        let [(_, olds), (_, news)] = &self.work.halves;
        let [old, new] = &mut self.fetchers;
        let raw = [
            old.fetch(olds, &batch.chunks[0]).map_err(in_image(0))?,
            new.fetch(news, &batch.chunks[1]).map_err(in_image(1))?,
        ];
        let read = batch.chunks.iter().map(Vec::len).sum::<usize>();
        self.work
            .chunks_read
            .fetch_add(read as u64, Ordering::Relaxed);
        for suspect in batch.suspects {
            let mut pages: [&[u8]; 2] = [&ZEROS; 2];
            for side in 0..2 {
                let Some((chunk, body)) = suspect.places[side] else {
                    continue;
                };
                let number = batch.chunks[side].iter().position(|one| *one == chunk);
                let bytes = number.and_then(|number| {
                    let body = body as usize;
                    raw[side]
                        .get(number)?
                        .get(body..body.checked_add(PAGE_LEN)?)
                });
                pages[side] = bytes.ok_or_else(|| disagrees(self.work, side, chunk))?;
            }
            let [old, new] = pages;
            if old != new {
                pair.tell(suspect.page, old, new);
            }
        }
        Ok(())
    }
}

/// The map names bytes that its chunk does not have.
fn disagrees<R: ReadAt>(work: &Work<'_, R>, side: usize, chunk: ChunkIndex) -> NotCompared {
    let (_, table) = &work.halves[side];
    let entry = table.entry(chunk);
    let at = entry.map(|entry| entry.stream_offset).unwrap_or_default();
    NotCompared {
        which: Some(SIDES[side]),
        error: PipelineError::PageMap { at },
    }
}

/// Suspects that lie in a few chunks.
struct Batch<'s> {
    suspects: &'s [Suspect],
    chunks: [Vec<ChunkIndex>; 2],
}

impl<'s> Batch<'s> {
    /// The first ones that lie in at most `most` chunks of each image, at least one.
    fn of(suspects: &'s [Suspect], most: usize) -> Self {
        let mut chunks = [Vec::new(), Vec::new()];
        let mut count = 0;
        for suspect in suspects {
            let fresh: [Option<ChunkIndex>; 2] = [0, 1].map(|side| {
                let chunk = suspect.chunk(side);
                chunk.filter(|chunk| !chunks[side].contains(chunk))
            });
            if (0..2).any(|side| fresh[side].is_some() && chunks[side].len() >= most) {
                break;
            }
            for (chunks, fresh) in chunks.iter_mut().zip(fresh) {
                chunks.extend(fresh);
            }
            count += 1;
        }
        Batch {
            suspects: &suspects[..count],
            chunks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_as_long_as_they_can_be() {
        let none = PageBits(vec![0, 0]);
        assert_eq!((none.ranges().count(), none.count()), (0, 0));
        let bits = PageBits(vec![1 << 63 | 0b101, u64::MAX, 1]);
        let ranges: Vec<_> = bits.ranges().collect();
        assert_eq!(ranges, [0..1, 2..3, 63..129]);
        assert_eq!(bits.count(), 3 + 64 + 1);
        let to_the_end = PageBits(vec![1 << 63]);
        let mut ranges = to_the_end.ranges();
        assert_eq!((ranges.next(), ranges.next()), (Some(63..64), None));
    }

    fn suspect(page: u64, old: Option<u64>, new: Option<u64>) -> Suspect {
        let place = |chunk: Option<u64>| chunk.map(|chunk| (ChunkIndex(chunk), 8));
        Suspect {
            page,
            places: [place(old), place(new)],
        }
    }

    #[test]
    fn a_batch_ends_before_it_would_need_too_many_chunks() {
        let suspects = [
            suspect(0, Some(1), Some(7)),
            suspect(1, Some(1), None),
            suspect(2, None, Some(8)),
            suspect(3, Some(1), Some(9)),
        ];
        let batch = Batch::of(&suspects, 2);
        assert_eq!(batch.suspects.len(), 3);
        assert_eq!(
            batch.chunks,
            [vec![ChunkIndex(1)], vec![ChunkIndex(7), ChunkIndex(8)]]
        );
        assert_eq!(Batch::of(&suspects, 1).suspects.len(), 2);
    }
}
