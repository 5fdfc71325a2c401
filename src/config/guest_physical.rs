//! Where RAMBlocks lie in guest-physical memory.
//!
//! In: the machine type, the arguments that QEMU was started with, the RAMBlocks, and what the chipset's PAM registers
//! say. Out: ranges, in ascending order, none of which overlap. What no rule here places (video memory, whose address the
//! guest chooses; memory plugged later; option ROMs) is in no range.
//!
//! | machine type | RAM below 4 GiB ends at |
//! |---|---|
//! | i440fx | 3.5 GiB; if there is that much or more, 3 GiB, so that both parts begin at whole GiBs |
//! | q35 | 2.75 GiB; if there is that much or more, 2 GiB |
//! | microvm | 3 GiB |
//!
//! `max-ram-below-4g` lowers the end of i440fx and q35 (i440fx also takes a higher one). The rest begins at 4 GiB. An AMD
//! guest whose addresses would reach 1012 GiB has its upper part at 1 TiB instead: this is not told here.
//!
//! Source: QEMU `hw/i386/pc_piix.c`, `pc_q35.c`, `microvm.c`, `pc_sysfw.c`, `hw/pci-host/pam.c`; held against
//! `info mtree -f` of QEMU 10.0.

use super::arguments::Arguments;
use super::properties::Properties;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const FOUR_GIB: u64 = 4 * GIB;

/// Video memory is seen here, whatever RAM there is beneath.
const VGA_WINDOW: (u64, u64) = (0xa_0000, 0xc_0000);
/// From here to 1 MiB PAM registers decide what is read.
const PAM_START: u64 = 0xc_0000;
/// The beginning of what the last of the firmware is shown at.
const FIRMWARE_COPY: u64 = 0xe_0000;
/// Bytes of it.
const FIRMWARE_COPY_LEN: u64 = 128 * KIB;

/// A named block of guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryBlock {
    /// QEMU's name for it.
    pub idstr: String,
    /// Its length in bytes.
    pub used_length: u64,
}

/// A range of guest-physical addresses behind which one block lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PhysicalRange {
    /// The first address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Which block, of those that the map was made from.
    pub block: usize,
    /// Where in the block it begins, in bytes.
    pub offset: u64,
}

impl PhysicalRange {
    /// The address behind the last one.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// What is read at each 16 KiB from 0xc0000 on, and at the last 64 KiB below 1 MiB: RAM, or the ROM before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pam {
    /// The seven registers.
    registers: [u8; 7],
}

impl Pam {
    /// As the firmware leaves them when it is done: RAM everywhere.
    pub const ALL_RAM: Pam = Pam {
        registers: [0x33; 7],
    };

    /// From the configuration space of the host bridge: 256 bytes of an i440fx or a q35.
    ///
    /// `None` if it is shorter.
    pub fn of_host_bridge(configuration: &[u8], is_q35: bool) -> Option<Self> {
        let first = if is_q35 { 0x90 } else { 0x59 };
        let registers = configuration.get(first..)?.first_chunk()?;
        Some(Pam {
            registers: *registers,
        })
    }

    /// The segments: first address, length, and whether RAM is read there.
    fn segments(self) -> impl Iterator<Item = (u64, u64, bool)> {
        const READS_RAM: u8 = 1;
        let small = (0..12u8).map(move |index| {
            let register = self.registers[1 + usize::from(index / 2)] >> (4 * (index % 2));
            let start = PAM_START + u64::from(index) * 16 * KIB;
            (start, 16 * KIB, register & READS_RAM != 0)
        });
        let last = self.registers[0] >> 4 & READS_RAM != 0;
        small.chain([(0xf_0000, 64 * KIB, last)])
    }
}

/// Whether a machine type is one of q35's.
pub fn is_q35(machine_type: &str) -> bool {
    machine_type.contains("q35")
}

/// The guest-physical memory of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PhysicalMap {
    ranges: Vec<PhysicalRange>,
}

