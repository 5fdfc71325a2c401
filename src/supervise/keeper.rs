//! The keeper of a lazily restored guest: it holds a connection to QEMU's monitor that is answered even while QEMU's main
//! loop waits for a page.
//!
//! If the process that gives the pages is killed, QEMU's main loop may stand still at the next missing page, and a
//! connection made then is never greeted. So one is made beforehand, with `oob` negotiated, by a process of its own that
//! does nothing but wait. Who takes over asks it, through a socket in the guest's directory, to let QEMU listen for a
//! new source: one line, the path of the socket that QEMU shall listen on; one line back, `ok` or why not. The keeper ends
//! with QEMU, or when all memory has come.
//!
//! Source: QEMU `docs/interop/qmp-spec.rst`, out-of-band execution; `qapi/migration.json`, `migrate-recover`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::error::SuperviseError;
use super::launch::failed;
use super::serving::{Phase, Serving};
use super::side_process;
use crate::host::GuestDir;
use crate::qmp::{QmpClient, QmpError};

/// The hidden subcommand that makes the program a keeper.
pub const KEEPER_SUBCOMMAND: &str = "__keeper";

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
    let kept = side_process::detach()
        .map_err(failed("enter", dir))
        .and_then(|()| keep(&GuestDir::at(dir)?));
    match kept {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            side_process::say_failed(&error.into());
            ExitCode::FAILURE
        }
    }
}

/// Connects to a QEMU that is just starting.
fn connect(dir: &GuestDir) -> Result<QmpClient, SuperviseError> {
    let since = Instant::now();
    loop {
        match QmpClient::connect_oob(&dir.keeper_monitor(), GREETING) {
            Ok(qmp) => return Ok(qmp),
            // A guest whose start failed has no directory any more.
            Err(error) if since.elapsed() > GREETING || !dir.path().exists() => {
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

fn answer(who: UnixStream, qmp: &mut QmpClient) -> std::io::Result<()> {
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
