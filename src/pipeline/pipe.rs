//! An image that comes through a pipe: its stream is passed on while it arrives.
//!
//! `HEAD` says enough to start a QEMU; the chunk table comes last. So what is passed on is not yet verified: only when
//! the pipe has ended are all chunks held against the table, and the whole image against its digests. A guest that was
//! loaded from it must not run before.

use std::io::{self, Read};

use super::PipelineError;
use crate::bytes::ReadAt;
use crate::codec::Decompressor;
use crate::container::layout::{FRAME_MAGIC, SECTION_HEADER_LEN};
use crate::container::{
    ChunkEntry, ContainerError, FrameHeader, Head, HeadFields, Image, SectionType, parse_head,
};
use crate::digest::{Digest, crc32c};
use crate::progress::Progress;
use crate::units::{ChunkIndex, FileOffset};

/// Bytes read from the pipe at a time.
const PIECE: usize = 1 << 18;

/// No image has more bytes around its payload: a chunk table of that size belongs to a guest of several TiB.
const MAX_AROUND: u64 = 1 << 30;

/// An image of which `HEAD` has arrived.
pub struct PipedImage<R: Read> {
    pipe: R,
    head: Vec<u8>,
    fields: HeadFields,
}

/// The parts of an image that are not its payload, at their places; the payload cannot be read again.
#[derive(Debug)]
pub struct AroundPayload {
    head: Vec<u8>,
    payload_end: u64,
    tail: Vec<u8>,
}

impl ReadAt for AroundPayload {
    fn len(&self) -> u64 {
        self.payload_end + self.tail.len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match offset.checked_sub(self.payload_end) {
            Some(offset) => self.tail.read_exact_at(buf, offset),
            None => self.head.read_exact_at(buf, offset),
        }
    }
}

/// What arrived of a chunk.
struct Arrived {
    stored_len: usize,
    stored_crc: u32,
    raw_len: usize,
    raw_digest: Digest,
}

impl<R: Read> PipedImage<R> {
    /// Reads `HEAD`.
    ///
    /// # Errors
    /// [`PipelineError::Container`] if no image with a `HEAD` arrives, [`PipelineError::Read`] if the pipe breaks.
    pub fn begin(mut pipe: R) -> Result<Self, PipelineError> {
        let mut head = Vec::new();
        read_up_to(&mut pipe, &mut head, SECTION_HEADER_LEN as u64)?;
        let too_short = ContainerError::TooShort {
            file_len: head.len() as u64,
        };
        let header = head.first_chunk::<SECTION_HEADER_LEN>().ok_or(too_short)?;
        let header = FrameHeader::parse(header, FileOffset(0))?;
        let rest = header.total_len().min(MAX_AROUND) - SECTION_HEADER_LEN as u64;
        read_up_to(&mut pipe, &mut head, rest)?;
        let (fields, _) = parse_head(&head)?;
        if fields.is_delta {
            return Err(PipelineError::PipedDelta);
        }
        Ok(PipedImage { pipe, head, fields })
    }

    /// What `HEAD` says: the provisional manifest and XML.
    ///
    /// # Errors
    /// None that [`PipedImage::begin`] would not have found.
    pub fn head(&self) -> Result<Head<'_>, PipelineError> {
        Ok(parse_head(&self.head)?.1)
    }

    /// Gives the stream to `output` as it arrives; gives the image without its payload when all of it was found right.
    ///
    /// # Errors
    /// The first thing that is wrong. What `output` got by then must not be used.
    pub fn decode(
        mut self,
        progress: &dyn Progress,
        output: &mut dyn FnMut(&[u8]) -> Result<(), PipelineError>,
    ) -> Result<Image<AroundPayload>, PipelineError> {
        let mut decompressor = Decompressor::new()?;
        let (mut raw, mut arrived) = (Vec::new(), Vec::new());
        let mut payload_end = self.head.len() as u64;
        let mut window = Window::new(self.fields.max_chunk_len);
        while let Some(frame) = window.next_frame(&mut self.pipe, payload_end, arrived.len())? {
            if progress.is_cancelled() {
                return Err(PipelineError::Cancelled);
            }
            let raw_len = zstd_safe::get_frame_content_size(frame).ok().flatten();
            let limit = u64::from(self.fields.max_chunk_len);
            let raw_len = raw_len
                .filter(|len| *len <= limit)
                .and_then(|len| usize::try_from(len).ok());
            let not_a_frame = || not_a_frame(arrived.len(), payload_end);
            let raw_len = raw_len.ok_or_else(not_a_frame)?;
            decompressor
                .decompress(frame, raw_len, &mut raw)
                .map_err(|_| not_a_frame())?;
            output(&raw)?;
            progress.advance(raw_len as u64);
            let raw_digest = Digest::of(&raw);
            let (stored_len, stored_crc) = (frame.len(), crc32c(frame));
            arrived.push(Arrived {
                stored_len,
                stored_crc,
                raw_len,
                raw_digest,
            });
            payload_end += stored_len as u64;
            window.consume(stored_len);
        }
        let mut tail = window.rest();
        read_up_to(&mut self.pipe, &mut tail, MAX_AROUND)?;
        let image = Image::open(AroundPayload {
            head: self.head,
            payload_end,
            tail,
        })?;
        image.verify_sections()?;
        hold_against_table(&image, &arrived)?;
        Ok(image)
    }
}

