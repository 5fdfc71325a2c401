//! Streams ⇄ chunks: the one owner of worker threads.
//!
//! [`encode()`] reads QEMU's stream once, cuts it into chunks that follow guest memory, and has workers hash and
//! compress them; an ordered writer appends the results to the image. [`decode()`] runs the other way: workers read,
//! check and decompress chunks, the caller gets them in order; with [`place()`] the workers put guest memory into QEMU
//! themselves and the caller gets the rest.
//!
//! Memory is at most `8 × threads + 3` buffers of one chunk each way, and of what is made of them, whatever the guest's
//! size, and for a delta three of each worker besides; of a guest that runs on [`LIVE_BUFFER_LEN`] bytes more, for it waits while its stream is not read. The first error
//! stops all threads and is the one reported. The number of threads never changes a byte of the image.

mod address_space;
mod arrive;
mod beside;
mod capture;
mod check;
mod chunker;
mod compare;
mod cursor;
mod decode;
mod depart;
mod device_state;
mod encode;
mod fetch;
mod gather;
mod groups;
mod guest_memory;
mod load;
mod mapped;
mod parcels;
mod patch;
mod pipe;
mod place;
mod recode;
mod region;
mod scan;
mod sealing;
mod twins;

pub use address_space::{AddressReader, AddressSpace};
pub use arrive::{Arrival, Arrived, Compare, Help, arrive};
pub use beside::{beside, side_by_side};
pub use capture::{StoppedGuestMemory, capture};
pub use check::{Checked, check};
pub use compare::{Compared, ComparedBlock, NotCompared, PageBits, Pages, Which, compare};
pub use decode::{decode, examine};
pub use depart::{Departure, depart};
pub use device_state::{device_region, device_sections};
pub use encode::{Encoded, Encoding, LIVE_BUFFER_LEN, encode, encode_live};
pub use fetch::{ChunkTable, Fetcher, MOST_AT_ONCE};
pub use groups::{Group, groups};
pub use guest_memory::{GuestMemory, MemoryReader};
pub use mapped::{FoundMapped, MappedImage, unpack};
pub use parcels::{Load, Parcel, ParcelBody, Sending, Sent, send_parcels};
pub use patch::{Earlier, NoReply, Replier};
pub use pipe::{AroundPayload, PipedImage, begins_with_head};
pub use place::{Destination, Placement, place};
pub use recode::{keeps_stream, recode};
pub use region::StoppedBlock;
pub use scan::{MARGIN, Scan, Seen, WINDOW_LEN, scan};
pub use twins::Twins;

use std::io;

use crossbeam_channel::Receiver;

use crate::codec::CodecError;
use crate::container::ContainerError;
use crate::error::{Blame, ErrorKind};
use crate::host::HostError;
use crate::stream::StreamError;
use crate::stream::x86_paging::PageFault;
use crate::units::{ChunkIndex, PageIndex, StreamOffset};

/// Bytes of guest memory in one chunk where nothing else is asked for.
///
/// Larger chunks compress better and cost a lazy restore more at each page it is asked for. Of 1.3 GB of files in a
/// guest's memory `zstd -3` makes 384 MB in one frame; the default level makes, at the same speed each, 419 MB in chunks of
/// 256 KiB, 411 MB of 512 KiB, 405 MB of 1 MiB.
pub const DEFAULT_CHUNK_LEN: usize = 512 << 10;

/// How many chunks a worker hashes side by side: four, unless so many would not stay in its cache, or all workers' would
/// take much memory.
fn batch_len(threads: usize, max_chunk_len: usize) -> usize {
    let fit_cache = (6 << 19) / max_chunk_len.max(1);
    let fit_memory = 48 / threads.max(1);
    fit_cache.min(fit_memory).clamp(1, 4)
}

/// How many chunks may be on their way through `threads` workers: one batch in work and one that waits for each of them.
fn window(threads: usize, max_chunk_len: usize) -> usize {
    2 * threads * batch_len(threads, max_chunk_len) + 2
}

/// `first` and more of what waits behind it, at most `most` in all: a worker's share, so that the others find work too.
fn with_waiting<T>(first: T, waiting: &Receiver<T>, threads: usize, most: usize) -> Vec<T> {
    let share = (waiting.len() / threads.max(1)).min(most - 1);
    let more = waiting.try_iter().take(share);
    std::iter::once(first).chain(more).collect()
}

