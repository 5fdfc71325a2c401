//! A stream around page records that somebody else makes: what comes before them, between and behind.
//!
//! The stream is the one that QEMU would write of a stopped guest, but for three freedoms that every QEMU's reader has:
//! all pages stand in the END section, that section's number is chosen by us, and the vmdescription is empty.
//!
//! ```text
//! header · configuration · ram START (block list) · ram END ( page records ) · device sections · EOF · vmdescription
//! ```
//!
//! Source: QEMU `migration/savevm.c`, `qemu_savevm_state_header` and `qmp_xen_save_devices_state`, `migration/ram.c`,
//! `ram_save_setup` and `save_page_header`; spec/qemu-stream.md §2 to §6, §11.

use super::ram::RamBlock;
use super::wire;
use crate::units::{PAGE_LEN, PageIndex};

/// Bytes of a page record without a block's name before its body: the word of offset and flags.
pub const RECORD_WORD_LEN: usize = 8;

/// Bytes in which every run state's name and its NUL have room.
const RUN_STATE_LEN: usize = 32;

/// Bytes of the header that QEMU's device state begins with, alone or in a stream.
const HEADER_LEN: usize = 8;

/// Everything before the first page record: header, configuration, the `ram` section with the list of `blocks`, and
/// the head of the section that the page records stand in.
///
/// `machine_type` is the resolved one, `ram_section` from [`unused_section`]. Names longer than the format takes are cut;
/// QEMU has none.
pub fn before_pages(machine_type: &str, ram_section: u32, blocks: &[RamBlock]) -> Vec<u8> {
    let mut bytes = configuration(machine_type, None);
    bytes.extend(block_list(ram_section, blocks));
    bytes.push(wire::QEMU_VM_SECTION_END);
    bytes.extend(ram_section.to_be_bytes());
    bytes
}

/// The START of the `ram` section: the list of `blocks`, and no page.
pub fn block_list(ram_section: u32, blocks: &[RamBlock]) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_ram_start(&mut bytes, ram_section, blocks);
    for block in blocks {
        push_str8(&mut bytes, &block.idstr);
        bytes.extend(block.used_length.to_be_bytes());
    }
    bytes.extend(behind_pages(ram_section));
    bytes
}

/// Header and configuration, with the one capability that the stream is written with, if there is one.
pub(super) fn configuration(machine_type: &str, capability: Option<&str>) -> Vec<u8> {
    let mut bytes = header().to_vec();
    bytes.push(wire::QEMU_VM_CONFIGURATION);
    let machine_type = short(machine_type);
    bytes.extend([0, 0, 0, len_of(machine_type)]);
    bytes.extend(machine_type);
    if let Some(capability) = capability {
        bytes.push(wire::QEMU_VM_SUBSECTION);
        push_str8(&mut bytes, wire::CAPABILITIES);
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend(1_u32.to_be_bytes());
        push_str8(&mut bytes, capability);
    }
    bytes
}

/// The head of the `ram` section up to the first entry of the block list.
pub(super) fn push_ram_start(bytes: &mut Vec<u8>, ram_section: u32, blocks: &[RamBlock]) {
    bytes.push(wire::QEMU_VM_SECTION_START);
    bytes.extend(ram_section.to_be_bytes());
    push_str8(bytes, wire::RAM_IDSTR);
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(wire::RAM_SAVE_VERSION.to_be_bytes());
    let total: u64 = blocks.iter().map(|block| block.used_length).sum();
    bytes.extend((total | wire::RAM_SAVE_FLAG_MEM_SIZE).to_be_bytes());
}

/// What ends the page records: the EOS word and the section's footer.
pub fn behind_pages(ram_section: u32) -> [u8; 13] {
    let mut bytes = [0; 13];
    bytes[..8].copy_from_slice(&wire::RAM_SAVE_FLAG_EOS.to_be_bytes());
    bytes[8] = wire::QEMU_VM_SECTION_FOOTER;
    bytes[9..].copy_from_slice(&ram_section.to_be_bytes());
    bytes
}

