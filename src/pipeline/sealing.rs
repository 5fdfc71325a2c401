//! One chunk from its raw bytes to the image: buffers that go round, hash and compression in one visit, the append.

use crossbeam_channel::{Receiver, Sender, bounded};

use super::twins::{TwinReader, Twins};
use super::{Encoding, PipelineError};
use crate::codec::{Compressor, compress_behind};
use crate::container::{ChunkKind, ImageWriter, Layout, StoredChunk};
use crate::digest::{Digest, crc32c};
use crate::units::ChunkIndex;

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
    /// The frame, or nothing if it is the parent's chunk; `None` where the raw bytes are stored.
    stored: Option<Vec<u8>>,
    kind: ChunkKind,
    digest: Digest,
    crc: u32,
}

/// The raw bytes of a chunk, and the parent's chunk that is likely to be like it, if a delta is made.
pub type Unsealed<'a> = (&'a [u8], Option<ChunkIndex>);

/// Hashes and compresses chunks, one after the other.
pub struct Sealer {
    encoding: Encoding,
    compressor: Option<Compressor>,
    twin: TwinReader,
}

impl Sealer {
    /// A sealer that has seen nothing; its context is made at the first chunk.
    pub fn new(encoding: &Encoding) -> Self {
        Sealer {
            encoding: encoding.clone(),
            compressor: None,
            twin: TwinReader::default(),
        }
    }

    /// Makes what is to be stored of each chunk. Up to four are hashed side by side.
    ///
    /// # Errors
    /// [`PipelineError::Codec`]; [`PipelineError::Parent`].
    pub fn seal_each(&mut self, chunks: &[Unsealed<'_>]) -> Result<Vec<Sealed>, PipelineError> {
        let raw: Vec<&[u8]> = chunks.iter().map(|(raw, _)| *raw).collect();
        chunks
            .iter()
            .zip(Digest::of_each(&raw))
            .map(|(chunk, digest)| self.seal_hashed(*chunk, digest))
            .collect()
    }

    /// Makes what is to be stored of one chunk.
    ///
    /// # Errors
    /// As [`Sealer::seal_each`].
    pub fn seal(&mut self, chunk: Unsealed<'_>) -> Result<Sealed, PipelineError> {
        self.seal_hashed(chunk, Digest::of(chunk.0))
    }

    /// As [`Sealer::seal`], of bytes whose digest is known.
    ///
    /// # Errors
    /// As [`Sealer::seal_each`].
    pub fn seal_hashed(
        &mut self,
        (raw, near): Unsealed<'_>,
        digest: Digest,
    ) -> Result<Sealed, PipelineError> {
        let twins = self.encoding.twins.clone();
        let (kind, stored) = match (&twins, self.encoding.layout) {
            (Some(twins), _) => {
                let (kind, stored) = self.follow(twins, raw, near, &digest)?;
                (kind, Some(stored))
            }
            (None, Layout::Zstd) => (ChunkKind::Zstd, Some(self.compress(raw)?)),
            (None, Layout::Raw | Layout::Mapped) => (ChunkKind::Plain, None),
        };
        let crc = crc32c(stored.as_deref().unwrap_or(raw));
        Ok(Sealed {
            stored,
            kind,
            digest,
            crc,
        })
    }

    /// What a delta stores of a chunk: nothing if the parent has it, what the parent's does not have, or all of it where that
    /// is not more.
    fn follow(
        &mut self,
        twins: &Twins,
        raw: &[u8],
        near: Option<ChunkIndex>,
        digest: &Digest,
    ) -> Result<(ChunkKind, Vec<u8>), PipelineError> {
        let same = twins.same(raw.len(), digest);
        if let Some(same) = same.map_err(PipelineError::Parent)? {
            // The table says nothing of the bytes, which may have been damaged long since: now they are still at hand here.
            self.twin.read(twins, same)?;
            return Ok((ChunkKind::Same(same), Vec::new()));
        }
        let Some(near) = near else {
            return Ok((ChunkKind::Zstd, self.compress(raw)?));
        };
        let prefix = self.twin.read(twins, near)?;
        let patch = compress_behind(prefix, raw, self.encoding.level)?;
        // What shares little with the parent had better not depend on it.
        if patch.len() > raw.len() / 4 {
            let whole = self.compress(raw)?;
            if whole.len() <= patch.len() {
                return Ok((ChunkKind::Zstd, whole));
            }
        }
        Ok((ChunkKind::Patched(near), patch))
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
        kind: sealed.kind,
    })?;
    Ok(())
}
