//! Chunks → stream: workers read, check and decompress; the caller gets the raw bytes in order.

use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::load::{Loader, grow};
use super::{PipelineError, batch_len, mapped, window, with_waiting};
use crate::bytes::ReadAt;
use crate::container::{ChunkEntry, ContainerError, Image, Layout};
use crate::digest::Digest;
use crate::progress::Progress;

/// Gives the migration stream of an image to `output`: every chunk's raw bytes, verified, in order. That of an image of layout
/// `mapped` is made from its pages.
///
/// No byte of a chunk reaches `output` before the chunk's checksum and digest were found right.
///
/// # Errors
/// [`PipelineError::Container`] for the first damaged chunk, what `output` says, or [`PipelineError::Cancelled`].
pub fn decode<R: ReadAt>(
    image: &Image<R>,
    threads: usize,
    progress: &dyn Progress,
    output: &mut dyn FnMut(&[u8]) -> Result<(), PipelineError>,
) -> Result<(), PipelineError> {
    match image.layout() {
        Layout::Mapped => mapped::decode(image, threads, progress, output),
        _ => examine(image, threads, progress, &mut |_, raw| output(raw?)),
    }
}

/// Does something with a chunk's verified raw bytes, on a worker.
pub(super) type Task<'a, T> = dyn Fn(&ChunkEntry, &[u8]) -> T + Sync + 'a;

/// As [`Visit`], with what the task made of the chunk.
pub(super) type VisitDone<'a, T> =
    dyn FnMut(&ChunkEntry, Result<(&[u8], T), ContainerError>) -> Result<(), PipelineError> + 'a;

/// Takes each chunk: its raw bytes, or what is wrong with it.
type Visit<'a> =
    dyn FnMut(&ChunkEntry, Result<&[u8], ContainerError>) -> Result<(), PipelineError> + 'a;

/// Gives every chunk, in stream order, to `visit`: its raw bytes, or what is wrong with it. Damage alone does not end it.
///
/// # Errors
/// What `visit` says, [`PipelineError::Cancelled`], or a chunk table that cannot be read.
pub fn examine<R: ReadAt>(
    image: &Image<R>,
    threads: usize,
    progress: &dyn Progress,
    visit: &mut Visit<'_>,
) -> Result<(), PipelineError> {
    work(image, threads, progress, &|_, _| (), &mut |entry, done| {
        visit(entry, done.map(|(raw, ())| raw))
    })
}

/// As [`examine`]; before a chunk is visited, its worker does `task` with it.
pub(super) fn work<R: ReadAt, T: Send>(
    image: &Image<R>,
    threads: usize,
    progress: &dyn Progress,
    task: &Task<'_, T>,
    visit: &mut VisitDone<'_, T>,
) -> Result<(), PipelineError> {
    let threads = threads.max(1);
    let window = window(threads, image.max_chunk_len() as usize);
    let (work, jobs) = bounded::<Job<T>>(window);
    let (order, ordered) = bounded::<Receiver<Done<T>>>(window);
    let (give_back, buffers) = bounded::<Vec<u8>>(window);
    thread::scope(|scope| {
        for _ in 0..threads {
            let (jobs, buffers) = (jobs.clone(), buffers.clone());
            scope.spawn(move || work_on(image, &jobs, &buffers, threads, task));
        }
        drop((jobs, buffers));
        let table = scope.spawn(move || dispatch(image, &work, &order));
        let visited = visit_in_order(&ordered, &give_back, progress, visit);
        drop(ordered);
        let read = table.join().map_err(|_| PipelineError::Worker)?;
        visited.and(read)
    })
}

struct Job<T> {
    entry: ChunkEntry,
    reply: Sender<Done<T>>,
}

struct Done<T> {
    entry: ChunkEntry,
    made: Result<(Vec<u8>, T), ContainerError>,
}

/// Sends every entry of the chunk table to the workers; ends early, without an error, when nobody listens any more.
fn dispatch<R: ReadAt, T>(
    image: &Image<R>,
    work: &Sender<Job<T>>,
    order: &Sender<Receiver<Done<T>>>,
) -> Result<(), PipelineError> {
    for entry in image.chunks() {
        let (reply, done) = bounded(1);
        if order.send(done).is_err()
            || work
                .send(Job {
                    entry: entry?,
                    reply,
                })
                .is_err()
        {
            break;
        }
    }
    Ok(())
}

fn work_on<R: ReadAt, T>(
    image: &Image<R>,
    jobs: &Receiver<Job<T>>,
    buffers: &Receiver<Vec<u8>>,
    threads: usize,
    task: &Task<'_, T>,
) {
    let batch = batch_len(threads, image.max_chunk_len() as usize);
    let mut loader = Loader::default();
    while let Ok(first) = jobs.recv() {
        let mut loaded = Vec::with_capacity(batch);
        for job in with_waiting(first, jobs, threads, batch) {
            let mut raw = buffers.try_recv().unwrap_or_default();
            let len = job.entry.raw_len as usize;
            grow(&mut raw, len);
            match loader.load(image, &job.entry, &mut raw[..len]) {
                Ok(()) => loaded.push((job, raw)),
                Err(error) => job.answer(Err(error)),
            }
        }
        let pieces: Vec<&[u8]> = loaded.iter().map(|(job, raw)| job.bytes_in(raw)).collect();
        let digests = Digest::of_each(&pieces);
        for ((job, raw), digest) in loaded.into_iter().zip(digests) {
            let made = job.entry.check_digest(digest).map(|()| {
                let made = task(&job.entry, job.bytes_in(&raw));
                (raw, made)
            });
            job.answer(made);
        }
    }
}

impl<T> Job<T> {
    /// The chunk's bytes in a buffer that may be longer.
    fn bytes_in<'b>(&self, buffer: &'b [u8]) -> &'b [u8] {
        &buffer[..self.entry.raw_len as usize]
    }

    /// Whoever does not wait for the answer any more knows why.
    fn answer(self, made: Result<(Vec<u8>, T), ContainerError>) {
        let entry = self.entry;
        let _ = self.reply.send(Done { entry, made });
    }
}

fn visit_in_order<T>(
    ordered: &Receiver<Receiver<Done<T>>>,
    give_back: &Sender<Vec<u8>>,
    progress: &dyn Progress,
    visit: &mut VisitDone<'_, T>,
) -> Result<(), PipelineError> {
    for reply in ordered {
        if progress.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        // The sender goes away without an answer when the chunk table broke; the dispatcher knows why.
        let Ok(Done { entry, made }) = reply.recv() else {
            break;
        };
        match made {
            Ok((raw, made)) => {
                let bytes = &raw[..entry.raw_len as usize];
                visit(&entry, Ok((bytes, made)))?;
                let _ = give_back.try_send(raw);
            }
            Err(error) => visit(&entry, Err(error))?,
        }
        progress.advance(u64::from(entry.raw_len));
    }
    Ok(())
}
