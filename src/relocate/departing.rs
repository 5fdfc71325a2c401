//! A guest on its way out: its image goes where a save puts images, and what publishes it is the other side's word that the
//! guest runs there.

use std::io;
use std::path::PathBuf;

use super::departure::Departure;
use super::outgoing::Outgoing;
use super::settle::{finish, quit_here};
use super::there::{self, Became, Host, RestoreOrder, Runs, to_json};
use super::{MoveError, MoveRequest, Way};
use crate::bytes::{PublishError, ReadAt, Sink};
use crate::error::{Error, Result};
use crate::host::Lasting;
use crate::pipeline::PipelineError;
use crate::progress::Progress;
use crate::save::{HandOver, SaveError};
use crate::store::remote::RemoteError;
use crate::store::{AnyFile, FileSink, Location};
use crate::transfer::{self, CopyParent, CopyRequest};

/// How often a connection that was lost is made again: the guest stands still meanwhile.
const TRIES: u32 = 3;

/// The sink of a save that hands its guest over.
pub struct Departing<'a> {
    request: &'a MoveRequest,
    host: Host,
    departure: Departure,
    /// Where the image goes there, if it goes into a file.
    place: PathBuf,
    image: Outgoing,
    /// What the other side may read.
    offered: Option<AnyFile>,
    record: Option<FileSink>,
    progress: &'a dyn Progress,
    runs: Option<Runs>,
    why: Option<Error>,
}

/// Why a guest was not handed over.
enum NotHandedOver {
    /// It is not there and never will be: it stays here.
    Before(Error),
    /// It is not known where it is.
    Unknown(Error),
}

impl<E: Into<Error>> From<E> for NotHandedOver {
    fn from(error: E) -> Self {
        NotHandedOver::Before(error.into())
    }
}

impl<'a> Departing<'a> {
    /// Nothing is sent yet but, of a guest that is streamed, the order to take it.
    ///
    /// # Errors
    /// What keeps the image from having a place; the connection's.
    pub fn new(
        request: &'a MoveRequest,
        host: Host,
        departure: Departure,
        place: PathBuf,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let image = match request.way {
            Way::Copied => match &request.spool {
                Some(directory) => Outgoing::file(directory)?,
                None => Outgoing::file(&Lasting::find()?.moves())?,
            },
            Way::Lazy => match &departure.image {
                Some(path) => Outgoing::kept(path)?,
                None => Outgoing::file(&Lasting::find()?.moves())?,
            },
            Way::Streamed => {
                let order = order(request, &departure);
                Outgoing::stream(host.peer(), &to_json(&order)?)?
            }
        };
        Ok(Departing {
            place: request.image.clone().unwrap_or(place),
            request,
            host,
            departure,
            image,
            offered: None,
            record: None,
            progress,
            runs: None,
            why: None,
        })
    }

    /// Ends the guest here, now that it runs there, and gives it what it still needs from here.
    ///
    /// # Errors
    /// [`MoveError::NotEnded`], [`MoveError::Unserved`].
    pub fn finish(self) -> Result<Runs> {
        let guest = self.departure.guest.clone();
        let runs = self.runs.ok_or(MoveError::NothingToSettle { guest })?;
        let departure = match self.departure.there {
            Some(_) => self.departure,
            None => self.departure.runs_there(&runs)?,
        };
        quit_here(&departure)?;
        finish(&departure, self.host, self.progress)?;
        Ok(runs)
    }

    /// Whether the guest is known to run there, whatever failed here afterwards.
    pub fn has_arrived(&self) -> bool {
        self.runs.is_some()
    }

