//! Raw bytes of a chunk → the stored bytes that the image has for it, to the last bit.
//!
//! The chunk table says how many stored bytes there are and what their checksum is, and a frame depends on its input and
//! zstd's level alone. So the level is found by trying, with the first chunk whose raw bytes are known; an image need not
//! tell it. Frames of another version of zstd may not be found at all: then the stored bytes have to come over.

use std::sync::{Mutex, PoisonError};

use crate::codec::{Compressor, DEFAULT_LEVEL, levels};
use crate::container::{ChunkEntry, ChunkKind};
use crate::digest::crc32c;
use crate::pipeline::PipelineError;

/// After so many chunks of which no level made the stored bytes, none is tried any more.
const MOST_FAILURES: u32 = 2;

/// How the image that arrives was made, as far as that is known; for all threads.
#[derive(Debug)]
pub struct Recipe(Mutex<Known>);

#[derive(Debug, Clone, Copy)]
struct Known {
    level: i32,
    failures: u32,
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe(Mutex::new(Known {
            level: DEFAULT_LEVEL,
            failures: 0,
        }))
    }
}

impl Recipe {
    /// Whether it is worth a try to store chunks of this kind from their raw bytes.
    pub fn is_of_use(&self, kind: ChunkKind) -> bool {
        kind == ChunkKind::Plain || self.known().failures < MOST_FAILURES
    }

    fn known(&self) -> Known {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes stored bytes for one thread.
#[derive(Default)]
pub struct Restorer {
    compressor: Option<(i32, Compressor)>,
    frame: Vec<u8>,
}

impl Restorer {
    /// The stored bytes of a chunk with these raw ones; `None` if they could not be found.
    ///
    /// # Errors
    /// [`PipelineError::Codec`] if memory is short.
    pub fn store<'b>(
        &'b mut self,
        recipe: &Recipe,
        entry: &ChunkEntry,
        raw: &'b [u8],
    ) -> Result<Option<&'b [u8]>, PipelineError> {
        if entry.kind == ChunkKind::Plain {
            let is_same = raw.len() == entry.stored_len as usize && crc32c(raw) == entry.stored_crc;
            return Ok(is_same.then_some(raw));
        }
        let known = recipe.known();
        if known.failures >= MOST_FAILURES {
            return Ok(None);
        }
        if !self.is_made_with(known.level, entry, raw)? && !self.search(recipe, entry, raw)? {
            return Ok(None);
        }
        Ok(Some(&self.frame))
    }

    /// Tries all levels while the other threads that met the same wait for what is found.
    fn search(
        &mut self,
        recipe: &Recipe,
        entry: &ChunkEntry,
        raw: &[u8],
    ) -> Result<bool, PipelineError> {
        let mut known = recipe.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.failures >= MOST_FAILURES {
            return Ok(false);
        }
        if self.is_made_with(known.level, entry, raw)? {
            return Ok(true);
        }
        for level in levels().rev().filter(|level| *level != known.level) {
            if self.is_made_with(level, entry, raw)? {
                known.level = level;
                return Ok(true);
            }
        }
        known.failures += 1;
        Ok(false)
    }

    fn is_made_with(
        &mut self,
        level: i32,
        entry: &ChunkEntry,
        raw: &[u8],
    ) -> Result<bool, PipelineError> {
        let compressor = match &mut self.compressor {
            Some((of, compressor)) if *of == level => compressor,
            other => &mut other.insert((level, Compressor::new(level)?)).1,
        };
        compressor.compress(raw, &mut self.frame)?;
        Ok(
            self.frame.len() == entry.stored_len as usize
                && crc32c(&self.frame) == entry.stored_crc,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::units::{ChunkIndex, FileOffset, StreamOffset};

    fn entry(raw: &[u8], stored: &[u8]) -> ChunkEntry {
        ChunkEntry {
            index: ChunkIndex(0),
            stored_offset: FileOffset(0),
            stream_offset: StreamOffset(0),
            stored_len: u32::try_from(stored.len()).unwrap(),
            raw_len: u32::try_from(raw.len()).unwrap(),
            kind: ChunkKind::Zstd,
            stored_crc: crc32c(stored),
            raw_digest: Digest::of(raw),
        }
    }

    fn text() -> Vec<u8> {
        let words = (0..20_000u32).map(|i| format!("{} ", i * i % 977));
        words.collect::<String>().into_bytes()
    }

    #[test]
    fn the_level_is_found() {
        let raw = text();
        let recipe = Recipe::default();
        let mut restorer = Restorer::default();
        for level in [2, 7, -3] {
            let mut stored = Vec::new();
            Compressor::new(level)
                .unwrap()
                .compress(&raw, &mut stored)
                .unwrap();
            let made = restorer.store(&recipe, &entry(&raw, &stored), &raw);
            assert_eq!(made.unwrap(), Some(stored.as_slice()), "{level}");
            // Another level may make the same of it.
            assert_eq!(recipe.known().failures, 0);
        }
    }

    #[test]
    fn frames_that_nobody_here_makes_are_given_up() {
        let raw = text();
        let recipe = Recipe::default();
        let mut restorer = Restorer::default();
        let strange = entry(&raw, b"not what zstd makes of it");
        for left in [true, false, false] {
            assert_eq!(restorer.store(&recipe, &strange, &raw).unwrap(), None);
            assert_eq!(recipe.is_of_use(ChunkKind::Zstd), left);
        }
        assert!(recipe.is_of_use(ChunkKind::Plain));
    }
}
