//! Where the guests of ours are noted while they run: one directory a guest.

use std::env;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use super::error::HostError;

/// The longest name of a guest, in bytes.
pub const NAME_LIMIT: usize = 64;

/// The longest path of a unix socket, in bytes; the kernel has room for 108 with the zero at the end.
pub const SOCKET_PATH_LIMIT: usize = 107;

/// The directory of all guests of this user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeDir {
    path: PathBuf,
}

/// The directory of one guest; that it exists is what makes the name taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDir {
    name: String,
    path: PathBuf,
}

impl RuntimeDir {
    /// Opens the runtime directory, and makes it if need be: that of [`RuntimeDir::usual_path`].
    ///
    /// # Errors
    /// As [`RuntimeDir::at`].
    pub fn open() -> Result<Self, HostError> {
        RuntimeDir::at(&RuntimeDir::usual_path())
    }

    /// Where the runtime directory is: `$VMSTOW_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/vmstow`, else `/run/vmstow` for root,
    /// else `/tmp/vmstow-UID`. Nothing is looked at or made.
    pub fn usual_path() -> PathBuf {
        let given = |name| env::var_os(name).filter(|value| !value.is_empty());
        let uid = geteuid().as_raw();
        match (given("VMSTOW_RUNTIME_DIR"), given("XDG_RUNTIME_DIR")) {
            (Some(path), _) => PathBuf::from(path),
            (None, Some(path)) => PathBuf::from(path).join("vmstow"),
            (None, None) if uid == 0 => PathBuf::from("/run/vmstow"),
            (None, None) => PathBuf::from(format!("/tmp/vmstow-{uid}")),
        }
    }

    /// Opens this directory, and makes it with mode 0700 if need be.
    ///
    /// # Errors
    /// [`HostError::UnsafeDirectory`] if it is a link, another user's, or writable by others.
    pub fn at(path: &Path) -> Result<Self, HostError> {
        let path = std::path::absolute(path).map_err(failed("find", path))?;
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&path);
        made.map_err(failed("create", &path))?;
        check_is_ours(&path)?;
        Ok(RuntimeDir { path })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory of a new guest. If the name is taken, `-2`, `-3`, … is put behind it.
    ///
    /// # Errors
    /// [`HostError::BadName`] unless [`is_name`], [`HostError::SocketPathTooLong`] if no monitor could listen there.
    pub fn create_guest(&self, name: &str) -> Result<GuestDir, HostError> {
        check_name(name)?;
        let mut number = 1_u32;
        loop {
            let guest = self.guest_dir(&numbered(name, number));
            match self.make(guest)? {
                Some(guest) => return Ok(guest),
                None => number += 1,
            }
        }
    }

    /// Makes the directory of a clone: `NAME-1`, or with the next number that is free.
    ///
    /// # Errors
    /// As [`RuntimeDir::create_guest`].
    pub fn create_clone(&self, name: &str) -> Result<GuestDir, HostError> {
        check_name(name)?;
        let mut number = 1_u32;
        loop {
            let guest = self.guest_dir(&suffixed(name, number));
            match self.make(guest)? {
                Some(guest) => return Ok(guest),
                None => number += 1,
            }
        }
    }

    /// Makes this directory; `None` if it is there.
    fn make(&self, guest: GuestDir) -> Result<Option<GuestDir>, HostError> {
        check_socket_path(&guest.qmp_socket())?;
        match DirBuilder::new().mode(0o700).create(&guest.path) {
            Ok(()) => Ok(Some(guest)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(failed("create", &guest.path)(error)),
        }
    }

    /// The directory of the guest with this name.
    ///
    /// # Errors
    /// [`HostError::NoSuchGuest`] if there is none.
    pub fn guest(&self, name: &str) -> Result<GuestDir, HostError> {
        check_name(name)?;
        let guest = self.guest_dir(name);
        match guest.path.is_dir() {
            true => Ok(guest),
            false => Err(HostError::NoSuchGuest {
                name: name.to_owned(),
            }),
        }
    }

    /// All guests that are noted, by name; whether they live is not looked at.
    pub fn guests(&self) -> Result<Vec<GuestDir>, HostError> {
        let entries = fs::read_dir(&self.path).map_err(failed("read", &self.path))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| is_name(name)).collect();
        names.sort();
        let guests = names.iter().map(|name| self.guest_dir(name));
        Ok(guests.filter(|guest| guest.path.is_dir()).collect())
    }

