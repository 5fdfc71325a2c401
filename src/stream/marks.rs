//! What the bytes of a device state look like where nothing describes them: headers of sections and of subsections.
//!
//! [`footer_search`](super::footer_search) tells what is certain, which may be the first section only. Here a header counts
//! that stands behind the footer of the section before it and has a name that can be read. A device could hold bytes that look so:
//! good enough to compare two machines, not to read a device.

use std::collections::BTreeSet;

use super::cursor::Cursor;
use super::device_state::DeviceSection;
use super::error::Place;
use super::section::SectionHeader;
use super::wire;
use crate::units::StreamOffset;

/// A footer: its type byte and a be32 number.
const FOOTER_LEN: usize = 5;

/// The device sections of a region that begins at `start` in the stream, as far as they can be recognised.
pub fn likely_sections(region: &[u8], start: StreamOffset) -> Vec<DeviceSection> {
    let mut sections: Vec<DeviceSection> = Vec::new();
    sections.extend(section_at(region, start, 0));
    let footers = region.windows(FOOTER_LEN).enumerate();
    let footers = footers.filter(|(_, bytes)| bytes[0] == wire::QEMU_VM_SECTION_FOOTER);
    for (at, footer) in footers {
        let number = u32::from_be_bytes([footer[1], footer[2], footer[3], footer[4]]);
        let is_footer = sections
            .last()
            .is_some_and(|last| last.section_id == number);
        if is_footer && let Some(next) = section_at(region, start, at + FOOTER_LEN) {
            sections.push(next);
        }
    }
    sections
}

fn section_at(region: &[u8], start: StreamOffset, position: usize) -> Option<DeviceSection> {
    let offset = StreamOffset(start.0 + position as u64);
    let mut cursor = Cursor::new(region.get(position..)?, offset);
    if cursor.u8().ok()? != wire::QEMU_VM_SECTION_FULL {
        return None;
    }
    let header = SectionHeader::read(&mut cursor, |offset| Place::after(offset, None)).ok()?;
    let is_name =
        !header.idstr.is_empty() && header.idstr.bytes().all(|byte| byte.is_ascii_graphic());
    is_name.then(|| DeviceSection {
        idstr: header.idstr,
        instance_id: header.instance_id,
        version_id: header.version_id,
        section_id: header.section_id,
        offset: cursor.offset(),
        len: None,
    })
}

/// The names of the subsections in a region: `i8259/ltim`.
pub fn subsection_names(region: &[u8]) -> BTreeSet<String> {
    let marks = region.iter().enumerate();
    let marks = marks.filter(|(_, byte)| **byte == wire::QEMU_VM_SUBSECTION);
    let names = marks.filter_map(|(at, _)| {
        let (len, rest) = region.get(at + 1..)?.split_first()?;
        let name = rest.get(..usize::from(*len))?;
        let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || b"/-_.".contains(byte);
        let is_name = name.contains(&b'/') && name.iter().all(is_part);
        is_name.then(|| String::from_utf8_lossy(name).into_owned())
    });
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(id: u8, name: &str, payload: &[u8]) -> Vec<u8> {
        let len = u8::try_from(name.len()).unwrap();
        let header = [4, 0, 0, 0, id, len];
        let versions = [0, 0, 0, 7, 0, 0, 0, 2];
        let footer = [0x7e, 0, 0, 0, id];
        [&header, name.as_bytes(), &versions, payload, &footer].concat()
    }

    #[test]
    fn sections_are_recognised_where_footers_alone_would_not_tell() {
        let payload = [&[0x7e, 0, 0, 0, 1, 9][..], &[0x7e, 0, 0, 0, 2]].concat();
        let region = [
            section(1, "timer", &payload),
            section(2, "0000:00:02.0/vga", b"\x05\x08vga/mode\0\0\0\x01"),
            section(0, "fdc", b"\x05\x03a b"),
            vec![0],
        ]
        .concat();
        let found = likely_sections(&region, StreamOffset(100));
        let names: Vec<_> = found
            .iter()
            .map(|one| (one.idstr.as_str(), one.instance_id))
            .collect();
        assert_eq!(names, [("timer", 7), ("0000:00:02.0/vga", 7), ("fdc", 7)]);
        let names: Vec<String> = subsection_names(&region).into_iter().collect();
        assert_eq!(names, ["vga/mode"]);
    }

    #[test]
    fn bytes_that_are_no_sections_give_none() {
        assert_eq!(likely_sections(&[4; 64], StreamOffset(0)), []);
        assert_eq!(likely_sections(&[], StreamOffset(0)), []);
        assert!(subsection_names(&[5; 64]).is_empty());
    }
}
