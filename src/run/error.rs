//! What can be wrong with a guest that is to be started.

use std::path::PathBuf;

use crate::config::ConfigError;
use crate::error::{Blame, ErrorKind};
use crate::qmp::QmpError;

/// Why a guest was not started.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The XML could not be read.
    #[error("{what} could not be read")]
    NotRead {
        /// The file, or what stands for it.
        what: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The file is longer than any domain XML.
    #[error("{what} is no domain XML: it has more than {limit} bytes")]
    TooLong {
        /// The file.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// The name is taken by a guest that runs.
    #[error("a guest named {name} runs already (pid {pid})")]
    NameTaken {
        /// The name.
        name: String,
        /// Its QEMU.
        pid: i32,
    },
    /// Arguments for QEMU in the XML, which reach past all that is checked.
    #[error(
        "{guest} was not started: its XML reaches QEMU past all that is checked (qemu:commandline, qemu:override)"
    )]
    OwnArguments {
        /// The guest.
        guest: String,
        /// The line in which they begin; 0 if it is not known.
        line: u32,
    },
    /// What was to be domain XML is none.
    #[error(transparent)]
    NotXml {
        /// What is wrong with it.
        why: ConfigError,
    },
    /// The XML is of an image that nobody we trust signed, and names resources of this host.
    #[error("{guest} was not started: its image {state}, and it would use resources of this host")]
    Untrusted {
        /// The guest.
        guest: String,
        /// Who vouches for it.
        state: String,
        /// The resources.
        resources: Vec<String>,
    },
    /// The file of the firmware's variables is not there, and nothing tells what it begins with.
    #[error("{} is missing, which holds the variables of the firmware, and no template for it is known", path.display())]
    NoTemplate {
        /// The file.
        path: PathBuf,
    },
    /// QEMU did not let the guest run.
    #[error("QEMU does not let {guest} run, which was not started")]
    NotStarted {
        /// The guest.
        guest: String,
        /// QEMU's words.
        source: QmpError,
    },
}

impl Blame for RunError {
    fn kind(&self) -> ErrorKind {
        match self {
            RunError::NameTaken { .. } | RunError::TooLong { .. } | RunError::NotXml { .. } => {
                ErrorKind::Usage
            }
            RunError::OwnArguments { .. } | RunError::Untrusted { .. } => ErrorKind::Trust,
            RunError::NotRead { .. } => ErrorKind::Failed,
            _ => ErrorKind::Host,
        }
    }

    fn at(&self) -> Option<String> {
        match self {
            RunError::NotXml { why } => why.at(),
            RunError::OwnArguments { line, .. } if *line > 0 => Some(format!("line {line}")),
            _ => None,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            RunError::Untrusted { resources, .. } => resources.clone(),
            _ => Vec::new(),
        }
    }
}
