//! Bytes in any portions → whole lines.

use super::error::QmpError;

/// The longest line that is believed, in bytes. QEMU's longest answers, schemas, stay below 1 MiB.
pub const LINE_LIMIT: usize = 16 << 20;

/// Collects bytes until they hold a line.
#[derive(Debug, Default)]
pub(super) struct LineBuffer {
    bytes: Vec<u8>,
    /// Where the first line that was not taken yet begins.
    start: usize,
    /// Up to here there is no line end behind `start`.
    scanned: usize,
}

impl LineBuffer {
    /// Appends what has arrived.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next whole line that is not blank, without its line end. `None` if none has arrived.
    ///
    /// # Errors
    /// [`QmpError::LineTooLong`] if the line, whole or not, exceeds [`LINE_LIMIT`].
    pub(super) fn take(&mut self) -> Result<Option<Vec<u8>>, QmpError> {
        loop {
            let Some(line) = self.take_any()? else {
                return Ok(None);
            };
            if !line.trim_ascii().is_empty() {
                return Ok(Some(line));
            }
        }
    }

    fn take_any(&mut self) -> Result<Option<Vec<u8>>, QmpError> {
        let rest = self.bytes.get(self.scanned..).unwrap_or_default();
        let end = rest.iter().position(|&byte| byte == b'\n');
        let end = end.map(|offset| self.scanned + offset);
        if end.unwrap_or(self.bytes.len()) - self.start > LINE_LIMIT {
            return Err(QmpError::LineTooLong { limit: LINE_LIMIT });
        }
        let Some(end) = end else {
            self.scanned = self.bytes.len();
            return Ok(None);
        };
        let line = self.bytes.get(self.start..end).unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line).to_vec();
        self.start = end + 1;
        self.scanned = self.start;
        Ok(Some(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines_of(portions: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut buffer = LineBuffer::default();
        let mut lines = Vec::new();
        for portion in portions {
            buffer.push(portion);
            while let Some(line) = buffer.take().unwrap() {
                lines.push(line);
            }
        }
        lines
    }

    #[test]
    fn lines_are_the_same_wherever_the_bytes_are_split() {
        let text = b"{\"QMP\": {}}\r\n\r\n{\"return\": {}}\n{\"event\": 1}\r\npart";
        let whole = lines_of(&[text]);
        assert_eq!(whole.len(), 3);
        for split in 0..=text.len() {
            let (left, right) = text.split_at(split);
            assert_eq!(lines_of(&[left, right]), whole, "split at {split}");
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_refused_before_and_after_its_end() {
        let mut buffer = LineBuffer::default();
        buffer.push(&vec![b'x'; LINE_LIMIT]);
        assert!(buffer.take().unwrap().is_none());
        buffer.push(b"x");
        assert!(matches!(buffer.take(), Err(QmpError::LineTooLong { .. })));
        buffer.push(b"\n");
        assert!(matches!(buffer.take(), Err(QmpError::LineTooLong { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_portions_give_the_lines_between_line_feeds(
            portions in proptest::collection::vec(proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'a')], 0..9), 0..9)
        ) {
            let text = portions.concat();
            let whole: Vec<Vec<u8>> = match text.iter().rposition(|&byte| byte == b'\n') {
                None => Vec::new(),
                Some(last) => text[..last].split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect(),
            };
            let portions: Vec<&[u8]> = portions.iter().map(Vec::as_slice).collect();
            prop_assert_eq!(lines_of(&portions), whole);
        }
    }
}
