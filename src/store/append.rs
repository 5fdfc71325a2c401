//! Appends to a file that is there: how an image is edited.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use super::StoreError;
use super::file::open_to_change;
use crate::bytes::{PublishError, Sink};

/// Appends to the end of a file, which nobody else may use meanwhile.
#[derive(Debug)]
pub struct FileAppender {
    file: File,
}

impl FileAppender {
    /// Opens `path` for it.
    ///
    /// # Errors
    /// As [`open_to_change`].
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut file = open_to_change(path)?;
        let at_end = file.seek(SeekFrom::End(0));
        at_end.map_err(|source| StoreError::File {
            act: "open",
            path: path.to_owned(),
            source,
        })?;
        Ok(FileAppender { file })
    }

    /// The file, to be read too.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Sink for FileAppender {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// What was appended is there already.
    fn publish(&mut self) -> Result<(), PublishError> {
        Ok(())
    }
}
