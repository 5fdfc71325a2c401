//! Why a guest was not restored.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::compat::Finding;
use crate::error::{Blame, Error, ErrorKind};
use crate::qmp::QmpError;
use crate::supervise::Damage;

/// Why a guest was not restored. The image is as it was, and no QEMU of ours is left.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Nobody we trust signed the image, and it names resources of this host.
    #[error(
        "{guest} was not restored: its image {state}, and restoring it would use resources of this host as its author wants"
    )]
    Untrusted {
        /// The guest.
        guest: String,
        /// How the image is signed; reads behind "its image".
        state: String,
        /// Each resource that would be used.
        resources: Vec<String>,
    },
    /// Its image was made of a bare stream, which does not tell what to start.
    #[error(
        "{guest} was not restored: its image has no configuration that QEMU could be started with"
    )]
    NoConfiguration {
        /// The guest.
        guest: String,
    },
    /// A guest of the chosen name runs already.
    #[error("a guest named {name} runs here already, pid {pid}")]
    NameTaken {
        /// The name.
        name: String,
        /// That guest's process.
        pid: i32,
    },
    /// This host cannot run the guest.
    #[error("this host cannot run {guest}{}", first(findings))]
    CannotRun {
        /// The guest.
        guest: String,
        /// Every reason and every warning.
        findings: Vec<Finding>,
    },
    /// A reason that cannot be overridden.
    #[error("{code} cannot be overridden: {says}")]
    NotForced {
        /// Its code.
        code: String,
        /// What it says.
        says: &'static str,
    },
    /// There is no such code.
    #[error("no reason has the code {code}")]
    UnknownCode {
        /// What was given for one.
        code: String,
    },
    /// Clones would write to the same disks.
    #[error("{guest} cannot be cloned: its clones would all write to {}", disks.join(" and "))]
    SharedDisks {
        /// The guest.
        guest: String,
        /// Its disks, quoted.
        disks: Vec<String>,
    },
    /// Nothing tells the format of a disk's file, and the file itself is not asked: the guest wrote it.
    #[error("{guest} was not restored: nothing tells the format of its disk {disk:?}")]
    UnknownFormat {
        /// The guest.
        guest: String,
        /// The disk.
        disk: String,
    },
    /// One of several clones could not be restored.
    #[error("clone {number} of {count} of {guest} was not restored; no clone is left")]
    Clone {
        /// The guest.
        guest: String,
        /// Which clone, from 1.
        number: usize,
        /// How many were asked for.
        count: usize,
        /// Why.
        why: Error,
    },
    /// Each clone reads the image for itself.
    #[error(
        "clones are made of an image that lies in a file, not of one that comes through a pipe"
    )]
    ClonesOfPipe,
    /// The image is not the one any more from which the clones before were made.
    #[error("the image was replaced while clones were made of it")]
    ImageReplaced,
    /// The working directory that the guest's relative paths start from is not there.
    #[error("the directory {} is missing, from which the paths of {guest} start", path.display())]
    NoDirectory {
        /// The guest.
        guest: String,
        /// The directory.
        path: PathBuf,
    },
    /// What an image said at its beginning is not what it says at its end.
    #[error("{guest} was not restored: the image's beginning and end disagree about how it is run")]
    HeadDiffers {
        /// The guest.
        guest: String,
    },
    /// A chunk of the image is damaged.
    #[error("{why}")]
    Damaged {
        /// What is wrong with it.
        why: Error,
        /// Which guest memory it holds: `RAMBlock "pc.ram", pages 0x6800..0x6a00`.
        pages: String,
    },
    /// All was loaded, but QEMU did not let the guest run.
    #[error("QEMU does not let {guest} run, which was not restored; its image is as it was")]
    NotStarted {
        /// The guest.
        guest: String,
        /// QEMU's words.
        source: QmpError,
    },
    /// QEMU said that it could not load the stream.
    #[error("QEMU did not load the migration stream")]
    NotLoaded,
    /// QEMU is given the image a second time.
    #[error(
        "QEMU can describe the devices of an image that lies in a file, not of one that comes through a pipe"
    )]
    DescribedPipe,
    /// QEMU loaded the devices and did not describe them.
    #[error("QEMU does not describe the devices of {guest}")]
    NotDescribed {
        /// The guest.
        guest: String,
    },
    /// QEMU ended before the guest was loaded.
    #[error("QEMU could not load {guest}, which was not restored; its image is as it was")]
    QemuGaveUp {
        /// The guest.
        guest: String,
        /// QEMU's last words.
        words: String,
    },
    /// Nobody gives the guest its memory any more.
    #[error("nobody gives {guest} its memory any more: it waits at the next page that is missing")]
    Unserved {
        /// The guest.
        guest: String,
        /// What who gave it had to say, if it was not killed.
        why: Option<String>,
    },
    /// The image turned out damaged when the guest ran already.
    #[error("{guest} was frozen since its image is damaged: {}", damage.what)]
    Frozen {
        /// The guest.
        guest: String,
        /// What is damaged.
        damage: Damage,
    },
    /// The guest's QEMU is gone.
    #[error("{guest} has ended, after it had run: there is nothing left to go on with")]
    Ended {
        /// The guest.
        guest: String,
    },
    /// A clone was cut off before it ran.
    #[error("{guest} was cut off before it ran, and is a clone: nothing was lost")]
    CutOffClone {
        /// The clone.
        guest: String,
    },
    /// The image is no file, or has no page map.
    #[error("{guest} cannot be restored lazily: {why}")]
    NotLazy {
        /// The guest.
        guest: String,
        /// What is missing.
        why: &'static str,
    },
    /// QEMU did not get ready in time.
    #[error("QEMU did not load the migration stream within {} s", limit.as_secs())]
    TimedOut {
        /// The limit.
        limit: Duration,
    },
    /// Memory can only be mapped from an image in which each page has a place of its own.
    #[error(
        "an image of layout {layout} cannot be mapped: its pages do not lie where memory could be"
    )]
    NotMapped {
        /// Its layout.
        layout: String,
    },
    /// Memory can only be mapped from a file.
    #[error("an image that comes through a pipe cannot be mapped")]
    MappedPipe,
    /// The image's stream has to begin with QEMU's magic; QEMU would wait for ever on anything else.
    #[error("the image holds no migration stream of QEMU")]
    NotAStream,
}

