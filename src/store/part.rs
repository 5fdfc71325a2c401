//! A file that is made in several goes: `NAME.part` beside the name it gets in the end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::file::{FLUSH_LEN, lock_failed, parent, rename, sync_names};
use super::{FileIdentity, FileSource, StoreError, check_target};
use crate::bytes::{PublishError, WriteAt};

/// A file under construction that stays when its maker ends: the next one goes on with it. Nobody else may make it meanwhile.
#[derive(Debug)]
pub struct PartFile {
    file: File,
    /// Opened early, so that a directory that cannot be synced is found before anything is written.
    directory: File,
    path: PathBuf,
    target: PathBuf,
    may_replace: bool,
    written: AtomicU64,
}

impl PartFile {
    /// Opens `TARGET.part`, or makes it, mode 0600.
    ///
    /// # Errors
    /// As [`check_target`]; [`StoreError::BeingMade`] if somebody else makes it now; [`StoreError::File`].
    pub fn open(target: &Path, may_replace: bool) -> Result<Self, StoreError> {
        check_target(target, may_replace)?;
        let mut path = target.as_os_str().to_owned();
        path.push(".part");
        let path = PathBuf::from(path);
        let failed = |act: &'static str| {
            let path = path.clone();
            move |source| StoreError::File { act, path, source }
        };
        let directory = File::open(parent(target)).map_err(failed("create"))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let no_link = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
        let file = options.mode(0o600).custom_flags(no_link).open(&path);
        let file = file.map_err(failed("create"))?;
        if !file.metadata().map_err(failed("open"))?.is_file() {
            return Err(StoreError::NotAFile { path });
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(StoreError::BeingMade { path }),
            Err(errno) => return Err(lock_failed(path, errno)),
        }
        // Whoever had it locked may have given it its name meanwhile.
        let own = FileIdentity::of(&file.metadata().map_err(failed("open"))?);
        if FileIdentity::at(&path) != Some(own) {
            return Err(StoreError::BeingMade { path });
        }
        Ok(PartFile {
            file,
            directory,
            path,
            target: target.to_owned(),
            may_replace,
            written: AtomicU64::new(0),
        })
    }

    /// Its name for now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it holds, to be read.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn source(&self) -> Result<FileSource, StoreError> {
        let copy = self.file.try_clone().map_err(self.failed("open"))?;
        Ok(FileSource::from(copy))
    }

    /// Empties it and makes it `len` bytes long, all of them a hole.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn begin_anew(&self, len: u64) -> Result<(), StoreError> {
        let emptied = self.file.set_len(0);
        let set = emptied.and_then(|()| self.file.set_len(len));
        set.map_err(self.failed("write"))
    }

    /// Whether the file system can take `needed` bytes more.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`].
    pub fn check_room(&self, needed: u64) -> Result<(), StoreError> {
        let Ok(found) = rustix::fs::fstatvfs(&self.file) else {
            return Ok(()); // writing will tell
        };
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        match needed <= free {
            true => Ok(()),
            false => Err(StoreError::NoRoom {
                path: self.target.clone(),
                needed,
                free,
            }),
        }
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Gives it its name, durably.
    ///
    /// # Errors
    /// As [`crate::bytes::Sink::publish`].
    pub fn publish(self) -> Result<(), PublishError> {
        if let Err(error) = rename(&self.path, &self.target, self.may_replace) {
            let now = FileIdentity::at(&self.path);
            let own = self.file.metadata().ok();
            let own = own.map(|metadata| FileIdentity::of(&metadata));
            return match own.is_some() && now == own {
                true => Err(PublishError::NotPublished(error)),
                false => Err(PublishError::Unknown(error)),
            };
        }
        sync_names(&self.directory).map_err(PublishError::Unknown)
    }

    fn failed(&self, act: &'static str) -> impl FnOnce(io::Error) -> StoreError + use<> {
        let path = self.path.clone();
        move |source| StoreError::File { act, path, source }
    }
}

/// Lets the kernel begin to write what it holds of the file, without waiting for it. It goes on holding it: what was copied is
/// often read next, by a restore.
fn start_writeback(file: &File) {
    // SAFETY: the call takes numbers only, and `file` keeps the descriptor open. Failure costs speed only.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

impl WriteAt for PartFile {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        let len = bytes.len() as u64;
        let before = self.written.fetch_add(len, Ordering::Relaxed);
        if before / FLUSH_LEN != (before + len) / FLUSH_LEN {
            start_writeback(&self.file);
        }
        Ok(())
    }

    fn read_back_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_left_the_next_goes_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x");
        let part = PartFile::open(&target, false).unwrap();
        part.begin_anew(8).unwrap();
        part.write_all_at(b"left", 0).unwrap();
        assert!(matches!(
            PartFile::open(&target, false),
            Err(StoreError::BeingMade { .. })
        ));
        drop(part);
        let part = PartFile::open(&target, false).unwrap();
        part.write_all_at(b"over", 4).unwrap();
        part.sync().unwrap();
        assert!(!target.exists());
        part.publish().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"leftover");
        assert!(matches!(
            PartFile::open(&target, false),
            Err(StoreError::Exists { .. })
        ));
    }

    #[test]
    fn a_name_that_was_taken_meanwhile_is_not_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x");
        let part = PartFile::open(&target, false).unwrap();
        std::fs::write(&target, "mine").unwrap();
        assert!(matches!(part.publish(), Err(PublishError::NotPublished(_))));
        assert_eq!(std::fs::read(&target).unwrap(), b"mine");
    }
}
