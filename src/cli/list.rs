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
use crate::relocate;
use crate::supervise::{self, Damage, GuestDescription, Serving, damage_of, is_being_verified};

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
    /// How far its memory is, if it gets it while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    serving: Option<Serving>,
    /// Whether the image that it runs on is being verified.
    #[serde(rename = "verifying", skip_serializing_if = "std::ops::Not::not")]
    is_being_verified: bool,
    /// The host to which it was to move; it stands still until that is settled.
    #[serde(skip_serializing_if = "Option::is_none")]
    moving_to: Option<String>,
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
        let (damage, serving) = (damage_of(&dir)?, Serving::of(&dir)?);
        if let Some(damage) = &damage {
            ui.warn(&frozen(&guest, damage));
        } else if serving.as_ref().is_some_and(Serving::is_broken_off) {
            ui.warn(&unserved(&guest.name));
        }
        let moving_to = relocate::unsettled(guest.process)?;
        if let Some(host) = &moving_to {
            ui.warn(&format!(
                "{name} is on its way to {host}, or such a move was cut off: then `vmstow move {name} --settle` ends it here or lets \
                 it run on",
                name = guest.name
            ));
        }
        guests.push(ListedGuest {
            state: match damage {
                Some(_) => Some("damaged".to_owned()),
                None => state_of(&guest),
            },
            guest,
            is_being_verified: damage.is_none() && is_being_verified(&dir),
            damage,
            serving,
            moving_to,
        });
    }
    for name in &found.cut_off {
        ui.warn(&format!(
            "{name} was cut off before it ran: `vmstow restore --resume {name}` starts it over, `vmstow stop {name}` forgets it"
        ));
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

fn unserved(name: &str) -> String {
    format!(
        "nobody gives {name} its memory any more, and it waits at the next page that is missing: go on with \
         `vmstow restore --resume {name}`"
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
        "{:names$}  {:states$}  {:>8}  MEMORY  MONITOR",
        "NAME", "STATE", "PID"
    );
    for one in guests {
        let percent = one.serving.as_ref().map_or(100, Serving::percent);
        let _ = writeln!(
            text,
            "{:names$}  {:states$}  {:>8}  {percent:>4} %  {}",
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
