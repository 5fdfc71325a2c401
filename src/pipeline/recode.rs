//! An image's payload → another image: the same chunks stored otherwise where both have the same stream, else the stream
//! once more, cut anew.

use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crossbeam_channel::{Receiver, bounded};

use super::PipelineError;
use super::decode::{decode, work};
use super::encode::{Encoded, Encoding, encode};
use super::sealing::{Sealer, append};
use super::twins::Content;
use crate::bytes::ReadAt;
use crate::container::{ChunkEntry, ChunkPages, Image, ImageWriter, Layout};
use crate::progress::Progress;
use crate::units::{ChunkIndex, StreamOffset};

/// Pieces of the stream on their way from the one image to the other.
const PIECES: usize = 4;

/// Whether an image in `layout` has the same stream, cut the same way, as one made from it: its digest stays.
pub fn keeps_stream(from: Layout, to: Layout) -> bool {
    from != Layout::Mapped && to != Layout::Mapped
}

/// Writes the payload of `image`, each chunk verified, as that of `target`. Gives what the stream turned out to hold if it
/// was cut anew; `None` if all chunks are the same.
///
/// # Errors
/// [`PipelineError::Container`] for the first damaged chunk, or what cannot be written; [`PipelineError::Cancelled`].
pub fn recode<R: ReadAt>(
    image: &Image<R>,
    target: &mut ImageWriter<'_>,
    encoding: &Encoding,
    progress: &dyn Progress,
) -> Result<Option<Encoded>, PipelineError> {
    match keeps_stream(image.layout(), encoding.layout) {
        true => store_again(image, target, encoding, progress).map(|()| None),
        false => cut_again(image, target, encoding, progress).map(Some),
    }
}

fn store_again<R: ReadAt>(
    image: &Image<R>,
    target: &mut ImageWriter<'_>,
    encoding: &Encoding,
    progress: &dyn Progress,
) -> Result<(), PipelineError> {
    // Each worker takes one that nobody uses; there are never more than workers.
    let near = near_chunks(image, encoding)?;
    let idle: Mutex<Vec<Sealer>> = Mutex::default();
    let idle = || idle.lock().unwrap_or_else(PoisonError::into_inner);
    let seal = |entry: &ChunkEntry, raw: &[u8]| {
        let sealer = idle().pop();
        let mut sealer = sealer.unwrap_or_else(|| Sealer::new(encoding));
        let index = usize::try_from(entry.index.0).unwrap_or(usize::MAX);
        let near = near.get(index).copied().flatten();
        let sealed = sealer.seal_hashed((raw, near), entry.raw_digest);
        idle().push(sealer);
        sealed
    };
    work(image, encoding.threads, progress, &seal, &mut |_, done| {
        let (raw, sealed) = done?;
        append(target, raw, &sealed?)
    })
}

/// For each chunk the parent's that is likely to be like it; nothing if no delta is made.
fn near_chunks<R: ReadAt>(
    image: &Image<R>,
    encoding: &Encoding,
) -> Result<Vec<Option<ChunkIndex>>, PipelineError> {
    let Some(twins) = &encoding.twins else {
        return Ok(Vec::new());
    };
    let mut near = Vec::new();
    let mut set = |chunk: ChunkIndex, content: Content<'_>| {
        let index = usize::try_from(chunk.0).unwrap_or(usize::MAX);
        if index as u64 != chunk.0 || chunk.0 >= image.chunk_count() {
            return;
        }
        near.resize(near.len().max(index + 1), None);
        near[index] = twins.near(content, encoding.chunk_len);
    };
    if let Some(page_map) = image.page_map()? {
        let pages = ChunkPages::of(&page_map);
        for chunk in pages.chunks() {
            if let Some(page) = pages.in_chunk(*chunk).next() {
                let idstr = &page_map.blocks()[page.block].idstr;
                set(*chunk, Content::Pages(idstr, page.page.0));
            }
        }
    }
    let device_state_at = image.manifest()?.stream.and_then(|it| it.device_state_at);
    if let Some(at) = device_state_at {
        let first = image.chunk_of_stream_offset(StreamOffset(at))?.index.0;
        // There are few of them; more than the first are of guests with much of it.
        for chunk in (first..image.chunk_count()).take(64) {
            set(ChunkIndex(chunk), Content::DeviceState);
        }
    }
    Ok(near)
}

fn cut_again<R: ReadAt>(
    image: &Image<R>,
    target: &mut ImageWriter<'_>,
    encoding: &Encoding,
    progress: &dyn Progress,
) -> Result<Encoded, PipelineError> {
    let (send, pieces) = bounded::<Vec<u8>>(PIECES);
    thread::scope(|scope| {
        let decoder = scope.spawn(move || {
            let quiet = Quiet(progress);
            decode(image, encoding.threads, &quiet, &mut |raw| {
                // Whoever reads no more has an error of its own to tell.
                send.send(raw.to_vec()).map_err(|_| PipelineError::Worker)
            })
        });
        let mut stream = Pieces {
            pieces,
            piece: Vec::new(),
            read: 0,
        };
        let encoded = encode(&mut stream, target, encoding, progress);
        drop(stream);
        match decoder.join().map_err(|_| PipelineError::Worker).flatten() {
            Err(PipelineError::Worker) | Ok(()) => encoded,
            Err(error) => Err(error),
        }
    })
}

/// A stream that another thread makes.
struct Pieces {
    pieces: Receiver<Vec<u8>>,
    piece: Vec<u8>,
    read: usize,
}

impl Read for Pieces {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.read == self.piece.len() {
            let Ok(piece) = self.pieces.recv() else {
                return Ok(0);
            };
            (self.piece, self.read) = (piece, 0);
        }
        let rest = &self.piece[self.read..];
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        self.read += len;
        Ok(len)
    }
}

/// Progress that is told by somebody else.
struct Quiet<'a>(&'a dyn Progress);

impl Progress for Quiet<'_> {
    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}
