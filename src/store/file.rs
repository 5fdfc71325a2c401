//! Files: positioned reads, and writes that appear under their name only when whole.
//!
//! # How an image is written
//!
//! Small pieces are collected to one MiB, large ones go to the kernel as they are. Every 8 MiB the kernel is told that
//! what it holds of the file is not needed again: it begins to write it to the disk, and forgets what is there already. So the
//! last sync has next to nothing to wait for, and an image of any size takes some MiB of the page cache away from others.
//! Measured with 896 MiB on ext4, a disk of some GB/s, medians:
//!
//! | way | until synced | CPU in the kernel | left in the page cache |
//! |---|---|---|---|
//! | no advice | 0.24 s | 0.18 s | 896 MiB |
//! | advice each 32 MiB | 0.22 s | 0.19 s | 32 MiB |
//! | **advice each 8 MiB** | **0.18 s** | **0.16 s** | **8 MiB** |
//! | `sync_file_range` each 8 MiB, no advice | 0.16 s | 0.13 s | 896 MiB |
//! | `sync_file_range`, advice 64 MiB behind | 0.18 s | 0.16 s | 72 MiB |
//! | `O_DIRECT`, one MiB each | 0.28 s | 0.05 s | nothing |
//!
//! `O_DIRECT` takes less CPU in the kernel, but wants every byte copied to an aligned place first, and a writer that
//! waits for the disk each time. The price of leaving the cache alone: whoever reads the image next (`vmstow verify`, a
//! copy, a restore) reads it from the disk, here 0.2 to 0.3 s instead of 0.03 s.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, SeekFrom, flock};
use rustix::io::Errno;

use super::StoreError;
use super::surroundings::Surroundings;
use crate::bytes::{PublishError, ReadAt, Sink, WriteAt};

/// Bytes collected before they go to the kernel in one write.
const WRITE_LEN: usize = 1 << 20;

/// Pieces at least this long are not copied together with others first.
const LARGE_LEN: usize = 1 << 18;

/// Bytes after which the kernel is told to begin writing to the disk, so that the last sync is short.
pub(super) const FLUSH_LEN: u64 = 8 << 20;

/// A regular file, or a block device, opened for reading.
///
/// With [`FileSource::with_surroundings`] a part of one, as if other bytes stood before and behind it.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    len: u64,
    surroundings: Option<Box<Surroundings>>,
}

impl FileSource {
    /// Opens `path`.
    ///
    /// # Errors
    /// [`StoreError::File`]; [`StoreError::NotAFile`] for a directory, a pipe or a socket.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let error = |source| StoreError::File {
            act: "open",
            path: path.to_owned(),
            source,
        };
        // A FIFO would block here until somebody writes to it.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(nonblock())
            .open(path)
            .map_err(error)?;
        let metadata = file.metadata().map_err(error)?;
        if !metadata.is_file() {
            return Err(StoreError::NotAFile {
                path: path.to_owned(),
            });
        }
        Ok(FileSource {
            file,
            len: metadata.len(),
            surroundings: None,
        })
    }

    /// Reads a part of an open file, with other bytes around it.
    pub fn with_surroundings(file: File, surroundings: Surroundings) -> Self {
        FileSource {
            file,
            len: surroundings.len(),
            surroundings: Some(Box::new(surroundings)),
        }
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Keeps others from changing the file, whose name is `path`, as long as this descriptor or one made from it is open,
    /// here or in a process that inherited it. Any number may do so at a time.
    ///
    /// # Errors
    /// [`StoreError::BeingChanged`] if somebody changes it now; [`StoreError::File`] where the file system knows no locks.
    pub fn lock_shared(&self, path: &Path) -> Result<(), StoreError> {
        let path = path.to_owned();
        match flock(&self.file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(()),
            Err(Errno::WOULDBLOCK) => Err(StoreError::BeingChanged { path }),
            Err(errno) => Err(lock_failed(path, errno)),
        }
    }
}

