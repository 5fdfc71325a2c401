//! Stream → chunks: read and parse on the caller's thread, hash and compress on workers, append in order.

use std::io::Read;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::chunker::{Chunker, max_chunk_len};
use super::sealing::{Buffer, Sealed, Sealer, append, pool};
use super::twins::{Content, Twins};
use super::{PipelineError, batch_len, mapped, window, with_waiting};
use crate::bytes::Sink;
use crate::container::{ContainerError, Head, Identity, ImageWriter, Layout, PageMapBuilder};
use crate::progress::Progress;
use crate::stream::{Element, Event, Parser, StreamSummary};
use crate::units::{ChunkIndex, PAGE_LEN};

/// How chunks are made.
#[derive(Debug, Clone)]
pub struct Encoding {
    /// `zstd` compresses each chunk, `raw` stores it as it is, `mapped` puts each page into its own place.
    pub layout: Layout,
    /// zstd's level; of no meaning for the others.
    pub level: i32,
    /// Bytes of guest memory in a chunk: a power of two of at least one page.
    pub chunk_len: usize,
    /// Workers.
    pub threads: usize,
    /// The parent of which a delta is made, in layout `zstd`; `None` for a full image.
    pub twins: Option<Arc<Twins>>,
}

impl Encoding {
    /// The same for a guest of this many bytes of memory: larger chunks where the chunk table would become too large to
    /// be kept in memory while the image is written.
    pub fn fitting(&self, memory_bytes: u64) -> Self {
        let mut fitting = self.clone();
        let is_too_small = |len: usize| memory_bytes / len as u64 > MAX_CHUNKS;
        while is_too_small(fitting.chunk_len) && fitting.chunk_len < MAX_CHUNK_LEN {
            fitting.chunk_len *= 2;
        }
        fitting
    }

    /// Begins an image of this encoding.
    ///
    /// # Errors
    /// As [`ImageWriter::begin`] and [`ImageWriter::begin_delta`].
    pub fn begin<'s>(
        &self,
        sink: &'s mut dyn Sink,
        identity: Identity,
        max_chunk_len: u32,
        head: Head<'_>,
    ) -> Result<ImageWriter<'s>, ContainerError> {
        match &self.twins {
            None => ImageWriter::begin(sink, self.layout, identity, max_chunk_len, head),
            Some(twins) => {
                let (parent, name) = (twins.parent_id(), twins.name().map(str::to_owned));
                ImageWriter::begin_delta(sink, identity, parent, name, max_chunk_len, head)
            }
        }
    }

    /// No chunk of this encoding decodes to more bytes.
    pub fn max_chunk_len(&self) -> u32 {
        u32::try_from(max_chunk_len(self.chunk_len)).unwrap_or(u32::MAX)
    }
}

/// Chunks of a guest without zero pages; 64 bytes of each are kept until its image is written.
const MAX_CHUNKS: u64 = 1 << 19;

/// The largest region of guest memory in one chunk.
const MAX_CHUNK_LEN: usize = 8 << 20;

/// Bytes of a running guest's stream that wait for workers, besides what [`encode()`] keeps.
pub const LIVE_BUFFER_LEN: usize = 32 << 20;

/// What a stream turned out to hold.
pub struct Encoded {
    /// What the parser found, the stream being whole.
    pub stream: StreamSummary,
    /// Where every page lies; `None` for a stream without RAM.
    pub page_map: Option<PageMapBuilder>,
}

/// Reads `stream` to its end and appends it to `image` as chunks.
///
/// # Errors
/// The first that any thread met. What was appended by then is no image.
pub fn encode(
    stream: &mut dyn Read,
    image: &mut ImageWriter<'_>,
    encoding: &Encoding,
    progress: &dyn Progress,
) -> Result<Encoded, PipelineError> {
    if encoding.layout == Layout::Mapped {
        return mapped::encode(stream, image, encoding, progress);
    }
    let chunker = Chunker::new(encoding.chunk_len);
    let window = window(encoding.threads, max_chunk_len(encoding.chunk_len));
    encode_with(chunker, window, stream, image, encoding, progress)
}

/// As [`encode()`], of the stream of a guest that runs on: its pages may come in any order, and it waits for each page that
/// it writes to until that was read. So up to [`LIVE_BUFFER_LEN`] bytes are kept for workers that cannot keep up.
///
/// # Errors
/// As [`encode()`].
pub fn encode_live(
    stream: &mut dyn Read,
    image: &mut ImageWriter<'_>,
    encoding: &Encoding,
    progress: &dyn Progress,
) -> Result<Encoded, PipelineError> {
    if encoding.layout == Layout::Mapped {
        return mapped::encode(stream, image, encoding, progress);
    }
    let chunker = Chunker::gathering(encoding.chunk_len);
    let max_chunk_len = max_chunk_len(encoding.chunk_len);
    let window = window(encoding.threads, max_chunk_len) + LIVE_BUFFER_LEN / max_chunk_len;
    encode_with(chunker, window, stream, image, encoding, progress)
}

