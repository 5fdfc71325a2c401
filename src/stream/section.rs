//! The header and the footer that every section has.

use super::cursor::{Cursor, Stop};
use super::error::{Place, SectionName, StreamError};
use super::wire;
use crate::units::StreamOffset;

/// What follows the type byte of a START or FULL section; spec/qemu-stream.md §5.
///
/// be32 section number · str8 idstr · be32 instance · be32 version.
#[derive(Debug, Clone)]
pub(super) struct SectionHeader {
    pub(super) section_id: u32,
    pub(super) idstr: String,
    pub(super) instance_id: u32,
    pub(super) version_id: u32,
}

impl SectionHeader {
    /// Reads a header behind its type byte. `place` tells where an offset lies.
    pub(super) fn read(
        cursor: &mut Cursor<'_>,
        place: impl FnOnce(StreamOffset) -> Place,
    ) -> Result<Self, Stop> {
        let section_id = cursor.be32()?;
        let offset = cursor.offset();
        let idstr = cursor.str8()?.map_err(|found| StreamError::NotText {
            at: place(offset),
            what: "a section's idstr",
            found: String::from_utf8_lossy(found).into_owned(),
        })?;
        Ok(SectionHeader {
            section_id,
            instance_id: cursor.be32()?,
            version_id: cursor.be32()?,
            idstr: idstr.to_owned(),
        })
    }

    pub(super) fn name(&self) -> SectionName {
        SectionName {
            section_id: self.section_id,
            idstr: self.idstr.clone(),
        }
    }
}

/// Reads a footer: the byte 0x7e and the section's number once more; spec/qemu-stream.md §5.
///
/// # Errors
/// [`StreamError::MissingFooter`], [`StreamError::WrongFooter`].
pub(super) fn read_footer(
    cursor: &mut Cursor<'_>,
    section_id: u32,
    idstr: &str,
) -> Result<(), Stop> {
    let at = |offset| Place::inside(offset, section_id, idstr);
    let offset = cursor.offset();
    let found = cursor.u8()?;
    if found != wire::QEMU_VM_SECTION_FOOTER {
        let at = at(offset);
        return Err(StreamError::MissingFooter { at, found }.into());
    }
    let found = cursor.be32()?;
    if found != section_id {
        let (at, expected) = (at(offset), section_id);
        let error = StreamError::WrongFooter {
            at,
            expected,
            found,
        };
        return Err(error.into());
    }
    Ok(())
}
