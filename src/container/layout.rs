//! Magic numbers, limits and field positions: the tables of spec/container.md as constants, in its order.

use std::fmt;
use std::ops::Range;

/// The format version this program reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// First bytes of every section: the magic of the zstd skippable frame 0x184D2A5B; §3.
pub const FRAME_MAGIC: [u8; 4] = [0x5b, 0x2a, 0x4d, 0x18];
/// What makes a skippable frame a section of ours; §3.
pub const SECTION_MAGIC: [u8; 8] = *b"VMSTOW\x1a\x0a";
/// `FLAGS` bit 0: a reader that does not know the type refuses the image.
pub const CRITICAL: u16 = 1;
/// `VERSION` of every section of this page.
pub const SECTION_VERSION: u16 = 1;
/// Bytes of a section before its payload.
pub const SECTION_HEADER_LEN: usize = 32;
/// Bytes of a section behind its payload: `TOTAL_LEN` and `CRC`.
pub const SECTION_TRAILER_LEN: usize = 8;

/// Names of the incompatible feature bits, by bit number; §8.
pub const INCOMPATIBLE_NAMES: &[&str] = &["DELTA"];
/// `INCOMPATIBLE` bit 0: the image is a delta, of use only with its parent; §16. The only one that this program supports.
pub const DELTA: u64 = 1;

/// Largest `XML ` payload; §4.
pub const MAX_XML_LEN: u64 = 16 << 20;
/// Largest `MANI` payload; §4.
pub const MAX_MANIFEST_LEN: u64 = 64 << 20;
/// Largest `SIGN` payload; §4.
pub const MAX_SIGNATURE_LEN: u64 = 1 << 20;
/// Largest `MAX_CHUNK_LEN`; §5, §6.
pub const MAX_MAX_CHUNK_LEN: u32 = 64 << 20;
/// Largest `ENTRY_COUNT` of a directory; §8.
pub const MAX_DIRECTORY_ENTRIES: u32 = 65536;

/// `HASH_ALGORITHM` SHA-256; §6.
pub const HASH_SHA256: u32 = 1;
/// `ENTRIES_PER_PAGE` of the chunk table; §6.
pub const ENTRIES_PER_PAGE: u32 = 4096;
/// Most deltas in a chain, one the parent of the next; §16.
pub const MAX_DELTAS: u32 = 16;
/// Longest name of a parent; §16.
pub const MAX_PARENT_NAME_LEN: usize = 255;
/// In place of the number of a twin: the chunk has none; §16.
pub const NO_TWIN: u32 = u32::MAX;
/// Bytes before the image digest's fields; §8.
pub const IMAGE_DIGEST_PREFIX: &[u8; 20] = b"vmstow image digest\0";

/// How the payload is laid out; §2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Each chunk one zstd frame.
    Zstd,
    /// QEMU's stream, verbatim, from byte 0.
    Raw,
    /// A mapped-ram stream from byte 0, RAM at fixed offsets.
    Mapped,
}

impl Layout {
    /// All layouts, by ascending number.
    pub const ALL: [Layout; 3] = [Layout::Zstd, Layout::Raw, Layout::Mapped];

    /// Its number in the file.
    pub fn number(self) -> u8 {
        match self {
            Layout::Zstd => 1,
            Layout::Raw => 2,
            Layout::Mapped => 3,
        }
    }

    /// The layout of this number; `None` if there is none.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|layout| layout.number() == number)
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::Zstd => "zstd",
            Layout::Raw => "raw",
            Layout::Mapped => "mapped",
        })
    }
}

/// What a section holds; §4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SectionType {
    /// `HEAD`: what a reader of a pipe needs before the end.
    Head,
    /// `XML `: the guest's libvirt domain XML.
    Xml,
    /// `MANI`: the manifest, JSON.
    Manifest,
    /// `CHNK`: the chunk table.
    ChunkTable,
    /// `PMAP`: the page map.
    PageMap,
    /// `SIGN`: a signature.
    Signature,
    /// `WSET`: the working set.
    WorkingSet,
    /// `DIR `: the directory.
    Directory,
    /// `FOOT`: the footer.
    Footer,
    /// `TWIN`: the parent's chunks of a delta.
    Twins,
    /// `DATA`: a chunk of a delta; part of the payload, never in the directory.
    Data,
    /// A type this page does not name.
    Other([u8; 4]),
}

impl SectionType {
    /// The types that this page names.
    pub const KNOWN: [SectionType; 11] = [
        SectionType::Head,
        SectionType::Xml,
        SectionType::Manifest,
        SectionType::ChunkTable,
        SectionType::PageMap,
        SectionType::Signature,
        SectionType::WorkingSet,
        SectionType::Directory,
        SectionType::Footer,
        SectionType::Twins,
        SectionType::Data,
    ];

