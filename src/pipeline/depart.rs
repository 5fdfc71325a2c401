//! An image's file in parts of equal length, each read, its chunks verified, and only then given away.
//!
//! Parts are what whoever takes the file wants, and know nothing of chunks: one that lies in two parts is verified with each.
//! Every worker takes the next part; memory is a part and two chunks for each.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::PipelineError;
use super::fetch::MOST_AT_ONCE;
use super::load::{Loader, grow};
use crate::bytes::ReadAt;
use crate::container::{ChunkEntry, ChunkIter, ContainerError, Image};
use crate::digest::Digest;
use crate::error::Result;
use crate::progress::Progress;
use crate::units::FileOffset;

/// How parts are given away.
pub struct Departure<'a> {
    /// The length of a part; the last one may be shorter.
    pub part_len: u64,
    /// Workers.
    pub threads: usize,
    /// Takes a part by its number, from 0; any worker may call it.
    pub give: &'a (dyn Fn(u64, &[u8]) -> Result<()> + Sync),
}

/// Gives all parts of the image's file away, about in order. Everything in it but the chunks has to be verified already.
///
/// # Errors
/// [`PipelineError::Container`] for a chunk that is wrong or cannot be read: no part with a byte of it was given away then;
/// [`PipelineError::Cancelled`]; what `give` says.
pub fn depart<S: ReadAt>(
    image: &Image<S>,
    departure: &Departure<'_>,
    progress: &dyn Progress,
) -> Result<()> {
    let queue = Queue {
        left: Mutex::new(Left {
            chunks: image.chunks(),
            next_chunk: None,
            next_part: 0,
        }),
        is_over: AtomicBool::new(false),
        part_len: departure.part_len.max(1),
        file_len: image.len(),
        progress,
    };
    let work = || {
        let outcome = Worker::default().work_on(&queue, image, departure.give);
        if outcome.is_err() {
            queue.is_over.store(true, Ordering::Relaxed);
        }
        outcome
    };
    let outcomes = thread::scope(|scope| {
        let workers: Vec<_> = (0..departure.threads.max(1))
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
struct Queue<'a, S: ReadAt> {
    left: Mutex<Left<'a, S>>,
    is_over: AtomicBool,
    part_len: u64,
    file_len: u64,
    progress: &'a dyn Progress,
}

struct Left<'a, S: ReadAt> {
    chunks: ChunkIter<'a, S>,
    /// Not all of it lies in the parts that were taken.
    next_chunk: Option<ChunkEntry>,
    next_part: u64,
}

/// A part and the chunks of which it holds a byte.
struct Part {
    number: u64,
    range: Range<u64>,
    chunks: Vec<ChunkEntry>,
}

impl<S: ReadAt> Queue<'_, S> {
    /// The next part; `None` when all are taken or somebody failed.
    fn take(&self) -> Result<Option<Part>, PipelineError> {
        if self.progress.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let number = left.next_part;
        let start = number.saturating_mul(self.part_len);
        if start >= self.file_len || self.is_over.load(Ordering::Relaxed) {
            return Ok(None);
        }
        left.next_part += 1;
        let end = start.saturating_add(self.part_len).min(self.file_len);
        let mut chunks = Vec::new();
        loop {
            let next = match left.next_chunk.take() {
                Some(chunk) => Some(chunk),
                None => left.chunks.next().transpose()?,
            };
            let Some(chunk) = next else {
                break;
            };
            if chunk.stored_offset.0 >= end {
                left.next_chunk = Some(chunk);
                break;
            }
            let goes_on = end_of(&chunk) > end;
            chunks.push(chunk);
            if goes_on {
                left.next_chunk = Some(chunk);
                break;
            }
        }
        Ok(Some(Part {
            number,
            range: start..end,
            chunks,
        }))
    }
}

fn end_of(entry: &ChunkEntry) -> u64 {
    let len = u64::from(entry.stored_len);
    entry.stored_offset.0.saturating_add(len)
}

/// One thread's buffers.
#[derive(Default)]
struct Worker {
    loader: Loader,
    stored: Vec<u8>,
    raw: [Vec<u8>; MOST_AT_ONCE],
}

impl Worker {
    fn work_on<S: ReadAt>(
        &mut self,
        queue: &Queue<'_, S>,
        image: &Image<S>,
        give: &(dyn Fn(u64, &[u8]) -> Result<()> + Sync),
    ) -> Result<()> {
        while let Some(part) = queue.take()? {
            let first = part.chunks.first().map(|chunk| chunk.stored_offset.0);
            let start = first.map_or(part.range.start, |first| first.min(part.range.start));
            let last = part.chunks.last().map(end_of);
            let end = last.map_or(part.range.end, |last| last.max(part.range.end));
            let at = |offset: u64| usize::try_from(offset.saturating_sub(start)).unwrap_or(0);
            if end > queue.file_len {
                let at = FileOffset(start);
                let source = std::io::ErrorKind::UnexpectedEof.into();
                return Err(ContainerError::Read { at, source }.into());
            }
            grow(&mut self.stored, at(end));
            let read = image
                .reader()
                .read_exact_at(&mut self.stored[..at(end)], start);
            read.map_err(|source| ContainerError::Read {
                at: FileOffset(start),
                source,
            })?;
            for chunks in part.chunks.chunks(MOST_AT_ONCE) {
                self.check(image, chunks, start)?;
            }
            give(
                part.number,
                &self.stored[at(part.range.start)..at(part.range.end)],
            )?;
        }
        Ok(())
    }

    /// Holds chunks against checksums and digests; what is in the buffer begins at `start`.
    fn check<S: ReadAt>(
        &mut self,
        image: &Image<S>,
        chunks: &[ChunkEntry],
        start: u64,
    ) -> Result<(), ContainerError> {
        for (entry, raw) in chunks.iter().zip(&mut self.raw) {
            let begin = usize::try_from(entry.stored_offset.0 - start).unwrap_or(0);
            let stored = &self.stored[begin..begin + entry.stored_len as usize];
            grow(raw, entry.raw_len as usize);
            self.loader
                .unpack(image, entry, stored, &mut raw[..entry.raw_len as usize])?;
        }
        let raw: Vec<&[u8]> = chunks
            .iter()
            .zip(&self.raw)
            .map(|(entry, raw)| &raw[..entry.raw_len as usize])
            .collect();
        for (entry, digest) in chunks.iter().zip(Digest::of_each(&raw)) {
            entry.check_digest(digest)?;
        }
        Ok(())
    }
}