/// Opens the file to change it, which nobody may use meanwhile: see [`FileSource::lock_shared`].
///
/// # Errors
/// [`StoreError::InUse`] if somebody does; [`StoreError::File`] if it cannot be opened for writing, or not be locked.
pub fn open_to_change(path: &Path) -> Result<File, StoreError> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    let file = opened.map_err(|source| StoreError::File {
        act: "open",
        path: path.to_owned(),
        source,
    })?;
    let path = path.to_owned();
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(StoreError::InUse { path }),
        Err(errno) => Err(lock_failed(path, errno)),
    }
}

pub(super) fn lock_failed(path: PathBuf, errno: Errno) -> StoreError {
    StoreError::File {
        act: "lock",
        path,
        source: errno.into(),
    }
}

fn nonblock() -> i32 {
    rustix::fs::OFlags::NONBLOCK.bits().cast_signed()
}

impl From<File> for FileSource {
    /// Reads an open file as it is now long; a file whose length is unknown counts as empty.
    fn from(file: File) -> Self {
        let len = file.metadata().map_or(0, |metadata| metadata.len());
        FileSource {
            file,
            len,
            surroundings: None,
        }
    }
}

impl ReadAt for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.surroundings {
            Some(surroundings) => surroundings.read_exact_at(&self.file, buf, offset),
            None => self.file.read_exact_at(buf, offset),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        match &self.surroundings {
            Some(surroundings) => surroundings.next_data(&self.file, offset),
            None => next_data(&self.file, offset, self.len),
        }
    }
}

/// The first place from `offset` on where a file of `len` bytes may have one that is not zero.
pub(super) fn next_data(file: &File, offset: u64, len: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(data.min(len)),
        Err(Errno::NXIO) => Ok(len),
        // A file system that does not tell where holes are.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(offset),
        Err(errno) => Err(errno.into()),
    }
}

/// Which file it is, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    /// Device number.
    pub device: u64,
    /// Inode number on it.
    pub inode: u64,
}