    /// What a save's error means for a guest that was to move, and has not arrived.
    pub fn explain(mut self, error: Error) -> Error {
        if let (Some(path), false) = (&self.departure.image, is_unknown(&error)) {
            let _ = std::fs::remove_file(path);
        }
        if let Outgoing::Stream(streaming) = &mut self.image
            && let Some(early) = streaming.early_answer()
        {
            self.why.get_or_insert(early.into());
        }
        if self.progress.is_cancelled() && !is_unknown(&error) {
            // Ctrl-C at a terminal ends ssh as well; that is no lost connection.
            self.why = Some(PipelineError::Cancelled.into());
        }
        let is_reached = !self.why.as_ref().is_some_and(is_lost);
        if self.request.way == Way::Copied && is_reached && !is_unknown(&error) {
            // What arrived of the image is of no use to another move.
            let nothing: &[u8] = &[];
            let _ = self.host.end(self.departure.id, &nothing, self.progress);
        }
        let guest = self.departure.guest.clone();
        match (error.downcast_ref(), self.why.take()) {
            (Some(SaveError::NotSaved { left, .. }), Some(why)) => {
                let left = left.clone();
                MoveError::NotMoved { guest, left, why }.into()
            }
            (Some(SaveError::PublishUnknown { .. }), Some(why)) => {
                if let Some(MoveError::Lost { .. }) = why.downcast_ref() {
                    return why;
                }
                let host = self.host.name().to_owned();
                MoveError::Unknown { guest, host, why }.into()
            }
            _ => error,
        }
    }

    /// Has the guest loaded and held there.
    fn load(&mut self) -> Result<()> {
        match self.image.as_file()? {
            Some(image) if self.request.way == Way::Lazy => self.load_behind(image),
            Some(image) => self.load_copy(&image),
            None => {
                self.image.finish_stream()?;
                Ok(())
            }
        }
    }

    /// Says GO, and hears what comes of it.
    fn hand_over(&mut self) -> Result<Runs, NotHandedOver> {
        if self.progress.is_cancelled() {
            return Err(PipelineError::Cancelled.into());
        }
        let id = self.departure.id;
        self.say_go()?;
        let nothing: &[u8] = &[];
        let offered: &dyn ReadAt = match &self.offered {
            Some(image) => image,
            None => &nothing,
        };
        match self.host.go(id, offered) {
            Ok(became) => self.went(became, None),
            Err(error) if is_refusal(&error) => Err(self.not_there(error)),
            Err(error) => self.ask_instead(error),
        }
    }

    /// Copies the image there, and has the guest in it held.
    fn load_copy(&mut self, image: &AnyFile) -> Result<()> {
        let request = CopyRequest {
            source: Location::Pipe,
            target: Location::Ssh(self.host.file(&self.place)),
            may_replace: self.request.may_replace,
            bytes_per_second: self.request.bytes_per_second,
            parent: CopyParent::Found,
        };
        transfer::send(image, &request, TRIES, self.progress)?;
        let order = RestoreOrder {
            path: Some(self.place.clone()),
            ..order(self.request, &self.departure)
        };
        let nothing: &[u8] = &[];
        let held = self.host.hold(&order, &nothing, self.progress);
        let held = match held {
            Err(error) if is_lost(&error) => {
                self.host.reconnect()?;
                self.host.hold(&order, &nothing, self.progress)
            }
            held => held,
        };
        held.map(drop)
    }

    /// Has the guest held while its memory is still here.
    fn load_behind(&mut self, image: AnyFile) -> Result<()> {
        let order = RestoreOrder {
            length: Some(image.len()),
            ..order(self.request, &self.departure)
        };
        let offered = self.offered.insert(image);
        self.host.hold(&order, offered, self.progress).map(drop)
    }

    /// Writes down that GO is said.
    fn say_go(&mut self) -> Result<(), NotHandedOver> {
        let failed = |source| {
            let (act, path) = ("publish", self.departure.record_path().unwrap_or_default());
            Error::from(MoveError::Record { act, path, source })
        };
        match self.record.as_mut().map(Sink::publish) {
            Some(Ok(())) => Ok(()),
            Some(Err(PublishError::NotPublished(source))) => {
                Err(NotHandedOver::Before(failed(source)))
            }
            Some(Err(PublishError::Unknown(source))) => Err(NotHandedOver::Unknown(failed(source))),
            None => Err(NotHandedOver::Before(failed(
                io::ErrorKind::NotFound.into(),
            ))),
        }
    }

