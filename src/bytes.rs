//! Where bytes are read from and written to, as the formats see it.
//!
//! [`ReadAt`] is a positioned reader over something of known length, [`Sink`] an append-only writer whose result
//! appears under its name only when it is published, [`WriteAt`] its positioned side, which files have and pipes lack.
//! Files, pipes and memory implement them in `store` and in tests.

use std::io;

/// Positioned reads from something whose length does not change while it is open.
pub trait ReadAt: Send + Sync {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it holds nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` with the bytes at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if fewer than `buf.len()` bytes lie there; whatever the source says otherwise.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Makes `buf` the `len` bytes at `offset`: where they come in a buffer of their own it takes the place of this one.
    ///
    /// # Errors
    /// As [`ReadAt::read_exact_at`].
    fn read_to(&self, buf: &mut Vec<u8>, len: usize, offset: u64) -> io::Result<()> {
        buf.resize(len, 0);
        self.read_exact_at(buf, offset)
    }

    /// The first place from `offset` on where a byte may lie that is not zero; its length if there is none.
    ///
    /// # Errors
    /// Whatever the source says.
    fn next_data(&self, offset: u64) -> io::Result<u64> {
        Ok(offset)
    }
}

/// Writes and reads at any place of something under construction, by any thread. What was never written is zero.
pub trait WriteAt: Send + Sync {
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// Whatever the target says.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Fills `buf` with what was written at `offset`; the last of it must have been written.
    ///
    /// # Errors
    /// Whatever the target says.
    fn read_back_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// Appends that become visible together.
///
/// The story is `append`* → `sync` → `publish`. A sink that is dropped before `publish` leaves nothing behind that
/// could be taken for the whole.
pub trait Sink: Send {
    /// Appends all of `bytes`.
    ///
    /// # Errors
    /// Whatever the target says; after an error the sink can only be dropped.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Where bytes can be written at places of their own before anything is appended; `None` if they can only follow
    /// each other.
    fn places(&self) -> Option<&dyn WriteAt> {
        None
    }

    /// Goes on appending at `offset`, behind what was written at places of its own.
    ///
    /// # Errors
    /// `Unsupported` where there are no [`Sink::places`]; whatever the target says otherwise.
    fn append_from(&mut self, offset: u64) -> io::Result<()> {
        let _ = offset;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes all that was appended durable.
    ///
    /// # Errors
    /// Whatever the target says.
    fn sync(&mut self) -> io::Result<()>;

    /// Gives the finished bytes their name, durably. Called once, last.
    ///
    /// # Errors
    /// [`PublishError::NotPublished`] if the name certainly does not exist, [`PublishError::Unknown`] if it may.
    fn publish(&mut self) -> Result<(), PublishError>;
}

/// Why finished bytes did not get their name.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The name does not exist; nothing happened.
    #[error("the finished file could not be given its name")]
    NotPublished(#[source] io::Error),
    /// The name may or may not exist.
    #[error("it is not known whether the finished file got its name")]
    Unknown(#[source] io::Error),
}

impl ReadAt for [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        let found = start.and_then(|start| self.get(start..start.checked_add(buf.len())?));
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn len(&self) -> u64 {
        ReadAt::len(self.as_slice())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        ReadAt::read_exact_at(self.as_slice(), buf, offset)
    }
}

impl<R: ReadAt + ?Sized> ReadAt for std::sync::Arc<R> {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn read_to(&self, buf: &mut Vec<u8>, len: usize, offset: u64) -> io::Result<()> {
        (**self).read_to(buf, len, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        (**self).next_data(offset)
    }
}

impl<R: ReadAt + ?Sized> ReadAt for &R {
    fn len(&self) -> u64 {
        (**self).len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset)
    }

    fn read_to(&self, buf: &mut Vec<u8>, len: usize, offset: u64) -> io::Result<()> {
        (**self).read_to(buf, len, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        (**self).next_data(offset)
    }
}

/// A sink in memory, for tests and for small things; publishing does nothing.
impl Sink for Vec<u8> {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn publish(&mut self) -> Result<(), PublishError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_past_the_end_of_memory_is_refused() {
        let bytes = vec![1u8, 2, 3];
        let mut buf = [0; 2];
        bytes.read_exact_at(&mut buf, 1).unwrap();
        assert_eq!(buf, [2, 3]);
        for offset in [2, 3, u64::MAX] {
            let error = bytes.read_exact_at(&mut buf, offset).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