impl FileIdentity {
    pub(super) fn of(metadata: &std::fs::Metadata) -> Self {
        FileIdentity {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    /// The identity of what `path` names; `None` if it names nothing that can be looked at.
    pub fn at(path: &Path) -> Option<Self> {
        std::fs::symlink_metadata(path)
            .ok()
            .map(|metadata| FileIdentity::of(&metadata))
    }
}

/// A file under construction: a temporary name beside `target`, mode 0600.
///
/// Dropped before it is published, the temporary file is removed.
#[derive(Debug)]
pub struct FileSink {
    file: File,
    /// Opened early, so that a directory that cannot be synced is found before anything is written.
    directory: File,
    temporary: PathBuf,
    target: PathBuf,
    identity: FileIdentity,
    may_replace: bool,
    pending: Vec<u8>,
    written: u64,
    flushed: u64,
    is_published: bool,
    /// What had the name before.
    replaced: Option<FileSource>,
}

/// A name beside `target` that no file has: `.NAME.0123456789abcdef.part`.
///
/// # Errors
/// [`StoreError::NotALocation`] if `target` has no file name.
pub fn temporary_name(target: &Path) -> Result<PathBuf, StoreError> {
    let name = target.file_name().ok_or_else(|| StoreError::NotALocation {
        text: target.display().to_string(),
    })?;
    let (random, _) = uuid::Uuid::new_v4().as_u64_pair();
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{random:016x}.part"));
    Ok(parent(target).join(temporary))
}

impl FileSink {
    /// Creates the temporary file for `target`. With `may_replace` publishing replaces a file of that name.
    ///
    /// # Errors
    /// As [`check_target`]; [`StoreError::File`] if it cannot be made.
    pub fn create(target: &Path, may_replace: bool) -> Result<Self, StoreError> {
        FileSink::create_as(&temporary_name(target)?, target, may_replace)
    }

    /// As [`FileSink::create`], with a temporary name from [`temporary_name`].
    ///
    /// # Errors
    /// As [`FileSink::create`].
    pub fn create_as(
        temporary: &Path,
        target: &Path,
        may_replace: bool,
    ) -> Result<Self, StoreError> {
        check_target(target, may_replace)?;
        let error = |source| StoreError::File {
            act: "create",
            path: target.to_owned(),
            source,
        };
        let directory = File::open(parent(target)).map_err(error)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(temporary)
            .map_err(error)?;
        let identity = FileIdentity::of(&file.metadata().map_err(error)?);
        Ok(FileSink {
            file,
            directory,
            temporary: temporary.to_owned(),
            target: target.to_owned(),
            identity,
            may_replace,
            pending: Vec::with_capacity(WRITE_LEN),
            written: 0,
            flushed: 0,
            is_published: false,
            replaced: None,
        })
    }

    /// The temporary name.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Takes the name away again from a published file, which goes back to its temporary one.
    ///
    /// # Errors
    /// What the file system says; the file has its name then.
    pub fn take_back(&mut self) -> io::Result<()> {
        rename(&self.target, &self.temporary, false)?;
        self.is_published = false;
        sync_names(&self.directory)
    }

    /// Which file it is, under either name.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    fn write_pending(&mut self) -> io::Result<()> {
        self.file.write_all(&self.pending)?;
        let len = self.pending.len();
        self.pending.clear();
        self.note_written(len);
        Ok(())
    }

    fn note_written(&mut self, len: usize) {
        self.written += len as u64;
        if self.written - self.flushed >= FLUSH_LEN {
            write_and_forget(&self.file);
            self.flushed = self.written;
        }
    }

    fn has_no_name(&self) -> bool {
        let metadata = self.file.metadata();
        metadata.is_ok_and(|metadata| metadata.nlink() == 0)
    }

    fn rename(&self) -> io::Result<()> {
        rename(&self.temporary, &self.target, self.may_replace)
    }
}

/// Gives a file another name; without `may_replace` only if nothing has it.
pub(super) fn rename(from: &Path, to: &Path, may_replace: bool) -> io::Result<()> {
    if may_replace {
        return std::fs::rename(from, to);
    }
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // NFS and some others do not know this way of renaming.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => rename_by_link(from, to),
        outcome => Ok(outcome?),
    }
}

/// Whether an image can get the name `target`. Nothing is made.
///
/// # Errors
/// [`StoreError::NotALocation`] if no file can have that name, [`StoreError::Exists`] if one has it and may not be
/// replaced, [`StoreError::NotAFile`] if it is a directory, a device or a link, which are never replaced.
pub fn check_target(target: &Path, may_replace: bool) -> Result<(), StoreError> {
    let name = target.file_name().map(OsStrExt::as_bytes);
    // `dir/` and `dir/.` have a file name as well, but only a directory can be called so.
    if !name.is_some_and(|name| target.as_os_str().as_bytes().ends_with(name)) {
        return Err(StoreError::NotALocation {
            text: target.display().to_string(),
        });
    }
    let path = target.to_owned();
    match target.symlink_metadata() {
        Ok(_) if !may_replace => Err(StoreError::Exists { path }),
        Ok(found) if !found.is_file() => Err(StoreError::NotAFile { path }),
        _ => Ok(()),
    }
}

/// Gives a file another name that must not exist: for a moment it has both.
fn rename_by_link(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::hard_link(from, to)?;
    // The file has its name; that it keeps the other one too harms nobody.
    let _ = std::fs::remove_file(from);
    Ok(())
}

/// Makes the names in a directory durable, where its file system offers that.
pub(super) fn sync_names(directory: &File) -> io::Result<()> {
    match directory.sync_all() {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        outcome => outcome,
    }
}

/// The directory that holds `path`.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Lets the kernel begin to write what it holds of the file, without waiting for it, and forget what is written. Failure costs
/// speed only.
fn write_and_forget(file: &File) {
    // Advice that a page is not needed again starts its writeback.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
}

