//! What of a guest has to outlast its runs: the state of its TPM, the variables of its firmware, where it moved.
//!
//! Where its XML names no place for them, they lie in `$XDG_STATE_HOME/vmstow` (or `~/.local/state/vmstow`): `tpm/GUEST/` and
//! `nvram/GUEST_VARS.fd`, where `GUEST` is its UUID if its XML gives one, else its name. Records of guests that move from here lie in
//! `moves`, of those that move here in `arrivals`.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::error::HostError;
use super::keys::state_directory;
use super::runtime::failed;

/// Where these things lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lasting {
    path: PathBuf,
}

impl Lasting {
    /// The usual place; nothing is looked at or made.
    ///
    /// # Errors
    /// [`HostError::NoHome`].
    pub fn find() -> Result<Self, HostError> {
        let path = state_directory().ok_or(HostError::NoHome {
            what: "what has to outlast a guest's runs",
        })?;
        Ok(Lasting { path })
    }

    /// The directory of a TPM's state.
    pub fn tpm(&self, guest: &str) -> PathBuf {
        self.path.join("tpm").join(guest)
    }

    /// The directory of the records of guests that move from here.
    pub fn moves(&self) -> PathBuf {
        self.path.join("moves")
    }

    /// The directory of the records, and images, of guests that move here.
    pub fn arrivals(&self) -> PathBuf {
        self.path.join("arrivals")
    }

    /// The directory of notes about uploads that did not end.
    pub fn uploads_dir(&self) -> PathBuf {
        self.path.join("uploads")
    }

    /// The directory of the files that hold firmware variables.
    pub fn nvram_dir(&self) -> PathBuf {
        self.path.join("nvram")
    }
}

/// Makes a file from a template unless it is there. Nobody ever sees half of it.
///
/// # Errors
/// What the kernel says.
pub fn make_from_template(path: &Path, template: &Path) -> Result<(), HostError> {
    if path.exists() {
        return Ok(());
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    make_private_directory(directory)?;
    let mut source = File::open(template).map_err(failed("read", template))?;
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed("create", path))?;
    io::copy(&mut source, &mut file).map_err(failed("write", path))?;
    match file.persist_noclobber(path) {
        // Somebody else was first.
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed("create", path)(error.error)),
        Ok(_) => Ok(()),
    }
}

/// Makes a directory that is this user's alone, and those above it, unless it is there.
///
/// # Errors
/// What the kernel says.
pub fn make_private_directory(path: &Path) -> Result<(), HostError> {
    if fs::metadata(path).is_ok_and(|it| it.is_dir()) {
        return Ok(());
    }
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(path).map_err(failed("create", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_made_from_its_template_once() {
        let dir = tempfile::tempdir().unwrap();
        let (path, template) = (dir.path().join("a/b/vars.fd"), dir.path().join("template"));
        fs::write(&template, "empty").unwrap();
        make_from_template(&path, &template).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "empty");
        fs::write(&path, "written by the guest").unwrap();
        make_from_template(&path, &template).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "written by the guest");
        assert!(make_from_template(&dir.path().join("c"), &dir.path().join("none")).is_err());
    }
}
