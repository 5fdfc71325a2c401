//! Big-endian integers and names, read forward from bytes of which more may come.

use super::error::StreamError;
use crate::units::StreamOffset;

/// Why nothing was read.
pub(super) enum Stop {
    /// The bytes end too early; nothing was wrong so far.
    NeedMore,
    /// They are wrong.
    Bad(StreamError),
}

impl From<StreamError> for Stop {
    fn from(error: StreamError) -> Self {
        Stop::Bad(error)
    }
}

/// Reads forward from the bytes of one element.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    read: usize,
    start: StreamOffset,
}

impl<'a> Cursor<'a> {
    /// Before the first of `bytes`, which lies at `start` in the stream.
    pub(super) fn new(bytes: &'a [u8], start: StreamOffset) -> Self {
        Cursor {
            bytes,
            read: 0,
            start,
        }
    }

    /// How many bytes were read.
    pub(super) fn len(&self) -> usize {
        self.read
    }

    /// Where the next byte lies in the stream.
    pub(super) fn offset(&self) -> StreamOffset {
        StreamOffset(self.start.0 + self.read as u64)
    }

    /// The next `len` bytes.
    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let rest = &self.bytes[self.read..];
        let taken = rest.get(..len).ok_or(Stop::NeedMore)?;
        self.read += len;
        Ok(taken)
    }

    /// The next byte, which stays the next.
    pub(super) fn peek(&self) -> Result<u8, Stop> {
        self.bytes.get(self.read).copied().ok_or(Stop::NeedMore)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let rest = &self.bytes[self.read..];
        let array = rest.first_chunk().ok_or(Stop::NeedMore)?;
        self.read += N;
        Ok(*array)
    }

    /// One byte.
    pub(super) fn u8(&mut self) -> Result<u8, Stop> {
        self.array().map(u8::from_be_bytes)
    }

    /// A big-endian u16.
    pub(super) fn be16(&mut self) -> Result<u16, Stop> {
        self.array().map(u16::from_be_bytes)
    }

    /// A big-endian u32.
    pub(super) fn be32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_be_bytes)
    }

    /// A big-endian u64.
    pub(super) fn be64(&mut self) -> Result<u64, Stop> {
        self.array().map(u64::from_be_bytes)
    }

    /// Sixteen bytes.
    pub(super) fn uuid(&mut self) -> Result<uuid::Uuid, Stop> {
        self.array().map(uuid::Uuid::from_bytes)
    }

    /// One length byte and a name of that length; `Ok(Err(bytes))` if it is not UTF-8.
    pub(super) fn str8(&mut self) -> Result<Result<&'a str, &'a [u8]>, Stop> {
        let len = usize::from(self.u8()?);
        let bytes = self.take(len)?;
        Ok(std::str::from_utf8(bytes).map_err(|_| bytes))
    }
}
