//! The text of a remap ⇄ the remap, and files that hold one a line.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{Origin, Remap, Selector, Target};
use crate::config::error::ConfigError;
use crate::config::resources::ResourceKind;

/// Reads a file of remaps: one a line; empty lines and lines that begin with `#` are skipped.
///
/// # Errors
/// [`ConfigError::FileLine`] for the first line that is no remap.
pub fn parse_file(file: &str, text: &str) -> Result<Vec<Remap>, ConfigError> {
    let mut remaps = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        remaps.push(Remap::parse_at(line, file, number)?);
    }
    Ok(remaps)
}

impl Remap {
    /// Reads a remap that stands in this line of a file.
    ///
    /// # Errors
    /// [`ConfigError::FileLine`] if it is none.
    pub fn parse_at(text: &str, file: &str, line: u32) -> Result<Self, ConfigError> {
        let parsed: Result<Remap, ConfigError> = text.parse();
        match parsed {
            Ok(remap) => Ok(Remap {
                origin: Some(Origin {
                    file: file.to_owned(),
                    line,
                }),
                ..remap
            }),
            Err(error) => Err(ConfigError::FileLine {
                file: file.to_owned(),
                line,
                fact: error.to_string(),
            }),
        }
    }
}

impl Remap {
    /// Lets relative paths of files start in `directory`; the beginnings of paths and what names no file stay.
    pub fn start_paths_in(&mut self, directory: &str) {
        if matches!(self.selector, Selector::Prefix(_)) {
            return;
        }
        let path = match &mut self.target {
            Target::Path { path, .. } if path.contains(':') => return,
            Target::Passt(path) if path.is_empty() => return,
            Target::Path { path, .. }
            | Target::File(path)
            | Target::Unix(path)
            | Target::Passt(path) => path,
            _ => return,
        };
        // Joined by components, so that `./x` reads as `x`.
        let whole: PathBuf = Path::new(directory).join(&*path).components().collect();
        if let Some(whole) = whole.to_str() {
            whole.clone_into(path);
        }
    }
}

