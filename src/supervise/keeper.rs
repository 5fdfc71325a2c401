//! The keeper of a lazily restored guest: it holds a connection to QEMU's monitor that is answered even while QEMU's main
//! loop waits for a page.
//!
//! If the process that gives the pages is killed, QEMU's main loop may stand still at the next missing page, and a
//! connection made then is never greeted. So one is made beforehand, with `oob` negotiated, by a process of its own that
//! does nothing but wait. Who takes over asks it, through a socket in the guest's directory, to let QEMU listen for a
//! new source: one line, the path of the socket that QEMU shall listen on; one line back, `ok` or why not. The keeper ends
//! with QEMU, or when all memory has come.
//!
//! It works in the guest's directory, which it is given as its standard input, and names nothing by its whole path: another
//! guest may be started under the same name while it still looks for a QEMU that was killed.
//!
//! Source: QEMU `docs/interop/qmp-spec.rst`, out-of-band execution; `qapi/migration.json`, `migrate-recover`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::fchdir;

use super::error::SuperviseError;
use super::launch::failed;
use super::serving::{Phase, Serving};
use super::side_process::{self, SideProcess};
use crate::host::GuestDir;
use crate::qmp::{QmpClient, QmpError};

/// The hidden subcommand that makes the program a keeper.
const SUBCOMMAND: &str = "__keeper";

/// How long QEMU may take to greet.
const GREETING: Duration = Duration::from_secs(20);

/// How often it is tried.
const TRY_EVERY: Duration = Duration::from_millis(2);

/// How long a command out of band may take.
const ANSWER: Duration = Duration::from_secs(10);

/// How long whoever asks may take to say what.
const QUESTION: Duration = Duration::from_secs(5);

/// Asks the keeper to let QEMU listen on `socket` for a new source of a migration that broke off.
///
/// # Errors
/// [`SuperviseError::NoKeeper`] if it is gone; [`SuperviseError::NotRecovered`] with what QEMU said.
pub fn ask_keeper(dir: &GuestDir, socket: &Path) -> Result<(), SuperviseError> {
    let asked = UnixStream::connect(dir.keeper_socket()).and_then(|mut keeper| {
        keeper.set_read_timeout(Some(ANSWER + QUESTION))?;
        keeper.write_all(format!("{}\n", socket.display()).as_bytes())?;
        let mut answer = String::new();
        BufReader::new(keeper).read_line(&mut answer)?;
        Ok(answer)
    });
    match asked {
        Ok(answer) if answer == "ok\n" => Ok(()),
        Ok(answer) if answer.is_empty() => Err(SuperviseError::NoKeeper(None)),
        Ok(answer) => Err(SuperviseError::NotRecovered {
            words: answer.trim_end().to_owned(),
        }),
        Err(error) => Err(SuperviseError::NoKeeper(Some(error))),
    }
}

/// The program's life as a keeper.
pub fn run_keeper(dir: &Path) -> ExitCode {
    match enter(dir).and_then(|dir| keep(&dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            side_process::say_failed(&error.into());
            ExitCode::FAILURE
        }
    }
}

/// Starts the keeper of the guest that has this directory.
///
/// # Errors
/// [`SuperviseError::File`], [`SuperviseError::Spawn`].
pub fn start_keeper(program: &Path, dir: &GuestDir) -> Result<SideProcess, SuperviseError> {
    let path = dir.path();
    let opened = File::open(path).map_err(failed("open", path))?;
    side_process::start(program, &[SUBCOMMAND], dir.path(), Some(opened.into()))
}

/// Goes where standard input says.
fn enter(dir: &Path) -> Result<GuestDir, SuperviseError> {
    let entered = side_process::detach().and_then(|()| Ok(fchdir(io::stdin())?));
    entered.map_err(failed("enter", dir))?;
    Ok(GuestDir::at(dir)?.entered())
}

/// Connects to a QEMU that is just starting.
fn connect(dir: &GuestDir) -> Result<QmpClient, SuperviseError> {
    let since = Instant::now();
    loop {
        match QmpClient::connect_oob(&dir.keeper_monitor(), GREETING) {
            Ok(qmp) => return Ok(qmp),
            // A guest whose start failed is described no more.
            Err(error) if since.elapsed() > GREETING || !dir.description().exists() => {
                return Err(error.into());
            }
            Err(_) => std::thread::sleep(TRY_EVERY),
        }
    }
}

fn keep(dir: &GuestDir) -> Result<(), SuperviseError> {
    let mut qmp = connect(dir)?;
    qmp.set_timeout(ANSWER);
    let path = dir.keeper_socket();
    let listener = UnixListener::bind(&path).map_err(failed("listen on", &path))?;
    side_process::say_ready();
    loop {
        let mut ready = [
            PollFd::new(&qmp, PollFlags::IN),
            PollFd::new(&listener, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed("wait for", &path)(errno.into())),
        }
        let [says, asks] = ready.map(|fd| !fd.revents().is_empty());
        if says && (qmp.poll_events().is_err() || has_all(&mut qmp)) {
            return Ok(());
        }
        if asks && let Ok((who, _)) = listener.accept() {
            // Who does not wait for the answer gets none.
            let _ = answer(who, &mut qmp);
        }
        if is_complete(dir) {
            return Ok(());
        }
    }
}

/// Whether QEMU says that all has come.
fn has_all(qmp: &mut QmpClient) -> bool {
    let events = qmp.take_events();
    events
        .iter()
        .any(|event| event.name == "MIGRATION" && event.data["status"] == "completed")
}

fn is_complete(dir: &GuestDir) -> bool {
    let serving = Serving::of(dir).ok().flatten();
    serving.is_some_and(|serving| serving.phase == Phase::Complete)
}

fn answer(who: UnixStream, qmp: &mut QmpClient) -> io::Result<()> {
    who.set_read_timeout(Some(QUESTION))?;
    let mut socket = String::new();
    BufReader::new(&who).read_line(&mut socket)?;
    let recovered = qmp.migrate_recover(&format!("unix:{}", socket.trim_end()));
    let answer = match recovered {
        Ok(()) => "ok".to_owned(),
        Err(QmpError::Refused { desc, .. }) => desc.replace('\n', " "),
        Err(error) => error.to_string(),
    };
    (&who).write_all(format!("{answer}\n").as_bytes())
}
