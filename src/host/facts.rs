//! QEMU binaries, devices, free space and files of this machine.

use std::env;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use serde::{Deserialize, Serialize};

use super::error::HostError;
use super::facts_cache;
use crate::digest::{Digest, Hasher};

/// The QEMU that is looked for in `PATH`.
pub const QEMU_BINARY: &str = "qemu-system-x86_64";

/// A QEMU's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// The 10 of 10.0.2.
    pub major: u32,
    /// The first 0 of 10.0.2.
    pub minor: u32,
    /// The 2 of 10.0.2.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A machine type by its name and, for an alias, what it stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineName {
    /// `pc-q35-10.0`, or the alias `q35`.
    pub name: String,
    /// For an alias the resolved name.
    pub alias_of: Option<String>,
}

/// What a QEMU binary tells of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuFacts {
    /// The binary.
    pub path: PathBuf,
    /// Its version.
    pub version: Version,
    /// What stands in parentheses behind the version: the distribution's own.
    pub package: Option<String>,
    /// Its machine types, aliases among them.
    pub machines: Vec<MachineName>,
    /// Its accelerators: `tcg`, `kvm`, … Whether this host has KVM is another question.
    pub accelerators: Vec<String>,
}

/// Who may use userfaultfd, on which a lazy restore stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Userfaultfd {
    /// We may.
    Available,
    /// The kernel has it but not for this user.
    NotPermitted,
    /// The kernel lacks it.
    Missing,
}

impl Userfaultfd {
    /// Why it cannot be used; `None` if it can.
    pub fn obstacle(self) -> Option<&'static str> {
        match self {
            Userfaultfd::Available => None,
            Userfaultfd::NotPermitted => Some("this user may not use userfaultfd"),
            Userfaultfd::Missing => Some("this kernel has no userfaultfd"),
        }
    }
}

/// Enough to see that a file was changed or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Its file system.
    pub dev: u64,
    /// Its inode there.
    pub inode: u64,
    /// Its length in bytes; 0 for a device.
    pub len: u64,
    /// When its content changed last, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// When its inode changed last, in nanoseconds since 1970.
    pub ctime_ns: i64,
}

impl FileIdentity {
    /// Of the file with this path, links followed.
    pub fn of(path: &Path) -> Result<Self, HostError> {
        let metadata = fs::metadata(path).map_err(|source| HostError::File {
            act: "read",
            path: path.to_owned(),
            source,
        })?;
        Ok(FileIdentity::from_metadata(&metadata))
    }

    /// Of a file that was looked at already.
    pub fn from_metadata(metadata: &Metadata) -> Self {
        FileIdentity {
            dev: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            mtime_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

/// The SHA-256 of a file's bytes, read to its end.
///
/// # Errors
/// What the kernel says.
pub fn file_digest(path: &Path) -> io::Result<Digest> {
    // It goes on to the end.
    file_digest_while(path, &|| true).map(Option::unwrap_or_default)
}

/// As [`file_digest`]; `None` if `may_go_on` said no, which it is asked every MiB.
///
/// # Errors
/// What the kernel says.
pub fn file_digest_while(path: &Path, may_go_on: &dyn Fn() -> bool) -> io::Result<Option<Digest>> {
    let mut file = File::open(path)?;
    let mut hasher = Hasher::new();
    let mut buf = vec![0; 1 << 20];
    while may_go_on() {
        match io::Read::read(&mut file, &mut buf)? {
            0 => return Ok(Some(hasher.finish())),
            len => hasher.update(&buf[..len]),
        }
    }
    Ok(None)
}

/// Bytes that we may still write into the file system of this directory.
pub fn free_space(directory: &Path) -> Result<u64, HostError> {
    let facts = rustix::fs::statvfs(directory).map_err(|errno| HostError::File {
        act: "read the free space of",
        path: directory.to_owned(),
        source: errno.into(),
    })?;
    Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
}

/// Whether we may use `/dev/kvm`.
pub fn is_kvm_accessible() -> bool {
    is_read_write("/dev/kvm")
}

/// Whether we may use userfaultfd for what the kernel does in our name, too: QEMU needs it so.
///
/// Source: kernel `Documentation/admin-guide/mm/userfaultfd.rst`.
pub fn userfaultfd() -> Userfaultfd {
    // SAFETY: the descriptor is closed at once, so no memory is ever watched with it.
    let opened = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC) };
    match opened.map(drop) {
        Ok(()) => Userfaultfd::Available,
        Err(Errno::NOSYS) => Userfaultfd::Missing,
        Err(_) if is_read_write("/dev/userfaultfd") => Userfaultfd::Available,
        Err(_) => Userfaultfd::NotPermitted,
    }
}

fn is_read_write(path: &str) -> bool {
    File::options().read(true).write(true).open(path).is_ok()
}

/// The first QEMU in `PATH`.
///
/// # Errors
/// [`HostError::NoQemu`] if there is none.
pub fn find_qemu() -> Result<PathBuf, HostError> {
    find_program(QEMU_BINARY).ok_or_else(|| HostError::NoQemu {
        binary: QEMU_BINARY.to_owned(),
    })
}

/// The first program of that name in `PATH`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut candidates = env::split_paths(&path).map(|directory| directory.join(name));
    candidates.find(|candidate| is_program(candidate))
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
}

impl QemuFacts {
    /// What a QEMU binary is and offers. It is asked, for which it runs three times for some 12 ms each, unless it was asked
    /// before and is untouched since.
    ///
    /// # Errors
    /// [`HostError::NotQemu`] if it does not answer as QEMU does.
    pub fn probe(binary: &Path) -> Result<Self, HostError> {
        if let Some(kept) = facts_cache::kept(binary) {
            return Ok(kept);
        }
        let facts = QemuFacts::ask(binary)?;
        facts_cache::keep(binary, &facts);
        Ok(facts)
    }

