//! Compression: one chunk in, one zstd frame out, and back.
//!
//! Contexts are kept and used again; a frame depends on its input and the level alone, never on what came before.
//!
//! # The default level
//!
//! Chunks are compressed one by one. zstd's own parameters were measured on chunks of 256 KiB of guest memory
//! against others, on one core of an EPYC of 2024: CPU seconds, and bytes as a multiple of what `zstd -3` makes of the
//! whole stream. *Files*: 931 MB of a q35 guest's memory, mostly files below /usr. *Linux*: 113 MB of a booted guest.
//!
//! | parameters | files | | Linux | |
//! |---|---|---|---|---|
//! | level -5 | 1.15 s | 1.399 | 0.081 s | 1.292 |
//! | level -1 | 1.43 s | 1.213 | 0.093 s | 1.123 |
//! | level 1 | 1.74 s | 1.102 | 0.127 s | 1.031 |
//! | level 1, minMatch 5, hashLog 14 | 1.93 s | 1.073 | 0.141 s | 1.018 |
//! | **dfast, minMatch 5, hashLog 15, chainLog 14** | 2.06 s | **1.053** | 0.151 s | **1.013** |
//! | dfast, minMatch 4, hashLog 15, chainLog 14 | 2.23 s | 1.044 | 0.176 s | 1.006 |
//! | zstd's level 2 | 2.23 s | 1.072 | 0.150 s | 1.021 |
//! | level 3 | 2.26 s | 1.044 | 0.171 s | 1.009 |
//!
//! The bold line is both smaller and not slower than zstd's level 2, so it stands in its place here and is the default.
//! `ZSTD_c_targetCBlockSize` and larger tables (hashLog 16, 17) cost more than they give; smaller ones (12, 13) lose more
//! than they save: the tables fit into the second-level cache all the same.
//!
//! Chunks that do not compress need no way of their own: zstd gives up on them at 12 GB/s (21 µs for 256 KiB of noise, a
//! sixth of what their digest costs) and stores them as raw blocks of a frame, 15 bytes longer.
//!
//! Frames carry no checksum of zstd's, since the container has its own, and state their content size.

use zstd::bulk;
use zstd_safe::{CParameter, Strategy};

/// What a frame of an image can have wrong.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    /// zstd could not make a frame.
    #[error("zstd could not compress: {reason}")]
    Compress {
        /// zstd's own words.
        reason: String,
    },
    /// zstd could not read the frame.
    #[error("zstd could not decompress: {reason}")]
    Decompress {
        /// zstd's own words.
        reason: String,
    },
    /// The frame does not say that it decodes to as many bytes as expected.
    #[error("the zstd frame does not decode to {expected} bytes")]
    ContentLen {
        /// The bytes expected.
        expected: usize,
    },
    /// Something follows the frame where it has to stand alone.
    #[error("the zstd frame ends after {frame_len} of {stored_len} bytes")]
    NotOneFrame {
        /// Bytes of the first frame.
        frame_len: usize,
        /// Bytes in which it stands.
        stored_len: usize,
    },
}

/// The level used where none is asked for.
pub const DEFAULT_LEVEL: i32 = 2;

/// What stands in place of zstd's level 2; measured in this module's documentation.
const LEVEL_2: [CParameter; 4] = [
    CParameter::Strategy(Strategy::ZSTD_dfast),
    CParameter::MinMatch(5),
    CParameter::HashLog(15),
    CParameter::ChainLog(14),
];

/// The levels zstd knows, fastest first.
pub fn levels() -> std::ops::RangeInclusive<i32> {
    -50..=19
}

