//! All of guest memory, window by window: workers read and look, the caller hears what they found, in order.
//!
//! A *window* is a stretch of [`WINDOW_LEN`] bytes of one block, with [`MARGIN`] bytes before and behind it, so that
//! what lies across its ends is seen whole. Windows without a page that has bytes are not looked at, unless the scan
//! [wants zeros](Scan::wants_zeros). Where windows begin does not depend on the number of threads, and neither does what
//! is heard.
//!
//! Memory is one window and a few chunks for each thread.

use std::ops::Range;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::PipelineError;
use super::guest_memory::GuestMemory;
use super::load::grow;
use crate::bytes::ReadAt;
use crate::progress::Progress;
use crate::units::PAGE_LEN;

/// Bytes of a block that are read at once.
pub const WINDOW_LEN: u64 = 16 << 20;

/// Bytes that are read before and behind them.
pub const MARGIN: u64 = PAGE_LEN as u64;

/// Pages with bytes that are closer to each other are looked at together, with the zeros between them.
const GAP: u64 = 64 << 10;

/// What is to be looked at.
#[derive(Debug, Clone)]
pub struct Scan {
    /// Indices into [`GuestMemory::blocks`].
    pub blocks: Vec<usize>,
    /// Whether zero pages are looked at.
    pub wants_zeros: bool,
    /// Workers.
    pub threads: usize,
}

/// What a worker sees of a window.
#[derive(Debug)]
pub struct Seen<'b> {
    /// The block.
    pub block: usize,
    /// Where `bytes` begins in it.
    pub offset: u64,
    /// Bytes of the block, some of which belong to the windows before and behind.
    pub bytes: &'b [u8],
    /// Which of `bytes` are this window's own.
    pub own: Range<usize>,
}

/// Has the workers do `task` with all memory that is to be looked at, a part of a window at a time, and gives what they made
/// of it to `visit`, in the order of blocks and offsets, until that says `false`.
///
/// # Errors
/// [`PipelineError::Container`] for the first damaged chunk; [`PipelineError::Cancelled`]; what `visit` says.
pub fn scan<R: ReadAt, T: Send>(
    memory: &GuestMemory<'_, R>,
    scan: &Scan,
    progress: &dyn Progress,
    task: &(dyn Fn(&Seen<'_>) -> T + Sync),
    visit: &mut dyn FnMut(T) -> Result<bool, PipelineError>,
) -> Result<(), PipelineError> {
    let threads = scan.threads.max(1);
    let (work, jobs) = bounded::<Job<T>>(threads);
    let (order, ordered) = bounded::<(u64, Option<Receiver<Made<T>>>)>(2 * threads);
    thread::scope(|scope| {
        for _ in 0..threads {
            let jobs = jobs.clone();
            scope.spawn(move || look(memory, &jobs, task));
        }
        drop(jobs);
        scope.spawn(move || dispatch(memory, scan, &work, &order));
        let visited = visit_in_order(&ordered, progress, visit);
        drop(ordered);
        visited
    })
}

type Made<T> = Result<Vec<T>, PipelineError>;

/// A window, and which parts of it are looked at.
struct Job<T> {
    block: usize,
    window: Range<u64>,
    parts: Vec<Range<u64>>,
    reply: Sender<Made<T>>,
}

/// Sends every window to the workers; ends early when nobody listens any more.
fn dispatch<R: ReadAt, T>(
    memory: &GuestMemory<'_, R>,
    scan: &Scan,
    work: &Sender<Job<T>>,
    order: &Sender<(u64, Option<Receiver<Made<T>>>)>,
) {
    for block in &scan.blocks {
        let Some(known) = memory.blocks().get(*block) else {
            continue;
        };
        let mut spans = Spans::of(memory, *block, scan.wants_zeros);
        let mut start = 0;
        while start < known.used_length {
            let end = start.saturating_add(WINDOW_LEN).min(known.used_length);
            let window = start..end;
            let parts = spans.within(&window);
            let reply = match parts.is_empty() {
                true => None,
                false => {
                    let (reply, made) = bounded(1);
                    let job = Job {
                        block: *block,
                        window,
                        parts,
                        reply,
                    };
                    if work.send(job).is_err() {
                        return;
                    }
                    Some(made)
                }
            };
            if order.send((end - start, reply)).is_err() {
                return;
            }
            start = end;
        }
    }
}

/// Where a block has bytes, read forward.
struct Spans<'m> {
    spans: Box<dyn Iterator<Item = Range<u64>> + 'm>,
    next: Option<Range<u64>>,
}

impl<'m> Spans<'m> {
    fn of<R: ReadAt>(memory: &'m GuestMemory<'_, R>, block: usize, wants_zeros: bool) -> Self {
        const PAGE: u64 = PAGE_LEN as u64;
        let len = memory.blocks()[block].used_length;
        let spans = memory.page_map().data_spans(block);
        let in_bytes = spans.map(move |pages| {
            let start = pages.start.0.saturating_mul(PAGE);
            start..pages.end.0.saturating_mul(PAGE).min(len)
        });
        let mut spans: Box<dyn Iterator<Item = Range<u64>> + 'm> = match wants_zeros {
            true => Box::new(std::iter::once(0..len)),
            false => Box::new(in_bytes),
        };
        let next = spans.next();
        Spans { spans, next }
    }

    /// What of the window is to be looked at: windows have to be asked for in ascending order.
    fn within(&mut self, window: &Range<u64>) -> Vec<Range<u64>> {
        let mut parts: Vec<Range<u64>> = Vec::new();
        while let Some(span) = self.next.clone().filter(|span| span.start < window.end) {
            let part = span.start.max(window.start)..span.end.min(window.end);
            match parts.last_mut() {
                Some(last) if part.start - last.end < GAP => last.end = part.end,
                _ => parts.push(part),
            }
            if span.end > window.end {
                break;
            }
            self.next = self.spans.next();
        }
        parts
    }
}

