//! The device state region: FULL sections, the EOF byte, the vmdescription.
//!
//! No section says how long it is. With a vmdescription every section is walked with exact byte accounting, and the
//! vmdescription that counts is the one whose walk ends exactly at the EOF byte before it: a device may hold bytes
//! that look like one. Without one, footers are all there is.
//!
//! Source: QEMU `migration/savevm.c`, `qemu_savevm_state_complete_precopy_non_iterable`; spec/qemu-stream.md §7-9.

use super::cursor::Cursor;
use super::error::{Place, SectionName, StreamError};
use super::section::SectionHeader;
use super::vmdescription::Description;
use super::{device_walk, footer_search, wire};
use crate::units::StreamOffset;

/// A device section of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSection {
    /// Its name, such as `0000:00:02.0/virtio-net`.
    pub idstr: String,
    /// Tells sections of the same name apart.
    pub instance_id: u32,
    /// The version of its payload's layout.
    pub version_id: u32,
    /// Its number in this stream, which means nothing elsewhere.
    pub section_id: u32,
    /// Where its payload begins.
    pub offset: StreamOffset,
    /// The bytes of its payload; `None` if neither a vmdescription nor its footer tells.
    pub len: Option<u64>,
}

/// The JSON that describes the device sections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDescription {
    /// Where the text begins.
    pub offset: StreamOffset,
    /// Its bytes.
    pub len: u64,
    /// The text as it is in the stream.
    pub json: String,
}

/// What the region held.
#[derive(Debug)]
pub(super) struct DeviceState {
    pub(super) sections: Vec<DeviceSection>,
    pub(super) run_state: Option<String>,
    pub(super) vmdescription: Option<VmDescription>,
}

/// EOF byte, type byte, be32 length.
const VMDESCRIPTION_HEADER_LEN: usize = 1 + 1 + 4;

/// The end of a stream without a vmdescription, and of one whose vmdescription was taken away.
const EOF: [u8; 1] = [wire::QEMU_VM_EOF];
const EOF_AND_EMPTY_DESCRIPTION: [u8; 6] =
    [wire::QEMU_VM_EOF, wire::QEMU_VM_VMDESCRIPTION, 0, 0, 0, 0];

/// Takes apart the region that begins at `start` in the stream, behind section `before`, and must end with it.
///
/// # Errors
/// [`StreamError::Truncated`] if no end is found, [`StreamError::TrailingBytes`] if it is not the end of `bytes`;
/// whatever is wrong with a section or its footer.
pub(super) fn read(
    bytes: &[u8],
    start: StreamOffset,
    before: Option<SectionName>,
) -> Result<DeviceState, StreamError> {
    let region = Region {
        bytes,
        start,
        before,
    };
    let mut first_error = None;
    for candidate in region.candidates_at_end() {
        match region.read_with(candidate) {
            Ok(device_state) => return Ok(device_state),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    if first_error.is_none()
        && let Some(device_state) = region.read_without_description()
    {
        return Ok(device_state);
    }
    let error = region.trailing_bytes().or(first_error);
    Err(error.unwrap_or_else(|| region.truncated()))
}

/// The FULL sections of a whole region, without the EOF byte and the vmdescription behind them. `None` if it does not
/// end as a stream does; the sections themselves are not looked at.
pub fn sections_of(region: &[u8]) -> Option<&[u8]> {
    let looked_at = Region {
        bytes: region,
        start: StreamOffset(0),
        before: None,
    };
    let described = looked_at.candidates_at_end().next();
    let described = described.and_then(|candidate| region.get(..candidate.eof));
    described
        .or_else(|| region.strip_suffix(&EOF_AND_EMPTY_DESCRIPTION))
        .or_else(|| region.strip_suffix(&EOF))
}

/// The region's bytes and where they lie in the stream.
struct Region<'a> {
    bytes: &'a [u8],
    start: StreamOffset,
    before: Option<SectionName>,
}

/// A place that may be the EOF byte before a vmdescription.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    /// Where the EOF byte lies in the region.
    eof: usize,
    json: &'a [u8],
}

impl<'a> Region<'a> {
    fn offset(&self, position: usize) -> StreamOffset {
        StreamOffset(self.start.0 + position as u64)
    }

