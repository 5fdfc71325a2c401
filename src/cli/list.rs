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
use crate::progress::Progress;
use crate::qmp::QmpClient;
use crate::supervise::{self, Damage, GuestDescription, damage_of, is_being_verified};

/// How long a monitor may take to answer; one that somebody else uses never does.
const ANSWER: Duration = Duration::from_millis(300);

/// List the guests that vmstow runs on this host
#[derive(Debug, Args)]
pub struct ListArgs {}

#[derive(Serialize)]
struct ListedGuest {
    #[serde(flatten)]
    guest: GuestDescription,
    /// The run state in QMP's words, or `damaged`; `None` if its monitor is in use or does not answer.
    state: Option<String>,
    /// Why it is frozen.
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<Damage>,
    /// Whether the image that it runs on is being verified.
    #[serde(rename = "verifying", skip_serializing_if = "std::ops::Not::not")]
    is_being_verified: bool,
}

/// Prints a line a guest.
pub fn run(_: &ListArgs, ui: &Ui) -> Outcome {
    let runtime = RuntimeDir::open()?;
    let found = supervise::list(&runtime)?;
    let mut guests = Vec::new();
    for guest in found.running {
        // One that ended meanwhile is not listed.
        let Ok(dir) = runtime.guest(&guest.name) else {
            continue;
        };
        let damage = damage_of(&dir)?;
        if let Some(damage) = &damage {
            ui.warn(&frozen(&guest, damage));
        }
        guests.push(ListedGuest {
            state: match damage {
                Some(_) => Some("damaged".to_owned()),
                None => state_of(&guest),
            },
            guest,
            is_being_verified: damage.is_none() && is_being_verified(&dir),
            damage,
        });
    }
    if guests.is_empty() {
        ui.note(&"no guest of vmstow runs here");
    }
    ui.answer(&json!({ "guests": guests }), |_| table(&guests))?;
    Ok(ExitCode::SUCCESS)
}

/// What happened to the guest, and what to do.
fn frozen(guest: &GuestDescription, damage: &Damage) -> String {
    let image = guest.image.as_ref();
    let image = image.map_or("its image".to_owned(), |path| path.display().to_string());
    let places = [&damage.at, &damage.pages].into_iter().flatten();
    let places: Vec<&str> = places.map(String::as_str).collect();
    let places = match places.as_slice() {
        [] => String::new(),
        places => format!(" ({})", places.join(", ")),
    };
    format!(
        "{name} is frozen, for {image} is damaged: {}{places}; end it with `vmstow stop {name}` and restore it from \
         another copy of the image",
        damage.what,
        name = guest.name,
    )
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
