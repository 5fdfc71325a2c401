//! The host where a guest is to go: answers what a client orders about guests; spec/transfer.md §6 and §7.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

use super::MoveError;
use super::arrival::{Arrival, Arrivals};
use super::error::failed;
use super::there::{Became, PrepareOrder, Prepared, RestoreOrder, to_json};
use crate::bytes::ReadAt;
use crate::container::{ContainerError, Manifest};
use crate::error::{Error, Result};
use crate::host;
use crate::host::{GuestDir, RuntimeDir};
use crate::image::{self, Trust};
use crate::pipeline::PipedImage;
use crate::restore::{self, Invocation, Origin, Plan, RestoreReport, RestoreRequest, Way};
use crate::store::Location;
use crate::store::remote::{Asker, Frame, FrameType, Relay, RemoteError, RemoteFile, StreamIn};
use crate::supervise::RunningGuest;
use crate::transfer::Teller;
use crate::units::FileOffset;

/// How long a QEMU whose guest waits for its memory may take to answer.
const RESUME_TAKES: Duration = Duration::from_secs(60);

/// Makes a request of the arguments of a `vmstow restore`, and of the image beside them.
pub type Request<'a> = dyn Fn(&[String], Location) -> Result<RestoreRequest> + 'a;

/// Answers orders about guests.
pub struct Reception<'a> {
    /// Understands arguments.
    pub request: &'a Request<'a>,
    /// The program that has the watch in it: this one.
    pub program: PathBuf,
}

/// A guest that is loaded.
struct Loaded {
    report: RestoreReport,
    guest: RunningGuest,
    shall_run: bool,
}

