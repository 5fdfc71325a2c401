//! The other host, as the one that sends a guest there sees it; spec/transfer.md §6 and §7.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::MoveError;
use super::departure::Departure;
use crate::bytes::ReadAt;
use crate::error::Result;
use crate::image::OpenedImage;
use crate::pipeline::PipelineError;
use crate::progress::{Progress, Silent};
use crate::store::SshLocation;
use crate::store::remote::{FrameType, Peer, RemoteError};

/// How long it is asked what became of a move, and how often.
const ASK_FOR: Duration = Duration::from_secs(30);
const ASK_EVERY: Duration = Duration::from_secs(2);

/// What [`FrameType::Restore`] orders.
#[derive(Debug, Serialize, Deserialize)]
pub struct RestoreOrder {
    /// As of `vmstow restore`.
    pub arguments: Vec<String>,
    /// The move for which the guest is held.
    #[serde(rename = "move")]
    pub id: Option<Uuid>,
    /// How long the image is that is offered.
    pub length: Option<u64>,
    /// Where it is there.
    pub path: Option<PathBuf>,
    /// Whether it is offered anew for a guest that runs already.
    #[serde(default)]
    pub again: bool,
}

/// What [`FrameType::Prepare`] orders.
#[derive(Debug, Serialize, Deserialize)]
pub struct PrepareOrder {
    /// The move.
    #[serde(rename = "move")]
    pub id: Uuid,
    /// As of `vmstow restore`.
    pub arguments: Vec<String>,
    /// Bytes of the manifest, with which what is offered begins.
    pub manifest_length: u64,
    /// Bytes of what is offered.
    pub length: u64,
}

/// What [`FrameType::Prepare`] is answered with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Prepared {
    /// The version of the program there.
    pub version: String,
    /// What may not be as it was, a sentence each.
    pub warnings: Vec<String>,
    /// A path for the image.
    pub place: PathBuf,
    /// Bytes that are free there; `None` if that is not known.
    pub free_bytes: Option<u64>,
}

/// A guest that runs there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Runs {
    /// Its name there.
    pub name: String,
    /// What it does: `running` or `paused`.
    pub state: String,
}

/// What became of a move.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "became", rename_all = "snake_case")]
pub enum Became {
    /// The guest is there.
    Runs(Runs),
    /// It is not, and never will be by this move.
    Refused,
    /// It was let run, and is gone.
    Lost,
}

/// A connection to the host.
#[derive(Debug)]
pub struct Host {
    location: SshLocation,
    peer: Arc<Peer>,
}

impl Host {
    /// Starts the program there.
    ///
    /// # Errors
    /// As [`Peer::connect`].
    pub fn connect(location: &SshLocation) -> Result<Self, RemoteError> {
        Ok(Host {
            location: location.clone(),
            peer: Arc::new(Peer::connect(location)?),
        })
    }

