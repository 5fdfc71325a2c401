//! What is still to be got, for all workers.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Arrived;
use super::earlier::{Way, Ways};
use crate::bytes::ReadAt;
use crate::container::{ChunkEntry, Image};
use crate::pipeline::fetch::{ChunkTable, MOST_AT_ONCE};
use crate::pipeline::{DEFAULT_CHUNK_LEN, PipelineError};
use crate::progress::Progress;
use crate::rate::RateLimit;
use crate::units::ChunkIndex;

/// Stored bytes that are read at once: two chunks of the usual size that do not compress, up to four that do, to be hashed side by
/// side. More would not stay in the core's cache until they are verified: four cost a twentieth more. A chunk is larger than its
/// part of guest memory by its headers.
const REQUEST_LEN: u64 = 2 * (DEFAULT_CHUNK_LEN + DEFAULT_CHUNK_LEN / 64) as u64;

/// How many requests a second there are at least where a rate is kept: what is on its way when the copy is interrupted comes twice.
const REQUESTS_A_SECOND: u64 = 64;

/// Raw bytes that are compared at once, and chunks.
const COMPARED_LEN: u64 = 5 << 20;
const MOST_COMPARED: usize = 8;

/// What is still to be got, for all workers.
pub struct Queue<'a> {
    lacking: &'a [ChunkIndex],
    /// The first of `lacking` that nobody took.
    next: Mutex<usize>,
    pub is_over: AtomicBool,
    /// Of bytes that are asked for.
    limit: RateLimit,
    fetched: AtomicU64,
    made: AtomicU64,
    progress: &'a dyn Progress,
    pub ways: &'a Ways<'a>,
}

/// What a worker does next.
pub enum Task {
    /// All is done, or somebody failed.
    Nothing,
    /// To read chunks that lie beside each other.
    Read(Vec<ChunkEntry>),
    /// To copy chunks that the earlier image has: each with its entry there.
    Same(Vec<(ChunkEntry, ChunkEntry)>),
    /// To guess chunks and compare them.
    Guess(Vec<ChunkEntry>),
}

impl<'a> Queue<'a> {
    /// All of `lacking`.
    pub fn new(
        lacking: &'a [ChunkIndex],
        bytes_per_second: Option<u64>,
        progress: &'a dyn Progress,
        ways: &'a Ways<'a>,
    ) -> Self {
        Queue {
            lacking,
            next: Mutex::new(0),
            is_over: AtomicBool::new(false),
            limit: RateLimit::new(bytes_per_second),
            fetched: AtomicU64::new(0),
            made: AtomicU64::new(0),
            progress,
            ways,
        }
    }

    /// The next chunks that are got the same way.
    pub fn take<R: ReadAt>(&self, table: &ChunkTable<'_, R>) -> Result<Task, PipelineError> {
        if self.progress.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let mut task = Task::Nothing;
        let rate = self.limit.bytes_per_second().unwrap_or(u64::MAX);
        let most = REQUEST_LEN.min(rate / REQUESTS_A_SECOND);
        while let Some(chunk) = self.lacking.get(*next) {
            if self.is_over.load(Ordering::Relaxed) {
                return Ok(Task::Nothing);
            }
            let entry = table.entry(*chunk)?;
            let way = self.ways.of_chunk(&entry);
            match (&mut task, way) {
                (Task::Nothing, Way::Read) => task = Task::Read(vec![entry]),
                (Task::Nothing, Way::Same(before)) => task = Task::Same(vec![(entry, before)]),
                (Task::Nothing, Way::Guess) => task = Task::Guess(vec![entry]),
                (Task::Read(entries), Way::Read)
                    if lies_behind(table.image(), entries, &entry, most) =>
                {
                    entries.push(entry);
                }
                (Task::Same(pairs), Way::Same(before)) if pairs.len() < MOST_AT_ONCE => {
                    pairs.push((entry, before));
                }
                (Task::Guess(entries), Way::Guess) if is_room(entries, &entry) => {
                    entries.push(entry);
                }
                _ => break,
            }
            *next += 1;
        }
        Ok(task)
    }

    /// Waits until `len` bytes more may be asked for.
    pub fn keep_to_rate(&self, len: usize) -> Result<(), PipelineError> {
        let is_over = || self.progress.is_cancelled() || self.is_over.load(Ordering::Relaxed);
        self.limit.wait_for(len, &is_over);
        match self.progress.is_cancelled() {
            true => Err(PipelineError::Cancelled),
            false => Ok(()),
        }
    }

    /// Bytes came, how many was not known before.
    pub fn came(&self, len: usize) {
        self.limit.count(len);
    }

    /// So many stored bytes were read and are right.
    pub fn fetched(&self, len: usize) {
        self.fetched.fetch_add(len as u64, Ordering::Relaxed);
        self.progress.advance(len as u64);
    }

    /// So many stored bytes were made of the earlier image.
    pub fn made(&self, len: usize) {
        self.made.fetch_add(len as u64, Ordering::Relaxed);
        self.progress.advance(len as u64);
    }

    /// What was got.
    pub fn arrived(&self) -> Arrived {
        Arrived {
            fetched_bytes: self.fetched.load(Ordering::Relaxed),
            from_parent_bytes: self.made.load(Ordering::Relaxed),
        }
    }
}

/// Whether `entry` lies right behind the others, and may be read with them: at most `most` bytes together.
fn lies_behind<R: ReadAt>(
    image: &Image<R>,
    entries: &[ChunkEntry],
    entry: &ChunkEntry,
    most: u64,
) -> bool {
    let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
        return true;
    };
    let extent = image.extent(entry);
    let len = extent.end.saturating_sub(image.extent(first).start);
    let is_beside = image.extent(last).end == extent.start;
    is_beside && len <= most && entries.len() < MOST_AT_ONCE
}

fn is_room(entries: &[ChunkEntry], entry: &ChunkEntry) -> bool {
    let lens = entries.iter().map(|entry| u64::from(entry.raw_len));
    let len: u64 = lens.sum::<u64>() + u64::from(entry.raw_len);
    len <= COMPARED_LEN && entries.len() < MOST_COMPARED
}