impl Sink for FileSink {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() >= LARGE_LEN {
            self.write_pending()?;
            self.file.write_all(bytes)?;
            self.note_written(bytes.len());
            return Ok(());
        }
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= WRITE_LEN {
            self.write_pending()
        } else {
            Ok(())
        }
    }

    fn places(&self) -> Option<&dyn WriteAt> {
        Some(self)
    }

    fn append_from(&mut self, offset: u64) -> io::Result<()> {
        self.write_pending()?;
        rustix::fs::seek(&self.file, SeekFrom::Start(offset))?;
        (self.written, self.flushed) = (offset, offset);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.write_pending()?;
        self.file.sync_data()
    }

    fn publish(&mut self) -> Result<(), PublishError> {
        self.write_pending().map_err(PublishError::NotPublished)?;
        // While it is open a file keeps its blocks: those of a large one are not freed before the new one's name is safe.
        self.replaced = match self.may_replace {
            true => FileSource::open(&self.target).ok(),
            false => None,
        };
        if let Err(error) = self.rename() {
            // A rename may fail and yet have happened (a network file system's lost answer): look.
            return match (
                FileIdentity::at(&self.target),
                FileIdentity::at(&self.temporary),
            ) {
                (Some(found), _) if found == self.identity => Err(PublishError::Unknown(error)),
                (_, Some(found)) if found == self.identity => {
                    Err(PublishError::NotPublished(error))
                }
                // Its directory was removed with it: it has no name any more, so it did not get this one either.
                _ if self.has_no_name() => Err(PublishError::NotPublished(error)),
                _ => Err(PublishError::Unknown(error)),
            };
        }
        self.is_published = true;
        sync_names(&self.directory).map_err(PublishError::Unknown)
    }
}

impl WriteAt for FileSink {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn read_back_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

impl Drop for FileSink {
    fn drop(&mut self) {
        if !self.is_published && FileIdentity::at(&self.temporary) == Some(self.identity) {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_file_has_its_name_only_after_it_is_published() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("x.stow");
        let mut sink = FileSink::create(&target, false).unwrap();
        sink.append(b"hello ").unwrap();
        sink.append(b"guest").unwrap();
        sink.sync().unwrap();
        assert!(!target.exists());
        sink.publish().unwrap();
        drop(sink);
        assert_eq!(names(directory.path()), ["x.stow"]);
        assert_eq!(std::fs::read(&target).unwrap(), b"hello guest");
        assert_eq!(
            target.metadata().unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn pieces_of_all_sizes_come_out_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("x.stow");
        let mut sink = FileSink::create(&target, false).unwrap();
        let mut expected = Vec::new();
        for (number, len) in (1..).zip([
            3,
            LARGE_LEN,
            70_000,
            0,
            9 << 20,
            LARGE_LEN - 1,
            1,
            WRITE_LEN,
        ]) {
            sink.append(&vec![number; len]).unwrap();
            expected.resize(expected.len() + len, number);
        }
        sink.sync().unwrap();
        sink.publish().unwrap();
        assert!(std::fs::read(&target).unwrap() == expected);
    }

    #[test]
    fn what_is_written_in_its_place_leaves_holes_between() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("x.stow");
        let mut sink = FileSink::create(&target, false).unwrap();
        let places = sink.places().unwrap();
        places.write_all_at(&[2; 4096], 8 << 20).unwrap();
        places.write_all_at(&[1; 4096], 0).unwrap();
        let mut back = [0; 2];
        places.read_back_at(&mut back, 8 << 20).unwrap();
        assert_eq!(back, [2, 2]);
        sink.append_from((8 << 20) + 4096).unwrap();
        sink.append(b"end").unwrap();
        sink.sync().unwrap();
        sink.publish().unwrap();
        let source = FileSource::open(&target).unwrap();
        assert_eq!(source.len(), (8 << 20) + 4096 + 3);
        let mut bytes = [0; 4];
        source.read_exact_at(&mut bytes, (8 << 20) + 4095).unwrap();
        assert_eq!(&bytes, b"\x02end");
        assert!((4096..=8 << 20).contains(&source.next_data(4096).unwrap()));
        assert_eq!(source.next_data(source.len()).unwrap(), source.len());
    }

    #[test]
    fn a_dropped_sink_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut sink = FileSink::create(&directory.path().join("x.stow"), false).unwrap();
        sink.append(&[1; 3 << 20]).unwrap();
        drop(sink);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn an_existing_file_is_never_replaced_unasked_not_even_at_the_last_moment() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("x.stow");
        let mut sink = FileSink::create(&target, false).unwrap();
        std::fs::write(&target, b"somebody else's").unwrap();
        assert!(matches!(
            FileSink::create(&target, false),
            Err(StoreError::Exists { .. })
        ));
        assert!(matches!(sink.publish(), Err(PublishError::NotPublished(_))));
        drop(sink);
        assert_eq!(std::fs::read(&target).unwrap(), b"somebody else's");
        let mut sink = FileSink::create(&target, true).unwrap();
        sink.append(b"ours").unwrap();
        sink.publish().unwrap();
        drop(sink);
        assert_eq!(std::fs::read(&target).unwrap(), b"ours");
        assert_eq!(names(directory.path()), ["x.stow"]);
    }