/// Makes zstd frames.
pub struct Compressor(bulk::Compressor<'static>);

impl Compressor {
    /// A compressor for one of the [`levels`].
    ///
    /// # Errors
    /// [`CodecError::Compress`] if zstd cannot make a context.
    pub fn new(level: i32) -> Result<Self, CodecError> {
        let mut compressor = bulk::Compressor::new(level).map_err(compress_error)?;
        if level == 2 {
            let mut set = LEVEL_2.into_iter();
            set.try_for_each(|parameter| compressor.set_parameter(parameter))
                .map_err(compress_error)?;
        }
        Ok(Compressor(compressor))
    }

    /// Replaces `frame` by the one frame that holds `raw`; the frame states its content size and carries no checksum.
    ///
    /// # Errors
    /// [`CodecError::Compress`] if memory is short.
    pub fn compress(&mut self, raw: &[u8], frame: &mut Vec<u8>) -> Result<(), CodecError> {
        frame.clear();
        frame.reserve(zstd_safe::compress_bound(raw.len()));
        self.0
            .compress_to_buffer(raw, frame)
            .map_err(compress_error)?;
        Ok(())
    }
}

fn compress_error(error: std::io::Error) -> CodecError {
    CodecError::Compress {
        reason: error.to_string(),
    }
}

/// Reads zstd frames.
pub struct Decompressor(bulk::Decompressor<'static>);

impl Decompressor {
    /// A decompressor that has seen nothing.
    ///
    /// # Errors
    /// [`CodecError::Decompress`] if zstd cannot make a context.
    pub fn new() -> Result<Self, CodecError> {
        bulk::Decompressor::new()
            .map(Decompressor)
            .map_err(decompress_error)
    }

    /// Replaces `raw` by what the one frame in `stored` holds: exactly `raw_len` bytes, never more in memory.
    ///
    /// # Errors
    /// All but [`CodecError::Compress`]: `stored` has to be one frame, to its last byte, of the stated content size.
    pub fn decompress(
        &mut self,
        stored: &[u8],
        raw_len: usize,
        raw: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        check_frame(stored, raw_len)?;
        raw.clear();
        raw.reserve(raw_len);
        let len = self.0.decompress_to_buffer(stored, raw);
        check_len(len, raw_len)
    }

    /// As [`Decompressor::decompress`], into a buffer of exactly the expected length.
    ///
    /// # Errors
    /// As [`Decompressor::decompress`].
    pub fn decompress_into(&mut self, stored: &[u8], raw: &mut [u8]) -> Result<(), CodecError> {
        let raw_len = raw.len();
        check_frame(stored, raw_len)?;
        let len = self.0.decompress_to_buffer(stored, raw);
        check_len(len, raw_len)
    }
}

/// Makes the one frame that holds `raw` to whoever has `prefix`, as `zstd --patch-from=PREFIX` does: what is there as well is not
/// stored. The frame states its content size and carries no checksum.
///
/// Long matches are found by zstd's own table for them, the rest as at `level` without a prefix.
///
/// # Errors
/// [`CodecError::Compress`] if memory is short.
pub fn compress_behind(prefix: &[u8], raw: &[u8], level: i32) -> Result<Vec<u8>, CodecError> {
    let failed = |code| CodecError::Compress {
        reason: zstd_safe::get_error_name(code).to_owned(),
    };
    let mut context = zstd_safe::CCtx::create();
    let mut set = |parameter| context.set_parameter(parameter).map(drop).map_err(failed);
    set(CParameter::CompressionLevel(level))?;
    if level == 2 {
        LEVEL_2.into_iter().try_for_each(&mut set)?;
    }
    // The window has to span both, or the prefix is forgotten on the way.
    let span = (prefix.len() + raw.len()).max(1 << 10);
    set(CParameter::WindowLog(span.next_power_of_two().ilog2()))?;
    set(CParameter::EnableLongDistanceMatching(true))?;
    context.ref_prefix(prefix).map_err(failed)?;
    let mut frame = Vec::with_capacity(zstd_safe::compress_bound(raw.len()));
    context.compress2(&mut frame, raw).map_err(failed)?;
    Ok(frame)
}

/// Reads a frame of [`compress_behind`] into a buffer of exactly the expected length.
///
/// # Errors
/// As [`Decompressor::decompress`]; with another prefix something else may come out instead.
pub fn decompress_behind(prefix: &[u8], stored: &[u8], raw: &mut [u8]) -> Result<(), CodecError> {
    let raw_len = raw.len();
    check_frame(stored, raw_len)?;
    let failed = |code| CodecError::Decompress {
        reason: zstd_safe::get_error_name(code).to_owned(),
    };
    let mut context = zstd_safe::DCtx::create();
    context.ref_prefix(prefix).map_err(failed)?;
    match context.decompress(raw, stored).map_err(failed)? == raw_len {
        true => Ok(()),
        false => Err(CodecError::ContentLen { expected: raw_len }),
    }
}

/// Whether `stored` is one frame that says that it decodes to `raw_len` bytes.
fn check_frame(stored: &[u8], raw_len: usize) -> Result<(), CodecError> {
    let frame_len =
        zstd_safe::find_frame_compressed_size(stored).map_err(|code| CodecError::Decompress {
            reason: zstd_safe::get_error_name(code).to_owned(),
        })?;
    if frame_len != stored.len() {
        return Err(CodecError::NotOneFrame {
            frame_len,
            stored_len: stored.len(),
        });
    }
    let content_len = zstd_safe::get_frame_content_size(stored).ok().flatten();
    match content_len == Some(raw_len as u64) {
        true => Ok(()),
        false => Err(CodecError::ContentLen { expected: raw_len }),
    }
}

fn check_len(decoded: std::io::Result<usize>, expected: usize) -> Result<(), CodecError> {
    match decoded.map_err(decompress_error)? == expected {
        true => Ok(()),
        false => Err(CodecError::ContentLen { expected }),
    }
}

fn decompress_error(error: std::io::Error) -> CodecError {
    CodecError::Decompress {
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame_of(raw: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        Compressor::new(DEFAULT_LEVEL)
            .unwrap()
            .compress(raw, &mut frame)
            .unwrap();
        frame
    }

    #[test]
    fn what_went_in_comes_out() {
        let raw: Vec<u8> = (0..300_000u32).map(|i| (i / 7 % 251) as u8).collect();
        let mut back = Vec::new();
        Decompressor::new()
            .unwrap()
            .decompress(&frame_of(&raw), raw.len(), &mut back)
            .unwrap();
        assert_eq!(back, raw);
    }

    #[test]
    fn a_used_compressor_makes_the_same_frame_as_a_fresh_one() {
        let (one, two) = (vec![7; 100_000], b"abcabc".repeat(1000));
        let mut compressor = Compressor::new(3).unwrap();
        let (mut first, mut again) = (Vec::new(), Vec::new());
        compressor.compress(&two, &mut first).unwrap();
        compressor.compress(&one, &mut again).unwrap();
        compressor.compress(&two, &mut again).unwrap();
        assert_eq!(first, again);
    }

    #[test]
    fn what_stands_in_the_prefix_is_not_stored_and_comes_out_again() {
        let noise = |len: u32, salt: u32| -> Vec<u8> {
            let bytes = (0..len).map(|i| {
                let mixed = (i + salt).wrapping_mul(2_654_435_761);
                (mixed ^ mixed >> 15)
                    .wrapping_mul(0x2c1b_3c6d)
                    .to_be_bytes()[0]
            });
            bytes.collect()
        };
        let prefix = noise(525_000, 0);
        let mut raw = prefix.clone();
        raw[200_000..204_096].copy_from_slice(&noise(4096, 1 << 25));
        for level in [-5, 1, 2, 3, 9] {
            let frame = compress_behind(&prefix, &raw, level).unwrap();
            assert!(frame.len() < 4096 + 512, "level {level}: {}", frame.len());
            let mut back = vec![0; raw.len()];
            decompress_behind(&prefix, &frame, &mut back).unwrap();
            assert_eq!(back, raw);
            let mut wrong = vec![0; raw.len()];
            let without = decompress_behind(&[], &frame, &mut wrong);
            assert!(without.is_err() || wrong != raw);
        }
    }

    #[test]
    fn a_frame_of_another_length_or_with_a_neighbour_is_refused() {
        let frame = frame_of(b"hello");
        let mut raw = Vec::new();
        let mut decompressor = Decompressor::new().unwrap();
        let wrong_len = decompressor.decompress(&frame, 6, &mut raw);
        assert_eq!(wrong_len, Err(CodecError::ContentLen { expected: 6 }));
        let mut two = frame.clone();
        two.extend_from_slice(&frame);
        let not_one = decompressor.decompress(&two, 5, &mut raw);
        assert_eq!(
            not_one,
            Err(CodecError::NotOneFrame {
                frame_len: frame.len(),
                stored_len: two.len()
            })
        );
        assert!(
            decompressor
                .decompress(&frame[..frame.len() - 1], 5, &mut raw)
                .is_err()
        );
        assert!(decompressor.decompress(b"", 0, &mut raw).is_err());
    }
}