/// Looks at windows until there are no more, or until nobody wants to hear.
fn look<R: ReadAt, T: Send>(
    memory: &GuestMemory<'_, R>,
    jobs: &Receiver<Job<T>>,
    task: &(dyn Fn(&Seen<'_>) -> T + Sync),
) {
    let mut reader = memory.reader();
    let mut buffer = Vec::new();
    for job in jobs {
        let len = memory.blocks()[job.block].used_length;
        let first = job.parts.first().map_or(0, |part| part.start);
        let last = job.parts.last().map_or(0, |part| part.end);
        let read = first.saturating_sub(MARGIN)..last.saturating_add(MARGIN).min(len);
        let in_buffer = |at: u64| usize::try_from(at - read.start).unwrap_or(usize::MAX);
        let count = in_buffer(read.end);
        grow(&mut buffer, count);
        let bytes = &mut buffer[..count];
        let made = reader.read(job.block, read.start, bytes).map(|()| {
            let parts = job.parts.iter().map(|part| {
                let around = part.start.saturating_sub(MARGIN).max(read.start)
                    ..part.end.saturating_add(MARGIN).min(read.end);
                let bytes = &bytes[in_buffer(around.start)..in_buffer(around.end)];
                let own = |at: u64| usize::try_from(at - around.start).unwrap_or(usize::MAX);
                task(&Seen {
                    block: job.block,
                    offset: around.start,
                    bytes,
                    own: own(part.start)..own(part.end),
                })
            });
            parts.collect()
        });
        debug_assert!(job.window.start <= first && last <= job.window.end);
        // Whoever does not wait any more knows why.
        let _ = job.reply.send(made);
    }
}

fn visit_in_order<T>(
    ordered: &Receiver<(u64, Option<Receiver<Made<T>>>)>,
    progress: &dyn Progress,
    visit: &mut dyn FnMut(T) -> Result<bool, PipelineError>,
) -> Result<(), PipelineError> {
    for (len, reply) in ordered {
        if progress.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        if let Some(reply) = reply {
            let made = reply.recv().map_err(|_| PipelineError::Worker)?;
            for one in made? {
                if !visit(one)? {
                    return Ok(());
                }
            }
        }
        progress.advance(len);
    }
    Ok(())
}
