//! What is searched for: a regular expression over bytes, whatever the user wrote.

use regex::bytes::{Regex, RegexBuilder};

use super::MemoryError;
use crate::units::PAGE_LEN;

/// How a pattern is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PatternKind {
    /// A regular expression; `.` and `\x00` to `\xff` are bytes.
    #[default]
    Regex,
    /// Text as it stands, in UTF-8.
    Text,
    /// Text as it stands, in UTF-16 with the low byte first, as Windows has it.
    Utf16,
    /// Bytes, two hexadecimal digits each, `??` for any; spaces do not count.
    Hex,
}

/// What is searched for.
#[derive(Debug, Clone)]
pub struct Pattern {
    regex: Regex,
    matches_zeros: bool,
}

impl Pattern {
    /// Understands `text`.
    ///
    /// # Errors
    /// [`MemoryError::Pattern`], [`MemoryError::NotHex`], [`MemoryError::MatchesNothing`].
    pub fn parse(text: &str, kind: PatternKind, ignores_case: bool) -> Result<Self, MemoryError> {
        let expression = match kind {
            PatternKind::Regex => text.to_owned(),
            PatternKind::Text => text.bytes().map(literal).collect(),
            PatternKind::Utf16 => text
                .encode_utf16()
                .flat_map(u16::to_le_bytes)
                .map(literal)
                .collect(),
            PatternKind::Hex => hex(text).ok_or_else(|| MemoryError::NotHex {
                text: text.to_owned(),
            })?,
        };
        let regex = RegexBuilder::new(&expression)
            .unicode(false)
            .case_insensitive(ignores_case)
            .build()
            .map_err(|error| MemoryError::Pattern(Box::new(error)))?;
        if regex.is_match(b"") {
            return Err(MemoryError::MatchesNothing);
        }
        let zeros = [0; PAGE_LEN];
        let matches_zeros = regex.find_iter(&zeros).any(|found| !found.is_empty());
        Ok(Pattern {
            regex,
            matches_zeros,
        })
    }

    /// Whether it is found in bytes that are all zero.
    pub fn matches_zeros(&self) -> bool {
        self.matches_zeros
    }

    /// The first place from `start` on where it is found: from where to where.
    pub(super) fn find_at(&self, bytes: &[u8], start: usize) -> Option<(usize, usize)> {
        let mut start = start;
        while start <= bytes.len() {
            let found = self.regex.find_at(bytes, start)?;
            if !found.is_empty() {
                return Some((found.start(), found.end()));
            }
            start = found.end() + 1;
        }
        None
    }
}

/// A byte as an expression that matches nothing else, letters as such so that their case can be ignored.
fn literal(byte: u8) -> String {
    match byte.is_ascii_alphanumeric() {
        true => char::from(byte).to_string(),
        false => format!("\\x{byte:02x}"),
    }
}

fn hex(text: &str) -> Option<String> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() || pairs.is_empty() {
        return None;
    }
    let byte = |pair: &[u8; 2]| match pair {
        b"??" => Some("(?s:.)".to_owned()),
        _ if pair.iter().all(u8::is_ascii_hexdigit) => {
            let pair = std::str::from_utf8(pair).ok()?;
            Some(format!("\\x{pair}"))
        }
        _ => None,
    };
    pairs.iter().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(
        text: &str,
        kind: PatternKind,
        ignores_case: bool,
        bytes: &[u8],
    ) -> Option<(usize, usize)> {
        let pattern = Pattern::parse(text, kind, ignores_case).unwrap();
        pattern.find_at(bytes, 0)
    }

    #[test]
    fn a_pattern_is_about_bytes() {
        use PatternKind::{Hex, Regex, Text, Utf16};
        assert_eq!(
            find(r"\xff.\x00", Regex, false, b"a\xff\x80\x00"),
            Some((1, 4))
        );
        assert_eq!(find("a.c", Text, false, b"abca.c"), Some((3, 6)));
        assert_eq!(find("A.C", Text, true, b"abca.c"), Some((3, 6)));
        assert_eq!(find("h\u{e4}", Text, false, b"\x00h\xc3\xa4"), Some((1, 4)));
        assert_eq!(find("Ab", Utf16, true, b"\0a\0B\0"), Some((1, 5)));
        assert_eq!(find("0d??0A 00", Hex, false, b"\r\n\n\0"), Some((0, 4)));
    }

    #[test]
    fn what_matches_nothing_or_is_not_understood_is_refused() {
        let parse = |text: &str, kind| Pattern::parse(text, kind, false);
        assert!(matches!(
            parse("a*", PatternKind::Regex),
            Err(MemoryError::MatchesNothing)
        ));
        assert!(matches!(
            parse("", PatternKind::Text),
            Err(MemoryError::MatchesNothing)
        ));
        assert!(matches!(
            parse("a(", PatternKind::Regex),
            Err(MemoryError::Pattern(_))
        ));
        for text in ["", "0", "0x12", "é1", "?1"] {
            assert!(
                matches!(
                    parse(text, PatternKind::Hex),
                    Err(MemoryError::NotHex { .. })
                ),
                "{text}"
            );
        }
        assert!(
            parse(r"\x00{4}", PatternKind::Regex)
                .unwrap()
                .matches_zeros()
        );
        assert!(!parse(r"a|\b", PatternKind::Regex).unwrap().matches_zeros());
    }
}