/// The word that begins a page record. If `is_named` the block's name follows it, as [`push_str8`] writes it; otherwise
/// the record belongs to the block of the one before.
pub fn record_word(page: PageIndex, is_zero: bool, is_named: bool) -> [u8; RECORD_WORD_LEN] {
    let kind = match is_zero {
        true => wire::RAM_SAVE_FLAG_ZERO,
        false => wire::RAM_SAVE_FLAG_PAGE,
    };
    let same_block = match is_named {
        true => 0,
        false => wire::RAM_SAVE_FLAG_CONTINUE,
    };
    let offset = page.0 * PAGE_LEN as u64;
    (offset | kind | same_block).to_be_bytes()
}

/// Appends a text as QEMU does: one length byte, then its bytes.
pub fn push_str8(bytes: &mut Vec<u8>, text: &str) {
    let text = short(text);
    bytes.push(len_of(text));
    bytes.extend(text);
}

/// The device sections, the EOF byte and an empty vmdescription, from what `xen-save-devices-state` wrote of a guest
/// that is `run_state`; `None` if it is not as we know it. Without a vmdescription QEMU complains that it is missing.
///
/// QEMU writes the guest down as running, whatever it is. A migration writes the state that the guest is stopped in, and
/// so do we.
pub fn device_sections(saved: &[u8], run_state: &str) -> Option<Vec<u8>> {
    let sections = sections_behind_header(saved)?;
    let is_known = sections.first() == Some(&wire::QEMU_VM_SECTION_FULL)
        && sections.last() == Some(&wire::QEMU_VM_EOF);
    if !is_known || run_state.len() >= RUN_STATE_LEN {
        return None;
    }
    let running = global_state("running");
    let mut places = sections.windows(running.len()).enumerate();
    let is_running = |(at, bytes): (usize, &[u8])| (bytes == running).then_some(at);
    let at = places.by_ref().find_map(is_running)?;
    if places.find_map(is_running).is_some() {
        return None;
    }
    let mut sections = sections.to_vec();
    sections[at..at + running.len()].copy_from_slice(&global_state(run_state));
    sections.extend([wire::QEMU_VM_VMDESCRIPTION, 0, 0, 0, 0]);
    Some(sections)
}

/// The device sections and the EOF byte in what `xen-save-devices-state` wrote; `None` if it is not as we know it.
pub fn sections_behind_header(saved: &[u8]) -> Option<&[u8]> {
    saved.strip_prefix(&header())
}

/// The beginning of section `globalstate` behind its number: str8 idstr, instance, version, length of the run state with
/// its NUL, and as much of the run state's 100 bytes as any name needs.
fn global_state(run_state: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_str8(&mut bytes, "globalstate");
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend([0, 0, 0, len_of(run_state.as_bytes()) + 1]);
    bytes.extend(run_state.as_bytes());
    bytes.resize(bytes.len() - run_state.len() + RUN_STATE_LEN, 0);
    bytes
}

/// A number for the `ram` section that none of the device sections has: the first from 1 on that is in no place where one
/// could stand. QEMU's own is 2 mostly. 0 would be taken for any section that was not loaded yet.
pub fn unused_section(device_sections: &[u8]) -> u32 {
    (1..)
        .find(|&number| is_unused_section(number, device_sections))
        .unwrap_or(u32::MAX)
}

/// Whether none of the device sections has that number.
pub fn is_unused_section(number: u32, device_sections: &[u8]) -> bool {
    let mut header = [wire::QEMU_VM_SECTION_FULL; 5];
    header[1..].copy_from_slice(&number.to_be_bytes());
    device_sections.windows(5).all(|bytes| bytes != header)
}

fn header() -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..4].copy_from_slice(&wire::QEMU_VM_FILE_MAGIC.to_be_bytes());
    bytes[4..].copy_from_slice(&wire::QEMU_VM_FILE_VERSION.to_be_bytes());
    bytes
}

fn short(text: &str) -> &[u8] {
    &text.as_bytes()[..text.len().min(usize::from(u8::MAX))]
}

