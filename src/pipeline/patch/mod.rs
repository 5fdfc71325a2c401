//! Chunks that whoever gets an image makes mostly of an image that it has already.
//!
//! The receiver guesses the raw bytes of a chunk: at the place of each page what its own image has at the same guest
//! address ([`Earlier`]). It sends a short hash of each page of the guess ([`Question`]), the giver answers which are
//! right and adds the bytes of the others ([`Replier`]). The giver needs no other image for that, and nobody has to believe
//! anybody: what comes of it counts only by the chunk's own digest. Then the chunk is stored as the image has it
//! ([`Restorer`]), which the checksum in the chunk table judges.
//!
//! Source: spec/transfer.md §8.

mod again;
mod guess;
mod reply;
mod wire;

pub use again::{Recipe, Restorer};
pub use guess::{Earlier, Expected, Guess, Guesser};
pub use reply::{NoReply, Replier};
pub use wire::{MAX_RAW_LEN, MAX_REST_LEN, Question, Reply, State};

use crate::digest::Digest;

/// Bytes of a piece that is compared: those of a page.
const PIECE_LEN: usize = crate::units::PAGE_LEN;
const PIECE_LEN_U32: u32 = 4096;

/// The short hash of bytes of the chunk with this digest. That two pieces of bytes have the same is not rare, and only
/// costs the chunk's bytes.
fn short_hash(chunk: &Digest, bytes: &[u8]) -> u16 {
    let (seed, _) = chunk.0.split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
    let seed = u64::from_le_bytes(*seed);
    let hash = twox_hash::XxHash3_64::oneshot_with_seed(seed, bytes);
    u16::from_le_bytes([hash.to_le_bytes()[0], hash.to_le_bytes()[1]])
}

/// The bytes of a chunk that lie in no piece, in order. `pieces` are in order and do not overlap.
fn around<'a>(raw: &'a [u8], pieces: &'a [u32]) -> impl Iterator<Item = &'a [u8]> {
    spaces(raw.len(), pieces).map(|space| &raw[space])
}

/// Where the bytes lie that are in no piece.
fn spaces(raw_len: usize, pieces: &[u32]) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
    let begins = std::iter::once(0).chain(pieces.iter().map(|piece| *piece as usize + PIECE_LEN));
    let ends = pieces.iter().map(|piece| *piece as usize);
    begins
        .zip(ends.chain(std::iter::once(raw_len)))
        .map(|(begin, end)| begin..end)
        .filter(|space| !space.is_empty())
}

/// The short hash of all that lies around the pieces.
fn hash_around(chunk: &Digest, raw: &[u8], pieces: &[u32], buffer: &mut Vec<u8>) -> u16 {
    buffer.clear();
    around(raw, pieces).for_each(|bytes| buffer.extend_from_slice(bytes));
    short_hash(chunk, buffer)
}
