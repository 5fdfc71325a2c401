//! Where everything lies in an ELF core: headers, notes, then each range of memory at a page's beginning.

use object::elf;
use object::endian::Endianness;
use object::write::elf::{FileHeader, ProgramHeader, Writer};

use super::notes;
use crate::config::guest_physical::PhysicalRange;
use crate::stream::x86_cpu::X86Cpu;
use crate::units::PAGE_LEN;

const PAGE: u64 = PAGE_LEN as u64;
const FILE_HEADER_LEN: u64 = 64;
const PROGRAM_HEADER_LEN: u64 = 56;

/// A range of memory, and where its bytes begin in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoreSegment {
    /// Its addresses, and the block behind them.
    pub range: PhysicalRange,
    /// Where it begins in the file.
    pub file_offset: u64,
}

/// A core that is yet to be written.
#[derive(Debug)]
pub struct CoreLayout<'a> {
    cpus: &'a [X86Cpu],
    segments: Vec<CoreSegment>,
    notes_offset: u64,
    file_len: u64,
}

impl<'a> CoreLayout<'a> {
    /// Of these ranges of memory and these processors. There is room left for a `VMCOREINFO` note.
    pub fn of(ranges: &[PhysicalRange], cpus: &'a [X86Cpu]) -> Self {
        let header_count = ranges.len() as u64 + 1;
        let notes_offset = FILE_HEADER_LEN + header_count * PROGRAM_HEADER_LEN;
        let notes_len = notes::of_cpus(cpus).len() + notes::LONGEST_VMCOREINFO;
        // No file is as long as an address can be large; where the sum is wrong, writing fails.
        let behind = |start: u64, len: u64| {
            let end = start.saturating_add(len);
            end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
        };
        let mut file_len = behind(notes_offset, notes_len as u64);
        let mut segments = Vec::with_capacity(ranges.len());
        for range in ranges {
            segments.push(CoreSegment {
                range: *range,
                file_offset: file_len,
            });
            file_len = behind(file_len, range.len);
        }
        CoreLayout {
            cpus,
            segments,
            notes_offset,
            file_len,
        }
    }

    /// The ranges of memory.
    pub fn segments(&self) -> &[CoreSegment] {
        &self.segments
    }

    /// Bytes of the whole file.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// The first bytes of the file: headers and notes, that of the guest among them if it has one.
    pub fn head(&self, vmcoreinfo: Option<&[u8]>) -> Vec<u8> {
        let mut notes = notes::of_cpus(self.cpus);
        notes.extend_from_slice(vmcoreinfo.unwrap_or_default());
        let mut head = Vec::new();
        let mut writer = Writer::new(Endianness::Little, true, &mut head);
        writer.reserve_file_header();
        writer.reserve_program_headers(u32::try_from(self.segments.len() + 1).unwrap_or(u32::MAX));
        let header = FileHeader {
            os_abi: elf::ELFOSABI_NONE,
            abi_version: 0,
            e_type: elf::ET_CORE,
            e_machine: elf::EM_X86_64,
            e_entry: 0,
            e_flags: elf::FileFlags(0),
        };
        // Fails only where the number of headers does not fit, of which there are few.
        let _ = writer.write_file_header(&header);
        writer.write_program_header(&ProgramHeader {
            p_type: elf::PT_NOTE,
            p_flags: elf::ProgramFlags(0),
            p_offset: self.notes_offset,
            p_vaddr: 0,
            p_paddr: 0,
            p_filesz: notes.len() as u64,
            p_memsz: notes.len() as u64,
            p_align: 4,
        });
        for segment in &self.segments {
            writer.write_program_header(&ProgramHeader {
                p_type: elf::PT_LOAD,
                p_flags: elf::PF_R | elf::PF_W | elf::PF_X,
                p_offset: segment.file_offset,
                // Debuggers that know no page tables see guest-physical addresses.
                p_vaddr: segment.range.start,
                p_paddr: segment.range.start,
                p_filesz: segment.range.len,
                p_memsz: segment.range.len,
                p_align: PAGE,
            });
        }
        head.extend_from_slice(&notes);
        head
    }
}

#[cfg(test)]
mod tests {
    use object::read::elf::{ElfFile64, FileHeader as _, ProgramHeader as _};

    use super::*;

    #[test]
    fn headers_say_where_memory_and_notes_lie() {
        let range = |start, len, offset| PhysicalRange {
            start,
            len,
            block: 0,
            offset,
        };
        let ranges = [range(0, 0xa_0000, 0), range(1 << 32, 0x1800, 0xc000_0000)];
        let cpus = [X86Cpu::default(), X86Cpu::default()];
        let layout = CoreLayout::of(&ranges, &cpus);
        let head = layout.head(Some(b"note of four bytes, 24 by"));
        assert!(head.len() as u64 <= layout.segments()[0].file_offset);
        let file = ElfFile64::<Endianness>::parse(head.as_slice()).unwrap();
        let header = file.elf_header();
        assert_eq!(header.e_type(Endianness::Little), elf::ET_CORE);
        let found: Vec<_> = file
            .elf_program_headers()
            .iter()
            .map(|it| {
                let endian = Endianness::Little;
                (
                    it.p_type(endian),
                    it.p_offset(endian),
                    it.p_paddr(endian),
                    it.p_memsz(endian),
                )
            })
            .collect();
        let notes_len = notes::of_cpus(&cpus).len() as u64 + 25;
        let at = layout.segments()[0].file_offset;
        let expected = [
            (elf::PT_NOTE, 64 + 3 * 56, 0, notes_len),
            (elf::PT_LOAD, at, 0, 0xa_0000),
            (elf::PT_LOAD, at + 0xa_0000, 1 << 32, 0x1800),
        ];
        assert_eq!(found, expected);
        assert_eq!(layout.file_len(), at + 0xa_0000 + 0x2000);
    }
}
