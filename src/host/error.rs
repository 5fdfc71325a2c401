//! What can go wrong when this machine is looked at.

use std::io;
use std::path::PathBuf;

use crate::error::{Blame, ErrorKind};

/// A fact about this machine that could not be learned, or is not as it must be.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No such process, or it ended.
    #[error("there is no process {pid}")]
    NoSuchProcess {
        /// Its id.
        pid: i32,
    },
    /// The process exists but could not be looked at, or not be signalled.
    #[error("cannot look at process {pid}: {what}")]
    Process {
        /// Its id.
        pid: i32,
        /// What was tried, `cmdline` for instance.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// What the kernel tells of the process is not text.
    #[error("process {pid} has a {what} that is not UTF-8")]
    NotUtf8 {
        /// Its id.
        pid: i32,
        /// What is not text.
        what: &'static str,
    },
    /// No monitor of this QEMU can be connected to.
    #[error(
        "process {pid} has no QMP monitor on a unix socket that it listens on{}",
        list(found)
    )]
    NoMonitor {
        /// Its id.
        pid: i32,
        /// The monitors it has instead, as its arguments name them.
        found: Vec<String>,
    },
    /// Nobody listens on that socket, or nobody that we may see.
    #[error("no process is seen to listen on {}", path.display())]
    NoListener {
        /// The socket.
        path: PathBuf,
    },
    /// Reading, writing or making a file or directory failed.
    #[error("cannot {act} {}", path.display())]
    File {
        /// `read`, `create`, …
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory for our guests is no directory, belongs to somebody else, or others may write to it.
    #[error("{} cannot be used: {problem}", path.display())]
    UnsafeDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A unix socket's path must fit into the kernel's structure.
    #[error("the socket path {} has {} bytes, more than the {limit} that the kernel takes", path.display(), path.as_os_str().len())]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// The limit in bytes.
        limit: usize,
    },
    /// A guest's name has characters that it must not have, or is too long.
    #[error("{name:?} is not a guest name: it takes 1 to {limit} of A-Z a-z 0-9 . _ - and begins with a letter or digit", limit = super::NAME_LIMIT)]
    BadName {
        /// The name.
        name: String,
    },
    /// No guest of that name is in the runtime directory.
    #[error("no guest named {name} runs here")]
    NoSuchGuest {
        /// The name.
        name: String,
    },
    /// No QEMU binary is in `PATH`.
    #[error("{binary} is not in PATH")]
    NoQemu {
        /// The file name looked for.
        binary: String,
    },
    /// The program that makes throwaway overlays is not in `PATH`.
    #[error("qemu-img is not in PATH; it makes the throwaway overlays")]
    NoQemuImg,
    /// No throwaway overlay could be made over a disk.
    #[error("no throwaway overlay can be laid over {}{}", base.display(), in_use(words))]
    NoOverlay {
        /// The disk's own file.
        base: PathBuf,
        /// The words of qemu-img.
        words: String,
    },
    /// A QEMU that runs no guest did not answer a question.
    #[error("{} did not answer {command}", path.display())]
    NotAnswered {
        /// The binary.
        path: PathBuf,
        /// The QMP command.
        command: String,
        /// QEMU's words.
        words: String,
    },
    /// Nothing tells where what has to last is to be kept.
    #[error("there is no place for {what}: neither XDG_STATE_HOME nor HOME is set")]
    NoHome {
        /// What was to be kept.
        what: &'static str,
    },
    /// A program that works for a guest is not on this host.
    #[error("{program} is not on this host, which this guest needs for its {what}")]
    NoProgram {
        /// The program.
        program: String,
        /// What of the guest it works for: `tpm0`.
        what: String,
    },
    /// A binary that does not answer as QEMU does.
    #[error("{} {argument} did not answer as QEMU does: {answer:?}", path.display())]
    NotQemu {
        /// The binary.
        path: PathBuf,
        /// The argument it got.
        argument: &'static str,
        /// Its own words, cut after 200 bytes.
        answer: String,
    },
}

fn list(found: &[String]) -> String {
    match found {
        [] => String::new(),
        found => format!("; it has {}", found.join(", ")),
    }
}

/// What a refused lock means.
fn in_use(words: &str) -> &'static str {
    match words.contains("lock") {
        true => ": a guest that still runs writes to it",
        false => "",
    }
}

impl Blame for HostError {
    fn kind(&self) -> ErrorKind {
        match self {
            HostError::BadName { .. } => ErrorKind::Usage,
            _ => ErrorKind::Host,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            HostError::NoOverlay { words, .. } | HostError::NotAnswered { words, .. } => {
                words.lines().map(str::to_owned).collect()
            }
            _ => Vec::new(),
        }
    }
}
