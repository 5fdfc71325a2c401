//! The process that gives a guest its memory: it plays the source of a postcopy migration, from an image.
//!
//! One thread listens to QEMU; workers read, verify and decompress chunks and give their pages, some for what is asked for
//! and some, behind them, for all the rest. A chunk is given whole and once, so none is kept. Zero pages are given when
//! they are asked for; those that never were are zero at the end of the migration.
//!
//! A chunk that does not match its digest is never given. Once the guest runs it cannot be told of it: it is frozen
//! and marked damaged.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::desk::{Desk, Slot};
use super::error::ServeError;
use super::give::{Giver, Pages, is_gone};
use super::received::Received;
use super::record;
use super::recover;
use super::task::Task;
use super::worker::{self, Worker};
use crate::container::{ChunkPages, Image, PageLocation, PageMap};
use crate::error::{Error, Result};
use crate::host::{GuestDir, ProcessId};
use crate::image::{self, OpenedImage};
use crate::pipeline::{ChunkTable, device_sections};
use crate::store::AnyFile;
use crate::stream::postcopy::{self, LOADED, Message, ReturnPath};
use crate::stream::writer::unused_section;
use crate::supervise::{self, Damage, Phase, Serving};
use crate::units::{PAGE_LEN, PageIndex};

/// The hidden subcommand that makes the program such a process.
pub const SERVE_SUBCOMMAND: &str = "__serve";

/// The option with which it takes over from one that was killed.
pub const RECOVER: &str = "--recover";

/// How often it is told how far the giving is.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Zero pages given at once around one that was asked for.
const ZERO_PAGES: u64 = 32;

/// While the order of requests is recorded nothing is given unasked until nothing was asked for this long, or until so
/// long after the guest could run.
const RECORD_IDLE: Duration = Duration::from_secs(1);
const RECORD_LIMIT: Duration = Duration::from_secs(20);

/// The program's life as this process: QEMU's end of the migration is standard input, or is asked for at the keeper.
pub fn run_server(dir: &Path, is_recovery: bool) -> ExitCode {
    let served = prepare(dir).and_then(|(dir, task)| serve(&dir, &task, is_recovery));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            supervise::say_failed(&error);
            ExitCode::FAILURE
        }
    }
}

fn prepare(dir: &Path) -> Result<(GuestDir, Task)> {
    supervise::detach().map_err(ServeError::Socket)?;
    let dir = GuestDir::at(dir)?;
    let task = Task::of(&dir)?.ok_or(ServeError::NoTask)?;
    Ok((dir, task))
}

fn stdin_socket() -> Result<OwnedFd> {
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    Ok(stdin.map_err(ServeError::Socket)?)
}

/// The image that the task names, if it still is that one.
fn open_image(task: &Task) -> Result<OpenedImage> {
    let opened = image::open(&task.location())?;
    let (uuid, digest) = (
        opened.image().identity().image_uuid,
        opened.image().image_digest(),
    );
    match uuid == task.image_uuid && digest.to_string() == task.image_digest {
        true => Ok(opened),
        false => Err(ServeError::OtherImage {
            path: task.image.clone(),
        }
        .into()),
    }
}