impl PhysicalMap {
    /// Where `blocks` lie. `arguments` are those that QEMU was started with, if they are known.
    pub fn of(
        machine_type: &str,
        arguments: Option<&Arguments>,
        blocks: &[MemoryBlock],
        pam: Pam,
    ) -> Self {
        let mut map = PhysicalMap::default();
        let main = main_memory(arguments, blocks);
        let lens = main.iter().map(|block| blocks[*block].used_length);
        let size = lens.fold(0, u64::saturating_add);
        let has_pam = !machine_type.contains("microvm");
        let below = below_four_gib(machine_type, arguments, size);
        let mut place = |start: u64, end: u64, at: u64| {
            map.add_main(start, end, at, &main, blocks);
        };
        if has_pam {
            place(0, VGA_WINDOW.0.min(below), 0);
            for (start, len, is_ram) in pam.segments() {
                if is_ram && start + len <= below {
                    place(start, start + len, start);
                }
            }
            place(MIB, below.max(MIB), MIB);
        } else {
            place(0, below, 0);
        }
        place(FOUR_GIB, FOUR_GIB.saturating_add(size - below), below);
        map.add_firmware(blocks, has_pam.then_some(pam));
        map.add_plugged(arguments, blocks, size - below);
        map.finish()
    }

    /// The ranges, in ascending order.
    pub fn ranges(&self) -> &[PhysicalRange] {
        &self.ranges
    }

    /// The range that `address` lies in.
    pub fn find(&self, address: u64) -> Option<&PhysicalRange> {
        let behind = self.ranges.partition_point(|range| range.start <= address);
        let range = self.ranges.get(behind.checked_sub(1)?)?;
        (address < range.end()).then_some(range)
    }

    /// The address of a byte of a block, the lowest if it is seen at several.
    pub fn address_of(&self, block: usize, offset: u64) -> Option<u64> {
        let mut ranges = self.ranges.iter();
        let holds = |range: &&PhysicalRange| {
            range.block == block && (range.offset..range.offset + range.len).contains(&offset)
        };
        let range = ranges.find(holds)?;
        Some(range.start + (offset - range.offset))
    }

    /// Puts bytes `at`… of main memory, which may consist of several blocks, at `start`..`end`.
    fn add_main(&mut self, start: u64, end: u64, at: u64, main: &[usize], blocks: &[MemoryBlock]) {
        let (mut start, mut at) = (start, at);
        let mut first = 0;
        for block in main {
            let behind = u64::saturating_add(first, blocks[*block].used_length);
            if at < behind && start < end {
                let piece = (behind - at).min(end - start);
                self.add(start, piece, *block, at - first);
                (start, at) = (start + piece, at + piece);
            }
            first = behind;
        }
    }

    fn add(&mut self, start: u64, len: u64, block: usize, offset: u64) {
        let is_free = |range: &PhysicalRange| {
            start.checked_add(len).is_none_or(|end| end <= range.start) || range.end() <= start
        };
        if len > 0 && start.checked_add(len).is_some() && self.ranges.iter().all(is_free) {
            self.ranges.push(PhysicalRange {
                start,
                len,
                block,
                offset,
            });
        }
    }

    /// The firmware ends at 4 GiB; its last 128 KiB, and the ROM of video cards of old, are seen below 1 MiB where RAM is not.
    fn add_firmware(&mut self, blocks: &[MemoryBlock], pam: Option<Pam>) {
        let named = |name: &str| blocks.iter().position(|block| block.idstr == name);
        let len = |block: usize| blocks[block].used_length;
        let mut end = FOUR_GIB;
        let flash = ["system.flash0", "system.flash1"].map(named);
        let top = flash[0].or(named("pc.bios"));
        for block in [top, flash[1]].into_iter().flatten() {
            if let Some(start) = end.checked_sub(len(block)) {
                self.add(start, len(block), block, 0);
                end = start;
            }
        }
        let copy = named("isa-bios").or(top);
        for (start, piece, is_ram) in pam.into_iter().flat_map(Pam::segments) {
            let (block, first) = match start {
                _ if is_ram => continue,
                ..FIRMWARE_COPY => (named("pc.rom"), PAM_START),
                _ => (copy, FIRMWARE_COPY),
            };
            let Some(block) = block else { continue };
            let skipped = match start {
                ..FIRMWARE_COPY => Some(0),
                // Shorter firmware ends at 1 MiB all the same.
                _ => len(block).checked_sub(FIRMWARE_COPY_LEN),
            };
            let offset = skipped.map(|skipped| skipped + (start - first));
            if let Some(offset) = offset.filter(|offset| offset + piece <= len(block)) {
                self.add(start, piece, block, offset);
            }
        }
    }