    /// The connection.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.location.host
    }

    /// A file there.
    pub fn file(&self, path: &Path) -> SshLocation {
        SshLocation {
            path: path.to_owned(),
            ..self.location.clone()
        }
    }

    /// Connects anew.
    ///
    /// # Errors
    /// As [`Peer::connect`].
    pub fn reconnect(&mut self) -> Result<(), RemoteError> {
        self.peer = Arc::new(Peer::connect(&self.location)?);
        Ok(())
    }

    /// Asks whether a guest would run there of which this is known.
    ///
    /// # Errors
    /// Why not; the connection's.
    pub fn prepare(
        &self,
        departure: &Departure,
        manifest: &[u8],
        xml: &str,
        arguments: &[String],
        progress: &dyn Progress,
    ) -> Result<Prepared> {
        let offered = [manifest, xml.as_bytes()].concat();
        let order = PrepareOrder {
            id: departure.id,
            arguments: arguments.to_vec(),
            manifest_length: manifest.len() as u64,
            length: offered.len() as u64,
        };
        self.order(&offered, FrameType::Prepare, &order, progress)
    }

    /// Has it load a guest from an image that is there or offered, and hold it; of one that runs, give it its memory again.
    ///
    /// # Errors
    /// Why it cannot; the connection's.
    pub fn hold(
        &self,
        order: &RestoreOrder,
        offered: &dyn ReadAt,
        progress: &dyn Progress,
    ) -> Result<serde_json::Value> {
        self.order(offered, FrameType::Restore, order, progress)
    }

    /// Lets the guest run that it holds. Nothing ends the wait for the answer but the connection.
    ///
    /// # Errors
    /// [`RemoteError::Refused`] if it does not run there and never will, which it may also say as an answer; the
    /// connection's.
    pub fn go(&self, id: Uuid, offered: &dyn ReadAt) -> Result<Became> {
        self.exchange(offered, FrameType::Go, id.as_bytes(), &Silent)
    }

    /// Says that nothing more comes of a move but what is offered, and waits until the guest has all of that it needs.
    ///
    /// # Errors
    /// Why it does not get it; the connection's.
    pub fn end(&self, id: Uuid, offered: &dyn ReadAt, progress: &dyn Progress) -> Result<()> {
        self.exchange(offered, FrameType::End, id.as_bytes(), progress)
    }

    fn order<T: for<'de> Deserialize<'de>>(
        &self,
        offered: &dyn ReadAt,
        what: FrameType,
        order: &impl Serialize,
        progress: &dyn Progress,
    ) -> Result<T> {
        self.exchange(offered, what, &to_json(order)?, progress)
    }

    fn exchange<T: for<'de> Deserialize<'de>>(
        &self,
        offered: &dyn ReadAt,
        what: FrameType,
        order: &[u8],
        progress: &dyn Progress,
    ) -> Result<T> {
        let report = self
            .peer
            .give(offered, what, order, &mut |_| !progress.is_cancelled());
        let report = report?.ok_or(PipelineError::Cancelled)?;
        let report = serde_json::from_slice(&report);
        Ok(report.map_err(|_| self.peer.broke("a report that is none"))?)
    }
}

/// An order as it is sent.
pub fn to_json(order: &impl Serialize) -> Result<Vec<u8>> {
    let json = serde_json::to_vec(order).map_err(|error| MoveError::Order {
        what: error.to_string(),
    });
    Ok(json?)
}

/// Asks what became of a move, on a connection of its own, again and again for a while.
///
/// # Errors
/// The last one's, if it could not be asked.
pub fn ask(location: &SshLocation, id: Uuid, progress: &dyn Progress) -> Result<(Host, Became)> {
    let begin = Instant::now();
    loop {
        let answer = Host::connect(location)
            .map_err(Into::into)
            .and_then(|host| {
                let became =
                    host.exchange(&Vec::new(), FrameType::Settle, id.as_bytes(), &Silent)?;
                Ok((host, became))
            });
        match answer {
            Err(error) if begin.elapsed() < ASK_FOR && !progress.is_cancelled() => {
                progress.warn(&format!("{error}; asking {} again", location.host));
                std::thread::sleep(ASK_EVERY);
            }
            answer => return answer,
        }
    }
}

/// Restores the guest of an image on another host, which reads the image here, until all of it is there; gives what `vmstow restore --json` prints there.
///
/// # Errors
/// Why it cannot be restored there; the connection's.
pub fn restore_on(
    location: &SshLocation,
    image: &OpenedImage,
    arguments: Vec<String>,
    is_lazy: bool,
    progress: &dyn Progress,
) -> Result<serde_json::Value> {
    let host = Host::connect(location)?;
    let file = image.image().reader();
    let order = RestoreOrder {
        // Only a guest that somebody may lose his hold of is held.
        id: is_lazy.then(Uuid::new_v4),
        arguments,
        length: Some(file.len()),
        path: None,
        again: false,
    };
    let restored = host.hold(&order, file, progress).and_then(|mut report| {
        let Some(id) = order.id else {
            return Ok(report);
        };
        let Became::Runs(runs) = host.go(id, file)? else {
            let host = location.host.clone();
            return Err(MoveError::NotLetRun { host }.into());
        };
        progress.begin("giving it its memory", None);
        host.end(id, file, progress)?;
        progress.end();
        report["state"] = runs.state.into();
        Ok(report)
    });
    restored.map_err(|error| file.failure().unwrap_or(error))
}
