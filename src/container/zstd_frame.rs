//! Finds the end of a zstd frame without decoding it.
//!
//! Source: RFC 8878 §3.1.1.

use std::io;

use crate::bytes::ReadAt;

/// What a frame's headers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameExtent {
    /// Bytes of the frame.
    pub(super) len: u64,
    /// Bytes it decodes to, where it says so.
    pub(super) content_len: Option<u64>,
    /// Whether it names a dictionary.
    pub(super) needs_dictionary: bool,
}

const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Measures the frame at `at`, which may reach up to `end`; `None` if no whole frame lies there.
///
/// # Errors
/// The reader's own.
pub(super) fn measure<R: ReadAt + ?Sized>(
    reader: &R,
    at: u64,
    end: u64,
) -> io::Result<Option<FrameExtent>> {
    let mut head = [0; 18];
    let available = usize::try_from(end.saturating_sub(at)).unwrap_or(head.len());
    let head = &mut head[..available.min(18)];
    reader.read_exact_at(head, at)?;
    let Some(header) = parse_header(head) else {
        return Ok(None);
    };
    let mut position = at + header.len;
    loop {
        let mut block = [0; 3];
        if end.saturating_sub(position) < 3 {
            return Ok(None);
        }
        reader.read_exact_at(&mut block, position)?;
        let Some(block_len) = block_len(block) else {
            return Ok(None);
        };
        position += 3 + block_len;
        if block[0] & 1 == 1 {
            break;
        }
    }
    position += if header.has_checksum { 4 } else { 0 };
    if position > end {
        return Ok(None);
    }
    let (len, content_len, needs_dictionary) =
        (position - at, header.content_len, header.needs_dictionary);
    Ok(Some(FrameExtent {
        len,
        content_len,
        needs_dictionary,
    }))
}

struct Header {
    len: u64,
    content_len: Option<u64>,
    needs_dictionary: bool,
    has_checksum: bool,
}

fn parse_header(bytes: &[u8]) -> Option<Header> {
    let (magic, rest) = bytes.split_first_chunk::<4>()?;
    let (descriptor, rest) = rest.split_first()?;
    if *magic != MAGIC || descriptor & 0x08 != 0 {
        return None;
    }
    let is_single_segment = descriptor & 0x20 != 0;
    let window_len = usize::from(!is_single_segment);
    let dictionary_len = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let content_len_len = match descriptor >> 6 {
        0 => usize::from(is_single_segment),
        flag => 1 << flag,
    };
    let dictionary = rest.get(window_len..)?.get(..dictionary_len)?;
    let content_len = rest
        .get(window_len + dictionary_len..)?
        .get(..content_len_len)?;
    let mut value = [0; 8];
    value[..content_len_len].copy_from_slice(content_len);
    let value = u64::from_le_bytes(value);
    Some(Header {
        len: 5 + (window_len + dictionary_len + content_len_len) as u64,
        content_len: match content_len_len {
            0 => None,
            2 => Some(value + 256),
            _ => Some(value),
        },
        needs_dictionary: dictionary.iter().any(|byte| *byte != 0),
        has_checksum: descriptor & 0x04 != 0,
    })
}

/// Bytes behind a block header; `None` for the reserved type.
fn block_len(header: [u8; 3]) -> Option<u64> {
    let value = u32::from_le_bytes([header[0], header[1], header[2], 0]);
    match value >> 1 & 3 {
        1 => Some(1),
        3 => None,
        _ => Some(u64::from(value >> 3)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_the_real_encoder_are_measured_exactly() {
        let noise: Vec<u8> = (0..300_000u32)
            .map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[1])
            .collect();
        for len in [0, 1, 200, 256, 300, 70_000, 300_000] {
            for (level, raw) in [(1, &noise[..len]), (19, &vec![7; len][..])] {
                let mut frame = zstd::bulk::compress(raw, level).unwrap();
                let len = frame.len() as u64;
                let expected = FrameExtent {
                    len,
                    content_len: Some(raw.len() as u64),
                    needs_dictionary: false,
                };
                assert_eq!(measure(&frame, 0, len).unwrap(), Some(expected));
                for cut in 0..frame.len().min(40) as u64 {
                    assert_eq!(measure(&frame, 0, cut).unwrap(), None);
                }
                frame.extend_from_slice(b"and more");
                assert_eq!(measure(&frame, 0, len + 8).unwrap(), Some(expected));
            }
        }
    }
}
