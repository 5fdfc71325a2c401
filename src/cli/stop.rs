//! `vmstow stop`: ends a guest that vmstow runs.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::Outcome;
use super::ui::Ui;
use crate::host::RuntimeDir;
use crate::supervise;

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
    supervise::stop(&RuntimeDir::open()?, &args.name, grace)?;
    ui.answer(&json!({ "name": args.name, "state": "stopped" }), |_| {
        format!("{} has ended\n", args.name)
    })?;
    Ok(ExitCode::SUCCESS)
}
