//! The record of a guest that moves here, and who looks after it if the one that holds it is killed.
//!
//! | state | the guest |
//! |---|---|
//! | held | is being loaded, or is loaded; it does not run |
//! | heard | may run: GO was heard |
//! | runs | was let run |
//! | refused | does not run and never will by this move |
//!
//! A record is a file in the directory of arrivals, named after the move. Every step is synced before what it says is done, and
//! made under one lock. A process of ours, the *watch*, is started before a guest is; when its holder is gone it ends a guest
//! that is only held, and lets one run of which GO was heard.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::MoveError;
use super::departure::sync_directory_of;
use super::error::failed;
use super::there::{Became, Runs};
use crate::error::Result;
use crate::host::{Lasting, ProcessId, RuntimeDir, boot_id, processes_with};
use crate::qmp::{QmpClient, QmpError, RunState};
use crate::restore::HELD_VARIABLE;
use crate::supervise::{self, RunningGuest, SideProcess, SuperviseError, start_side_process};

/// The hidden subcommand of the watch.
pub const WATCH_SUBCOMMAND: &str = "__watch-arrival";

/// How long a monitor may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How long a killed QEMU may take to be gone.
const KILL_TAKES: Duration = Duration::from_secs(10);

/// A QEMU that was just being started when its holder was killed may not be seen at once.
const LOOKS: u32 = 4;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// Records of moves that came to nothing, and images, are removed when they are this old; images of moves that have no record,
/// which nobody sends any more, much earlier. That GO was heard is forgotten only when the other side says that it may be.
const OLD: Duration = Duration::from_secs(7 * 24 * 3600);
const UNSENT: Duration = Duration::from_secs(600);

/// How far a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Held,
    Heard,
    Runs,
    Refused,
}

/// What a record says.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    state: State,
    boot_id: String,
    guest: Option<Guest>,
}

/// The guest, once it is loaded.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Guest {
    name: String,
    qemu: ProcessId,
    monitor: PathBuf,
    /// Whether it runs when it is let go; otherwise it stays paused, as it was.
    shall_run: bool,
}

/// All guests that move here.
#[derive(Debug)]
pub struct Arrivals {
    directory: PathBuf,
}

/// A guest that moves here, with its watch.
#[derive(Debug)]
pub struct Arrival {
    arrivals: Arrivals,
    id: Uuid,
    /// Dropped, it makes the watch look.
    _watch: (SideProcess, UnixStream),
}

/// Nobody else takes a step while this is held.
struct Lock {
    _file: File,
}

impl Arrivals {
    /// Those of this user; their directory is made if need be.
    ///
    /// # Errors
    /// There is no place for it.
    pub fn open() -> Result<Self> {
        Arrivals::at(Lasting::find()?.arrivals())
    }

