//! Questions and replies: bytes ⇄ values.
//!
//! Source: spec/transfer.md §8.

use super::PIECE_LEN_U32;
use crate::units::ChunkIndex;

/// The most chunks of one question.
pub const MAX_ASKED: usize = 64;

/// The most raw bytes of the chunks of one question.
pub const MAX_RAW_LEN: usize = 16 << 20;

/// The most bytes that a reply adds.
pub const MAX_REST_LEN: usize = 960 << 10;

/// A chunk's number, the hash around its pieces, and how many runs of pieces follow.
const CHUNK_LEN: usize = 12;

/// Pieces at equal distances: first one u32, count u16, distance u16.
const RUN_LEN: usize = 8;

/// What is asked of one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Which.
    pub chunk: ChunkIndex,
    /// The short hash of all bytes around the pieces.
    pub around: u16,
    /// Where each piece begins in the raw bytes: in order, without overlap.
    pub pieces: Vec<u32>,
    /// The short hash of each piece.
    pub hashes: Vec<u16>,
}

/// Several chunks of which the receiver has a guess.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question(pub Vec<Asked>);

/// Pieces at equal distances.
struct Run {
    first: u32,
    count: u16,
    distance: u16,
}

/// The pieces as runs.
fn runs(pieces: &[u32]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut last = 0;
    for &piece in pieces {
        let distance = u16::try_from(piece - last).ok();
        match (runs.last_mut(), distance) {
            (Some(run), Some(distance))
                if run.count < u16::MAX && (run.count == 1 || run.distance == distance) =>
            {
                run.distance = distance;
                run.count += 1;
            }
            _ => runs.push(Run {
                first: piece,
                count: 1,
                distance: 0,
            }),
        }
        last = piece;
    }
    runs
}

impl Asked {
    /// Adds the bytes that stand for it.
    pub fn write(&self, bytes: &mut Vec<u8>) {
        let runs = runs(&self.pieces);
        bytes.extend_from_slice(&self.chunk.0.to_le_bytes());
        bytes.extend_from_slice(&self.around.to_le_bytes());
        let count = u16::try_from(runs.len()).unwrap_or(u16::MAX);
        bytes.extend_from_slice(&count.to_le_bytes());
        for run in &runs {
            bytes.extend_from_slice(&run.first.to_le_bytes());
            bytes.extend_from_slice(&run.count.to_le_bytes());
            bytes.extend_from_slice(&run.distance.to_le_bytes());
        }
        for hash in &self.hashes {
            bytes.extend_from_slice(&hash.to_le_bytes());
        }
    }

    /// Takes one from the beginning of `bytes`; `None` if there is none.
    fn parse(bytes: &mut &[u8]) -> Option<Self> {
        let head = take(bytes, CHUNK_LEN)?;
        let chunk = u64::from_le_bytes(head[..8].try_into().ok()?);
        let around = u16::from_le_bytes([head[8], head[9]]);
        let run_count = usize::from(u16::from_le_bytes([head[10], head[11]]));
        let runs = take(bytes, run_count * RUN_LEN)?;
        let mut pieces: Vec<u32> = Vec::new();
        for run in runs.chunks_exact(RUN_LEN) {
            let first = u32::from_le_bytes(run[..4].try_into().ok()?);
            let count = u16::from_le_bytes([run[4], run[5]]);
            let distance = u16::from_le_bytes([run[6], run[7]]);
            // Each piece has a hash behind the runs: more are not believed.
            if count == 0 || (pieces.len() + usize::from(count)) * 2 > bytes.len() {
                return None;
            }
            for index in 0..u32::from(count) {
                let piece = first.checked_add(index.checked_mul(u32::from(distance))?)?;
                let end = pieces
                    .last()
                    .map_or(Some(0), |last| last.checked_add(PIECE_LEN_U32))?;
                if piece < end {
                    return None;
                }
                pieces.push(piece);
            }
        }
        let hashes = take(bytes, pieces.len() * 2)?;
        let hashes = hashes.chunks_exact(2);
        Some(Asked {
            chunk: ChunkIndex(chunk),
            around,
            hashes: hashes
                .map(|it| u16::from_le_bytes([it[0], it[1]]))
                .collect(),
            pieces,
        })
    }
}