impl fmt::Display for Remap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ResourceKind::Nic => "net",
            kind => kind.word(),
        };
        let selector = match &self.selector {
            Selector::Id(id) => id,
            Selector::Prefix(prefix) => prefix,
            Selector::All => "*",
        };
        match &self.target {
            // As it is read, not as QEMU wants it.
            Target::Unix(path) => write!(f, "{kind}:{selector}=unix:{path}"),
            Target::Null if self.kind == ResourceKind::Display => {
                write!(f, "{kind}:{selector}=none")
            }
            target => write!(f, "{kind}:{selector}={target}"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Path {
                path,
                format: Some(format),
            } => write!(f, "{format}:{path}"),
            Target::Path { path, .. } | Target::Overlay(path) => f.write_str(path),
            Target::Eject => f.write_str("eject"),
            Target::UserNetwork(rest) if rest.is_empty() => f.write_str("user"),
            Target::UserNetwork(rest) => write!(f, "user,{rest}"),
            Target::Tap(name) => write!(f, "tap={name}"),
            Target::Bridge(name) => write!(f, "bridge={name}"),
            Target::File(path) => write!(f, "file:{path}"),
            Target::Pty => f.write_str("pty"),
            Target::Unix(path) => write!(f, "unix:{path},server=on,wait=off"),
            Target::Null => f.write_str("null"),
            Target::Passt(path) if path.is_empty() => f.write_str("passt"),
            Target::Passt(path) => write!(f, "passt={path}"),
            Target::Listen(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

impl FromStr for Remap {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = |expected| ConfigError::RemapSyntax {
            text: text.to_owned(),
            expected,
        };
        let (kind, rest) = text
            .split_once(':')
            .ok_or_else(|| wrong("KIND:ID=TARGET"))?;
        let (id, target) = rest
            .split_once('=')
            .ok_or_else(|| wrong("KIND:ID=TARGET"))?;
        let (kind, parse, expected) = Self::grammar(kind).ok_or_else(|| {
            wrong(
                "one of the kinds disk, cdrom, floppy, net, chardev, share, firmware, kernel, tpm, display",
            )
        })?;
        let selector = match id {
            "" => return Err(wrong("KIND:ID=TARGET")),
            "*" => Selector::All,
            _ if id.starts_with('/') => Selector::Prefix(id.to_owned()),
            _ => Selector::Id(id.to_owned()),
        };
        let target = parse(target).ok_or_else(|| wrong(expected))?;
        Ok(Remap::new(kind, selector, target))
    }
}

type Grammar = (ResourceKind, fn(&str) -> Option<Target>, &'static str);

impl Remap {
    /// A kind's word → the kind, the reader of its targets, their form.
    fn grammar(word: &str) -> Option<Grammar> {
        const IMAGE: &str = "KIND:ID=PATH or KIND:ID=FORMAT:PATH";
        const MEDIUM: &str = "KIND:ID=PATH, KIND:ID=FORMAT:PATH or KIND:ID=eject";
        const PATH: &str = "KIND:ID=PATH";
        Some(match word {
            "disk" => (ResourceKind::Disk, image_target, IMAGE),
            "cdrom" => (ResourceKind::Cdrom, medium_target, MEDIUM),
            "floppy" => (ResourceKind::Floppy, medium_target, MEDIUM),
            "net" | "nic" => (
                ResourceKind::Nic,
                network_target,
                "net:ID=user, net:ID=tap=NAME, net:ID=bridge=NAME, net:ID=passt, or net:ID=passt=SOCKET with the socket of a passt that you started (passt --socket SOCKET)",
            ),
            "chardev" => (
                ResourceKind::Chardev,
                chardev_target,
                "chardev:ID=file:PATH, chardev:ID=unix:PATH, chardev:ID=pty or chardev:ID=null",
            ),
            "share" => (ResourceKind::Share, path_target, PATH),
            "firmware" => (ResourceKind::Firmware, image_target, IMAGE),
            "kernel" => (ResourceKind::Kernel, path_target, PATH),
            "tpm" => (ResourceKind::Tpm, path_target, PATH),
            "display" => (
                ResourceKind::Display,
                display_target,
                "display:ID=HOST:PORT, display:ID=unix:PATH or display:ID=none",
            ),
            _ => return None,
        })
    }
}

fn path_target(text: &str) -> Option<Target> {
    (!text.is_empty()).then(|| Target::Path {
        path: text.to_owned(),
        format: None,
    })
}

/// A path, behind the format of the image there if it is said: `qcow2:/srv/x`.
fn image_target(text: &str) -> Option<Target> {
    const FORMATS: [&str; 9] = [
        "raw",
        "qcow2",
        "qcow",
        "qed",
        "vdi",
        "vhdx",
        "vmdk",
        "vpc",
        "parallels",
    ];
    match text.split_once(':') {
        Some((format, path)) if FORMATS.contains(&format) && !path.is_empty() => {
            Some(Target::Path {
                path: path.to_owned(),
                format: Some(format.to_owned()),
            })
        }
        _ => path_target(text),
    }
}

fn medium_target(text: &str) -> Option<Target> {
    match text {
        "eject" => Some(Target::Eject),
        _ => image_target(text),
    }
}

fn display_target(text: &str) -> Option<Target> {
    if text == "none" {
        return Some(Target::Null);
    }
    if let Some(path) = text.strip_prefix("unix:") {
        return (!path.is_empty()).then(|| Target::Unix(path.to_owned()));
    }
    let (host, port) = text.rsplit_once(':')?;
    Some(Target::Listen(host.to_owned(), port.parse().ok()?))
}

fn network_target(text: &str) -> Option<Target> {
    let named = |prefix: &str| text.strip_prefix(prefix).filter(|name| !name.is_empty());
    match text {
        "user" => return Some(Target::UserNetwork(String::new())),
        "passt" => return Some(Target::Passt(String::new())),
        _ => {}
    }
    if let Some(rest) = named("user,") {
        return Some(Target::UserNetwork(rest.to_owned()));
    }
    if let Some(name) = named("tap=") {
        return Some(Target::Tap(name.to_owned()));
    }
    if let Some(path) = named("passt=") {
        return Some(Target::Passt(path.to_owned()));
    }
    named("bridge=").map(|name| Target::Bridge(name.to_owned()))
}

fn chardev_target(text: &str) -> Option<Target> {
    let path = |prefix: &str| text.strip_prefix(prefix).filter(|path| !path.is_empty());
    match text {
        "pty" => return Some(Target::Pty),
        "null" => return Some(Target::Null),
        _ => {}
    }
    if let Some(path) = path("file:") {
        return Some(Target::File(path.to_owned()));
    }
    path("unix:").map(|path| Target::Unix(path.to_owned()))
}
