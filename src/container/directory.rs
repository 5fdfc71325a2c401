//! `DIR `: where every section of every generation lies, and its digest.
//!
//! Source: spec/container.md §8.

use crate::digest::{Digest, Hasher};
use crate::units::FileOffset;

use super::error::ContainerError;
use super::footer::Footer;
use super::layout::{
    DIRECTORY_ENTRY_LEN, Layout, MAX_DIRECTORY_ENTRIES, SectionType, array, directory_entry, put,
    u32_at, u64_at,
};

/// One section of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// What it holds.
    pub section: SectionType,
    /// The generation that wrote it.
    pub generation: u32,
    /// Where it lies.
    pub offset: FileOffset,
    /// Bytes of the whole section.
    pub length: u64,
    /// Of all its bytes.
    pub sha256: Digest,
    /// Whether no later generation replaced it.
    pub is_live: bool,
}

impl DirectoryEntry {
    fn parse(bytes: &[u8; DIRECTORY_ENTRY_LEN], at: FileOffset) -> Result<Self, ContainerError> {
        let section = SectionType::Directory;
        let state = u32_at(bytes, directory_entry::STATE);
        if state > 1 {
            return Err(ContainerError::WrongField {
                section,
                field: "STATE",
                at,
                found: state.into(),
            });
        }
        if bytes[60..64] != [0; 4] {
            return Err(ContainerError::NotZero { section, at });
        }
        Ok(DirectoryEntry {
            section: SectionType::from_code(array(bytes, directory_entry::TYPE)),
            generation: u32_at(bytes, directory_entry::GENERATION),
            offset: FileOffset(u64_at(bytes, directory_entry::OFFSET)),
            length: u64_at(bytes, directory_entry::LENGTH),
            sha256: Digest(array(bytes, directory_entry::SHA256)),
            is_live: state == 1,
        })
    }

    fn write(&self) -> [u8; DIRECTORY_ENTRY_LEN] {
        let mut bytes = [0; DIRECTORY_ENTRY_LEN];
        put(&mut bytes, directory_entry::TYPE, &self.section.code());
        put(
            &mut bytes,
            directory_entry::GENERATION,
            &self.generation.to_le_bytes(),
        );
        put(
            &mut bytes,
            directory_entry::OFFSET,
            &self.offset.0.to_le_bytes(),
        );
        put(
            &mut bytes,
            directory_entry::LENGTH,
            &self.length.to_le_bytes(),
        );
        put(&mut bytes, directory_entry::SHA256, &self.sha256.0);
        put(
            &mut bytes,
            directory_entry::STATE,
            &u32::from(self.is_live).to_le_bytes(),
        );
        bytes
    }

    /// Where it ends; `None` if that is no file offset.
    pub(super) fn end(&self) -> Option<u64> {
        self.offset.0.checked_add(self.length)
    }
}

/// Parses the payload of the directory at `at`; the order of its entries is not judged yet.
pub(super) fn parse_entries(
    payload: &[u8],
    at: FileOffset,
) -> Result<Vec<DirectoryEntry>, ContainerError> {
    let section = SectionType::Directory;
    let found = payload.len() as u64;
    let Some((fixed, entries)) = payload.split_first_chunk::<8>() else {
        return Err(ContainerError::LengthMismatch {
            section,
            at,
            expected: 8,
            found,
        });
    };
    let (count, entry_len) = (u32_at(fixed, 0..4), u32_at(fixed, 4..8));
    if entry_len as usize != DIRECTORY_ENTRY_LEN {
        return Err(ContainerError::WrongField {
            section,
            field: "ENTRY_LEN",
            at,
            found: entry_len.into(),
        });
    }
    let expected = u64::from(count) * DIRECTORY_ENTRY_LEN as u64 + 8;
    if expected != found || count > MAX_DIRECTORY_ENTRIES {
        return Err(ContainerError::WrongField {
            section,
            field: "ENTRY_COUNT",
            at,
            found: count.into(),
        });
    }
    let (entries, _) = entries.as_chunks::<DIRECTORY_ENTRY_LEN>();
    entries
        .iter()
        .map(|entry| DirectoryEntry::parse(entry, at))
        .collect()
}

/// The payload of a `DIR ` section.
pub(super) fn directory_payload(entries: &[DirectoryEntry]) -> Result<Vec<u8>, ContainerError> {
    let count = u32::try_from(entries.len()).ok();
    let count = count
        .filter(|count| *count <= MAX_DIRECTORY_ENTRIES)
        .ok_or(ContainerError::Full)?;
    let mut payload = count.to_le_bytes().to_vec();
    let entry_len = u32::try_from(DIRECTORY_ENTRY_LEN).map_err(|_| ContainerError::Full)?;
    payload.extend_from_slice(&entry_len.to_le_bytes());
    payload.extend(entries.iter().flat_map(DirectoryEntry::write));
    Ok(payload)
}

