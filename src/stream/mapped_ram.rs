//! QEMU's mapped-ram layout: where everything lies in such a stream, and the bytes around the pages.
//!
//! The stream is a file: behind each entry of the block list stands a header that names two places, a bitmap of the
//! pages that are there and the block's pages, each at its own place. What is not there is zero. The next entry follows
//! behind the block's last page, so positions in the stream are positions in the file.
//!
//! [`Parser::mapped_ram`](super::Parser::mapped_ram) reads it, [`MappedRam`] lays it out.
//!
//! Source: QEMU `docs/devel/migration/mapped-ram.rst`, `migration/ram.c`, `mapped_ram_setup_ramblock` and
//! `parse_ramblock_mapped_ram`; spec/qemu-stream.md §13.

use super::cursor::{Cursor, Stop};
use super::error::{Place, StreamError};
use super::ram::RamBlock;
use super::wire;
use super::writer::{behind_pages, configuration, push_ram_start, push_str8};
use crate::units::PAGE_LEN;

/// The capability's name in the configuration.
pub(super) const CAPABILITY: &str = "mapped-ram";

/// The only version of a block's header there is.
const HEADER_VERSION: u32 = 1;

/// Bytes of that header: be32 version · be64 page size · be64 bitmap's place · be64 pages' place.
const HEADER_LEN: u64 = 28;

/// Pages begin at a multiple of this, as QEMU's do. It reads them wherever they are page-aligned.
const PAGES_ALIGNMENT: u64 = 1 << 20;

/// Pages in a word of the bitmap.
const WORD_PAGES: u64 = 64;

/// A RAMBlock and where it lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedBlock {
    /// Its name and size.
    pub block: RamBlock,
    /// Where its entry in the block list begins; of the first one where the stream does.
    pub entry: u64,
    /// Where its bitmap begins: one bit a page, in little-endian words of 64.
    pub bitmap: u64,
    /// Where its first page would lie.
    pub pages: u64,
}

impl MappedBlock {
    /// How many pages it has.
    pub fn page_count(&self) -> u64 {
        self.block.used_length / PAGE_LEN as u64
    }

    /// Words of its bitmap.
    pub fn word_count(&self) -> u64 {
        self.page_count().div_ceil(WORD_PAGES)
    }

    /// Where its bitmap ends.
    pub fn bitmap_end(&self) -> u64 {
        self.bitmap + self.word_count() * 8
    }

    /// Where a page lies.
    pub fn page_offset(&self, page: u64) -> u64 {
        self.pages + page * PAGE_LEN as u64
    }

    /// Where its last page ends, and the stream goes on.
    pub fn pages_end(&self) -> u64 {
        self.pages + self.block.used_length
    }
}

/// A stream of this layout without its pages and bitmaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedRam {
    /// The RAMBlocks, in the order of the list.
    pub blocks: Vec<MappedBlock>,
    /// What stands before each block's bitmap, from its entry on.
    pub entries: Vec<Vec<u8>>,
    /// What stands behind the last page, from [`MappedRam::pages_end`] on and before the device sections.
    pub behind_pages: Vec<u8>,
}

impl MappedRam {
    /// Lays out the RAMBlocks of a guest.
    ///
    /// `machine_type` is the resolved one; `ram_section` a number that no device section has.
    pub fn lay_out(machine_type: &str, ram_section: u32, blocks: &[RamBlock]) -> Self {
        MappedRam::lay_out_from(0, machine_type, ram_section, blocks)
    }

    /// As [`MappedRam::lay_out`], in a file in which the stream begins at `start`.
    pub fn lay_out_from(
        start: u64,
        machine_type: &str,
        ram_section: u32,
        blocks: &[RamBlock],
    ) -> Self {
        let mut front = configuration(machine_type, Some(CAPABILITY));
        push_ram_start(&mut front, ram_section, blocks);
        let mut laid_out = MappedRam {
            blocks: Vec::new(),
            entries: Vec::new(),
            behind_pages: behind_all_pages(ram_section),
        };
        let mut entry = start;
        for block in blocks {
            let mut bytes = std::mem::take(&mut front);
            push_str8(&mut bytes, &block.idstr);
            bytes.extend(block.used_length.to_be_bytes());
            let bitmap = entry + bytes.len() as u64 + HEADER_LEN;
            let mut mapped = MappedBlock {
                block: block.clone(),
                entry,
                bitmap,
                pages: 0,
            };
            mapped.pages = mapped.bitmap_end().next_multiple_of(PAGES_ALIGNMENT);
            bytes.extend(HEADER_VERSION.to_be_bytes());
            bytes.extend((PAGE_LEN as u64).to_be_bytes());
            bytes.extend(mapped.bitmap.to_be_bytes());
            bytes.extend(mapped.pages.to_be_bytes());
            entry = mapped.pages_end();
            laid_out.blocks.push(mapped);
            laid_out.entries.push(bytes);
        }
        laid_out
    }

    /// Where the last page ends.
    pub fn pages_end(&self) -> u64 {
        self.blocks.last().map_or(0, MappedBlock::pages_end)
    }
}