/// `: the reason`, if there is exactly one.
fn first(findings: &[Finding]) -> String {
    match findings {
        [finding] => format!(": {}", finding.fact),
        _ => String::new(),
    }
}

impl Blame for RestoreError {
    fn kind(&self) -> ErrorKind {
        match self {
            RestoreError::Untrusted { .. } => ErrorKind::Trust,
            RestoreError::NameTaken { .. }
            | RestoreError::NotMapped { .. }
            | RestoreError::MappedPipe
            | RestoreError::DescribedPipe
            | RestoreError::SharedDisks { .. }
            | RestoreError::NotForced { .. }
            | RestoreError::UnknownCode { .. }
            | RestoreError::ClonesOfPipe => ErrorKind::Usage,
            RestoreError::Clone { why, .. } => why.kind(),
            RestoreError::NoConfiguration { .. } => ErrorKind::Usage,
            RestoreError::NotAStream | RestoreError::HeadDiffers { .. } => ErrorKind::Image,
            RestoreError::Damaged { why, .. } => why.kind(),
            RestoreError::Frozen { .. } => ErrorKind::Image,
            RestoreError::NotLazy { .. } => ErrorKind::Usage,
            _ => ErrorKind::Host,
        }
    }

    fn at(&self) -> Option<String> {
        match self {
            RestoreError::Damaged { why, pages } => match why.at() {
                Some(at) => Some(format!("{at}, {pages}")),
                None => Some(pages.clone()),
            },
            RestoreError::Frozen { damage, .. } => damage.at.clone(),
            RestoreError::Clone { why, .. } => why.at(),
            _ => None,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            RestoreError::Untrusted { resources, .. } => resources.clone(),
            RestoreError::CannotRun { findings, .. } if findings.len() > 1 => findings
                .iter()
                .map(|finding| match finding.advice() {
                    Some(advice) => format!("{} [{}]: {advice}", finding.fact, finding.code),
                    None => format!("{} [{}]", finding.fact, finding.code),
                })
                .collect(),
            RestoreError::Clone { why, .. } => {
                let causes = why.causes().map(ToString::to_string);
                std::iter::once(why.to_string())
                    .chain(why.facts())
                    .chain(causes)
                    .collect()
            }
            RestoreError::Unserved { why: Some(why), .. } => vec![why.clone()],
            RestoreError::QemuGaveUp { words, .. } if !words.is_empty() => vec![words.clone()],
            _ => Vec::new(),
        }
    }
}
