//! `vmstow list`: the guests that vmstow runs.

use std::fmt::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::Outcome;
use super::ui::Ui;
use crate::host::RuntimeDir;
use crate::qmp::QmpClient;
use crate::supervise::{self, GuestDescription};

/// How long a monitor may take to answer; one that somebody else uses never does.
const ANSWER: Duration = Duration::from_millis(300);

/// List the guests that vmstow runs on this host
#[derive(Debug, Args)]
pub struct ListArgs {}

#[derive(Serialize)]
struct ListedGuest {
    #[serde(flatten)]
    guest: GuestDescription,
    /// The run state in QMP's words; `None` if its monitor is in use or does not answer.
    state: Option<String>,
}

/// Prints a line a guest.
pub fn run(_: &ListArgs, ui: &Ui) -> Outcome {
    let found = supervise::list(&RuntimeDir::open()?)?;
    let guests = found.running.into_iter().map(|guest| ListedGuest {
        state: state_of(&guest),
        guest,
    });
    let guests: Vec<ListedGuest> = guests.collect();
    if guests.is_empty() {
        ui.note(&"no guest of vmstow runs here");
    }
    ui.answer(&json!({ "guests": guests }), |_| table(&guests))?;
    Ok(ExitCode::SUCCESS)
}

fn state_of(guest: &GuestDescription) -> Option<String> {
    let mut qmp = QmpClient::connect(&guest.qmp, ANSWER).ok()?;
    qmp.set_timeout(ANSWER);
    qmp.query_status().ok().map(|state| state.to_string())
}

fn table(guests: &[ListedGuest]) -> String {
    let width = |text: fn(&ListedGuest) -> &str, least: usize| {
        let widths = guests.iter().map(|guest| text(guest).len());
        widths.max().unwrap_or(0).max(least)
    };
    let names = width(|one| &one.guest.name, "NAME".len());
    let states = width(state, "STATE".len());
    let mut text = String::new();
    if guests.is_empty() {
        return text;
    }
    let _ = writeln!(
        text,
        "{:names$}  {:states$}  {:>8}  MONITOR",
        "NAME", "STATE", "PID"
    );
    for one in guests {
        let _ = writeln!(
            text,
            "{:names$}  {:states$}  {:>8}  {}",
            one.guest.name,
            state(one),
            one.guest.process.pid,
            one.guest.qmp.display()
        );
    }
    text
}

fn state(guest: &ListedGuest) -> &str {
    guest.state.as_deref().unwrap_or("?")
}