    fn ask(binary: &Path) -> Result<Self, HostError> {
        let (version, package) = version_and_package(binary)?;
        let machines = ask(binary, &["-machine", "help"])?;
        let accelerators = ask(binary, &["-accel", "help"])?;
        Ok(QemuFacts {
            path: binary.to_owned(),
            version,
            package,
            machines: parse_machines(&answer(binary, machines)?),
            accelerators: parse_accelerators(&answer(binary, accelerators)?),
        })
    }

    /// The name that a machine type resolves to; `None` if this QEMU does not have it.
    pub fn resolve_machine(&self, name: &str) -> Option<&str> {
        let found = self.machines.iter().find(|machine| machine.name == name)?;
        Some(found.alias_of.as_deref().unwrap_or(&found.name))
    }
}

/// The version of a QEMU binary, which runs once for some 12 ms.
///
/// # Errors
/// [`HostError::NotQemu`] if it does not answer as QEMU does.
pub fn qemu_version(binary: &Path) -> Result<Version, HostError> {
    version_and_package(binary).map(|(version, _)| version)
}

fn version_and_package(binary: &Path) -> Result<(Version, Option<String>), HostError> {
    let greeting = answer(binary, ask(binary, &["--version"])?)?;
    parse_version(&greeting).ok_or_else(|| HostError::NotQemu {
        path: binary.to_owned(),
        argument: "--version",
        answer: greeting.chars().take(200).collect(),
    })
}

/// Starts the binary, to say something on its standard output and end.
fn ask(binary: &Path, arguments: &[&str]) -> Result<Child, HostError> {
    let mut command = Command::new(binary);
    command.args(arguments).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().map_err(|source| not_run(binary, source))
}

/// What it said, when it has ended.
fn answer(binary: &Path, asked: Child) -> Result<String, HostError> {
    let output = asked.wait_with_output();
    let output = output.map_err(|source| not_run(binary, source))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn not_run(binary: &Path, source: io::Error) -> HostError {
    HostError::File {
        act: "run",
        path: binary.to_owned(),
        source,
    }
}

/// `QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)`
fn parse_version(text: &str) -> Option<(Version, Option<String>)> {
    let rest = text.strip_prefix("QEMU emulator version ")?;
    let line = rest.lines().next()?;
    let (number, package) = line.split_once(' ').unwrap_or((line, ""));
    let mut parts = number.split('.').map(|part| part.parse().ok());
    let version = Version {
        major: parts.next()??,
        minor: parts.next()??,
        micro: parts.next()??,
    };
    let package = package.trim().strip_prefix('(');
    let package = package.and_then(|it| it.strip_suffix(')'));
    Some((version, package.map(str::to_owned)))
}

/// `q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-10.0)`, below a heading.
fn parse_machines(text: &str) -> Vec<MachineName> {
    let lines = text.lines().skip(1);
    let machines = lines.filter_map(|line| {
        let (name, description) = line.split_once(' ')?;
        let alias = description.rsplit_once("(alias of ");
        let alias_of = alias.and_then(|(_, rest)| rest.split(')').next());
        Some(MachineName {
            name: name.to_owned(),
            alias_of: alias_of.map(str::to_owned),
        })
    });
    machines.collect()
}

/// One a line, below a heading.
fn parse_accelerators(text: &str) -> Vec<String> {
    let names = text.lines().skip(1).map(str::trim);
    names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_line_is_parsed_with_and_without_a_package() {
        let (version, package) =
            parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright\n")
                .unwrap();
        assert_eq!(version.to_string(), "10.0.2");
        assert_eq!(package.as_deref(), Some("Debian 1:10.0.2+ds-2"));
        let (version, package) = parse_version("QEMU emulator version 9.2.50").unwrap();
        assert!(
            version
                < Version {
                    major: 10,
                    minor: 0,
                    micro: 0
                }
                && package.is_none()
        );
        assert!(parse_version("BusyBox v1.36").is_none());
    }

    #[test]
    fn the_qemu_in_path_tells_what_it_offers() {
        let binary = find_qemu().expect("QEMU (Debian package qemu-system-x86)");
        let facts = QemuFacts::probe(&binary).unwrap();
        let resolved = facts.resolve_machine("q35").unwrap();
        assert!(resolved.starts_with("pc-q35-"), "{resolved}");
        assert_eq!(facts.resolve_machine(resolved), Some(resolved));
        assert_eq!(facts.resolve_machine("pc-q35-99.9"), None);
        assert!(facts.accelerators.iter().any(|name| name == "tcg"));
    }

    #[test]
    fn another_program_is_not_taken_for_qemu() {
        let error = QemuFacts::probe(Path::new("/bin/true")).unwrap_err();
        assert!(matches!(error, HostError::NotQemu { .. }));
    }

    #[test]
    fn a_rewritten_file_has_another_identity() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, "one").unwrap();
        let before = FileIdentity::of(&path).unwrap();
        assert_eq!(FileIdentity::of(&path).unwrap(), before);
        fs::write(&path, "two!").unwrap();
        assert_ne!(FileIdentity::of(&path).unwrap(), before);
    }

    #[test]
    fn there_is_free_space_somewhere() {
        assert!(free_space(Path::new("/tmp")).unwrap() > 0);
        assert!(free_space(Path::new("/nonexistent")).is_err());
    }
}
