//! Text in a guest's memory: runs of printable characters, in ASCII and in UTF-16 with the low byte first.

use super::search::Place;
use super::{MemoryView, len_of};
use crate::bytes::ReadAt;
use crate::error::Result;
use crate::pipeline::{self, PipelineError, Scan, Seen};
use crate::progress::Progress;

/// How text is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextKind {
    /// A byte for a character.
    Ascii,
    /// Two, of which the second is zero.
    Utf16,
}

impl TextKind {
    /// Bytes of a character.
    fn width(self) -> usize {
        match self {
            TextKind::Ascii => 1,
            TextKind::Utf16 => 2,
        }
    }

    /// Whether a character stands at `at`.
    fn is_at(self, bytes: &[u8], at: usize) -> bool {
        let is_text = |byte: u8| matches!(byte, b' '..=b'~' | b'\t');
        let first = bytes.get(at).is_some_and(|byte| is_text(*byte));
        match self {
            TextKind::Ascii => first,
            TextKind::Utf16 => first && bytes.get(at + 1) == Some(&0),
        }
    }
}

/// Which text is wanted.
#[derive(Debug, Clone)]
pub struct StringsRequest<'a> {
    /// How it is encoded.
    pub kinds: &'a [TextKind],
    /// Characters that it has at least.
    pub min_len: usize,
    /// In which block; in all of them without.
    pub block: Option<&'a str>,
    /// Workers.
    pub threads: usize,
}

/// A text that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Where it begins.
    pub place: Place,
    /// How it is encoded.
    pub kind: TextKind,
    /// Its characters.
    pub text: String,
}

/// Gives every text to `found`, block by block in ascending order, until that says `false`. Text that lies more than a page
/// across a boundary of 16 MiB is cut off there.
///
/// # Errors
/// A block that does not exist; the first damaged chunk; that the user asked to stop; what `found` says.
pub fn strings<R: ReadAt>(
    view: &MemoryView<'_, R>,
    request: &StringsRequest<'_>,
    progress: &dyn Progress,
    found: &mut dyn FnMut(&Found) -> Result<bool>,
) -> Result<()> {
    let memory = view.memory();
    let blocks = view.chosen(request.block)?;
    progress.begin("looking for text", Some(len_of(memory, &blocks)));
    let scan = Scan {
        blocks,
        wants_zeros: false,
        threads: request.threads,
    };
    let look = |seen: &Seen<'_>| texts_in(seen, request);
    let mut failed = None;
    let done = pipeline::scan(memory, &scan, progress, &look, &mut |texts| {
        for (block, offset, kind, text) in texts {
            let name = memory.blocks()[block].idstr.as_str();
            let one = Found {
                place: Place::of(&view.space().physical, (block, name), offset),
                kind,
                text,
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
    failed.map_or(Ok(()), Err)
}

type Text = (usize, u64, TextKind, String);

fn texts_in(seen: &Seen<'_>, request: &StringsRequest<'_>) -> Vec<Text> {
    let mut found: Vec<Text> = Vec::new();
    for kind in request.kinds {
        runs(
            seen.bytes,
            seen.own.clone(),
            *kind,
            request.min_len,
            |start, text| {
                found.push((seen.block, seen.offset + start as u64, *kind, text));
            },
        );
    }
    found.sort_by_key(|(_, offset, ..)| *offset);
    found
}

/// Every run of characters that begins in `own`, which those before do not continue.
fn runs(
    bytes: &[u8],
    own: std::ops::Range<usize>,
    kind: TextKind,
    min_len: usize,
    mut found: impl FnMut(usize, String),
) {
    let width = kind.width();
    let mut at = own.start;
    while at < own.end {
        if !kind.is_at(bytes, at) {
            at += 1;
            continue;
        }
        let start = at;
        while kind.is_at(bytes, at) {
            at += width;
        }
        let is_continued = start >= width && kind.is_at(bytes, start - width);
        if (at - start) / width >= min_len && !is_continued {
            let characters = bytes[start..at].iter().step_by(width);
            found(start, characters.map(|byte| char::from(*byte)).collect());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8], own: std::ops::Range<usize>, kind: TextKind) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        runs(bytes, own, kind, 4, |at, text| found.push((at, text)));
        found
    }

    #[test]
    fn text_is_found_where_it_begins_and_whole() {
        let bytes = b"\0abc\0defg\x80hi\tj\n";
        let expected = [(5, "defg".to_owned()), (10, "hi\tj".to_owned())];
        assert_eq!(all(bytes, 0..bytes.len(), TextKind::Ascii), expected);
        // Another window's text that reaches into this one is not this one's; this one's reaches into the next.
        assert_eq!(all(bytes, 6..11, TextKind::Ascii), expected[1..]);
        let bytes = b"xa\0b\0c\0d\0\0e\0f\0";
        let expected = [(1, "abcd".to_owned())];
        assert_eq!(all(bytes, 0..bytes.len(), TextKind::Utf16), expected);
        assert_eq!(all(bytes, 3..bytes.len(), TextKind::Utf16), []);
    }
}