    fn guest_dir(&self, name: &str) -> GuestDir {
        GuestDir {
            name: name.to_owned(),
            path: self.path.join(name),
        }
    }
}

impl GuestDir {
    /// The directory at `path`, which another process of ours named.
    ///
    /// # Errors
    /// [`HostError::BadName`] if no guest's directory can be called so.
    pub fn at(path: &Path) -> Result<Self, HostError> {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.unwrap_or_default().to_owned();
        check_name(&name)?;
        let path = path.to_owned();
        Ok(GuestDir { name, path })
    }

    /// The same directory for a process that works in it: it stays this one even if another one gets its path.
    pub fn entered(self) -> Self {
        let path = PathBuf::from(".");
        GuestDir { path, ..self }
    }

    /// The guest's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where its monitor listens.
    pub fn qmp_socket(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }

    /// Where its process id is written, for people and scripts.
    pub fn pid_file(&self) -> PathBuf {
        self.path.join("pid")
    }

    /// Where its output goes.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Where it is described.
    pub fn description(&self) -> PathBuf {
        self.path.join("guest.json")
    }

    /// Where who gives it its memory tells how far that is.
    pub fn serving(&self) -> PathBuf {
        self.path.join("serving.json")
    }

    /// What who gives it its memory has to know.
    pub fn lazy(&self) -> PathBuf {
        self.path.join("lazy.json")
    }

    /// Where the monitor listens that its keeper holds.
    pub fn keeper_monitor(&self) -> PathBuf {
        self.path.join("keeper.qmp")
    }

    /// Where its keeper listens.
    pub fn keeper_socket(&self) -> PathBuf {
        self.path.join("keeper.sock")
    }

    /// Where it is noted that its image is damaged.
    pub fn damage(&self) -> PathBuf {
        self.path.join("damaged.json")
    }

    /// Where it is noted who verifies its image while it runs.
    pub fn verifier(&self) -> PathBuf {
        self.path.join("verifier.json")
    }

    /// The libvirt domain XML that it was started from, complete; guests that were not started from any have none.
    pub fn domain_xml(&self) -> PathBuf {
        self.path.join("domain.xml")
    }

    /// Which programs work for it besides QEMU.
    pub fn side_programs(&self) -> PathBuf {
        self.path.join("side.json")
    }

    /// Who ends these programs when QEMU has ended.
    pub fn attendant(&self) -> PathBuf {
        self.path.join("attendant.json")
    }

    /// Where such a program listens for QEMU.
    pub fn side_socket(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.sock"))
    }

    /// What such a program prints.
    pub fn side_messages(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.messages"))
    }

    /// Where the directory of its throwaway overlays is named, if it has any.
    pub fn overlays(&self) -> PathBuf {
        self.path.join("overlays")
    }

    /// Removes the directory and all in it, and the guest's throwaway overlays; that they are gone already is no error.
    pub fn remove(&self) -> Result<(), HostError> {
        super::overlays::remove_of(self)?;
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &self.path)(error))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a guest may have this name.
pub fn is_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    name.len() <= NAME_LIMIT
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(is_allowed)
}

/// The nearest name that a guest may have: every other character becomes `-`.
pub fn sanitise_name(text: &str) -> String {
    let replaced = text.chars().map(|letter| match letter {
        '.' | '_' | '-' => letter,
        letter if letter.is_ascii_alphanumeric() => letter,
        _ => '-',
    });
    let replaced: String = replaced.collect();
    let trimmed = replaced.trim_start_matches(['.', '_', '-']);
    match trimmed.get(..NAME_LIMIT).unwrap_or(trimmed) {
        "" => "guest".to_owned(),
        name => name.to_owned(),
    }
}

/// The name for the `number`-th guest of that name, no longer than a name may be.
fn numbered(name: &str, number: u32) -> String {
    match number {
        1 => name.to_owned(),
        _ => suffixed(name, number),
    }
}

