//! What can be wrong with a migration stream, and where.

use std::fmt;

use crate::error::{Blame, ErrorKind};
use crate::units::{PageIndex, StreamOffset};

/// A place in a stream: an offset, and the section it lies in or behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Where the offending bytes begin.
    pub offset: StreamOffset,
    /// The section they lie in or follow; `None` before the first.
    pub section: Option<SectionName>,
    /// Whether they lie in the section rather than behind it.
    pub is_inside: bool,
}

/// A section as people find it again: its number in the stream and its idstr.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionName {
    /// The number that its header and its footer carry.
    pub section_id: u32,
    /// Its name, such as `0000:00:02.0/virtio-net`.
    pub idstr: String,
}

impl Place {
    pub(super) fn inside(offset: StreamOffset, section_id: u32, idstr: &str) -> Self {
        let idstr = idstr.to_owned();
        Place {
            offset,
            section: Some(SectionName { section_id, idstr }),
            is_inside: true,
        }
    }

    pub(super) fn after(offset: StreamOffset, section: Option<SectionName>) -> Self {
        Place {
            offset,
            section,
            is_inside: false,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream offset {}", self.offset)?;
        let Some(section) = &self.section else {
            return Ok(());
        };
        let relation = if self.is_inside { "in" } else { "after" };
        let SectionName { section_id, idstr } = section;
        write!(f, ", {relation} section {section_id} {idstr:?}")
    }
}

/// Why bytes are not a migration stream that we can read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its variant is")]
pub enum StreamError {
    #[error("not a migration stream: it does not begin with \"QEVM\"")]
    NotAStream,
    #[error("unsupported migration stream version {version}")]
    UnsupportedVersion { at: Place, version: u32 },
    #[error("{what} of {len} bytes is longer than the limit of {limit}")]
    TooLong {
        at: Place,
        what: &'static str,
        len: u64,
        limit: u64,
    },
    #[error("{what} {found:?} is not text")]
    NotText {
        at: Place,
        what: &'static str,
        found: String,
    },

    #[error("unknown configuration subsection {name:?}")]
    UnknownConfiguration { at: Place, name: String },
    #[error("configuration subsection {name:?} has unknown version {version}")]
    ConfigurationVersion {
        at: Place,
        name: String,
        version: u32,
    },
    #[error("the guest's pages have 2^{bits} bytes, not 4096")]
    PageBits { at: Place, bits: u32 },
    /// Not a damaged stream but one of another layout: RAM lies at fixed file offsets.
    #[error("the stream is of the mapped-ram layout")]
    MappedRam {
        at: Place,
        machine_type: Option<String>,
    },
    #[error("the stream is not of the mapped-ram layout")]
    NotMappedRam { at: Place },
    #[error("RAMBlock {idstr:?} {problem}")]
    MappedBlock {
        at: Place,
        idstr: String,
        problem: &'static str,
    },
    #[error("the stream was written with capability {name:?}")]
    Capability { at: Place, name: String },

