//! What QEMU binaries said of themselves, kept so that they need not be asked each time: that takes as long as some of
//! our restores.
//!
//! One file for each answer of a binary in `$XDG_CACHE_HOME/vmstow`, else `~/.cache/vmstow`. What is kept counts as long as the binary is the same
//! file, untouched; a script that starts some binary may start another one tomorrow, so nothing is kept of scripts.

use std::fs::{self, DirBuilder, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::facts::{FileIdentity, QemuFacts};
use super::keys::directory_of;
use crate::digest::Digest;

/// The first bytes of a program that is no script.
const ELF: [u8; 4] = *b"\x7fELF";

/// The question whose answer is [`QemuFacts`].
const FACTS: &str = "facts";

#[derive(Serialize, Deserialize)]
struct Kept {
    /// The program that kept it: another one may ask for more.
    tool: String,
    /// The binary as it was named.
    path: PathBuf,
    identity: FileIdentity,
    /// What was asked.
    question: String,
    answer: Value,
}

/// What is known of a binary; `None` if it has to be asked.
pub fn kept(binary: &Path) -> Option<QemuFacts> {
    kept_answer(binary, FACTS)
}

/// Keeps what a binary said. Where that cannot be done it is asked again next time.
pub fn keep(binary: &Path, facts: &QemuFacts) {
    keep_answer(binary, FACTS, facts);
}

/// What a binary answered to this question; `None` if it has to be asked.
pub fn kept_answer<T: DeserializeOwned>(binary: &Path, question: &str) -> Option<T> {
    let mut file = File::open(place(binary, question)?).ok()?;
    let is_ours = file.metadata().ok()?.uid() == geteuid().as_raw();
    let mut text = Vec::new();
    file.read_to_end(&mut text).ok()?;
    let kept: Kept = serde_json::from_slice(&text).ok()?;
    let is_same = kept.tool == env!("CARGO_PKG_VERSION")
        && kept.path == binary
        && kept.question == question
        && kept.identity == FileIdentity::of(binary).ok()?;
    if !(is_ours && is_same) {
        return None;
    }
    serde_json::from_value(kept.answer).ok()
}

/// Keeps what a binary answered to this question. Where that cannot be done it is asked again next time.
pub fn keep_answer<T: Serialize>(binary: &Path, question: &str, answer: &T) {
    let _ = try_keep(binary, question, answer);
}

fn try_keep<T: Serialize>(binary: &Path, question: &str, answer: &T) -> Option<()> {
    let identity = FileIdentity::of(binary).ok()?;
    let mut magic = [0; 4];
    File::open(binary).ok()?.read_exact(&mut magic).ok()?;
    if magic != ELF {
        return None;
    }
    let path = place(binary, question)?;
    let directory = path.parent()?;
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700).create(directory).ok()?;
    let kept = Kept {
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        path: binary.to_owned(),
        identity,
        question: question.to_owned(),
        answer: serde_json::to_value(answer).ok()?,
    };
    let mut file = tempfile::NamedTempFile::new_in(directory).ok()?;
    file.write_all(&serde_json::to_vec(&kept).ok()?).ok()?;
    file.persist(&path).ok()?;
    Some(())
}

/// The file for a binary's answer; `None` where this user has no directory for such files.
fn place(binary: &Path, question: &str) -> Option<PathBuf> {
    let binary = fs::canonicalize(binary).ok()?;
    let mut name = binary.into_os_string().into_encoded_bytes();
    name.push(0);
    name.extend_from_slice(question.as_bytes());
    let name = Digest::of(&name);
    let directory = directory_of("XDG_CACHE_HOME", ".cache")?;
    Some(directory.join(format!("qemu-{}.json", name.short())))
}
