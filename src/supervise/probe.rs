//! A QEMU that runs no guest and is only asked: started, asked by its monitor, killed.
//!
//! It ends with the thread of ours that started it, even if that is killed. Its arguments are the caller's, who sees to it
//! that they touch nothing.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Signal, set_parent_process_death_signal, setsid};
use tempfile::TempDir;

use super::error::SuperviseError;
use super::launch::{failed, tail};
use crate::host::RuntimeDir;
use crate::qmp::{QmpClient, QmpError};

/// How often we look whether QEMU listens.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// A directory for a QEMU that is only asked; it ends with this.
#[derive(Debug)]
pub struct ProbePlace(TempDir);

/// A QEMU that is only asked.
#[derive(Debug)]
pub struct Probe {
    child: Child,
    qmp: QmpClient,
}

impl ProbePlace {
    /// Makes it beside the guests' directories, under a name that no guest can have.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn make() -> Result<Self, SuperviseError> {
        let runtime = RuntimeDir::open()?;
        let made = tempfile::Builder::new()
            .prefix(".probe-")
            .tempdir_in(runtime.path());
        Ok(ProbePlace(made.map_err(failed("create", runtime.path()))?))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where QEMU is to make its monitor's socket.
    pub fn qmp_socket(&self) -> PathBuf {
        self.path().join("qmp.sock")
    }

    fn log(&self) -> PathBuf {
        self.path().join("log")
    }

    /// Starts QEMU, its monitor on [`ProbePlace::qmp_socket`], and waits until that answers.
    ///
    /// # Errors
    /// [`SuperviseError::EarlyExit`] with its last words if it ends first, [`SuperviseError::NoMonitor`] if it takes too long.
    pub fn start(
        &self,
        argv: &[String],
        cwd: &Path,
        timeout: Duration,
    ) -> Result<Probe, SuperviseError> {
        let [program, arguments @ ..] = argv else {
            return Err(SuperviseError::EmptyArguments);
        };
        let log = File::create(self.log()).map_err(failed("create", &self.log()))?;
        let errors = log.try_clone().map_err(failed("open", &self.log()))?;
        let mut command = Command::new(program);
        command.args(arguments).current_dir(cwd);
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        end_with_us(&mut command);
        let mut child = command.spawn().map_err(|source| SuperviseError::Spawn {
            program: program.into(),
            source,
        })?;
        match self.wait_qmp(&mut child, timeout) {
            Ok(qmp) => Ok(Probe { child, qmp }),
            Err(error) => {
                end(&mut child);
                Err(error)
            }
        }
    }

    fn wait_qmp(&self, child: &mut Child, timeout: Duration) -> Result<QmpClient, SuperviseError> {
        let started = Instant::now();
        // A log that cannot be read has no words in it.
        let words = || tail(&self.log()).unwrap_or_default();
        loop {
            if let Ok(Some(status)) = child.try_wait() {
                let (status, log) = (status.to_string(), words());
                return Err(SuperviseError::EarlyExit { status, log });
            }
            let left = timeout.saturating_sub(started.elapsed());
            match QmpClient::connect(&self.qmp_socket(), left) {
                Ok(client) => return Ok(client),
                Err(QmpError::NotQmp { path, found }) => {
                    return Err(QmpError::NotQmp { path, found }.into());
                }
                Err(source) if started.elapsed() >= timeout => {
                    return Err(SuperviseError::NoMonitor {
                        waited: started.elapsed(),
                        log: words(),
                        source,
                    });
                }
                Err(_) => std::thread::sleep(LOOK_EVERY),
            }
        }
    }
}

impl Probe {
    /// Its monitor.
    pub fn qmp(&mut self) -> &mut QmpClient {
        &mut self.qmp
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// It is our child and not waited for, so that it is no other process that is killed; `Child` knows if it has ended.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Makes the child the leader of a session of its own that is killed when the thread that starts it ends.
fn end_with_us(command: &mut Command) {
    let prepare = || {
        setsid()?;
        set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe things may be done. The closure makes two system calls,
    // allocates nothing and takes no lock; an error becomes an `io::Error` from an errno, which does not allocate either.
    unsafe { command.pre_exec(prepare) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_ends_is_told_with_its_words() {
        let place = ProbePlace(tempfile::tempdir().unwrap());
        let argv = ["sh", "-c", "echo no such device >&2; exit 3"].map(str::to_owned);
        let error = place.start(&argv, Path::new("/"), Duration::from_secs(60));
        let SuperviseError::EarlyExit { status, log } = error.unwrap_err() else {
            panic!("it did not end");
        };
        assert!(status.contains('3') && log == "no such device", "{log}");
    }
}
