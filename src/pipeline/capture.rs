//! The memory of a stopped guest → chunks: each worker takes the next region, reads it where it lies, hashes and
//! compresses it; an ordered writer appends.
//!
//! What QEMU's migration thread would do alone, finding zero pages and copying the others, is done by all workers, and
//! each page is compressed where it was just read. Pages that were never touched are known from the kernel's page map
//! and not looked at. What comes out is a migration stream all the same, cut into the chunks that
//! [`encode()`](super::encode()) would cut.
//!
//! Source: spec/qemu-stream.md §11.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::chunker::max_chunk_len;
use super::cursor::{Cursor, Next};
use super::encode::{Encoded, Encoding};
use super::gather::{Counts, Gatherer};
use super::region::{Region, StoppedBlock};
use super::sealing::{Buffer, Sealed, Sealer, pool};
use super::twins::Content;
use super::{PipelineError, batch_len, mapped, window};
use crate::container::{ImageWriter, Layout, PageMapBuilder};
use crate::error::Error;
use crate::host::ProcessMemory;
use crate::progress::Progress;
use crate::stream::parser::MAX_ELEMENT_LEN;
use crate::stream::writer::{before_pages, behind_pages};
use crate::stream::{Parser, RamBlock, StreamSummary};
use crate::units::ChunkIndex;

/// The memory of a guest that does not run, and will not until it was captured.
pub struct StoppedGuestMemory {
    /// Its QEMU's memory.
    pub memory: ProcessMemory,
    /// Its migratable RAMBlocks, in QEMU's order.
    pub blocks: Vec<StoppedBlock>,
    /// The resolved machine type.
    pub machine_type: String,
    /// A number for the `ram` section that no device section has.
    pub ram_section: u32,
}

impl StoppedGuestMemory {
    pub(super) fn ram_blocks(&self) -> Vec<RamBlock> {
        self.blocks.iter().map(|it| it.block.clone()).collect()
    }

    fn before_pages(&self) -> Vec<u8> {
        before_pages(&self.machine_type, self.ram_section, &self.ram_blocks())
    }
}

/// Captures `guest` into `image` as the chunks of a migration stream.
///
/// `device_sections` is called once, after all memory was read: it gives what follows the RAM. The
/// guest's memory may be written from then on, as QEMU's own migration allows it.
///
/// # Errors
/// The first that a worker met, what `device_sections` says, or what the writer met. What was appended by then is no
/// image.
pub fn capture(
    guest: &StoppedGuestMemory,
    device_sections: &mut dyn FnMut() -> Result<Vec<u8>, Error>,
    image: &mut ImageWriter<'_>,
    encoding: &Encoding,
    progress: &dyn Progress,
) -> Result<Encoded, Error> {
    if encoding.layout == Layout::Mapped {
        return mapped::capture(guest, device_sections, image, encoding, progress);
    }
    let threads = encoding.threads.max(1);
    let max_chunk_len = max_chunk_len(encoding.chunk_len);
    let window = window(threads, max_chunk_len);
    let (free, buffers) = pool(window, max_chunk_len);
    let (done, ordered) = bounded(window);
    let cursor = Mutex::new(Cursor::new(guest, encoding.chunk_len));
    let gatherer = Gatherer::new(image, guest.ram_blocks(), encoding, progress);
    let worker = Worker {
        guest,
        encoding,
        batch: batch_len(threads, max_chunk_len),
        cursor: &cursor,
        buffers,
        done,
        progress,
    };
    thread::scope(|scope| {
        // A writer that failed takes its ends of the channels with it, or the workers would wait on them for ever.
        let writer = scope.spawn(move || gather_in_order(gatherer, &ordered, &free));
        let captured = worker.send_other(&guest.before_pages(), Content::Other);
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let worker = worker.clone();
                scope.spawn(move || worker.run())
            })
            .collect();
        let captured = workers.into_iter().fold(captured, |before, worker| {
            before.and(worker.join().map_err(|_| PipelineError::Worker))
        });
        let device_sections = captured.map_err(Error::from).and_then(|()| {
            let sections = device_sections()?;
            worker.send_other(&behind_pages(guest.ram_section), Content::Other)?;
            worker.send_other(&sections, Content::DeviceState)?;
            Ok(sections)
        });
        drop(worker);
        let written = writer.join().map_err(|_| PipelineError::Worker).flatten();
        match (device_sections, written) {
            (Ok(sections), Ok((page_map, counts))) => Ok(Encoded {
                stream: summary(guest, &sections, counts)?,
                page_map: Some(page_map),
            }),
            // The writer knows what went wrong with it or a worker; whoever finds it gone does not.
            (_, Err(error)) => Err(error.into()),
            (Err(error), Ok(_)) => Err(error),
        }
    })
}

