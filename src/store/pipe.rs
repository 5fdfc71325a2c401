//! Pipes: standard input and output where an image is asked for.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use super::{FileSource, StoreError};
use crate::bytes::{PublishError, Sink};

/// Bytes collected before they go into the pipe in one write.
const WRITE_LEN: usize = 1 << 18;

/// Bytes at the end that are kept back until they are published. The kernel writes so few at once or not at all.
const KEPT_BACK: usize = 4096;

/// Writes straight into a descriptor; what was appended cannot be taken back.
///
/// Its last bytes are kept back until it is published: a reader that got less can see that it did not get all.
#[derive(Debug)]
pub struct PipeSink {
    pipe: File,
    pending: Vec<u8>,
}

impl PipeSink {
    /// A sink into `pipe`: a pipe, a socket, or a file that somebody else opened.
    pub fn new(pipe: File) -> Self {
        PipeSink {
            pipe,
            pending: Vec::with_capacity(WRITE_LEN),
        }
    }

    /// A sink into standard output.
    ///
    /// # Errors
    /// [`StoreError::Pipe`] if there is none.
    pub fn stdout() -> Result<Self, StoreError> {
        let stdout = io::stdout().as_fd().try_clone_to_owned();
        let stdout = stdout.map_err(|source| StoreError::Pipe {
            act: "open",
            source,
        })?;
        Ok(PipeSink::new(File::from(stdout)))
    }

    fn write_pending(&mut self) -> io::Result<()> {
        let len = self.pending.len().saturating_sub(KEPT_BACK);
        self.pipe.write_all(&self.pending[..len])?;
        self.pending.drain(..len);
        Ok(())
    }

    /// Makes what was written durable if it went into a file; a pipe says that it cannot.
    fn sync_file(&self) -> io::Result<()> {
        match self.pipe.sync_data() {
            Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
            outcome => outcome,
        }
    }
}

impl Sink for PipeSink {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= WRITE_LEN {
            self.write_pending()
        } else {
            Ok(())
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.write_pending()?;
        self.sync_file()
    }

    fn publish(&mut self) -> Result<(), PublishError> {
        self.write_pending().map_err(PublishError::NotPublished)?;
        match self.pipe.write_all(&self.pending) {
            // The reader went away, or the file has no room: the end is missing for certain.
            Err(error)
                if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::StorageFull) =>
            {
                Err(PublishError::NotPublished(error))
            }
            written => written
                .and_then(|()| self.sync_file())
                .map_err(PublishError::Unknown),
        }
    }
}

/// Reads `pipe` to its end into a nameless file in `directory`, so that it can be read at any place.
///
/// # Errors
/// [`StoreError::Pipe`] if reading fails, [`StoreError::File`] if there is no room.
pub fn spool(pipe: &mut dyn Read, directory: &Path) -> Result<FileSource, StoreError> {
    let error = |source| StoreError::File {
        act: "spool the pipe into",
        path: directory.to_owned(),
        source,
    };
    let mut file: File = tempfile::tempfile_in(directory).map_err(error)?;
    let mut buf = vec![0; 1 << 18];
    loop {
        let len = match pipe.read(&mut buf) {
            Ok(0) => return Ok(FileSource::from(file)),
            Ok(len) => len,
            Err(interrupted) if interrupted.kind() == ErrorKind::Interrupted => continue,
            Err(source) => {
                return Err(StoreError::Pipe {
                    act: "read",
                    source,
                });
            }
        };
        file.write_all(&buf[..len]).map_err(error)?;
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::bytes::ReadAt;

    fn pipe() -> (io::PipeReader, PipeSink) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, PipeSink::new(File::from(OwnedFd::from(writer))))
    }

    #[test]
    fn the_end_stays_back_until_it_is_published() {
        for is_published in [false, true] {
            let (mut reader, mut sink) = pipe();
            sink.append(&[1; KEPT_BACK]).unwrap();
            sink.append(&[2; 10]).unwrap();
            sink.sync().unwrap();
            if is_published {
                sink.publish().unwrap();
            }
            drop(sink);
            let mut arrived = Vec::new();
            reader.read_to_end(&mut arrived).unwrap();
            let expected = if is_published { KEPT_BACK + 10 } else { 10 };
            assert_eq!(arrived.len(), expected);
        }
    }

    #[test]
    fn a_reader_that_went_away_got_no_image() {
        let (reader, mut sink) = pipe();
        sink.append(&[1; 10]).unwrap();
        drop(reader);
        assert!(matches!(sink.publish(), Err(PublishError::NotPublished(_))));
    }

    #[test]
    fn a_spooled_pipe_can_be_read_at_any_place() {
        let bytes: Vec<u8> = (0..=255).cycle().take(700_000).collect();
        let source = spool(&mut bytes.as_slice(), &std::env::temp_dir()).unwrap();
        assert_eq!(source.len(), 700_000);
        let mut buf = [0; 3];
        source.read_exact_at(&mut buf, 511).unwrap();
        assert_eq!(buf, [255, 0, 1]);
    }
}