    /// The four bytes in the file.
    pub fn code(self) -> [u8; 4] {
        match self {
            SectionType::Head => *b"HEAD",
            SectionType::Xml => *b"XML ",
            SectionType::Manifest => *b"MANI",
            SectionType::ChunkTable => *b"CHNK",
            SectionType::PageMap => *b"PMAP",
            SectionType::Signature => *b"SIGN",
            SectionType::WorkingSet => *b"WSET",
            SectionType::Directory => *b"DIR ",
            SectionType::Footer => *b"FOOT",
            SectionType::Twins => *b"TWIN",
            SectionType::Data => *b"DATA",
            SectionType::Other(code) => code,
        }
    }

    /// The type of these four bytes.
    pub fn from_code(code: [u8; 4]) -> Self {
        let known = Self::KNOWN.into_iter().find(|known| known.code() == code);
        known.unwrap_or(SectionType::Other(code))
    }

    /// Whether an image cannot be understood without it; `false` for the types this page does not name.
    pub fn is_critical(self) -> bool {
        !matches!(
            self,
            SectionType::PageMap
                | SectionType::Signature
                | SectionType::WorkingSet
                | SectionType::Other(_)
        )
    }

    /// How many live ones the directory of an image of `layout` may list.
    pub fn allowed_live(self, layout: Layout, is_delta: bool) -> Range<usize> {
        match self {
            SectionType::Twins if is_delta => 1..2,
            SectionType::Head if layout == Layout::Zstd => 1..2,
            SectionType::Head => 0..1,
            SectionType::Xml | SectionType::Manifest | SectionType::ChunkTable => 1..2,
            SectionType::PageMap | SectionType::WorkingSet => 0..2,
            SectionType::Directory
            | SectionType::Footer
            | SectionType::Data
            | SectionType::Twins => 0..1,
            SectionType::Signature | SectionType::Other(_) => 0..usize::MAX,
        }
    }
}

impl fmt::Display for SectionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.code().trim_ascii_end().escape_ascii())
    }
}

/// One table of the spec: a structure's name and its fields at fixed positions.
#[derive(Debug, Clone, Copy)]
pub struct Structure {
    /// The module here that holds the constants.
    pub name: &'static str,
    /// Field names and positions, ascending.
    pub fields: &'static [(&'static str, Range<usize>)],
}

