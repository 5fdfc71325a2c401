//! Layout `mapped`: pages ⇄ their own places in the file.
//!
//! Saving has two passes. First pages are written where they belong, in whatever order and by however many threads they
//! come: from a migration stream ([`encode`]) or from the memory of a stopped guest ([`capture`]). What is zero is never
//! written. Then, when it is known which pages there are, bitmaps and framing are written, and all workers hash the chunks
//! as they lie in the file, which is in the page cache.
//!
//! Reading turns such an image into the stream that the guest would have been migrated with ([`decode`]), so that it can be
//! restored with any QEMU and converted. [`MappedImage`] knows where everything lies, at a cost that does not grow
//! with the guest's memory.
//!
//! Source: spec/qemu-stream.md §13, spec/container.md §6, §7.

mod adopt;
mod memory_in;
mod payload;
mod places;
mod seal;
mod stream_in;
mod stream_out;

pub use adopt::FoundMapped;
pub use memory_in::capture;
pub use payload::MappedImage;
pub use stream_in::{encode, unpack};
pub use stream_out::decode;

/// Pages in a word of a bitmap.
const WORD_PAGES: u64 = 64;

/// Whether page `index` is in the bitmap.
fn has(bitmap: &[u64], page: u64) -> bool {
    let word = usize::try_from(page / WORD_PAGES).ok();
    let word = word.and_then(|word| bitmap.get(word)).copied();
    word.is_some_and(|word| word >> (page % WORD_PAGES) & 1 == 1)
}
