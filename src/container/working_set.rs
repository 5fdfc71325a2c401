//! `WSET`: the chunks that a guest needed first, in the order of need.
//!
//! Source: spec/container.md §15.

use crate::bytes::ReadAt;
use crate::units::ChunkIndex;

use super::error::ContainerError;
use super::layout::{SectionType, u32_at, working_set};
use super::reader::Image;

/// Bytes of a section before its payload.
const HEADER_LEN: usize = 32;

/// The payload of the section. Chunks that no image can have, and repeated ones, are left out.
pub fn working_set_payload(chunks: &[ChunkIndex]) -> Vec<u8> {
    let mut known = std::collections::HashSet::new();
    let numbers = chunks
        .iter()
        .filter_map(|chunk| u32::try_from(chunk.0).ok());
    let numbers: Vec<u32> = numbers.filter(|number| known.insert(*number)).collect();
    let count = u32::try_from(numbers.len()).unwrap_or(u32::MAX);
    let mut payload = count.to_le_bytes().to_vec();
    payload.extend([0; 4]);
    payload.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    payload
}

impl<R: ReadAt> Image<R> {
    /// The chunks that the guest needed first; none if nobody recorded them.
    ///
    /// # Errors
    /// Whatever is wrong with the section.
    pub fn working_set(&self) -> Result<Vec<ChunkIndex>, ContainerError> {
        let section = SectionType::WorkingSet;
        let Some(entry) = self.live(section).next() else {
            return Ok(Vec::new());
        };
        let at = entry.offset;
        let limit = self.chunk_count().saturating_mul(4).saturating_add(8);
        let payload = self.section_payload(entry, limit)?;
        let found = payload.len() as u64;
        let count_at = working_set::WORKING_SET_COUNT;
        let Some(count) = payload.get(..8).map(|fixed| {
            u32_at(
                fixed,
                count_at.start - HEADER_LEN..count_at.end - HEADER_LEN,
            )
        }) else {
            let expected = 8;
            return Err(ContainerError::LengthMismatch {
                section,
                at,
                expected,
                found,
            });
        };
        let expected = 8 + 4 * u64::from(count);
        if expected != found {
            return Err(ContainerError::LengthMismatch {
                section,
                at,
                expected,
                found,
            });
        }
        if payload[4..8] != [0; 4] {
            return Err(ContainerError::NotZero { section, at });
        }
        let (numbers, _) = payload[8..].as_chunks::<4>();
        let chunks = numbers.iter().map(|number| u32::from_le_bytes(*number));
        let chunks: Vec<ChunkIndex> = chunks.map(|number| ChunkIndex(number.into())).collect();
        let mut known = std::collections::HashSet::new();
        let is_wrong =
            |chunk: &&ChunkIndex| chunk.0 >= self.chunk_count() || !known.insert(chunk.0);
        match chunks.iter().find(is_wrong) {
            None => Ok(chunks),
            Some(chunk) => Err(ContainerError::WrongField {
                section,
                field: "chunk index",
                at,
                found: chunk.0,
            }),
        }
    }
}