    /// What became of it, when the connection ended behind GO.
    fn ask_instead(&mut self, why: Error) -> Result<Runs, NotHandedOver> {
        self.progress.warn(&format!(
            "{why}; asking {} what became of it",
            self.host.name()
        ));
        match there::ask(&self.request.host, self.departure.id, self.progress) {
            Ok((host, became)) => {
                self.host = host;
                self.went(became, Some(why))
            }
            Err(error) => Err(NotHandedOver::Unknown(error)),
        }
    }

    /// By the other side's last word. `why` is what was heard before.
    fn went(&mut self, became: Became, why: Option<Error>) -> Result<Runs, NotHandedOver> {
        let (guest, host) = (self.departure.guest.clone(), self.host.name().to_owned());
        match became {
            Became::Runs(runs) => Ok(runs),
            Became::Refused => {
                Err(self.not_there(why.unwrap_or_else(|| MoveError::NotLetRun { host }.into())))
            }
            Became::Lost => Err(NotHandedOver::Unknown(
                MoveError::Lost { guest, host }.into(),
            )),
        }
    }

    /// By the other side's word it is not there: the record loses its name, and the guest stays. The file goes when the guest
    /// runs on: until then whoever looks after the save knows by it that there is something to undo.
    fn not_there(&mut self, why: Error) -> NotHandedOver {
        match self.record.as_mut().map(FileSink::take_back) {
            Some(Ok(())) | None => NotHandedOver::Before(why),
            // With the record there nobody lets it run: the next move settles it.
            Some(Err(source)) => {
                let (act, path) = ("remove", self.departure.record_path().unwrap_or_default());
                NotHandedOver::Unknown(MoveError::Record { act, path, source }.into())
            }
        }
    }
}

fn order(request: &MoveRequest, departure: &Departure) -> RestoreOrder {
    RestoreOrder {
        arguments: request.arguments.clone(),
        id: Some(departure.id),
        length: None,
        path: None,
        again: false,
    }
}

/// Whether the guest may be there.
fn is_unknown(error: &Error) -> bool {
    matches!(error.downcast_ref(), Some(SaveError::PublishUnknown { .. }))
}

fn is_refusal(error: &Error) -> bool {
    matches!(error.downcast_ref(), Some(RemoteError::Refused { .. }))
}

fn is_lost(error: &Error) -> bool {
    error.downcast_ref().is_some_and(RemoteError::is_lost)
}

impl Sink for Departing<'_> {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.image.append(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        // What counts is what arrives there. It may take long: afterwards it is looked once more whether the guest stood still.
        self.load().map_err(|error| {
            let told = io::Error::other(error.to_string());
            self.why = Some(error);
            told
        })
    }

    fn publish(&mut self) -> Result<(), PublishError> {
        let (error, is_known) = match self.hand_over() {
            Ok(runs) => {
                // At once, for whoever goes on if this is killed; if it cannot be, that is told where it ends here.
                if let Ok(departure) = self.departure.runs_there(&runs) {
                    self.departure = departure;
                }
                self.runs = Some(runs);
                return Ok(());
            }
            Err(NotHandedOver::Before(error)) => (error, true),
            Err(NotHandedOver::Unknown(error)) => (error, false),
        };
        let told = io::Error::other(error.to_string());
        self.why = Some(error);
        Err(match is_known {
            true => PublishError::NotPublished(told),
            false => PublishError::Unknown(told),
        })
    }
}

impl HandOver for Departing<'_> {
    fn keep_record(&mut self, mut record: FileSink) -> Result<()> {
        let written = record
            .append(&self.departure.to_json())
            .and_then(|()| record.sync());
        written.map_err(|source| MoveError::Record {
            act: "write",
            path: self.departure.record_path().unwrap_or_default(),
            source,
        })?;
        self.record = Some(record);
        Ok(())
    }
}
