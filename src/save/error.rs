//! Why a guest was not saved, and how it was left.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Blame, Error, ErrorKind};
use crate::qmp::RunState;

/// How a guest was left by a save that did not come to its end; reads as the end of "which …".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestLeft {
    /// It was not touched, or was put back.
    AsBefore(RunState),
    /// It did not run before and does not now, but QEMU's migration had completed, which only running undoes.
    Resting,
    /// As before it does not run; its QEMU has let go of its disks, which only running undoes.
    WithoutDisks(RunState),
    /// Putting it back failed; the guardian or its user has to look after it.
    Unknown,
    /// It does what the state says, and its disks go on in new overlays.
    OnOverlays(RunState, Vec<PathBuf>),
    /// It is stopped, on purpose.
    Stopped,
    /// Its QEMU ended.
    Gone,
}

impl std::fmt::Display for GuestLeft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            GuestLeft::AsBefore(RunState::Running) => f.write_str("runs on as before"),
            GuestLeft::AsBefore(state) => write!(f, "is {state} as before"),
            GuestLeft::Resting => {
                f.write_str("stays stopped, as postmigrate: --from-postmigrate saves it again")
            }
            GuestLeft::WithoutDisks(state) => write!(
                f,
                "is {state} as before, but its QEMU has let go of its disks until it runs"
            ),
            GuestLeft::OnOverlays(state, overlays) => {
                let paths: Vec<String> =
                    overlays.iter().map(|it| it.display().to_string()).collect();
                let state = match state {
                    RunState::Running => "runs on".to_owned(),
                    state => format!("is {state}"),
                };
                write!(
                    f,
                    "{state}, its disks in the new overlays {}",
                    paths.join(" and ")
                )
            }
            GuestLeft::Unknown => f.write_str("could not be put back as it was"),
            GuestLeft::Stopped => f.write_str("stays stopped"),
            GuestLeft::Gone => f.write_str("is gone: its QEMU has ended"),
        }
    }
}