/// Appends up to `limit` bytes of `pipe` to `bytes`.
fn read_up_to(pipe: &mut impl Read, bytes: &mut Vec<u8>, limit: u64) -> Result<(), PipelineError> {
    pipe.take(limit)
        .read_to_end(bytes)
        .map(|_| ())
        .map_err(PipelineError::Read)
}

fn not_a_frame(chunk: usize, at: u64) -> PipelineError {
    let (chunk, at) = (ChunkIndex(chunk as u64), FileOffset(at));
    ContainerError::NotAFrame { chunk, at }.into()
}

/// The table has to tell of exactly the chunks that arrived.
fn hold_against_table(
    image: &Image<AroundPayload>,
    arrived: &[Arrived],
) -> Result<(), PipelineError> {
    let mut count = 0;
    for (entry, arrived) in image.chunks().zip(arrived) {
        let entry = entry?;
        arrived.check(&entry)?;
        count += 1;
    }
    let chunk_count = image.chunk_count();
    if count != chunk_count || arrived.len() as u64 != chunk_count {
        let chunk = ChunkIndex(chunk_count.min(arrived.len() as u64));
        return Err(ContainerError::NoSuchChunk { chunk, chunk_count }.into());
    }
    Ok(())
}

impl Arrived {
    fn check(&self, entry: &ChunkEntry) -> Result<(), ContainerError> {
        let (chunk, at) = (entry.index, entry.stored_offset);
        if self.stored_len != entry.stored_len as usize || self.raw_len != entry.raw_len as usize {
            return Err(ContainerError::NotAFrame { chunk, at });
        }
        if self.stored_crc != entry.stored_crc {
            let (expected, found) = (entry.stored_crc, self.stored_crc);
            return Err(ContainerError::ChunkCrc {
                chunk,
                at,
                expected,
                found,
            });
        }
        if self.raw_digest != entry.raw_digest {
            return Err(ContainerError::HashMismatch {
                chunk,
                at,
                stream_offset: entry.stream_offset,
                expected: entry.raw_digest,
                found: self.raw_digest,
            });
        }
        Ok(())
    }
}

/// What has arrived and is not yet consumed.
struct Window {
    bytes: Vec<u8>,
    start: usize,
    /// No frame is longer.
    limit: usize,
}

impl Window {
    fn new(max_chunk_len: u32) -> Self {
        let limit = zstd_safe::compress_bound(max_chunk_len as usize);
        Window {
            bytes: Vec::new(),
            start: 0,
            limit,
        }
    }

    /// The next frame, whole; `None` where the first section behind the payload begins, or the pipe ends.
    fn next_frame(
        &mut self,
        pipe: &mut impl Read,
        at: u64,
        chunk: usize,
    ) -> Result<Option<&[u8]>, PipelineError> {
        loop {
            let here = &self.bytes[self.start..];
            if here.len() >= FRAME_MAGIC.len() && here.starts_with(&FRAME_MAGIC) {
                return Ok(None);
            }
            if let Ok(len) = zstd_safe::find_frame_compressed_size(here) {
                return Ok(Some(&self.bytes[self.start..self.start + len]));
            }
            if here.len() > self.limit {
                return Err(not_a_frame(chunk, at));
            }
            if self.fill(pipe)? == 0 {
                return Ok(None);
            }
        }
    }

    fn fill(&mut self, pipe: &mut impl Read) -> Result<usize, PipelineError> {
        self.bytes.drain(..self.start);
        self.start = 0;
        let len = self.bytes.len();
        read_up_to(pipe, &mut self.bytes, PIECE as u64)?;
        Ok(self.bytes.len() - len)
    }

    fn consume(&mut self, len: usize) {
        self.start += len;
    }

    fn rest(self) -> Vec<u8> {
        self.bytes[self.start..].to_vec()
    }
}

/// Whether bytes look like the beginning of an image with a `HEAD`.
pub fn begins_with_head(bytes: &[u8]) -> bool {
    let header = bytes.first_chunk::<SECTION_HEADER_LEN>();
    let header = header.and_then(|header| FrameHeader::parse(header, FileOffset(0)).ok());
    header.is_some_and(|header| header.section == SectionType::Head)
}