/// What the stream holds, by our own parser.
fn summary(
    guest: &StoppedGuestMemory,
    device_sections: &[u8],
    counts: Counts,
) -> Result<StreamSummary, PipelineError> {
    let mut parser = Parser::new();
    parse(&mut parser, &guest.before_pages())?;
    parser.skip_all_pages(counts.len, counts.data_pages, counts.zero_pages);
    parse(&mut parser, &behind_pages(guest.ram_section))?;
    parse(&mut parser, device_sections)?;
    Ok(parser.finish()?)
}

fn parse(parser: &mut Parser, mut bytes: &[u8]) -> Result<(), PipelineError> {
    while let Some(element) = parser.next(bytes)? {
        bytes = &bytes[element.len..];
    }
    Ok(())
}

/// What a worker made of its turn.
enum Done {
    /// A chunk without pages.
    Other(Buffer, Sealed),
    /// A region with its chunk.
    Region(Region, Buffer, Sealed),
    /// Pages that are all zero: block, first page, page count.
    Zeros(usize, u64, u64),
}

/// The turn, counted from 0, and what came of it; the first error ends all.
type Turn = (u64, Result<Done, PipelineError>);

#[derive(Clone)]
struct Worker<'a> {
    guest: &'a StoppedGuestMemory,
    encoding: &'a Encoding,
    /// Regions that are read before they are hashed side by side.
    batch: usize,
    cursor: &'a Mutex<Cursor<'a>>,
    buffers: Receiver<Buffer>,
    done: Sender<Turn>,
    progress: &'a dyn Progress,
}

/// Tells the writer of a worker that panics: it would wait for that turn for ever.
struct TellPanic<'a>(&'a Sender<Turn>);

impl Drop for TellPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.0.send((0, Err(PipelineError::Worker)));
        }
    }
}

impl<'a> Worker<'a> {
    /// Works until no page is left or something goes wrong, which the writer is told.
    fn run(&self) {
        let _tell = TellPanic(&self.done);
        if let Err(error) = self.capture_pages() {
            let _ = self.done.send((0, Err(error)));
        }
    }

    /// [`PipelineError::Worker`] means here and below that the writer has ended; its own error is the one to report.
    fn capture_pages(&self) -> Result<(), PipelineError> {
        let mut sealer = Sealer::new(self.encoding);
        let mut free = Vec::with_capacity(self.batch);
        loop {
            // Who has buffers takes turns, never the other way round: the writer gets each turn in its time.
            while free.len() < self.batch {
                free.push(self.buffer()?);
            }
            let regions = self.read_batch(&mut free)?;
            if regions.is_empty() {
                return Ok(());
            }
            let unsealed = regions.iter();
            let unsealed = unsealed.map(|(_, region, raw)| (raw.filled(), self.twin_of(region)));
            let sealed = sealer.seal_each(&unsealed.collect::<Vec<_>>())?;
            for ((turn, region, raw), sealed) in regions.into_iter().zip(sealed) {
                self.send(turn, Done::Region(region, raw, sealed))?;
            }
        }
    }