fn encode_with(
    chunker: Chunker,
    window: usize,
    stream: &mut dyn Read,
    image: &mut ImageWriter<'_>,
    encoding: &Encoding,
    progress: &dyn Progress,
) -> Result<Encoded, PipelineError> {
    let threads = encoding.threads.max(1);
    let max_chunk_len = max_chunk_len(encoding.chunk_len);
    let batch = batch_len(threads, max_chunk_len);
    let (work, jobs) = bounded::<Job>(window);
    let (order, ordered) = bounded::<Receiver<Done>>(window);
    let (free, buffers) = pool(window + 1, max_chunk_len);
    thread::scope(|scope| {
        for _ in 0..threads {
            let jobs = jobs.clone();
            scope.spawn(move || work_on(&jobs, encoding, batch));
        }
        drop(jobs);
        // A writer that failed takes its ends of the channels with it, or the cutter would wait on them for ever.
        let writer = scope.spawn(move || append_in_order(&ordered, image, &free));
        let read = Cutter::new(
            chunker,
            encoding,
            Dispatcher {
                work,
                order,
                buffers,
                progress,
            },
        )
        .run(stream);
        let written = writer.join().map_err(|_| PipelineError::Worker)?;
        match (read, written) {
            (Err(PipelineError::Worker), Err(error)) | (Ok(_), Err(error)) | (Err(error), _) => {
                Err(error)
            }
            (Ok(encoded), Ok(())) => Ok(encoded),
        }
    })
}

/// Reads up to `max` more bytes of `stream` into `buffer`; 0 is the end.
fn fill(buffer: &mut Buffer, stream: &mut dyn Read, max: usize) -> Result<usize, PipelineError> {
    let end = buffer.bytes.len().min(buffer.len + max);
    loop {
        match stream.read(&mut buffer.bytes[buffer.len..end]) {
            Ok(len) => {
                buffer.len += len;
                return Ok(len);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(PipelineError::Read(error)),
        }
    }
}

/// One chunk on its way to a worker.
struct Job {
    raw: Buffer,
    /// The parent's chunk that is likely to be like it.
    near: Option<ChunkIndex>,
    reply: Sender<Done>,
}

/// One chunk on its way to the image.
struct Done {
    raw: Buffer,
    sealed: Result<Sealed, PipelineError>,
}

fn work_on(jobs: &Receiver<Job>, encoding: &Encoding, batch: usize) {
    let mut sealer = Sealer::new(encoding);
    while let Ok(first) = jobs.recv() {
        let batch = with_waiting(first, jobs, encoding.threads, batch);
        let unsealed = batch.iter().map(|job| (job.raw.filled(), job.near));
        let (sealed, error) = match sealer.seal_each(&unsealed.collect::<Vec<_>>()) {
            Ok(sealed) => (sealed, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        // The writer ends at the first error, so one is enough for all of the batch.
        let outcomes = sealed.into_iter().map(Ok).chain(error.map(Err));
        for (Job { raw, reply, .. }, sealed) in batch.into_iter().zip(outcomes) {
            let _ = reply.send(Done { raw, sealed });
        }
    }
}

fn append_in_order(
    ordered: &Receiver<Receiver<Done>>,
    image: &mut ImageWriter<'_>,
    free: &Sender<Buffer>,
) -> Result<(), PipelineError> {
    for reply in ordered {
        let Done { mut raw, sealed } = reply.recv().map_err(|_| PipelineError::Worker)?;
        append(image, raw.filled(), &sealed?)?;
        raw.len = 0;
        let _ = free.try_send(raw);
    }
    Ok(())
}

/// Hands chunks to the workers and keeps their order.
struct Dispatcher<'a> {
    work: Sender<Job>,
    order: Sender<Receiver<Done>>,
    buffers: Receiver<Buffer>,
    progress: &'a dyn Progress,
}

impl Dispatcher<'_> {
    /// [`PipelineError::Worker`] means that the writer has ended; its own error is the one to report.
    fn send(&self, raw: Buffer, near: Option<ChunkIndex>) -> Result<(), PipelineError> {
        if self.progress.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        let (reply, done) = bounded(1);
        self.order.send(done).map_err(|_| PipelineError::Worker)?;
        self.work
            .send(Job { raw, near, reply })
            .map_err(|_| PipelineError::Worker)
    }

    fn buffer(&self) -> Result<Buffer, PipelineError> {
        self.buffers.recv().map_err(|_| PipelineError::Worker)
    }
}

/// Reads into the open chunk's buffer, parses it there, and cuts.
struct Cutter<'a> {
    parser: Parser,
    chunker: Chunker,
    dispatcher: Dispatcher<'a>,
    encoding: &'a Encoding,
    /// The first that tells what the open chunk holds: a page of a RAMBlock, or device state.
    first: Option<First>,
    knows_blocks: bool,
    next_page: Option<u64>,
    /// Pages parsed since progress was told of some.
    new_pages: u64,
}

