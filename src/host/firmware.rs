//! The firmware descriptors of this host: what each of its firmware images is and can do, as JSON.
//!
//! Three directories hold them, from the user's own to the distribution's: `$XDG_CONFIG_HOME/qemu/firmware` (or
//! `~/.config/qemu/firmware`), `/etc/qemu/firmware`, `/usr/share/qemu/firmware`. The names of all are sorted together, and
//! of two files of one name only the one of the first directory counts; if that is empty, neither does.
//!
//! Source: QEMU `docs/interop/firmware.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::keys::below;

/// The directories of the system, the one that counts most first.
const SYSTEM_DIRECTORIES: [&str; 2] = ["/etc/qemu/firmware", "/usr/share/qemu/firmware"];

/// The longest descriptor that is read; real ones have less than a kilobyte.
const MOST_BYTES: u64 = 1 << 20;

/// A descriptor as it lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareDescriptor {
    /// The file.
    pub path: PathBuf,
    /// Its text: JSON, unless somebody wrote something else.
    pub text: String,
}

/// All descriptors of this host, in the order in which they count. What cannot be read is left out.
pub fn firmware_descriptors() -> Vec<FirmwareDescriptor> {
    let own = below("XDG_CONFIG_HOME", ".config").map(|config| config.join("qemu/firmware"));
    let system = SYSTEM_DIRECTORIES.map(PathBuf::from);
    descriptors_in(&own.into_iter().chain(system).collect::<Vec<_>>())
}

/// The descriptors in these directories, the first of which counts most.
fn descriptors_in(directories: &[PathBuf]) -> Vec<FirmwareDescriptor> {
    let mut by_name = BTreeMap::new();
    for directory in directories.iter().rev() {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            if path.extension().is_some_and(|ending| ending == "json")
                && let Some(name) = path.file_name()
            {
                by_name.insert(name.to_owned(), path);
            }
        }
    }
    let read = by_name.into_values().filter_map(|path| {
        let text = read(&path)?;
        Some(FirmwareDescriptor { path, text })
    });
    read.collect()
}

/// The text of a descriptor; `None` of an empty one, which says that there is none of that name.
fn read(path: &Path) -> Option<String> {
    let len = fs::metadata(path).ok()?.len();
    let text = fs::read_to_string(path)
        .ok()
        .filter(|_| len <= MOST_BYTES)?;
    (!text.trim().is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_decides_the_order_and_the_first_directory_decides_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let directories = ["own", "etc", "usr"].map(|name| dir.path().join(name));
        let files = [
            ("own/20-mine.json", "{}"),
            ("own/60-off.json", ""),
            ("etc/50-both.json", "{\"of\": \"etc\"}"),
            ("etc/readme", "{}"),
            ("usr/10-first.json", "{}"),
            ("usr/50-both.json", "{\"of\": \"usr\"}"),
            ("usr/60-off.json", "{}"),
        ];
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let found = descriptors_in(&directories);
        let names: Vec<_> = found
            .iter()
            .map(|one| one.path.strip_prefix(dir.path()).unwrap().to_str().unwrap())
            .collect();
        assert_eq!(
            names,
            ["usr/10-first.json", "own/20-mine.json", "etc/50-both.json"]
        );
        assert_eq!(found[2].text, "{\"of\": \"etc\"}");
    }

    #[test]
    fn directories_that_are_not_there_hold_nothing() {
        assert!(descriptors_in(&[PathBuf::from("/nonexistent")]).is_empty());
    }
}