    #[test]
    fn a_file_removed_with_its_directory_was_not_published() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let mut sink = FileSink::create(&inner.join("x.stow"), false).unwrap();
        std::fs::remove_dir_all(&inner).unwrap();
        assert!(matches!(sink.publish(), Err(PublishError::NotPublished(_))));
    }

    #[test]
    fn nothing_but_a_file_is_ever_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("file"), b"").unwrap();
        std::fs::create_dir(at("dir")).unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        assert!(check_target(&at("file"), true).is_ok());
        for name in ["dir", "link", "/dev/null"] {
            let refused = check_target(&at(name), true);
            assert!(
                matches!(refused, Err(StoreError::NotAFile { .. })),
                "{name}"
            );
        }
        for name in ["..", "new/", "new/.", "dir/"] {
            let refused = FileSink::create(&at(name), true);
            assert!(
                matches!(refused, Err(StoreError::NotALocation { .. })),
                "{name}"
            );
        }
        assert_eq!(names(directory.path()).len(), 3);
    }

    #[test]
    fn a_file_system_without_exclusive_rename_is_served_by_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| directory.path().join(name));
        std::fs::write(&from, b"ours").unwrap();
        rename_by_link(&from, &to).unwrap();
        assert_eq!(names(directory.path()), ["to"]);
        std::fs::write(&from, b"another").unwrap();
        let refused = rename_by_link(&from, &to).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&to).unwrap(), b"ours");
    }

    #[test]
    fn a_file_in_use_is_not_changed_and_a_file_being_changed_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.stow");
        std::fs::write(&path, b"x").unwrap();
        let users = [(); 2].map(|()| FileSource::open(&path).unwrap());
        users
            .iter()
            .for_each(|user| user.lock_shared(&path).unwrap());
        let inherited = users[1].file().try_clone().unwrap();
        drop(users);
        assert!(matches!(
            open_to_change(&path),
            Err(StoreError::InUse { .. })
        ));
        drop(inherited);
        let editor = open_to_change(&path).unwrap();
        let user = FileSource::open(&path).unwrap();
        assert!(matches!(
            user.lock_shared(&path),
            Err(StoreError::BeingChanged { .. })
        ));
        drop(editor);
        user.lock_shared(&path).unwrap();
    }

    #[test]
    fn a_directory_is_no_source() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(
            FileSource::open(directory.path()),
            Err(StoreError::NotAFile { .. })
        ));
    }
}
