//! `vmstow stop`: ends a guest that vmstow runs.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::Outcome;
use super::ui::Ui;
use crate::host::RuntimeDir;
use crate::supervise::{self, Ended};

/// End a guest that vmstow runs
///
/// Its QEMU is told to quit, as if the power were cut. With --graceful the guest's operating system is asked to shut
/// down first.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The guest, as `vmstow list` names it
    name: String,

    /// Press the power button, and wait for the guest to shut down
    #[arg(long)]
    graceful: bool,

    /// How long to wait for a graceful shutdown before the power is cut
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

/// Ends the guest.
pub fn run(args: &StopArgs, ui: &Ui) -> Outcome {
    let grace = args.graceful.then(|| Duration::from_secs(args.timeout));
    let ended = supervise::stop(&RuntimeDir::open()?, &args.name, grace)?;
    let (how, words) = told(ended, args.graceful);
    let answer = json!({ "name": args.name, "state": "stopped", "how": how });
    ui.answer(&answer, |_| format!("{} {words}\n", args.name))?;
    Ok(ExitCode::SUCCESS)
}

/// How it ended: for programs, and for people.
fn told(ended: Ended, is_graceful: bool) -> (&'static str, &'static str) {
    match ended {
        Ended::Already => ("already", "had ended before"),
        Ended::Powerdown => ("powerdown", "has shut down"),
        Ended::Quit if is_graceful => ("quit", "did not shut down in time; its power was cut"),
        Ended::Quit => ("quit", "has ended"),
        Ended::Terminated => ("terminated", "did not answer; its QEMU was terminated"),
        Ended::Frozen => (
            "frozen",
            "was frozen, for its image is damaged; its QEMU was killed",
        ),
        Ended::Killed => ("killed", "did not answer; its QEMU was killed"),
    }
}
