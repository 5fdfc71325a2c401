//! A part of a file, read as if other bytes stood before and behind it.
//!
//! So what belongs to a file that somebody else wrote can be kept in memory, and the file is neither copied nor changed.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::file::next_data;

/// What is read instead of parts of a file. Positions below are those that a reader sees.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Read from 0 on, instead of what the file has there.
    pub front: Vec<u8>,
    /// Where in the file a reader's 0 is, and where the part ends that is read.
    pub window: Range<u64>,
    /// Read behind the window.
    pub behind: Vec<u8>,
}

impl Surroundings {
    fn window_len(&self) -> u64 {
        self.window.end.saturating_sub(self.window.start)
    }

    /// Bytes that a reader sees.
    pub(super) fn len(&self) -> u64 {
        self.window_len() + self.behind.len() as u64
    }

    pub(super) fn read_exact_at(
        &self,
        file: &File,
        mut buf: &mut [u8],
        mut offset: u64,
    ) -> io::Result<()> {
        while !buf.is_empty() {
            let (front, window) = (self.front.len() as u64, self.window_len());
            let len = if offset < front.min(window) {
                copy(&self.front, offset, buf)
            } else if offset < window {
                let left = usize::try_from(window - offset).unwrap_or(usize::MAX);
                let len = left.min(buf.len());
                file.read_exact_at(&mut buf[..len], self.window.start + offset)?;
                len
            } else {
                copy(&self.behind, offset - window, buf)
            };
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buf = &mut buf[len..];
            offset += len as u64;
        }
        Ok(())
    }

    pub(super) fn next_data(&self, file: &File, offset: u64) -> io::Result<u64> {
        let is_in_memory = offset < self.front.len() as u64 || offset >= self.window_len();
        if is_in_memory {
            return Ok(offset);
        }
        let found = next_data(file, self.window.start + offset, self.window.end)?;
        Ok(found.saturating_sub(self.window.start))
    }
}

/// Copies what `bytes` have from `offset` on; gives how much that was.
fn copy(bytes: &[u8], offset: u64, buf: &mut [u8]) -> usize {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    let found = bytes.get(offset..).unwrap_or_default();
    let len = found.len().min(buf.len());
    buf[..len].copy_from_slice(&found[..len]);
    len
}

#[cfg(test)]
mod tests {
    use super::super::FileSource;
    use super::*;
    use crate::bytes::ReadAt;

    #[test]
    fn a_reader_sees_one_file() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        let surroundings = Surroundings {
            front: b"ab".to_vec(),
            window: 3..8,
            behind: b"xyz".to_vec(),
        };
        let source = FileSource::with_surroundings(file, surroundings);
        assert_eq!(source.len(), 8);
        let seen = b"ab567xyz";
        for start in 0..=seen.len() {
            for end in start..=seen.len() {
                let mut buf = vec![0; end - start];
                source.read_exact_at(&mut buf, start as u64).unwrap();
                assert_eq!(buf, seen[start..end]);
            }
            let end = source.read_exact_at(&mut vec![0; 9 - start], start as u64);
            assert_eq!(end.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            assert_eq!(source.next_data(start as u64).unwrap(), start as u64);
        }
    }
}