    #[error("unknown section type {found:#x}")]
    UnknownSectionType { at: Place, found: u8 },
    #[error("section type {name} does not belong here")]
    MisplacedSection { at: Place, name: &'static str },
    #[error("live section {idstr:?} cannot be read, only \"ram\" can")]
    LiveSection { at: Place, idstr: String },
    #[error("section {idstr:?} comes before the end of the RAM")]
    EarlySection { at: Place, idstr: String },
    #[error("section \"ram\" begins a second time")]
    RepeatedRam { at: Place },
    #[error("section \"ram\" goes on after its end")]
    RamEnded { at: Place },
    #[error("section \"ram\" has unknown version {version}, instance {instance_id}")]
    RamVersion {
        at: Place,
        version: u32,
        instance_id: u32,
    },
    #[error("no section with number {section_id} has begun")]
    UnknownSectionId { at: Place, section_id: u32 },
    #[error("two sections have the number {section_id}")]
    RepeatedSectionId { at: Place, section_id: u32 },
    #[error("{found:#x} instead of a section footer (machine types up to 2.3 write none)")]
    MissingFooter { at: Place, found: u8 },
    #[error("section footer of section {found} instead of {expected}")]
    WrongFooter {
        at: Place,
        expected: u32,
        found: u32,
    },

    #[error("unknown command {command:#x}")]
    UnknownCommand { at: Place, command: u16 },
    #[error("command {name} does not belong in a stream written to a file")]
    RefusedCommand { at: Place, name: &'static str },
    #[error("command {name} has {len} bytes")]
    CommandLength {
        at: Place,
        name: &'static str,
        len: u16,
    },
    #[error("RAM has huge pages of postcopy (page sizes {summary:#x})")]
    HugePages { at: Place, summary: u64 },

    #[error("unknown combination of RAM flags {flags:#x}")]
    UnknownFlags { at: Place, flags: u64 },
    #[error("RAM record of kind {name} cannot be read")]
    RefusedRecord { at: Place, name: &'static str },
    #[error("there is no list of RAMBlocks")]
    NoBlockList { at: Place },
    #[error("the list of RAMBlocks comes a second time")]
    RepeatedBlockList { at: Place },
    #[error("RAM of {total:#x} bytes is more than the limit of {limit:#x}")]
    TooMuchRam { at: Place, total: u64, limit: u64 },
    #[error("more than {limit} RAMBlocks")]
    TooManyBlocks { at: Place, limit: usize },
    #[error("RAMBlock {idstr:?} has {used_length:#x} bytes where the list has {left:#x} left")]
    BlockListTotal {
        at: Place,
        idstr: String,
        used_length: u64,
        left: u64,
    },
    #[error("the length of RAMBlock {idstr:?}, {used_length:#x} bytes, is not whole pages")]
    BlockLength {
        at: Place,
        idstr: String,
        used_length: u64,
    },
    #[error("RAMBlock {idstr:?} is listed twice")]
    RepeatedBlock { at: Place, idstr: String },
    #[error("unknown RAMBlock {idstr:?}")]
    UnknownBlock { at: Place, idstr: String },
    #[error("a page names no RAMBlock, and none was named before")]
    NoCurrentBlock { at: Place },
    #[error("a page at {offset:#x} lies outside of RAMBlock {idstr:?} of {used_length:#x} bytes")]
    PageOutside {
        at: Place,
        idstr: String,
        offset: u64,
        used_length: u64,
    },
    #[error("zero page {page} of RAMBlock {idstr:?} is filled with {fill:#x}")]
    NonZeroFill {
        at: Place,
        idstr: String,
        page: PageIndex,
        fill: u8,
    },
    #[error("{count} pages of RAMBlock {idstr:?} are missing, the first is {first}")]
    MissingPages {
        idstr: String,
        first: PageIndex,
        count: u64,
    },

    #[error("device state of more than {limit} bytes")]
    DeviceStateTooLong { at: Place, limit: usize },
    #[error("the vmdescription cannot be understood")]
    BadVmDescription {
        at: Place,
        source: serde_json::Error,
    },
    #[error(
        "the vmdescription names section {expected:?} instance {expected_instance}, the stream has {found:?} instance {found_instance}"
    )]
    OtherSection {
        at: Place,
        expected: String,
        expected_instance: i64,
        found: String,
        found_instance: u32,
    },
    #[error("the vmdescription names section {idstr:?} instance {instance_id}, which is not there")]
    MissingSection {
        at: Place,
        idstr: String,
        instance_id: i64,
    },
    #[error("the vmdescription gives section {idstr:?} {len} bytes, more than there are")]
    SectionTooLong { at: Place, idstr: String, len: u64 },
    #[error("{len} bytes of device state are not in the vmdescription")]
    UndescribedBytes { at: Place, len: u64 },
    #[error("{len} bytes follow the end of the stream")]
    TrailingBytes { at: Place, len: u64 },
    #[error("the stream is not complete: it ends inside {what}")]
    Truncated { at: Place, what: &'static str },
}

impl StreamError {
    /// Where it is wrong; `None` where that is the stream as a whole.
    pub fn place(&self) -> Option<&Place> {
        use StreamError as E;
        match self {
            E::NotAStream | E::MissingPages { .. } => None,
            E::UnsupportedVersion { at, .. }
            | E::TooLong { at, .. }
            | E::NotText { at, .. }
            | E::UnknownConfiguration { at, .. }
            | E::ConfigurationVersion { at, .. }
            | E::PageBits { at, .. }
            | E::MappedRam { at, .. }
            | E::NotMappedRam { at }
            | E::MappedBlock { at, .. }
            | E::Capability { at, .. }
            | E::UnknownSectionType { at, .. }
            | E::MisplacedSection { at, .. }
            | E::LiveSection { at, .. }
            | E::EarlySection { at, .. }
            | E::RepeatedRam { at }
            | E::RamEnded { at }
            | E::RamVersion { at, .. }
            | E::UnknownSectionId { at, .. }
            | E::RepeatedSectionId { at, .. }
            | E::MissingFooter { at, .. }
            | E::WrongFooter { at, .. }
            | E::UnknownCommand { at, .. }
            | E::RefusedCommand { at, .. }
            | E::CommandLength { at, .. }
            | E::HugePages { at, .. }
            | E::UnknownFlags { at, .. }
            | E::RefusedRecord { at, .. }
            | E::NoBlockList { at }
            | E::RepeatedBlockList { at }
            | E::TooMuchRam { at, .. }
            | E::TooManyBlocks { at, .. }
            | E::BlockListTotal { at, .. }
            | E::BlockLength { at, .. }
            | E::RepeatedBlock { at, .. }
            | E::UnknownBlock { at, .. }
            | E::NoCurrentBlock { at }
            | E::PageOutside { at, .. }
            | E::NonZeroFill { at, .. }
            | E::DeviceStateTooLong { at, .. }
            | E::BadVmDescription { at, .. }
            | E::OtherSection { at, .. }
            | E::MissingSection { at, .. }
            | E::SectionTooLong { at, .. }
            | E::UndescribedBytes { at, .. }
            | E::TrailingBytes { at, .. }
            | E::Truncated { at, .. } => Some(at),
        }
    }
}

impl Blame for StreamError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Image
    }

    fn at(&self) -> Option<String> {
        self.place().map(Place::to_string)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_and_where() {
        let section = SectionName {
            section_id: 7,
            idstr: "0000:00:02.0/virtio-net".to_owned(),
        };
        let at = Place::after(StreamOffset(0x18e40), Some(section));
        let error = StreamError::UnknownSectionType { at, found: 0x42 };
        assert_eq!(error.to_string(), "unknown section type 0x42");
        assert_eq!(
            Blame::at(&error).unwrap(),
            "stream offset 0x18e40, after section 7 \"0000:00:02.0/virtio-net\""
        );
        let at = Place::inside(StreamOffset(0x20), 1, "ram");
        assert_eq!(at.to_string(), "stream offset 0x20, in section 1 \"ram\"");
        assert!(size_of::<StreamError>() <= 128);
    }
}
