//! Chunks → verdicts: workers read, decompress and hash; nobody gets the bytes.
//!
//! Every worker takes the next chunks, about a MiB of the stream, into buffers of its own and hashes them side by side
//! ([`Digest::of_each`]). Nothing is handed from thread to thread but what is wrong, so that the bytes stay in the
//! cache of the core that reads them.
//!
//! Bytes are read and not mapped: a file that is cut off meanwhile gives an error here and would kill us there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use super::load::{Loader, grow};
use super::{DEFAULT_CHUNK_LEN, PipelineError};
use crate::bytes::ReadAt;
use crate::container::{ChunkEntry, ChunkIter, ContainerError, Image};
use crate::digest::Digest;
use crate::progress::Progress;
use crate::units::ChunkIndex;

/// Bytes of the stream that a worker takes at once, in whole chunks: four of the usual size with their page headers.
const GROUP_LEN: usize = 4 * (DEFAULT_CHUNK_LEN + DEFAULT_CHUNK_LEN / 64);

/// What a check found.
#[derive(Debug, Default)]
pub struct Checked {
    /// Chunks that are right.
    pub good: u64,
    /// Their bytes in the stream.
    pub good_bytes: u64,
    /// Chunks of a delta of which only the checksum of what is stored could be looked at: its parent is not there.
    pub unproven: u64,
    /// What is wrong with each other chunk, in stream order.
    pub damaged: Vec<ContainerError>,
    /// Why it ended before the last chunk: a chunk table that cannot be read.
    pub ended_by: Option<ContainerError>,
}

/// Reads every chunk and holds it against its checksum and digest. Damage does not end it.
///
/// # Errors
/// [`PipelineError::Cancelled`]; [`PipelineError::Worker`].
pub fn check<R: ReadAt>(
    image: &Image<R>,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Checked, PipelineError> {
    let queue = Queue {
        left: Mutex::new(Left {
            chunks: image.chunks(),
            next: None,
            ended_by: None,
        }),
        is_cancelled: AtomicBool::new(false),
        progress,
    };
    let verdicts = thread::scope(|scope| {
        let work = || Worker::new(image).work_on(&queue);
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let verdicts = workers.into_iter().map(thread::ScopedJoinHandle::join);
        verdicts.collect::<Result<Vec<Verdicts>, _>>()
    });
    let verdicts = verdicts.map_err(|_| PipelineError::Worker)?;
    if queue.is_cancelled.load(Ordering::Relaxed) {
        return Err(PipelineError::Cancelled);
    }
    let mut checked = Checked::default();
    let mut damaged = Vec::new();
    for verdicts in verdicts {
        checked.good += verdicts.good;
        checked.good_bytes += verdicts.good_bytes;
        checked.unproven += verdicts.unproven;
        damaged.extend(verdicts.damaged);
    }
    damaged.sort_by_key(|(chunk, _)| *chunk);
    checked.damaged = damaged.into_iter().map(|(_, error)| error).collect();
    checked.ended_by = queue.left().ended_by.take();
    Ok(checked)
}

/// What is still to be done, for all workers.
struct Queue<'a, R: ReadAt> {
    left: Mutex<Left<'a, R>>,
    is_cancelled: AtomicBool,
    progress: &'a dyn Progress,
}

struct Left<'a, R: ReadAt> {
    chunks: ChunkIter<'a, R>,
    /// Taken from `chunks` and not yet given away.
    next: Option<ChunkEntry>,
    ended_by: Option<ContainerError>,
}

impl<'a, R: ReadAt> Queue<'a, R> {
    /// A worker that panicked leaves a list that is still right: it takes whole entries.
    fn left(&self) -> MutexGuard<'_, Left<'a, R>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces `group` by the next chunks; none means that nothing is left, or that the user asked to stop.
    fn next_group(&self, group: &mut Vec<ChunkEntry>) {
        group.clear();
        if self.progress.is_cancelled() {
            self.is_cancelled.store(true, Ordering::Relaxed);
        } else if !self.is_cancelled.load(Ordering::Relaxed) {
            self.left().take(group);
        }
    }
}

impl<R: ReadAt> Left<'_, R> {
    /// Chunks of at most [`GROUP_LEN`] bytes together, or a single larger one.
    fn take(&mut self, group: &mut Vec<ChunkEntry>) {
        let mut len = 0;
        while let Some(entry) = self.next.take().or_else(|| self.read()) {
            len += entry.raw_len as usize;
            if len > GROUP_LEN && !group.is_empty() {
                self.next = Some(entry);
                return;
            }
            group.push(entry);
        }
    }

    fn read(&mut self) -> Option<ChunkEntry> {
        match self.chunks.next()? {
            Ok(entry) => Some(entry),
            Err(error) => {
                self.ended_by = Some(error);
                None
            }
        }
    }
}

/// What one worker found.
#[derive(Default)]
struct Verdicts {
    good: u64,
    good_bytes: u64,
    unproven: u64,
    damaged: Vec<(ChunkIndex, ContainerError)>,
}

struct Worker<'a, R: ReadAt> {
    image: &'a Image<R>,
    loader: Loader,
    raw: Vec<u8>,
    verdicts: Verdicts,
}

impl<'a, R: ReadAt> Worker<'a, R> {
    fn new(image: &'a Image<R>) -> Self {
        Worker {
            image,
            loader: Loader::default(),
            raw: Vec::new(),
            verdicts: Verdicts::default(),
        }
    }

    fn work_on(mut self, queue: &Queue<'_, R>) -> Verdicts {
        let mut group = Vec::new();
        loop {
            queue.next_group(&mut group);
            if group.is_empty() {
                return self.verdicts;
            }
            self.check(&group);
            let done = group.iter().map(|entry| u64::from(entry.raw_len)).sum();
            queue.progress.advance(done);
        }
    }

    fn check(&mut self, group: &[ChunkEntry]) {
        let len = group.iter().map(|entry| entry.raw_len as usize).sum();
        let mut raw = std::mem::take(&mut self.raw);
        grow(&mut raw, len);
        let mut rest = &mut raw[..len];
        let mut loaded: Vec<(&ChunkEntry, &[u8])> = Vec::with_capacity(group.len());
        for entry in group {
            let (piece, behind) = rest.split_at_mut(entry.raw_len as usize);
            rest = behind;
            match self.loader.load(self.image, entry, piece) {
                Ok(()) => loaded.push((entry, piece)),
                Err(ContainerError::NoParent { .. }) => {
                    match self.loader.check_stored(self.image, entry) {
                        Ok(()) => self.verdicts.unproven += 1,
                        Err(error) => self.verdicts.damaged.push((entry.index, error)),
                    }
                }
                Err(error) => self.verdicts.damaged.push((entry.index, error)),
            }
        }
        let pieces: Vec<&[u8]> = loaded.iter().map(|(_, piece)| *piece).collect();
        for ((entry, _), digest) in loaded.iter().zip(Digest::of_each(&pieces)) {
            match entry.check_digest(digest) {
                Ok(()) => {
                    self.verdicts.good += 1;
                    self.verdicts.good_bytes += u64::from(entry.raw_len);
                }
                Err(error) => self.verdicts.damaged.push((entry.index, error)),
            }
        }
        self.raw = raw;
    }
}