    /// Reads regions as long as there is a buffer; none when no page is left.
    fn read_batch(
        &self,
        free: &mut Vec<Buffer>,
    ) -> Result<Vec<(u64, Region, Buffer)>, PipelineError> {
        let mut regions = Vec::with_capacity(free.len());
        while let Some(mut buffer) = free.pop() {
            let Some((turn, next)) = self.next()? else {
                break;
            };
            let zeros = match next {
                Next::Zeros(block, first_page, count) => Done::Zeros(block, first_page, count),
                Next::Region(mut region) => {
                    let block = &self.guest.blocks[region.block];
                    region.read(&self.guest.memory, block, &mut buffer)?;
                    if buffer.len > 0 {
                        regions.push((turn, region, buffer));
                        continue;
                    }
                    let count = region.touched.len() as u64;
                    Done::Zeros(region.block, region.first_page, count)
                }
            };
            self.send(turn, zeros)?;
            free.push(buffer);
        }
        Ok(regions)
    }

    /// The parent's chunk of the same memory, if a delta is made.
    fn twin_of(&self, region: &Region) -> Option<ChunkIndex> {
        let idstr = &self.guest.blocks[region.block].block.idstr;
        self.near(Content::Pages(idstr, region.first_page))
    }

    fn near(&self, content: Content<'_>) -> Option<ChunkIndex> {
        let twins = self.encoding.twins.as_ref()?;
        twins.near(content, self.encoding.chunk_len)
    }

    /// Sends bytes that are no pages, in chunks.
    fn send_other(&self, bytes: &[u8], content: Content<'_>) -> Result<(), PipelineError> {
        let mut sealer = Sealer::new(self.encoding);
        for bytes in bytes.chunks(self.encoding.chunk_len.max(MAX_ELEMENT_LEN)) {
            let mut buffer = self.buffer()?;
            buffer.push(bytes);
            let sealed = sealer.seal((bytes, self.near(content)))?;
            let turn = self.cursor()?.turn();
            self.send(turn, Done::Other(buffer, sealed))?;
        }
        Ok(())
    }

    fn next(&self) -> Result<Option<(u64, Next)>, PipelineError> {
        if self.progress.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        self.cursor()?.next()
    }

    fn cursor(&self) -> Result<MutexGuard<'_, Cursor<'a>>, PipelineError> {
        self.cursor.lock().map_err(|_| PipelineError::Worker)
    }

    fn send(&self, turn: u64, done: Done) -> Result<(), PipelineError> {
        let sent = self.done.send((turn, Ok(done)));
        sent.map_err(|_| PipelineError::Worker)
    }

    /// An empty buffer.
    fn buffer(&self) -> Result<Buffer, PipelineError> {
        let mut buffer = self.buffers.recv().map_err(|_| PipelineError::Worker)?;
        buffer.len = 0;
        Ok(buffer)
    }
}

/// Brings what the workers made into the order of their turns, and to the image.
fn gather_in_order(
    mut gatherer: Gatherer<'_, '_>,
    done: &Receiver<Turn>,
    free: &Sender<Buffer>,
) -> Result<(PageMapBuilder, Counts), PipelineError> {
    let mut early = BTreeMap::new();
    let mut next = 0;
    for (turn, done) in done {
        early.insert(turn, done?);
        while let Some(done) = early.remove(&next) {
            let buffer = match done {
                Done::Other(buffer, sealed) => {
                    gatherer.take_other(&buffer, &sealed)?;
                    buffer
                }
                Done::Region(region, buffer, sealed) => {
                    gatherer.take_region(&region, &buffer, &sealed)?;
                    buffer
                }
                Done::Zeros(block, first_page, page_count) => {
                    gatherer.take_zeros(block, first_page, page_count)?;
                    next += 1;
                    continue;
                }
            };
            let _ = free.try_send(buffer);
            next += 1;
        }
    }
    gatherer.finish()
}