/// Holds the directory of `footer` against the rules: back to back, in order, allowed counts, generations.
pub(super) fn check_entries(
    entries: &[DirectoryEntry],
    footer: &Footer,
) -> Result<(), ContainerError> {
    check_tiling(entries, footer)?;
    check_counts(entries, footer)?;
    check_generations(entries, footer)
}

/// Every byte before the directory is payload or in exactly one section.
fn check_tiling(entries: &[DirectoryEntry], footer: &Footer) -> Result<(), ContainerError> {
    let mut sections = entries.iter();
    let mut end = 0;
    if footer.layout == Layout::Zstd {
        let head = sections
            .next()
            .filter(|first| first.section == SectionType::Head);
        let head = head.ok_or(ContainerError::WrongCount {
            section: SectionType::Head,
            count: 0,
        })?;
        end = follows(head, 0)?;
    }
    let (at, found) = (footer.self_offset, footer.payload_offset.0);
    let wrong = |field, found| ContainerError::WrongField {
        section: SectionType::Footer,
        field,
        at,
        found,
    };
    if found != end {
        return Err(wrong("PAYLOAD_OFFSET", found));
    }
    end = footer
        .payload_end()
        .ok_or_else(|| wrong("PAYLOAD_LEN", footer.payload_len))?;
    for section in sections {
        end = follows(section, end)?;
    }
    if end != footer.directory_offset.0 {
        return Err(wrong("DIRECTORY_OFFSET", footer.directory_offset.0));
    }
    Ok(())
}

/// Refuses a section that does not begin at `end`; gives where it ends itself.
fn follows(entry: &DirectoryEntry, end: u64) -> Result<u64, ContainerError> {
    let (section, at) = (entry.section, entry.offset);
    if at.0 < end {
        return Err(ContainerError::Overlap { section, at });
    }
    if at.0 > end {
        return Err(ContainerError::Gap {
            section,
            at: FileOffset(end),
            len: at.0 - end,
        });
    }
    let too_long = ContainerError::WrongField {
        section,
        field: "LENGTH",
        at,
        found: entry.length,
    };
    entry
        .end()
        .filter(|_| entry.length >= super::section::OVERHEAD)
        .ok_or(too_long)
}

fn check_counts(entries: &[DirectoryEntry], footer: &Footer) -> Result<(), ContainerError> {
    let layout = footer.layout;
    for section in SectionType::KNOWN {
        let count = entries
            .iter()
            .filter(|entry| entry.section == section && entry.is_live)
            .count();
        let allowed = section.allowed_live(layout, footer.is_delta());
        if !allowed.contains(&count) {
            return Err(ContainerError::WrongCount { section, count });
        }
    }
    // These are never superseded either.
    for (section, most) in [
        (SectionType::Head, usize::from(layout == Layout::Zstd)),
        (SectionType::Twins, usize::from(footer.is_delta())),
        (SectionType::Data, 0),
    ] {
        let count = entries
            .iter()
            .filter(|entry| entry.section == section)
            .count();
        if count > most {
            return Err(ContainerError::WrongCount { section, count });
        }
    }
    Ok(())
}

/// Each generation but the last ends in its own `DIR ` and `FOOT`; only `DIR ` and `FOOT` end one.
fn check_generations(entries: &[DirectoryEntry], footer: &Footer) -> Result<(), ContainerError> {
    let mut generation = 1;
    let mut previous: Option<&DirectoryEntry> = None;
    let mut previous_footer = FileOffset(0);
    for entry in entries {
        let wrong = ContainerError::Generations {
            section: entry.section,
            at: entry.offset,
        };
        let behind_directory =
            previous.is_some_and(|previous| previous.section == SectionType::Directory);
        let is_footer = entry.section == SectionType::Footer;
        let is_chunk_table = matches!(entry.section, SectionType::ChunkTable | SectionType::Twins);
        if entry.generation != generation
            || is_footer != behind_directory
            || (is_chunk_table && generation > 1)
        {
            return Err(wrong);
        }
        if is_footer {
            generation = generation.checked_add(1).ok_or(wrong)?;
            previous_footer = entry.offset;
        }
        previous = Some(entry);
    }
    let ends_in_directory =
        previous.is_some_and(|previous| previous.section == SectionType::Directory);
    if generation != footer.generation
        || previous_footer != footer.previous_footer_offset
        || ends_in_directory
    {
        return Err(ContainerError::Generations {
            section: SectionType::Footer,
            at: footer.self_offset,
        });
    }
    Ok(())
}

/// What a signature speaks of: the live entries, without `SIGN`, `DIR ` and `FOOT`; spec §11.
pub(super) fn live_digest(entries: &[DirectoryEntry]) -> Digest {
    let mut hasher = Hasher::new();
    let signed = entries
        .iter()
        .filter(|entry| entry.is_live && entry.section != SectionType::Signature);
    for entry in signed {
        hasher.update(&entry.write());
    }
    hasher.finish()
}