/// One worker a core.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What can stop a pipeline.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The migration stream could not be read.
    #[error("the migration stream could not be read")]
    Read(#[source] io::Error),
    /// The migration stream is not as it has to be.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The image could not be written, or what was read of it is damaged.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// A chunk of the image of which a delta is made cannot be used.
    #[error("the parent is damaged: a chunk of it cannot be used")]
    Parent(#[source] ContainerError),
    /// An image that is a delta comes through a pipe, where its parent is not.
    #[error("it is a delta, which is of use only with its parent, and comes through a pipe")]
    PipedDelta,
    /// A chunk could not be compressed.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The memory of a stopped guest could not be read.
    #[error("the guest's memory could not be read")]
    Memory(#[source] HostError),
    /// One element of the stream is longer than a chunk can be.
    #[error("one element of the migration stream is longer than {max_len} bytes")]
    ElementTooLong {
        /// Where it begins.
        at: StreamOffset,
        /// The largest chunk.
        max_len: usize,
    },
    /// Whoever takes the decoded stream takes no more of it.
    #[error("the migration stream could not be passed on")]
    Output(#[source] io::Error),
    /// A page could not be put into QEMU's memory.
    #[error("guest memory could not be written")]
    Place(#[source] HostError),
    /// What the page map says of a chunk is not what the stream says.
    #[error("the page map does not agree with the migration stream")]
    PageMap {
        /// Where in the stream, or its end where the whole does not agree.
        at: StreamOffset,
    },
    /// There is no device state where it has to be.
    #[error("the image holds no device state where its manifest says")]
    DeviceState {
        /// Where it has to be.
        at: StreamOffset,
    },
    /// An image of layout `mapped` is written at many places, which a pipe has not.
    #[error("layout mapped can only be written to a file")]
    NoPlaces,
    /// A stream without a configuration has nowhere to say that it is of the mapped-ram layout.
    #[error("a guest of so old a machine type cannot be saved in layout mapped")]
    NoConfiguration,
    /// A page that the stream says is zero has bytes.
    #[error("RAMBlock {idstr:?} has bytes in page {page}, which the stream says is zero")]
    NotZero {
        /// The RAMBlock.
        idstr: String,
        /// The page.
        page: PageIndex,
    },
    /// Nothing tells where the pages of the guest's memory lie.
    #[error("the image has no page map, so that its memory cannot be read page by page")]
    NoPageMap,
    /// More was to be read of a RAMBlock than there is.
    #[error("{} has no {len} bytes at offset {offset:#x}", named(idstr.as_deref()))]
    OutsideBlock {
        /// The RAMBlock; `None` if there is none of that number.
        idstr: Option<String>,
        /// Where it was to begin.
        offset: u64,
        /// Bytes that were to be read.
        len: u64,
    },
    /// A chunk ends before a page that the page map says is in it.
    #[error("chunk {chunk} ends before a page that the page map says is in it")]
    ShortChunk {
        /// The chunk.
        chunk: ChunkIndex,
    },
    /// No RAMBlock lies at a guest-physical address.
    #[error("there is no memory at guest-physical address {address:#x}")]
    NoMemory {
        /// The address.
        address: u64,
    },
    /// A guest-virtual address leads nowhere.
    #[error("guest-virtual address {address:#x} leads nowhere")]
    PageFault {
        /// The address.
        address: u64,
        /// Why.
        source: PageFault,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Cancelled,
    /// A thread of this program died.
    #[error("a worker thread ended before its work")]
    Worker,
}

/// A RAMBlock in words.
fn named(idstr: Option<&str>) -> String {
    idstr.map_or("no RAMBlock".to_owned(), |idstr| {
        format!("RAMBlock {idstr:?}")
    })
}

impl Blame for PipelineError {
    fn kind(&self) -> ErrorKind {
        match self {
            PipelineError::Container(error) | PipelineError::Parent(error) => error.kind(),
            PipelineError::Stream(error) => error.kind(),
            PipelineError::PageMap { .. }
            | PipelineError::DeviceState { .. }
            | PipelineError::NoPageMap
            | PipelineError::ShortChunk { .. }
            | PipelineError::NotZero { .. } => ErrorKind::Image,
            PipelineError::NoPlaces
            | PipelineError::PipedDelta
            | PipelineError::OutsideBlock { .. }
            | PipelineError::NoMemory { .. }
            | PipelineError::PageFault { .. } => ErrorKind::Usage,
            PipelineError::NoConfiguration => ErrorKind::Host,
            PipelineError::Cancelled => ErrorKind::Interrupted,
            PipelineError::ElementTooLong { .. }
            | PipelineError::Memory(_)
            | PipelineError::Place(_)
            | PipelineError::Read(_)
            | PipelineError::Output(_) => ErrorKind::Host,
            PipelineError::Codec(_) | PipelineError::Worker => ErrorKind::Failed,
        }
    }

    fn at(&self) -> Option<String> {
        match self {
            PipelineError::Container(error) => error.at(),
            // It says by itself in which image.
            PipelineError::Parent(error @ ContainerError::Twin { .. }) => error.at(),
            PipelineError::Parent(error) => error.at().map(|at| format!("in the parent, {at}")),
            PipelineError::Stream(error) => error.at(),
            PipelineError::ElementTooLong { at, .. }
            | PipelineError::PageMap { at }
            | PipelineError::DeviceState { at } => Some(format!("stream offset {at}")),
            _ => None,
        }
    }
}
