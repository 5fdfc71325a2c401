//! The image file ⇄ values: one payload, sections that describe it, a footer as its last bytes.
//!
//! [`ImageWriter`] appends chunks and sections to a [`Sink`](crate::bytes::Sink), [`Image`] reads them through a
//! [`ReadAt`](crate::bytes::ReadAt), [`Edit`] appends a generation to an image that exists. Compression, signing and
//! the meaning of the stream are left to others: this module is pure, bytes in and values out.
//!
//! Source: spec/container.md, whose order [`layout`] follows.

pub mod layout;

mod chunk_pages;
mod chunk_table;
mod chunks;
mod data_spans;
mod delta;
mod directory;
mod edit;
mod error;
mod footer;
mod head;
pub mod manifest;
mod page_map;
mod page_order;
mod page_spans;
mod reader;
mod section;
mod signature;
mod verify;
mod walk;
mod working_set;
mod writer;
mod zstd_frame;

pub use chunk_pages::{ChunkPages, PlacedPage};
pub use chunk_table::{ChunkEntry, ChunkKind};
pub use chunks::ChunkIter;
pub use delta::{ParentId, ParentImage, ParentReader, TEXT_FRAME_LEN};
pub use directory::DirectoryEntry;
pub use edit::Edit;
pub use error::ContainerError;
pub use footer::Footer;
pub use head::{Head, HeadFields, parse_head};
pub use layout::{Layout, SectionType};
pub use manifest::Manifest;
pub use page_map::{Block, PageLocation, PageMap, PageMapBuilder};
pub use page_spans::Span;
pub use reader::Image;
pub use section::FrameHeader;
pub use signature::{Signature, sign_payload};
pub use walk::TornTail;
pub use working_set::working_set_payload;
pub use writer::{Finished, ImageWriter, PlacedChunk, StoredChunk};

use uuid::Uuid;

/// Which save an image is, and of which guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Made at random for each save, kept by edits.
    pub image_uuid: Uuid,
    /// The guest's own UUID; `None` if it has none (never invented).
    pub guest_uuid: Option<Uuid>,
}