    fn at(directory: PathBuf) -> Result<Self> {
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&directory);
        made.map_err(failed("create", &directory))?;
        Ok(Arrivals { directory })
    }

    /// Where the image of a move lies until it is over.
    pub fn image(&self, id: Uuid) -> PathBuf {
        self.directory.join(format!("{id}.stow"))
    }

    fn record(&self, id: Uuid) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    fn lock(&self) -> Result<Lock> {
        let path = self.directory.join("lock");
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(failed("open", &path))?;
        let locked = flock(&file, FlockOperation::LockExclusive);
        locked.map_err(|errno| failed("lock", &path)(errno.into()))?;
        Ok(Lock { _file: file })
    }

    /// Keeps a place for a guest, and starts its watch; `program` is this one.
    ///
    /// # Errors
    /// [`MoveError::Refused`] if the move was taken back already, [`MoveError::Twice`] if it is under way.
    pub fn begin(self, id: Uuid, program: &Path) -> Result<Arrival> {
        let lock = self.lock()?;
        match self.read(id)?.map(|record| record.state) {
            None => {}
            Some(State::Refused) => return Err(MoveError::Refused { id }.into()),
            Some(_) => return Err(MoveError::Twice { id }.into()),
        }
        self.write(id, &Record::new(State::Held))?;
        drop(lock);
        let watch = self.start_watch(id, program);
        let watch = watch.inspect_err(|_| drop(self.remove(id)))?;
        Ok(Arrival {
            arrivals: self,
            id,
            _watch: watch,
        })
    }

    fn start_watch(&self, id: Uuid, program: &Path) -> Result<(SideProcess, UnixStream)> {
        let record = self.record(id);
        let (ours, theirs) = UnixStream::pair().map_err(failed("watch", &record))?;
        let mut watch =
            start_side_process(program, &[WATCH_SUBCOMMAND], &record, Some(theirs.into()))?;
        supervise::wait_ready(&mut watch)?;
        Ok((watch, ours))
    }

    /// The name of the guest of a move that was let run here and still does; `None` of one that has ended, or whose move is over.
    ///
    /// # Errors
    /// [`MoveError::Refused`] of one that was not let run; what the file system says.
    pub fn runs(&self, id: Uuid) -> Result<Option<String>> {
        let Some(record) = self.read(id)? else {
            return Ok(None);
        };
        match (record.state, record.guest) {
            // That it runs could not be written down, if it only says that GO was heard.
            (State::Runs | State::Heard, Some(guest)) => {
                let is_there = record.boot_id == boot_id() && guest.qemu.is_alive();
                Ok(is_there.then_some(guest.name))
            }
            _ => Err(MoveError::Refused { id }.into()),
        }
    }

    /// Says what became of a move, after doing what is left of it: who asks takes the answer for the last word.
    ///
    /// # Errors
    /// What the file system says.
    pub fn settle(&self, id: Uuid) -> Result<Became> {
        let _lock = self.lock()?;
        let record = self.read(id)?;
        let is_now = |record: &Record| record.boot_id == boot_id();
        Ok(match record {
            None => {
                self.write(id, &Record::new(State::Refused))?;
                Became::Refused
            }
            Some(record) if record.state == State::Refused => Became::Refused,
            Some(record) if record.state == State::Held => {
                self.write(id, &record.in_state(State::Refused))?;
                end_held(id)?;
                Became::Refused
            }
            Some(record) if !is_now(&record) => Became::Lost,
            Some(record) if record.state == State::Heard => self.let_run_again(id, &record)?,
            Some(record) => match record.guest {
                Some(guest) => Became::Runs(guest.runs("running")),
                None => Became::Lost,
            },
        })
    }

    /// Lets a guest run of which GO was heard just now, and writes down what came of it. If it does not run, or that is not
    /// known, it is ended: it must not run while somebody decides where it shall.
    fn let_run_first(&self, id: Uuid, record: &Record) -> Became {
        let Some(guest) = &record.guest else {
            return Became::Lost;
        };
        match cont(guest, false) {
            Ok(state) => self.note_that_it_runs(id, record, guest, &state),
            Err(error) => {
                let never_ran = matches!(error, NotLetRun::Never(_));
                let ended = end_held(id);
                let noted = ended.and_then(|()| self.write(id, &record.in_state(State::Refused)));
                match never_ran && noted.is_ok() {
                    true => Became::Refused,
                    false => Became::Lost,
                }
            }
        }
    }

    /// Lets a guest run of which GO was heard once, if it stands still, and writes down what came of it. It may have run long
    /// since: it is neither ended nor called refused.
    ///
    /// # Errors
    /// QEMU does not say whether it runs.
    fn let_run_again(&self, id: Uuid, record: &Record) -> Result<Became> {
        let Some(guest) = &record.guest else {
            return Ok(Became::Lost);
        };
        match cont(guest, true) {
            Ok(state) => Ok(self.note_that_it_runs(id, record, guest, &state)),
            Err(NotLetRun::Never(error) | NotLetRun::Unknown(error))
                if error.is_gone() || !guest.qemu.is_alive() =>
            {
                Ok(Became::Lost)
            }
            Err(NotLetRun::Never(error) | NotLetRun::Unknown(error)) => Err(error.into()),
        }
    }

    fn note_that_it_runs(&self, id: Uuid, record: &Record, guest: &Guest, state: &str) -> Became {
        // It runs, whether that can be written down or not; who finds `heard` looks once more.
        let _ = self.write(id, &record.in_state(State::Runs));
        Became::Runs(guest.runs(state))
    }

    /// Forgets a move that is over, and removes the image that came for it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn forget(&self, id: Uuid) -> Result<()> {
        let _lock = self.lock()?;
        match self.read(id)?.map(|record| record.state) {
            // Somebody works on it.
            Some(State::Held) => return Ok(()),
            Some(State::Heard | State::Runs | State::Refused) => self.remove(id)?,
            None => {}
        }
        let image = self.image(id);
        let mut part = image.clone().into_os_string();
        part.push(".part");
        for path in [image, part.into()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", path)(error).into());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes what old moves left behind. That it cannot be removed harms nobody.
    pub fn clean(&self) {
        let Ok(_lock) = self.lock() else {
            return;
        };
        for entry in fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            let age = entry.metadata().and_then(|it| it.modified());
            let age = age.map(|time| SystemTime::now().duration_since(time).unwrap_or_default());
            let path = entry.path();
            let limit = match path.extension().and_then(|it| it.to_str()) {
                Some("json") if self.has_heard(&path) => continue,
                Some("json") => OLD,
                // Whoever was killed while writing it; nobody writes now.
                Some("new") => Duration::ZERO,
                Some("stow" | "part") if !self.has_record(&path) => UNSENT,
                Some("stow" | "part") => OLD,
                _ => continue,
            };
            if age.is_ok_and(|age| age >= limit) {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Whether a record says that GO was heard, or cannot be read.
    fn has_heard(&self, record: &Path) -> bool {
        let id = record.file_stem().and_then(|stem| stem.to_str());
        let record = id.and_then(|id| id.parse().ok()).map(|id| self.read(id));
        let came_to_nothing = [State::Held, State::Refused];
        !matches!(record, Some(Ok(Some(record))) if came_to_nothing.contains(&record.state))
    }

    /// Whether there is a record of the move whose image this is.
    fn has_record(&self, image: &Path) -> bool {
        let name = image.file_name().and_then(|name| name.to_str());
        let id = name.and_then(|name| name.split('.').next());
        id.is_some_and(|id| self.directory.join(format!("{id}.json")).exists())
    }

    fn read(&self, id: Uuid) -> Result<Option<Record>> {
        let path = self.record(id);
        match fs::read(&path) {
            Ok(bytes) => {
                let record = serde_json::from_slice(&bytes);
                Ok(Some(record.map_err(|error| {
                    failed("read", path)(io::Error::other(error))
                })?))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", path)(error).into()),
        }
    }

    /// Writes a record, durably, whole or not at all.
    fn write(&self, id: Uuid, record: &Record) -> Result<()> {
        let path = self.record(id);
        let text = serde_json::to_vec_pretty(record).unwrap_or_default();
        // Whoever was killed here before has left it, or not; this is done under the lock.
        let new = path.with_extension("new");
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        });
        written.map_err(failed("write", &path))?;
        Ok(sync_directory_of(&path)?)
    }

    fn remove(&self, id: Uuid) -> Result<()> {
        let path = self.record(id);
        let _ = fs::remove_file(path.with_extension("new"));
        fs::remove_file(&path).map_err(failed("remove", &path))?;
        Ok(sync_directory_of(&path)?)
    }
}

impl Arrival {
    /// Whether it is this move's.
    pub fn is(&self, id: Uuid) -> bool {
        self.id == id
    }

    /// The guest is loaded.
    ///
    /// # Errors
    /// [`MoveError::Refused`] if the move was taken back meanwhile.
    pub fn loaded(&self, guest: &RunningGuest, shall_run: bool) -> Result<()> {
        let (arrivals, id) = (&self.arrivals, self.id);
        let _lock = arrivals.lock()?;
        let record = arrivals.read(id)?;
        let record = record.filter(|record| record.state == State::Held);
        let record = record.ok_or(MoveError::Refused { id })?;
        let guest = Guest {
            name: guest.name().to_owned(),
            qemu: guest.description().process,
            monitor: guest.dir().qmp_socket(),
            shall_run,
        };
        let guest = Some(guest);
        arrivals.write(id, &Record { guest, ..record })
    }

    /// GO was said: lets the guest run, unless the move was taken back meanwhile.
    ///
    /// # Errors
    /// What keeps it from being written down. The guest was not let run then, and must not be any more.
    pub fn go(&self) -> Result<Became> {
        let (arrivals, id) = (&self.arrivals, self.id);
        let _lock = arrivals.lock()?;
        let record = arrivals.read(id)?;
        let Some(record) = record.filter(|record| record.state == State::Held) else {
            return Ok(Became::Refused);
        };
        let record = record.in_state(State::Heard);
        arrivals.write(id, &record)?;
        Ok(arrivals.let_run_first(id, &record))
    }

    /// The guest will not be let run: nobody asks for it any more.
    pub fn give_up(self) {
        let _lock = self.arrivals.lock();
        let held = self.arrivals.read(self.id).ok().flatten();
        if held.is_some_and(|record| record.state == State::Held) {
            // What the watch would do, it finds done.
            let _ = self.arrivals.remove(self.id);
        }
    }
}

impl Record {
    fn new(state: State) -> Self {
        Record {
            state,
            boot_id: boot_id(),
            guest: None,
        }
    }

    fn in_state(&self, state: State) -> Self {
        Record {
            state,
            ..self.clone()
        }
    }
}

impl Guest {
    fn runs(&self, state: &str) -> Runs {
        Runs {
            name: self.name.clone(),
            state: match self.shall_run {
                true => state.to_owned(),
                false => "paused".to_owned(),
            },
        }
    }
}

/// Why a guest is not known to run.
enum NotLetRun {
    /// QEMU was not told to let it run, or refused.
    Never(QmpError),
    /// QEMU was told, and did not say what came of it.
    Unknown(QmpError),
}

/// Lets a guest run, if it shall; its run state. `may_have_run` makes of any state but those of a guest that was loaded the proof
/// that it did.
fn cont(guest: &Guest, may_have_run: bool) -> Result<String, NotLetRun> {
    let connected = QmpClient::connect(&guest.monitor, ANSWER).and_then(|mut qmp| {
        let state = qmp.query_status()?;
        Ok((qmp, state))
    });
    let (mut qmp, state) = connected.map_err(NotLetRun::Never)?;
    let is_as_loaded = match may_have_run {
        true => matches!(
            state,
            RunState::Paused | RunState::Prelaunch | RunState::Suspended
        ),
        false => state != RunState::Running,
    };
    if !(guest.shall_run && is_as_loaded) {
        return Ok(state.to_string());
    }
    qmp.cont().map_err(|error| match error {
        QmpError::Refused { .. } => NotLetRun::Never(error),
        _ => NotLetRun::Unknown(error),
    })?;
    let state = qmp.query_status().map_err(NotLetRun::Unknown)?;
    Ok(state.to_string())
}

/// Kills the QEMUs that hold a guest for a move, and removes what they left behind.
fn end_held(id: Uuid) -> Result<()> {
    for look in 0..LOOKS {
        if look > 0 {
            std::thread::sleep(BETWEEN_LOOKS);
        }
        for qemu in processes_with(HELD_VARIABLE, &id.to_string()) {
            let Ok(handle) = qemu.open() else {
                continue;
            };
            handle.signal(Signal::KILL)?;
            if !handle.wait_gone(KILL_TAKES)? {
                return Err(SuperviseError::Unkillable { pid: qemu.pid }.into());
            }
        }
    }
    let _ = supervise::list(&RuntimeDir::open()?);
    Ok(())
}

/// The watch's life: waits until the holder of the guest in this record is gone, and does what is left to do.
pub fn run_watch(record: &Path) -> ExitCode {
    if supervise::detach().is_err() {
        return ExitCode::FAILURE;
    }
    supervise::say_ready();
    supervise::fall_silent();
    // Nobody ever writes to it.
    let mut nothing = [0; 1];
    while let Err(error) = io::stdin().read(&mut nothing) {
        if error.kind() != io::ErrorKind::Interrupted {
            break;
        }
    }
    match finish(record) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Ends a guest that is only held, and lets one run of which GO was heard.
fn finish(record: &Path) -> Result<()> {
    let id = record.file_stem().and_then(|stem| stem.to_str());
    let id = id.and_then(|stem| stem.parse().ok());
    let (Some(id), Some(directory)) = (id, record.parent()) else {
        return Ok(());
    };
    let arrivals = Arrivals::at(directory.to_owned())?;
    let _lock = arrivals.lock()?;
    match arrivals.read(id)? {
        Some(record) if record.state == State::Held => {
            end_held(id)?;
            arrivals.remove(id)
        }
        Some(record) if record.state == State::Heard => {
            arrivals.let_run_again(id, &record).map(drop)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrivals() -> (tempfile::TempDir, Arrivals) {
        let dir = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::at(dir.path().join("arrivals")).unwrap();
        (dir, arrivals)
    }

    fn guest(process: ProcessId) -> Option<Guest> {
        Some(Guest {
            name: "web".to_owned(),
            qemu: process,
            monitor: "/nonexistent/qmp.sock".into(),
            shall_run: true,
        })
    }

    #[test]
    fn a_move_that_nobody_knows_is_refused_for_good() {
        let (_dir, arrivals) = arrivals();
        let id = Uuid::new_v4();
        assert!(matches!(arrivals.settle(id).unwrap(), Became::Refused));
        let error = arrivals.begin(id, Path::new("/nonexistent")).unwrap_err();
        assert!(matches!(
            error.downcast_ref(),
            Some(MoveError::Refused { .. })
        ));
    }

    #[test]
    fn a_held_guest_is_refused_when_somebody_asks_and_go_comes_too_late() {
        let (_dir, arrivals) = arrivals();
        let id = Uuid::new_v4();
        arrivals.write(id, &Record::new(State::Held)).unwrap();
        assert!(matches!(arrivals.settle(id).unwrap(), Became::Refused));
        assert_eq!(arrivals.read(id).unwrap().unwrap().state, State::Refused);
    }

    #[test]
    fn a_guest_that_was_let_go_and_is_gone_is_lost_and_never_refused() {
        let (_dir, arrivals) = arrivals();
        let id = Uuid::new_v4();
        let ended = ProcessId {
            pid: 1,
            start_time: u64::MAX,
        };
        let heard = Record {
            guest: guest(ended),
            ..Record::new(State::Heard)
        };
        arrivals.write(id, &heard).unwrap();
        assert!(matches!(arrivals.settle(id).unwrap(), Became::Lost));
        assert!(matches!(arrivals.settle(id).unwrap(), Became::Lost));
        // It ran, and its host was started anew.
        let ran = Record {
            boot_id: "another".to_owned(),
            ..heard.in_state(State::Runs)
        };
        arrivals.write(id, &ran).unwrap();
        assert!(matches!(arrivals.settle(id).unwrap(), Became::Lost));
    }

    #[test]
    fn a_guest_that_ran_is_forgotten_when_its_move_is_over_and_one_that_is_held_is_not() {
        let (_dir, arrivals) = arrivals();
        let (ran, held) = (Uuid::new_v4(), Uuid::new_v4());
        let record = Record {
            guest: guest(ProcessId {
                pid: 1,
                start_time: 0,
            }),
            ..Record::new(State::Runs)
        };
        arrivals.write(ran, &record).unwrap();
        fs::write(arrivals.image(ran), "an image").unwrap();
        assert!(matches!(arrivals.settle(ran).unwrap(), Became::Runs(runs) if runs.name == "web"));
        arrivals.forget(ran).unwrap();
        assert!(!arrivals.image(ran).exists() && !arrivals.record(ran).exists());
        arrivals.write(held, &Record::new(State::Held)).unwrap();
        arrivals.forget(held).unwrap();
        assert!(arrivals.record(held).exists());
    }
}