    /// Memory devices that were there from the beginning: behind main memory, in the order of the arguments unless these say
    /// where.
    fn add_plugged(
        &mut self,
        arguments: Option<&Arguments>,
        blocks: &[MemoryBlock],
        above_four_gib: u64,
    ) {
        const ALIGNMENT: u64 = 2 * MIB;
        let behind = FOUR_GIB.saturating_add(above_four_gib);
        let mut next = behind.checked_next_multiple_of(GIB).unwrap_or(behind);
        let devices = arguments.into_iter().flat_map(|it| it.options("device"));
        for (_, device) in devices {
            let device = device.properties();
            let driver = device.get("driver").unwrap_or_default();
            if driver != "pc-dimm" && driver != "nvdimm" {
                continue;
            }
            let block = device.get("memdev").and_then(|id| block_of(&id, blocks));
            let Some(block) = block else { continue };
            let address = device.get("addr").and_then(|text| number(&text));
            let start = address.filter(|address| *address != 0).unwrap_or(next);
            let len = blocks[block].used_length;
            self.add(start, len, block, 0);
            if let Some(end) = start.checked_add(len) {
                next = next.max(end.checked_next_multiple_of(ALIGNMENT).unwrap_or(end));
            }
        }
    }

    /// In order, and what continues the range before it made one with it.
    fn finish(mut self) -> Self {
        self.ranges.sort_by_key(|range| range.start);
        let mut ranges: Vec<PhysicalRange> = Vec::with_capacity(self.ranges.len());
        for range in self.ranges {
            match ranges.last_mut() {
                Some(last)
                    if last.block == range.block
                        && last.end() == range.start
                        && last.offset + last.len == range.offset =>
                {
                    last.len += range.len;
                }
                _ => ranges.push(range),
            }
        }
        PhysicalMap { ranges }
    }
}

/// The blocks that main memory consists of, in the order of their addresses.
fn main_memory(arguments: Option<&Arguments>, blocks: &[MemoryBlock]) -> Vec<usize> {
    let nodes = arguments.map(node_backends).unwrap_or_default();
    let nodes: Option<Vec<usize>> = nodes.iter().map(|id| block_of(id, blocks)).collect();
    if let Some(nodes) = nodes.filter(|nodes| !nodes.is_empty()) {
        return nodes;
    }
    let options = arguments.into_iter().flat_map(|it| it.options("machine"));
    let mut values = options.filter_map(|(_, machine)| machine.properties().get("memory-backend"));
    let backend = values.next_back().and_then(|id| block_of(&id, blocks));
    let default = || block_of("pc.ram", blocks).or_else(|| block_of("microvm.ram", blocks));
    // The largest, where nobody says which it is.
    let largest = || (0..blocks.len()).max_by_key(|block| blocks[*block].used_length);
    backend
        .or_else(default)
        .or_else(largest)
        .into_iter()
        .collect()
}

/// The memory backends of NUMA nodes, in the order of the nodes.
fn node_backends(arguments: &Arguments) -> Vec<String> {
    let mut found: Vec<(u64, String)> = Vec::new();
    let mut next = 0;
    for (_, node) in arguments.options("numa") {
        let node: Properties = node.properties();
        if node.get("type").as_deref() != Some("node") {
            continue;
        }
        let number = node.get("nodeid").and_then(|text| number(&text));
        let number = number.unwrap_or(next);
        next = number.saturating_add(1);
        found.extend(node.get("memdev").map(|memdev| (number, memdev)));
    }
    found.sort();
    found.into_iter().map(|(_, memdev)| memdev).collect()
}

/// The block of a memory backend.
fn block_of(id: &str, blocks: &[MemoryBlock]) -> Option<usize> {
    let mut names = blocks.iter().map(|block| block.idstr.as_str());
    names.position(|name| name == id || name.strip_prefix("/objects/") == Some(id))
}

/// How many bytes of main memory lie below 4 GiB.
fn below_four_gib(machine_type: &str, arguments: Option<&Arguments>, size: u64) -> u64 {
    let options = arguments.into_iter().flat_map(|it| it.options("machine"));
    let mut limits =
        options.filter_map(|(_, machine)| machine.properties().get("max-ram-below-4g"));
    let limit = limits.next_back().and_then(|text| number(&text));
    let limit = limit.filter(|limit| *limit != 0);
    let low = if machine_type.contains("microvm") {
        3 * GIB
    } else if is_q35(machine_type) {
        const END: u64 = 2 * GIB + 768 * MIB;
        let low = if size >= END { 2 * GIB } else { END };
        low.min(limit.unwrap_or(FOUR_GIB))
    } else {
        let low = limit.unwrap_or(3 * GIB + 512 * MIB);
        // The oldest types do not care for whole GiBs.
        let is_aligned = !machine_type.contains("i440fx-1.");
        if size >= low && is_aligned {
            low.min(3 * GIB)
        } else {
            low
        }
    };
    size.min(low)
}