impl Reception<'_> {
    /// Answers an order, if it is one about guests.
    ///
    /// # Errors
    /// Why it cannot be done.
    pub fn answer(&self, order: &Frame, asker: &Arc<Asker>) -> Result<bool> {
        match order.frame_type {
            FrameType::Prepare => {
                let prepared = self.prepare(&parse(&order.body)?, asker)?;
                answer(asker, FrameType::Prepared, order.number, &prepared)?;
            }
            FrameType::Restore => self.restore(order, asker)?,
            FrameType::Settle => {
                let became = Arrivals::open()?.settle(id_in(&order.body)?)?;
                answer(asker, FrameType::Settled, order.number, &became)?;
            }
            FrameType::End => {
                Arrivals::open()?.forget(id_in(&order.body)?)?;
                answer(asker, FrameType::Ended, order.number, &())?;
            }
            // Whom it means is not here any more.
            FrameType::Go => {
                let id = id_in(&order.body)?;
                return Err(MoveError::Refused { id }.into());
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Holds what is known of a guest that is not saved yet against this host.
    fn prepare(&self, order: &PrepareOrder, asker: &Arc<Asker>) -> Result<Prepared> {
        /// More than a manifest and XML can have.
        const MOST: u64 = 128 << 20;
        let unclear = |what: &str| MoveError::Order {
            what: what.to_owned(),
        };
        if order.length > MOST || order.manifest_length > order.length {
            return Err(unclear("lengths that cannot be").into());
        }
        let offered = RemoteFile::offered(Arc::clone(asker), order.length);
        let mut bytes = vec![0; usize::try_from(order.length).unwrap_or(0)];
        offered
            .read_exact_at(&mut bytes, 0)
            .map_err(|_| unclear("nothing is offered"))?;
        let xml = bytes.split_off(usize::try_from(order.manifest_length).unwrap_or(0));
        let manifest = manifest_of(&bytes)?;
        let xml = String::from_utf8(xml).map_err(|_| unclear("XML that is no text"))?;
        let mut request = (self.request)(&order.arguments, Location::Pipe)?;
        restore::call_disks_by_id(&mut request.remaps, &manifest, &xml)?;
        let plan = Plan::check(manifest, &Trust::Unsigned, &request)?;
        let arrivals = Arrivals::open()?;
        arrivals.clean();
        let place = arrivals.image(order.id);
        let warnings = plan.warnings().iter();
        Ok(Prepared {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            warnings: warnings
                .map(|warning| format!("{} [{}]", warning.fact, warning.code))
                .collect(),
            free_bytes: place
                .parent()
                .and_then(|directory| host::free_space(directory).ok()),
            place,
        })
    }

    /// Restores a guest, and holds it if it moves.
    fn restore(&self, frame: &Frame, asker: &Arc<Asker>) -> Result<()> {
        asker.expect_orders();
        let order: RestoreOrder = parse(&frame.body)?;
        let stream = StreamIn::new(Arc::clone(asker));
        let rest = match (&order.length, &order.path) {
            (None, None) => Some(stream.rest()),
            _ => None,
        };
        let outcome = self.restore_of(&order, frame.number, asker, stream);
        if let (Err(error), Some(rest)) = (&outcome, rest) {
            // The client has to hear it before it has sent all; what it sends until then is passed over.
            asker.peer().refuse(frame.number, error)?;
            rest.pass_over()?;
            return Ok(());
        }
        outcome
    }

    fn restore_of(
        &self,
        order: &RestoreOrder,
        number: u64,
        asker: &Arc<Asker>,
        stream: StreamIn,
    ) -> Result<()> {
        // Until all is over: who gives the guest its memory reads there.
        let _relay = relay(order, asker)?;
        if let (Some(id), true) = (order.id, order.again) {
            return self.go_on(id, number, asker);
        }
        let arrival = match order.id {
            Some(id) => Some(Arrivals::open()?.begin(id, &self.program)?),
            None => None,
        };
        let loaded = self.load(order, asker, stream);
        let loaded = match (loaded, &arrival) {
            (Ok(loaded), Some(arrival)) => arrival
                .loaded(&loaded.guest, loaded.shall_run)
                .map(|()| loaded),
            (loaded, _) => loaded,
        };
        match (loaded, arrival) {
            (Ok(loaded), Some(arrival)) => hold(loaded, arrival, number, asker),
            (Ok(loaded), None) => {
                answer(asker, FrameType::Restored, number, &loaded.report)?;
                loaded.guest.keep();
                Ok(())
            }
            (Err(error), arrival) => {
                if let Some(arrival) = arrival {
                    arrival.give_up();
                }
                Err(error)
            }
        }
    }

    /// Gives a guest that runs the rest of its memory, after the connection was lost.
    fn go_on(&self, id: Uuid, number: u64, asker: &Arc<Asker>) -> Result<()> {
        let dir = match Arrivals::open()?.runs(id)? {
            Some(name) => Some(RuntimeDir::open()?.guest(&name)?),
            // It was told already that the move is over: the guest has all of its memory.
            None => None,
        };
        if let Some(dir) = &dir {
            let invocation = Invocation {
                program: self.program.clone(),
                arguments: Vec::new(),
                cwd: PathBuf::from("/"),
            };
            restore::resume(dir, &invocation, RESUME_TAKES)?;
        }
        answer(asker, FrameType::Restored, number, &())?;
        let order = asker.next_order()?;
        match order.frame_type {
            FrameType::End => end(id, dir.as_ref(), order.number, asker),
            _ => Err(asker
                .peer()
                .broke("an order that does not belong here")
                .into()),
        }
    }

    fn load(&self, order: &RestoreOrder, asker: &Arc<Asker>, stream: StreamIn) -> Result<Loaded> {
        let teller = Teller::new(asker);
        let mut location = order.path.clone().map_or(Location::Pipe, Location::Path);
        if let (Some(id), Some(_)) = (order.id, order.length) {
            location = Location::Peer(relay_socket(id)?);
        }
        let mut request = (self.request)(&order.arguments, location.clone())?;
        request.held_as = order.id.map(|id| id.to_string());
        let opened = match (order.length, &order.path) {
            (Some(_), _) if order.id.is_some() => image::open(&location)?,
            (Some(length), _) => {
                image::open_offered(Arc::new(RemoteFile::offered(Arc::clone(asker), length)))?
            }
            (None, Some(_)) => image::open(&location)?,
            (None, None) if request.trust => return load_stream(&mut request, stream, &teller),
            (None, None) => image::open_pipe(&mut { stream })?,
        };
        let (manifest, xml) = (opened.image().manifest()?, opened.image().xml()?);
        let trust = Trust::of(opened.image())?;
        restore::call_disks_by_id(&mut request.remaps, &manifest, &xml)?;
        let mut plan = Plan::check(manifest, &trust, &request)?;
        plan.check_target(&opened)?;
        let origin: Origin<StreamIn> = Origin::Image(Box::new(opened));
        load(&plan, origin, &teller)
    }
}

/// Loads a guest while its image arrives; whoever is trusted with that gave the order.
fn load_stream(
    request: &mut RestoreRequest,
    stream: StreamIn,
    teller: &Teller<'_>,
) -> Result<Loaded> {
    let piped = PipedImage::begin(stream)?;
    let head = piped.head()?;
    let (manifest, xml) = (manifest_of(head.manifest_json)?, head.xml.to_owned());
    restore::call_disks_by_id(&mut request.remaps, &manifest, &xml)?;
    let plan = Plan::check(manifest, &Trust::Unsigned, request)?;
    load(&plan, Origin::Pipe(piped), teller)
}

fn load(plan: &Plan, origin: Origin<StreamIn>, teller: &Teller<'_>) -> Result<Loaded> {
    let (report, guest) = restore::restore(plan, origin, teller)?;
    Ok(Loaded {
        report,
        guest,
        shall_run: plan.shall_run(),
    })
}

fn manifest_of(json: &[u8]) -> Result<Manifest> {
    let at = FileOffset(0);
    let manifest = Manifest::from_json(json);
    Ok(manifest.map_err(|source| ContainerError::Manifest { at, source })?)
}

/// Holds a loaded guest until the client lets it run; without that it ends with the connection.
fn hold(loaded: Loaded, arrival: Arrival, number: u64, asker: &Arc<Asker>) -> Result<()> {
    let Loaded { report, guest, .. } = loaded;
    let dir = guest.dir().clone();
    let is_lazy = report.memory == Way::Lazy;
    let mut held = Some(guest);
    let told = answer(asker, FrameType::Restored, number, &report);
    let outcome = told.and_then(|()| {
        loop {
            let order = asker.next_order()?;
            match order.frame_type {
                FrameType::Go => {
                    let became = match arrival.is(id_in(&order.body)?) {
                        true => arrival.go(),
                        false => return Err(asker.peer().broke("GO for another move").into()),
                    };
                    let became = became.inspect_err(|_| drop(held.take()))?;
                    if let (Became::Runs(_), Some(guest)) = (&became, held.take()) {
                        guest.keep();
                    }
                    answer(asker, FrameType::Runs, order.number, &became)?;
                }
                FrameType::End => {
                    let id = id_in(&order.body)?;
                    let lazy = (is_lazy && held.is_none()).then_some(&dir);
                    return end(id, lazy, order.number, asker);
                }
                _ => {
                    return Err(asker
                        .peer()
                        .broke("an order that does not belong here")
                        .into());
                }
            }
        }
    });
    drop(held);
    arrival.give_up();
    outcome
}

/// Forgets a move, once the guest in this directory has all of its memory.
fn end(id: Uuid, lazy: Option<&GuestDir>, number: u64, asker: &Arc<Asker>) -> Result<()> {
    if let Some(dir) = lazy {
        restore::wait_for_memory(dir, &Teller::new(asker))?;
    }
    Arrivals::open()?.forget(id)?;
    answer(asker, FrameType::Ended, number, &())
}

/// Where a guest finds what is offered for it, whoever offers it again.
fn relay_socket(id: Uuid) -> Result<PathBuf> {
    let name = format!("{}.sock", id.simple());
    Ok(RuntimeDir::open()?.path().join(name))
}

/// Lets others of this host read what is offered for a guest that is held.
fn relay(order: &RestoreOrder, asker: &Arc<Asker>) -> Result<Option<Relay>> {
    let (Some(id), Some(length)) = (order.id, order.length) else {
        return Ok(None);
    };
    let path = relay_socket(id)?;
    let file = RemoteFile::offered(Arc::clone(asker), length);
    let relay = Relay::listen(&path, file).map_err(failed("listen at", path))?;
    Ok(Some(relay))
}

fn parse<T: for<'de> serde::Deserialize<'de>>(order: &[u8]) -> Result<T> {
    let parsed = serde_json::from_slice(order).map_err(|error| MoveError::Order {
        what: error.to_string(),
    });
    Ok(parsed?)
}

fn id_in(order: &[u8]) -> Result<Uuid> {
    let id = Uuid::from_slice(order).map_err(|_| MoveError::Order {
        what: "it names no move".to_owned(),
    });
    Ok(id?)
}

fn answer(
    asker: &Arc<Asker>,
    frame_type: FrameType,
    number: u64,
    answer: &impl Serialize,
) -> Result<()> {
    let json = to_json(answer)?;
    let written: Result<(), RemoteError> = asker.peer().write(frame_type, number, &json);
    written.map_err(Error::from)
}