/// What a chunk begins with.
#[derive(Clone, Copy)]
enum First {
    Page(usize, u64),
    DeviceState,
}

impl<'a> Cutter<'a> {
    fn new(chunker: Chunker, encoding: &'a Encoding, dispatcher: Dispatcher<'a>) -> Self {
        Cutter {
            parser: Parser::new(),
            chunker,
            dispatcher,
            encoding,
            first: None,
            knows_blocks: false,
            next_page: None,
            new_pages: 0,
        }
    }

    fn run(mut self, stream: &mut dyn Read) -> Result<Encoded, PipelineError> {
        let mut open = self.dispatcher.buffer()?;
        let mut parsed = 0;
        while fill(&mut open, stream, self.chunker.read_len(self.next_page))? > 0 {
            parsed = self.parse(&mut open, parsed)?;
            if open.len == open.bytes.len() {
                if parsed == 0 {
                    return Err(PipelineError::ElementTooLong {
                        at: self.parser.position(),
                        max_len: open.len,
                    });
                }
                self.chunker.close();
                self.close(&mut open, parsed)?;
                parsed = 0;
            }
        }
        if open.len > 0 {
            let near = self.near();
            self.dispatcher.send(open, near)?;
        }
        let stream = self.parser.finish()?;
        Ok(Encoded {
            stream,
            page_map: self.chunker.finish(),
        })
    }

    /// Parses what can be parsed of `open` behind `parsed`; gives where parsing stands then.
    fn parse(&mut self, open: &mut Buffer, mut parsed: usize) -> Result<usize, PipelineError> {
        while parsed < open.len {
            let shown = &open.filled()[parsed..];
            let shown = &shown[..shown.len().min(self.chunker.window(parsed))];
            let Some(element) = self.parser.next(shown)? else {
                break;
            };
            while let Some(cut) = self.chunker.cut_before(&element, parsed) {
                self.close(open, cut)?;
                parsed -= cut;
            }
            self.note(&element);
            self.chunker.take(&element, parsed);
            parsed += element.len;
        }
        Ok(parsed)
    }

    /// The parent's chunk that is likely to be like the open one, which ends here.
    fn near(&mut self) -> Option<ChunkIndex> {
        let first = self.first.take();
        let twins = self.encoding.twins.as_ref()?;
        let content = match first {
            Some(First::Page(block, page)) => match self.parser.blocks().get(block) {
                Some(block) => Content::Pages(&block.idstr, page),
                None => Content::Other,
            },
            Some(First::DeviceState) => Content::DeviceState,
            None => Content::Other,
        };
        twins.near(content, self.encoding.chunk_len)
    }

    fn note(&mut self, element: &Element) {
        let first = match element.event {
            Event::Page { block, page, .. } => Some(First::Page(block, page.0)),
            Event::DeviceState => Some(First::DeviceState),
            Event::Framing | Event::MappedBlock { .. } => None,
        };
        self.first = self.first.or(first);
        if let Event::Page { page, .. } = element.event {
            if !self.knows_blocks {
                let blocks = self.parser.blocks();
                let blocks: Vec<_> = blocks
                    .iter()
                    .map(|block| (block.idstr.clone(), block.used_length))
                    .collect();
                self.chunker.begin_blocks(&blocks);
                self.knows_blocks = true;
            }
            self.next_page = Some(page.0 + 1);
            self.new_pages += 1;
        }
    }

    /// Sends the first `cut` bytes of `open` away as a chunk; `open` becomes a fresh buffer with the rest.
    fn close(&mut self, open: &mut Buffer, cut: usize) -> Result<(), PipelineError> {
        let new_pages = std::mem::take(&mut self.new_pages);
        self.dispatcher
            .progress
            .advance(new_pages * PAGE_LEN as u64);
        let mut fresh = self.dispatcher.buffer()?;
        let rest = &open.filled()[cut..];
        fresh.bytes[..rest.len()].copy_from_slice(rest);
        fresh.len = rest.len();
        open.len = cut;
        let near = self.near();
        self.dispatcher.send(std::mem::replace(open, fresh), near)
    }
}