/// Why a guest was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// What was given as the guest to save is neither `qmp:PATH` nor `pid:N`.
    #[error(
        "{text:?} names no guest: it has to be qmp:/path/to/socket, pid:NUMBER or the name of a guest that vmstow runs"
    )]
    NotASource {
        /// What was given.
        text: String,
    },
    /// The guest is in a state in which QEMU cannot migrate it.
    #[error("{guest} cannot be saved: it is {state}")]
    RunState {
        /// Its name.
        guest: String,
        /// Its state.
        state: RunState,
    },
    /// Somebody migrates it already.
    #[error("{guest} is being migrated already (status {status}); it was not touched")]
    MigrationActive {
        /// Its name.
        guest: String,
        /// QEMU's status of that migration.
        status: String,
    },
    /// It was restored lazily, and part of its memory has not arrived.
    #[error(
        "{guest} still gets its memory from the image it was restored from; it was not touched"
    )]
    LacksMemory {
        /// Its name.
        guest: String,
    },
    /// Another vmstow saves it already.
    #[error("{guest} is being saved already; it was not touched")]
    BeingSaved {
        /// Its name.
        guest: String,
    },
    /// QEMU would refuse.
    #[error("QEMU refuses to migrate {guest}, which {left}")]
    Blocked {
        /// Its name.
        guest: String,
        /// How it was left.
        left: GuestLeft,
        /// QEMU's own words, one a blocker.
        reasons: Vec<String>,
    },
    /// Something that the guest uses cannot be found again by a restore.
    #[error("{guest}, which {left}, could not be restored from its image")]
    NotRestorable {
        /// Its name.
        guest: String,
        /// How it was left.
        left: GuestLeft,
        /// Each argument and why.
        reasons: Vec<String>,
    },
    /// Its disks end with its QEMU: no image could name them.
    #[error(
        "{guest}, which {left}, cannot be saved: it was restored with --throwaway, and its disks end with its QEMU"
    )]
    ThrowawayDisks {
        /// Its name.
        guest: String,
        /// How it was left.
        left: GuestLeft,
        /// The overlays.
        disks: Vec<PathBuf>,
    },
    /// What becomes of a guest that is saved live is not a matter of choice.
    #[error("--live lets the guest run on; no other --then goes with it")]
    LiveThen,
    /// Only a running guest can run on.
    #[error("{guest} cannot be saved live: it is {state}")]
    NotRunning {
        /// Its name.
        guest: String,
        /// Its state.
        state: RunState,
    },
    /// Its QEMU is too old.
    #[error("{guest} cannot be saved live: its QEMU {version} has no background-snapshot")]
    LiveUnknown {
        /// Its name.
        guest: String,
        /// Its QEMU's version.
        version: String,
    },
    /// Old memory over newer disks would destroy them.
    #[error("{guest} cannot be saved live: it would go on writing to {}, which its image would not fit any more", disks.join(" and "))]
    LiveDisks {
        /// Its name.
        guest: String,
        /// The disks.
        disks: Vec<String>,
    },
    /// A disk cannot go on in an overlay.
    #[error("{guest} cannot be saved live: its disk {disk} cannot go on in an overlay: {why}")]
    NoSnapshot {
        /// Its name.
        guest: String,
        /// The disk.
        disk: String,
        /// Why not.
        why: String,
    },
    /// This host's kernel, or how the guest's memory is made, does not allow it.
    #[error("QEMU cannot let it run on while its memory is written")]
    LiveRefused {
        /// QEMU's words.
        source: crate::qmp::QmpError,
    },
    /// Somebody stopped the guest in the last moment.
    #[error("somebody stopped the guest, which is {state}: only a running one can be saved live")]
    StoppedMeanwhile {
        /// Its state.
        state: RunState,
    },
    /// QEMU did not do what a live save is.
    #[error("QEMU did not stop the guest and let it run on, as it does in a live save")]
    NotLive,
    /// Nobody knows whether the image has its name.
    #[error(
        "it is not known whether the image of {guest} is whole under its name; {guest} runs on"
    )]
    LivePublishUnknown {
        /// The guest.
        guest: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The image is published, but QEMU did not take its settings back.
    #[error(
        "the image is whole and {guest} runs on, but QEMU did not take its migration settings back: {why}"
    )]
    LiveSettings {
        /// The guest.
        guest: String,
        /// Why not.
        why: String,
    },
    /// There is not enough room for the image.
    #[error("{} has {free} bytes free; the image of {guest} may need {needed}", directory.display())]
    NoSpace {
        /// The guest.
        guest: String,
        /// Where the image was to go.
        directory: PathBuf,
        /// Bytes free there.
        free: u64,
        /// Bytes the image may need.
        needed: u64,
    },
    /// QEMU ended the migration.
    #[error("QEMU gave the migration up (status {status})")]
    MigrationFailed {
        /// The status it ended with.
        status: String,
        /// QEMU's own words, where it had any.
        words: Option<String>,
    },
    /// QEMU did not let go of a disk.
    #[error("QEMU did not let go of block node {node}")]
    DiskInUse {
        /// Its name.
        node: String,
    },
    /// The device state was as we know it when it was tried, and is not any more.
    #[error("QEMU's device state is not as it was a moment ago")]
    DeviceState,
    /// There is no room in memory for the device state.
    #[error("the device state could not be kept in memory")]
    Buffer {
        /// The system's reason.
        source: io::Error,
    },
    /// QEMU ended while it was saved.
    #[error("QEMU ended in the middle of the save")]
    QemuEnded,
    /// A disk could not be read for its digest.
    #[error("cannot read {}", path.display())]
    Disk {
        /// The disk's file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another client of QEMU started the guest while it was saved.
    #[error("somebody else started the guest while it was saved")]
    Resumed,
    /// Another client of QEMU migrated the guest while it was saved.
    #[error("somebody else migrated the guest while it was saved")]
    MigratedElsewhere,
    /// The save took longer than was allowed.
    #[error("the save took longer than {} s", limit.as_secs())]
    TimedOut {
        /// The limit.
        limit: Duration,
    },
    /// The manifest could not be made into JSON.
    #[error("the manifest could not be written")]
    Manifest {
        /// Why not.
        source: serde_json::Error,
    },
    /// The image could not be written.
    #[error("the image could not be written")]
    Write {
        /// The system's reason.
        source: io::Error,
    },
    /// The image could not be given its name.
    #[error("the image could not be given its name")]
    Publish {
        /// The system's reason.
        source: io::Error,
    },
    /// Nobody knows whether the image has its name.
    #[error(
        "it is not known whether the image of {guest} is whole under its name; {guest} stays stopped"
    )]
    PublishUnknown {
        /// The guest.
        guest: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A failure after the guest was stopped, and how the guest was left.
    #[error("{guest} was not saved and {left}")]
    NotSaved {
        /// The guest.
        guest: String,
        /// How it was left.
        left: GuestLeft,
        /// What failed.
        why: Error,
    },
    /// The image is published, but QEMU did not do what was to come then.
    #[error("the image is whole, but QEMU did not {act}; {guest} is left stopped")]
    Then {
        /// The guest.
        guest: String,
        /// What QEMU was to do.
        act: &'static str,
        /// Why not.
        source: crate::qmp::QmpError,
    },
}

impl Blame for SaveError {
    fn kind(&self) -> ErrorKind {
        match self {
            SaveError::NotASource { .. } | SaveError::LiveThen => ErrorKind::Usage,
            // There is no image that could be damaged: what QEMU sent is not as it has to be.
            SaveError::NotSaved { why, .. } if why.kind() == ErrorKind::Image => ErrorKind::Host,
            SaveError::NotSaved { why, .. } => why.kind(),
            SaveError::Write { .. }
            | SaveError::Publish { .. }
            | SaveError::Manifest { .. }
            | SaveError::PublishUnknown { .. }
            | SaveError::LivePublishUnknown { .. }
            | SaveError::NoSpace { .. }
            | SaveError::TimedOut { .. } => ErrorKind::Failed,
            _ => ErrorKind::Host,
        }
    }

    fn at(&self) -> Option<String> {
        match self {
            SaveError::NotSaved { why, .. } => why.at(),
            _ => None,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            SaveError::Blocked { reasons, .. } | SaveError::NotRestorable { reasons, .. } => {
                reasons.clone()
            }
            SaveError::ThrowawayDisks { disks, .. } => disks
                .iter()
                .map(|disk| disk.display().to_string())
                .collect(),
            SaveError::MigrationFailed { words, .. } => words.iter().cloned().collect(),
            SaveError::NotSaved { why, .. } => {
                let causes = why.causes().map(ToString::to_string);
                std::iter::once(why.to_string())
                    .chain(why.facts())
                    .chain(causes)
                    .collect()
            }
            _ => Vec::new(),
        }
    }
}
