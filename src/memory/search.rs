//! Every place in a guest's memory where a pattern is found.

use serde::Serialize;

use super::{MemoryView, Pattern, len_of};
use crate::bytes::ReadAt;
use crate::config::guest_physical::PhysicalMap;
use crate::error::Result;
use crate::pipeline::{self, MARGIN, PipelineError, Scan, Seen};
use crate::progress::Progress;

/// Bytes of a match that are given along.
const SHOWN_LEN: usize = 256;

/// What is searched for, and where.
#[derive(Debug, Clone)]
pub struct SearchRequest<'a> {
    /// What.
    pub pattern: &'a Pattern,
    /// In which block; in all of them without.
    pub block: Option<&'a str>,
    /// Bytes around a match that are given along, at most a page on each side.
    pub context: usize,
    /// Workers.
    pub threads: usize,
}

/// A place in a guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Its guest-physical address; `None` if no rule tells one.
    pub address: Option<u64>,
    /// The RAMBlock.
    pub block: String,
    /// Where in the block.
    pub offset: u64,
}

impl Place {
    pub(super) fn of(physical: &PhysicalMap, block: (usize, &str), offset: u64) -> Self {
        Place {
            address: physical.address_of(block.0, offset),
            block: block.1.to_owned(),
            offset,
        }
    }
}

/// A place where the pattern was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    /// Where it begins.
    pub place: Place,
    /// Its length.
    pub len: u64,
    /// Its first 256 bytes.
    pub bytes: Vec<u8>,
    /// The bytes before it.
    pub before: Vec<u8>,
    /// The bytes behind it.
    pub after: Vec<u8>,
}

/// What was searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Searched {
    /// Bytes of guest memory, zero pages included.
    pub bytes: u64,
    /// Those of zero pages that were not looked at, for the pattern cannot be in them.
    pub zero_bytes: u64,
    /// Places where it was found.
    pub matches: u64,
}

/// Gives every match to `found`, block by block in ascending order, until that says `false`. Matches do not overlap. One may
/// lie across any boundary; what of it lies more than a page behind one of 16 MiB is cut off.
///
/// # Errors
/// A block that does not exist; the first damaged chunk; that the user asked to stop; what `found` says.
pub fn search<R: ReadAt>(
    view: &MemoryView<'_, R>,
    request: &SearchRequest<'_>,
    progress: &dyn Progress,
    found: &mut dyn FnMut(&Match) -> Result<bool>,
) -> Result<Searched> {
    let memory = view.memory();
    let blocks = view.chosen(request.block)?;
    let wants_zeros = request.pattern.matches_zeros();
    let mut searched = extent(view, &blocks, wants_zeros);
    let scan = Scan {
        blocks,
        wants_zeros,
        threads: request.threads,
    };
    let context = request.context.min(usize::try_from(MARGIN).unwrap_or(0));
    let look = |seen: &Seen<'_>| matches_in(seen, request.pattern, context);
    // Where the last match ended: one that begins before is the rest of it.
    let mut last_end = (usize::MAX, 0);
    let mut failed = None;
    progress.begin("searching", Some(searched.bytes));
    let done = pipeline::scan(memory, &scan, progress, &look, &mut |matches| {
        for raw in matches {
            let (block, offset) = (raw.block, raw.offset);
            if last_end.0 == block && offset < last_end.1 {
                continue;
            }
            last_end = (block, offset + raw.len);
            let name = memory.blocks()[block].idstr.as_str();
            searched.matches += 1;
            let one = Match {
                place: Place::of(&view.space().physical, (block, name), offset),
                len: raw.len,
                bytes: raw.bytes,
                before: raw.before,
                after: raw.after,
            };
            match found(&one) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(error) => {
                    failed = Some(error);
                    return Ok(false);
                }
            }
        }
        Ok::<bool, PipelineError>(true)
    });
    progress.end();
    done?;
    failed.map_or(Ok(searched), Err)
}

/// How much there is to search.
fn extent<R: ReadAt>(view: &MemoryView<'_, R>, blocks: &[usize], wants_zeros: bool) -> Searched {
    let memory = view.memory();
    let bytes = len_of(memory, blocks);
    let data = blocks
        .iter()
        .map(|block| memory.page_map().data_page_count(*block));
    let data: u64 = data
        .sum::<u64>()
        .saturating_mul(crate::units::PAGE_LEN as u64);
    Searched {
        bytes,
        zero_bytes: match wants_zeros {
            true => 0,
            false => bytes.saturating_sub(data),
        },
        matches: 0,
    }
}

/// A match as a worker finds it.
struct Raw {
    block: usize,
    offset: u64,
    len: u64,
    bytes: Vec<u8>,
    before: Vec<u8>,
    after: Vec<u8>,
}

fn matches_in(seen: &Seen<'_>, pattern: &Pattern, context: usize) -> Vec<Raw> {
    let mut matches = Vec::new();
    let mut at = seen.own.start;
    while let Some((start, end)) = pattern.find_at(seen.bytes, at) {
        if start >= seen.own.end {
            break;
        }
        let behind = end.saturating_add(context).min(seen.bytes.len());
        matches.push(Raw {
            block: seen.block,
            offset: seen.offset + start as u64,
            len: (end - start) as u64,
            bytes: seen.bytes[start..end.min(start + SHOWN_LEN)].to_vec(),
            before: seen.bytes[start.saturating_sub(context)..start].to_vec(),
            after: seen.bytes[end..behind].to_vec(),
        });
        at = end;
    }
    matches
}
