//! One chunk from the image into a buffer.

use crate::bytes::ReadAt;
use crate::codec::Decompressor;
use crate::container::{ChunkEntry, ChunkKind, ContainerError, Image};

/// Reads and decompresses chunks, one after the other; nothing is allocated or cleared for each.
#[derive(Default)]
pub struct Loader {
    decompressor: Option<Decompressor>,
    stored: Vec<u8>,
}

impl Loader {
    /// Fills `raw` with the bytes that `entry` speaks of, their digest not yet checked.
    pub fn load<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        entry: &ChunkEntry,
        raw: &mut [u8],
    ) -> Result<(), ContainerError> {
        // For plain bytes the lengths are equal: the table's rules say so.
        if entry.kind == ChunkKind::Plain {
            return image.read_stored_into(entry, raw);
        }
        let len = entry.stored_len as usize;
        grow(&mut self.stored, len);
        let stored = &mut self.stored[..len];
        image.read_stored_into(entry, stored)?;
        decompress(&mut self.decompressor, entry, stored, raw)
    }

    /// As [`Loader::load`], of stored bytes that are at hand; they are held against the entry first.
    pub fn unpack(
        &mut self,
        entry: &ChunkEntry,
        stored: &[u8],
        raw: &mut [u8],
    ) -> Result<(), ContainerError> {
        entry.check_stored(stored)?;
        match entry.kind {
            ChunkKind::Plain => raw.copy_from_slice(stored),
            ChunkKind::Zstd => decompress(&mut self.decompressor, entry, stored, raw)?,
        }
        Ok(())
    }
}

fn decompress(
    decompressor: &mut Option<Decompressor>,
    entry: &ChunkEntry,
    stored: &[u8],
    raw: &mut [u8],
) -> Result<(), ContainerError> {
    let frame = |_| ContainerError::NotAFrame {
        chunk: entry.index,
        at: entry.stored_offset,
    };
    let decompressor = match decompressor {
        Some(decompressor) => decompressor,
        none => none.insert(Decompressor::new().map_err(frame)?),
    };
    decompressor.decompress_into(stored, raw).map_err(frame)
}

/// Makes room for `len` bytes; never less, so that no byte is cleared twice.
pub fn grow(buffer: &mut Vec<u8>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
}
