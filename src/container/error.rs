//! What can be wrong with an image, each with its place.

use std::io;

use uuid::Uuid;

use crate::digest::Digest;
use crate::error::{Blame, ErrorKind};
use crate::units::{ChunkIndex, FileOffset, PageIndex, StreamOffset};

use super::delta::ParentId;
use super::layout::{FORMAT_VERSION, INCOMPATIBLE_NAMES, Layout, MAX_DELTAS, SectionType};

/// Why an image cannot be read, written or believed.
#[derive(Debug, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "the sentence over a variant says what its fields are"
)]
pub enum ContainerError {
    #[error("it cannot be read")]
    Read { at: FileOffset, source: io::Error },
    #[error("the image could not be written")]
    Write { at: FileOffset, source: io::Error },

    #[error("it is too short to be an image")]
    TooShort { file_len: u64 },
    #[error("it ends without a footer")]
    NoFooter {
        file_len: u64,
        at: FileOffset,
        found: String,
    },
    #[error("its format version is {version}, this program reads version {FORMAT_VERSION}")]
    UnsupportedVersion { version: u32, at: FileOffset },
    #[error("it needs features this program does not have: {}", feature_names(*bits))]
    UnknownIncompatible { bits: u64, at: FileOffset },
    #[error("it has features this program must not edit: {}", bit_numbers(*bits))]
    UnknownReadonlyCompatible { bits: u64, at: FileOffset },

    #[error("no section begins where one is expected")]
    WrongMagic { at: FileOffset, found: String },
    #[error("section {found} stands where section {expected} is expected")]
    WrongType {
        expected: SectionType,
        found: SectionType,
        at: FileOffset,
    },
    #[error("it needs section {section}, which this program does not know")]
    UnknownCritical {
        section: SectionType,
        at: FileOffset,
    },
    #[error("section {section} has version {version}, which this program does not know")]
    UnsupportedSectionVersion {
        section: SectionType,
        version: u16,
        at: FileOffset,
    },
    #[error("section {section} does not match its checksum")]
    Crc {
        section: SectionType,
        at: FileOffset,
    },
    #[error("section {section} does not match its digest")]
    SectionDigest {
        section: SectionType,
        at: FileOffset,
        expected: Digest,
        found: Digest,
    },
    #[error("section {section} has a wrong length")]
    LengthMismatch {
        section: SectionType,
        at: FileOffset,
        expected: u64,
        found: u64,
    },
    #[error("section {section} is larger than it may be")]
    TooLarge {
        section: SectionType,
        at: FileOffset,
        len: u64,
        limit: u64,
    },
    #[error("section {section} has an impossible {field}")]
    WrongField {
        section: SectionType,
        field: &'static str,
        at: FileOffset,
        found: u64,
    },
    #[error("{field} of section {section} disagrees with the footer")]
    Disagrees {
        section: SectionType,
        field: &'static str,
        at: FileOffset,
    },
    #[error("section {section} has a byte that must be zero and is not")]
    NotZero {
        section: SectionType,
        at: FileOffset,
    },

    #[error("section {section} overlaps what lies before it")]
    Overlap {
        section: SectionType,
        at: FileOffset,
    },
    #[error("{len} bytes before section {section} belong to nothing")]
    Gap {
        section: SectionType,
        at: FileOffset,
        len: u64,
    },
    #[error("it holds {count} live sections {section}")]
    WrongCount { section: SectionType, count: usize },
    #[error("its generations are not in order")]
    Generations {
        section: SectionType,
        at: FileOffset,
    },

    #[error("chunk {chunk} has an impossible {field}")]
    WrongChunk {
        chunk: ChunkIndex,
        field: &'static str,
        at: FileOffset,
    },
    #[error("page {page} of the chunk table does not match its digest")]
    TablePage {
        page: u32,
        at: FileOffset,
        expected: Digest,
        found: Digest,
    },
    #[error("chunk {chunk} does not exist")]
    NoSuchChunk { chunk: ChunkIndex, chunk_count: u64 },
    #[error("stream offset {stream_offset} lies behind the stream's end")]
    NoSuchStreamOffset {
        stream_offset: StreamOffset,
        stream_len: u64,
    },
    #[error("chunk {chunk} does not match its checksum")]
    ChunkCrc {
        chunk: ChunkIndex,
        at: FileOffset,
        expected: u32,
        found: u32,
    },
    #[error("chunk {chunk} is not one whole zstd frame of the right size")]
    NotAFrame { chunk: ChunkIndex, at: FileOffset },
    #[error("chunk {chunk} decodes to {found} bytes instead of {expected}")]
    RawLength {
        chunk: ChunkIndex,
        at: FileOffset,
        stream_offset: StreamOffset,
        expected: u64,
        found: u64,
    },
    #[error("chunk {chunk} does not match its hash")]
    HashMismatch {
        chunk: ChunkIndex,
        at: FileOffset,
        stream_offset: StreamOffset,
        expected: Digest,
        found: Digest,
    },
    #[error("bytes between two chunks are not zero")]
    PayloadGap { at: FileOffset },
    #[error("the section around chunk {chunk} is damaged")]
    DataSection { chunk: ChunkIndex, at: FileOffset },

