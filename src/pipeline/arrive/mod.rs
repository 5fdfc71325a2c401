//! Chunks from another place into a file of the same image: got, verified, and only then written.
//!
//! Every worker takes the next chunks that are got the same way. Up to four that lie beside each other it
//! reads with one request and hashes side by side. With an image of an earlier save at hand it takes chunks out of that, or
//! compares what it guesses with the other place ([`patch`](super::patch)); where that leads to nothing the chunk is read
//! after all. There are more workers than cores where the other place is far: most of them wait.

mod earlier;
mod queue;

use std::sync::atomic::Ordering;
use std::thread;

pub use earlier::{Compare, Help};

use super::PipelineError;
use super::fetch::{ChunkTable, MOST_AT_ONCE};
use super::load::{Loader, grow};
use crate::bytes::{ReadAt, WriteAt};
use crate::container::{ChunkEntry, ContainerError, Image};
use crate::digest::Digest;
use crate::progress::Progress;
use crate::units::{ChunkIndex, FileOffset};
use earlier::Patcher;
use queue::{Queue, Task};

/// More workers than that would need too much memory: each holds up to 8 MiB.
const MOST_WORKERS: usize = 8;

/// Where chunks come from, and how.
pub struct Arrival<'a, S: ReadAt> {
    /// Something that holds the same image.
    pub source: &'a S,
    /// Workers.
    pub threads: usize,
    /// Stored bytes a second, at most.
    pub bytes_per_second: Option<u64>,
    /// What is known of an earlier save of the guest.
    pub help: Option<Help<'a>>,
}

/// How chunks were got, in stored bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Of chunks that were read from the source.
    pub fetched_bytes: u64,
    /// Of chunks that the earlier image has, wholly or mostly.
    pub from_parent_bytes: u64,
}

/// Gets the chunks `lacking`, in order, and writes those that are right into `target`, each where the table says. `progress`
/// is told stored bytes.
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
) -> Result<Arrived, PipelineError> {
    let way = earlier::Ways::of(arrival.help.as_ref(), table.image())?;
    let queue = Queue::new(lacking, arrival.bytes_per_second, progress, &way);
    let work = || {
        let mut worker = Worker {
            queue: &queue,
            table,
            source: arrival.source,
            target,
            bench: Bench::default(),
        };
        let outcome = worker.work_on();
        if outcome.is_err() {
            queue.is_over.store(true, Ordering::Relaxed);
        }
        outcome
    };
    let threads = arrival.threads.clamp(1, MOST_WORKERS);
    let outcomes = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let outcomes = workers.into_iter().map(thread::ScopedJoinHandle::join);
        outcomes.collect::<Result<Vec<_>, _>>()
    });
    outcomes
        .map_err(|_| PipelineError::Worker)?
        .into_iter()
        .collect::<Result<(), PipelineError>>()?;
    Ok(queue.arrived())
}

/// One thread.
struct Worker<'a, S: ReadAt, R: ReadAt> {
    queue: &'a Queue<'a>,
    table: &'a ChunkTable<'a, R>,
    source: &'a S,
    target: &'a dyn WriteAt,
    bench: Bench,
}

/// One thread's buffers.
#[derive(Default)]
struct Bench {
    loader: Loader,
    stored: Vec<u8>,
    raw: [Vec<u8>; MOST_AT_ONCE],
    patcher: Patcher,
}

impl<S: ReadAt, R: ReadAt> Worker<'_, S, R> {
    fn work_on(&mut self) -> Result<(), PipelineError> {
        loop {
            match self.queue.take(self.table)? {
                Task::Nothing => return Ok(()),
                Task::Read(entries) => self.read(&entries)?,
                Task::Same(pairs) => self.copy(&pairs)?,
                Task::Guess(entries) => self.compare(entries)?,
            }
        }
    }

    /// Reads chunks that lie beside each other.
    fn read(&mut self, entries: &[ChunkEntry]) -> Result<(), PipelineError> {
        let image = self.table.image();
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return Ok(());
        };
        let at = FileOffset(image.extent(first).start);
        let len = image.extent(last).end.saturating_sub(at.0);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.queue.keep_to_rate(len)?;
        self.source
            .read_to(&mut self.bench.stored, len, at.0)
            .map_err(|source| ContainerError::Read { at, source })?;
        self.bench.check(image, entries)?;
        self.target
            .write_all_at(&self.bench.stored[..len], at.0)
            .map_err(|source| ContainerError::Write { at, source })?;
        self.queue.fetched(len);
        Ok(())
    }

    /// Writes a chunk that is right.
    fn write_made(&self, entry: &ChunkEntry, stored: &[u8]) -> Result<(), PipelineError> {
        let at = entry.stored_offset;
        let written = self.target.write_all_at(stored, at.0);
        written.map_err(|source| ContainerError::Write { at, source })?;
        self.queue.made(stored.len());
        Ok(())
    }
}

impl Bench {
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
