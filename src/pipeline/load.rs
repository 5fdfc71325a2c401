//! One chunk from the image into a buffer, a delta's with what it follows of the parent.

use crate::bytes::ReadAt;
use crate::codec::{Decompressor, decompress_behind};
use crate::container::{ChunkEntry, ChunkKind, ContainerError, Image, ParentImage};

/// Reads and decompresses chunks, one after the other; nothing is allocated or cleared for each.
#[derive(Default)]
pub struct Loader {
    decompressor: Option<Decompressor>,
    stored: Vec<u8>,
    /// A parent's chunk, and the one that follows it: however long the chain is, two are enough.
    parents: [Vec<u8>; 2],
}

/// A chunk of a parent.
type Link<'a> = (&'a ParentImage, ChunkEntry);

impl Loader {
    /// Fills `raw` with the bytes that `entry` speaks of, their digest not yet checked.
    pub fn load<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        entry: &ChunkEntry,
        raw: &mut [u8],
    ) -> Result<(), ContainerError> {
        match entry.kind {
            // For plain bytes the lengths are equal: the table's rules say so.
            ChunkKind::Plain => image.read_stored_into(entry, raw),
            ChunkKind::Zstd => {
                self.read(image, entry)?;
                let stored = &self.stored[..entry.stored_len as usize];
                decompress(&mut self.decompressor, entry, stored, raw)
            }
            ChunkKind::Patched(_) => {
                self.read(image, entry)?;
                let stored = std::mem::take(&mut self.stored);
                let outcome =
                    self.unpack_patched(image, entry, &stored[..entry.stored_len as usize], raw);
                self.stored = stored;
                outcome
            }
            ChunkKind::Same(_) => self.copy_twin(image, entry, raw),
        }
    }

    /// As [`Loader::load`], of the chunk's bytes in the file ([`Image::extent`]) that are at hand; they are held against the
    /// entry first.
    pub fn unpack<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        entry: &ChunkEntry,
        extent: &[u8],
        raw: &mut [u8],
    ) -> Result<(), ContainerError> {
        let stored = image.stored_in(entry, extent)?;
        match entry.kind {
            ChunkKind::Plain => raw.copy_from_slice(stored),
            ChunkKind::Zstd => decompress(&mut self.decompressor, entry, stored, raw)?,
            ChunkKind::Patched(_) => self.unpack_patched(image, entry, stored, raw)?,
            ChunkKind::Same(_) => self.copy_twin(image, entry, raw)?,
        }
        Ok(())
    }

    /// Holds what is stored of a chunk against its checksum: all that can be said of one whose parent is not there.
    pub fn check_stored<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        entry: &ChunkEntry,
    ) -> Result<(), ContainerError> {
        match entry.kind {
            ChunkKind::Same(_) => Ok(()),
            _ => self.read(image, entry),
        }
    }

    /// Reads the stored bytes.
    fn read<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        entry: &ChunkEntry,
    ) -> Result<(), ContainerError> {
        if image.footer().is_delta() {
            return image.read_stored(entry, &mut self.stored);
        }
        let len = entry.stored_len as usize;
        grow(&mut self.stored, len);
        image.read_stored_into(entry, &mut self.stored[..len])
    }

    fn unpack_patched<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        entry: &ChunkEntry,
        stored: &[u8],
        raw: &mut [u8],
    ) -> Result<(), ContainerError> {
        let twin_len = self.load_twin(image, entry)?;
        let twin = &self.parents[0][..twin_len];
        decompress_behind(twin, stored, raw).map_err(|_| not_a_frame(entry))
    }

    fn copy_twin<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        entry: &ChunkEntry,
        raw: &mut [u8],
    ) -> Result<(), ContainerError> {
        let twin_len = self.load_twin(image, entry)?;
        // A twin that is the same chunk has the same length.
        raw.copy_from_slice(&self.parents[0][..twin_len]);
        Ok(())
    }

    /// Loads the parent's chunk that `entry` follows into the first of the buffers; gives its length.
    fn load_twin<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        entry: &ChunkEntry,
    ) -> Result<usize, ContainerError> {
        let nothing = || ContainerError::WrongChunk {
            chunk: entry.index,
            field: "KIND",
            at: entry.stored_offset,
        };
        let (parent, twin) = image.twin(entry)?.ok_or_else(nothing)?;
        let loaded =
            chain(parent, twin).and_then(|(base, patches)| self.load_chain(base, &patches));
        loaded.map_err(|source| image.twin_error(entry, source))
    }

    /// Loads `base` and then what follows it, the last of `patches` first.
    fn load_chain(
        &mut self,
        (image, entry): Link<'_>,
        patches: &[Link<'_>],
    ) -> Result<usize, ContainerError> {
        let [mut below, mut above] = std::mem::take(&mut self.parents);
        let mut len = entry.raw_len as usize;
        grow(&mut below, len);
        let mut outcome = self.load(image, &entry, &mut below[..len]);
        for (image, entry) in patches.iter().rev() {
            outcome = outcome.and_then(|()| self.read(image, entry));
            if outcome.is_err() {
                break;
            }
            let stored = &self.stored[..entry.stored_len as usize];
            let raw_len = entry.raw_len as usize;
            grow(&mut above, raw_len);
            outcome = decompress_behind(&below[..len], stored, &mut above[..raw_len])
                .map_err(|_| not_a_frame(entry));
            std::mem::swap(&mut below, &mut above);
            len = raw_len;
        }
        self.parents = [below, above];
        outcome.map(|()| len)
    }
}

/// The chunk at the end of the chain that begins with `entry`, and all that follow it on the way, the topmost first.
fn chain(
    image: &ParentImage,
    entry: ChunkEntry,
) -> Result<(Link<'_>, Vec<Link<'_>>), ContainerError> {
    let mut patches = Vec::new();
    let (mut image, mut entry) = (image, entry);
    while let Some((parent, twin)) = image.twin(&entry)? {
        if matches!(entry.kind, ChunkKind::Patched(_)) {
            patches.push((image, entry));
        }
        (image, entry) = (parent, twin);
    }
    Ok(((image, entry), patches))
}

fn not_a_frame(entry: &ChunkEntry) -> ContainerError {
    ContainerError::NotAFrame {
        chunk: entry.index,
        at: entry.stored_offset,
    }
}

fn decompress(
    decompressor: &mut Option<Decompressor>,
    entry: &ChunkEntry,
    stored: &[u8],
    raw: &mut [u8],
) -> Result<(), ContainerError> {
    let frame = |_| not_a_frame(entry);
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