    #[error("the text before its chunks does not name its parent")]
    TextFrame { at: FileOffset },
    #[error("it is a delta, and its parent is not there: {parent}")]
    NoParent { parent: ParentId },
    #[error("it is not the parent of the delta, which is {expected}")]
    OtherParent { expected: ParentId, found: ParentId },
    #[error("it is the last of more than {MAX_DELTAS} deltas, each the parent of the next")]
    ChainTooLong,
    #[error("chunk {chunk} cannot be made from chunk {twin} of the parent {parent}")]
    Twin {
        chunk: ChunkIndex,
        twin: ChunkIndex,
        parent: Uuid,
        source: Box<ContainerError>,
    },

    #[error("the domain XML is not plain UTF-8 text without a DOCTYPE")]
    NotXml { at: FileOffset },
    #[error("the manifest cannot be read")]
    Manifest {
        at: FileOffset,
        source: serde_json::Error,
    },
    #[error("the manifest has schema {schema}, which this program does not know")]
    ManifestSchema { at: FileOffset, schema: u32 },
    #[error("run {run} of the page map has an impossible {field}")]
    WrongRun {
        run: u64,
        field: &'static str,
        at: FileOffset,
    },
    #[error("the page map's list of RAMBlocks cannot be read")]
    WrongBlockList { at: FileOffset },
    #[error("the page map leaves out page {page} of RAMBlock \"{}\"", block.escape_debug())]
    PageMissing {
        block: String,
        page: PageIndex,
        at: FileOffset,
    },

    #[error(
        "where the payload of a torn image with layout raw or mapped ends has to be found in its stream"
    )]
    PayloadEndUnknown { at: FileOffset },
    #[error("no generation of it is complete")]
    NoGeneration { at: FileOffset },
    #[error("a torn image is edited only after it has been repaired")]
    EditOfTorn { valid_len: u64, file_len: u64 },

    #[error("a chunk of this kind or length does not belong into an image with layout {layout}")]
    ChunkNotAllowed { layout: Layout, chunk: ChunkIndex },
    #[error("a section {section} cannot be appended here")]
    SectionNotAllowed { section: SectionType },
    #[error("the image has more chunks or sections than the format can hold")]
    Full,
}

impl Blame for ContainerError {
    fn kind(&self) -> ErrorKind {
        use ContainerError as E;
        match self {
            E::Read { .. } | E::Write { .. } => ErrorKind::Failed,
            E::NoSuchChunk { .. } | E::NoSuchStreamOffset { .. } | E::PayloadEndUnknown { .. } => {
                ErrorKind::Failed
            }
            E::ChunkNotAllowed { .. } | E::SectionNotAllowed { .. } | E::Full => ErrorKind::Failed,
            E::Twin { source, .. } => source.kind(),
            _ => ErrorKind::Image,
        }
    }

    fn at(&self) -> Option<String> {
        use ContainerError as E;
        match self {
            E::NoFooter { at, found, .. } | E::WrongMagic { at, found } => {
                Some(format!("file offset {at}, found {found}"))
            }
            E::WrongField { at, found, .. } => Some(format!("file offset {at}, found {found:#x}")),
            E::LengthMismatch {
                at,
                expected,
                found,
                ..
            } => Some(format!(
                "file offset {at}, found {found} bytes instead of {expected}"
            )),
            E::HashMismatch {
                at, stream_offset, ..
            }
            | E::RawLength {
                at, stream_offset, ..
            } => Some(format!("file offset {at}, stream offset {stream_offset}")),
            E::TooShort { file_len } => Some(format!("{file_len} bytes")),
            E::Twin { parent, source, .. } => match **source {
                E::Twin { .. } => source.at(),
                _ => source
                    .at()
                    .map(|at| format!("in the parent {parent}, {at}")),
            },
            E::EditOfTorn { valid_len, .. } => {
                Some(format!("file offset {}", FileOffset(*valid_len)))
            }
            _ => self.offset().map(|at| format!("file offset {at}")),
        }
    }
}