macro_rules! structures {
    ($( $(#[$doc:meta])* $module:ident { $( $field:ident = $range:expr; )* } )*) => {
        $(
            $(#[$doc])*
            #[allow(missing_docs, reason = "the spec's table is the documentation")]
            pub mod $module {
                use std::ops::Range;
                $( pub const $field: Range<usize> = $range; )*
            }
        )*

        /// Every table of the spec, in its order; `tests/spec.rs` compares.
        pub const TABLES: &[Structure] = &[
            $( Structure {
                name: stringify!($module),
                fields: &[ $( (stringify!($field), $module::$field) ),* ],
            } ),*
        ];
    };
}

structures! {
    /// The frame of every section, from its start; §3.
    section {
        FRAME_MAGIC = 0..4;
        FRAME_LEN = 4..8;
        SECTION_MAGIC = 8..16;
        TYPE = 16..20;
        VERSION = 20..22;
        FLAGS = 22..24;
        PAYLOAD_LEN = 24..32;
    }

    /// `HEAD`, from the section's start; §5.
    head {
        FORMAT_VERSION = 32..36;
        LAYOUT = 36..37;
        INCOMPATIBLE = 40..48;
        IMAGE_UUID = 48..64;
        GUEST_UUID = 64..80;
        MAX_CHUNK_LEN = 80..84;
        MANIFEST_LEN = 84..88;
        XML_LEN = 88..92;
    }

    /// `CHNK`, from the section's start; §6.
    chunk_table {
        HASH_ALGORITHM = 32..36;
        ENTRIES_PER_PAGE = 36..40;
        CHUNK_COUNT = 40..48;
        TABLE_PAGE_COUNT = 48..52;
        MAX_CHUNK_LEN = 52..56;
        STREAM_LEN = 56..64;
        ROOT = 64..96;
    }

    /// One entry of the chunk table, 64 bytes; §6.
    chunk_entry {
        STORED_OFFSET = 0..8;
        STREAM_OFFSET = 8..16;
        STORED_LEN = 16..20;
        RAW_LEN = 20..24;
        KIND = 24..25;
        STORED_CRC = 28..32;
        RAW_SHA256 = 32..64;
    }

    /// `PMAP`, from the section's start; §7.
    page_map {
        BLOCK_COUNT = 32..36;
        PAGE_SIZE = 36..40;
        RUN_COUNT = 40..48;
        BLOCKS_LEN = 48..56;
    }

    /// One run of the page map, 32 bytes; §7.
    page_run {
        BLOCK = 0..2;
        RUN_KIND = 2..3;
        PAGE_COUNT = 4..8;
        FIRST_PAGE = 8..16;
        CHUNK = 16..20;
        BODY = 20..24;
        DATA = 24..32;
    }

    /// `DIR `, from the section's start; §8.
    directory {
        ENTRY_COUNT = 32..36;
        ENTRY_LEN = 36..40;
    }

    /// One entry of the directory, 64 bytes; §8.
    directory_entry {
        TYPE = 0..4;
        GENERATION = 4..8;
        OFFSET = 8..16;
        LENGTH = 16..24;
        SHA256 = 24..56;
        STATE = 56..60;
    }

    /// `FOOT`, from the section's start; §8.
    footer {
        FORMAT_VERSION = 32..36;
        LAYOUT = 36..37;
        INCOMPATIBLE = 40..48;
        READONLY_COMPATIBLE = 48..56;
        COMPATIBLE = 56..64;
        IMAGE_UUID = 64..80;
        GUEST_UUID = 80..96;
        PARENT_UUID = 96..112;
        PARENT_DIGEST = 112..144;
        GENERATION = 144..148;
        PAYLOAD_OFFSET = 152..160;
        PAYLOAD_LEN = 160..168;
        STREAM_LEN = 168..176;
        DIRECTORY_OFFSET = 176..184;
        DIRECTORY_LEN = 184..192;
        DIRECTORY_SHA256 = 192..224;
        IMAGE_DIGEST = 224..256;
        SELF_OFFSET = 256..264;
        PREVIOUS_FOOTER_OFFSET = 264..272;
    }

    /// `SIGN`, from the section's start; §11.
    signature {
        STATEMENT_LEN = 32..36;
        SIGNATURE_LEN = 36..40;
    }

    /// `WSET`, from the section's start; §15.
    working_set {
        WORKING_SET_COUNT = 32..36;
    }

    /// `TWIN`, from the section's start; §16.
    twins {
        TWIN_COUNT = 32..36;
        NAME_LEN = 36..38;
    }
}

/// Bytes of `HEAD` before its manifest.
pub const HEAD_FIXED_LEN: usize = 96;
/// Bytes of `CHNK` before its table page digests.
pub const CHUNK_TABLE_FIXED_LEN: usize = 96;
/// Bytes of a chunk table entry.
pub const CHUNK_ENTRY_LEN: usize = 64;
/// Bytes of `PMAP` before its block list.
pub const PAGE_MAP_FIXED_LEN: usize = 56;
/// Bytes of a page map run.
pub const PAGE_RUN_LEN: usize = 32;
/// Bytes of `DIR ` before its entries.
pub const DIRECTORY_FIXED_LEN: usize = 40;
/// Bytes of a directory entry.
pub const DIRECTORY_ENTRY_LEN: usize = 64;
/// Bytes of `FOOT`, all of it.
pub const FOOTER_LEN: usize = 512;
/// Bytes of `SIGN` before its statement.
pub const SIGNATURE_FIXED_LEN: usize = 40;
/// Bytes of `TWIN` before the parent's name.
pub const TWINS_FIXED_LEN: usize = 40;

/// The `N` bytes at `position` of a structure that is known to be long enough.
pub(super) fn array<const N: usize>(bytes: &[u8], position: Range<usize>) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[position]);
    array
}

/// The little-endian integer at `position` of a structure that is known to be long enough.
pub(super) fn u16_at(bytes: &[u8], position: Range<usize>) -> u16 {
    u16::from_le_bytes(array(bytes, position))
}

/// The little-endian integer at `position` of a structure that is known to be long enough.
pub(super) fn u32_at(bytes: &[u8], position: Range<usize>) -> u32 {
    u32::from_le_bytes(array(bytes, position))
}

/// The little-endian integer at `position` of a structure that is known to be long enough.
pub(super) fn u64_at(bytes: &[u8], position: Range<usize>) -> u64 {
    u64::from_le_bytes(array(bytes, position))
}

/// Puts `value`, of exactly the field's length, at `position`.
pub(super) fn put(bytes: &mut [u8], position: Range<usize>, value: &[u8]) {
    bytes[position].copy_from_slice(value);
}
