//! Chunks from another place into a file of the same image: read, verified, and only then written.
//!
//! Every worker takes the next chunks that lie beside each other, about a MiB, reads them with one request, and hashes
//! them side by side. There are more workers than cores where the other place is far: most of them wait.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::PipelineError;
use super::fetch::{ChunkTable, MOST_AT_ONCE};
use super::load::{Loader, grow};
use crate::bytes::{ReadAt, WriteAt};
use crate::container::{ChunkEntry, ContainerError, Image};
use crate::digest::Digest;
use crate::progress::Progress;
use crate::units::{ChunkIndex, FileOffset};

/// Stored bytes that are asked for at once.
const REQUEST_LEN: u64 = 1 << 20;

/// The longest sleep of a worker that keeps to a rate.
const NAP: Duration = Duration::from_millis(50);

/// Where chunks come from, and how.
pub struct Arrival<'a, S: ReadAt> {
    /// Something that holds the same image.
    pub source: &'a S,
    /// Workers.
    pub threads: usize,
    /// Stored bytes a second, at most.
    pub bytes_per_second: Option<u64>,
}

/// Reads the chunks `lacking`, in order, from the source and writes those that are right into `target`, each where the
/// table says. `progress` is told stored bytes.
///
/// # Errors
/// [`PipelineError::Container`] for the first chunk that is wrong, or cannot be read or written;
/// [`PipelineError::Cancelled`].
pub fn arrive<S: ReadAt, R: ReadAt>(
    arrival: &Arrival<'_, S>,
    table: &ChunkTable<'_, R>,
    lacking: &[ChunkIndex],
    target: &dyn WriteAt,
    progress: &dyn Progress,
) -> Result<(), PipelineError> {
    let queue = Queue {
        lacking,
        next: Mutex::new(0),
        is_over: AtomicBool::new(false),
        arrived: AtomicUsize::new(0),
        begin: Instant::now(),
        bytes_per_second: arrival.bytes_per_second,
        progress,
    };
    let work = || {
        let outcome = Worker::default().work_on(&queue, arrival.source, table, target);
        if outcome.is_err() {
            queue.is_over.store(true, Ordering::Relaxed);
        }
        outcome
    };
    let outcomes = thread::scope(|scope| {
        let workers: Vec<_> = (0..arrival.threads.max(1))
            .map(|_| scope.spawn(work))
            .collect();
        let outcomes = workers.into_iter().map(thread::ScopedJoinHandle::join);
        outcomes.collect::<Result<Vec<_>, _>>()
    });
    outcomes
        .map_err(|_| PipelineError::Worker)?
        .into_iter()
        .collect()
}

/// What is still to be done, for all workers.
struct Queue<'a> {
    lacking: &'a [ChunkIndex],
    /// The first of `lacking` that nobody took.
    next: Mutex<usize>,
    is_over: AtomicBool,
    /// Stored bytes that were asked for.
    arrived: AtomicUsize,
    begin: Instant,
    bytes_per_second: Option<u64>,
    progress: &'a dyn Progress,
}

impl Queue<'_> {
    /// The next chunks, which lie beside each other; none when all are taken or somebody failed.
    fn take<R: ReadAt>(&self, table: &ChunkTable<'_, R>) -> Result<Vec<ChunkEntry>, PipelineError> {
        let mut entries: Vec<ChunkEntry> = Vec::new();
        let image = table.image();
        if self.progress.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(chunk) = self.lacking.get(*next) {
            if self.is_over.load(Ordering::Relaxed) {
                return Ok(Vec::new());
            }
            let entry = table.entry(*chunk)?;
            if let (Some(first), Some(last)) = (entries.first(), entries.last()) {
                let extent = image.extent(&entry);
                let len = extent.end.saturating_sub(image.extent(first).start);
                let is_beside = image.extent(last).end == extent.start;
                if !is_beside || len > REQUEST_LEN || entries.len() == MOST_AT_ONCE {
                    break;
                }
            }
            entries.push(entry);
            *next += 1;
        }
        Ok(entries)
    }

    /// Waits until `len` bytes more may be asked for.
    fn keep_to_rate(&self, len: usize) -> Result<(), PipelineError> {
        let before = self.arrived.fetch_add(len, Ordering::Relaxed) as u64;
        let Some(rate) = self.bytes_per_second else {
            return Ok(());
        };
        let due = u128::from(before) * 1_000_000 / u128::from(rate.max(1));
        while self.begin.elapsed().as_micros() < due {
            if self.progress.is_cancelled() {
                return Err(PipelineError::Cancelled);
            }
            if self.is_over.load(Ordering::Relaxed) {
                return Ok(());
            }
            let left = due.saturating_sub(self.begin.elapsed().as_micros());
            let left = Duration::from_micros(u64::try_from(left).unwrap_or(u64::MAX));
            thread::sleep(left.min(NAP));
        }
        Ok(())
    }
}

/// One thread's buffers.
#[derive(Default)]
struct Worker {
    loader: Loader,
    stored: Vec<u8>,
    raw: [Vec<u8>; MOST_AT_ONCE],
}

impl Worker {
    fn work_on<S: ReadAt, R: ReadAt>(
        &mut self,
        queue: &Queue<'_>,
        source: &S,
        table: &ChunkTable<'_, R>,
        target: &dyn WriteAt,
    ) -> Result<(), PipelineError> {
        loop {
            let entries = queue.take(table)?;
            let image = table.image();
            let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
                return Ok(());
            };
            let (at, end) = (
                FileOffset(image.extent(first).start),
                image.extent(last).end,
            );
            let len = usize::try_from(end.saturating_sub(at.0)).unwrap_or(usize::MAX);
            queue.keep_to_rate(len)?;
            grow(&mut self.stored, len);
            source
                .read_exact_at(&mut self.stored[..len], at.0)
                .map_err(|source| ContainerError::Read { at, source })?;
            self.check(image, &entries)?;
            target
                .write_all_at(&self.stored[..len], at.0)
                .map_err(|source| ContainerError::Write { at, source })?;
            queue.progress.advance(len as u64);
        }
    }

    /// Holds the stored bytes of `entries` against checksums and digests; of what follows a parent's chunk only the checksum is
    /// looked at if there is no parent.
    fn check<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        entries: &[ChunkEntry],
    ) -> Result<(), ContainerError> {
        let mut begin = 0;
        let mut whole = Vec::with_capacity(entries.len());
        for (entry, raw) in entries.iter().zip(&mut self.raw) {
            let extent = image.extent(entry);
            let len = usize::try_from(extent.end - extent.start).unwrap_or(0);
            let stored = &self.stored[begin..begin + len];
            begin += len;
            grow(raw, entry.raw_len as usize);
            let raw = &mut raw[..entry.raw_len as usize];
            match self.loader.unpack(image, entry, stored, raw) {
                Ok(()) => whole.push((entry, &*raw)),
                Err(ContainerError::NoParent { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let raw: Vec<&[u8]> = whole.iter().map(|(_, raw)| *raw).collect();
        for ((entry, _), digest) in whole.iter().zip(Digest::of_each(&raw)) {
            entry.check_digest(digest)?;
        }
        Ok(())
    }
}
