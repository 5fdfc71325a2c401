//! Where the throwaway overlays of a guest's disks lie, how they are made, and how they go with the guest.
//!
//! A directory holds the overlays of one guest and a list of them, [`LIST`]. The guest's own directory names it, so that
//! whoever removes that removes the overlays too: the files of the list and nothing else.

use std::env;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::geteuid;
use serde_json::json;

use super::error::HostError;
use super::facts::find_program;
use super::runtime::{GuestDir, check_is_ours, failed};

/// The names of a directory's overlays, a line each. Where it is, disks are thrown away with their guest.
const LIST: &str = ".vmstow-throwaway";

/// The program that makes overlays.
const QEMU_IMG: &str = "qemu-img";

/// Where the directories of overlays are made: on a real disk, for they grow with what the guests write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverlayRoot {
    path: PathBuf,
    qemu_img: PathBuf,
}

/// The overlays of one guest.
#[derive(Debug)]
pub struct Overlays {
    path: PathBuf,
    qemu_img: PathBuf,
}

impl OverlayRoot {
    /// `given`, else `$VMSTOW_OVERLAY_DIR`, else `/var/tmp/vmstow-UID`. It is not made yet.
    ///
    /// # Errors
    /// [`HostError::NoQemuImg`].
    pub fn find(given: Option<&Path>) -> Result<Self, HostError> {
        let qemu_img = find_program(QEMU_IMG).ok_or(HostError::NoQemuImg)?;
        let named = env::var_os("VMSTOW_OVERLAY_DIR").filter(|value| !value.is_empty());
        let path = match (given, named) {
            (Some(path), _) => path.to_owned(),
            (None, Some(path)) => PathBuf::from(path),
            (None, None) => PathBuf::from(format!("/var/tmp/vmstow-{}", geteuid().as_raw())),
        };
        let path = std::path::absolute(&path).map_err(failed("find", &path))?;
        Ok(OverlayRoot { path, qemu_img })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory for the overlays of a guest, and notes it in the guest's own directory.
    ///
    /// # Errors
    /// [`HostError::UnsafeDirectory`] if others could put something in its place; what the kernel says.
    pub fn create(&self, guest: &GuestDir) -> Result<Overlays, HostError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder
            .create(&self.path)
            .map_err(failed("create", &self.path))?;
        check_is_ours(&self.path)?;
        let path = self.create_below(guest.name())?;
        let overlays = Overlays {
            path,
            qemu_img: self.qemu_img.clone(),
        };
        let noted = overlays.note(guest);
        if noted.is_err() {
            // Nothing is in it, and the error that counts is the one before.
            let _ = remove(&overlays.path);
        }
        noted.map(|()| overlays)
    }

    /// A directory named after the guest; guests of another runtime directory may have the same name.
    fn create_below(&self, name: &str) -> Result<PathBuf, HostError> {
        let mut number = 1_u32;
        loop {
            let path = match number {
                1 => self.path.join(name),
                _ => self.path.join(format!("{name}+{number}")),
            };
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(failed("create", &path)(error)),
            }
        }
    }
}

impl Overlays {
    fn note(&self, guest: &GuestDir) -> Result<(), HostError> {
        let list = self.path.join(LIST);
        fs::write(&list, "").map_err(failed("write", &list))?;
        let place = guest.overlays();
        fs::write(&place, self.path.as_os_str().as_encoded_bytes()).map_err(failed("write", &place))
    }

    /// Makes an overlay over `base`, whose format is not guessed: what the guest wrote to it could deceive.
    ///
    /// # Errors
    /// [`HostError::NoOverlay`] with the words of qemu-img: no such file, another format, a QEMU that writes to it.
    pub fn make(&self, name: &str, base: &Path, format: &str) -> Result<PathBuf, HostError> {
        self.refuse_written(base, format)?;
        let overlay = self.file(name)?;
        let options = ["create", "-q", "-f", "qcow2", "-F", format, "-b"];
        self.run(base, &options, &[base, &overlay])?;
        Ok(overlay)
    }

    /// The path of a file of that name, which is removed with the others.
    fn file(&self, name: &str) -> Result<PathBuf, HostError> {
        let list = self.path.join(LIST);
        let opened = File::options().append(true).open(&list);
        let noted = opened.and_then(|mut list| writeln!(list, "{name}"));
        noted.map_err(failed("write", &list))?;
        Ok(self.path.join(name))
    }