/// A number of bytes as QEMU's options have it: `0x1000`, `4294967296`, `3G`, `1.5G`.
fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).ok();
    }
    let unit = |last: char| match last.to_ascii_lowercase() {
        'b' => Some(1),
        'k' => Some(KIB),
        'm' => Some(MIB),
        'g' => Some(GIB),
        't' => Some(1 << 40),
        _ => None,
    };
    let last = text.chars().next_back()?;
    let (digits, unit) = match unit(last) {
        Some(unit) => (&text[..text.len() - 1], unit),
        None => (text, 1),
    };
    let Some((whole, part)) = digits.split_once('.') else {
        return digits.parse::<u64>().ok()?.checked_mul(unit);
    };
    let scale = 10u64.checked_pow(u32::try_from(part.len()).ok()?)?;
    let part = part.parse::<u64>().ok()?.checked_mul(unit)? / scale;
    whole
        .parse::<u64>()
        .ok()?
        .checked_mul(unit)?
        .checked_add(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(of: &[(&str, u64)]) -> Vec<MemoryBlock> {
        let block = |(idstr, used_length): &(&str, u64)| MemoryBlock {
            idstr: (*idstr).to_owned(),
            used_length: *used_length,
        };
        of.iter().map(block).collect()
    }

    fn arguments(words: &str) -> Arguments {
        let words: Vec<&str> = ["qemu"].into_iter().chain(words.split(' ')).collect();
        Arguments::parse(&words).unwrap()
    }

    /// The ranges as `start-end block+offset`.
    fn shown(
        machine: &str,
        words: &str,
        of: &[(&str, u64)],
        pam: Pam,
    ) -> Vec<(u64, u64, usize, u64)> {
        let arguments = arguments(words);
        let map = PhysicalMap::of(machine, Some(&arguments), &blocks(of), pam);
        let ranges = map.ranges().iter();
        ranges
            .map(|it| (it.start, it.end(), it.block, it.offset))
            .collect()
    }

    const BIOS: (&str, u64) = ("pc.bios", 256 * KIB);
    const TOP: (u64, u64, usize, u64) = (0xfffc_0000, FOUR_GIB, 1, 0);

    fn ram(machine: &str, words: &str, size: u64) -> Vec<(u64, u64, usize, u64)> {
        shown(machine, words, &[("pc.ram", size), BIOS], Pam::ALL_RAM)
    }

    #[test]
    fn memory_that_fits_below_the_hole_is_one_piece_but_for_the_vga_window() {
        for machine in ["pc-i440fx-10.0", "pc-q35-10.0"] {
            let found = ram(machine, "-m 256", 256 * MIB);
            let expected = [(0, 0xa_0000, 0, 0), (0xc_0000, 256 * MIB, 0, 0xc_0000), TOP];
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn more_memory_goes_on_at_four_gib() {
        let sizes = [
            ("pc-i440fx-10.0", "", 3277 * MIB, 3277 * MIB),
            ("pc-i440fx-10.0", "", 3584 * MIB, 3 * GIB),
            ("pc-i440fx-1.7", "", 3584 * MIB, 3584 * MIB),
            ("pc-i440fx-10.0", "", 4608 * MIB, 3 * GIB),
            ("pc-q35-10.0", "", 2815 * MIB, 2815 * MIB),
            ("pc-q35-10.0", "", 2816 * MIB, 2 * GIB),
            ("pc-q35-10.0", "", 4608 * MIB, 2 * GIB),
            (
                "pc-q35-10.0",
                "-machine q35,max-ram-below-4g=1G",
                4608 * MIB,
                GIB,
            ),
            (
                "pc-i440fx-10.0",
                "-machine max-ram-below-4g=0x80000000",
                3 * GIB,
                2 * GIB,
            ),
            (
                "pc-i440fx-10.0",
                "-machine max-ram-below-4g=1.5G",
                3 * GIB,
                GIB + 512 * MIB,
            ),
        ];
        for (machine, words, size, below) in sizes {
            let found = ram(machine, &format!("-m 1 {words}"), size);
            let first = found[1];
            assert_eq!(first, (0xc_0000, below, 0, 0xc_0000), "{machine} {size:#x}");
            let above = (FOUR_GIB, FOUR_GIB + size - below, 0, below);
            let expected = (size > below).then_some(above);
            assert_eq!(found.get(3), expected.as_ref(), "{machine} {size:#x}");
        }
    }

    #[test]
    fn microvm_has_no_window_and_three_gib_below_four() {
        let found = shown("microvm", "", &[("microvm.ram", 4 * GIB)], Pam::ALL_RAM);
        let above = (FOUR_GIB, 5 * GIB, 0, 3 * GIB);
        assert_eq!(found, [(0, 3 * GIB, 0, 0), above]);
    }

    #[test]
    fn the_nodes_of_a_numa_guest_follow_each_other_whatever_their_blocks_order() {
        let of = [("big", 3 * GIB), ("small", GIB), ("/objects/dimm", GIB)];
        let words = "-numa node,nodeid=1,memdev=big -numa node,nodeid=0,memdev=small \
            -device pc-dimm,memdev=dimm,id=d0";
        let found = shown("pc-i440fx-10.0", words, &of, Pam::ALL_RAM);
        let expected = [
            (0, 0xa_0000, 1, 0),
            (0xc_0000, GIB, 1, 0xc_0000),
            (GIB, 3 * GIB, 0, 0),
            (FOUR_GIB, 5 * GIB, 0, 2 * GIB),
            (5 * GIB, 6 * GIB, 2, 0),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn where_pam_shows_no_ram_there_are_roms() {
        let mut configuration = vec![0; 256];
        // 0xf0000: RAM; 0xc0000: RAM, 0xc4000: only written to.
        configuration[0x59] = 0x30;
        configuration[0x5a] = 0x21;
        let pam = Pam::of_host_bridge(&configuration, false).unwrap();
        let of = [
            ("pc.ram", 64 * MIB),
            BIOS,
            ("pc.rom", 128 * KIB),
            ("0000:00:02.0/vga.vram", 16 * MIB),
        ];
        let found = shown("pc-i440fx-10.0", "", &of, pam);
        let expected = [
            (0, 0xa_0000, 0, 0),
            (0xc_0000, 0xc_4000, 0, 0xc_0000),
            (0xc_4000, 0xe_0000, 2, 0x4000),
            (0xe_0000, 0xf_0000, 1, 128 * KIB),
            (0xf_0000, 64 * MIB, 0, 0xf_0000),
            TOP,
        ];
        assert_eq!(found, expected);
        assert!(Pam::of_host_bridge(&configuration[..0x5f], false).is_none());
    }

    #[test]
    fn flash_is_stacked_downwards_and_shown_below_one_mib() {
        let of = [
            ("pc.ram", 64 * MIB),
            ("system.flash0", 3 * MIB),
            ("system.flash1", 512 * KIB),
        ];
        let pam = Pam { registers: [0; 7] };
        let found = shown("pc-q35-10.0", "", &of, pam);
        let expected = [
            (0, 0xa_0000, 0, 0),
            (0xe_0000, MIB, 1, 3 * MIB - 128 * KIB),
            (MIB, 64 * MIB, 0, MIB),
            (FOUR_GIB - 3 * MIB - 512 * KIB, FOUR_GIB - 3 * MIB, 2, 0),
            (FOUR_GIB - 3 * MIB, FOUR_GIB, 1, 0),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn addresses_and_places_in_blocks_lead_to_each_other() {
        let of = blocks(&[("pc.ram", 4608 * MIB), BIOS]);
        let map = PhysicalMap::of("pc-i440fx-10.0", None, &of, Pam::ALL_RAM);
        assert_eq!(map.address_of(0, 3 * GIB), Some(FOUR_GIB));
        assert_eq!(map.address_of(0, 0xb_0000), None);
        assert_eq!(map.find(FOUR_GIB).unwrap().offset, 3 * GIB);
        for hole in [0xa_0000, 3 * GIB, 6 * GIB, u64::MAX] {
            assert_eq!(map.find(hole), None, "{hole:#x}");
        }
    }

    #[test]
    fn nothing_overflows() {
        let words = "-machine max-ram-below-4g=18446744073709551615 -device pc-dimm,memdev=d,addr=0xfffffffffffff000";
        let of = [("pc.ram", u64::MAX / 2), ("d", u64::MAX / 4)];
        for machine in ["pc-i440fx-10.0", "pc-q35-10.0", "microvm", "none"] {
            shown(machine, words, &of, Pam::ALL_RAM);
        }
    }
}