impl Question {
    /// The bytes that stand for it.
    pub fn write(asked: &[Asked]) -> Vec<u8> {
        let mut bytes = Vec::new();
        asked.iter().for_each(|it| it.write(&mut bytes));
        bytes
    }

    /// `None` if `bytes` are no question.
    pub fn parse(mut bytes: &[u8]) -> Option<Self> {
        let mut asked = Vec::new();
        while !bytes.is_empty() {
            if asked.len() == MAX_ASKED {
                return None;
            }
            asked.push(Asked::parse(&mut bytes)?);
        }
        (!asked.is_empty()).then_some(Question(asked))
    }
}

/// What is answered of one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// One bit for the bytes around the pieces, then one for each piece: set where the guess is wrong.
    Wrong(Vec<u8>),
    /// The guess is worth nothing.
    Whole,
    /// There was no room: to be asked again.
    Later,
}

impl State {
    /// Whether bit `index` is set.
    pub fn is_wrong(bits: &[u8], index: usize) -> bool {
        bits.get(index / 8)
            .is_some_and(|byte| byte >> (index % 8) & 1 == 1)
    }
}

/// What is answered: of each chunk its state, then a zstd frame of all bytes that are wrong, if there are any.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply<'b> {
    /// In the order of the question.
    pub states: Vec<State>,
    /// The frame, or nothing.
    pub frame: &'b [u8],
}

impl<'b> Reply<'b> {
    /// The bytes before the frame.
    pub fn write_states(states: &[State]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for state in states {
            match state {
                State::Wrong(bits) => {
                    bytes.push(0);
                    bytes.extend_from_slice(bits);
                }
                State::Whole => bytes.push(1),
                State::Later => bytes.push(2),
            }
        }
        bytes
    }

    /// The reply to a question about chunks with so many pieces each; `None` if `bytes` are none.
    pub fn parse(mut bytes: &'b [u8], piece_counts: &[usize]) -> Option<Self> {
        let mut states = Vec::with_capacity(piece_counts.len());
        for count in piece_counts {
            let state = match take(&mut bytes, 1)?[0] {
                0 => State::Wrong(take(&mut bytes, (count + 1).div_ceil(8))?.to_vec()),
                1 => State::Whole,
                2 => State::Later,
                _ => return None,
            };
            states.push(state);
        }
        Some(Reply {
            states,
            frame: bytes,
        })
    }
}

/// The first `len` bytes, which are taken off.
fn take<'b>(bytes: &mut &'b [u8], len: usize) -> Option<&'b [u8]> {
    let (taken, rest) = bytes.split_at_checked(len)?;
    *bytes = rest;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn asked(chunk: u64, gaps: &[u32]) -> Asked {
        let mut at = 0;
        let pieces: Vec<u32> = gaps
            .iter()
            .map(|gap| {
                let piece = at + gap;
                at = piece + PIECE_LEN_U32;
                piece
            })
            .collect();
        Asked {
            chunk: ChunkIndex(chunk),
            around: 7,
            hashes: pieces.iter().map(|piece| (piece % 65_521) as u16).collect(),
            pieces,
        }
    }

    proptest! {
        #[test]
        fn a_question_is_read_as_it_was_written(
            chunks in proptest::collection::vec(
                proptest::collection::vec(prop_oneof![Just(8u32), 0..100_000u32], 0..40), 1..5),
        ) {
            let question: Vec<Asked> = (0..).zip(&chunks).map(|(at, gaps)| asked(at, gaps)).collect();
            let parsed = Question::parse(&Question::write(&question));
            prop_assert_eq!(parsed, Some(Question(question)));
        }

        #[test]
        fn any_bytes_are_a_question_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(question) = Question::parse(&bytes) {
                let pieces: usize = question.0.iter().map(|it| it.pieces.len()).sum();
                prop_assert!(pieces * 2 <= bytes.len());
            }
            let _ = Reply::parse(&bytes, &[3, 0, 100]);
        }
    }

    #[test]
    fn pages_at_equal_distances_take_two_bytes_each() {
        let question = [asked(0, &[8; 128])];
        assert_eq!(Question::write(&question).len(), 12 + 8 + 2 * 128);
    }

    #[test]
    fn pieces_that_overlap_are_refused() {
        let mut question = asked(0, &[8, 8]);
        question.pieces[1] = question.pieces[0] + 4095;
        assert_eq!(Question::parse(&Question::write(&[question])), None);
    }
}