fn len_of(short: &[u8]) -> u8 {
    u8::try_from(short.len()).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::sample::Sample;
    use super::super::{Element, Event, Parser};
    use super::*;

    fn block(idstr: &str, pages: u64) -> RamBlock {
        RamBlock {
            idstr: idstr.to_owned(),
            used_length: pages * PAGE_LEN as u64,
            page_size: PAGE_LEN as u64,
        }
    }

    /// Device state as QEMU saves it alone.
    fn saved_devices() -> Vec<u8> {
        let mut sample = Sample::new();
        sample.has_description = false;
        let stream = sample.bytes();
        let at = stream
            .windows(5)
            .rposition(|it| it == b"\x04\0\0\0\0")
            .unwrap();
        let mut devices = stream[at..].to_vec();
        let state = devices.windows(6).position(|it| it == b"paused").unwrap();
        devices[state - 1] = 8;
        devices[state..state + 7].copy_from_slice(b"running");
        // The version of the sample's sections is none of QEMU's.
        let version = devices
            .windows(11)
            .position(|it| it == b"globalstate")
            .unwrap()
            + 18;
        devices[version] = 1;
        [b"QEVM\0\0\0\x03", &devices[..]].concat()
    }

    #[test]
    fn what_is_written_is_a_stream() {
        let mut stream = before_pages("pc-q35-10.0", 2, &[block("pc.ram", 2), block("pc.bios", 1)]);
        stream.extend(record_word(PageIndex(0), false, true));
        push_str8(&mut stream, "pc.ram");
        stream.extend([7; PAGE_LEN]);
        stream.extend(record_word(PageIndex(1), true, false));
        stream.push(0);
        stream.extend(record_word(PageIndex(0), true, true));
        push_str8(&mut stream, "pc.bios");
        stream.push(0);
        stream.extend(behind_pages(2));
        let saved = saved_devices();
        stream.extend(device_sections(&saved, "paused").unwrap());

        let mut parser = Parser::new();
        let mut pages = Vec::new();
        let mut rest = &stream[..];
        while let Some(Element { len, event }) = parser.next(rest).unwrap() {
            if let Event::Page {
                block,
                page,
                is_zero,
                ..
            } = event
            {
                pages.push((block, page.0, is_zero));
            }
            rest = &rest[len..];
        }
        let summary = parser.finish().unwrap();
        assert_eq!(pages, [(0, 0, false), (0, 1, true), (1, 0, true)]);
        assert_eq!(summary.machine_type.as_deref(), Some("pc-q35-10.0"));
        assert_eq!(summary.blocks, [block("pc.ram", 2), block("pc.bios", 1)]);
        assert_eq!(summary.run_state.as_deref(), Some("paused"));
        assert!(summary.vmdescription.is_none());
    }

    #[test]
    fn the_ram_section_gets_a_number_that_no_device_has() {
        let sections = device_sections(&saved_devices(), "paused").unwrap();
        assert!(!is_unused_section(0, &sections) && !is_unused_section(0x28, &sections));
        assert_eq!(unused_section(&sections), 1);
        let taken = [&sections[..], b"\x04\0\0\0\x01\x04\0\0\0\x02"].concat();
        assert_eq!(unused_section(&taken), 3);
    }

    #[test]
    fn device_state_of_another_shape_is_not_taken() {
        let sections = |saved: &[u8]| device_sections(saved, "paused");
        assert_eq!(sections(b""), None);
        assert_eq!(sections(b"QEVM\0\0\0\x03"), None);
        assert_eq!(sections(b"QEVM\0\0\0\x03\x04\0"), None);
        let mut saved = saved_devices();
        assert!(sections(&saved).is_some());
        saved[8] = wire::QEMU_VM_CONFIGURATION;
        assert_eq!(sections(&saved), None);
        saved[8] = wire::QEMU_VM_SECTION_FULL;
        saved.push(wire::QEMU_VM_VMDESCRIPTION);
        assert_eq!(sections(&saved), None);
    }
}