fn serve(dir: &GuestDir, task: &Task, is_recovery: bool) -> Result<()> {
    let since = Instant::now();
    let opened = open_image(task)?;
    opened.image().reader().lock_shared(&task.image)?;
    let page_map = opened.image().page_map()?.ok_or(ServeError::NoPageMap)?;
    let pages = ChunkPages::of(&page_map);
    let manifest = opened.image().manifest()?;
    let begins_at = manifest.stream.as_ref().and_then(|it| it.device_state_at);
    let sections = device_sections(opened.image(), begins_at)?;
    // The same for whoever takes over.
    let ram_section = unused_section(&sections);
    // An image that is of no use leaves a guest that waits as it is.
    let stream = match is_recovery {
        false => UnixStream::from(stdin_socket()?),
        true => recover::connect(dir)?,
    };
    let mut listener = Listener::new(&stream)?;
    let received = match is_recovery {
        false => {
            let machine_type = &manifest.machine.machine_type;
            let blocks = task.ram_blocks();
            let opening = postcopy::opening(machine_type, ram_section, &blocks, &sections);
            let opening = opening.ok_or(ServeError::DeviceState)?;
            (&stream).write_all(&opening).map_err(ServeError::Socket)?;
            Received::nothing(&page_map)
        }
        true => recover::received(&stream, &mut listener.path, task, &page_map)?,
    };
    let given = received.whole_chunks(&pages);
    let recorded = record::recorded(opened.image(), &pages);
    let desk = Desk::new(pages.chunks().len(), &given, recorded);
    let copy = stream.try_clone().map_err(ServeError::Socket)?;
    let giver = Giver::new(dir, task, copy, ram_section);
    let server = Server {
        dir,
        task,
        image: opened.image(),
        page_map: &page_map,
        pages: &pages,
        desk: &desk,
        giver: &giver,
        ram_section,
        since,
        process: ProcessId::of(std::process::id().cast_signed())?,
        directory: directory_of(dir),
        is_recovery,
    };
    let mut serving = match server.run(&mut listener, received) {
        Ok(serving) => serving,
        Err(error) => {
            server.note(&error);
            return Err(error);
        }
    };
    if task.options.records {
        let order = pages_of(&desk.order(), &pages);
        // The guest has its memory all the same.
        let recorded = record::write(opened, &order);
        serving.problem = recorded.err().map(|error| error.to_string());
    }
    Ok(serving.write(dir)?)
}

fn pages_of(order: &[Slot], pages: &ChunkPages<'_>) -> Vec<crate::units::ChunkIndex> {
    let chunks = pages.chunks();
    order
        .iter()
        .filter_map(|slot| chunks.get(*slot).copied())
        .collect()
}

/// Reads what QEMU says, and is woken by workers.
pub struct Listener<'a> {
    stream: &'a UnixStream,
    path: ReturnPath,
    /// A worker has something to say.
    wake: OwnedFd,
}

impl<'a> Listener<'a> {
    fn new(stream: &'a UnixStream) -> Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Listener {
            stream,
            path: ReturnPath::default(),
            wake: wake.map_err(|errno| ServeError::Socket(errno.into()))?,
        })
    }

    /// Waits until QEMU says something or a worker wakes us; whether QEMU's end is still open.
    fn wait(&mut self) -> Result<bool, ServeError> {
        let timeout = Timespec::try_from(TELL_EVERY).ok();
        let mut ready = [
            PollFd::new(self.stream, PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        match poll(&mut ready, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(ServeError::Socket(errno.into())),
        }
        let [says, woken] = ready.map(|fd| !fd.revents().is_empty());
        if woken {
            // That it was written is all it says.
            let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        }
        match says {
            true => self.read(),
            false => Ok(true),
        }
    }

    fn read(&mut self) -> Result<bool, ServeError> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => Ok(false),
            Ok(len) => {
                self.path.push(&bytes[..len]);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(true),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(ServeError::Socket(error)),
        }
    }
}

struct Server<'a> {
    dir: &'a GuestDir,
    task: &'a Task,
    image: &'a Image<AnyFile>,
    page_map: &'a PageMap,
    pages: &'a ChunkPages<'a>,
    desk: &'a Desk,
    giver: &'a Giver<'a>,
    ram_section: u32,
    since: Instant,
    process: ProcessId,
    directory: Option<u64>,
    is_recovery: bool,
}

/// The inode of a guest's directory.
fn directory_of(dir: &GuestDir) -> Option<u64> {
    std::fs::metadata(dir.path()).ok().map(|it| it.ino())
}

