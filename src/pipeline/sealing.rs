//! One chunk from its raw bytes to the image: buffers that go round, hash and compression in one visit, the append.

use crossbeam_channel::{Receiver, Sender, bounded};

use super::{Encoding, PipelineError};
use crate::codec::Compressor;
use crate::container::{ChunkKind, ImageWriter, Layout, StoredChunk};
use crate::digest::{Digest, crc32c};

/// Room for one chunk, of which the first `len` bytes are filled.
pub struct Buffer {
    /// All of the room.
    pub bytes: Box<[u8]>,
    /// How much of it is filled.
    pub len: usize,
}

impl Buffer {
    /// Empty, with room for `room` bytes.
    pub fn new(room: usize) -> Self {
        Buffer {
            bytes: vec![0; room].into_boxed_slice(),
            len: 0,
        }
    }

    /// What is in it.
    pub fn filled(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Adds `bytes`, for which there must be room.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

/// Buffers that go round, so that none is allocated in the middle of a save.
pub fn pool(count: usize, len: usize) -> (Sender<Buffer>, Receiver<Buffer>) {
    let (free, buffers) = bounded(count);
    for _ in 0..count {
        let _ = free.send(Buffer::new(len));
    }
    (free, buffers)
}

/// What a chunk is stored as.
pub struct Sealed {
    /// The frame; `None` where the raw bytes are stored.
    stored: Option<Vec<u8>>,
    digest: Digest,
    crc: u32,
}

/// Hashes and compresses chunks, one after the other.
pub struct Sealer {
    encoding: Encoding,
    compressor: Option<Compressor>,
}

impl Sealer {
    /// A sealer that has seen nothing; its context is made at the first chunk.
    pub fn new(encoding: &Encoding) -> Self {
        Sealer {
            encoding: *encoding,
            compressor: None,
        }
    }

    /// Makes what is to be stored of each chunk. Up to four are hashed side by side.
    ///
    /// # Errors
    /// [`PipelineError::Codec`].
    pub fn seal_each(&mut self, chunks: &[&[u8]]) -> Result<Vec<Sealed>, PipelineError> {
        let digests = Digest::of_each(chunks);
        chunks
            .iter()
            .zip(digests)
            .map(|(raw, digest)| self.seal_hashed(raw, digest))
            .collect()
    }

    /// Makes what is to be stored of one chunk.
    ///
    /// # Errors
    /// [`PipelineError::Codec`].
    pub fn seal(&mut self, raw: &[u8]) -> Result<Sealed, PipelineError> {
        self.seal_hashed(raw, Digest::of(raw))
    }

    /// As [`Sealer::seal`], of bytes whose digest is known.
    ///
    /// # Errors
    /// [`PipelineError::Codec`].
    pub fn seal_hashed(&mut self, raw: &[u8], digest: Digest) -> Result<Sealed, PipelineError> {
        let stored = match self.encoding.layout {
            Layout::Zstd => Some(self.compress(raw)?),
            Layout::Raw | Layout::Mapped => None,
        };
        let crc = crc32c(stored.as_deref().unwrap_or(raw));
        Ok(Sealed {
            stored,
            digest,
            crc,
        })
    }

    fn compress(&mut self, raw: &[u8]) -> Result<Vec<u8>, PipelineError> {
        let compressor = match &mut self.compressor {
            Some(compressor) => compressor,
            none => none.insert(Compressor::new(self.encoding.level)?),
        };
        let mut stored = Vec::new();
        compressor.compress(raw, &mut stored)?;
        Ok(stored)
    }
}

/// Appends a chunk to the image.
///
/// # Errors
/// [`PipelineError::Container`] if it cannot be written.
pub fn append(
    image: &mut ImageWriter<'_>,
    raw: &[u8],
    sealed: &Sealed,
) -> Result<(), PipelineError> {
    image.append_chunk(&StoredChunk {
        stored: sealed.stored.as_deref().unwrap_or(raw),
        raw_len: u32::try_from(raw.len()).unwrap_or(u32::MAX),
        stored_crc: sealed.crc,
        raw_digest: sealed.digest,
        kind: match sealed.stored {
            Some(_) => ChunkKind::Zstd,
            None => ChunkKind::Plain,
        },
    })?;
    Ok(())
}
