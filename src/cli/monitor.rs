//! `vmstow monitor`: where the monitor of a guest listens.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Outcome;
use super::ui::Ui;
use crate::host::RuntimeDir;
use crate::supervise::{self, SuperviseError};

/// Print the path of the QMP socket of a guest that vmstow runs
///
/// QEMU serves one client at a time there; while you are connected, vmstow cannot save the guest.
#[derive(Debug, Args)]
pub struct MonitorArgs {
    /// The guest, as `vmstow list` names it
    name: String,
}

/// Prints the socket's path.
pub fn run(args: &MonitorArgs, ui: &Ui) -> Outcome {
    let dir = RuntimeDir::open()?.guest(&args.name)?;
    let guest = supervise::describe(&dir)?.filter(|guest| guest.process.is_alive());
    let Some(guest) = guest else {
        let guest = args.name.clone();
        return Err(SuperviseError::GuestEnded { guest }.into());
    };
    let answer = json!({ "name": args.name, "pid": guest.process.pid, "qmp": guest.qmp });
    ui.answer(&answer, |_| format!("{}\n", guest.qmp.display()))?;
    Ok(ExitCode::SUCCESS)
}
