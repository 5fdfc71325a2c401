//! What a guest's memory consists of: zero pages, pages of one byte, pages that are there twice, and how random the rest is.

use serde::Serialize;

use super::{MemoryView, len_of};
use crate::bytes::ReadAt;
use crate::digest::Digest;
use crate::error::Result;
use crate::pipeline::{self, PipelineError, Scan, Seen};
use crate::progress::Progress;
use crate::units::PAGE_LEN;

/// Steps of the entropy histogram: from 0 to 8 bits a byte.
pub const STEPS: usize = 8;

/// Pages that are hashed side by side.
const SIDE_BY_SIDE: usize = 4;

/// A RAMBlock in numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct BlockStats {
    /// Its name.
    pub block: String,
    /// Pages.
    pub pages: u64,
    /// Those that are zero.
    pub zero: u64,
    /// Those that consist of one other byte.
    pub same_byte: u64,
    /// Those whose bytes another page, here or in an earlier block, has too: without any of them nothing would be lost.
    pub duplicate: u64,
    /// Pages by their entropy: those of less than one bit a byte, of less than two, …; zero pages are not counted.
    pub entropy: [u64; STEPS],
}

/// All of a guest's memory in numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Block by block.
    pub blocks: Vec<BlockStats>,
    /// All of them together.
    pub total: BlockStats,
}

/// Counts.
///
/// Keeps 16 bytes for each page that is not zero.
///
/// # Errors
/// A block that does not exist; the first damaged chunk; that the user asked to stop.
pub fn stats<R: ReadAt>(
    view: &MemoryView<'_, R>,
    block: Option<&str>,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Stats> {
    let memory = view.memory();
    let chosen = view.chosen(block)?;
    let mut blocks: Vec<BlockStats> = chosen
        .iter()
        .map(|index| BlockStats {
            block: memory.blocks()[*index].idstr.clone(),
            pages: memory.blocks()[*index].page_count(),
            ..BlockStats::default()
        })
        .collect();
    progress.begin("counting", Some(len_of(memory, &chosen)));
    let scan = Scan {
        blocks: chosen.clone(),
        wants_zeros: false,
        threads,
    };
    let logarithms = Logarithms::new();
    let mut hashes: Vec<(u128, u32)> = Vec::new();
    let look = |seen: &Seen<'_>| count(seen, &logarithms);
    let done = pipeline::scan(memory, &scan, progress, &look, &mut |counted| {
        let Some(number) = chosen.iter().position(|index| *index == counted.block) else {
            return Ok(true);
        };
        let into = &mut blocks[number];
        into.same_byte += counted.same_byte;
        for (sum, more) in into.entropy.iter_mut().zip(counted.entropy) {
            *sum += more;
        }
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        hashes.extend(counted.hashes.into_iter().map(|hash| (hash, number)));
        Ok::<bool, PipelineError>(true)
    });
    progress.end();
    done?;
    hashes.sort_unstable();
    for pair in hashes.windows(2) {
        if pair[0].0 == pair[1].0 {
            blocks[pair[1].1 as usize].duplicate += 1;
        }
    }
    let mut total = BlockStats::default();
    for block in &mut blocks {
        block.zero = block.pages - block.entropy.iter().sum::<u64>();
        total.add(block);
    }
    Ok(Stats { blocks, total })
}

impl BlockStats {
    fn add(&mut self, other: &BlockStats) {
        self.pages += other.pages;
        self.zero += other.zero;
        self.same_byte += other.same_byte;
        self.duplicate += other.duplicate;
        for (sum, more) in self.entropy.iter_mut().zip(other.entropy) {
            *sum += more;
        }
    }
}

/// What a worker counts.
#[derive(Default)]
struct Counted {
    block: usize,
    same_byte: u64,
    entropy: [u64; STEPS],
    hashes: Vec<u128>,
}

fn count(seen: &Seen<'_>, logarithms: &Logarithms) -> Counted {
    let mut counted = Counted {
        block: seen.block,
        ..Counted::default()
    };
    let is_zero = |page: &&[u8]| page.iter().all(|byte| *byte == 0);
    let pages = seen.bytes[seen.own.clone()].chunks(PAGE_LEN);
    let pages: Vec<&[u8]> = pages.filter(|page| !is_zero(page)).collect();
    for page in &pages {
        let bits = logarithms.entropy(page);
        if page.iter().all(|byte| *byte == page[0]) {
            counted.same_byte += 1;
        }
        counted.entropy[step(bits)] += 1;
    }
    for group in pages.chunks(SIDE_BY_SIDE) {
        let digests = Digest::of_each(group).into_iter();
        counted.hashes.extend(digests.map(|digest| {
            let (half, _) = digest.0.split_at(16);
            half.iter()
                .fold(0, |hash, byte| hash << 8 | u128::from(*byte))
        }));
    }
    counted
}

fn step(bits: f64) -> usize {
    let whole = (1..STEPS).filter(|step| bits >= f64::from(u8::try_from(*step).unwrap_or(0)));
    whole.count()
}

/// n × log2(n) for all n that a page can hold of one byte.
struct Logarithms(Vec<f64>);

impl Logarithms {
    fn new() -> Self {
        let count = u16::try_from(PAGE_LEN).unwrap_or(0);
        let value = |n: u16| match n {
            0 => 0.0,
            _ => f64::from(n) * f64::from(n).log2(),
        };
        Logarithms((0..=count).map(value).collect())
    }

    /// Bits a byte: what a perfect coder that knows how often each byte comes would need.
    fn entropy(&self, page: &[u8]) -> f64 {
        let mut counts = [[0u16; 256]; 4];
        let (fours, rest) = page.as_chunks::<4>();
        for four in fours {
            // Four tables, so that equal neighbours do not wait for each other.
            for (table, byte) in counts.iter_mut().zip(four) {
                table[usize::from(*byte)] += 1;
            }
        }
        for byte in rest {
            counts[0][usize::from(*byte)] += 1;
        }
        let count =
            |byte: usize| -> usize { counts.iter().map(|table| usize::from(table[byte])).sum() };
        let sum: f64 = (0..256).map(|byte| self.0[count(byte)]).sum();
        let len = f64::from(u32::try_from(page.len()).unwrap_or(1).max(1));
        (len.log2() - sum / len).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_that_of_the_bytes() {
        let logarithms = Logarithms::new();
        let entropy = |page: &[u8]| logarithms.entropy(page);
        assert!(entropy(&[7; PAGE_LEN]) < 1e-9);
        let two: Vec<u8> = (0..PAGE_LEN).map(|at| u8::from(at % 2 == 0)).collect();
        assert!((entropy(&two) - 1.0).abs() < 1e-9);
        let all: Vec<u8> = (0..=255).cycle().take(PAGE_LEN).collect();
        assert!((entropy(&all) - 8.0).abs() < 1e-9);
        assert_eq!([0.0, 0.99, 1.0, 7.5, 8.0].map(step), [0, 0, 1, 7, 7]);
    }

    #[test]
    fn zero_pages_between_others_are_not_counted_as_data() {
        let mut bytes = vec![0; 4 * PAGE_LEN];
        bytes[PAGE_LEN..2 * PAGE_LEN].fill(1);
        bytes[3 * PAGE_LEN] = 9;
        let seen = Seen {
            block: 3,
            offset: 0,
            bytes: &bytes,
            own: PAGE_LEN..4 * PAGE_LEN,
        };
        let counted = count(&seen, &Logarithms::new());
        assert_eq!(counted.same_byte, 1);
        assert_eq!(counted.entropy, [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(counted.hashes.len(), 2);
    }
}
