//! Bytes on their way out: no faster than allowed, shown as they go, and no more of them when it is over.

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::progress::Progress;
use crate::rate::RateLimit;

/// Bytes that are given at once.
const PIECE_LEN: usize = 64 << 10;

/// Reads from memory at a pace.
pub struct PacedReader<'a> {
    bytes: &'a [u8],
    limit: &'a RateLimit,
    is_over: &'a dyn Fn() -> bool,
    given: u64,
    shown: Option<(&'a dyn Progress, &'a AtomicU64)>,
}

impl<'a> PacedReader<'a> {
    /// A reader that fails once it is over.
    pub fn new(bytes: &'a [u8], limit: &'a RateLimit, is_over: &'a dyn Fn() -> bool) -> Self {
        PacedReader {
            bytes,
            limit,
            is_over,
            given: 0,
            shown: None,
        }
    }

    /// Tells `progress` what is read for the first time; `most` is how far earlier readers of the same bytes came.
    pub fn shown_on(mut self, progress: &'a dyn Progress, most: &'a AtomicU64) -> Self {
        self.shown = Some((progress, most));
        self
    }
}

impl Read for PacedReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(PIECE_LEN).min(self.bytes.len());
        self.limit.wait_for(len, self.is_over);
        if (self.is_over)() {
            return Err(io::Error::other("it was stopped"));
        }
        let (piece, rest) = self.bytes.split_at(len);
        buf[..len].copy_from_slice(piece);
        self.bytes = rest;
        self.given += len as u64;
        if let Some((progress, most)) = self.shown {
            let before = most.fetch_max(self.given, Ordering::Relaxed);
            progress.advance(self.given.saturating_sub(before));
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[derive(Default)]
    struct Counted(AtomicU64);

    impl Progress for Counted {
        fn advance(&self, bytes: u64) {
            self.0.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_is_sent_again_is_shown_once() {
        let (counted, most) = (Counted::default(), AtomicU64::new(0));
        let limit = RateLimit::new(None);
        let bytes = vec![7; 3 * PIECE_LEN];
        let go_on = || false;
        for len in [2 * PIECE_LEN, 3 * PIECE_LEN] {
            let reader = PacedReader::new(&bytes, &limit, &go_on);
            let mut read = Vec::new();
            let mut reader = reader.shown_on(&counted, &most).take(len as u64);
            reader.read_to_end(&mut read).unwrap();
            assert_eq!(read, bytes[..len]);
        }
        assert_eq!(counted.0.into_inner(), 3 * PIECE_LEN as u64);
    }

    #[test]
    fn it_keeps_to_the_rate_and_ends_when_it_is_over() {
        let limit = RateLimit::new(Some(PIECE_LEN as u64 * 10));
        let bytes = vec![7; 3 * PIECE_LEN];
        let since = Instant::now();
        let go_on = || false;
        io::copy(
            &mut PacedReader::new(&bytes, &limit, &go_on),
            &mut io::sink(),
        )
        .unwrap();
        assert!(since.elapsed() >= Duration::from_millis(200));
        let is_over = || true;
        let mut reader = PacedReader::new(&bytes, &limit, &is_over);
        assert!(reader.read(&mut [0; 8]).is_err());
    }
}
