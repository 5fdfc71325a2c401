//! What QEMU binaries said of themselves, kept so that they need not be asked each time: that takes as long as some of
//! our restores.
//!
//! One file a binary in `$XDG_CACHE_HOME/vmstow`, else `~/.cache/vmstow`. What is kept counts as long as the binary is the same
//! file, untouched; a script that starts some binary may start another one tomorrow, so nothing is kept of scripts.

use std::fs::{self, DirBuilder, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use super::facts::{FileIdentity, QemuFacts};
use super::keys::directory_of;
use crate::digest::Digest;

/// The first bytes of a program that is no script.
const ELF: [u8; 4] = *b"\x7fELF";

#[derive(Serialize, Deserialize)]
struct Kept {
    /// The program that kept it: another one may ask for more.
    tool: String,
    identity: FileIdentity,
    facts: QemuFacts,
}

/// What is known of a binary; `None` if it has to be asked.
pub fn kept(binary: &Path) -> Option<QemuFacts> {
    let mut file = File::open(place(binary)?).ok()?;
    let is_ours = file.metadata().ok()?.uid() == geteuid().as_raw();
    let mut text = Vec::new();
    file.read_to_end(&mut text).ok()?;
    let kept: Kept = serde_json::from_slice(&text).ok()?;
    let is_same = kept.tool == env!("CARGO_PKG_VERSION")
        && kept.facts.path == binary
        && kept.identity == FileIdentity::of(binary).ok()?;
    (is_ours && is_same).then_some(kept.facts)
}

/// Keeps what a binary said. Where that cannot be done it is asked again next time.
pub fn keep(binary: &Path, facts: &QemuFacts) {
    let _ = try_keep(binary, facts);
}

fn try_keep(binary: &Path, facts: &QemuFacts) -> Option<()> {
    let identity = FileIdentity::of(binary).ok()?;
    let mut magic = [0; 4];
    File::open(binary).ok()?.read_exact(&mut magic).ok()?;
    if magic != ELF {
        return None;
    }
    let path = place(binary)?;
    let directory = path.parent()?;
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700).create(directory).ok()?;
    let kept = Kept {
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        identity,
        facts: facts.clone(),
    };
    let mut file = tempfile::NamedTempFile::new_in(directory).ok()?;
    file.write_all(&serde_json::to_vec(&kept).ok()?).ok()?;
    file.persist(&path).ok()?;
    Some(())
}

/// The file for a binary; `None` where this user has no directory for such files.
fn place(binary: &Path) -> Option<PathBuf> {
    let binary = fs::canonicalize(binary).ok()?;
    let name = Digest::of(binary.as_os_str().as_encoded_bytes());
    let directory = directory_of("XDG_CACHE_HOME", ".cache")?;
    Some(directory.join(format!("qemu-{}.json", name.short())))
}
