//! Device sections walked with their description: every byte accounted for, every footer checked.
//!
//! Source: spec/qemu-stream.md §7 and §8.

use std::collections::HashSet;

use super::cursor::{Cursor, Stop};
use super::device_state::DeviceSection;
use super::error::{Place, SectionName, StreamError};
use super::section::{SectionHeader, read_footer};
use super::vmdescription::{Description, Device};
use super::wire;
use crate::units::StreamOffset;

/// The sections in `bytes`, which begin at `start` in the stream, behind section `before`, and end before the EOF byte.
///
/// # Errors
/// The first thing in which the bytes differ from the description.
pub(super) fn walk(
    description: &Description,
    bytes: &[u8],
    start: StreamOffset,
    before: Option<SectionName>,
) -> Result<Vec<DeviceSection>, StreamError> {
    let mut walk = Walk {
        cursor: Cursor::new(bytes, start),
        left: bytes.len(),
        last: before,
        section_ids: HashSet::new(),
    };
    let mut sections = Vec::new();
    for device in &description.devices {
        sections.push(walk.next_section(device)?);
    }
    match walk.left as u64 {
        0 => Ok(sections),
        len => Err(StreamError::UndescribedBytes {
            at: walk.place(),
            len,
        }),
    }
}

struct Walk<'a> {
    cursor: Cursor<'a>,
    left: usize,
    last: Option<SectionName>,
    section_ids: HashSet<u32>,
}

impl Walk<'_> {
    fn place(&self) -> Place {
        Place::after(self.cursor.offset(), self.last.clone())
    }

    fn next_section(&mut self, device: &Device) -> Result<DeviceSection, StreamError> {
        let at = self.place();
        let before = self.cursor.len();
        let section = self.read_section(device).map_err(|stop| match stop {
            Stop::Bad(error) => error,
            Stop::NeedMore => StreamError::MissingSection {
                at,
                idstr: device.name.clone(),
                instance_id: device.instance_id,
            },
        })?;
        self.left -= self.cursor.len() - before;
        Ok(section)
    }

    /// 0x04 · header · payload · footer.
    fn read_section(&mut self, device: &Device) -> Result<DeviceSection, Stop> {
        let at = self.place();
        match self.cursor.u8()? {
            wire::QEMU_VM_SECTION_FULL => {}
            found => return Err(StreamError::UnknownSectionType { at, found }.into()),
        }
        let header = SectionHeader::read(&mut self.cursor, |offset| {
            Place::after(offset, self.last.clone())
        })?;
        check_identity(&header, device, at)?;
        let offset = self.cursor.offset();
        let len = self.skip_payload(&header, device)?;
        read_footer(&mut self.cursor, header.section_id, &header.idstr)?;
        if !self.section_ids.insert(header.section_id) {
            let (at, section_id) = (self.place(), header.section_id);
            return Err(StreamError::RepeatedSectionId { at, section_id }.into());
        }
        self.last = Some(header.name());
        Ok(DeviceSection {
            idstr: header.idstr,
            instance_id: header.instance_id,
            version_id: header.version_id,
            section_id: header.section_id,
            offset,
            len: Some(len),
        })
    }

    fn skip_payload(&mut self, header: &SectionHeader, device: &Device) -> Result<u64, Stop> {
        let at = Place::inside(self.cursor.offset(), header.section_id, &header.idstr);
        let len = device.payload_len().unwrap_or(u64::MAX);
        let taken = usize::try_from(len).map_err(|_| Stop::NeedMore);
        match taken.and_then(|taken| self.cursor.take(taken)) {
            Ok(_) => Ok(len),
            Err(_) => {
                let idstr = header.idstr.clone();
                Err(StreamError::SectionTooLong { at, idstr, len }.into())
            }
        }
    }
}

/// That the section is the one that the description names next.
fn check_identity(header: &SectionHeader, device: &Device, at: Place) -> Result<(), StreamError> {
    let is_instance = i64::from(header.instance_id) == device.instance_id
        || i64::from(header.instance_id.cast_signed()) == device.instance_id;
    if header.idstr == device.name && is_instance {
        return Ok(());
    }
    Err(StreamError::OtherSection {
        at,
        expected: device.name.clone(),
        expected_instance: device.instance_id,
        found: header.idstr.clone(),
        found_instance: header.instance_id,
    })
}