    /// A guest that writes to the file holds QEMU's lock on it. `create` does not ask for it, and for a raw file neither
    /// does anything that only looks: 512 bytes are copied.
    fn refuse_written(&self, base: &Path, format: &str) -> Result<(), HostError> {
        if format != "raw" {
            return self.run(base, &["info", "-f", format], &[base]);
        }
        let found = fs::metadata(base).map_err(failed("read", base))?;
        let driver = match found.file_type().is_block_device() {
            true => "host_device",
            false if found.len() < 512 => return Ok(()),
            false => "file",
        };
        let beginning = json!({
            "driver": "raw",
            "size": 512,
            "file": { "driver": driver, "filename": base.display().to_string() },
        });
        let beginning = format!("json:{beginning}");
        let copy = self.file("probe")?;
        let options = ["convert", "-O", "raw", &beginning];
        let copied = self.run(base, &options, &[&copy]);
        let _ = fs::remove_file(&copy);
        copied
    }

    fn run(&self, base: &Path, options: &[&str], files: &[&Path]) -> Result<(), HostError> {
        let run = Command::new(&self.qemu_img)
            .args(options)
            .args(files)
            .stdin(Stdio::null())
            .output()
            .map_err(failed("run", &self.qemu_img))?;
        match run.status.success() {
            true => Ok(()),
            false => Err(HostError::NoOverlay {
                base: base.to_owned(),
                words: String::from_utf8_lossy(&run.stderr).trim().to_owned(),
            }),
        }
    }
}

/// Whether a disk is thrown away with its guest.
pub fn is_throwaway(disk: &Path) -> bool {
    disk.parent()
        .is_some_and(|directory| directory.join(LIST).exists())
}

/// Removes the overlays that a guest's directory names, if it names any; that they are gone is no error.
pub(super) fn remove_of(guest: &GuestDir) -> Result<(), HostError> {
    let place = guest.overlays();
    match fs::read_to_string(&place) {
        Ok(path) => remove(Path::new(&path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("read", &place)(error)),
    }
}

/// Removes the files that the list names, the list, and the directory if nothing else is in it.
fn remove(directory: &Path) -> Result<(), HostError> {
    let list = directory.join(LIST);
    let names = match fs::read_to_string(&list) {
        Ok(names) => names,
        // Without a list it is no directory of ours, or no more.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("read", &list)(error)),
    };
    let is_here = |name: &&str| !name.is_empty() && !name.contains('/') && !name.starts_with('.');
    for name in names.lines().filter(is_here).chain([LIST]) {
        let path = directory.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &path)(error));
            }
            _ => {}
        }
    }
    // Somebody else's files stay, and the directory with them.
    let _ = fs::remove_dir(directory);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::RuntimeDir;

    fn scene() -> (tempfile::TempDir, GuestDir, OverlayRoot) {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::at(&dir.path().join("run")).unwrap();
        let root = OverlayRoot::find(Some(&dir.path().join("overlays"))).unwrap();
        let guest = runtime.create_guest("web").unwrap();
        (dir, guest, root)
    }

    #[test]
    fn overlays_go_with_their_guest_and_nothing_else_does() {
        let (dir, guest, root) = scene();
        let base = dir.path().join("base");
        fs::write(&base, [7; 65536]).unwrap();
        let overlays = root.create(&guest).unwrap();
        let overlay = overlays.make("disk0.qcow2", &base, "raw").unwrap();
        assert!(overlay.exists() && is_throwaway(&overlay) && !is_throwaway(&base));
        let other = overlay.with_file_name("mine");
        fs::write(&other, "x").unwrap();
        guest.remove().unwrap();
        assert!(!overlay.exists() && other.exists() && !guest.path().exists());
        assert_eq!(fs::read(&base).unwrap(), [7; 65536]);
    }

    #[test]
    fn guests_of_the_same_name_get_directories_of_their_own() {
        let (_dir, guest, root) = scene();
        let first = root.create(&guest).unwrap();
        let second = root.create(&guest).unwrap();
        assert_ne!(first.path, second.path);
    }

    #[test]
    fn a_list_that_leads_elsewhere_removes_nothing_there() {
        let (dir, guest, root) = scene();
        let victim = dir.path().join("victim");
        fs::write(&victim, "x").unwrap();
        let overlays = root.create(&guest).unwrap();
        fs::write(overlays.path.join(LIST), "../../victim\n..\n").unwrap();
        guest.remove().unwrap();
        assert!(victim.exists() && !overlays.path.exists());
        let unlisted = scene();
        fs::write(
            unlisted.1.overlays(),
            dir.path().as_os_str().as_encoded_bytes(),
        )
        .unwrap();
        unlisted.1.remove().unwrap();
        assert!(victim.exists());
    }

    #[test]
    fn a_file_that_is_not_there_gives_the_words_of_qemu_img() {
        let (dir, guest, root) = scene();
        let overlays = root.create(&guest).unwrap();
        let error = overlays.make("d.qcow2", &dir.path().join("none"), "qcow2");
        let error = error.unwrap_err();
        assert!(
            matches!(&error, HostError::NoOverlay { words, .. } if words.contains("No such file")),
            "{error:?}"
        );
    }
}
