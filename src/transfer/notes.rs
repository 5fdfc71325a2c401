//! What is remembered of an upload until it is completed: its id, and the MD5 of every part that the store acknowledged.
//!
//! Some stores list neither unfinished uploads nor what their parts hold; with these notes a copy from this host goes on all the
//! same. A note is believed only of a part that the store still lists, with its length. They lie in
//! `$XDG_STATE_HOME/vmstow/uploads`; where they cannot be written, uploads are not remembered, and that is all.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use crate::digest::Digest;
use crate::host::{Lasting, make_private_directory};
use crate::store::object::Bucket;

/// The notes about uploads to one object.
pub struct UploadNotes {
    /// `None` where there is no place for them.
    path: Option<PathBuf>,
}

impl UploadNotes {
    /// Nothing is read or made yet.
    pub fn of(bucket: &Bucket) -> Self {
        let name = Digest::of(format!("{} {}", bucket.server(), bucket.there()).as_bytes());
        let directory = Lasting::find().ok().map(|lasting| lasting.uploads_dir());
        UploadNotes {
            path: directory.map(|directory| directory.join(name.to_string())),
        }
    }

    /// The id of the upload, and the MD5s by number of part.
    pub fn read(&self) -> Option<(String, HashMap<u32, String>)> {
        let text = std::fs::read_to_string(self.path.as_ref()?).ok()?;
        let mut lines = text.lines();
        let id = lines.next().filter(|id| !id.is_empty())?;
        let part = |line: &str| {
            let (number, md5) = line.split_once(' ')?;
            // One that was cut off is none.
            (md5.len() == 32).then_some((number.parse().ok()?, md5.to_owned()))
        };
        Some((id.to_owned(), lines.filter_map(part).collect()))
    }

    /// A new upload has begun.
    pub fn begin(&self, id: &str) {
        let Some(path) = &self.path else {
            return;
        };
        if let Some(parent) = path.parent() {
            let _ = make_private_directory(parent);
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        if let Ok(mut file) = options.open(path) {
            let _ = writeln!(file, "{id}");
        }
    }

    /// The store has acknowledged a part.
    pub fn add(&self, number: u32, md5: &str) {
        let Some(path) = &self.path else {
            return;
        };
        if let Ok(mut file) = File::options().append(true).open(path) {
            // One write, so that lines of several workers do not mix.
            let _ = file.write_all(format!("{number} {md5}\n").as_bytes());
        }
    }

    /// The upload has ended.
    pub fn forget(&self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_read_and_half_a_line_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("uploads/x");
        let notes = UploadNotes {
            path: Some(path.clone()),
        };
        assert!(notes.read().is_none());
        notes.begin("the id");
        notes.add(7, "5d41402abc4b2a76b9719d911017c592");
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"8 5d41").unwrap();
        let (id, parts) = notes.read().unwrap();
        assert_eq!(id, "the id");
        assert_eq!(parts.len(), 1);
        assert!(parts.contains_key(&7));
        notes.begin("another");
        assert_eq!(
            notes.read().unwrap(),
            ("another".to_owned(), HashMap::new())
        );
        notes.forget();
        assert!(notes.read().is_none());
    }
}