/// How the conversation with QEMU stands.
struct Talk {
    received: Received,
    /// The block that was named last.
    block: Option<usize>,
    requests: u64,
    last_request: Instant,
    loaded_at: Option<Instant>,
    pushes: bool,
    is_ended: bool,
    told: Option<Instant>,
}

impl Server<'_> {
    /// Gives the guest all its memory; how that went.
    fn run(&self, listener: &mut Listener<'_>, received: Received) -> Result<Serving> {
        let table = ChunkTable::new(self.image);
        let failure = Mutex::new(None);
        let wake = listener.wake.try_clone().map_err(ServeError::Socket)?;
        // Workers only read what came before us; what comes now is given whole.
        let before = received.clone();
        let worker = Worker {
            table: &table,
            pages: self.pages,
            desk: self.desk,
            giver: self.giver,
            received: &before,
            failure: &failure,
            wake: &wake,
            fill_rate: self.task.options.fill_rate,
        };
        thread::scope(|scope| {
            worker::begin(scope, &worker, self.task.threads);
            let done = self.talk(listener, received, &failure);
            self.desk.close();
            done
        })
    }

    fn talk(
        &self,
        listener: &mut Listener<'_>,
        received: Received,
        failure: &Mutex<Option<Error>>,
    ) -> Result<Serving> {
        let mut talk = Talk {
            received,
            block: None,
            requests: 0,
            last_request: Instant::now(),
            loaded_at: None,
            pushes: false,
            is_ended: false,
            told: None,
        };
        match self.is_recovery {
            true => self.loaded(&mut talk)?,
            false => self.tell(&mut talk)?,
        }
        loop {
            let is_open = listener.wait()?;
            while let Some(message) = listener.path.next_message().map_err(ServeError::Message)? {
                if self.take(&mut talk, message)? {
                    return Ok(self.serving(&talk, Phase::Complete));
                }
            }
            let failed = failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(error) = failed {
                return Err(self.give_up(&talk, error));
            }
            if !is_open {
                return Err(ServeError::HungUp.into());
            }
            self.go_on(&mut talk)?;
        }
    }

    /// Begins what is due: to give unasked, to end.
    fn go_on(&self, talk: &mut Talk) -> Result<()> {
        let Some(loaded_at) = talk.loaded_at else {
            return Ok(());
        };
        let records = self.task.options.records
            && talk.last_request.elapsed() < RECORD_IDLE
            && loaded_at.elapsed() < RECORD_LIMIT;
        if !talk.pushes && !records {
            talk.pushes = true;
            self.desk.allow_push();
        }
        if self.desk.left() == 0 && !talk.is_ended {
            talk.is_ended = true;
            let closing = postcopy::closing(self.ram_section);
            self.giver.send_all(&closing).map_err(ServeError::Socket)?;
        }
        if talk.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            self.tell(talk)?;
        }
        Ok(())
    }

    /// Takes what QEMU says; whether that is the end.
    fn take(&self, talk: &mut Talk, message: Message) -> Result<bool> {
        match message {
            Message::Request { block, start, len } => {
                if let Some(idstr) = block {
                    let blocks = self.page_map.blocks();
                    talk.block = blocks.iter().position(|one| one.idstr == idstr);
                }
                let block = talk.block.ok_or(ServeError::UnknownBlock)?;
                talk.requests += 1;
                talk.last_request = Instant::now();
                let first = start / PAGE_LEN as u64;
                let count = u64::from(len).div_ceil(PAGE_LEN as u64).max(1);
                for page in first..first + count {
                    self.answer(talk, block, PageIndex(page))?;
                }
            }
            Message::Pong(LOADED) => self.loaded(talk)?,
            Message::Shut(0) if talk.is_ended => return Ok(true),
            Message::Shut(code) => return Err(ServeError::Refused { code }.into()),
            Message::Pong(_)
            | Message::Received { .. }
            | Message::ResumeAck(_)
            | Message::Other(_) => {}
        }
        Ok(false)
    }

    /// The devices are loaded: the guest can run.
    fn loaded(&self, talk: &mut Talk) -> Result<()> {
        self.giver.loaded();
        talk.loaded_at = Some(Instant::now());
        talk.last_request = Instant::now();
        self.tell(talk)?;
        supervise::say_ready();
        supervise::fall_silent();
        Ok(())
    }

    /// Has a page given that was asked for.
    fn answer(&self, talk: &mut Talk, block: usize, page: PageIndex) -> Result<()> {
        if talk.is_ended {
            // It crossed the end of the migration, with which all that was not given is zero.
            return Ok(());
        }
        match self.page_map.locate(block, page) {
            Some(PageLocation::Data { chunk, .. }) => {
                if let Ok(slot) = self.pages.chunks().binary_search(&chunk) {
                    self.desk.ask(slot);
                }
            }
            Some(PageLocation::Zero) => self.give_zeros(talk, block, page)?,
            None => return Err(ServeError::UnknownBlock.into()),
        }
        Ok(())
    }

    /// Gives a zero page and those behind it.
    fn give_zeros(&self, talk: &mut Talk, block: usize, page: PageIndex) -> Result<()> {
        let pages = self.page_map.locate_range(block, page, ZERO_PAGES);
        let zeros = pages.take_while(|(page, location)| {
            *location == PageLocation::Zero && !talk.received.has(block, *page)
        });
        let count = zeros.count();
        if count > 0 {
            let given = self.giver.give(block, page, Pages::Zeros(count));
            given.map_err(ServeError::Socket)?;
            talk.received.add(block, page, count);
        }
        Ok(())
    }

    /// A worker failed. If the guest may run already, and its memory turned out damaged, it must not run on.
    fn give_up(&self, talk: &Talk, error: Error) -> Error {
        let is_damage = error.kind() == crate::error::ErrorKind::Image;
        if !is_damage || talk.loaded_at.is_none() {
            return error;
        }
        let pages = error
            .downcast_ref()
            .and_then(|why| self.image.damaged_pages(why));
        let damage = Damage {
            what: error.to_string(),
            at: error.at(),
            pages,
            found_at: jiff::Timestamp::now(),
        };
        match supervise::freeze(self.dir, self.task.qemu, &damage) {
            Ok(()) => error,
            Err(not_frozen) => not_frozen.into(),
        }
    }

    fn tell(&self, talk: &mut Talk) -> Result<()> {
        // Of a guest that was started over meanwhile the directory is another one under the same name.
        if directory_of(self.dir) != self.directory {
            return Err(ServeError::HungUp.into());
        }
        talk.told = Some(Instant::now());
        let phase = match talk.loaded_at {
            None => Phase::Loading,
            Some(_) => Phase::Serving,
        };
        Ok(self.serving(talk, phase).write(self.dir)?)
    }

    /// Notes why the guest gets no more memory, if it is still the same guest.
    fn note(&self, error: &Error) {
        let noted = Serving::of(self.dir).ok().flatten();
        let noted = noted.filter(|it| it.process == self.process);
        if let Some(mut serving) = noted {
            serving.problem = Some(error.to_string());
            // Without it `list` tells only that nobody serves the guest.
            let _ = serving.write(self.dir);
        }
    }

    fn serving(&self, talk: &Talk, phase: Phase) -> Serving {
        let total_chunks = self.pages.chunks().len() as u64;
        let micros = |it: Duration| u64::try_from(it.as_micros()).unwrap_or(u64::MAX);
        Serving {
            process: self.process,
            phase,
            given_chunks: total_chunks.saturating_sub(self.desk.left() as u64),
            total_chunks,
            requests: talk.requests,
            worst_stall_us: micros(self.desk.worst_stall()),
            is_direct: self.giver.is_direct(),
            elapsed_ms: micros(self.since.elapsed()) / 1000,
            problem: None,
        }
    }
}
