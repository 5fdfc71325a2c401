//! What can be wrong with a configuration.

use super::remap::Origin;
use crate::error::{Blame, ErrorKind};

/// What can be wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// An argument vector without any word.
    #[error("the argument vector is empty")]
    NoProgram,
    /// An argument that is not UTF-8.
    #[error("the argument vector is not UTF-8 at byte {at}")]
    NotUtf8 {
        /// The first byte that is not, counted from the start of the vector.
        at: usize,
    },
    /// The last word is an option that needs a value.
    #[error("option {option} has no value")]
    MissingValue {
        /// The option as written.
        option: String,
    },
    /// The arguments cannot be restored.
    #[error("{}", all(.reasons))]
    Refused {
        /// Every reason, never none.
        reasons: Vec<Reason>,
    },
    /// A remap that does not follow `KIND:ID=TARGET`.
    #[error("remap {text:?} is not {expected}")]
    RemapSyntax {
        /// The remap as written.
        text: String,
        /// The form it has to have.
        expected: &'static str,
    },
    /// A line of a file of ours that cannot be used.
    #[error("{file} line {line}: {fact}")]
    FileLine {
        /// The file.
        file: String,
        /// The line, from 1.
        line: u32,
        /// What is wrong with it.
        fact: String,
    },
    /// Domain XML that cannot be read.
    #[error("the domain XML cannot be read: {fact}")]
    XmlNotRead {
        /// What is wrong with it.
        fact: String,
        /// Byte offset in the XML.
        at: u64,
        /// The line, from 1.
        line: u32,
    },
    /// Domain XML that asks for what cannot be given, or that does not make sense.
    #[error("{}", unsupported(.elements))]
    Unsupported {
        /// Everything that stands against it, never none.
        elements: Vec<Unmodelled>,
    },
}

/// One thing in domain XML that is not honoured.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unmodelled {
    /// Where: `domain/devices/hostdev[2]`, `domain/vcpu/@current`.
    pub path: String,
    /// The line its element starts in, from 1; 0 for an element that was not read.
    pub line: u32,
    /// What is the matter with it.
    pub why: String,
    /// What to do about it, if anything can be said.
    pub try_: Option<String>,
}

impl std::fmt::Display for Unmodelled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.why),
            line => write!(f, "line {line}, {}: {}", self.path, self.why),
        }
    }
}

/// One reason why kept arguments cannot be made into restore arguments.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// `-snapshot` or `snapshot=on`: the guest's writes live in a temporary file that ends with it.
    #[error("{argument}: the guest's writes go to a temporary overlay that ends with QEMU")]
    TemporaryOverlay {
        /// The argument.
        argument: String,
    },
    /// A descriptor that QEMU got from whoever started it.
    #[error("{argument}: {property} is a descriptor that QEMU inherited")]
    InheritedDescriptor {
        /// The argument.
        argument: String,
        /// The property or option that names it.
        property: String,
    },
    /// Configuration in a file beside the arguments.
    #[error("{argument}: the file's content is not part of the arguments")]
    ConfigurationFile {
        /// The argument.
        argument: String,
    },
    /// A remap of a resource that the guest does not have.
    #[error("{}the guest has no {kind} {id:?}; it has {}", written(.origin.as_ref()), listed(.known))]
    UnknownResource {
        /// The kind as in the remap.
        kind: &'static str,
        /// The id or path prefix.
        id: String,
        /// The ids or paths of this kind that exist.
        known: Vec<String>,
        /// Where the remap was written, if in a file.
        origin: Option<Origin>,
    },
    /// A remap whose target does not fit what the resource is made of.
    #[error("{}{kind} {id:?} cannot become {target}: {argument}", written(.origin.as_ref()))]
    NotRemappable {
        /// The kind as in the remap.
        kind: &'static str,
        /// The resource.
        id: String,
        /// The target.
        target: String,
        /// The argument it comes from; empty if only QMP knew of it.
        argument: String,
        /// Where the remap was written, if in a file.
        origin: Option<Origin>,
    },
    /// A backend in changed domain XML that no remap can give the guest.
    #[error("line {line}: {path}: {why}")]
    NotCarried {
        /// The element.
        path: String,
        /// Its line.
        line: u32,
        /// What stands against it.
        why: &'static str,
    },
    /// A disk over which no throwaway overlay can be laid.
    #[error("{kind} {id:?} cannot get a throwaway overlay: {why}")]
    NoOverlay {
        /// The kind as in a remap.
        kind: &'static str,
        /// The disk.
        id: String,
        /// What stands against it.
        why: String,
    },
    /// Something of this host that several guests cannot have at once.
    #[error("{what} cannot be had by several guests at once: {why}")]
    NotShared {
        /// The resource, `nic "net0"`, or the argument.
        what: String,
        /// What it is.
        why: String,
    },
}

impl Reason {
    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Reason::TemporaryOverlay { .. } => "argument.temporary-overlay",
            Reason::InheritedDescriptor { .. } => "argument.inherited-descriptor",
            Reason::ConfigurationFile { .. } => "argument.configuration-file",
            Reason::UnknownResource { .. } => "remap.unknown",
            Reason::NotRemappable { .. } => "remap.impossible",
            Reason::NoOverlay { .. } => "overlay.impossible",
            Reason::NotCarried { .. } => "config.not-carried",
            Reason::NotShared { .. } => "clone.shared",
        }
    }

    fn is_usage(&self) -> bool {
        ["remap.", "overlay.", "clone.", "config."]
            .iter()
            .any(|group| self.code().starts_with(group))
    }
}

impl Blame for ConfigError {
    fn kind(&self) -> ErrorKind {
        match self {
            ConfigError::Refused { reasons } if reasons.iter().all(Reason::is_usage) => {
                ErrorKind::Usage
            }
            ConfigError::RemapSyntax { .. } | ConfigError::FileLine { .. } => ErrorKind::Usage,
            ConfigError::XmlNotRead { .. } => ErrorKind::Image,
            ConfigError::Unsupported { .. } => ErrorKind::Usage,
            _ => ErrorKind::Failed,
        }
    }

    fn at(&self) -> Option<String> {
        match self {
            ConfigError::XmlNotRead { at, line, .. } => {
                Some(format!("line {line} of the domain XML, byte {at:#x}"))
            }
            _ => None,
        }
    }
}

fn all(reasons: &[Reason]) -> String {
    let reasons: Vec<String> = reasons.iter().map(Reason::to_string).collect();
    reasons.join("; ")
}

/// The first few of them; `vmstow` lists all where it has the room.
fn unsupported(elements: &[Unmodelled]) -> String {
    const SHOWN: usize = 20;
    let shown: Vec<String> = elements
        .iter()
        .take(SHOWN)
        .map(Unmodelled::to_string)
        .collect();
    let more = match elements.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    format!(
        "the domain XML cannot be honoured: {}{more}",
        shown.join("; ")
    )
}

/// `remaps.txt line 3: `, or nothing.
fn written(origin: Option<&Origin>) -> String {
    origin.map_or(String::new(), |origin| format!("{origin}: "))
}

fn listed(known: &[String]) -> String {
    if known.is_empty() {
        return "none".to_owned();
    }
    known.join(", ")
}
