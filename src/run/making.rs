//! What is made for a guest before it is started: files of firmware variables, directories of TPMs.

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::{HostError, make_from_template, make_private_directory};

/// What was made. Dropped, it is removed, unless [`Made::keep`] was called: then a guest has it.
#[derive(Debug, Default)]
pub struct Made {
    files: Vec<PathBuf>,
    directories: Vec<PathBuf>,
}

impl Made {
    /// Makes a file from its template unless it is there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn file(&mut self, path: &Path, template: &Path) -> Result<(), HostError> {
        if path.exists() {
            return Ok(());
        }
        if let Some(directory) = path.parent() {
            self.directory(directory)?;
        }
        make_from_template(path, template)?;
        self.files.push(path.to_owned());
        Ok(())
    }

    /// Makes a directory, and those above it, unless it is there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn directory(&mut self, path: &Path) -> Result<(), HostError> {
        let missing = path
            .ancestors()
            .take_while(|it| !it.as_os_str().is_empty() && !it.exists());
        let missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
        make_private_directory(path)?;
        // The innermost one goes first.
        self.directories.splice(0..0, missing);
        Ok(())
    }

    /// Lets all of it stay.
    pub fn keep(mut self) {
        self.files.clear();
        self.directories.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
        for directory in &self.directories {
            // What a program put into a directory that was made for it alone goes with it.
            let _ = fs::remove_file(directory.join(".lock"));
            let _ = fs::remove_file(directory.join("tpm2-00.permall"));
            let _ = fs::remove_dir(directory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_for_nothing_is_removed_and_what_was_there_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("template"), "t").unwrap();
        let make = || {
            let mut made = Made::default();
            made.file(&at("a/b/vars.fd"), &at("template")).unwrap();
            made.directory(&at("a/tpm")).unwrap();
            made.file(&at("a/b/vars.fd"), &at("template")).unwrap();
            made
        };
        drop(make());
        assert!(!at("a").exists() && at("template").exists());
        make().keep();
        assert!(at("a/b/vars.fd").exists() && at("a/tpm").exists());
        drop(make());
        assert!(at("a/b/vars.fd").exists() && at("a/tpm").exists());
    }
}
