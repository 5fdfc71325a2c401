//! From guest-virtual to guest-physical addresses, as an x86 processor does it.
//!
//! In: the control registers and a way to read guest-physical memory. Out: where a page lies, or why nowhere. No access
//! rights are looked at: whatever is mapped can be read.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 3, chapter 4 (paging).

use serde::Serialize;

use super::x86_cpu::X86Cpu;

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

const PRESENT: u64 = 1;
/// In an entry of a level above the last: it maps a large page.
const IS_LARGE: u64 = 1 << 7;
/// Bits 12 to 51: the address in an entry of 64 bits.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// How addresses are translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PagingMode {
    /// Not at all.
    None,
    /// Two levels of 32-bit entries; with `pse` pages of 4 MiB too.
    Bits32 {
        /// Whether CR4.PSE is set.
        pse: bool,
    },
    /// Three levels of 64-bit entries.
    Pae,
    /// Long mode, 48-bit addresses.
    FourLevel,
    /// Long mode, 57-bit addresses.
    FiveLevel,
}

/// The root of a processor's page tables, and how they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Paging {
    /// CR3.
    pub cr3: u64,
    /// How addresses are translated.
    pub mode: PagingMode,
}

/// Where an address leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Translation {
    /// The guest-physical address.
    pub physical: u64,
    /// Bytes of the page that it lies in.
    pub page_len: u64,
}

/// Why an address leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageFault {
    /// Its upper bits are not all like the highest that counts, or it is too long for the mode.
    #[error("the address is not one that this processor's mode knows")]
    NotCanonical,
    /// An entry on the way says that nothing is there.
    #[error("the page is not mapped: the entry of level {level} at {entry:#x} is not present")]
    NotPresent {
        /// 5 to 1; 1 is the page's own.
        level: u32,
        /// Where the entry lies in guest-physical memory.
        entry: u64,
    },
    /// An entry on the way lies where there is no memory.
    #[error("a page table lies at {entry:#x}, where there is no memory")]
    NoTable {
        /// Where it would lie.
        entry: u64,
    },
}

impl Paging {
    /// That of a processor.
    pub fn of(cpu: &X86Cpu) -> Self {
        let is = |register: u64, bit: u64| register & bit != 0;
        let mode = if !is(cpu.cr0, CR0_PG) {
            PagingMode::None
        } else if is(cpu.efer, EFER_LMA) && is(cpu.cr4, CR4_LA57) {
            PagingMode::FiveLevel
        } else if is(cpu.efer, EFER_LMA) {
            PagingMode::FourLevel
        } else if is(cpu.cr4, CR4_PAE) {
            PagingMode::Pae
        } else {
            let pse = is(cpu.cr4, CR4_PSE);
            PagingMode::Bits32 { pse }
        };
        let cr3 = cpu.cr3;
        Paging { cr3, mode }
    }

    /// Where `address` leads. `read` gives the 8 bytes at a guest-physical address, little-endian; `None` if there is no
    /// memory.
    ///
    /// # Errors
    /// What `read` says; else, as a value, the [`PageFault`] that the guest would see.
    pub fn translate<E>(
        &self,
        address: u64,
        read: &mut dyn FnMut(u64) -> Result<Option<u64>, E>,
    ) -> Result<Result<Translation, PageFault>, E> {
        if !self.is_canonical(address) {
            return Ok(Err(PageFault::NotCanonical));
        }
        match self.mode {
            PagingMode::None => Ok(Ok(Translation {
                physical: address,
                page_len: 1 << 12,
            })),
            PagingMode::Bits32 { pse } => self.translate_32(address, pse, read),
            PagingMode::Pae => self.walk(address, 3, self.cr3 & 0xffff_ffe0, read),
            PagingMode::FourLevel => self.walk(address, 4, self.cr3 & ADDRESS, read),
            PagingMode::FiveLevel => self.walk(address, 5, self.cr3 & ADDRESS, read),
        }
    }

    fn is_canonical(&self, address: u64) -> bool {
        let is_extended = |bits: u32| {
            let upper = address.cast_signed() >> (bits - 1);
            upper == 0 || upper == -1
        };
        match self.mode {
            PagingMode::None | PagingMode::Bits32 { .. } | PagingMode::Pae => address >> 32 == 0,
            PagingMode::FourLevel => is_extended(48),
            PagingMode::FiveLevel => is_extended(57),
        }
    }

    /// Tables of 512 entries of 8 bytes; the first of PAE has four.
    fn walk<E>(
        &self,
        address: u64,
        levels: u32,
        root: u64,
        read: &mut dyn FnMut(u64) -> Result<Option<u64>, E>,
    ) -> Result<Result<Translation, PageFault>, E> {
        let mut table = root;
        let mut level = levels;
        loop {
            let shift = 12 + 9 * (level - 1);
            let entry = table + (address >> shift & 0x1ff) * 8;
            let Some(value) = read(entry)? else {
                return Ok(Err(PageFault::NoTable { entry }));
            };
            if value & PRESENT == 0 {
                return Ok(Err(PageFault::NotPresent { level, entry }));
            }
            // PAE has large pages of 2 MiB only; the others of 1 GiB as well.
            let may_be_large = level == 2 || (level == 3 && levels > 3);
            if level == 1 || (may_be_large && value & IS_LARGE != 0) {
                let page_len = 1u64 << shift;
                let page = value & ADDRESS & !(page_len - 1);
                let physical = page | (address & (page_len - 1));
                return Ok(Ok(Translation { physical, page_len }));
            }
            table = value & ADDRESS;
            level -= 1;
        }
    }