    fn cursor(&self, position: usize) -> Cursor<'a> {
        let bytes = self.bytes.get(position..).unwrap_or_default();
        Cursor::new(bytes, self.offset(position))
    }

    /// The candidate whose EOF byte is at `eof`, if it has the form of one: 00 06, a length that fits, a brace, no NUL.
    fn candidate(&self, eof: usize) -> Option<Candidate<'a>> {
        let (header, rest) = self
            .bytes
            .get(eof..)?
            .split_at_checked(VMDESCRIPTION_HEADER_LEN)?;
        let [wire::QEMU_VM_EOF, wire::QEMU_VM_VMDESCRIPTION, len @ ..] = header else {
            return None;
        };
        let len = u32::from_be_bytes(len.try_into().ok()?);
        let json = rest.get(..usize::try_from(len).ok()?)?;
        // JSON has no NUL. To look for it costs no more than the way to the next candidate, which has one.
        let is_text = json.first() == Some(&b'{') && !json.contains(&0);
        is_text.then_some(Candidate { eof, json })
    }

    /// The candidates whose JSON ends with the region.
    ///
    /// JSON holds no NUL byte, so the region's last one is in the header of the vmdescription: six places to look at.
    fn candidates_at_end(&self) -> impl Iterator<Item = Candidate<'a>> {
        let last_nul = self.bytes.iter().rposition(|&byte| byte == 0).unwrap_or(0);
        let first = last_nul.saturating_sub(VMDESCRIPTION_HEADER_LEN - 1);
        (first..=last_nul)
            .filter_map(|eof| self.candidate(eof))
            .filter(|found| found.end() == self.bytes.len())
    }

    /// The error for bytes behind a vmdescription that fits.
    ///
    fn trailing_bytes(&self) -> Option<StreamError> {
        let places = self.bytes.windows(2).enumerate();
        let places = places.filter(|(_, pair)| *pair == [0, wire::QEMU_VM_VMDESCRIPTION]);
        let mut candidates = places.filter_map(|(eof, _)| self.candidate(eof));
        let whole = candidates.find(|candidate| self.read_with(*candidate).is_ok())?;
        let at = Place::after(self.offset(whole.end()), None);
        let len = (self.bytes.len() - whole.end()) as u64;
        Some(StreamError::TrailingBytes { at, len })
    }

    fn truncated(&self) -> StreamError {
        let header = SectionHeader::read(&mut self.cursor(1), |offset| Place::after(offset, None));
        let first = header.ok().map(|header| header.name());
        let (at, what) = (self.offset(self.bytes.len()), "the device state");
        let at = Place::after(at, first);
        StreamError::Truncated { at, what }
    }

    /// Walks all sections as the candidate describes them.
    fn read_with(&self, candidate: Candidate<'_>) -> Result<DeviceState, StreamError> {
        let offset = self.offset(candidate.eof + VMDESCRIPTION_HEADER_LEN);
        let bad = |source| StreamError::BadVmDescription {
            at: Place::after(offset, None),
            source,
        };
        let json = std::str::from_utf8(candidate.json);
        let json = json.map_err(|error| bad(serde::de::Error::custom(error)))?;
        let description: Description = serde_json::from_str(json).map_err(bad)?;
        let region = &self.bytes[..candidate.eof];
        let sections = device_walk::walk(&description, region, self.start, self.before.clone())?;
        Ok(DeviceState {
            run_state: self.run_state(&sections),
            sections,
            vmdescription: Some(VmDescription {
                offset,
                len: json.len() as u64,
                json: json.to_owned(),
            }),
        })
    }

    /// The sections as far as footers make them certain; `None` if the region does not end as one.
    fn read_without_description(&self) -> Option<DeviceState> {
        let ends = [&EOF[..], &EOF_AND_EMPTY_DESCRIPTION[..]];
        let ends = ends.into_iter().filter(|end| self.bytes.ends_with(end));
        let eofs = ends.map(|end| self.bytes.len() - end.len());
        let mut found =
            eofs.filter_map(|eof| footer_search::search(&self.bytes[..eof], self.start));
        let sections = found.next()?;
        Some(DeviceState {
            run_state: self.run_state(&sections),
            sections,
            vmdescription: None,
        })
    }

    /// What `globalstate` keeps: be32 length with the NUL, then the name of the run state.
    fn run_state(&self, sections: &[DeviceSection]) -> Option<String> {
        let section = sections.iter().find(|one| one.idstr == "globalstate")?;
        let position = usize::try_from(section.offset.0 - self.start.0).ok()?;
        let mut cursor = self.cursor(position);
        let len = cursor.be32().ok()?.checked_sub(1)?;
        let len = usize::try_from(len).ok().filter(|len| *len < 100)?;
        let name = std::str::from_utf8(cursor.take(len).ok()?).ok()?;
        let is_name = |byte: u8| byte.is_ascii_lowercase() || byte == b'-';
        name.bytes().all(is_name).then(|| name.to_owned())
    }
}

impl Candidate<'_> {
    /// Where its JSON ends in the region.
    fn end(&self) -> usize {
        self.eof + VMDESCRIPTION_HEADER_LEN + self.json.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_cut_off_in_front_of_what_ends_a_stream() {
        for end in [&b"\0"[..], b"\0\x06\0\0\0\0", b"\0\x06\0\0\0\x02{}"] {
            let region = [b"\x04 sections \x7e\0\0\0\x05", end].concat();
            let sections = sections_of(&region);
            assert_eq!(sections, Some(&region[..region.len() - end.len()]));
        }
        assert_eq!(sections_of(b"\x04 cut"), None);
    }

    #[test]
    fn a_million_forged_vmdescriptions_are_looked_at_once_each() {
        let mut bytes = Vec::new();
        while bytes.len() < 8 << 20 {
            bytes.extend_from_slice(b"\0\x06\0\x40\0\0{");
        }
        bytes.resize(bytes.len() + (4 << 20), b'{');
        let error = read(&bytes, StreamOffset(0x100), None).unwrap_err();
        assert!(matches!(error, StreamError::Truncated { .. }), "{error}");
    }
}