/// The ends of START, of a PART and of END, none of which has a record: QEMU writes all three.
fn behind_all_pages(ram_section: u32) -> Vec<u8> {
    let mut bytes = behind_pages(ram_section).to_vec();
    for kind in [wire::QEMU_VM_SECTION_PART, wire::QEMU_VM_SECTION_END] {
        bytes.push(kind);
        bytes.extend(ram_section.to_be_bytes());
        bytes.extend(behind_pages(ram_section));
    }
    bytes
}

/// The two places in a block's header.
pub(super) struct Places {
    pub(super) bitmap: u64,
    pub(super) pages: u64,
}

/// Reads a block's header, behind its name and length.
///
/// # Errors
/// [`StreamError::MappedBlock`] if its places are not behind each other, or not where pages can be mapped.
pub(super) fn read_places(
    cursor: &mut Cursor<'_>,
    at: &Place,
    idstr: &str,
    used_length: u64,
) -> Result<Places, Stop> {
    let version = cursor.be32()?;
    let page_size = cursor.be64()?;
    let (bitmap, pages) = (cursor.be64()?, cursor.be64()?);
    let page_len = PAGE_LEN as u64;
    let bitmap_len = (used_length / page_len).div_ceil(WORD_PAGES) * 8;
    let is_behind = bitmap >= cursor.offset().0
        && bitmap
            .checked_add(bitmap_len)
            .is_some_and(|end| end <= pages)
        && pages.checked_add(used_length).is_some();
    let problem = if version != HEADER_VERSION {
        "has a header of an unknown version"
    } else if page_size != page_len {
        "has pages of another size than 4096 bytes"
    } else if !is_behind {
        "does not lie behind its header"
    } else if !pages.is_multiple_of(page_len) {
        "has pages that are not page-aligned"
    } else {
        return Ok(Places { bitmap, pages });
    };
    Err(StreamError::MappedBlock {
        at: at.clone(),
        idstr: idstr.to_owned(),
        problem,
    }
    .into())
}

#[cfg(test)]
mod tests {
    use super::super::{Event, Parser};
    use super::*;

    fn block(idstr: &str, pages: u64) -> RamBlock {
        RamBlock {
            idstr: idstr.to_owned(),
            used_length: pages * PAGE_LEN as u64,
            page_size: PAGE_LEN as u64,
        }
    }

    /// Parses the stream piece by piece; gives each block's number, bitmap and pages.
    fn parsed(laid_out: &MappedRam) -> Vec<(usize, u64, u64)> {
        let mut parser = Parser::mapped_ram();
        let mut found = Vec::new();
        let entries = laid_out.entries.iter().map(Vec::as_slice);
        let positions = laid_out.blocks.iter().map(|block| block.entry);
        let pieces = entries.zip(positions);
        let end = (laid_out.behind_pages.as_slice(), laid_out.pages_end());
        for (mut bytes, position) in pieces.chain([end]) {
            assert_eq!(parser.position().0, position);
            while let Some(element) = parser.next(bytes).unwrap() {
                if let Event::MappedBlock {
                    block,
                    bitmap,
                    pages,
                } = element.event
                {
                    found.push((block, bitmap, pages));
                }
                bytes = &bytes[element.len..];
            }
            assert!(bytes.is_empty());
        }
        found
    }

    #[test]
    fn what_is_laid_out_is_what_is_read() {
        let blocks = [
            block("pc.ram", 70_000),
            block("0:2/vga.vram", 1),
            block("z", 65),
        ];
        let laid_out = MappedRam::lay_out("pc-q35-10.0", 2, &blocks);
        let places = laid_out.blocks.iter().enumerate();
        let places: Vec<_> = places
            .map(|(number, one)| (number, one.bitmap, one.pages))
            .collect();
        assert_eq!(parsed(&laid_out), places);
        assert!(laid_out.blocks.iter().all(|one| one.pages % (1 << 20) == 0));
        assert_eq!(laid_out.blocks[0].word_count(), 1094);
        assert_eq!(laid_out.blocks[0].bitmap, laid_out.entries[0].len() as u64);
    }

    #[test]
    fn a_block_that_lies_over_its_header_is_refused() {
        let laid_out = MappedRam::lay_out("pc-q35-10.0", 2, &[block("pc.ram", 16)]);
        let entry = &laid_out.entries[0];
        for (at_end, value) in [
            (8, 0),
            (8, (1 << 20) + 1),
            (16, 0),
            (16, 1 << 40),
            (24, 8192),
        ] {
            let mut bytes = entry.clone();
            let at = bytes.len() - at_end;
            bytes[at..at + 8].copy_from_slice(&u64::to_be_bytes(value));
            let mut parser = Parser::mapped_ram();
            let mut rest = bytes.as_slice();
            let error = loop {
                match parser.next(rest) {
                    Ok(element) => rest = &rest[element.unwrap().len..],
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, StreamError::MappedBlock { .. }), "{error}");
        }
    }
}