    /// Tables of 1024 entries of 4 bytes.
    fn translate_32<E>(
        &self,
        address: u64,
        pse: bool,
        read: &mut dyn FnMut(u64) -> Result<Option<u64>, E>,
    ) -> Result<Result<Translation, PageFault>, E> {
        let mut read_entry = |entry: u64, level: u32| {
            let Some(word) = read(entry & !7)? else {
                return Ok(Err(PageFault::NoTable { entry }));
            };
            let value = word >> (8 * (entry & 4)) & 0xffff_ffff;
            Ok(match value & PRESENT {
                0 => Err(PageFault::NotPresent { level, entry }),
                _ => Ok(value),
            })
        };
        let entry = (self.cr3 & 0xffff_f000) + (address >> 22) * 4;
        let directory = match read_entry(entry, 2)? {
            Ok(value) => value,
            Err(fault) => return Ok(Err(fault)),
        };
        if pse && directory & IS_LARGE != 0 {
            // Bits 13 to 20 are bits 32 to 39 of the address.
            let page = (directory & 0xffc0_0000) | (directory >> 13 & 0xff) << 32;
            let physical = page | (address & 0x3f_ffff);
            return Ok(Ok(Translation {
                physical,
                page_len: 1 << 22,
            }));
        }
        let entry = (directory & 0xffff_f000) + (address >> 12 & 0x3ff) * 4;
        Ok(read_entry(entry, 1)?.map(|value| Translation {
            physical: (value & 0xffff_f000) | (address & 0xfff),
            page_len: 1 << 12,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::convert::Infallible;

    use super::*;

    /// Memory as words of 8 bytes.
    fn translate(
        mode: PagingMode,
        memory: &[(u64, u64)],
        address: u64,
    ) -> Result<(u64, u64), PageFault> {
        let memory: HashMap<u64, u64> = memory.iter().copied().collect();
        let paging = Paging { cr3: 0x1000, mode };
        let mut read = |at: u64| Ok::<_, Infallible>(memory.get(&at).copied());
        let Ok(found) = paging.translate(address, &mut read);
        found.map(|it| (it.physical, it.page_len))
    }

    #[test]
    fn four_levels_lead_to_pages_of_three_sizes() {
        let memory = [
            (0x1000 + 511 * 8, 0x2003),
            (0x2000 + 510 * 8, 0x3003),
            (0x3000 + 8 * 8, 0x8000_0000_0100_00e3),
            (0x3000 + 9 * 8, 0x4003),
            (0x4000, 0x8000_0000_0555_5003),
            (0x4008, 0),
            (0x2000 + 511 * 8, 0x4000_0083),
        ];
        let go = |address| translate(PagingMode::FourLevel, &memory, address);
        assert_eq!(go(0xffff_ffff_8100_0123), Ok((0x100_0123, 2 << 20)));
        assert_eq!(go(0xffff_ffff_8120_0fff), Ok((0x555_5fff, 4096)));
        assert_eq!(go(0xffff_ffff_c000_0001), Ok((0x4000_0001, 1 << 30)));
        let entry = 0x4008;
        let fault = PageFault::NotPresent { level: 1, entry };
        assert_eq!(go(0xffff_ffff_8120_1000), Err(fault));
        assert_eq!(go(0x0000_8000_0000_0000), Err(PageFault::NotCanonical));
        let entry = 0x1000;
        assert_eq!(go(0), Err(PageFault::NoTable { entry }));
    }

    #[test]
    fn five_levels_and_pae_begin_elsewhere() {
        let memory = [
            (0x1000 + 8, 0x2001),
            (0x2000, 0x3001),
            (0x3000, 0x4001),
            (0x4000, 0x5001),
            (0x5000, 0x7001),
        ];
        let five = translate(PagingMode::FiveLevel, &memory, 1 << 48);
        assert_eq!(five, Ok((0x7000, 4096)));
        let memory = [
            (0x1000 + 3 * 8, 0x2001),
            (0x2000 + 8, 0x60_0083),
            (0x2010, 0x3001),
            (0x3000, 0x9_0001),
        ];
        let go = |address| translate(PagingMode::Pae, &memory, address);
        assert_eq!(go(0xc020_0042), Ok((0x60_0042, 2 << 20)));
        assert_eq!(go(0xc040_0042), Ok((0x9_0042, 4096)));
        let entry = 0x1000;
        assert_eq!(go(0), Err(PageFault::NoTable { entry }));
    }

    #[test]
    fn entries_of_32_bits_lie_two_in_a_word() {
        let memory = [
            (0x1000, 0x0000_2001_0000_0000),
            (0x2000, 0x0003_3001_0000_0000),
            (0x1008, 0x0040_0083),
        ];
        let go = |address| translate(PagingMode::Bits32 { pse: true }, &memory, address);
        assert_eq!(go(0x0040_1abc), Ok((0x3_3abc, 4096)));
        assert_eq!(go(0x00bf_ffff), Ok((0x7f_ffff, 4 << 20)));
        let entry = 0x1000;
        assert_eq!(go(0), Err(PageFault::NotPresent { level: 2, entry }));
        assert_eq!(go(1 << 32), Err(PageFault::NotCanonical));
    }

    #[test]
    fn without_paging_an_address_is_its_own() {
        assert_eq!(translate(PagingMode::None, &[], 0x7c00), Ok((0x7c00, 4096)));
    }
}