fn suffixed(name: &str, number: u32) -> String {
    let suffix = format!("-{number}");
    let room = NAME_LIMIT - suffix.len();
    format!("{}{suffix}", name.get(..room).unwrap_or(name))
}

fn check_name(name: &str) -> Result<(), HostError> {
    match is_name(name) {
        true => Ok(()),
        false => Err(HostError::BadName {
            name: name.to_owned(),
        }),
    }
}

fn check_socket_path(path: &Path) -> Result<(), HostError> {
    match path.as_os_str().len() <= SOCKET_PATH_LIMIT {
        true => Ok(()),
        false => Err(HostError::SocketPathTooLong {
            path: path.to_owned(),
            limit: SOCKET_PATH_LIMIT,
        }),
    }
}

pub(super) fn check_is_ours(path: &Path) -> Result<(), HostError> {
    let metadata = fs::symlink_metadata(path).map_err(failed("read", path))?;
    let mode = metadata.permissions().mode() & 0o7777;
    let problem = if !metadata.is_dir() {
        "it is not a directory itself".to_owned()
    } else if metadata.uid() != geteuid().as_raw() {
        format!("it belongs to user {}", metadata.uid())
    } else if mode & 0o022 != 0 {
        format!("others may write to it (mode {mode:04o})")
    } else {
        return Ok(());
    };
    Err(HostError::UnsafeDirectory {
        path: path.to_owned(),
        problem,
    })
}

pub(super) fn failed(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HostError {
    let path = path.to_owned();
    move |source| HostError::File { act, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runtime() -> (tempfile::TempDir, RuntimeDir) {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::at(&dir.path().join("a/b")).unwrap();
        (dir, runtime)
    }

    #[test]
    fn a_taken_name_gets_a_number() {
        let (_dir, runtime) = runtime();
        let names = [(); 3].map(|()| runtime.create_guest("web").unwrap().name().to_owned());
        assert_eq!(names, ["web", "web-2", "web-3"]);
        runtime.guest("web-2").unwrap().remove().unwrap();
        assert!(matches!(
            runtime.guest("web-2"),
            Err(HostError::NoSuchGuest { .. })
        ));
        assert_eq!(runtime.guests().unwrap().len(), 2);
        assert_eq!(runtime.create_guest("web").unwrap().name(), "web-2");
    }

    #[test]
    fn clones_are_counted_from_one() {
        let (_dir, runtime) = runtime();
        runtime.create_guest("web-2").unwrap();
        let names = [(); 3].map(|()| runtime.create_clone("web").unwrap().name().to_owned());
        assert_eq!(names, ["web-1", "web-3", "web-4"]);
    }

    #[test]
    fn the_directory_of_a_guest_is_for_its_user_alone() {
        let (_dir, runtime) = runtime();
        let guest = runtime.create_guest("web").unwrap();
        let mode = fs::metadata(guest.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused_and_so_is_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            RuntimeDir::at(&open),
            Err(HostError::UnsafeDirectory { .. })
        ));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(matches!(
            RuntimeDir::at(&link),
            Err(HostError::UnsafeDirectory { .. })
        ));
    }

    #[test]
    fn a_monitor_path_that_the_kernel_would_not_take_is_refused_beforehand() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::at(&dir.path().join("x".repeat(90))).unwrap();
        let error = runtime.create_guest("web").unwrap_err();
        assert!(matches!(error, HostError::SocketPathTooLong { .. }));
        assert!(runtime.guests().unwrap().is_empty());
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "-x",
            ".hidden",
            "h\u{f6}st",
            &"x".repeat(65),
        ] {
            assert!(!is_name(name), "{name}");
        }
        assert_eq!(sanitise_name("../h\u{f6}st 1"), "h-st-1");
        assert_eq!(sanitise_name("..."), "guest");
    }

    proptest! {
        #[test]
        fn every_sanitised_and_numbered_name_is_a_name(text in ".{0,90}", number in 1_u32..) {
            let name = sanitise_name(&text);
            prop_assert!(is_name(&name));
            prop_assert!(is_name(&numbered(&name, number)));
        }
    }
}