impl ContainerError {
    /// The chunk whose bytes are damaged; `None` if it is about something else.
    pub fn damaged_chunk(&self) -> Option<ChunkIndex> {
        use ContainerError as E;
        match self {
            E::ChunkCrc { chunk, .. } | E::NotAFrame { chunk, .. } => Some(*chunk),
            E::RawLength { chunk, .. } | E::HashMismatch { chunk, .. } => Some(*chunk),
            E::DataSection { chunk, .. } | E::Twin { chunk, .. } => Some(*chunk),
            _ => None,
        }
    }

    /// Where in the file; `None` where the whole file is meant.
    pub fn offset(&self) -> Option<FileOffset> {
        use ContainerError as E;
        match self {
            E::Read { at, .. } | E::Write { at, .. } | E::NoFooter { at, .. } => Some(*at),
            E::UnsupportedVersion { at, .. } | E::UnknownIncompatible { at, .. } => Some(*at),
            E::UnknownReadonlyCompatible { at, .. } | E::WrongMagic { at, .. } => Some(*at),
            E::WrongType { at, .. } | E::UnknownCritical { at, .. } => Some(*at),
            E::UnsupportedSectionVersion { at, .. } | E::Crc { at, .. } => Some(*at),
            E::SectionDigest { at, .. } | E::LengthMismatch { at, .. } => Some(*at),
            E::TooLarge { at, .. } | E::WrongField { at, .. } | E::Disagrees { at, .. } => {
                Some(*at)
            }
            E::NotZero { at, .. } | E::Overlap { at, .. } | E::Gap { at, .. } => Some(*at),
            E::Generations { at, .. } | E::WrongChunk { at, .. } | E::TablePage { at, .. } => {
                Some(*at)
            }
            E::ChunkCrc { at, .. } | E::NotAFrame { at, .. } | E::RawLength { at, .. } => Some(*at),
            E::HashMismatch { at, .. } | E::PayloadGap { at } | E::NotXml { at } => Some(*at),
            E::Manifest { at, .. } | E::ManifestSchema { at, .. } | E::WrongRun { at, .. } => {
                Some(*at)
            }
            E::WrongBlockList { at } | E::PageMissing { at, .. } => Some(*at),
            E::PayloadEndUnknown { at } | E::NoGeneration { at } => Some(*at),
            E::DataSection { at, .. } | E::TextFrame { at } => Some(*at),
            E::NoParent { .. } | E::OtherParent { .. } | E::ChainTooLong | E::Twin { .. } => None,
            E::TooShort { .. } | E::WrongCount { .. } | E::NoSuchChunk { .. } => None,
            E::NoSuchStreamOffset { .. } | E::EditOfTorn { .. } | E::ChunkNotAllowed { .. } => None,
            E::SectionNotAllowed { .. } | E::Full => None,
        }
    }
}

/// `DELTA (bit 0), bit 7`.
fn feature_names(bits: u64) -> String {
    let name = |bit: usize| match INCOMPATIBLE_NAMES.get(bit) {
        Some(name) => format!("{name} (bit {bit})"),
        None => format!("bit {bit}"),
    };
    set_bits(bits).map(name).collect::<Vec<_>>().join(", ")
}

/// `bit 3, bit 7`.
fn bit_numbers(bits: u64) -> String {
    let names = set_bits(bits).map(|bit| format!("bit {bit}"));
    names.collect::<Vec<_>>().join(", ")
}

fn set_bits(bits: u64) -> impl Iterator<Item = usize> {
    (0..64).filter(move |bit| bits >> bit & 1 == 1)
}

/// What `bytes` look like, in a few words, for a person.
pub(super) fn describe(bytes: &[u8]) -> String {
    if bytes.iter().all(|byte| *byte == 0) {
        return format!("{} zero bytes", bytes.len());
    }
    let shown: Vec<String> = bytes
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("bytes {} …", shown.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_footer_says_where_and_what_is_there() {
        let error = ContainerError::NoFooter {
            file_len: 0x1f3b_fe00 + 512,
            at: FileOffset(0x1f3b_fe00),
            found: describe(&[0; 512]),
        };
        assert_eq!(error.to_string(), "it ends without a footer");
        assert_eq!(
            error.at().unwrap(),
            "file offset 0x1f3bfe00, found 512 zero bytes"
        );
        assert_eq!(error.kind(), ErrorKind::Image);
    }

    #[test]
    fn features_are_refused_by_name_where_they_have_one() {
        let error = ContainerError::UnknownIncompatible {
            bits: 0x81,
            at: FileOffset(0),
        };
        assert!(error.to_string().ends_with("DELTA (bit 0), bit 7"));
    }
}
